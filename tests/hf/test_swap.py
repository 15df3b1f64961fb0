"""swap_attention: models that are already loaded, and modules that know nothing of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_before

import torch_csd
from torch_csd.tensor import StorageTensor

from .models import assert_same_generation, generate, make_model, model_of, prompts, stock_cache

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 64

CALLS = {
    "F": lambda *args, **kwargs: F.scaled_dot_product_attention(*args, **kwargs),
    "a name imported before": imported_before,
    "torch._C._nn": torch._C._nn.scaled_dot_product_attention,
}


class Attention(nn.Module):
    def __init__(self, call, masked: bool):
        super().__init__()
        self.call, self.masked = call, masked
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x, past=None):
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        length = q.shape[-2]
        if self.masked:
            order = {"attn_mask": torch.ones(length, length, dtype=torch.bool).tril()}
        else:
            order = {"is_causal": length > 1}
        if past is not None:
            order = {}
        out = self.call(q, k, v, enable_gqa=True, **order)
        return self.out(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Causal, with positions given from outside, and no idea of a cache."""

    def __init__(self, call=F.scaled_dot_product_attention, masked=False, layers=3):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(96, WIDTH), nn.Embedding(512, WIDTH)
        self.layers = nn.ModuleList(Attention(call, masked) for _ in range(layers))

    def forward(self, tokens, positions):
        x = self.tokens(tokens) + self.positions(positions)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (WIDTH,)))
        return x


@pytest.fixture(params=list(CALLS))
def call(request):
    return CALLS[request.param]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def make_decoder(*args, **kwargs) -> Decoder:
    torch.manual_seed(0)
    return Decoder(*args, **kwargs).eval()


def tokens_of(batch, length, seed=0):
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_loaded_model_is_swapped_and_generates_the_same(family, new_cache):
    model = make_model(family, "eager")
    stock = generate(model_of(family, "eager"), prompts(70, 3), stock_cache(model))
    for _ in range(2):  # idempotent
        assert torch_csd.swap_attention(model) is model
        assert model.config._attn_implementation == "csd"
    assert_same_generation(generate(model, prompts(70, 3), new_cache(model.config)), stock)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_that_cannot_be_set_keeps_its_own_implementation(implementation, new_cache):
    model = make_model("falcon", implementation)
    stock = generate(model, prompts(70, 3), stock_cache(model))
    assert torch_csd.swap_attention(model).config._attn_implementation == implementation
    assert_same_generation(generate(model, prompts(70, 3), new_cache(model.config)), stock)


def test_a_model_inside_of_a_module_is_swapped():
    wrapper = nn.ModuleDict({"inner": make_model("llama", "sdpa"), "other": nn.Linear(2, 2)})
    torch_csd.swap_attention(wrapper)
    assert wrapper["inner"].config._attn_implementation == "csd"


def test_a_plain_module_gives_the_same_bits_after_swapping(call):
    module = make_decoder(call)
    tokens, positions = tokens_of(2, 70), torch.arange(70)
    before = module(tokens, positions)
    assert torch_csd.swap_attention(module) is module
    assert torch.equal(module(tokens, positions), before)


def test_stored_keys_go_to_the_executor_by_whatever_name_attention_is_called(call, new_cache):
    module = torch_csd.swap_attention(make_decoder(call).layers[0])
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, KV_HEADS, 90, HEAD_DIM, generator=generator) for _ in range(2))
    x = torch.randn(2, 1, WIDTH, generator=generator)
    cache = new_cache()
    cache.update(k, v, 0)
    past = cache.layers[0].keys, cache.layers[0].values
    assert isinstance(past[0], StorageTensor)
    torch.testing.assert_close(module(x, past), module(x, (k, v)), atol=2e-5, rtol=0)
    assert cache.stats()["attend_calls"] == 1


@pytest.mark.parametrize("masked", [False, True], ids=["is_causal", "attn_mask"])
@pytest.mark.parametrize("steps", [(1,) * 5, (100, 1, 1, 1), (30, 70, 1, 20)], ids=str)
def test_with_a_cache_a_plain_module_goes_on_where_it_stopped(masked, steps, call, new_cache):
    module = make_decoder(call, masked)
    length = sum(steps)
    tokens, positions = tokens_of(2, length), torch.arange(length)
    whole = module(tokens, positions)

    cache = new_cache()
    torch_csd.swap_attention(module, cache=cache)
    torch_csd.swap_attention(module, cache=cache)  # idempotent
    for _ in range(2):
        begin, outputs = 0, []
        for step in steps:
            outputs.append(module(tokens[:, begin : begin + step], positions[begin : begin + step]))
            begin += step
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, atol=1e-4, rtol=0)
        assert len(cache) == 3 and cache.get_seq_length(2) == length
        cache.reset()


