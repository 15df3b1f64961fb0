"""A directory's durable sequences as a whole: readers beside writers, what is damaged, what is in the way."""

from __future__ import annotations


import torch

import torch_csd
from torch_csd import KVStore
from torch_csd.store import PrefixMatch

TOKENS = 1000


def test_a_prefix_is_used_by_the_process_that_committed_it(tmp_path):
    # The file has grown since it was opened.
    k = torch.randn(1, 2, TOKENS, 64)
    with (
        KVStore(tmp_path, durable=True, name="a", memory_budget="8MiB") as first,
        KVStore(tmp_path, durable=True, name="b", memory_budget="8MiB") as second,
    ):
        first.append(0, k, k)
        first.commit(list(range(TOKENS)))
        (match,) = second.prefix_matches([*range(500), 7])
        assert match == PrefixMatch("a", 500)
        second.use_prefix(match)
        assert torch.equal(second.read(0)[0], k[:, :, :500])
        second.append(0, k, k)
        second.commit()
        assert first.lengths(0) == [TOKENS] and second.lengths(0) == [500 + TOKENS]
    assert torch_csd.verify(tmp_path) == []
