"""A process of its own that runs one model, held to so much memory, a call at a time: what `bench weights` measures.

The parent's side is `Held`; `python -m torch_csd.bench.held` is the other. They speak in lines of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

SHORT = 32  # tokens of context, where weights are all that counts
PIECE = 4096  # tokens put into a cache at once
QUIET_S = 0.1  # without a byte: nothing is being read ahead any more


class HeldError(RuntimeError):
    """What went wrong in the process."""


class Held:
    """Calls functions of this file in a process of its own, which ends with this."""

    def __init__(self, *, threads: int, limit_bytes: int | None = None, sleeping: bool = False) -> None:
        """limit_bytes: of its private memory (RLIMIT_DATA), or None. Files that are mapped are not part of it.
        sleeping: OpenMP's idle threads sleep, unless OMP_WAIT_POLICY says otherwise; load_checkpoint sees to it itself.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(threads), str(limit_bytes or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=({"OMP_WAIT_POLICY": "passive"} if sleeping else {}) | os.environ,
        )

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, name: str, **arguments: object) -> Any:
        """What the function returns.

        Raises:
            HeldError: it raised, or the process ended.
        """
        try:
            self._process.stdin.write(json.dumps([name, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise HeldError(f"the process that ran {name} ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise HeldError(answer["error"])
        return answer["value"]


# ---- the other side --------------------------------------------------------------------------------------------------


def serve() -> None:
    threads, limit_bytes = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    runner = Runner()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            with torch.no_grad():
                answer = {"value": getattr(runner, name)(**arguments)}
        except Exception as error:
            first = next((each for each in str(error).splitlines() if each.strip()), "")
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Runner:
    """What can be called. Counts and times are of the calls, not of what comes between them."""

    def __init__(self) -> None:
        self.model = None
        self.caches: dict[int, object] = {}  # by batch
        self.kv = None  # the StorageCache, where there is one
        self.dropped: list[str] = []  # files that each step finds outside of the page cache

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load_cost(self, checkpoint: str, tiny: str, rounds: int) -> dict:
        """Seconds of load_checkpoint and of what any load takes, in turn, and bytes of memory that the first takes."""
        import torch_csd

        torch_csd.load_checkpoint(tiny)
        gc.collect()
        load_s, metadata_s = [], []
        extra_bytes = None
        for _ in range(rounds):
            metadata_s.append(_seconds(lambda: _metadata(checkpoint)))
            gc.collect()
            before_bytes = restart_peak()
            start_s = time.perf_counter()
            model = torch_csd.load_checkpoint(checkpoint)
            load_s.append(time.perf_counter() - start_s)
            if before_bytes is not None and extra_bytes is None:
                extra_bytes = memory()["VmHWM"] - before_bytes
            model.weight_stream.close()
            del model
        return {"load_s": load_s, "metadata_s": metadata_s, "extra_bytes": extra_bytes}

    def open_ours(self, checkpoint: str, memory_budget: int, io_engine: str, **quantised: str) -> None:
        """quantised: weight_dtype and weight_directory, or nothing."""
        import torch_csd

        self.model = torch_csd.load_checkpoint(
            checkpoint, memory_budget=memory_budget, io_engine=io_engine, **quantised
        )

    def open_accelerate(self, checkpoint: str, memory_budget: int, offload_directory: str) -> dict:
        """Whole layers in memory, up to the budget; the rest on the drive. Returns their bytes."""
        from transformers import AutoModelForCausalLM

        from torch_csd.weights.files import byte_count, read_header

        self.dropped = _weight_files(checkpoint)
        sizes: dict[str, int] = {}
        for path in self.dropped:
            for entry in read_header(path).entries.values():
                parts = entry.name.split(".")
                module = ".".join(parts[:3] if parts[1] == "layers" else parts[: len(parts) - 1])
                sizes[module] = sizes.get(module, 0) + byte_count(entry)
        places = {"model.rotary_emb": "cpu"}
        held_bytes = 0
        for module, size in sorted(sizes.items(), key=lambda item: ("layers" not in item[0], item[0])):
            fits = "norm" in module or (".layers." in module and held_bytes + size <= memory_budget)
            places[module] = "cpu" if fits else "disk"
            held_bytes += size if fits else 0
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", device_map=places, offload_folder=offload_directory
        ).eval()
        return {"held_bytes": held_bytes, "all_bytes": sum(sizes.values())}

    def open_in_memory(self, checkpoint: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()

    # ---- running -----------------------------------------------------------------------------------------------------

    def put_kv(self, directory: str, options: dict, tokens: int) -> None:
        """In place of what was there: a cache on the drive, with random K and V."""
        import torch_csd

        if self.kv is not None:
            self.kv.close()
        self.kv = self.caches[1] = torch_csd.StorageCache(self.model.config, directory, **options)
        fill(self.kv, self.model.config, 1, tokens)
        self.kv.store.flush()

    def kv_token_bytes(self) -> int:
        """That a cache keeps for one token of all layers."""
        config = self.model.config
        elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return elements * config.dtype.itemsize

    def steps(self, batch: int = 1, count: int = 1) -> dict:
        """Seconds and bytes of one of count steps in a row; waits for what is read ahead afterwards."""
        import torch

        token = torch.full((batch, 1), 7)
        cache = self._cache(batch)
        if self.dropped:
            self._drop()
        before = self._counts()
        start_s = time.perf_counter()
        for _ in range(count):
            self.model(token, past_key_values=cache)
        elapsed_s = time.perf_counter() - start_s
        after = self._counts()
        if self.kv is None:
            cache.crop(-count)
        self.settle()
        return {"seconds": elapsed_s / count} | {name: (after[name] - before[name]) / count for name in after}

    def logits(self) -> list[float]:
        """Of the token after the context, float32 [vocab]."""
        import torch

        cache = self._cache(1)
        found = self.model(torch.full((1, 1), 7), past_key_values=cache).logits[0, 0].float().tolist()
        cache.crop(-1)
        return found

    def prefill(self, tokens: int) -> dict:
        import torch
        from transformers import DynamicCache

        prompt = torch.arange(tokens)[None] % self.model.config.vocab_size
        before = self._counts()
        cache = DynamicCache(config=self.model.config)
        elapsed_s = _seconds(lambda: self.model(prompt, past_key_values=cache, logits_to_keep=1))
        after = self._counts()
        self.settle()
        return {"seconds": elapsed_s} | {name: after[name] - before[name] for name in after}

    def settle(self) -> None:
        """Returns when nothing is read any more."""
        before = None
        while before != (before := self._counts()["read_bytes"]):
            time.sleep(QUIET_S)

    def memory(self) -> dict:
        return memory() | {"resident_bytes": self._stats().get("resident_bytes", 0)}

    def _cache(self, batch: int):
        from transformers import DynamicCache

        if batch not in self.caches:
            self.caches[batch] = DynamicCache(config=self.model.config)
            fill(self.caches[batch], self.model.config, batch, SHORT)
        return self.caches[batch]

    def _stats(self) -> dict:
        stream = getattr(self.model, "weight_stream", None)
        return {} if stream is None else stream.stats()

    def _counts(self) -> dict[str, float]:
        stream = self._stats()
        kv = self.kv.stats() if self.kv is not None else {}
        weight_bytes, kv_bytes = stream.get("bytes_read", 0), kv.get("drive_read_bytes", 0)
        return {
            "weight_bytes": weight_bytes,
            "kv_bytes": kv_bytes,
            "read_bytes": weight_bytes + kv_bytes if stream else _read_bytes(),
            "used_bytes": stream.get("used_bytes", 0),
            "busy_s": stream.get("busy_s", 0.0),
            "wait_s": stream.get("wait_s", 0.0),
            "cpu_s": time.process_time(),
        }

    def _drop(self) -> None:
        from torch_csd.bench.peers import drop_from_page_cache

        for path in self.dropped:
            drop_from_page_cache(path)


def fill(cache, config, batch: int, tokens: int) -> None:
    """Puts random keys and values into every layer, in place of a prefill by the model."""
    for layer, k, v in _random_states(config, batch, tokens):
        cache.update(k, v, layer)


def _random_states(config, batch: int, tokens: int) -> Iterable[tuple]:
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.num_key_value_heads, min(tokens, PIECE), config.head_dim)
    k, v = (torch.randn(shape, generator=generator).to(config.dtype) for _ in range(2))
    for begin in range(0, tokens, PIECE):
        count = min(PIECE, tokens - begin)
        for layer in range(config.num_hidden_layers):
            yield layer, k[:, :, :count], v[:, :, :count]


def _metadata(checkpoint: str) -> None:
    """What no load can do without: the configuration, the headers, the modules without their weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from torch_csd.weights.files import read_header

    config = AutoConfig.from_pretrained(checkpoint)
    for path in _weight_files(checkpoint):
        read_header(path)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def _weight_files(checkpoint: str) -> list[str]:
    return sorted(entry.path for entry in os.scandir(checkpoint) if entry.name.endswith(".safetensors"))


def _seconds(run) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def memory() -> dict[str, int]:
    """Bytes of this process: VmHWM (the most that was resident), VmRSS and the like."""
    found = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, text = line.partition(":")
            if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile"):
                found[name] = int(text.split()[0]) * 1024
    return found


def restart_peak() -> int | None:
    """Lets VmHWM begin anew, and returns what is resident; None where the system does not allow it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return memory()["VmRSS"]


def _read_bytes() -> int:
    """From the drive, through the page cache or past it, by this process."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


if __name__ == "__main__":
    serve()
