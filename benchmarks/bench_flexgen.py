"""Decoding beside the real FlexGen, both with the whole KV cache on the drive and nothing of it in memory.

    pip install --target flexgen-site --no-deps flexgen==0.1.8 attrs
    PYTHONPATH=flexgen-site python benchmarks/bench_flexgen.py --directory /nvme/kv

One shape for both: OPT with hidden 2048, 8 layers, 16 heads, ffn 8192, float16, batch 4. FlexGen (dummy weights, cache
100 % on disk, its own overlap of reading and computing) runs on the CPU: its modules are given a torch whose CUDA calls
do nothing, and its "GPU" is a device on the CPU; its code is as installed. Ours is transformers' OPT with a
StorageCache, resident=False, dense (float16, as FlexGen's) and int4.

Nothing is prefilled by a model: both caches are filled with random keys and values. Before each of FlexGen's tokens its
files are dropped from the page cache (written back, then posix_fadvise DONTNEED); ours are read with O_DIRECT. They
take turns of a few tokens each, the first of which is not counted (after a pause a virtual machine may take half as
long again for the same arithmetic), and the drive's own rate is measured around ours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

from torch_csd import StorageCache, StoreError, swap_attention
from torch_csd.bench.decode import drive_note, over_drive_time, times_faster
from torch_csd.bench.peers import drop_from_page_cache, page_cache_share
from torch_csd.bench.report import Report, Row, beside
from torch_csd.bench.roofs import DriveRoof, drive_roof_name
from torch_csd.bench.settings import CODES, Settings, dtype_name, parse_counts, tokens_text
from torch_csd.bench.timing import Sample, counted, median, times

HIDDEN, LAYERS, HEADS, FFN, VOCAB, BATCH = 2048, 8, 16, 8192, 1024, 4
TOKEN_BYTES = LAYERS * 2 * BATCH * HIDDEN * 2
WARM_UP = 1  # tokens of a turn that are not counted
COUNTED = 4  # those that are
PIECE = 512  # tokens put into our cache at once
BARS = {"dense": {2048: 1.4, 8192: 1.4}, "int4": {2048: 3.5, 8192: 4.5}}
HOW_TO_GET_IT = "flexgen is not installed: pip install --target DIR --no-deps flexgen==0.1.8 attrs; PYTHONPATH=DIR"


class CpuTorch(types.ModuleType):
    """torch as FlexGen sees it here: streams and synchronisation do nothing, and no memory is pinned."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(
            Stream=lambda *args, **kwargs: None,
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda *args: None,
            set_device=lambda device: None,
        )

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        return torch.empty(*args, **kwargs)


@contextlib.contextmanager
def flexgen_on_cpu() -> Iterator[types.ModuleType]:
    """flexgen.flex_opt with its CUDA calls replaced for as long as this lasts."""
    import flexgen.flex_opt as flex_opt
    import flexgen.pytorch_backend as backend

    tensor_cuda = torch.Tensor.cuda
    cpu_torch = CpuTorch()
    try:
        flex_opt.torch = backend.torch = cpu_torch
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
        yield flex_opt
    finally:
        flex_opt.torch = backend.torch = torch
        torch.Tensor.cuda = tensor_cuda


def run_flexgen(
    directory: str,
    prompt: int,
    token_count: int,
    before_token: Callable[[int, Callable[[], None]], None],
    *,
    cpu_cache_compute: bool,
) -> None:
    """Generates token_count tokens; before_token(i, let_go) is called before each, from 0 to
    token_count + 1."""
    import numpy as np

    with flexgen_on_cpu() as flex_opt:
        import flexgen.pytorch_backend as backend

        class CpuAsGpu(backend.TorchDevice):
            """Where FlexGen computes. A prompt is not computed: random keys and values take its place."""

            def mha(self, inputs, attention_mask, *rest):
                tokens = inputs.shape[1]
                shape = (tokens, BATCH * HEADS, HIDDEN // HEADS)
                if self.states is None:
                    self.states = [torch.randn(shape).half() for _ in range(2)]
                states = (backend.TorchTensor.create_from_torch(tensor, self) for tensor in self.states)
                return inputs, *states

            def mlp(self, inputs, *rest):
                return inputs if inputs.shape[1] > 1 else super().mlp(inputs, *rest)

            states = None

        gpu, cpu, disk = CpuAsGpu("cpu"), backend.TorchDevice("cpu"), backend.TorchDisk(directory)
        env = flex_opt.ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=backend.TorchMixedDevice([gpu, cpu, disk]))
        codes = flex_opt.CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False)  # not used
        policy = flex_opt.Policy(
            gpu_batch_size=BATCH, num_gpu_batches=1, w_gpu_percent=100, w_cpu_percent=0, cache_gpu_percent=0,
            cache_cpu_percent=0, act_gpu_percent=100, act_cpu_percent=0, overlap=True, sep_layer=True,
            pin_weight=False, cpu_cache_compute=cpu_cache_compute, attn_sparsity=1.0, compress_weight=False,
            comp_weight_config=codes, compress_cache=False, comp_cache_config=codes,
        )  # fmt: skip
        config = flex_opt.OptConfig(
            name="bench", num_hidden_layers=LAYERS, max_seq_len=prompt + token_count + 4, hidden_size=HIDDEN,
            n_head=HEADS, input_dim=HIDDEN, ffn_embed_dim=FFN, vocab_size=VOCAB,
        )  # fmt: skip
        try:
            model = flex_opt.OptLM(config, env, flex_opt.DUMMY_WEIGHT, policy)
            inner = model.update_attention_mask

            def update_attention_mask(i: int, k: int) -> None:
                before_token(i, functools.partial(let_go, backend, disk, cpu))
                inner(i, k)

            model.update_attention_mask = update_attention_mask  # the first thing done for each token
            inputs = np.full((BATCH, prompt), 5)
            # Token 0 is the prompt's, and one runs after those that count, so that the last of them has an end. One
            # more is asked for than is run: the last of all stores nothing.
            model.generate(inputs, max_new_tokens=token_count + 3, cut_gen_len=token_count + 2)
        finally:
            env.close_copy_threads()


