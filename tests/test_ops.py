"""The native ops are well-behaved torch ops: opcheck, torch.compile, errors as types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import random_kv

import torch_csd
from torch_csd import Adaptive, PageTopK, SparF, StorageTensor, ops
from torch_csd.sparse import op_arguments

namespace = torch.ops.torch_csd


@pytest.fixture
def stored(make_store):
    store = make_store()
    k, v = random_kv(2, 2, 130, 16, 24)
    store.append(0, k, v)
    return store, k, v


OPEN_SETTINGS = ("auto", "auto", 2**20, 1, 4, -1, True, True, 0, "", "", torch.zeros(16, dtype=torch.uint8))

# Those that are called between forwards, or by the GPU path within an op: no graph has them. They have no fakes, or,
# io_submit, memory that opcheck would copy to where direct I/O cannot reach it.
UNTRACED = {
    "adopt", "restore_layer", "commit", "release", "verify", "shrink", "check_room", "check_summary_room",
    "read_header", "lease", "copy_leased", "append_reserved", "fill_reserved", "finish_reserved", "end_lease",
    "io_submit", "reader_open", "reader_add_file", "reader_refresh_file", "reader_read", "reader_wait",
    "reader_is_done", "reader_drop", "reader_close", "reader_stats",
}  # fmt: skip


def op_calls(store, directory):
    handle, drive = store.layer(0).handle, store._drive.handle
    q = torch.randn(2, 4, 3, 16)
    mask = torch.rand(2, 1, 3, 130) > 0.2
    k, v = random_kv(2, 2, 3, 16, 24)
    return {
        "open": (torch.tensor([10**6, -1, -1]), directory, *OPEN_SETTINGS),
        "probe": (directory, "auto"),
        "supported_simd": (),
        "create_layer": (torch.tensor([int(drive[0]), 10**6, -1]), 2, 16, 24, torch.float32, 0, 3),
        "fork_layer": (torch.tensor([int(drive[0]), 10**6, -1]), handle),
        "drop_layer": (ops.fork_layer(handle),),
        "layer_info": (handle,),
        "append": (handle, k, v, [0, 0]),  # no tokens, so that opcheck's many calls of it all return the same
        "truncate": (handle, [130]),
        "trim": (handle, 0),
        "reorder": (handle, [0, 1]),
        "flush": (drive,),
        "keep_summary": (handle, 0),
        "attend_sparse": (
            *(handle, q, mask, torch.zeros(4), None, 0.25, 0, 0, 0.0, 0, 0, 130, 24),
            *op_arguments(PageTopK(fraction=0.5)),
        ),
        "prefetch": (handle, q, 0.25, 0.0, 0, 0, 130, *op_arguments(PageTopK(fraction=0.5))),
        "attend": (handle, q, mask, torch.zeros(4), None, 0.25, 1, 0, 0.0, 0, 0, 130, 24),
        "scores": (handle, q, 0, 0, 130),
        "weighted_sum": (handle, torch.rand(2, 4, 3, 130), 0, 0, 130, 24),
        "read": (handle, False, torch.float32, 0, 2, 0, 130, 2, 16),
        "weight_row_bytes": (4, 100),
        "quantise_rows": (torch.randn(5, 100), 4, "auto"),
        "dequantise_rows": (ops.quantise_rows(torch.randn(5, 100), 8), 8, 100, torch.bfloat16, "auto"),
        "quantised_linear": (
            *(torch.randn(3, 100), ops.quantise_rows(torch.randn(5, 100), 4), 4, torch.randn(5), "auto"),
        ),
        "io_open": (torch.tensor([int(drive[0]), 10**6, -1]), drive, 2),
        "io_reap": (ops.io_open(drive, depth=1), True),
        "io_close": (torch.tensor([int(drive[0]), 10**6, -1]),),
        "file_path": (drive,),
        "stats": (drive,),
        "close": (torch.tensor([-1, -1, -1]),),
    }


def test_every_op_is_listed_here(stored, tmp_path):
    schemas = torch._C._jit_get_all_schemas()
    registered = {schema.name.split("::")[1] for schema in schemas if schema.name.startswith("torch_csd::")}
    assert registered == set(op_calls(stored[0], str(tmp_path))) | UNTRACED


@pytest.mark.parametrize(
    "name",
    [
        "open", "probe", "supported_simd", "create_layer", "fork_layer", "drop_layer", "layer_info", "append",
        "truncate", "trim", "reorder", "flush", "keep_summary", "attend", "attend_sparse", "prefetch", "scores",
        "weighted_sum", "read", "weight_row_bytes", "quantise_rows", "dequantise_rows", "quantised_linear", "io_open",
        "io_reap", "io_close", "file_path", "stats", "close",
    ],
)  # fmt: skip
def test_opcheck(stored, tmp_path, name):
    torch.library.opcheck(getattr(namespace, name).default, op_calls(stored[0], str(tmp_path))[name])
    if name == "open":
        namespace.close(torch.tensor([10**6, -1, -1]))


def test_attend_can_be_compiled_into_one_graph(stored):
    store, k, v = stored
    K, V = StorageTensor.pair(store, 0)

    @torch.compile(fullgraph=True)
    def layer(q, K, V):
        return F.scaled_dot_product_attention(q * 2, K, V, enable_gqa=True) + 1

    @torch.compile(fullgraph=True)
    def functional(q, K, V):
        out, lse = torch_csd.attention(q * 2, K, V, causal=True, softcap=30.0)
        return out + 1, lse

    q = torch.randn(2, 4, 3, 16)
    expected = F.scaled_dot_product_attention(q * 2, k, v, enable_gqa=True) + 1
    torch.testing.assert_close(layer(q, K, V), expected, atol=1e-5, rtol=0)
    out, lse = functional(q, K, V)
    eager_out, eager_lse = torch_csd.attention(q * 2, K, V, causal=True, softcap=30.0)
    torch.testing.assert_close(out, eager_out + 1)
    torch.testing.assert_close(lse, eager_lse)


@pytest.mark.parametrize(
    "sparse", [PageTopK(tokens=64, local=0, sink=0), Adaptive(mass=0.5), SparF(channels=4, tokens=3)], ids=repr
)
def test_a_sparse_attend_can_be_compiled_into_one_graph(make_store, sparse):
    k, v = random_kv(2, 2, 600, 16, 24)
    store = make_store(sparse=sparse)
    store.append(0, k, v)

    @torch.compile(fullgraph=True)
    def layer(q, K, V):
        return F.scaled_dot_product_attention(q * 2, K, V, enable_gqa=True) + 1

    q = torch.randn(2, 4, 1, 16)
    sparse_out = layer(q, *StorageTensor.pair(store, 0))
    torch.testing.assert_close(sparse_out, store.attend(0, q * 2)[0] + 1, atol=1e-5, rtol=0)
    store.sparse = None
    exact = F.scaled_dot_product_attention(q * 2, k, v, enable_gqa=True) + 1
    torch.testing.assert_close(layer(q, *StorageTensor.pair(store, 0)), exact, atol=1e-5, rtol=0)
    assert (sparse_out - exact).abs().max() > 1e-3


def test_sparse_attention_is_not_differentiable(stored):
    store, _, _ = stored
    q = torch.randn(2, 4, 1, 16, requires_grad=True)
    out, _ = store.attend(0, q, sparse=PageTopK(fraction=0.5))
    with pytest.raises(NotImplementedError, match="not differentiable"):
        out.sum().backward()


def test_one_graph_serves_growing_caches_and_several_stores(stored, make_store):
    store, k, v = stored
    torch._dynamo.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def layer(q, K, V):
        return F.scaled_dot_product_attention(q, K, V, enable_gqa=True)

    other = make_store()
    other.append(0, k, v)
    q = torch.randn(2, 4, 1, 16)
    for step in range(4):
        for each in (store, other):
            each.append(0, *random_kv(2, 2, 1, 16, 24, seed=step))
            layer(q, *StorageTensor.pair(each, 0))
    assert len(compilations) <= 2, "once for the first kv_len, once for any"


def test_calls_in_a_compiled_graph_keep_their_order(make_store):
    store = make_store()
    k, v = random_kv(1, 1, 10, 16)
    store.append(0, k, v)
    handle = store.layer(0).handle

    @torch.compile(fullgraph=True)
    def step(handle, k, v, q):
        namespace.append(handle, k, v)
        out, _ = namespace.attend(handle, q, None, None, None, 1.0, 0, 0, 0.0, 0, 0, -1, 16)
        namespace.append(handle, k * 2, v * 2)
        return out

    q = torch.randn(1, 1, 1, 16)
    out = step(handle, k, v, q)
    assert store.lengths(0) == [30]
    expected, _ = torch_csd.reference.attention(q, torch.cat([k, k], 2), torch.cat([v, v], 2), scale=1.0)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


def test_importing_the_package_loads_no_gpu_library():
    import subprocess
    import sys

    script = (
        "import sys, torch_csd\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'kvikio', 'cupy', 'matplotlib', 'numba'}))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
