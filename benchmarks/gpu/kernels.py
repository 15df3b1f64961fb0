"""The kernels over pages that lie on the card, beside a copy of the card's memory. See README.md, "GPU"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.run import Run, beside, median, rates, ratio
from gpu.table import Row
from torch_csd.catalogue import PAGE_TOKENS
from torch_csd.cuda.kernels import MERGE_PARTIALS_MAX, Kernels, Pages, Partial, Rules
from torch_csd.cuda.layout import PageLayout
from torch_csd.errors import MemoryBudgetError

COPY = "copy"  # on the card, bytes read and written
BAR = 0.70
INT4_BAR = 1.5  # times the tokens/s of bfloat16
BLOCK_PAGES = 256  # packed of random K and V, and repeated from there on
ELEMENTS = {
    "bfloat16": (torch.bfloat16, 0),
    "float16": (torch.float16, 0),
    "int8": (torch.bfloat16, 8),
    "int4": (torch.bfloat16, 4),
}
# Of 2**-8 (bfloat16 q and P) over sums of many keys: far below what a wrong key or scale does.
ERROR_MAX = 2e-2


@dataclass(frozen=True)
class Sizes:
    rows: int = 16
    tokens: int = 65536  # of each row: 4 GiB of bfloat16 with 8 heads of 128, 1.1 GiB of int4: 20 times an L2
    num_kv_heads: int = 8
    head_dim: int = 128
    other_dims: tuple[int, ...] = (64, 256)
    elements: tuple[str, ...] = tuple(ELEMENTS)
    queries: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (8, 1), (1, 4), (4, 4), (8, 4))  # group, q_len

    @staticmethod
    def fitting(free_bytes: int, *, quick: bool) -> Sizes:
        """All elements' tiles and two buffers to copy lie on the card at once: four times the tiles of bfloat16."""
        if quick:
            return Sizes(rows=2, tokens=BLOCK_PAGES * PAGE_TOKENS, other_dims=(64,), queries=((4, 1), (4, 4)))
        tokens = 65536
        while 16 * tokens * 4096 * 5 > free_bytes and tokens > BLOCK_PAGES * PAGE_TOKENS:
            tokens //= 2
        return Sizes(tokens=tokens)


class Tiles:
    """Rows of pages on the card, all of them valid."""

    def __init__(self, kernels: Kernels, layout: PageLayout, rows: int, tokens: int) -> None:
        device = kernels.device
        self.kernels, self.layout, self.rows, self.tokens = kernels, layout, rows, tokens
        pages_each = tokens // PAGE_TOKENS
        count = rows * pages_each
        self.block = min(BLOCK_PAGES, pages_each)
        options = {"dtype": layout.dtype, "device": device.torch_device}
        shape = (1, layout.num_kv_heads, self.block * PAGE_TOKENS)
        k, v = (torch.randn(*shape, dim, **options) for dim in (layout.head_dim_k, layout.head_dim_v))
        self.memory = device.new_memory(count * layout.page_bytes)
        images = self.memory.view(count, layout.page_bytes)
        stream = device.current_stream()
        kernels.pack(k, v, layout, images[: self.block][None], token_begin=0, page_count=self.block, stream=stream)
        for begin in range(self.block, count, self.block):
            part = images[begin : begin + self.block]
            part.copy_(images[: len(part)])
        at = torch.arange(count, dtype=torch.int64, device=device.torch_device)
        self.pages = Pages(
            self.memory.data_ptr() + at * layout.page_bytes,
            (at % pages_each).to(torch.int32),
            torch.arange(rows + 1, dtype=torch.int32, device=device.torch_device) * pages_each,
            (pages_each,) * rows,
        )
        stream.synchronize()  # k and v may go

    @property
    def byte_count(self) -> int:
        """Of tiles: what attention must read. Pages may be padded."""
        return len(self.pages.addresses) * self.layout.num_kv_heads * self.layout.tile_bytes

    @property
    def token_count(self) -> int:
        return self.rows * self.tokens

    def attend(self, group: int, q_len: int) -> tuple[Callable[[], None], Tensor, Partial]:
        """Work: a partial of all pages for random queries. Then its queries and the partial that it folds into."""
        device, layout = self.kernels.device, self.layout
        heads = layout.num_kv_heads * group
        q = torch.randn(self.rows, heads, q_len, layout.head_dim_k, dtype=layout.dtype, device=device.torch_device)
        kv_end = torch.full((self.rows,), self.tokens, dtype=torch.int32, device=device.torch_device)
        rules = Rules(scale=layout.head_dim_k**-0.5, kv_end=kv_end)
        partial = self.kernels.new_partial(self.rows, heads, q_len, layout.head_dim_v)

        def work() -> None:
            self.kernels.attend(q, self.pages, layout, rules, partial, stream=device.current_stream())

        return work, q, partial

    def error(self, q: Tensor, partial: Partial) -> float:
        """How far a partial of whole rows is from torch's attention, relative to it.

        A row repeats its block, over which attention is the same as over all repetitions of it.
        """
        layout = self.layout
        stream = self.kernels.device.current_stream()
        addresses = self.pages.addresses[: self.block]
        k, v = self.kernels.unpack(addresses, layout, dtype=torch.float32, stream=stream)
        k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (k, v))  # [1, num_kv_heads, tokens, head_dim]
        grouped = q[:1].float().reshape(1, layout.num_kv_heads, -1, layout.head_dim_k)
        weights = torch.softmax((grouped @ k.mT * layout.head_dim_k**-0.5).double(), dim=-1)
        expected = (weights @ v.double()).view(partial.out[:1].shape)
        return float((partial.out[:1].double() - expected).norm() / expected.norm())