def let_go(backend: types.ModuleType, disk: object, cpu: object) -> None:
    """Gives each idle copy thread a tensor of no size to copy: until then it keeps its last file mapped, and what is
    mapped cannot be dropped from the page cache."""
    everyone = threading.Barrier(len(disk.copy_threads))

    class Nothing(backend.TorchTensor):
        @property
        def data(self) -> torch.Tensor:
            everyone.wait()  # so that no thread takes two
            return torch.empty(0)

        @data.setter
        def data(self, value: object) -> None:
            pass

    nowhere = backend.TorchTensor.create_from_torch(torch.empty(0), cpu)
    for _ in disk.copy_threads:
        disk.submit_copy(nowhere, None, Nothing((0,), torch.float32, None, cpu), None)
    disk.synchronize()


class FlexGenClock:
    """Times FlexGen's tokens, a sample for each turn. Before each its files are made cold; others have their turns
    between."""

    def __init__(self, directory: str, token_count: int, between: Callable[[], dict[str, float]]) -> None:
        self.directory = directory
        self.token_count = token_count
        self.between = between
        self.samples: list[Sample] = []
        self.start_s = 0.0
        self.turn_s: list[float] = []  # of its counted tokens
        self.roofs: dict[str, float] = {}

    def before_token(self, i: int, let_go: Callable[[], None]) -> None:
        end_s = time.perf_counter()
        ended, place = divmod(i - 1, WARM_UP + COUNTED)  # token 0 is the prompt's
        if 1 < i <= self.token_count + 1 and (place == 0 or place > WARM_UP):  # a counted one has just ended
            self.turn_s.append(end_s - self.start_s)
        if ended > len(self.samples):
            seconds_a_token = sum(self.turn_s) / len(self.turn_s)
            self.samples.append(Sample(seconds_a_token, self.cache_bytes(), roofs=self.roofs))
            self.turn_s = []
        if 0 < i <= self.token_count:
            if place == 0:
                self.roofs = self.between()
            let_go()
            for path in self.paths():
                drop_from_page_cache(path)
            share = max(map(page_cache_share, self.paths()))
            if share > 0.01:
                raise OSError(f"{share:.0%} of a file of FlexGen's stays in the page cache, so it would not be cold")
        self.start_s = time.perf_counter()

    def paths(self) -> list[str]:
        return [os.path.join(self.directory, name) for name in os.listdir(self.directory)]

    def cache_bytes(self) -> int:
        return sum(map(os.path.getsize, self.paths()))


def make_opt(positions: int) -> torch.nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        ffn_dim=FFN, vocab_size=VOCAB, max_position_embeddings=positions,
    )  # fmt: skip
    torch.manual_seed(0)
    return swap_attention(OPTForCausalLM(config).half().eval())


