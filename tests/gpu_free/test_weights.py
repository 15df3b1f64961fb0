"""Weights on a card, on an emulated one whose streams take their time: what is moved, what waits, what goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated_card
import pytest
import torch
from emulated_device import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from late_streams import LateCopies, LateStream, PromptStream
from safetensors.torch import save_file
from torch import Tensor

import torch_csd
import torch_csd.cuda
from torch_csd import GpuUnavailableError, MemoryBudgetError, StoreError, ops
from torch_csd.cuda.transfer import Completion, ForeignFile, Request, Slab
from torch_csd.weights import quantised
from torch_csd.weights.layout import Region
from torch_csd.weights.stream import Stream
from torch_csd.weights.tensor import FileTensor

KIB, MIB = 2**10, 2**20
CPU = torch.device("cpu")
WAYS = ["pinned", "gds"]


class LateDevice(EmulatedDevice):
    """Copies happen when they are waited for, or as the dice fall, and so does what a test issues by `compute`."""

    def __init__(self, dice: random.Random | None = None, *, late: bool = True) -> None:
        super().__init__()
        self._dice = dice
        self._late = late
        self._current = self.new_stream()
        self.memory_bytes = 0
        self.failures: list[Exception] = []  # of the copies that come next
        self.copies = 0

    def current_stream(self) -> LateStream:
        return self._current

    def new_stream(self) -> LateStream:
        return LateStream(self._dice) if self._late else PromptStream()

    @contextlib.contextmanager
    def use(self, stream: LateStream) -> Iterator[None]:
        self.copies += 1
        if self.failures:
            raise self.failures.pop(0)
        with LateCopies(stream):
            yield

    def compute(self, work: Callable[[], object]) -> None:
        self._current.add(work)

    def new_memory(self, byte_count: int) -> Tensor:
        self.memory_bytes += byte_count
        return super().new_memory(byte_count)

    new_pinned_memory = new_memory


class StubTransfer:
    """Stands for GdsTransfer: requests are done in any order, when they are reaped, and not before `after`."""

    name = "gds"
    depth = 4

    def __init__(self, device: LateDevice, dice: random.Random | None = None) -> None:
        self.read_bytes = 0
        self.failing = 0  # errno of what is reaped next
        self._device = device
        self._dice = dice or random.Random(0)
        self._requests: list[Request] = []
        self._files: list[ForeignFile] = []
        self.closed = False

    def open(self, path: str) -> ForeignFile:
        self._files.append(ForeignFile(path))
        return self._files[-1]

    def register(self, byte_count: int) -> Slab:
        return Slab(self._device.new_memory(byte_count), None)

    def submit(self, request: Request) -> None:
        assert len(self._requests) < self.depth
        request.file.check(request)
        self._requests.append(request)

    def reap(self, *, wait: bool = False) -> list[Completion]:
        if not self._requests or not (wait or self._dice.random() < 0.5):
            return []
        request = self._requests.pop(self._dice.randrange(len(self._requests)))
        if self.failing:
            error, self.failing = OSError(self.failing, "as told"), 0
            return [Completion(request, error, None)]
        if request.after is not None:
            request.after.synchronize()
        with open(request.file.descriptor_path, "rb") as file:
            data = os.pread(file.fileno(), request.byte_count, request.file_offset)
        assert len(data) == request.file.existing_bytes(request)
        part = request.slab.memory[request.slab_offset : request.slab_offset + len(data)]
        part.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.read_bytes += request.byte_count
        return [Completion(request, None, None)]

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def close(self) -> None:
        while self._requests:
            self.reap(wait=True)
        for file in self._files:
            file.close()
        self.closed = True


@pytest.fixture
def install(monkeypatch) -> Callable[..., LateDevice]:
    """A card for what is opened from now on, and for load_checkpoint's device."""
    emulated_card.install(monkeypatch)

    def install(way: str = "pinned", dice: random.Random | None = None, late: bool = True) -> LateDevice:
        device = LateDevice(dice, late=late)
        device.transfer = StubTransfer(device, dice) if way == "gds" else None
        monkeypatch.setattr(torch_csd.cuda, "open_device", lambda _: device)
        monkeypatch.setattr(torch_csd.cuda, "choose_direct", lambda *_: (device.transfer, "as the test wants it"))
        return device

    return install


