"""Tensors in files: views, casts, joins and ops on them give what they give on the same tensor in memory, or a clear
error; and no more is read than that takes."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import torch_csd
from torch_csd import CheckpointError, MemoryBudgetError, StoreClosedError, StoreError, ops
from torch_csd.weights import tensor as tensor_module
from torch_csd.weights.files import SAFETENSORS_DTYPES
from torch_csd.weights.functions import SMALL_BYTES
from torch_csd.weights.layout import Region
from torch_csd.weights.stream import Stream
from torch_csd.weights.tensor import FileTensor

MIB = 2**20
DTYPES = [*SAFETENSORS_DTYPES.values(), torch.complex128]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Any bytes, but for numbers that are compared: no NaN."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    return torch.randint(0, 128, shape, generator=generator).to(dtype)


def image(tensor: torch.Tensor) -> bytes:
    return torch.cat([tensor.reshape(-1)]).view(torch.uint8).numpy().tobytes()


def stored(path: Path, tensor: torch.Tensor, offset: int = 0, **settings: object) -> FileTensor:
    """The tensor in a file of its own, with other bytes before it and after it."""
    path.write_bytes(b"\xa5" * offset + image(tensor) + b"\xa5" * 3)
    return torch_csd.from_file(path, tensor.dtype, tensor.shape, offset, **settings)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, and an ordinary tensor."""
    ours = ours.to_dense() if isinstance(ours, FileTensor) else ours
    assert type(ours) is torch.Tensor
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    assert image(ours) == image(expected)


@pytest.fixture
def stream(monkeypatch) -> Stream:
    """The one of tensors that belong to no model, new, with a small budget."""
    new = Stream(4 * MIB)
    monkeypatch.setattr(tensor_module, "_default", (os.getpid(), new))
    yield new
    new.close()


def bytes_read(stream: Stream) -> int:
    """Once what is being read ahead is there."""
    while any(each.ticket is not None and not ops.reader_is_done(stream.reader, each.ticket)
              for each in list(stream._units.values())):  # fmt: skip
        time.sleep(0.001)
    return stream.stats()["bytes_read"]


# ---- where they come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8, 4093, 70_001])
def test_every_dtype_is_read_from_any_byte_on(tmp_path, dtype, offset):
    dense = random_tensor((3, 5, 7), dtype)
    tensor = stored(tmp_path / "file", dense, offset)
    assert isinstance(tensor, FileTensor) and tensor.dtype == dtype and tensor.shape == dense.shape
    assert_same(tensor, dense)
    assert_same(tensor[1, 2:, ::3], dense[1, 2:, ::3])
    assert_same(tensor[torch.tensor([2, 0, 2])], dense[torch.tensor([2, 0, 2])])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_tensors_of_one_element_or_none(tmp_path, shape, dtype):
    dense = random_tensor(shape, dtype)
    tensor = stored(tmp_path / "file", dense, 5)
    assert_same(tensor, dense)
    assert_same(tensor.reshape(-1), dense.reshape(-1))
    assert_same(tensor.unsqueeze(0).expand(4, *shape), dense.unsqueeze(0).expand(4, *shape))
    assert_same(torch.cat([tensor.reshape(-1)] * 2), torch.cat([dense.reshape(-1)] * 2))
    assert_same(torch.stack([tensor] * 2), torch.stack([dense] * 2))
    assert "FileTensor" in repr(tensor)