def test_the_first_call_of_an_incremental_module_has_the_same_bits(call, new_cache):
    module = make_decoder(call)
    tokens, positions = tokens_of(2, 70), torch.arange(70)
    before = module(tokens, positions)
    torch_csd.swap_attention(module, cache=new_cache())
    assert torch.equal(module(tokens, positions), before)


def test_a_copy_of_an_incremental_module_has_a_cache_of_its_own(new_cache):
    cache = new_cache()
    module = torch_csd.swap_attention(make_decoder(), cache=cache)
    module(tokens_of(1, 10), torch.arange(10))
    duplicate = copy.deepcopy(module)
    step = tokens_of(1, 1, seed=1), torch.arange(10, 11)
    first = duplicate(*step)
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(module(*step), first, atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 11


def test_another_cache_takes_over(new_cache):
    one, other = new_cache(), new_cache()
    module = torch_csd.swap_attention(make_decoder(), cache=one)
    module(tokens_of(1, 10), torch.arange(10))
    torch_csd.swap_attention(module, cache=other)
    module(tokens_of(1, 4), torch.arange(4))
    assert (one.get_seq_length(), other.get_seq_length()) == (10, 4)


def test_attention_outside_of_an_incremental_module_is_left_alone(new_cache):
    cache = new_cache()
    module = torch_csd.swap_attention(make_decoder(), cache=cache)
    module(tokens_of(1, 10), torch.arange(10))
    with pytest.raises(IndexError):
        module(tokens_of(1, 10) + 1000, torch.arange(10))
    k = torch.randn(1, 2, 5, 16)
    F.scaled_dot_product_attention(k, k, k)
    assert cache.get_seq_length() == 10


class EncoderDecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.self_attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.cross_attention(x, memory, memory, need_weights=False)[0]


def test_attention_modules_of_torch_become_incremental_and_cross_attention_stays(new_cache):
    torch.manual_seed(0)
    module = EncoderDecoderLayer().eval()
    x, memory = torch.randn(2, 80, WIDTH), torch.randn(2, 7, WIDTH)
    whole = module(x, memory)
    cache = new_cache()
    torch_csd.swap_attention(module, cache=cache)
    parts = [module(part, memory) for part in x.split([70, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
    assert len(cache) == 1


def test_attention_that_cannot_be_cached_is_said(new_cache):
    cache = new_cache()
    x = torch.randn(1, 5, WIDTH)
    weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    torch_csd.swap_attention(weights, cache=cache)
    with pytest.raises(ValueError, match="need_weights=False"):
        weights(x, x, x, need_weights=True)
    encoder = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    torch_csd.swap_attention(encoder, cache=cache)
    with pytest.raises(ValueError, match="only causal"):
        encoder(x, x, x, need_weights=False)
    assert cache.get_seq_length() == 0


def test_masks_that_fit_no_keys_are_refused_and_nothing_is_lost(new_cache):
    class Bare(nn.Module):
        def forward(self, q, mask):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    cache = new_cache()
    module = torch_csd.swap_attention(Bare(), cache=cache)
    q = torch.randn(1, 2, 4, 16)
    module(q, torch.ones(4, 4, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="4 new keys or over all 8, got one over 5"):
        module(q, torch.ones(4, 5, dtype=torch.bool))
    assert cache.get_seq_length() == 4


def test_what_is_neither_a_model_nor_a_module_is_refused(new_cache):
    for wrong in ("model", None, F.scaled_dot_product_attention):
        with pytest.raises(TypeError, match="nn.Module"):
            torch_csd.swap_attention(wrong)
    with pytest.raises(TypeError, match="StorageCache"):
        torch_csd.swap_attention(nn.Linear(2, 2), cache="/nvme/kv")
    with pytest.raises(ValueError, match="past_key_values"):
        torch_csd.swap_attention(make_model("llama", "sdpa"), cache=new_cache())
    with pytest.raises(ValueError, match="without a config"):
        torch_csd.swap_attention(nn.Linear(2, 2), cache=new_cache(model_of("mistral", "sdpa").config))
