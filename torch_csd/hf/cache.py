"""A transformers cache whose keys and values lie in a KVStore; the model is handed StorageTensors.

Owns what transformers expects of a cache (lengths, windows, crops, beams). Knows nothing of pages or files.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from typing import NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_csd.errors import StoreError
from torch_csd.store import KVStore
from torch_csd.tensor import StorageTensor


class StorageCache(DynamicCache):
    """A `DynamicCache` that keeps its keys and values in files on a drive.

    `config` is a model's configuration (`model.config`), as for `DynamicCache`: it tells which layers have a
    sliding window and which are not attention at all. Without one, every layer is taken for full attention.
    Layers that are not plain attention (Mamba, linear attention, sparse-attention indexers) keep their state
    in memory, as they do in a `DynamicCache`. `directory` and the keyword arguments are those of `KVStore`.

    It does what `DynamicCache` does, `generate(past_key_values=cache)` included. `copy.deepcopy(cache)` is a
    fork: it shares the pages that are there and grows on its own. What a layer hands out (`update`,
    `layers[i].keys`) is valid until the tokens it shows are reordered, cropped away, or left behind by the
    layer's sliding window.

    Raises TypeError for a `config` that is not a configuration, ValueError for keys and values that do not
    fit what the cache holds (which it then still holds), and `StoreClosedError` for any use after `close()`.

        with StorageCache(model.config, "/nvme/kv", memory_budget="2GiB") as cache:
            model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        directory: str | os.PathLike[str] | None = None,
        *,
        kv_dtype: torch.dtype | str | None = None,
        memory_budget: int | str = "1GiB",
        io_engine: str = "auto",
        threads: int | None = None,
        queue_depth: int = 32,
        read_ahead: int | str | None = None,
        resident: bool = True,
        simd: str | None = None,
        checksums: bool = True,
    ):
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(
                "StorageCache: config must be a transformers configuration (model.config), got "
                f"{type(config).__name__}; the directory is the second argument"
            )
        DynamicCache.__init__(self, config=config)
        self.store = KVStore(
            directory,
            memory_budget=memory_budget,
            kv_dtype=kv_dtype,
            io_engine=io_engine,
            threads=threads,
            queue_depth=queue_depth,
            read_ahead=read_ahead,
            resident=resident,
            simd=simd,
            checksums=checksums,
        )
        latent_dims = _latent_dims(config)
        for index, layer in enumerate(self.layers):
            # Exactly these two: their subclasses keep more than keys and values, and keep it in memory.
            if type(layer) is DynamicLayer:
                self.layers[index] = StorageLayer(self.store, index, latent_dims)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = StorageSlidingLayer(self.store, index, layer.sliding_window, latent_dims)
        if self.layers and not any(isinstance(layer, StorageLayer) for layer in self.layers):
            warnings.warn(
                f"StorageCache: no layer of {type(config).__name__} is plain attention, so nothing goes to "
                "the drive and all of the cache stays in memory, as in a DynamicCache",
                stacklevel=2,
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends to layer `layer_idx`; returns the keys and values that these tokens' queries may see."""
        if self.layer_class_to_replicate is not None:
            # Made without a config: layers come as they are first used.
            while len(self.layers) <= layer_idx:
                self.layers.append(StorageLayer(self.store, len(self.layers)))
        layer = self.layers[layer_idx]
        if not isinstance(layer, StorageLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        try:
            return layer.update(key_states, value_states, *args, **kwargs)
        except StoreError:
            # This layer is as before. The layers before it have the new tokens already: without them too, the cache
            # is what it was before this forward, and can go on when there is room again.
            past_tokens = layer.get_seq_length()
            for earlier in self.layers[:layer_idx]:
                if isinstance(earlier, StorageLayer) and earlier.get_seq_length() > past_tokens:
                    earlier.undo_to(past_tokens)
            raise

    def stats(self) -> dict:
        """What was moved by which path so far, and on what: see `KVStore.stats`."""
        return self.store.stats()

    def close(self) -> None:
        """Gives back memory and disk space. Idempotent. A fork (deepcopy) of this cache stays open."""
        self.store.close()

    def __enter__(self) -> StorageCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict) -> StorageCache:
        return _copy_with_forked_store(self, memo)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: what it holds lies in files of this process; "
            "copy.deepcopy(cache) makes a second cache that shares them"
        )


