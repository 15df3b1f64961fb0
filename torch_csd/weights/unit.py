"""What a stream of weights reads, waits for and gives back as one, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.weights.layout import Layout, Range
from torch_csd.weights.staging import HUGE_PAGE_BYTES

if TYPE_CHECKING:
    from torch_csd.cuda.device import Event
    from torch_csd.cuda.weights import Reading


@dataclass(eq=False)
class Unit:
    """What is read, waited for and given back as one: a weight, or a part of a large one."""

    layout: Layout
    ranges: tuple[Range, ...]
    places: tuple[int, ...]  # of the ranges' covering blocks in the unit's memory
    byte_count: int  # of these blocks
    kept: bool = False  # stays in memory from its first use on
    routed: bool = False  # used when something calls for it: not one of the order
    memory: Tensor | None = None
    view: Tensor | None = None  # the elements there, of one that stays
    ticket: int | Reading | None = None  # of the read into it
    ready: Event | None = None  # on a card: its elements are there after it
    loaded: bool = False
    awaited: bool = False  # a thread waits for it already
    users: int = 0
    stale: bool = False  # its file was written to while it had users
    index: int | None = None  # in the order
    expected: bool = True  # in the next pass: it was used in the last one
    last_use: int = 0  # of all uses of the order, counted
    forgotten: bool = False
    use_count: float = 0.0  # of a routed one
    step: int = -1  # at which the first of the threads in lockstep used it; -1: not used since it was read
    counted: bool = False  # the use that was announced

    @staticmethod
    def of(layout: Layout) -> Unit:
        return Unit.of_ranges(layout, tuple(leaf.range for leaf in layout.leaves))

    @staticmethod
    def of_ranges(layout: Layout, ranges: tuple[Range, ...]) -> Unit:
        places = [0]
        for each in ranges:
            places.append(places[-1] + covering_bytes(each.offset, each.byte_count))
        return Unit(layout, ranges, tuple(places[:-1]), places[-1])

    def leaves(self) -> Iterator[Tensor]:
        """The elements of each of the layout's leaves, out of its memory."""
        for leaf, each, place in zip(self.layout.leaves, self.ranges, self.places, strict=True):
            yield leaf.elements(self.memory[place + each.offset % BLOCK_BYTES :][: each.byte_count])

    def elements(self) -> Tensor:
        """The layout's."""
        if self.view is not None:
            return self.view
        elements = self.layout.assemble(self.leaves())
        if self.kept and elements.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr():
            self.view = elements
        return elements


def kept_bytes(unit: Unit) -> int:
    """Of memory that is its own."""
    multiple = HUGE_PAGE_BYTES if unit.byte_count >= HUGE_PAGE_BYTES else BLOCK_BYTES
    return -(-unit.byte_count // multiple) * multiple


def covering_bytes(offset: int, count: int) -> int:
    """Of the blocks that hold bytes [offset, offset + count)."""
    if count == 0:
        return 0
    return (offset + count + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES - offset // BLOCK_BYTES * BLOCK_BYTES