@pytest.fixture
def file(tmp_path) -> tuple[Path, Tensor]:
    """A file that is no whole number of blocks, and its bytes."""
    data = torch.randint(0, 256, (MIB + 1234,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "weights.bin"
    path.write_bytes(data.numpy().tobytes())
    return path, data


@contextlib.contextmanager
def opened(staging_bytes: int = 256 * KIB, budget_bytes: int = 4 * MIB, **options: object) -> Iterator[Stream]:
    stream = Stream(budget_bytes, staging_bytes=staging_bytes, device=CPU, **options)
    try:
        yield stream
    finally:
        stream.close()


def region(stream: Stream, path: Path, offset: int, byte_count: int) -> Region:
    return Region.make(stream.open(path), torch.uint8, (byte_count,), offset)


# ---- streams of ranges -----------------------------------------------------------------------------------------------

ranges = st.lists(
    st.tuples(st.integers(0, MIB), st.integers(0, 50 * KIB)).map(lambda each: (each[0], min(each[1], MIB - each[0]))),
    min_size=1,
    max_size=8,
    unique=True,
)


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data(), parts=ranges, seed=st.integers(0, 2**32), keep=st.booleans())
def test_what_is_computed_with_is_what_the_file_has(install, file, way, data, parts, seed, keep):
    """Whatever the order, and however late the card does what it was given: nothing is seen too early, and no memory
    is written to while something still uses it."""
    device = install(way, random.Random(seed))
    path, content = file
    computed: list[tuple[Tensor, Tensor]] = []
    with opened() as stream:
        layouts = [region(stream, path, *part) for part in parts]
        stream.expect(layouts, keep=keep)
        steps = st.lists(
            st.one_of(
                st.just(list(range(len(parts)))),  # a pass as expected
                st.lists(st.integers(0, len(parts) - 1), max_size=4),
                st.lists(st.integers(0, len(parts) - 1), max_size=3).map(lambda each: ("routed", each)),
                st.lists(st.integers(0, MIB // 1024 - 1), max_size=5).map(lambda each: ("rows", each)),
            ),
            min_size=1,
            max_size=5,
        )
        for step in data.draw(steps):
            kind, which = step if isinstance(step, tuple) else ("use", step)
            if kind == "rows":
                table = Region.make(stream.open(path), torch.uint8, (MIB // 1024, 1024), 17)
                rows = stream.rows(table, torch.tensor(which, dtype=torch.int64))
                assert torch.equal(rows, content[17 : 17 + MIB].view(-1, 1024)[which])
                continue
            if kind == "routed":
                stream.announce([layouts[index] for index in which])
            for index in which:
                begin, count = parts[index]
                out = torch.zeros(count, dtype=torch.uint8)
                with stream.use(layouts[index], routed=kind == "routed") as elements:
                    device.compute(lambda out=out, elements=elements: out.copy_(elements))
                computed.append((out, content[begin : begin + count]))
        device.current_stream().synchronize()
        stats = stream.stats()
        assert stats["gpu_io"] == way and stats["gpu_reason"] == "as the test wants it"
        assert device.memory_bytes <= stats["memory_budget_bytes"]
    for out, expected in computed:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["ready", "users", "copies"])
def test_this_test_would_see_an_event_that_is_not_waited_for(install, file, way, place, monkeypatch):
    """The device goes on as the dice fall: without a wait some computation sees other bytes."""
    if way == "gds" and place != "users":
        pytest.skip("what GPUDirect Storage brings is there when it says so, and is copied by nobody")
    from torch_csd.cuda import weights
    from torch_csd.cuda.weights import Ring, WeightCard

    if place == "users":
        monkeypatch.setattr(Ring, "users", lambda self, memory: [])
    elif place == "copies":
        monkeypatch.setattr(Ring, "users", lambda self, memory: [mark.event for mark in self._marks])
        monkeypatch.setattr(weights, "_has_passed", lambda event: True)
        monkeypatch.setattr(Ring, "mark", lambda self, memory, event: self._marks.append(all_marks(memory, event)))
    else:
        wait = WeightCard.wait

        def forgetful(self, unit, reading):
            wait(self, unit, reading)
            unit.ready = None

        monkeypatch.setattr(WeightCard, "wait", forgetful)
    path, content = file
    wrong = 0
    for seed in range(20):
        device = install(way, random.Random(seed))
        with opened() as stream:
            layouts = [region(stream, path, begin, 50 * KIB) for begin in range(0, MIB, 64 * KIB)]
            stream.expect(layouts, keep=False)
            computed = []
            for number, layout in enumerate(layouts * 2):
                out = torch.zeros(50 * KIB, dtype=torch.uint8)
                with stream.use(layout) as elements:
                    device.compute(lambda out=out, elements=elements: out.copy_(elements))
                begin = number % len(layouts) * 64 * KIB
                computed.append((out, content[begin : begin + 50 * KIB]))
            device.current_stream().synchronize()
        wrong += sum(not torch.equal(out, expected) for out, expected in computed)
    assert wrong > 0


def all_marks(memory: Tensor, event: object) -> object:
    from torch_csd.cuda.weights import _Mark

    return _Mark(memory.data_ptr(), memory.data_ptr() + memory.numel(), event, memory)


@pytest.mark.parametrize("way", WAYS)
def test_the_next_are_on_their_way_while_one_is_computed_with(install, file, way):
    device = install(way)
    path, _ = file
    with opened() as stream:
        layouts = [region(stream, path, begin, 40 * KIB) for begin in range(0, MIB, 40 * KIB)]
        stream.expect(layouts, keep=False)
        with stream.use(layouts[0]):
            deadline = 200
            while stream.stats()["gpu_copied_bytes"] + stream.stats()["gpu_direct_bytes"] < 3 * 40 * KIB and deadline:
                with stream.use(layouts[0]):  # things are noticed when the stream is used
                    deadline -= 1
                threading.Event().wait(0.01)
            assert deadline, stream.stats()
            assert not device.current_stream().done, "and nobody has waited for what is computed"


def test_the_host_waits_for_no_computation_while_there_is_room(install, file):
    device = install("pinned")
    path, _ = file
    with opened(staging_bytes=MIB) as stream:
        layouts = [region(stream, path, begin, 20 * KIB) for begin in range(0, 400 * KIB, 20 * KIB)]
        stream.expect(layouts, keep=False)
        for layout in layouts:
            with stream.use(layout):
                device.compute(lambda: None)
        assert device.current_stream().done == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_stays_comes_once(install, file, way):
    device = install(way, late=False)
    path, content = file
    with opened() as stream:
        layouts = [region(stream, path, begin, 40 * KIB) for begin in range(0, 10 * 40 * KIB, 40 * KIB)]
        stream.expect(layouts)
        for _ in range(3):
            for number, layout in enumerate(layouts):
                with stream.use(layout) as elements:
                    assert torch.equal(elements, content[number * 40 * KIB : (number + 1) * 40 * KIB])
        stats = stream.stats()
        assert stats["gpu_copied_bytes"] + stats["gpu_direct_bytes"] <= 10 * 44 * KIB
        assert stats["resident_bytes"] == 10 * 40 * KIB and device.memory_bytes <= 4 * MIB


def test_a_card_without_memory_keeps_less_and_says_so_once(install, file, monkeypatch):
    device = install("pinned", late=False)
    path, content = file
    with opened() as stream:
        layouts = [region(stream, path, begin, 40 * KIB) for begin in range(0, MIB, 40 * KIB)][:-1]
        stream.expect(layouts)
        left = iter(range(3))
        new_memory = device.new_memory

        def short_memory(byte_count: int) -> Tensor:
            if next(left, None) is None:
                raise MemoryBudgetError("emulation: wanted more than there is")
            return new_memory(byte_count)

        device.new_memory = short_memory
        with pytest.warns(UserWarning, match="fewer weights than memory_budget allows stay on the card") as told:
            for _ in range(2):
                for number, layout in enumerate(layouts):
                    with stream.use(layout) as elements:
                        assert torch.equal(elements, content[number * 40 * KIB : (number + 1) * 40 * KIB])
        assert len(told) == 1 and stream.stats()["resident_bytes"] == 3 * 40 * KIB


@pytest.mark.parametrize("way", WAYS)
def test_threads_may_share_a_stream_of_weights(install, file, way):
    install(way, late=False)
    path, content = file
    problems: list[object] = []
    with opened(staging_bytes=512 * KIB) as stream:
        layouts = [region(stream, path, begin, 30 * KIB) for begin in range(0, MIB - 30 * KIB, 30 * KIB)]
        stream.expect(layouts, keep=False)
        table = Region.make(stream.open(path), torch.uint8, (1024, 1024), 0)

        def work(seed: int) -> None:
            dice = random.Random(seed)
            try:
                for _ in range(60):
                    number = dice.randrange(len(layouts))
                    with stream.use(layouts[number]) as elements:
                        begin = number * 30 * KIB
                        if not torch.equal(elements, content[begin : begin + 30 * KIB]):
                            problems.append(number)
                    row = dice.randrange(1024)
                    if not torch.equal(stream.rows(table, torch.tensor([row]))[0], content[row * 1024 :][:1024]):
                        problems.append(("row", row))
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert not problems


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_is_raised_once(install, file):
    device = install("pinned")
    path, content = file
    with opened() as stream:
        layouts = [region(stream, path, begin, 40 * KIB) for begin in range(0, MIB - 40 * KIB, 40 * KIB)]
        stream.expect(layouts, keep=False)
        device.failures.append(RuntimeError("CUDA error: out of memory"))
        with pytest.raises(RuntimeError, match="CUDA error"):
            for layout in layouts:
                with stream.use(layout):
                    pass
        for _ in range(2):
            for number, layout in enumerate(layouts):
                with stream.use(layout) as elements:
                    out = torch.zeros(40 * KIB, dtype=torch.uint8)
                    device.compute(lambda out=out, elements=elements: out.copy_(elements))
                device.current_stream().synchronize()
                assert torch.equal(out, content[number * 40 * KIB : (number + 1) * 40 * KIB])


def test_a_direct_read_that_fails_is_raised_once(install, file):
    device = install("gds", late=False)
    path, content = file
    with opened() as stream:
        layout = region(stream, path, 5, 40 * KIB)
        device.transfer.failing = errno.EIO
        with pytest.raises(StoreError, match=r"weights.bin: reading 45056 bytes at byte 0 for the card failed: Input"):
            with stream.use(layout):
                pass
        with stream.use(layout) as elements:
            assert torch.equal(elements, content[5 : 5 + 40 * KIB])


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_changed_is_an_error_and_nothing_hangs(install, file, way):
    install(way, late=False)
    path, _ = file
    with opened() as stream:
        layouts = [region(stream, path, begin, 40 * KIB) for begin in range(0, MIB - 40 * KIB, 40 * KIB)]
        stream.expect(layouts, keep=False)
        with stream.use(layouts[0]):
            pass
        os.truncate(path, 700 * KIB)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"weights\.bin: .*(changed|failed)"):
                for layout in layouts:
                    with stream.use(layout):
                        pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("late", [True, False])
def test_a_stream_may_be_closed_with_units_on_their_way(install, file, way, late):
    device = install(way, late=late)
    path, _ = file
    with opened() as stream:
        layouts = [region(stream, path, begin, 40 * KIB) for begin in range(0, MIB - 40 * KIB, 40 * KIB)]
        stream.expect(layouts, keep=False)
        for layout in layouts[:3]:
            with stream.use(layout):
                pass
        stream.close()
        stream.close()
        assert device.transfer is None or device.transfer.closed
        with pytest.raises(StoreError):
            with stream.use(layouts[10]):
                pass


def test_what_does_not_fit_is_an_error(install, file):
    install("pinned", late=False)
    path, _ = file
    with opened() as stream:
        with pytest.raises(MemoryBudgetError, match="raise memory_budget"):
            with stream.use(region(stream, path, 0, 300 * KIB)):
                pass
    with pytest.raises(MemoryBudgetError, match="at least 4194304 bytes"):
        Stream(MIB, device=CPU)


# ---- quantised rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(in_features=st.integers(1, 300), out_features=st.integers(1, 9), offset=st.integers(0, 63))
@settings(max_examples=20)
def test_rows_are_unpacked_to_the_same_values_by_torch(bits, dtype, in_features, out_features, offset):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(in_features))
    weight[0, 0] = torch.tensor([torch.nan, torch.inf, 1e-9, 6e4, 0.0])[offset % 5]
    rows = ops.quantise_rows(weight, bits)
    memory = torch.zeros(rows.numel() + offset, dtype=torch.uint8)
    moved = memory[offset:].view(rows.shape).copy_(rows)
    expected = ops.dequantise_rows(rows, bits=bits, in_features=in_features, dtype=dtype)
    ours = quantised.unpack_rows(moved, bits=bits, in_features=in_features, dtype=dtype)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_a_quantised_linear_on_a_card_goes_in_blocks(monkeypatch):
    weight, x, bias = torch.randn(70, 100), torch.randn(3, 5, 100), torch.randn(70)
    rows = ops.quantise_rows(weight, 8)
    how = dict(bits=8, in_features=100)
    whole = torch.nn.functional.linear(x, ops.dequantise_rows(rows, dtype=torch.float32, **how), bias)
    for block_rows in (1, 8, 64, 1000):
        monkeypatch.setattr(quantised, "CARD_BLOCK_BYTES", 400 * block_rows)
        ours = quantised.linear_on_card(x, rows, bias=bias, dtype=torch.float32, **how)
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)  # sums of 100 in another order
    with pytest.raises(ValueError, match="x must have 100 features"):
        quantised.linear_on_card(x[..., 1:], rows, dtype=torch.float32, **how)


# ---- tensors and models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_of_a_card_compute_as_dense_ones(install, tmp_path, way, stored):
    install(way, late=False)
    weight = torch.randn(300, 200).to(stored)
    small = torch.randn(7).to(stored)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "small": small, "weight": weight}, tmp_path / "a.safetensors")
    from torch_csd.weights.files import read_header

    header = read_header(tmp_path / "a.safetensors")
    x = torch.randn(4, 200, dtype=torch.bfloat16)
    with opened() as stream:
        file = stream.open(header.path)
        tensors = {
            name: FileTensor(Region.make(file, entry.dtype, entry.shape, entry.offset), stream, dtype=torch.bfloat16)
            for name, entry in header.entries.items()
        }
        dense = weight.to(torch.bfloat16)
        assert torch.equal(torch.nn.functional.linear(x, tensors["weight"]), torch.nn.functional.linear(x, dense))
        index = torch.tensor([[5, 299], [0, 5]])
        assert torch.equal(torch.nn.functional.embedding(index, tensors["weight"]), dense[index])
        assert torch.equal(tensors["small"] * 2, small.to(torch.bfloat16) * 2)
        assert torch.equal(tensors["weight"].to_dense(), dense)


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in tests/hf
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["llama", "mixtral"])
def checkpoint(request, tmp_path) -> str:
    from hf.models import model_of

    model_of(request.param, "eager").save_pretrained(tmp_path / request.param)
    return str(tmp_path / request.param)


