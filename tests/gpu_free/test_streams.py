"""A store's share on a card whose streams take their time (late_streams.py)."""

from __future__ import annotations

import contextlib

import emulated_card
import numpy as np
import pytest
import torch
from emulated_device import EmulatedDevice
from late_streams import LateCopies, LateStream, PromptStream
from support import assert_attention_equal, random_kv

import torch_csd.cuda
from torch_csd import KVStore, reference

HEADS, HEAD_DIM_K, HEAD_DIM_V = 2, 16, 24
PAGE_BYTES = 4 * HEADS * (HEAD_DIM_K + HEAD_DIM_V) * 64


class LateDevice(EmulatedDevice):
    """late: "side": copies and packing; "current": attention, which then happens when its results are read."""

    def __init__(self, late: str) -> None:
        super().__init__()
        self.late = late
        self.held_back = 0
        self._current = LateStream() if late == "current" else PromptStream()

    def current_stream(self) -> LateStream:
        return self._current

    def new_stream(self) -> LateStream:
        return LateStream() if self.late == "side" else PromptStream()

    @contextlib.contextmanager
    def use(self, stream: LateStream):
        if stream is self._current:
            yield
        else:
            with LateCopies(stream):
                yield

    def launch(self, kernel, grid, block, arguments, *, stream, shared_bytes=0):
        arguments = list(arguments)  # keeps tensors, as torch does those of the stream that they were allocated on
        if stream is not self._current:
            # Addresses, as a card is given them: what was allocated for another stream, whoever calls has to keep.
            arguments = [np.int64(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]

        def run() -> None:
            EmulatedDevice.launch(self, kernel, grid, block, arguments, stream=stream, shared_bytes=shared_bytes)

        if stream is self._current and kernel.source not in ("attend", "merge"):
            run()  # checksums: what they are of is there, and they are read by an op of torch that cannot be held back
        else:
            self.held_back += not isinstance(stream, PromptStream)
            stream.add(run)
        if kernel.expression.startswith("csd::merge"):
            stream.synchronize()  # its results go to the caller


@pytest.fixture(params=["side", "current"])
def devices(request, monkeypatch) -> list[LateDevice]:
    emulated_card.install(monkeypatch, gpu_staging="1MiB")
    made: list[LateDevice] = []

    def open_device(device: torch.device) -> LateDevice:
        made.append(LateDevice(request.param))
        return made[-1]

    monkeypatch.setattr(torch_csd.cuda, "open_device", open_device)
    return made


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("gpu_budget", [0, 20 * PAGE_BYTES])
def test_everything_is_waited_for(devices, tmp_path, resident, gpu_budget):
    torch.manual_seed(0)
    layers = {layer: random_kv(2, HEADS, 3000, HEAD_DIM_K, HEAD_DIM_V, seed=layer) for layer in range(2)}
    with KVStore(tmp_path, memory_budget="8MiB", resident=resident, gpu_budget=gpu_budget) as store:
        for layer, (k, v) in layers.items():
            for begin, end in ((0, 100), (100, 2000), (2000, 3000)):
                # The caller's own memory is reused as soon as the call returns and the stream has done it.
                new = [x[:, :, begin:end].clone() for x in (k, v)]
                store.append(layer, *new)
        for _ in range(3):
            for layer, (k, v) in layers.items():
                q = torch.randn(2, 4, 1, HEAD_DIM_K)
                assert_attention_equal(store.attend(layer, q)[0], reference.attention(q, k, v)[0])
        for layer, (k, v) in layers.items():
            for ours, theirs in zip(store.read(layer), (k, v), strict=True):
                assert torch.equal(ours, theirs)
        stats = store.stats()
        assert stats["gpu_packed_bytes"] > 2 * 80 * PAGE_BYTES and stats["gpu_attends"] == 6
    assert devices[0].held_back > 20
