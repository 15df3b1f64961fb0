"""Importing torch_csd registers "csd" with transformers, and does not import it for that."""

from __future__ import annotations

import subprocess
import sys

import pytest

import torch_csd

MAKE_A_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8)
model = LlamaForCausalLM._from_config(config, attn_implementation="csd")
assert model.config._attn_implementation == "csd"
from transformers import AttentionInterface, AttentionMaskInterface
assert "csd" in AttentionInterface() and "csd" in AttentionMaskInterface()
import inspect, transformers.modeling_utils
assert "class PreTrainedModel" in inspect.getsource(transformers.modeling_utils)
"""


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, torch_csd; assert 'transformers' not in sys.modules, 'it takes seconds'",
        "import transformers.modeling_utils; import torch_csd",
        "from torch_csd import *; StorageCache",
    ],
)
def test_csd_can_be_chosen_whichever_is_imported_first(imports):
    done = run(imports + MAKE_A_MODEL, "-W", "error::UserWarning")
    assert done.returncode == 0, done.stderr


def test_transformers_works_where_we_do_not_work_with_it():
    done = run("import sys, torch_csd; sys.modules['torch_csd.hf'] = None\nimport transformers.modeling_utils")
    assert done.returncode == 0 and "could not be registered" in done.stderr, done.stderr


def test_names_are_there_as_if_imported():
    assert {"StorageCache", "swap_attention", "KVStore"} <= set(dir(torch_csd)) & set(torch_csd.__all__)
    assert not hasattr(torch_csd, "StorageCash")


def test_without_transformers_the_names_say_what_they_need():
    hidden = (
        "import sys; sys.modules['transformers'] = None\nimport importlib.util as u; u.find_spec = lambda name: None\n"
    )
    done = run(hidden + "import torch_csd; assert not hasattr(torch_csd, 'StorageCache'); torch_csd.swap_attention")
    assert "it needs transformers" in done.stderr