def test_an_empty_file_holds_a_tensor_of_no_elements(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert torch_csd.from_file(tmp_path / "file", torch.float32, [0, 4]).to_dense().shape == (0, 4)


@pytest.mark.parametrize("names", [False, True], ids=["aligned", "odd header"])
def test_every_tensor_of_a_safetensors_file_is_found_by_name(tmp_path, names):
    tensors = {
        f"{dtype}{'x' * i if names else ''}": random_tensor((i, 3), dtype)
        for i, dtype in enumerate(SAFETENSORS_DTYPES.values())
        if dtype != torch.float8_e8m0fnu  # safetensors writes none of these from torch
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, dense in tensors.items():
        assert_same(torch_csd.from_safetensors(tmp_path / "model.safetensors", name), dense)
    with pytest.raises(KeyError, match="no tensor 'other'"):
        torch_csd.from_safetensors(tmp_path / "model.safetensors", "other")


def test_bad_arguments_say_what_is_wanted(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))

    def new(dtype=torch.float32, shape=(2,), offset=0, mode="r", name="file"):
        return torch_csd.from_file(tmp_path / name, dtype, shape, offset, mode=mode)

    with pytest.raises(CheckpointError, match=r"file: \[26\] elements of torch.float32 from byte 0 .* has 100 bytes"):
        new(shape=(26,))
    with pytest.raises(CheckpointError, match="go to byte 101"):
        new(torch.uint8, (1,), 100)
    for huge in ((2**62, 2**62), (2**40, 2**40), (2**63,)):
        with pytest.raises((CheckpointError, ValueError), match="shape|elements"):
            new(shape=huge)
    with pytest.raises(ValueError, match="mode must be"):
        new(mode="w")
    with pytest.raises(ValueError, match="offset"):
        new(offset=-1)
    with pytest.raises(ValueError, match="shape"):
        new(shape=(-1,))
    with pytest.raises(TypeError, match="dtype must be a torch.dtype"):
        new(dtype="float32")
    with pytest.raises(ValueError, match="dtype must be of whole bytes"):
        new(dtype=torch.quint8)
    for name in ("missing", "."):
        with pytest.raises(StoreError, match=str(tmp_path)):
            new(name=name)


# ---- views ----------------------------------------------------------------------------------------------------------


@st.composite
def views(draw, shape):
    """(name, function) of one view of a tensor of that shape."""
    rank = len(shape)
    dim = draw(st.integers(-rank, rank - 1)) if rank else 0
    size = shape[dim] if rank else 1
    choices = ["unsqueeze", "squeeze", "flatten", "view", "reshape", "expand", "none", "ellipsis", "detach", "view_as"]
    if rank:
        choices += ["slice", "narrow", "transpose", "permute", "split", "chunk", "unbind", "movedim", "squeeze_dim"]
        choices += ["unfold", "tensor_split", "split_sizes", "swapaxes", "getitem"]
        choices += ["select", "negative"] if size else []
    if rank >= 2:
        choices += ["mT", "diagonal", "flatten_some"]
    if rank == 2:
        choices += ["t", "T"]
    kind = draw(st.sampled_from(choices))
    begin, end = draw(st.integers(-size - 1, size + 1)), draw(st.integers(-size - 1, size + 1))
    step = draw(st.integers(1, 3))
    start = draw(st.integers(0, size))
    length = draw(st.integers(0, size - start))
    index = draw(st.integers(0, max(size - 1, 0)))
    count = draw(st.integers(1, 4))
    order = draw(st.permutations(range(rank)))
    other = draw(st.integers(0, rank - 1)) if rank else 0
    place = draw(st.integers(-rank - 1, rank))
    numel = torch.Size(shape).numel()
    half = [2, numel // 2] if numel and numel % 2 == 0 else [numel]
    indexing = tuple(slice(None) for _ in range(dim % rank)) if rank else ()
    width = draw(st.integers(1, size)) if size else 0
    functions = {
        "slice": lambda t: t[(*indexing, slice(begin, end, step))],
        "getitem": lambda t: t[(..., slice(start, None), None)],
        "negative": lambda t: t[(*indexing, -1)],
        "narrow": lambda t: t.narrow(dim, start, length),
        "select": lambda t: t.select(dim, index),
        "transpose": lambda t: t.transpose(dim, other),
        "swapaxes": lambda t: torch.swapaxes(t, dim, other),
        "permute": lambda t: t.permute(order),
        "movedim": lambda t: t.movedim(dim, other),
        "unsqueeze": lambda t: t.unsqueeze(place),
        "squeeze": lambda t: t.squeeze(),
        "squeeze_dim": lambda t: t.squeeze(dim),
        "flatten": lambda t: t.flatten(),
        "flatten_some": lambda t: t.flatten(0, 1),
        "view": lambda t: t.view(half),
        "view_as": lambda t: t.view_as(torch.empty(numel)),
        "reshape": lambda t: t.reshape(-1),
        "expand": lambda t: t.expand(count, *t.shape),
        "split": lambda t: t.split(count, dim)[0],
        "split_sizes": lambda t: t.split([start, size - start], dim)[1],
        "tensor_split": lambda t: t.tensor_split(count, dim)[-1],
        "chunk": lambda t: t.chunk(count, dim)[-1],
        "unbind": lambda t: t.unbind(dim)[-1] if size else t,
        "unfold": lambda t: t.unfold(dim, width, count),
        "diagonal": lambda t: t.diagonal(draw_offset, 0, 1),
        "mT": lambda t: t.mT,
        "T": lambda t: t.T,
        "t": lambda t: t.t(),
        "none": lambda t: t[None],
        "ellipsis": lambda t: t[...],
        "detach": lambda t: t.detach(),
    }
    draw_offset = draw(st.integers(-2, 2))
    return kind, functions[kind]


def walk(data, ours: torch.Tensor, dense: torch.Tensor, *, must_be_lazy: bool) -> None:
    """A chain of views of both: the same, or the tensor says that it cannot."""
    for _ in range(data.draw(st.integers(1, 6), label="length")):
        if dense.numel() > 20_000 or dense.dim() > 6:
            break
        name, view = data.draw(views(tuple(dense.shape)), label="view")
        try:
            dense_next = view(dense)
        except RuntimeError as error:
            if "view size is not compatible" in str(error):
                with pytest.raises((RuntimeError, NotImplementedError)):
                    view(ours)
                continue
            with pytest.raises((RuntimeError, IndexError)):  # as torch says it
                view(ours)
            continue
        try:
            ours = view(ours)
        except NotImplementedError as error:
            assert "to_dense()" in str(error)
            copied = (
                dense_next.numel() and dense_next.untyped_storage().data_ptr() != dense.untyped_storage().data_ptr()
            )
            assert copied or not must_be_lazy, f"{name} is a view"
            continue
        dense = dense_next
        assert isinstance(ours, FileTensor) and ours.shape == dense.shape
    assert_same(ours, dense)


@pytest.mark.parametrize("inference", [False, True])
@given(data=st.data())
def test_any_chain_of_views_is_what_it_is_of_an_ordinary_tensor(tmp_path, stream, inference, data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=4), label="shape")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.complex64]), label="dtype")
    dense = random_tensor(tuple(shape), dtype)
    ours = stored(tmp_path / "file", dense, data.draw(st.sampled_from([0, 3, 4095]), label="offset"))
    before = bytes_read(stream)
    with torch.inference_mode(inference):
        walk(data, ours, dense, must_be_lazy=True)
    assert bytes_read(stream) - before <= 8 * dense.numel() * dtype.itemsize, "only to_dense() reads"