def open_cache(settings: Settings, model: torch.nn.Module, kv_dtype: torch.dtype | None, prompt: int) -> StorageCache:
    options = settings.drive_options(settings.memory_budget, resident=False)
    cache = StorageCache(model.config, settings.directory, kv_dtype=kv_dtype, **options)
    k, v = (torch.randn(BATCH, HEADS, PIECE, HIDDEN // HEADS).half() for _ in range(2))
    for begin in range(0, prompt, PIECE):
        count = min(PIECE, prompt - begin)
        for layer in range(LAYERS):
            cache.update(k[:, :, :count], v[:, :, :count], layer)
    cache.store.flush()
    return cache


def rows(settings: Settings, report: Report, prompt: int, *, cpu_cache_compute: bool) -> None:
    what = f"OPT batch {BATCH}, prompt {tokens_text(prompt)}, cold"
    settings.require(drive_bytes=4 * prompt * TOKEN_BYTES, memory_bytes=prompt * TOKEN_BYTES + 2**31)
    token = torch.full((BATCH, 1), 5)
    ours: dict[torch.dtype, list[Sample]] = {}
    with ExitStack() as stack:
        roof = stack.enter_context(DriveRoof(settings.directory, min(prompt * TOKEN_BYTES, 2**30)))
        model = make_opt(prompt + (settings.rounds + 1) * (WARM_UP + COUNTED))
        samplers = {}
        for dtype in settings.stored:
            try:
                cache = stack.enter_context(open_cache(settings, model, dtype, prompt))
                step = functools.partial(model, token, past_key_values=cache)
                step()
            except (StoreError, NotImplementedError, RuntimeError) as error:
                report.skip(f"{what}: ours, {dtype_name(dtype)}", error)
                continue
            samplers[dtype] = (step, counted(step, cache.stats, COUNTED))
            ours[dtype] = []

        def between() -> dict[str, float]:
            """Ours, each between two measurements of the drive."""
            before = roof()
            for dtype, (step, sampler) in samplers.items():
                for _ in range(WARM_UP):
                    step()
                sample = sampler()
                after = roof()
                sample.roofs = {name: (before[name] + after[name]) / 2 for name in after}
                ours[dtype].append(sample)
                before = after
            return before

        offload = tempfile.mkdtemp(prefix=".torch_csd-flexgen-", dir=settings.directory)
        stack.callback(shutil.rmtree, offload, ignore_errors=True)
        token_count = settings.rounds * (WARM_UP + COUNTED)
        clock = FlexGenClock(offload, token_count, between)
        with contextlib.redirect_stdout(sys.stderr):
            run_flexgen(offload, prompt, token_count, clock.before_token, cpu_cache_compute=cpu_cache_compute)
    theirs = clock.samples
    report.add(
        Row(
            f"  peer: FlexGen 0.1.8, {what}",
            1e3 * median(times(theirs)),
            "ms/tok",
            [beside(drive_roof_name(theirs[0].roofs), [s.drive_gbs for s in theirs],
                    [s.roofs[drive_roof_name(s.roofs)] for s in theirs], "GB/s")],
            f"its files dropped from the page cache before each token; cpu_cache_compute={cpu_cache_compute}",
        )
    )  # fmt: skip
    for dtype, mine in ours.items():
        kind = "dense" if dtype not in CODES else dtype_name(dtype)
        bars = BARS.get(kind, {}) if cpu_cache_compute else {}  # without it FlexGen is not at its best
        others = [times_faster("FlexGen", mine, theirs, bars.get(prompt)), *over_drive_time(mine)]
        report.add(Row(f"{what}: {dtype_name(dtype)}", 1e3 * median(times(mine)), "ms/tok", others, drive_note(mine)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=None, help="where both caches lie (default: the temporary directory)")
    parser.add_argument("--prompts", default=None, help="tokens in the cache, with commas (default 2k,8k; quick: 512)")
    parser.add_argument("--memory-budget", default="256MiB", help="of our cache (default 256MiB)")
    parser.add_argument("--io-engine", default="auto", choices=["auto", "io_uring", "pread"])
    parser.add_argument("--threads", type=int, default=None, help="of ours and of torch, so of FlexGen's too")
    parser.add_argument("--rounds", type=int, default=None, help="turns of each, for medians (default 5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="a short prompt, few rounds: does it run")
    parser.add_argument(
        "--cpu-cache-compute",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="FlexGen's option of that name (default: on, which is over twice as fast here)",
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="write the rows as JSON; - is standard output")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are removed
    try:
        settings = Settings.make(
            arguments.directory,
            memory_budget=arguments.memory_budget,
            threads=arguments.threads,
            io_engine=arguments.io_engine,
            rounds=arguments.rounds or (2 if arguments.quick else 5),
            quick=arguments.quick,
            kv_dtypes="float16,int4",
        )
        prompts = parse_counts(arguments.prompts or ("512" if arguments.quick else "2k,8k"))
    except (ValueError, StoreError) as error:
        parser.error(str(error))
    title = f"decode of one token by an OPT (hidden {HIDDEN}, {LAYERS} layers, {HEADS} heads, batch {BATCH}), float16"
    report = Report("flexgen", title, settings, json_to=arguments.json)
    if importlib.util.find_spec("flexgen") is None:
        report.skip("FlexGen", HOW_TO_GET_IT)
    else:
        with torch.no_grad():  # FlexGen copies in threads that know of no inference_mode
            for prompt in prompts:
                rows(settings, report, prompt, cpu_cache_compute=arguments.cpu_cache_compute)
    report.finish()


if __name__ == "__main__":
    main()
