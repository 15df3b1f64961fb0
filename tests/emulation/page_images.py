"""Page images in memory for tests of attention, with garbage wherever a kernel must not look."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_csd.cuda.kernels import Kernels, Pages
from torch_csd.cuda.layout import PageLayout


class PageImages:
    """Rows of k and v ``[batch, num_kv_heads, tokens, head_dim]`` as pages; row r has `lengths[r]` tokens that count.

    What slots beyond these hold is NaN, except where a NaN would spoil a quantised group.
    """

    def __init__(self, kernels: Kernels, k: Tensor, v: Tensor, layout: PageLayout, lengths: list[int]) -> None:
        batch, _, tokens, _ = k.shape
        self.lengths = lengths
        self.page_count = -(-tokens // 64)
        padding = self.page_count * 64 - tokens
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, padding), value=3.0) for x in (k, v))
        for row, length in enumerate(lengths):
            v[row, :, length:] = torch.nan
            if not layout.code_bits:
                k[row, :, length:] = torch.nan
        stream = kernels.device.current_stream()
        byte_count = batch * self.page_count * layout.page_bytes
        self.memory = kernels.device.new_memory(byte_count).view(batch, self.page_count, layout.page_bytes)
        kernels.pack(k, v, layout, self.memory, token_begin=0, page_count=self.page_count, stream=stream)
        every = self.pages([[(row, page) for page in range(self.page_count)] for row in range(batch)])
        # What the pages stand for, float32: what the kernels' results are compared with attention over.
        unpacked = kernels.unpack(every.addresses, layout, dtype=torch.float32, stream=stream)
        self.k, self.v = (
            x.unflatten(0, (batch, self.page_count)).transpose(1, 2).flatten(2, 3)[:, :, :tokens] for x in unpacked
        )

    def pages(self, rows: list[list[tuple[int, int]]]) -> Pages:
        """Of each row: (row, page) of images."""
        return Pages.of(
            [[(self.memory[row, page].data_ptr(), page) for row, page in chosen] for chosen in rows],
            torch.device("cpu"),
        )

    def all_pages(self) -> Pages:
        return self.pages(
            [[(row, page) for page in range(-(-length // 64))] for row, length in enumerate(self.lengths)]
        )