@pytest.mark.parametrize("inference", [False, True])
@given(data=st.data())
def test_any_chain_of_views_of_joined_tensors_is_what_it_is_of_ordinary_ones(tmp_path, stream, inference, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), label="shape")
    numel = torch.Size(shape).numel()
    dense = random_tensor((8, *shape))
    ours = stored(tmp_path / "file", dense, 1)
    before = bytes_read(stream)
    with torch.inference_mode(inference):
        pairs = list(zip(ours.unbind(), dense.unbind(), strict=True))
        pairs = [(mine[:, ::2], theirs[:, ::2]) if len(shape) > 1 else (mine, theirs) for mine, theirs in pairs]
        for _ in range(data.draw(st.integers(1, 3), label="joins")):
            rank = pairs[0][1].dim()
            join, dims = data.draw(st.sampled_from([(torch.cat, rank), (torch.stack, rank + 1)]), label="join")
            dim = data.draw(st.integers(-dims, dims - 1), label="dim")
            half = len(pairs) // 2
            halves = (pairs[:half], pairs[half:]) if half else (pairs,)
            pairs = [tuple(join(list(side), dim) for side in zip(*part, strict=True)) for part in halves]
        mine, theirs = pairs[-1]
        assert isinstance(mine, FileTensor)
        assert_same(mine, theirs)
        walk(data, mine, theirs, must_be_lazy=False)
    assert bytes_read(stream) - before <= 4 * 8 * numel * 4


def test_joins_of_slices_of_no_rows_and_of_one_row_are_what_they_are_in_memory(tmp_path):
    dense = random_tensor((4, 3))
    ours = stored(tmp_path / "file", dense)
    for parts in (lambda t: (t[:0], t[:1]), lambda t: (t[1:2], t[4:]), lambda t: (t[:0], t[4:]), lambda t: (t[:0], t)):
        mine, theirs = torch.cat(parts(ours)), torch.cat(parts(dense))
        assert_same(mine, theirs)
        assert_same(mine.squeeze(0), theirs.squeeze(0))
        assert_same(mine.split(1)[0] if len(theirs) else mine, theirs.split(1)[0] if len(theirs) else theirs)
        assert_same(mine.view(1, *theirs.shape), theirs.view(1, *theirs.shape))


def test_what_does_not_fit_together_or_lies_outside_is_refused(tmp_path):
    ours = stored(tmp_path / "file", random_tensor((4, 6)))
    with pytest.raises((RuntimeError, ValueError), match="[Ss]hapes|Sizes"):
        torch.cat([ours, ours.t()])
    with pytest.raises((RuntimeError, IndexError)):
        torch.cat([ours, ours], dim=2)
    for bad in ((4, 6, 2), (30,)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ours.as_strided(bad, (1,) * len(bad), 10**6)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ours.as_strided((25,), (1,))
    assert_same(ours.as_strided((3, 2), (7, 1), 1), ours.to_dense().as_strided((3, 2), (7, 1), 1))


def test_complex_numbers_are_seen_as_real_ones_and_bytes_as_others(tmp_path):
    dense = random_tensor((4, 6), torch.complex64)
    ours = stored(tmp_path / "file", dense, 3)
    assert_same(torch.view_as_real(ours), torch.view_as_real(dense))
    assert_same(ours.real, dense.real.contiguous())
    assert_same(ours.imag[1:], dense.imag[1:].contiguous())
    assert_same(ours.view(torch.uint8)[:, 3:], dense.view(torch.uint8)[:, 3:])
    assert_same(ours.view(torch.float16), dense.view(torch.float16))
    with pytest.raises(NotImplementedError, match="to_dense"):
        ours.conj()
    with pytest.raises(NotImplementedError, match="to_dense"):
        ours.to(torch.complex128).view(torch.uint8)


# ---- casts, copies, parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
@given(
    chain=st.lists(st.sampled_from(["half", "float", "bfloat16", "double", "int8", "fp8", "slice"]), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32]),
)
def test_casts_are_done_as_it_is_read_one_after_another(tmp_path, stream, inference, chain, dtype):
    steps = {
        "half": lambda t: t.half(),
        "float": lambda t: t.to(torch.float32),
        "bfloat16": lambda t: t.to("cpu", torch.bfloat16),
        "double": lambda t: t.double(),
        "int8": lambda t: t.to(torch.int8),
        "fp8": lambda t: t.to(torch.float8_e4m3fn),
        "slice": lambda t: t[1:].t(),
    }
    dense = random_tensor((6, 5), dtype)
    ours = stored(tmp_path / "file", dense)
    before = bytes_read(stream)
    with torch.inference_mode(inference):
        for name in chain:
            ours, dense = steps[name](ours), steps[name](dense)
        assert isinstance(ours, FileTensor)
        assert bytes_read(stream) == before
        assert_same(ours, dense)
        assert_same(torch.cat([ours, ours]), torch.cat([dense, dense]))
        if ours.is_floating_point() and ours.dtype.itemsize > 1 and dense.numel():
            x = random_tensor((3, dense.shape[1]), ours.dtype)
            torch.testing.assert_close(F.linear(x, ours), F.linear(x, dense))


def test_tensors_with_other_casts_are_not_joined_as_if_they_had_the_same(tmp_path):
    dense = random_tensor((4, 4))
    ours = stored(tmp_path / "file", dense)
    assert_same(torch.cat([ours.half().float(), ours]), torch.cat([dense.half().float(), dense]))


