"""A transformers cache whose keys and values lie in a KVStore; the model is handed StorageTensors.

Owns what transformers expects of a cache (lengths, windows, crops, beams). Knows nothing of pages or files.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import warnings
from typing import NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_csd.config import parse_kv_dtype
from torch_csd.errors import MemoryBudgetError, StoreError, StoreMismatchError
from torch_csd.sparse import Sparse
from torch_csd.store import KVStore, PrefixMatch
from torch_csd.tensor import StorageTensor
from torch_csd.weights.tensor import FileTensor


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

    With `sparse=` (`torch_csd.PageTopK`, `Adaptive` or `SparF`) decode steps read a choice of the tokens instead of all
    of them: attention is then no longer exact, and `stats()` says how much of the softmax was left out.

    With `durable=True` and a `name` it can be kept: `commit` makes what it holds survive the process, and
    `StorageCache.open` finds it again, for the same model: `config` is compared with the one it was made with, and
    so is `fingerprint`, text of the caller's that tells one set of weights from another (the configuration does not;
    see `torch_csd.fingerprint`).

        cache = StorageCache(model.config, "/nvme/kv", durable=True, name="manual")
        ...
        cache.commit(token_ids)
        cache = StorageCache.open("/nvme/kv", "manual", config=model.config)
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
        max_bytes: int | str | None = None,
        durable: bool = False,
        name: str | None = None,
        fingerprint: str | None = None,
        checksums: bool = True,
        sparse: Sparse | None = None,
        executor: str = "auto",
        gpu_budget: int | str = 0,
        gpu_staging: int | str = "256MiB",
        gpu_io: str = "auto",
    ):
        _check_config(config)
        if durable:
            _check_can_be_kept(config)
        elif fingerprint is not None:
            raise ValueError("StorageCache: only a durable cache has a fingerprint; pass durable=True with it")
        self._make_layers(
            config,
            KVStore(
                directory,
                memory_budget=memory_budget,
                kv_dtype=kv_dtype,
                io_engine=io_engine,
                threads=threads,
                queue_depth=queue_depth,
                read_ahead=read_ahead,
                resident=resident,
                simd=simd,
                max_bytes=max_bytes,
                checksums=checksums,
                executor=executor,
                gpu_budget=gpu_budget,
                gpu_staging=gpu_staging,
                gpu_io=gpu_io,
                durable=durable,
                name=name,
                metadata=_model_metadata(config, fingerprint, kv_dtype) if durable else None,
                sparse=sparse,
            ),
        )

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | None,
        name: str,
        *,
        config: PreTrainedConfig | None = None,
        fingerprint: str | None = None,
        device: torch.device | str = "cpu",
        read_only: bool = False,
        memory_budget: int | str = "1GiB",
        io_engine: str = "auto",
        threads: int | None = None,
        queue_depth: int = 32,
        read_ahead: int | str | None = None,
        resident: bool = True,
        simd: str | None = None,
        max_bytes: int | str | None = None,
        checksums: bool = True,
        sparse: Sparse | None = None,
        executor: str = "auto",
        gpu_budget: int | str = 0,
        gpu_staging: int | str = "256MiB",
        gpu_io: str = "auto",
    ) -> StorageCache:
        """The cache `name` as it was last committed: generation goes on as if the process had never ended.

        `config` and `fingerprint` are those of the model that goes on, `device` is where it is; the others are those
        of `KVStore.open`. Without a `config` nothing is compared, and a cache with sliding windows cannot be opened.

        Raises `StoreMismatchError` if another model made it, and what `KVStore.open` raises.
        """
        _check_config(config)
        store = KVStore.open(
            directory,
            name,
            read_only=read_only,
            device=device,
            memory_budget=memory_budget,
            io_engine=io_engine,
            threads=threads,
            queue_depth=queue_depth,
            read_ahead=read_ahead,
            resident=resident,
            simd=simd,
            max_bytes=max_bytes,
            checksums=checksums,
            executor=executor,
            gpu_budget=gpu_budget,
            gpu_staging=gpu_staging,
            gpu_io=gpu_io,
        )
        try:
            _check_model(name, store.metadata, config, fingerprint)
            cache = cls.__new__(cls)
            cache._make_layers(config, store)
            cache._take_up()
            cache.sparse = sparse  # now that the layers are known that stay exact
        except BaseException:
            store.close()
            raise
        return cache

    def _make_layers(self, config: PreTrainedConfig | None, store: KVStore) -> None:
        DynamicCache.__init__(self, config=config)
        self.store = store
        latent_dims = _latent_dims(config)
        for index, layer in enumerate(self.layers):
            # Exactly these two: their subclasses keep more than keys and values, and keep it in memory.
            if type(layer) is DynamicLayer:
                self.layers[index] = StorageLayer(self.store, index, latent_dims)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = StorageSlidingLayer(self.store, index, layer.sliding_window, latent_dims)
                self.store.exact_layers |= {index}
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
            if key_states.ndim == 4 and key_states.shape[2] > 1:
                self._check_room(key_states, value_states, layer)
            return layer.update(key_states, value_states, *args, **kwargs)
        except (StoreError, MemoryBudgetError):
            # This layer is as before. The layers before it have the new tokens already: without them too, the cache
            # is what it was before this forward, and can go on when there is room again. What a card could not write of
            # a prompt is known at the forward after it: then all layers go back to before the prompt.
            past_tokens = layer.get_seq_length()
            for other in self.layers:
                if isinstance(other, StorageLayer) and other.is_initialized and other.get_seq_length() > past_tokens:
                    other.undo_to(past_tokens)
            raise

    def _check_room(self, key_states: torch.Tensor, value_states: torch.Tensor, layer: StorageLayer) -> None:
        """Asks at the first layer, rather than to fail in the middle of a prefill that took minutes."""
        stored = [other for other in self.layers if isinstance(other, StorageLayer)]
        sparse = [other for other in stored if not other._exact]
        if layer is stored[0]:
            # Layers with a window may be of another shape than those that keep what sparse attention chooses by.
            exact_count = len(stored) if layer._exact else len(stored) - len(sparse)
            self.store.check_room(key_states, value_states, layer_count=len(stored), exact_count=exact_count)
        elif self.store.sparse is not None and sparse and layer is sparse[0]:
            self.store.check_room(key_states, value_states, layer_count=len(sparse), exact_count=0)

    # ---- durable caches --------------------------------------------------------------------------------------

    def commit(self, token_ids: torch.Tensor | None = None) -> None:
        """Makes what the cache holds now survive the process, kill -9 and power loss: see `KVStore.commit`.

        `token_ids` [batch, tokens] are what the model was given so far (more than that does no harm, so what
        `generate` returns will do): with them, later prompts find this as their prefix.
        """
        lengths = {layer.get_seq_length() for layer in self.layers if isinstance(layer, StorageLayer)}
        if len(lengths) > 1:
            raise StoreError(
                f"StorageCache.commit: the layers hold {sorted(lengths)} tokens, a forward is under way or has failed; "
                "commit between forwards"
            )
        self.store.commit(token_ids)

    def fork(self, name: str | None = None) -> StorageCache:
        """A cache with the same contents that grows on its own and shares the pages that are there.

        With a `name`, which must be new, it can be committed: one system prompt becomes many conversations.
        """
        return _copy_with_forked_store(self, {id(self.store): self.store.fork(name)})

    def match_prefix(self, input_ids: torch.Tensor) -> PrefixMatch | None:
        """The longest beginning of a prompt that a committed sequence of this directory and model holds, or None.

        `input_ids` is [tokens] or [1, tokens]. At least one token is left over, for the model to begin with.
        `use_prefix` makes what was found this cache's contents.
        """
        if input_ids.ndim == 2 and input_ids.shape[0] == 1:
            input_ids = input_ids[0]
        if input_ids.ndim != 1:
            raise ValueError(f"StorageCache.match_prefix wants the ids of one prompt, got {list(input_ids.shape)}")
        wanted = self.store.metadata

        def same_model(metadata: dict) -> bool:
            same = all(metadata.get(key) == wanted.get(key) for key in ("fingerprint", "kv_dtype"))
            return same and not _differences(metadata, wanted)

        windows = {layer.index: layer.sliding_window for layer in self.layers if isinstance(layer, StorageSlidingLayer)}
        for match in self.store.prefix_matches(input_ids[:-1], wants=same_model):
            begins = self.store.committed_begins(match.name) if windows else {}
            if all(begins.get(index, 0) <= max(match.length - window + 1, 0) for index, window in windows.items()):
                return match
        return None

    def use_prefix(self, match: PrefixMatch, *, device: torch.device | str = "cpu") -> None:
        """Fills this cache, which must be empty, with what `match_prefix` found: nothing is copied or read."""
        self.store.use_prefix(match, device=device)
        self._take_up()

    def _take_up(self) -> None:
        """Makes the layers what the store holds."""
        for number in self.store.layers():
            if self.layer_class_to_replicate is not None:
                while len(self.layers) <= number:
                    self.layers.append(StorageLayer(self.store, len(self.layers)))
            if number >= len(self.layers) or not isinstance(self.layers[number], StorageLayer):
                raise StoreMismatchError(f"StorageCache: the store holds a layer {number}, this model's cache does not")
            self.layers[number].take_up()

    @property
    def sparse(self) -> Sparse | None:
        """How decode steps choose among the stored tokens; None: attention is exact. May be assigned between forwards.

        Calls of more than 16 tokens (prefill), sliding-window layers and attn_implementation="eager" (whose two
        products go over all tokens) are exact in any case.
        """
        return self.store.sparse

    @sparse.setter
    def sparse(self, sparse: Sparse | None) -> None:
        self.store.sparse = sparse
        for layer in self.layers:
            if isinstance(layer, StorageLayer):
                layer._shown = None  # tensors that are as the store was

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

    _exact = False  # whatever the store is set to

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

    def take_up(self) -> None:
        """Makes this layer what its store holds already."""
        stored = self.store.layer(self.index)
        self.dtype, self.device = stored.dtype, stored.device
        self._head_shape = (stored.num_kv_heads, stored.head_dim_k, stored.head_dim_v)
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
        if not nothing_older and k_shape[2] > 1:
            self.store.settle(self.index)  # attention would find what went wrong, where nobody can undo it
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
            exact=self._exact,
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
            self.store.truncate(self.index, max(length + int(tokens_to_remove), 0))

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
                self.store,
                self.index,
                kv_begin=span[0],
                kv_end=span[1],
                dtype=self.dtype,
                device=self.device,
                exact=self._exact,
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

    def chooses(self) -> bool:
        """Whether a decode step reads a choice of the tokens that are there, so that it can be guessed."""
        if not self.is_initialized or self._exact or self.store.sparse is None:
            return False
        num_kv_heads, *dims = self._head_shape
        return num_kv_heads > 1 or tuple(dims) != self._latent_dims

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
    Their attention is exact: a window is short.
    """

    _exact = True

    def __init__(self, store: KVStore, index: int, sliding_window: int, latent_dims: tuple[int, int] | None = None):
        StorageLayer.__init__(self, store, index, latent_dims)
        self.sliding_window = sliding_window
        self.record_past = False
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)  # yielded by Cache.__iter__

    def take_up(self) -> None:
        StorageLayer.take_up(self)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

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


