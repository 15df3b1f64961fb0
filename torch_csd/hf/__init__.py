"""Everything that names transformers: the cache, the attention function, and how a model comes to use them.

Importing this module registers `attn_implementation="csd"`; `torch_csd` imports it as soon as transformers
has its models imported, or when something of it is used.
"""

from __future__ import annotations

from torch_csd.hf.attention import register
from torch_csd.hf.cache import StorageCache, fingerprint
from torch_csd.hf.checkpoint import load_checkpoint
from torch_csd.hf.guess import guess_queries
from torch_csd.hf.swap import swap_attention

__all__ = ["StorageCache", "fingerprint", "guess_queries", "load_checkpoint", "swap_attention"]

register()