def test_copies_and_views_that_torch_makes_by_itself_stay_in_the_file(tmp_path, stream):
    dense = random_tensor((600, 700))
    ours = stored(tmp_path / "file", dense)
    for copied in (
        ours.data,
        ours.detach(),
        ours.clone(),
        ours.contiguous(),
        ours.cpu(),
        ours.to(dense),
        ours.to("cpu"),
        copy.copy(ours),
        copy.deepcopy(ours),
        nn.Parameter(ours),
        nn.Parameter(ours, requires_grad=False),
        copy.deepcopy(nn.Parameter(ours, requires_grad=False)),
        torch.cat([ours]),
        ours.requires_grad_(False),
    ):
        assert isinstance(copied, FileTensor) and copied.shape == dense.shape
        assert repr(copied).startswith("FileTensor(shape=[600, 700], dtype=torch.float32, device='cpu', '/")
    assert bytes_read(stream) == 0
    assert_same(copied, dense)


def test_reading_is_of_what_is_asked_for_alone(tmp_path, stream):
    dense = random_tensor((1000, 3000))
    ours = stored(tmp_path / "file", dense)

    def read_by(use):
        before, moved = bytes_read(stream), stream.stats()["bytes_moved"]
        use()
        return bytes_read(stream) - before, stream.stats()["bytes_moved"] - moved

    assert read_by(lambda: ours[10:20].to_dense())[0] == 10 * 3000 * 4
    read, moved = read_by(lambda: ours[10:20, 500:600].to_dense())
    assert read == 10 * 100 * 4 and moved <= 10 * 2 * 4096
    assert read_by(lambda: ours[:, :1024].to_dense())[0] == 1000 * 1024 * 4
    assert read_by(lambda: torch.stack([ours[3], ours[900]]).to_dense())[0] == 2 * 3000 * 4
    read, moved = read_by(lambda: F.embedding(torch.tensor([[7, 999, 7]]), ours))
    assert read == 2 * 3000 * 4 and moved <= 2 * (3000 * 4 + 2 * 4096)
    assert read_by(lambda: ours[torch.tensor([5])])[0] == 3000 * 4
    assert read_by(lambda: F.embedding(torch.empty(2, 0, dtype=torch.int64), ours)) == (0, 0)
    assert read_by(lambda: ours[3][4:6].to_dense())[0] == 8


def test_a_slice_of_many_short_rows_takes_no_more_memory_than_it_must(tmp_path, stream):
    # One element of each row: a block for each would be a thousand times as much.
    dense = random_tensor((200_000, 16), torch.uint8)
    ours = stored(tmp_path / "file", dense)
    part = ours[:, 3].to_dense()
    assert_same(part, dense[:, 3])
    assert part.untyped_storage().nbytes() <= 2 * 200_000
    assert stream.stats()["bytes_moved"] <= 2 * dense.numel()
    # Rows that are far apart: they are read one by one, some at a time.
    wide = stored(tmp_path / "wide", random_tensor((1500, 10_000), torch.uint8))
    part = wide[:, 5:6].to_dense()
    assert_same(part, random_tensor((1500, 10_000), torch.uint8)[:, 5:6])
    assert part.untyped_storage().nbytes() <= 2 * (1500 + 4096)


def test_modules_hold_them_as_parameters(tmp_path, stream):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
    dense.eval().requires_grad_(False)
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        ours = copy.deepcopy(dense)
    names = list(dense.state_dict())
    state = {name: torch_csd.from_safetensors(tmp_path / "model.safetensors", name) for name in names}
    ours.load_state_dict(state, assign=True)
    ids = torch.tensor([[3, 49, 0]])
    assert_same(ours(ids), dense(ids))
    assert_same(copy.deepcopy(ours)(ids), dense(ids))
    before = bytes_read(stream)
    for convert in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.to("cpu")):
        ours, dense = convert(ours), convert(dense)
        assert all(isinstance(parameter, FileTensor) for parameter in ours.parameters())
        assert {p.dtype for p in ours.parameters()} == {p.dtype for p in dense.parameters()}
        state = ours.state_dict()
        assert bytes_read(stream) == before
        for name, parameter in dense.state_dict().items():
            assert_same(state[name], parameter)
        assert_same(ours(ids), dense(ids))
        before = bytes_read(stream)
    with pytest.raises(RuntimeError, match="only read"):
        ours.load_state_dict(dense.state_dict())
    ours.load_state_dict(dense.state_dict(), assign=True)
    assert_same(ours(ids), dense(ids))


def test_it_cannot_be_pickled_and_says_what_to_do(tmp_path):
    ours = stored(tmp_path / "file", random_tensor((4, 4)))
    for save in (pickle.dumps, lambda t: torch.save(t, tmp_path / "saved"), lambda t: torch.save({"t": t}, os.devnull)):
        with pytest.raises(TypeError, match="cannot be pickled.*to_dense"):
            save(ours)


def test_gradients_are_refused_at_the_backward(tmp_path):
    dense = random_tensor((600, 600))
    ours = stored(tmp_path / "file", dense)
    x = random_tensor((2, 600)).requires_grad_()
    bias = random_tensor((600,)).requires_grad_()
    trained = nn.Parameter(ours)
    assert trained.requires_grad and not nn.Parameter(ours, requires_grad=False).requires_grad
    plain = x.detach()
    for use in (
        lambda: F.linear(x, ours),
        lambda: F.linear(plain, ours, bias),
        lambda: x @ ours,
        lambda: ours @ x.t(),
        lambda: F.linear(plain, trained),
        lambda: F.embedding(torch.tensor([1]), trained),
        lambda: torch.bmm(x[None], ours[None]),
    ):
        result = use()
        assert result.requires_grad
        with pytest.raises(NotImplementedError, match="not differentiable.*no_grad"):
            result.sum().backward()
        with torch.no_grad():
            assert not use().requires_grad
            assert_same(use(), result.detach())
        with torch.inference_mode():
            use()
    assert_same(F.linear(plain, ours), F.linear(plain, dense))


