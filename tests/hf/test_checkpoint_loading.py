from __future__ import annotations

import subprocess
import sys
import threading

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


def test_loading_takes_no_memory_for_what_is_not_yet_read(checkpoint):
    code = f"""
import torch_csd
from torch_csd.bench import held
torch_csd.load_checkpoint({str(checkpoint)!r}, memory_budget="4MiB")
before = held.restart_peak()
assert before is not None, "no VmHWM"
torch_csd.load_checkpoint({str(checkpoint)!r}, memory_budget="4GiB")
print((held.memory()["VmHWM"] - before) / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "no VmHWM" in result.stderr:
        pytest.skip("VmHWM cannot be started anew here (/proc/self/clear_refs)")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 64  # MiB, where staging alone has 256


def test_the_last_token_of_a_prompt_takes_no_copy_of_the_head(checkpoint):
    model = torch_csd.load_checkpoint(checkpoint, memory_budget="16MiB")
    prompt = torch.arange(8)[None]
    with torch.no_grad():
        whole = model(prompt).logits[:, -1:]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            last = model(prompt, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole)
    # A batch of one: [1, 1, hidden] @ [1, hidden, some of the vocabulary], which torch copies.
    hidden = model.config.hidden_size
    batches = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert not [shapes for shapes in batches if shapes[0] == [1, 1, hidden]]


def test_idle_threads_are_told_to_sleep_once(checkpoint):
    torch_csd.load_checkpoint(checkpoint, memory_budget="16MiB")
    torch_csd.load_checkpoint(checkpoint, memory_budget="16MiB")
    assert [thread.name for thread in threading.enumerate()].count("torch_csd-openmp") == 1