def _check_config(config: object) -> None:
    if config is not None and not isinstance(config, PreTrainedConfig):
        raise TypeError(
            "StorageCache: config must be a transformers configuration (model.config), got "
            f"{type(config).__name__}; the directory is the second argument"
        )


def _check_can_be_kept(config: PreTrainedConfig | None) -> None:
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(
                f"StorageCache: layer {index} of {type(config).__name__} keeps more than keys and values "
                f"({type(layer).__name__}), in memory, so its cache cannot be durable"
            )


# ---- which model a durable cache is of -----------------------------------------------------------------------------

# What a configuration says that changes no key and no value.
_IRRELEVANT = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_decoder",
    "label2id", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "sep_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def _model_metadata(
    config: PreTrainedConfig | None, fingerprint: str | None, kv_dtype: torch.dtype | str | None = None
) -> dict:
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise TypeError(f"StorageCache: fingerprint must be text, got {fingerprint!r}")
    values = {} if config is None else config.get_text_config(decoder=True).to_dict()
    kept = {key: value for key, value in values.items() if key not in _IRRELEVANT and not key.startswith("_")}
    return {
        "model": json.loads(json.dumps(kept, default=str, sort_keys=True)),
        "fingerprint": fingerprint,
        "kv_dtype": str(parse_kv_dtype(kv_dtype)).removeprefix("torch."),
    }