def test_small_weights_pass_gradients_to_what_meets_them(tmp_path):
    scale = random_tensor((16,))
    ours = stored(tmp_path / "file", scale)
    x, expected = (random_tensor((3, 16)).requires_grad_() for _ in range(2))
    (x * ours).sum().backward()
    (expected * scale).sum().backward()
    assert_same(x.grad, expected.grad)


# ---- ops ------------------------------------------------------------------------------------------------------------


def test_small_tensors_do_anything_and_large_ones_say_that_they_do_not(tmp_path, stream):
    dense = random_tensor((8, 8))
    small = stored(tmp_path / "small", dense)
    large = stored(tmp_path / "large", random_tensor((SMALL_BYTES // 4 + 1,)))
    x = random_tensor((8, 8), seed=1)
    for use in (
        lambda t, y: t + 1,
        lambda t, y: y * t,
        lambda t, y: 1.0 + t.float(),
        lambda t, y: torch.where(y > 0, t, y),
        lambda t, y: t.sort().values,
        lambda t, y: torch.einsum("ij,kj->ik", y, t),
        lambda t, y: F.layer_norm(y, (8,), t[0], t[1]),
        lambda t, y: F.rms_norm(y, (8,), t[0]),
        lambda t, y: F.conv1d(y[None], t[:, :, None], t[0], padding=1),
        lambda t, y: F.group_norm(y[None], 4, t[0], t[1]),
        lambda t, y: y.clone().add_(t),
        lambda t, y: y.clone().copy_(t),
        lambda t, y: torch.mul(t, y, out=torch.empty(8, 8)),
        lambda t, y: torch.cat([t, y]),
        lambda t, y: torch.stack([y, t]),
        lambda t, y: t[t > 0],
        lambda t, y: t[:, torch.tensor([1, 2])],
        lambda t, y: t[torch.tensor([0, -1])],
        lambda t, y: t.index_select(1, torch.tensor([1, 2])),
        lambda t, y: t.masked_fill(y > 0, 0.5),
        lambda t, y: t.repeat(2, 3),
        lambda t, y: t.sum(),
        lambda t, y: torch.zeros_like(t),
        lambda t, y: t.new_ones(3),
        lambda t, y: torch.tensor(t[0, 0].item()),
        lambda t, y: torch.tensor(t.tolist()),
        lambda t, y: torch.from_numpy(t.numpy().copy()),
        lambda t, y: -t,
        lambda t, y: t.expand(2, 8, 8) @ y,
        lambda t, y: F.scaled_dot_product_attention(y[None], t[None], t[None]),
    ):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                try:
                    ours = use(small, x)
                except (NotImplementedError, RuntimeError, TypeError) as error:
                    assert "to_dense()" in str(error), error
                    continue
                assert_same(ours, use(dense, x))
    before = bytes_read(stream)
    for use in (
        lambda t: t + 1,
        lambda t: t.sum(),
        lambda t: torch.zeros_like(t),
        lambda t: t.sort(),
        lambda t: t == t,
    ):
        with pytest.raises(NotImplementedError, match="FileTensor: aten.*to_dense"):
            use(large)
    assert bytes_read(stream) == before


def test_what_reads_its_memory_past_torch_is_refused(tmp_path):
    ours = stored(tmp_path / "file", random_tensor((8, 8)))
    for use in (lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t.__array__(), lambda t: torch.from_dlpack(t)):
        try:
            result = use(ours)
        except Exception as error:  # noqa: BLE001  torch decides which
            assert type(error) in (NotImplementedError, RuntimeError, TypeError, BufferError, ValueError), error
        else:
            assert torch.equal(torch.as_tensor(result), ours.to_dense())


def test_nothing_changes_it_in_place(tmp_path):
    dense = random_tensor((8, 8))
    ours = stored(tmp_path / "file", dense, mode="r+")
    for change in (
        lambda t: t.add_(1),
        lambda t: t.zero_(),
        lambda t: t.copy_(dense),
        lambda t: t[0].fill_(0),
        lambda t: t.__setitem__(0, 1.0),
        lambda t: torch.add(dense, 1, out=t),
        lambda t: nn.init.normal_(t),
        lambda t: t.index_add_(0, torch.tensor([0]), dense[:1]),
    ):
        with pytest.raises(NotImplementedError, match=r"files are only read; use .write_\(\)"):
            change(ours)
    with pytest.raises(NotImplementedError, match="do not mix"):
        ours.data = dense
    assert_same(ours, dense)


def test_the_memory_of_small_tensors_is_bounded_and_what_is_given_out_is_the_callers(tmp_path):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)
    stream = Stream(8 * MIB)
    tensor = FileTensor(Region.make(stream.open(path), torch.float32, [64, MIB // 4], 0), stream)
    for row in tensor:
        (row + 1).add_(1)
        assert stream.stats()["resident_bytes"] + stream.stats()["staging_bytes"] <= 8 * MIB
    assert not tensor[63].to_dense().any()
    stream.close()


# ---- products -------------------------------------------------------------------------------------------------------

# A weight in one piece goes through torch's own GEMM. One that is cut goes through several, of other shapes, which sum
# the same products in another order: some units in the last place of the largest sum.
CUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def assert_product(ours: torch.Tensor, expected: torch.Tensor, *, cut: bool) -> None:
    assert type(ours) is torch.Tensor and ours.shape == expected.shape and ours.dtype == expected.dtype
    if cut and expected.numel():
        torch.testing.assert_close(
            ours, expected, atol=CUT_TOLERANCE[expected.dtype] * float(expected.abs().max()), rtol=0
        )
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (1100, 900), (1600, 1300), (7, 200_000)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("offset", [0, 7])
def test_products_with_a_stored_weight_are_those_with_an_ordinary_one(
    tmp_path, stream, dtype, shape, transposed, offset
):
    dense = random_tensor(shape, dtype)
    ours = stored(tmp_path / "file", dense, offset)
    if transposed:
        ours, dense = ours.t(), dense.t()
    cut = dense.numel() * dtype.itemsize > stream.piece_bytes
    assert (len(stream.pieces(ours._layout)[1]) > 1) == cut
    out_features, in_features = dense.shape
    bias = random_tensor((out_features,), dtype, seed=1)
    stored_bias = stored(tmp_path / "bias", bias, 2)
    with torch.no_grad():
        for rows in ((), (1,), (2, 3), (0,)):
            x = random_tensor((*rows, in_features), dtype, seed=2)
            for b, mine in ((None, None), (bias, bias), (bias, stored_bias)):
                assert_product(F.linear(x, ours, mine), F.linear(x, dense, b), cut=cut)
            assert_product(x @ ours.t(), F.linear(x, dense), cut=cut or not x.dim() or x.dim() == 1)
            assert_product(torch.matmul(x, ours.mT), torch.matmul(x, dense.mT), cut=True)
        x = random_tensor((4, in_features), dtype, seed=3)
        assert_product(torch.mm(x, ours.t()), torch.mm(x, dense.t()), cut=True)
        assert_product(ours @ x.t(), dense @ x.t(), cut=True)
        assert_product(ours @ x[0], dense @ x[0], cut=True)
        assert_product(ours.matmul(x.t()), dense @ x.t(), cut=True)
        assert_product(torch.addmm(bias, x, ours.t()), torch.addmm(bias, x, dense.t()), cut=True)
        grid = random_tensor((4, out_features), dtype, seed=4)
        options = {"beta": 0.5, "alpha": 2.0}
        assert_product(torch.addmm(grid, x, ours.t(), **options), torch.addmm(grid, x, dense.t(), **options), cut=True)
    stats = stream.stats()
    assert stats["staged_bytes"] + stats["resident_bytes"] <= stats["memory_budget_bytes"]


@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 900, 700), (0, 4, 5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_batched_products_with_stored_weights(tmp_path, stream, shape, transposed):
    dense = random_tensor(shape)
    ours = stored(tmp_path / "file", dense)
    if transposed:
        ours, dense = ours.mT, dense.mT
    x = random_tensor((shape[0], 5, dense.shape[1]), seed=1)
    added = random_tensor((shape[0], 5, dense.shape[2]), seed=2)
    with torch.no_grad():
        assert_product(torch.bmm(x, ours), torch.bmm(x, dense), cut=True)
        assert_product(x @ ours, x @ dense, cut=True)
        assert_product(torch.baddbmm(added, x, ours), torch.baddbmm(added, x, dense), cut=True)
        assert_product(
            torch.baddbmm(added, x, ours, beta=2, alpha=3), torch.baddbmm(added, x, dense, beta=2, alpha=3), cut=True
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 48), (3, 512, 1536)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_read_the_experts_that_have_rows(tmp_path, stream, dtype, shape, transposed):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    dense = random_tensor(shape, dtype)
    ours = stored(tmp_path / "file", dense)
    if transposed:
        ours, dense = ours.mT, dense.mT
    counts = torch.tensor([3, 0, 2, 1][: shape[0]])
    offs = counts.cumsum(0).to(torch.int32)
    x = random_tensor((int(counts.sum()), dense.shape[1]), dtype, seed=1)
    with torch.no_grad():
        out = F.grouped_mm(x, ours, offs=offs)
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        torch.testing.assert_close(
            out[begin : begin + count].float(),
            x[begin : begin + count].float() @ dense[expert].float(),
            atol=0.5,
            rtol=2e-2,
        )
        begin += count
    used = int((counts > 0).sum())
    assert bytes_read(stream) == used * shape[1] * shape[2] * dtype.itemsize


def test_what_would_be_wrong_of_an_ordinary_weight_is_wrong_of_a_stored_one(tmp_path):
    ours = stored(tmp_path / "file", random_tensor((600, 700)))
    for use in (
        lambda: F.linear(torch.ones(2, 600), ours),
        lambda: F.linear(torch.ones(2, 700, dtype=torch.bfloat16), ours),
        lambda: torch.ones(2, 700) @ ours,
        lambda: F.linear(torch.ones(2, 700), ours, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError):
            use()


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("shape", [(500, 9), (3000, 300), (40, 50, 60), (4, 400_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2], ids=str)
def test_rows_are_gathered_as_torch_does(tmp_path, stream, offset, shape, dtype):
    dense = random_tensor(shape, dtype)
    ours = stored(tmp_path / "file", dense, offset)
    count = shape[0]
    generator = torch.Generator().manual_seed(5)
    for size in ((), (1,), (7,), (2, 3), (0,)):
        ids = torch.randint(0, count, size, generator=generator)
        assert_same(ours[ids], dense[ids])
        if ids.dim() == 1:
            assert_same(torch.index_select(ours, 0, ids), torch.index_select(dense, 0, ids))
        if len(shape) == 2 and dtype == torch.float32:
            assert_same(F.embedding(ids, ours), F.embedding(ids, dense))
            assert_same(F.embedding(ids.int(), ours, padding_idx=0), F.embedding(ids, dense))
    ids = torch.tensor([-1, 0, -count])
    assert_same(ours[ids], dense[ids])
    assert_same(ours[::2][torch.tensor([1, 0])], dense[::2][torch.tensor([1, 0])])
    assert_same(ours.half()[torch.tensor([1, 0])], dense.half()[torch.tensor([1, 0])])
    mask = torch.zeros(count, dtype=torch.bool)
    mask[[1, 3]] = True
    assert_same(ours[mask], dense[mask])
    joined = torch.cat([ours, ours])
    assert_same(joined[torch.tensor([count + 1, 0])], dense[torch.tensor([1, 0])])
    for bad in (count, -count - 1):
        with pytest.raises(IndexError, match="out of"):
            ours[torch.tensor([0, bad])]
    for bad in (count, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            F.embedding(torch.tensor([0, bad]), ours)
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            torch.index_select(ours, 0, torch.tensor([0, bad]))


def test_rows_that_overlap_are_gathered_too(tmp_path, stream):
    dense = random_tensor((SMALL_BYTES,))
    windows = stored(tmp_path / "file", dense).unfold(0, 100, 30)
    ids = torch.tensor([0, 1, 2, 5000, 5001])
    assert_same(windows[ids], dense.unfold(0, 100, 30)[ids])


# ---- processes and threads ------------------------------------------------------------------------------------------


def test_threads_use_one_tensor_and_others_at_once(tmp_path, stream):
    dense = random_tensor((1500, 700))
    ours = stored(tmp_path / "file", dense)
    x = random_tensor((2, 700), seed=1)
    expected = F.linear(x, dense)
    errors = []

    def use(number):
        try:
            for step in range(6):
                assert_product(F.linear(x, ours), expected, cut=True)
                assert torch.equal(ours[number + step :][:5].to_dense(), dense[number + step :][:5])
                assert torch.equal(F.embedding(torch.tensor([number, step]), ours), dense[[number, step]])
        except BaseException as error:  # noqa: BLE001  reported below
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    assert not errors, errors
    assert stream.stats()["staged_bytes"] <= 4 * MIB


def test_a_forked_child_opens_its_own_and_its_parents_tensors_say_so(tmp_path, stream):
    dense = random_tensor((30, 40))
    ours = stored(tmp_path / "file", dense)
    assert_same(ours, dense)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                ours.to_dense()
            except StoreClosedError as error:
                assert "child" in str(error)
                again = torch_csd.from_file(tmp_path / "file", torch.float32, [30, 40])
                assert torch.equal(again.to_dense(), dense)
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same(ours[:3], dense[:3])


# ---- writing --------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_what_is_written_to_a_view_is_read_afterwards_and_nothing_else_changes(tmp_path, stream, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="shape"))
    dtype = data.draw(st.sampled_from([torch.float32, torch.int8, torch.complex64, torch.float8_e4m3fn]), label="dtype")
    dense = random_tensor(shape, dtype)
    ours = stored(tmp_path / "file", dense, 5, mode="r+")
    whole = dense.clone()
    target, mine = whole, ours
    assert_same(ours, whole)
    for _ in range(data.draw(st.integers(0, 3), label="length")):
        name, view = data.draw(views(tuple(target.shape)), label="view")
        if name in ("reshape", "flatten", "flatten_some", "expand", "unfold", "view", "view_as"):
            continue
        target, mine = view(target), view(mine)
    kept = mine[...] * 1 if target.is_floating_point() and dtype.itemsize > 1 else None  # small: in memory now
    assert kept is None or torch.equal(kept, target)
    values = random_tensor(tuple(target.shape), dtype, seed=1)
    assert mine.write_(values) is mine
    target.copy_(values)
    assert_same(ours, whole)
    assert_same(mine, target)
    if kept is not None:
        assert torch.equal(mine * 1, target)
    assert (tmp_path / "file").read_bytes() == b"\xa5" * 5 + image(whole) + b"\xa5" * 3


def test_new_files_are_made_and_longer_ones_kept(tmp_path, stream):
    path = tmp_path / "new"
    one = torch_csd.from_file(path, torch.float32, [3, 4], mode="w+")
    assert path.stat().st_size == 48 and not one.to_dense().any()
    one.write_(torch.arange(12.0).view(3, 4))
    # A second tensor behind it makes the file longer. The first is none the worse.
    two = torch_csd.from_file(path, torch.int16, [5], 48, mode="w+")
    two.write_(torch.arange(5))
    one[1].write_(torch.zeros(4))
    assert one.to_dense().sum() == 66 - 22 and two.to_dense().tolist() == [0, 1, 2, 3, 4]
    again = torch_csd.from_file(path, torch.float32, [2], mode="w+")
    assert again.to_dense().tolist() == [0, 1] and path.stat().st_size == 58
    again.half().write_(torch.tensor([7.0, 8.0]))
    assert again.to_dense().tolist() == [7, 8]
    two.write_(stored(tmp_path / "other", torch.ones(5)))
    assert two.to_dense().tolist() == [1] * 5


def test_writing_is_refused_where_it_cannot_be(tmp_path, stream):
    dense = random_tensor((4, 4))
    ours = stored(tmp_path / "file", dense, mode="r+")
    with pytest.raises(StoreError, match='file: opened to be read only.*mode="r[+]"'):
        torch_csd.from_file(tmp_path / "file", torch.float32, [4, 4], mode="r").write_(dense)
    save_file({"weight": dense}, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match="model.safetensors: opened to be read only"):
        torch_csd.from_safetensors(tmp_path / "model.safetensors", "weight").write_(dense)
    with pytest.raises(ValueError, match=r"values must be \[4, 4\], got \[16\]"):
        ours.write_(dense.view(-1))
    for repeated in (ours[:1].expand(4, 4), ours.view(-1).unfold(0, 4, 1)):
        with pytest.raises(ValueError, match="repeats some"):
            repeated.write_(torch.zeros(repeated.shape))
    with pytest.raises(NotImplementedError, match="write to its parts"):
        torch.cat([ours, ours]).write_(torch.zeros(8, 4))
    ours[:0].write_(torch.zeros(0, 4))
    ours[0, 0].write_(torch.tensor(2.0))
    dense[0, 0] = 2.0
    assert_same(ours, dense)
    with pytest.raises(StoreError, match="missing/file: "):
        torch_csd.from_file(tmp_path / "missing" / "file", torch.float32, [1], mode="w+")
    if os.geteuid() != 0:
        (tmp_path / "file").chmod(0o444)
        with pytest.raises(StoreError, match="Permission denied"):
            ours.write_(dense)


def test_a_staged_or_resident_weight_is_read_again_after_it_was_written(tmp_path, stream):
    dense = random_tensor((900, 900))
    ours = stored(tmp_path / "file", dense, mode="r+")
    other = torch_csd.from_file(tmp_path / "file", torch.float32, [900, 900])
    x = random_tensor((2, 900), seed=1)
    for seed in (2, 3):
        for tensor in (ours, other):
            assert_product(F.linear(x, tensor), F.linear(x, dense), cut=True)
        dense[100:300] = random_tensor((200, 900), seed=seed)
        ours[100:300].write_(dense[100:300])


# ---- files that change ----------------------------------------------------------------------------------------------


def test_a_file_that_was_changed_is_noticed_and_opened_anew(tmp_path, stream):
    path = tmp_path / "file"
    one = random_tensor((30, 40))
    ours = stored(path, one)
    assert_same(ours, one)
    for change in (
        lambda: path.write_bytes(image(one) + b"more"),
        lambda: os.utime(path, ns=(0, 1_000_000_000)),
        lambda: os.truncate(path, 100),
    ):
        path.write_bytes(image(one))
        ours = torch_csd.from_file(path, torch.float32, [30, 40], mode="r+")
        assert_same(ours, one)
        change()
        with pytest.raises(StoreError, match=f"{path}: changed while it was in use"):
            ours.to_dense()
        with pytest.raises(StoreError, match=f"{path}: changed since it was opened"):
            ours.write_(one)
    two = random_tensor((30, 40), seed=1)
    path.write_bytes(image(two))
    again = torch_csd.from_file(path, torch.float32, [30, 40])
    assert_same(again, two)
    with pytest.raises(StoreError, match="changed"):
        ours.to_dense()


def test_another_file_of_the_same_name_is_another_file(tmp_path, stream):
    path = tmp_path / "file"
    one, two = random_tensor((30, 40)), random_tensor((30, 40), seed=1)
    ours = stored(path, one, mode="r+")
    info = path.stat()
    (tmp_path / "other").write_bytes(image(two) + b"\xa5" * 3)
    os.utime(tmp_path / "other", ns=(info.st_atime_ns, info.st_mtime_ns))
    os.rename(tmp_path / "other", path)
    assert_same(ours, one)  # the old one, which is still open
    assert_same(torch_csd.from_file(path, torch.float32, [30, 40]), two)
    assert_same(ours, one)
    with pytest.raises(StoreError, match="changed since it was opened"):
        ours.write_(two)
    assert_same(torch_csd.from_file(path, torch.float32, [30, 40]), two)
    save_file({"x": one}, tmp_path / "model.safetensors")
    assert_same(torch_csd.from_safetensors(tmp_path / "model.safetensors", "x"), one)
    save_file({"longer name": one, "x": two}, tmp_path / "model.safetensors")
    assert_same(torch_csd.from_safetensors(tmp_path / "model.safetensors", "x"), two)


def test_a_row_that_does_not_fit_into_staging_says_so_and_leaves_the_rest_usable(tmp_path, stream):
    wide = torch_csd.from_file(tmp_path / "wide", torch.float32, [2, 2 * MIB], mode="w+")
    with pytest.raises(MemoryBudgetError, match="raise memory_budget"):
        F.linear(torch.ones(1, 2 * MIB), wide)
    dense = random_tensor((700, 600))
    ours = stored(tmp_path / "file", dense)
    for _ in range(3):
        assert_product(F.linear(torch.ones(1, 600), ours), F.linear(torch.ones(1, 600), dense), cut=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_take_a_kernel_that_is_not_small(tmp_path, dims):
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    shape = {1: (300, 300, 5), 2: (90, 3, 40, 40), 3: (40, 3, 16, 16, 16)}[dims]
    kernel, bias = random_tensor(shape), random_tensor(shape[:1])
    assert kernel.numel() * 4 > SMALL_BYTES
    stream = Stream(32 * 2**20)
    try:
        (tmp_path / "file").write_bytes(image(kernel))
        ours = FileTensor(Region.make(stream.open(tmp_path / "file"), torch.float32, shape, 0), stream)
        x = random_tensor((2, shape[1], *(size + 1 for size in shape[2:])), seed=1)
        assert_same(convolve(x, ours, bias, padding=1), convolve(x, kernel, bias, padding=1))
        assert_same(convolve(x, ours), convolve(x, kernel))
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](shape[1], shape[0], shape[2:], bias=False)
        layer.weight = nn.Parameter(ours, requires_grad=False)
        assert_same(layer(x), convolve(x, kernel))
    finally:
        stream.close()
