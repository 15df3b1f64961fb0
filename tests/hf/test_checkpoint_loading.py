from __future__ import annotations

import pytest
import torch
import transformers

import torch_csd
from torch_csd.bench.checkpoint import llama_config, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(directory, llama_config(2**24))
    return directory


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_loading_within_any_grad_mode_gives_a_model_that_runs(checkpoint, mode):
    with mode():
        model = torch_csd.load_checkpoint(checkpoint, memory_budget="16MiB")
        assert model(torch.tensor([[7]])).logits.isfinite().all()


def test_weights_are_quantised_where_progress_bars_are_turned_off(checkpoint, tmp_path):
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        options = {"weight_dtype": "int4", "weight_directory": tmp_path}
        model = torch_csd.load_checkpoint(checkpoint, memory_budget="16MiB", **options)
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
    with torch.no_grad():
        assert model(torch.tensor([[7]])).logits.isfinite().all()