def _differences(there: dict, wanted: dict) -> list[str]:
    """What two models' configurations say differently; what only one says is another version of transformers'."""
    theirs, ours = there.get("model"), wanted.get("model")
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return []
    return [
        f"{key} is {theirs[key]!r}, not {ours[key]!r}"
        for key in sorted(theirs.keys() & ours)
        if theirs[key] != ours[key]
    ]


def _check_model(name: str, metadata: dict, config: PreTrainedConfig | None, fingerprint: str | None) -> None:
    """Raises StoreMismatchError unless the sequence is of this model."""
    wanted = _model_metadata(config, fingerprint)
    differences = _differences(metadata, wanted)
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise StoreMismatchError(
            f"sequence {name!r} was made by another model: its {'; '.join(differences[:5])}{more}; open it with the "
            "model that made it, or prefill anew under another name"
        )
    if fingerprint is not None and metadata.get("fingerprint") != fingerprint:
        raise StoreMismatchError(
            f"sequence {name!r} was made with other weights: its fingerprint is {metadata.get('fingerprint')!r}, not "
            f"{fingerprint!r}; open it with the model that made it, or prefill anew under another name"
        )
    if config is None and (metadata.get("model") or {}).get("sliding_window"):
        raise StoreMismatchError(f"sequence {name!r} has sliding windows; open it with config=model.config")


def fingerprint(model: torch.nn.Module) -> str:
    """Text that tells a model's weights from others': a digest of all names, shapes and dtypes, and of 64 elements of
    each parameter. Takes milliseconds; weights that were changed everywhere (fine-tuned, merged) always differ."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter_name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{parameter_name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        step = max(1, parameter.numel() // 64)
        sample = parameter.sample(step) if isinstance(parameter, FileTensor) else parameter.detach().flatten()[::step]
        sample = sample.cpu()
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