def measure(run: Run, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes.fitting(run.free_bytes, quick=run.quick)
    kernels = Kernels(run.device)
    main = tiles_of(run, kernels, sizes, sizes.head_dim, sizes.elements)
    copy_bytes = max(main["bfloat16"].memory.numel() // 2, 4096)
    copy, target = copy_work(run, copy_bytes)
    for group, q_len in sizes.queries:
        run.attempt("attend", functools.partial(attend_rows, run, main, group, q_len, copy, copy_bytes))
    others = functools.partial(other_rows, run, kernels, main["bfloat16"], copy, copy_bytes, target)
    run.attempt("pack, checksums, merge", others)
    del others
    main.clear()
    for head_dim in sizes.other_dims:

        def other_dim(head_dim: int = head_dim) -> None:
            elements = tuple(name for name in ("bfloat16", "int4") if name in sizes.elements)
            tiles = tiles_of(run, kernels, sizes, head_dim, elements)
            attend_rows(run, tiles, 4, 1, copy, copy_bytes, info=f"dim {head_dim}, ")

        run.attempt(f"attend, dim {head_dim}", other_dim)


def tiles_of(run: Run, kernels: Kernels, sizes: Sizes, head_dim: int, elements: tuple[str, ...]) -> dict[str, Tiles]:
    """By element; one that fails is a row. Heads are fewer or more, so that a token has as many bytes."""
    heads = max(sizes.num_kv_heads * sizes.head_dim // head_dim, 1)
    found = {}
    for name in elements:
        run.deadline.check()
        dtype, code_bits = ELEMENTS[name]
        try:
            layout = PageLayout(heads, head_dim, head_dim, dtype, code_bits)
            found[name] = Tiles(kernels, layout, sizes.rows, sizes.tokens)
        except (RuntimeError, MemoryBudgetError) as error:
            if name == "bfloat16":
                raise
            run.fail(f"tiles of {name}, dim {head_dim}", error)
    return found


def copy_work(run: Run, byte_count: int) -> tuple[Callable[[], None], Tensor]:
    source, target = run.device.new_memory(byte_count), run.device.new_memory(byte_count)
    source.random_(0, 256)
    return lambda: target.copy_(source), target


def attend_rows(
    run: Run,
    tiles: dict[str, Tiles],
    group: int,
    q_len: int,
    copy: Callable[[], None],
    copy_bytes: int,
    info: str = "",
) -> None:
    """Of each element, beside the copy; bars are on a decode step's queries, for which memory is the limit."""
    what = f"attend, {info}group {group}, q_len {q_len}"
    works: dict[str, Callable[[], None]] = {"copy": copy}
    errors = {}
    for name, each in tiles.items():
        run.deadline.check()
        try:
            work, q, partial = each.attend(group, q_len)
            work()
            errors[name] = each.error(q, partial)
            works[name] = work
        except RuntimeError as error:
            run.fail(f"{what}: {name}", error)
    seconds = run.interleaved(run.card_timer, works)
    copied = [2 * copy_bytes / each / 1e9 for each in seconds.pop("copy")]
    tokens = {name: rates(tiles[name].token_count / 1e6, each) for name, each in seconds.items()}
    for name, each in seconds.items():
        gbs = rates(tiles[name].byte_count / 1e9, each)
        told = f"{median(tokens[name]):.1f} Mtok/s"
        with_bar = q_len == 1 and not info
        if name == "int4" and "bfloat16" in tokens:
            row = beside(
                f"{what}: {name}",
                tokens[name],
                "Mtok/s",
                "bfloat16",
                tokens["bfloat16"],
                INT4_BAR if with_bar else None,
            )
            row.reason = f"{median(gbs):.0f} GB/s, {ratio(gbs, copied):.2f} of the copy's"
        else:
            row = beside(f"{what}: {name}", gbs, "GB/s", COPY, copied, BAR if with_bar and name == "bfloat16" else None)
            row.reason = told
            if name != "bfloat16" and "bfloat16" in tokens:
                row.reason += f", {ratio(tokens[name], tokens['bfloat16']):.2f} x bfloat16"
        if not errors[name] <= ERROR_MAX:  # a NaN, too
            row.failed = True
            row.reason = f"wrong: differs from torch's attention by {errors[name]:.2g}; {row.reason}"
        run.add(row)


def other_rows(
    run: Run, kernels: Kernels, tiles: Tiles, copy: Callable[[], None], copy_bytes: int, scratch: Tensor
) -> None:
    """Packing, checksums and merging: how much of the memory's rate they get. No bars."""
    device, base = run.device, tiles.layout
    stream = device.current_stream()
    options = {"dtype": base.dtype, "device": device.torch_device}
    pages = max(scratch.numel() // base.page_bytes // 2, 1)
    k, v = (
        torch.randn(1, base.num_kv_heads, pages * PAGE_TOKENS, dim, **options)
        for dim in (base.head_dim_k, base.head_dim_v)
    )
    works: dict[str, tuple[Callable[[], object], int]] = {"copy": (copy, 2 * copy_bytes)}
    for name in ("bfloat16", "int4"):
        layout = base._replace(code_bits=ELEMENTS[name][1])
        images = scratch[: pages * layout.page_bytes].view(1, pages, layout.page_bytes)

        def pack(layout: PageLayout = layout, images: Tensor = images) -> None:
            kernels.pack(k, v, layout, images, token_begin=0, page_count=pages, stream=stream)

        works[f"pack, {name}"] = pack, (k.numel() + v.numel()) * base.dtype.itemsize + images.numel()
    found = torch.empty(len(tiles.pages.addresses), dtype=torch.int32, device=device.torch_device)
    works["checksums"] = (
        lambda: kernels.checksums(tiles.memory, base.page_bytes, found, stream=stream),
        tiles.memory.numel(),
    )
    rows = max(copy_bytes // 4 // (4 * (base.head_dim_v + 1) * MERGE_PARTIALS_MAX * 32), 1)
    partials = [kernels.new_partial(rows, 32, 1, base.head_dim_v) for _ in range(MERGE_PARTIALS_MAX)]
    for partial in partials:
        partial.out.normal_()
        partial.lse.normal_()
    merged_bytes = sum(x.numel() * 4 for partial in partials for x in partial) + partials[0].out.numel() * 2
    works[f"merge of {MERGE_PARTIALS_MAX} partials"] = (
        lambda: kernels.merge(partials, dtype=torch.bfloat16, stream=stream),
        merged_bytes,
    )
    seconds = run.interleaved(run.card_timer, {name: work for name, (work, _) in works.items()})
    copied = rates(2 * copy_bytes / 1e9, seconds["copy"])
    for name, (_, byte_count) in works.items():
        if name == "copy":
            continue
        gbs = rates(byte_count / 1e9, seconds[name])
        row = beside(name, gbs, "GB/s", COPY, copied)
        row.reason = "bytes read and written"
        run.add(row)
    run.add(
        Row("copy on the card", median(copied), "GB/s", reason=f"{2 * copy_bytes / 2**30:.1f} GiB read and written")
    )
