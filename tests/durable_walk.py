"""A walk over everything that changes a durable store, which says before and after each step what must be there.

What the tests of crashes share: a process that is killed, or loses its power, walks; whoever looks at the directory
then finds the state after the last step that ended, or that of the step that had begun, and nothing else. A state is
plain JSON: by name of a sequence its metadata, token ids and, by layer, dtypes, positions and a digest of K and V.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import torch
from support import random_kv

from torch_csd import KVStore, collect_garbage, list_sequences, remove_sequence

# number: num_kv_heads, head_dim_k, head_dim_v. Pages of 3 and of 2 blocks, so that freed space is reused across sizes.
LAYERS = {0: (2, 16, 8), 3: (1, 8, 24)}
LENGTH_MAX = 900

State = dict[str, dict]
Report = Callable[[str, State], None]


class Walk:
    """One process's walk from what the directory holds already. ``report`` gets "begin" or "end", and the state."""

    def __init__(self, directory: str, report: Report, *, seed: int = 0, **settings: object) -> None:
        self.directory = directory
        self.report = report
        self.settings = {"memory_budget": "1MiB", "threads": 1, "resident": False} | settings
        self.rng = random.Random(seed)
        self.state = observe(directory, **self.settings)
        self.stores: dict[str, KVStore] = {}
        self.appended: dict[str, dict] = {}  # by name and layer, K and V as they were appended, from begin() on
        self.ids: dict[str, list[int]] = {}

    # ---- steps ---------------------------------------------------------------------------------------------------

    def create(self, name: str, kv_dtype: str | None, tokens: int) -> None:
        self.stores[name] = KVStore(
            self.directory, durable=True, name=name, metadata={"commits": 0}, kv_dtype=kv_dtype, **self.settings
        )
        self.appended[name], self.ids[name] = {}, []
        self.extend(name, tokens)

    def extend(self, name: str, tokens: int) -> None:
        self._append(name, tokens)
        self._commit(name)

    def rewrite(self, name: str, tokens_gone: int, tokens: int) -> None:
        """Puts other tokens in the place of the last: pages that the commit before named are free after this one."""
        store, ids = self._open(name), self.ids[name]
        length = max(len(ids) - tokens_gone, store.begin(0))
        for number in store.layers():
            store.truncate(number, length)
            k, v = self.appended[name][number]
            kept = length - store.begin(number)
            self.appended[name][number] = k[:, :, :kept], v[:, :, :kept]
        del ids[length:]
        self.extend(name, tokens)

    def slide(self, name: str, window: int, tokens: int) -> None:
        store = self._open(name)
        for number in store.layers():
            begin = store.begin(number)
            dropped = max(0, len(self.ids[name]) - window - begin)
            store.trim(number, begin + dropped)
            k, v = self.appended[name][number]
            self.appended[name][number] = k[:, :, dropped:], v[:, :, dropped:]
        self.extend(name, tokens)

    def fork(self, name: str, new_name: str, tokens: int) -> None:
        self.stores[new_name] = self._open(name).fork(new_name)
        self.appended[new_name], self.ids[new_name] = dict(self.appended[name]), list(self.ids[name])
        self.extend(new_name, tokens)

    def remove(self, name: str) -> None:
        self.close(name)
        state = {other: entry for other, entry in self.state.items() if other != name}
        self._change(state, lambda: remove_sequence(self.directory, name))

    def collect_garbage(self) -> None:
        self._change(self.state, lambda: collect_garbage(self.directory))

    def close(self, *names: str) -> None:
        for name in names or list(self.stores):
            if name in self.stores:
                self.stores.pop(name).close()

    def step(self) -> None:
        """Any of these, at random."""
        names, rng = list(self.state), self.rng
        name = rng.choice(names) if names else None
        tokens = rng.choice([1, 3, 17, 64, 100, 190])
        if name is not None and self.state[name]["layers"]["0"]["length"] > LENGTH_MAX:
            return self.remove(name)
        new_name = next(text for text in map("s{}".format, range(len(names) + 1)) if text not in names)
        steps = {
            "extend": 6 if names else 0,
            "rewrite": 4 if names else 0,
            "slide": 1 if names else 0,
            "fork": 2 if 0 < len(names) < 4 else 0,
            "create": 1 if 0 < len(names) < 4 else 20 * (not names),
            "remove": 2 if len(names) > 1 else 0,
            "collect_garbage": 2 if names else 0,
            "close": 2,
        }
        match rng.choices(list(steps), list(steps.values()))[0]:
            case "extend":
                self.extend(name, tokens)
            case "rewrite":
                self.rewrite(name, rng.randrange(1, 200), tokens)
            case "slide":
                self.slide(name, rng.randrange(40, 300), tokens)
            case "fork":
                self.fork(name, new_name, tokens)
            case "create":
                self.create(new_name, rng.choice([None, "int4", "bfloat16"]), tokens)
            case "remove":
                self.remove(name)
            case "collect_garbage":
                self.collect_garbage()
            case "close":
                self.close()

    # ---- what they are made of -----------------------------------------------------------------------------------

    def _open(self, name: str) -> KVStore:
        if name not in self.stores:
            store = self.stores[name] = KVStore.open(self.directory, name, **self.settings)
            self.appended[name] = {number: store.read(number) for number in store.layers()}
            self.ids[name] = store.token_ids[0]
        return self.stores[name]

    def _append(self, name: str, tokens: int) -> None:
        store = self._open(name)
        for number, (num_kv_heads, head_dim_k, head_dim_v) in LAYERS.items():
            k, v = random_kv(1, num_kv_heads, tokens, head_dim_k, head_dim_v, seed=self.rng.getrandbits(32))
            if store.kv_dtype == torch.bfloat16:
                k, v = k.bfloat16(), v.bfloat16()  # it comes back as it was appended
            store.append(number, k, v)
            before = self.appended[name].get(number)
            pair = (k, v) if before is None else tuple(torch.cat(two, 2) for two in zip(before, (k, v), strict=True))
            self.appended[name][number] = pair
        self.ids[name] += [self.rng.randrange(50000) for _ in range(tokens)]

    def _commit(self, name: str) -> None:
        store = self.stores[name]
        if store.kv_dtype not in (torch.int4, torch.int8):
            for number in LAYERS:
                for ours, appended in zip(store.read(number), self.appended[name][number], strict=True):
                    assert torch.equal(ours, appended), f"{name}: layer {number} is not what was appended"
        store.metadata["commits"] += 1
        entry = describe(store, self.ids[name])
        self._change(self.state | {name: entry}, lambda: store.commit(self.ids[name]))

    def _change(self, state: State, change: Callable[[], object]) -> None:
        self.report("begin", state)
        change()
        self.state = state
        self.report("end", state)


