"""What others do with the same bytes: files read by mmap, safetensors or DeepSpeed, and transformers' caches."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class PeerUnavailable(Exception):
    """Why a peer cannot be measured here."""


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention with the query group folded into q_len: for one query several times faster than enable_gqa."""
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    return F.scaled_dot_product_attention(q.view(batch, kv_heads, heads // kv_heads, head_dim), k, v)


def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class FilePeer:
    """K and V in ordinary files; `attend` reads them and calls torch's SDPA. Removes its files."""

    name = ""

    def __init__(self, directory: str, k: Tensor, v: Tensor) -> None:
        self.shape, self.dtype = k.shape, k.dtype
        self.paths = [os.path.join(directory, f".torch_csd-peer-{os.getpid()}-{type(self).__name__}-{i}") for i in "kv"]
        try:
            self.write(k, v)
            self.drop()
        except BaseException:
            self.close()
            raise

    def write(self, k: Tensor, v: Tensor) -> None:
        for path, tensor in zip(self.paths, (k, v), strict=True):
            tensor.view(torch.uint8).numpy().tofile(path)

    def drop(self) -> None:
        """Drops these files, and no others, from the page cache; raises PeerUnavailable if they stay in it."""
        for path in self.paths:
            if os.path.exists(path):
                drop_from_page_cache(path)
                share = page_cache_share(path)
                if share > 0.01:
                    raise PeerUnavailable(f"{share:.0%} of its file stays in the page cache, so it would not be cold")

    def attend(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        for path in self.paths:
            if os.path.exists(path):
                os.unlink(path)


class MmapPeer(FilePeer):
    name = "torch.from_file (mmap) + SDPA"

    def attend(self, q: Tensor) -> Tensor:
        count = self.shape.numel()
        k, v = (
            torch.from_file(path, shared=True, size=count, dtype=self.dtype).view(self.shape) for path in self.paths
        )
        return sdpa_folded(q, k, v)


class SafetensorsPeer(FilePeer):
    name = "safetensors + SDPA"

    def write(self, k: Tensor, v: Tensor) -> None:
        from safetensors.torch import save_file

        save_file({"k": k, "v": v}, self.paths[0])

    def attend(self, q: Tensor) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.paths[0], framework="pt") as file:
            return sdpa_folded(q, file.get_tensor("k"), file.get_tensor("v"))


class DeepSpeedPeer(FilePeer):
    """DeepSpeed's async_io reads into buffers that are there already, with O_DIRECT."""

    name = "DeepSpeed async I/O + SDPA"

    def __init__(self, directory: str, k: Tensor, v: Tensor) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise PeerUnavailable("deepspeed is not installed (pip install deepspeed; it builds with libaio-dev)")
        try:
            from deepspeed.ops.op_builder import AsyncIOBuilder

            # Blocks of 1 MiB, 32 deep, on 4 threads: what its own tuning guide arrives at for one NVMe drive.
            self._handle = AsyncIOBuilder().load().aio_handle(2**20, 32, False, True, 4)
        except Exception as error:
            raise PeerUnavailable(f"deepspeed's async_io cannot be built: {str(error).splitlines()[0]}") from None
        self._buffers = [torch.empty_like(k), torch.empty_like(v)]
        super().__init__(directory, k, v)

    def attend(self, q: Tensor) -> Tensor:
        for path, buffer in zip(self.paths, self._buffers, strict=True):
            self._handle.sync_pread(buffer.view(-1).view(torch.uint8), path)
        return sdpa_folded(q, *self._buffers)


FILE_PEERS: tuple[type[FilePeer], ...] = (MmapPeer, SafetensorsPeer, DeepSpeedPeer)


def quantized_caches() -> dict[str, Callable | str]:
    """transformers' QuantizedCache by backend: a maker taking a config, or the reason why it cannot be had."""
    from transformers import QuantizedCache

    caches: dict[str, Callable | str] = {}
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        name = f"QuantizedCache {backend} int4"
        if _can_import(package):
            axis = {"axis_key": 0, "axis_value": 0} if backend == "quanto" else {"axis_key": 1, "axis_value": 1}
            caches[name] = lambda config, backend=backend, axis=axis: QuantizedCache(backend, config, nbits=4, **axis)
        else:
            caches[name] = f"{package} is not installed (pip install {package.replace('.', '-')})"
    return caches


def _can_import(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def drop_from_page_cache(path: str) -> None:
    """As far as the system agrees to: what is dirty is written first; what is mapped stays."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def page_cache_share(path: str) -> float:
    """Share of a file's pages that are in the page cache, by mincore."""
    byte_count = os.path.getsize(path)
    if byte_count == 0:
        return 0.0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, byte_count, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    finally:
        os.close(file)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    page_count = -(-byte_count // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * page_count)()
    try:
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(byte_count), resident) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(byte_count))
    return sum(byte & 1 for byte in bytes(resident)) / page_count
