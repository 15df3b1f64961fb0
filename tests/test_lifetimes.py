"""Durable sequences over their lives: whatever is created, forked, cut, committed, dropped and opened again, each holds
what a dictionary of tensors would, and what nobody holds any more takes no space."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule
from support import random_kv

from torch_csd import KVStore, collect_garbage, list_sequences, remove_sequence, verify

SETTINGS = {"memory_budget": "2MiB", "threads": 1}
HEADS, HEAD_DIM = 2, 32
DATA_OFFSET = 2**20

Rows = list[torch.Tensor]  # of a layer: [2, HEADS, tokens, HEAD_DIM], K and V


@dataclass
class Model:
    """What a store must hold: its layers' rows from `begin` on, and the same for what it last committed."""

    name: str | None
    layers: dict[int, tuple[int, Rows]]


class Life:
    """A directory of durable sequences, and the tensors that they must be."""

    def __init__(self, directory: str, *, resident: bool, kv_dtype: str | None = None) -> None:
        self.directory = directory
        self.settings = SETTINGS | {"resident": resident}
        self.kv_dtype = kv_dtype
        self.open: dict[KVStore, Model] = {}
        self.committed: dict[str, dict[int, tuple[int, Rows]]] = {}
        self.count = 0  # of sequences
        self.appends = 0

    def new_name(self) -> str:
        self.count += 1
        return f"sequence {self.count}"

    def create(self) -> KVStore:
        name = self.new_name()
        store = KVStore(self.directory, durable=True, name=name, kv_dtype=self.kv_dtype, **self.settings)
        self.open[store] = Model(name, {})
        return store

    def reopen(self, name: str) -> KVStore:
        store = KVStore.open(self.directory, name, **self.settings)
        self.open[store] = Model(name, dict(self.committed[name]))
        return store

    def append(self, store: KVStore, layer: int, tokens: int, batch: int) -> None:
        self.appends += 1
        layers = self.open[store].layers
        begin, rows = layers.get(layer, (0, None))
        k, v = random_kv(batch if rows is None else len(rows), HEADS, tokens, HEAD_DIM, seed=self.appends)
        store.append(layer, k, v)
        new = [torch.stack(pair) for pair in zip(k, v, strict=True)]
        rows = new if rows is None else [torch.cat(pair, dim=2) for pair in zip(rows, new, strict=True)]
        layers[layer] = begin, rows

    def truncate(self, store: KVStore, layer: int, fraction: float) -> None:
        begin, rows = self.open[store].layers[layer]
        kept = int(min(row.shape[2] for row in rows) * fraction)
        store.truncate(layer, begin + kept)
        self.open[store].layers[layer] = begin, [row[:, :, :kept] for row in rows]

    def trim(self, store: KVStore, layer: int, fraction: float) -> None:
        begin, rows = self.open[store].layers[layer]
        dropped = int(min(row.shape[2] for row in rows) * fraction)
        store.trim(layer, begin + dropped)
        self.open[store].layers[layer] = begin + dropped, [row[:, :, dropped:] for row in rows]

    def reorder(self, store: KVStore, layer: int, index: list[int]) -> None:
        begin, rows = self.open[store].layers[layer]
        index = [i % len(rows) for i in index]
        store.reorder(layer, index)
        self.open[store].layers[layer] = begin, [rows[i] for i in index]

    def free(self, store: KVStore, layer: int) -> None:
        store.free(layer)
        self.open[store].layers.pop(layer, None)

    def fork(self, store: KVStore, *, named: bool) -> KVStore:
        name = self.new_name() if named else None
        fork = store.fork(name)
        self.open[fork] = Model(name, dict(self.open[store].layers))
        return fork

    def commit(self, store: KVStore) -> None:
        model = self.open[store]
        if model.name is not None:
            store.commit()
            self.committed[model.name] = dict(model.layers)

    def close(self, store: KVStore) -> None:
        del self.open[store]
        store.close()

    def remove(self, name: str) -> None:
        remove_sequence(self.directory, name)
        del self.committed[name]

    def check(self, store: KVStore) -> None:
        layers = self.open[store].layers
        assert store.layers() == sorted(layers)
        for layer, (begin, rows) in layers.items():
            assert store.begin(layer) == begin
            assert store.lengths(layer) == [begin + row.shape[2] for row in rows]
            if self.kv_dtype is None and rows[0].shape[2] > 0:
                k, v = store.read(layer)
                for i, row in enumerate(rows):
                    assert torch.equal(k[i], row[0]) and torch.equal(v[i], row[1])

    def close_all(self) -> None:
        for store in list(self.open):
            self.close(store)

    def check_all(self) -> None:
        """Everything is as it should be, and nothing is left that should not be. Ends this life."""
        self.close_all()
        assert [info.name for info in list_sequences(self.directory)] == sorted(self.committed)
        assert not Path(self.directory, "torch_csd-durable").exists() or verify(self.directory) == []
        for name in list(self.committed):
            store = self.reopen(name)
            self.check(store)
            self.close(store)
            self.remove(name)
        if self.count:
            collect_garbage(self.directory)
            assert Path(self.directory, "torch_csd-durable", "pages.csd").stat().st_size <= DATA_OFFSET, "a leaked page"