def describe(store: KVStore, ids: list[int]) -> dict:
    layers = {}
    for number in store.layers():
        digest = hashlib.blake2b(digest_size=16)
        for values in store.read(number):
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        stored = store.layer(number)
        layers[str(number)] = {
            "geometry": [stored.num_kv_heads, stored.head_dim_k, stored.head_dim_v],
            "dtypes": [str(stored.kv_dtype), str(stored.dtype)],
            "begin": store.begin(number),
            "length": store.lengths(number)[0],
            "digest": digest.hexdigest(),
        }
    return {"metadata": dict(store.metadata), "token_ids": list(ids), "layers": layers}


def observe(directory: str, **settings: object) -> State:
    """What the directory holds; it is opened for writing."""
    state = {}
    for info in list_sequences(directory):
        with KVStore.open(directory, info.name, **settings) as store:
            state[info.name] = describe(store, store.token_ids[0])
        length = state[info.name]["layers"]["0"]["length"]
        assert (info.tokens, info.layers, info.rows) == (length, len(LAYERS), 1), info
        assert len(state[info.name]["token_ids"]) == length
    return state


def differences(found: State, wanted: State) -> str:
    """For messages: states are long."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            short = [
                "absent"
                if entry is None
                else f"commit {entry['metadata'].get('commits')}, "
                + ", ".join(
                    f"layer {n} [{layer['begin']}, {layer['length']}) {layer['digest'][:8]}"
                    for n, layer in entry["layers"].items()
                )
                for entry in (found.get(name), wanted.get(name))
            ]
            lines.append(f"{name}: found {short[0]}; wanted {short[1]}")
    return "\n".join(lines) or "no difference"
