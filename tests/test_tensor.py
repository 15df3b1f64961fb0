"""StorageTensor: torch ops on it give what they give on the same tensor in memory, or a clear error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import random_kv

import torch_csd
from torch_csd import StaleTensorError, StorageTensor, reference

BATCH, KV_HEADS, GROUP, HEAD_DIM, TOKENS = 2, 2, 3, 32, 200
# Two fp32 sums in different orders: some units in the last place, of outputs near 1 and of raw scores near 30.
ATOL, RTOL = 5e-6, 1e-6


@pytest.fixture(params=[True, False], ids=["resident", "drive"])
def stored(request, make_store):
    """(store, k, v, K, V): dense tensors and the same ones stored."""
    store = make_store(resident=request.param)
    k, v = random_kv(BATCH, KV_HEADS, TOKENS, HEAD_DIM)
    store.append(0, k, v)
    store.flush()
    return store, k, v, *StorageTensor.pair(store, 0)


def query(q_len: int = 1, heads: int = KV_HEADS * GROUP) -> torch.Tensor:
    return torch.randn(BATCH, heads, q_len, HEAD_DIM, generator=torch.Generator().manual_seed(3))


def repeat_kv(x: torch.Tensor, group: int) -> torch.Tensor:
    batch, heads, tokens, head_dim = x.shape
    return (
        x[:, :, None, :, :]
        .expand(batch, heads, group, tokens, head_dim)
        .reshape(batch, heads * group, tokens, head_dim)
    )


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert type(ours) is torch.Tensor
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=RTOL)


# ---- scaled_dot_product_attention in every calling form ------------------------------------------------------------


@pytest.mark.parametrize("q_len", [1, 7])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_with_grouped_heads(stored, q_len, scale):
    _, k, v, K, V = stored
    q = query(q_len)
    assert_close(
        F.scaled_dot_product_attention(q, K, V, scale=scale, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True),
    )


@pytest.mark.parametrize("q_len", [1, 7, TOKENS])
def test_sdpa_is_causal_has_torchs_upper_left_alignment(stored, q_len):
    _, k, v, K, V = stored
    q = query(q_len, KV_HEADS)
    assert_close(
        F.scaled_dot_product_attention(q, K, V, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


@pytest.mark.parametrize(
    "mask_shape", [(5, TOKENS), (1, 5, TOKENS), (BATCH, 1, 1, TOKENS), (BATCH, KV_HEADS * GROUP, 5, TOKENS)]
)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_sdpa_with_a_mask_of_any_broadcastable_shape(stored, mask_shape, kind):
    _, k, v, K, V = stored
    q = query(5)
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(4))
    mask = mask > 0.4 if kind == torch.bool else mask
    assert_close(
        F.scaled_dot_product_attention(q, K, V, attn_mask=mask, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
    )


def test_sdpa_on_heads_expanded_by_repeat_kv(stored):
    _, k, v, K, V = stored
    q = query(4)
    assert isinstance(repeat_kv(K, GROUP), StorageTensor)
    assert_close(
        F.scaled_dot_product_attention(q, repeat_kv(K, GROUP), repeat_kv(V, GROUP)),
        F.scaled_dot_product_attention(q, repeat_kv(k, GROUP), repeat_kv(v, GROUP)),
    )
    assert_close(
        F.scaled_dot_product_attention(q, K.repeat_interleave(GROUP, 1), torch.repeat_interleave(V, GROUP, dim=1)),
        F.scaled_dot_product_attention(q, repeat_kv(k, GROUP), repeat_kv(v, GROUP)),
    )


def test_sdpa_with_the_query_group_folded_into_q_len(stored):
    _, k, v, K, V = stored
    q = query().view(BATCH, KV_HEADS, GROUP, HEAD_DIM)
    assert_close(F.scaled_dot_product_attention(q, K, V), F.scaled_dot_product_attention(q, k, v))


def test_sdpa_on_one_row_without_a_batch_dimension(stored):
    _, k, v, K, V = stored
    q = query(3, KV_HEADS)[1]
    assert_close(F.scaled_dot_product_attention(q, K[1], V[1]), F.scaled_dot_product_attention(q, k[1], v[1]))


def test_sdpa_on_a_slice_of_rows_and_tokens(stored):
    _, k, v, K, V = stored
    q = query(3, KV_HEADS)[1:]
    part = (slice(1, None), slice(None), slice(30, 170))
    assert_close(
        F.scaled_dot_product_attention(q, K[part], V[part]),
        F.scaled_dot_product_attention(q, k[part], v[part]),
    )


def test_sdpa_keywords_and_module_path_are_all_caught(stored):
    _, k, v, K, V = stored
    q = query(1, KV_HEADS)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert_close(F.scaled_dot_product_attention(query=q, key=K, value=V, dropout_p=0.0), expected)
    assert_close(torch._C._nn.scaled_dot_product_attention(q, K, V), expected)
    with torch.inference_mode():
        assert_close(F.scaled_dot_product_attention(q, K, V), expected)


sdpa = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda q, K, V: sdpa(q, K, V, dropout_p=0.5), NotImplementedError, "dropout_p must be 0"),
        (lambda q, K, V: sdpa(q, K, V), ValueError, "enable_gqa=True"),
        (lambda q, K, V: sdpa(q, K, V.to_dense(), enable_gqa=True), NotImplementedError, "ordinary"),
        (lambda q, K, V: sdpa(q, V, K, enable_gqa=True), ValueError, "same tokens of one layer"),
        (lambda q, K, V: sdpa(q, K[:, :, 1:], V, enable_gqa=True), ValueError, "same tokens"),
        (lambda q, K, V: sdpa(q[:1], K, V, enable_gqa=True), ValueError, "2 stored rows"),
        (lambda q, K, V: sdpa(q.half(), K, V, enable_gqa=True), ValueError, "like the stored"),
        (lambda q, K, V: sdpa(q[..., :16], K, V, enable_gqa=True), ValueError, "head_dim must be 32"),
        (lambda q, K, V: sdpa(K, K, V), NotImplementedError, "stored query"),
        (
            lambda q, K, V: sdpa(
                q, K, V, attn_mask=torch.ones(1, TOKENS, dtype=torch.bool), is_causal=True, enable_gqa=True
            ),
            ValueError,
            "exclude each other",
        ),
    ],
)  # fmt: skip
def test_an_attention_that_cannot_be_says_why(stored, call, error, text):
    _, _, _, K, V = stored
    with pytest.raises(error, match=text):
        call(query(), K, V)


def test_attention_gives_the_partial_result_that_merges(stored):
    _, k, v, K, V = stored
    q = query(1)
    halves = [torch_csd.attention(q, K[:, :, part], V[:, :, part]) for part in (slice(0, 77), slice(77, None))]
    out, lse = reference.merge(*halves[0], *halves[1])
    expected, expected_lse = reference.attention(q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=0)


# ---- the products of an eager attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("q_len", [1, 40])
def test_the_two_products_of_an_eager_attention_stream(stored, q_len):
    store, k, v, K, V = stored
    q = query(q_len)
    before = store.stats()
    K_all, V_all = repeat_kv(K, GROUP), repeat_kv(V, GROUP)
    weights = torch.matmul(q, K_all.transpose(2, 3))
    assert_close(weights, q @ repeat_kv(k, GROUP).transpose(2, 3))
    p = (0.1 * weights).softmax(-1)
    assert_close(torch.matmul(p, V_all), p @ repeat_kv(v, GROUP))
    assert_close(p @ V_all, p @ repeat_kv(v, GROUP))
    after = store.stats()
    assert (
        after["drive_read_bytes"] + after["resident_read_bytes"]
        > before["drive_read_bytes"] + before["resident_read_bytes"]
    )


def test_products_over_rows_times_heads(stored):
    _, k, v, K, V = stored
    q = query(4).flatten(0, 1)
    rows = BATCH * KV_HEADS * GROUP
    K_rows = repeat_kv(K, GROUP).reshape(rows, TOKENS, HEAD_DIM)
    k_rows = repeat_kv(k, GROUP).reshape(rows, TOKENS, HEAD_DIM)
    assert_close(torch.bmm(q, K_rows.transpose(1, 2)), torch.bmm(q, k_rows.transpose(1, 2)))
    bias = torch.randn(rows, 1, TOKENS)
    assert_close(
        torch.baddbmm(bias, q, K_rows.transpose(-1, -2), beta=0.5, alpha=2.0),
        torch.baddbmm(bias, q, k_rows.transpose(-1, -2), beta=0.5, alpha=2.0),
    )


def test_products_with_a_single_kv_head_broadcast(make_store):
    store = make_store()
    k, v = random_kv(BATCH, 1, TOKENS, HEAD_DIM)
    store.append(0, k, v)
    K, V = StorageTensor.pair(store, 0)
    q = query(3)
    assert_close(q @ K.transpose(-1, -2), q @ k.transpose(-1, -2))
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    assert_close(weights @ V, weights @ v)
    assert_close(
        F.scaled_dot_product_attention(q, K.expand(-1, 6, -1, -1), V.expand(-1, 6, -1, -1)),
        F.scaled_dot_product_attention(q, k.expand(-1, 6, -1, -1), v.expand(-1, 6, -1, -1)),
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tokens", [1, 90])
def test_repeat_kv_works_where_dimensions_are_of_size_one(make_store, batch, kv_heads, group, tokens):
    store = make_store()
    k, v = random_kv(batch, kv_heads, tokens, HEAD_DIM)
    store.append(0, k, v)
    K, V = (repeat_kv(x, group) for x in StorageTensor.pair(store, 0))
    k, v = repeat_kv(k, group), repeat_kv(v, group)
    q = torch.randn(batch, kv_heads * group, 2, HEAD_DIM)
    weights = torch.matmul(q, K.transpose(2, 3))
    assert_close(weights, q @ k.transpose(2, 3))
    p = (0.1 * weights).softmax(-1)
    assert_close(torch.matmul(p, V), p @ v)
    assert_close(F.scaled_dot_product_attention(q, K, V), F.scaled_dot_product_attention(q, k, v))
    rows = batch * kv_heads * group
    K_rows, k_rows = (x.reshape(rows, tokens, HEAD_DIM) for x in (K, k))
    assert_close(torch.bmm(q.flatten(0, 1), K_rows.mT), torch.bmm(q.flatten(0, 1), k_rows.mT))
    assert torch.equal(K.to_dense(), k)


def test_a_stored_left_factor_is_refused(stored):
    _, _, _, K, _ = stored
    with pytest.raises(NotImplementedError, match="right factor"):
        K @ query(1, KV_HEADS).transpose(2, 3)


# ---- lazy views and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[1:],
        lambda x: x[0],
        lambda x: x[:, 1],
        lambda x: x[:, 1:, 5:9],
        lambda x: x[:, :, 7],
        lambda x: x[..., -3:, :],
        lambda x: x[:, :, :0],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x.mT,
        lambda x: x.unsqueeze(2),
        lambda x: x.unsqueeze(2).squeeze(2),
        lambda x: x.flatten(0, 1),
        lambda x: x.reshape(BATCH * KV_HEADS, -1, HEAD_DIM),
        lambda x: x.view(BATCH, KV_HEADS * TOKENS, HEAD_DIM),
        lambda x: repeat_kv(x, GROUP),
        lambda x: repeat_kv(x, GROUP).transpose(2, 3),
        lambda x: repeat_kv(x, GROUP)[1:].flatten(0, 1),
        lambda x: x.detach(),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.cpu(),
        lambda x: x.float(),
        lambda x: x.narrow(2, 10, 20),
        lambda x: x[:1].squeeze(),
        lambda x: x[:1].view(1, KV_HEADS, TOKENS, HEAD_DIM),
        lambda x: x.unbind(0)[1],
        lambda x: x.split(64, dim=2)[3],
        lambda x: x.chunk(2, dim=1)[1],
        lambda x: x.swapaxes(1, 2),
        lambda x: x.movedim(1, 2),
        lambda x: x.unflatten(1, (1, KV_HEADS)),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("values", [False, True])
def test_views_stay_lazy_and_read_back_as_in_memory(stored, view, values, mode):
    store, k, v, K, V = stored
    before = store.stats()["drive_read_bytes"]
    with mode():
        lazy = view(V if values else K)
        expected = view(v if values else k)
        assert isinstance(lazy, StorageTensor) and lazy.shape == expected.shape and lazy.dtype == expected.dtype
        assert store.stats()["drive_read_bytes"] == before, "a view reads nothing"
        assert torch.equal(lazy.to_dense(), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_eager_attention_written_with_einsum_streams(stored, mode):
    _, k, v, K, V = stored
    q = query(3)
    with mode():
        weights = torch.einsum("bhqd,bhkd->bhqk", q, repeat_kv(K, GROUP))
        assert_close(weights, torch.einsum("bhqd,bhkd->bhqk", q, repeat_kv(k, GROUP)))
        p = (0.1 * weights).softmax(-1)
        expected = torch.einsum("bhqk,bhkd->bhqd", p, repeat_kv(v, GROUP))
        assert_close(torch.einsum("bhqk,bhkd->bhqd", p, repeat_kv(V, GROUP)), expected)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda x: x + 1, "aten.add"),
        (lambda x: x.sum(), "aten.sum"),
        (lambda x: x.sort(), "aten.sort"),
        (lambda x: x.clone(), "aten.clone"),
        (lambda x: x.half(), "aten._to_copy"),
        (lambda x: x[..., :8], "channel"),
        (lambda x: x[:, :, ::2], "step 2"),
        (lambda x: x.view(BATCH, KV_HEADS, 2, TOKENS // 2, HEAD_DIM), "splits a stored dimension"),
        (lambda x: x.expand(3, BATCH, KV_HEADS, TOKENS, HEAD_DIM), "expand"),
        (lambda x: x.zero_(), "aten.zero_"),
        (lambda x: torch.softmax(x, -1), "aten._softmax"),
        (lambda x: torch.cat([x, x], dim=2), "torch.cat"),
        (lambda x: torch.cat([x, torch.zeros(1)], dim=0), "torch.cat"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_anything_else_is_refused_by_name_and_reads_nothing(stored, op, name, mode):
    store, _, _, K, _ = stored
    before = store.stats()["drive_read_bytes"]
    with mode():
        with pytest.raises(NotImplementedError, match=name):
            op(K)
        with pytest.raises(NotImplementedError, match="to_dense|append"):
            op(K)
    assert store.stats()["drive_read_bytes"] == before


def test_repr_names_the_part_and_its_tokens(stored):
    _, _, _, K, V = stored
    assert repr(K) == "StorageTensor(K, shape=[2, 2, 200, 32], tokens [0, 200), dtype=torch.float32, device='cpu')"
    assert "V, shape=[2, 2, 5, 32], tokens [10, 15)" in str(V[:, :, 10:15])


def test_a_tensor_is_a_snapshot(stored):
    store, k, v, K, V = stored
    q = query(1)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    store.append(0, v, k)
    assert K.shape[2] == TOKENS
    assert_close(F.scaled_dot_product_attention(q, K, V, enable_gqa=True), expected)
    newer, _ = StorageTensor.pair(store, 0)
    assert newer.shape[2] == 2 * TOKENS


@pytest.mark.parametrize(
    "change", [lambda s: s.truncate(0, 100), lambda s: s.reorder(0, [1, 0]), lambda s: s.trim(0, 64)]
)
def test_a_tensor_whose_tokens_are_gone_says_so(stored, change):
    store, _, _, K, V = stored
    change(store)
    for use in (
        K.to_dense,
        lambda: F.scaled_dot_product_attention(query(), K, V, enable_gqa=True),
        lambda: query(1, 2) @ K.mT,
    ):
        with pytest.raises(StaleTensorError):
            use()


def test_ops_run_in_memory_while_the_tokens_are_still_there(make_store):
    store = make_store(resident=False)
    k, v = random_kv(BATCH, KV_HEADS, TOKENS, HEAD_DIM)
    store.append(0, k, v)
    store.flush()
    K, V = StorageTensor.pair(store, 0, new_k=k, new_v=v)
    q = query(TOKENS, KV_HEADS)
    assert isinstance(K, StorageTensor)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(F.scaled_dot_product_attention(q, K, V, is_causal=True), expected), "torch's own kernel ran"
    assert torch.equal(K * 2, k * 2)
    assert store.stats()["drive_read_bytes"] == 0
    with pytest.raises(ValueError, match="new tokens must be"):
        StorageTensor.pair(store, 0, new_k=k[:, :, 1:], new_v=v[:, :, 1:])


def test_torch_cat_with_new_tokens_is_an_append(stored):
    store, k, v, K, V = stored
    for step in range(3):
        new_k, new_v = random_kv(BATCH, KV_HEADS, 5, HEAD_DIM, seed=10 + step)
        K, V = torch.cat([K, new_k], dim=2), torch.cat((V, new_v), dim=-2)
        k, v = torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)
    assert K.shape == k.shape and store.lengths(0) == [TOKENS + 15] * BATCH
    assert torch.equal(K.to_dense(), k) and torch.equal(V.to_dense(), v)
    q = query(5)
    assert_close(
        F.scaled_dot_product_attention(q, K, V, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )


def test_half_an_append_by_torch_cat_is_noticed(stored):
    _, _, _, K, V = stored
    new_k, new_v = random_kv(BATCH, KV_HEADS, 5, HEAD_DIM, seed=10)
    grown = torch.cat([K, new_k], dim=2)
    with pytest.raises(NotImplementedError, match="torch.cat those of V too"):
        torch.cat([K, new_k], dim=2)
    with pytest.raises(ValueError, match="wanted tokens up to position 205"):
        grown.to_dense()
    torch.cat([V, new_v], dim=2)
    assert grown.to_dense().shape[2] == TOKENS + 5


def test_an_index_out_of_range_is_an_index_error(stored):
    _, _, _, K, _ = stored
    for index in (TOKENS, -TOKENS - 1):
        with pytest.raises(IndexError):
            K[:, :, index]
    with pytest.raises(IndexError):
        K[:, :, 10:20].select(2, 15)


def test_gradients_are_refused_at_the_backward(stored):
    _, _, _, K, V = stored
    q = query().requires_grad_()
    out = F.scaled_dot_product_attention(q, K, V, enable_gqa=True)
    with pytest.raises(NotImplementedError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_query_that_wants_them_is_attended_as_ever(stored, mode):
    _, k, v, K, V = stored
    q = query().requires_grad_()
    with mode():
        out = F.scaled_dot_product_attention(q, K, V, enable_gqa=True)
        assert not out.requires_grad
        assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_tensors_of_one_state_outlive_the_mode_they_were_made_in(stored):
    store, _, _, _, _ = stored
    store.truncate(0, TOKENS - 10)  # a state of which no tensor was made yet
    with torch.inference_mode():
        K, V = StorageTensor.pair(store, 0)
    K, V = StorageTensor.pair(store, 0)
    q = query().requires_grad_()
    assert F.scaled_dot_product_attention(q, K, V, enable_gqa=True).requires_grad
    new_k, new_v = random_kv(BATCH, KV_HEADS, 5, HEAD_DIM)
    K, V = torch.cat([K, new_k], dim=2), torch.cat([V, new_v], dim=2)
    assert store.lengths(0) == [TOKENS - 5] * BATCH


def test_deepcopy_and_pickling_of_the_tensor_are_refused(stored):
    _, _, _, K, _ = stored
    with pytest.raises((NotImplementedError, TypeError)):
        copy.deepcopy(K)
    with pytest.raises(TypeError, match="to_dense"):
        K.__reduce_ex__(2)


def test_rows_of_different_lengths_have_no_tensor(make_store):
    store = make_store()
    store.append(0, *random_kv(2, 1, 10, 16), lengths=[3, 10])
    with pytest.raises(ValueError, match="KVStore.attend"):
        StorageTensor.pair(store, 0)
    assert StorageTensor.pair(store, 0, kv_end=3)[0].shape == (2, 1, 3, 16)


@pytest.mark.parametrize("name", ["share_memory_", "__dlpack__"])
def test_whoever_looks_for_its_memory_gets_an_error(stored, name):
    K = stored[3]
    with pytest.raises(NotImplementedError, match="to_dense"):
        getattr(K, name)()