class LifeMachine(RuleBasedStateMachine):
    stores = Bundle("stores")
    names = Bundle("names")

    @initialize(resident=st.booleans())
    def begin(self, resident):
        self.directory = tempfile.TemporaryDirectory()
        self.life = Life(self.directory.name, resident=resident)

    def teardown(self):
        if hasattr(self, "life"):
            try:
                self.life.check_all()
            finally:
                self.life.close_all()
                self.directory.cleanup()

    @rule(target=stores)
    def create(self):
        return self.life.create()

    @rule(target=stores, name=consumes(names))
    def reopen(self, name):
        return self.life.reopen(name)

    @rule(store=stores, layer=st.integers(0, 1), tokens=st.integers(1, 150), batch=st.integers(1, 3))
    def append(self, store, layer, tokens, batch):
        self.life.append(store, layer, tokens, batch)

    @rule(store=stores, fraction=st.floats(0, 1), change=st.sampled_from(["truncate", "trim"]))
    def cut(self, store, fraction, change):
        for layer in list(self.life.open[store].layers):
            getattr(self.life, change)(store, layer, fraction)

    @rule(store=stores, index=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def reorder(self, store, index):
        for layer in list(self.life.open[store].layers):
            self.life.reorder(store, layer, index)

    @rule(store=stores, layer=st.integers(0, 1))
    def free(self, store, layer):
        self.life.free(store, layer)

    @rule(target=stores, store=stores, named=st.booleans())
    def fork(self, store, named):
        return self.life.fork(store, named=named)

    @rule(store=stores)
    def commit(self, store):
        self.life.commit(store)

    @rule(target=names, store=consumes(stores))
    def close(self, store):
        name = self.life.open[store].name
        self.life.close(store)
        return name if name in self.life.committed else multiple()

    @rule(name=consumes(names))
    def remove(self, name):
        self.life.remove(name)

    @rule(store=stores)
    def check(self, store):
        self.life.check(store)

    @rule()
    def collect(self):
        if self.life.count:
            collect_garbage(self.directory.name)


TestLives = LifeMachine.TestCase
TestLives.settings = hypothesis.settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_a_thousand_sequences(tmp_path):
    """Created, forked, cut, dropped and opened again at random; some are checked while they live, all at the end."""
    chance = random.Random(7)
    life = Life(str(tmp_path), resident=True)
    while life.count < 1000:
        what = chance.random()
        store = chance.choice(list(life.open)) if life.open else None
        if store is None or (what < 0.15 and len(life.open) < 40):
            store = life.create()
            life.append(store, 0, chance.randrange(1, 200), chance.randrange(1, 3))
        elif what < 0.45 and len(life.open) < 60:
            life.fork(store, named=chance.random() < 0.8)
        elif what < 0.55:
            life.append(store, 0, chance.randrange(1, 100), 1)
        elif what < 0.62:
            life.truncate(store, 0, chance.random())
        elif what < 0.66:
            life.trim(store, 0, chance.random() / 2)
        elif what < 0.72:
            life.commit(store)
        elif what < 0.86:
            life.close(store)
        elif what < 0.92 and life.committed:
            name = chance.choice(list(life.committed))
            if all(model.name != name for model in life.open.values()):
                life.remove(name) if chance.random() < 0.3 else life.reopen(name)
        else:
            life.check(store)
    assert len(life.committed) > 50
    for store in list(life.open):
        life.check(store)
    life.check_all()