class StorageLayer(DynamicLayer):
    """One full-attention layer: layer `index` of `store`."""

    def __init__(self, store: KVStore, index: int, latent_dims: tuple[int, int] | None = None):
        # Not super().__init__(): it assigns keys and values, which are derived from the store here.
        self.store = store
        self.index = index
        self.is_initialized = False
        self._latent_dims = latent_dims
        self._accepted: tuple | None = None  # shapes, dtype and device of what the last update took
        self._shown: tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """StorageTensor [batch, num_kv_heads, kv_len, head_dim_k]; None before the first update."""
        return self._held()[0]

    @property
    def values(self) -> torch.Tensor | None:
        """StorageTensor [batch, num_kv_heads, kv_len, head_dim_v]; None before the first update."""
        return self._held()[1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # What every later update must agree with: (num_kv_heads, head_dim_k, head_dim_v).
        self._head_shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Decoding is the same form over and over: then a token costs one call of the store here, and what the layer
        # holds is what that append returns. Each thing touched costs microseconds, the weights having been in between.
        k_shape = key_states.shape
        form = k_shape, value_states.shape, key_states.dtype, key_states.device
        if form != self._accepted:
            self._check(key_states, value_states)
        self._shown = None
        state = self.store.append(self.index, key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._accepted = form

        kv_end = max(state.lengths)
        past_tokens = kv_end - k_shape[2]
        kv_begin = self._visible_begin(past_tokens)
        self._drop_unneeded(state.begin, kv_begin)
        nothing_older = kv_begin == past_tokens
        if self._holds_latents(key_states, value_states):
            _warn_latents_are_read()
            if nothing_older:
                return key_states, value_states
            try:
                latents = self.store.read(self.index, kv_begin=kv_begin, kv_end=kv_end)
            except StoreError:
                self.undo_to(past_tokens)
                raise
            return tuple(latent.to(device=self.device, dtype=self.dtype) for latent in latents)
        return StorageTensor.pair(
            self.store,
            self.index,
            state=state,
            kv_begin=kv_begin,
            kv_end=kv_end,
            dtype=self.dtype,
            device=self.device,
            # The prompt's own attention runs on what is still in memory; only what follows goes to the store.
            new_k=key_states if nothing_older else None,
            new_v=value_states if nothing_older else None,
        )

    def get_seq_length(self) -> int:
        return max(self.store.lengths(self.index), default=0)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            # A length to keep, as crop once took it: the stock error says what to pass.
            super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self._shown = None
        if tokens_to_remove < 0 and length > 0:
            self.store.truncate(self.index, max(length + tokens_to_remove, 0))

    def undo_to(self, length: int) -> None:
        """Forgets the tokens from position `length` on: those of a forward that failed in a later layer."""
        self._shown = None
        self.store.truncate(self.index, length)

    def reset(self) -> None:
        self.store.free(self.index)
        self._shown = self._accepted = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.get_seq_length() > 0:
            self._take_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            rows = torch.arange(len(self.store.lengths(self.index)))
            self._take_rows(rows.repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length() > 0:
            # Through a tensor, so that all that indexes one is taken: boolean masks, lists, negative numbers.
            rows = torch.arange(len(self.store.lengths(self.index)))
            indices = indices.cpu() if isinstance(indices, torch.Tensor) else indices
            self._take_rows(rows[indices].tolist())

    def offload(self) -> None:
        """Nothing to do: the keys and values are not on the device."""

    def prefetch(self) -> None:
        """Nothing to do: the executor reads ahead by itself."""

    def __deepcopy__(self, memo: dict) -> StorageLayer:
        self._shown = None  # of this layer's own store
        return _copy_with_forked_store(self, memo)

    def _take_rows(self, index: list[int]) -> None:
        self._shown = None
        self.store.reorder(self.index, index)

    def _held(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.is_initialized:
            return None, None
        kv_end = self.get_seq_length()
        if kv_end == 0:
            # Initialised early, or cropped to nothing: an ordinary empty tensor, as a DynamicLayer's.
            empty = torch.tensor([], dtype=self.dtype, device=self.device)
            return empty, empty
        # The same two until something changes: torch.cat to both is one append, so they must be a pair.
        span = self._held_begin(), kv_end
        if self._shown is None or self._shown[0] != span:
            pair = StorageTensor.pair(
                self.store, self.index, kv_begin=span[0], kv_end=span[1], dtype=self.dtype, device=self.device
            )
            self._shown = span, pair
        return self._shown[1]

    def _held_begin(self) -> int:
        return 0

    def _visible_begin(self, past_tokens: int) -> int:
        """The first position that queries after `past_tokens` may see."""
        return 0

    def _drop_unneeded(self, begin: int, visible_begin: int) -> None:
        """Lets go of what no query can see any more, of what is held from `begin` on; full attention sees all."""

    def _holds_latents(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        return key_states.shape[1] == 1 and (key_states.shape[-1], value_states.shape[-1]) == self._latent_dims

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raises ValueError for what does not fit, before anything is appended."""
        where = f"StorageCache: layer {self.index}"
        if key_states.ndim != 4 or value_states.ndim != 4 or key_states.shape[:3] != value_states.shape[:3]:
            raise ValueError(
                f"{where} wants keys and values [batch, num_kv_heads, q_len, head_dim] that agree in all but "
                f"head_dim, got {list(key_states.shape)} and {list(value_states.shape)}"
            )
        for name, head_dim in (("keys", key_states.shape[3]), ("values", value_states.shape[3])):
            if head_dim % 8:
                raise ValueError(
                    f"{where} wants a head_dim that is a multiple of 8, got {head_dim} for its {name}; "
                    "pad the heads, or use a DynamicCache for this model"
                )
        if not self.is_initialized:
            return
        rows = len(self.store.lengths(self.index))
        if rows and key_states.shape[0] != rows:
            raise ValueError(
                f"{where} holds a batch of {rows} sequences, got {key_states.shape[0]}; cache.reset() starts "
                "over, cache.batch_select_indices and cache.batch_repeat_interleave change the batch"
            )
        head_shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        if head_shape != self._head_shape:
            raise ValueError(
                f"{where} holds (num_kv_heads, head_dim_k, head_dim_v) = {self._head_shape}, got "
                f"{head_shape}; a cache serves one model: make another for this one"
            )
        for states in (key_states, value_states):
            if states.dtype != self.dtype or states.device != self.device:
                raise ValueError(
                    f"{where} holds {self.dtype} on {self.device}, got {states.dtype} on {states.device}; "
                    "keep the model as it was when the cache was filled, or cache.reset()"
                )


class StorageSlidingLayer(StorageLayer, DynamicSlidingWindowLayer):
    """One sliding-window layer: positions stay absolute, and what the window has left behind is trimmed.

    Queries see the last `sliding_window` - 1 tokens before them besides themselves, and the mask that
    transformers makes for such a layer covers exactly that slice, so the window must not be applied again.
    """

    def __init__(self, store: KVStore, index: int, sliding_window: int, latent_dims: tuple[int, int] | None = None):
        StorageLayer.__init__(self, store, index, latent_dims)
        self.sliding_window = sliding_window
        self.record_past = False
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)  # yielded by Cache.__iter__

    @property
    def cumulative_length(self) -> int:
        """All tokens seen, those that are trimmed included."""
        return self.get_seq_length()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        StorageLayer.lazy_initialization(self, key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        if length >= self.sliding_window:
            if not self.record_past or tokens_to_remove > 0:
                # Both are errors whose text the stock layer has; it raises before it touches anything.
                DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
            length += tokens_to_remove
            self.store.truncate(self.index, length)
            self._trim(self._window_begin(length))
        else:
            StorageLayer.crop(self, tokens_to_remove)

    def _held_begin(self) -> int:
        begin = self.store.begin(self.index)
        return begin if self.record_past else max(begin, self._window_begin(self.get_seq_length()))

    def _visible_begin(self, past_tokens: int) -> int:
        return self._window_begin(past_tokens)

    def _drop_unneeded(self, begin: int, visible_begin: int) -> None:
        # Not what these tokens' own queries see: the model has yet to read what this update hands out.
        if visible_begin > begin and not self.record_past:
            self.store.trim(self.index, visible_begin)

    def _window_begin(self, length: int) -> int:
        return max(length - self.sliding_window + 1, 0)

    def _trim(self, begin: int) -> None:
        if begin > self.store.begin(self.index):
            self.store.trim(self.index, begin)


def _copy_with_forked_store(original, memo: dict):
    """A deep copy of a cache or layer, in which a fork of the store stands for the store."""
    if id(original.store) not in memo:
        memo[id(original.store)] = original.store.fork()
    duplicate = type(original).__new__(type(original))
    memo[id(original)] = duplicate
    for name, value in vars(original).items():
        setattr(duplicate, name, copy.deepcopy(value, memo))
    return duplicate


def _latent_dims(config: PreTrainedConfig | None) -> tuple[int, int] | None:
    """Last dimensions of what a model with multi-head latent attention caches; None for any other."""
    if config is None:
        return None
    config = config.get_text_config(decoder=True)
    latent_dim = getattr(config, "kv_lora_rank", None)
    rope_dim = getattr(config, "qk_rope_head_dim", None)
    return None if latent_dim is None or rope_dim is None else (latent_dim, rope_dim)


@functools.cache
def _warn_latents_are_read() -> None:
    """Warns once per process."""
    warnings.warn(
        "StorageCache: this model's multi-head latent attention projects its cached latents after reading "
        "them, so each layer's latents are read into memory, one layer at a time and outside of "
        "memory_budget; no other kind of attention does this",
        stacklevel=5,  # the line of the model that calls cache.update
    )