@pytest.fixture
def llama(tmp_path) -> str:
    from hf.models import model_of

    model_of("llama", "eager").save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@contextlib.contextmanager
def loaded(path: str, **options: object):
    model = torch_csd.load_checkpoint(path, memory_budget="4MiB", weight_directory=path, **options)
    try:
        yield model
    finally:
        model.weight_stream.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_dtype", [None, "int8", "int4"])
def test_a_model_on_a_card_has_the_logits_of_the_cpu(install, checkpoint, monkeypatch, way, dtype, weight_dtype):
    from hf.models import prompts

    options = dict(dtype=dtype, weight_dtype=weight_dtype, attn_implementation="sdpa")
    monkeypatch.setattr(quantised, "X_ROWS_MAX", dict.fromkeys(quantised.X_ROWS_MAX, 0))  # else by other arithmetic
    inputs = prompts(40, 23)
    monkeypatch.setattr(torch_csd.drive, "is_card", lambda device: False)
    with loaded(checkpoint, **options) as model, torch.no_grad():
        assert model.weight_stream.card is None
        expected = [model(**inputs).logits for _ in range(2)]
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    monkeypatch.setattr(torch_csd.drive, "is_card", lambda device: True)
    device = install(way, late=False)
    with loaded(checkpoint, **options) as model, torch.no_grad():
        for logits in expected:
            assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
        stats = model.weight_stream.stats()
    moved = stats["gpu_copied_bytes"], stats["gpu_direct_bytes"]
    assert all(moved[WAYS.index(way) :][:1]) and (weight_dtype or not moved[1 - WAYS.index(way)])
    assert device.memory_bytes <= stats["memory_budget_bytes"]


