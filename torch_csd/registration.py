"""`attn_implementation="csd"` without importing transformers, which takes seconds, before someone else does."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Holds transformers' table of attention implementations; every model imports it.
MODULE = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Imports torch_csd.hf, which registers "csd": now if transformers' models are imported, else when they are."""
    if MODULE in sys.modules:
        importlib.import_module("torch_csd.hf")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # It stays there: taking it away while another thread imports would make that one miss a finder.
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds MODULE as the other finders do, and has it loaded by a _Loader."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The loader that was found, and torch_csd.hf after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:  # get_source, get_data ...: whatever tools ask of a loader
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            importlib.import_module("torch_csd.hf")
        except Exception as error:  # transformers must work also where we do not work with it
            warnings.warn(f'torch_csd: attn_implementation="csd" could not be registered: {error}', stacklevel=2)
