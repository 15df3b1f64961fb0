"""These need a GPU. With TEST_CARD=gpu (near, auto) most of them run on the emulated card instead."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available() and "TEST_CARD" not in os.environ:
        return torch.device("cuda", torch.cuda.current_device())
    if "TEST_CARD" in os.environ:
        return torch.device("cpu")
    pytest.skip("no CUDA device")