@pytest.mark.parametrize("on_card", [True, False])
def test_a_model_loaded_in_inference_mode_serves_outside_of_it(install, llama, monkeypatch, on_card):
    install("pinned", late=False)
    monkeypatch.setattr(torch_csd.drive, "is_card", lambda device: on_card)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode(), loaded(llama) as model:
        expected = model(ids).logits
        with torch.inference_mode(False), torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_weights_and_kv_may_both_go_to_the_card(install, checkpoint, tmp_path):
    from hf.models import prompts

    install("pinned", late=False)
    inputs = prompts(200)
    with loaded(checkpoint) as model, torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with torch_csd.StorageCache(model.config, tmp_path, memory_budget="4MiB", resident=False) as cache:
            assert torch.equal(
                model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False), expected
            )
            assert cache.stats()["gpu_attends"] > 0


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_that_says_so(llama):
    with pytest.raises(
        GpuUnavailableError, match='device="cuda" needs a CUDA device; there is none .*use device="cpu"'
    ):
        torch_csd.load_checkpoint(llama, device="cuda")


def test_moving_a_model_of_the_cpu_says_what_that_costs(llama):
    with loaded(llama) as model:
        weight = model.lm_head.weight
        # Not weight.to(...): a torch without CUDA refuses the name before it asks us.
        with pytest.warns(UserWarning, match=r'loaded for cpu .*load_checkpoint\(..., device="cuda:0"\)') as told:
            for _ in range(2):
                moved = torch_csd.weights.functions._to_copy(weight.data, device=torch.device("cuda:0"))
                assert moved.device == torch.device("cuda:0")
        assert len(told) == 1


@pytest.mark.parametrize("weight_dtype", [None, "int4"])
def test_weights_of_the_cpu_compute_where_they_are_moved_to(llama, weight_dtype):
    """By what they are there: on meta no kernel of the CPU would do."""
    with loaded(llama, weight_dtype=weight_dtype) as model, torch.no_grad():
        moved = model.to("meta")
        logits = torch.nn.functional.linear(torch.empty(2, 64, device="meta"), moved.lm_head.weight)
        assert (logits.shape, logits.device.type) == ((2, 96), "meta")


def test_weights_on_the_cpu_bring_nothing_of_a_gpu_in(llama):
    script = (
        "import sys, torch, torch_csd\n"
        "model = torch_csd.load_checkpoint(sys.argv[1], memory_budget='4MiB')\n"
        "model(torch.tensor([[1, 2, 3]]))\n"
        "cuda = [name for name in sys.modules if name.startswith('torch_csd.cuda')]\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} & {'kvikio', 'cupy', 'numba'}\n"
        "print(cuda, sorted(loaded), torch.cuda.is_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", script, llama], capture_output=True, text=True)
    assert ran.stdout == "[] [] False\n", ran.stderr
