"""`torch-csd generate`: batches of prompts through a model whose KV cache lies on a drive."""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from torch_csd import KVStore, StorageCache, StoreError, fingerprint, load_checkpoint, swap_attention
from torch_csd.cli.report import UserError, count, format_bytes, one_line, say, stderr_console
from torch_csd.cli.rows import OutputRows, Prompt, read_prompts
from torch_csd.config import parse_bytes, parse_kv_dtype
from torch_csd.hf import batching
from torch_csd.sparse import Sparse, parse_sparse
from torch_csd.store import CODE_BITS

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLANNED_PROMPTS = 256  # that are looked at to choose a batch
COMMIT_INTERVAL_S = 30.0  # of a long prefill: what a kill costs at the most; a commit takes a fraction of a second
MOVED_BYTES = ("drive_read_bytes", "resident_read_bytes", "drive_written_bytes")


@dataclass(frozen=True)
class Settings:
    model: str
    kv_dir: Path | None = None
    max_new_tokens: int = 128
    batch_size: int | None = None  # None: 1, or with weights_on_drive what pays
    memory_budget: str = "1GiB"
    kv_dtype: str | None = None
    sparse: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    attn_implementation: str = "csd"
    prefill_chunk_size: int | None = None
    num_beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    durable: bool = False
    executor: str = "auto"
    gpu_budget: str = "0"
    gpu_io: str = "auto"
    weights_on_drive: bool = False
    weight_budget: str = "4GiB"
    weight_dtype: str | None = None

    def of_store(self, *, share: int = 1) -> dict[str, object]:
        """What every store of a run is opened with; share: how many are open at once."""
        return {
            "memory_budget": parse_bytes(self.memory_budget) // share,
            "executor": self.executor,
            "gpu_budget": self.gpu_budget,
            "gpu_io": self.gpu_io,
        }

    def choice(self) -> Sparse | None:
        """Raises ValueError if --sparse says nothing that is known."""
        return None if self.sparse is None else parse_sparse(self.sparse)

    @property
    def do_sample(self) -> bool:
        return self.temperature is not None or self.top_p is not None


@dataclass
class Moved:
    """What all the batches moved, and by which path."""

    byte_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOVED_BYTES, 0))
    how: str = ""
    missing_mass: float = 0.0  # of the softmax of each sparse attention, summed
    sparse_attends: int = 0
    card: str = ""  # and how bytes get there
    near_attends: int = 0
    gpu_attends: int = 0

    def add(self, stats: dict) -> None:
        for name in MOVED_BYTES:
            self.byte_counts[name] += stats[name]
        self.missing_mass += stats["missing_mass_mean"] * stats["sparse_attends"]
        self.sparse_attends += stats["sparse_attends"]
        self.how = f"{stats['io_engine']}, {'O_DIRECT' if stats['direct_io'] else 'buffered'}"
        if "gpu" in stats:
            self.card = f"{stats['gpu']} ({stats['gpu_io']})"
            self.near_attends += stats["near_attends"]
            self.gpu_attends += stats["gpu_attends"]

    def __str__(self) -> str:
        drive, resident, written = (format_bytes(self.byte_counts[name]) for name in MOVED_BYTES)
        how = f" ({self.how})" if self.how else ""
        line = f"KV: {drive} from the drive{how}, {resident} from memory, {written} written"
        if self.card:
            line += f"; attended {self.gpu_attends} times on {self.card}, {self.near_attends} times near the drive"
        if self.sparse_attends > 0:
            line += f"; left out about {self.missing_mass / self.sparse_attends:.2%} of the attention"
        return line


def run(settings: Settings, *, prompts_file: Path | None, prompt_texts: list[str], output: Path | None) -> int:
    """Does what is left to do; returns the exit code.

    Raises:
        UserError: the arguments cannot work. Nothing was generated.
    """
    if (prompts_file is None) == (not prompt_texts):
        raise UserError("wanted --prompts FILE or --prompt TEXT, one of them")
    if prompts_file is not None:
        prompts, broken = read_prompts(prompts_file)
    else:
        prompts, broken = [Prompt(number, text) for number, text in enumerate(prompt_texts, start=1)], []
    _check(settings)
    with OutputRows(output) as rows:
        todo = [prompt for prompt in prompts if not rows.is_finished(prompt)]
        if len(todo) < len(prompts):
            say(f"{len(prompts) - len(todo)} of {count(len(prompts), 'row')} in {output} already")
        # First of all, so that nobody learns of a broken line only after hours.
        for row in broken:
            rows.write({"id": row.id, "error": row.error})
            say(f"row {row.id}: {row.error}", style="red")
        failed_count = len(broken)
        if todo:
            with _quiet_libraries():
                with stderr_console().status(f"loading {settings.model}"):
                    job = Job(settings, *load(settings))
                try:
                    failed_count += job.run(todo, rows)
                except KeyboardInterrupt:
                    go_on = "; the same command goes on from there" if output else ""
                    say(f"interrupted after {count(job.done_count, 'row')}{go_on}")
                    return 130
                finally:
                    job.close()
            say(job.summary())
    if failed_count:
        where = f"; their errors are in {output}" if output else ""
        say(f"{count(failed_count, 'row')} failed{where}", style="red")
        return 1
    return 0


def _check(settings: Settings) -> None:
    """Finds out before a model is loaded what would fail only after."""
    if settings.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if settings.temperature is not None and settings.temperature <= 0:
        raise UserError(f"--temperature must be above 0, got {settings.temperature}; without it, decoding is greedy")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {settings.top_p}")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {settings.device}: {one_line(error)}") from None
    looks_like_path = settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1
    if looks_like_path and not Path(settings.model).is_dir():
        raise UserError(f"--model {settings.model}: no such directory")
    if settings.durable and settings.kv_dir is None:
        raise UserError("--durable needs --kv-dir DIR: what is kept must be found again")
    if settings.durable and ((settings.batch_size or 1) > 1 or settings.num_beams > 1):
        raise UserError("--durable keeps one prompt at a time; it goes with --batch-size 1 and --num-beams 1 only")
    if settings.weight_dtype is not None and not settings.weights_on_drive:
        raise UserError("--weight-dtype goes with --weights-on-drive")
    kept = {"durable": True, "name": _unused_name()} if settings.durable else {}
    try:
        settings.choice()
        KVStore(settings.kv_dir, kv_dtype=settings.kv_dtype, **settings.of_store(), **kept).close()
    except (StoreError, ValueError) as error:
        raise UserError(one_line(error)) from None


def _unused_name() -> str:
    """For a sequence that is never committed."""
    return f"generate-{secrets.token_hex(8)}"


def load(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # "csd" is set after loading: not every model lets it be chosen, and swap_attention knows what to do then.
    chosen = {} if settings.attn_implementation == "csd" else {"attn_implementation": settings.attn_implementation}
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        if settings.weights_on_drive:
            return load_checkpoint(
                settings.model,
                memory_budget=settings.weight_budget,
                device=settings.device,
                dtype=settings.dtype,
                attn_implementation=settings.attn_implementation,
                weight_dtype=settings.weight_dtype,
                weight_directory=settings.kv_dir,
            ), tokenizer
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype, **chosen)
        if not chosen:
            swap_attention(model)
    except (OSError, ValueError, ImportError, KeyError, StoreError, NotImplementedError) as error:
        raise UserError(f"cannot load the model {settings.model}: {one_line(error)}") from None
    return model.to(settings.device).eval(), tokenizer


class Job:
    """A loaded model and what it has done so far."""

    def __init__(self, settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = self._generation_config()
        self.moved = Moved()
        self.batch_size = settings.batch_size or 1
        self.micro_batch_count = 1
        self.done_count = 0
        self.token_count = 0
        self.prompt_token_count = 0
        self.reused_token_count = 0  # of them: those that were kept already
        self.fingerprint = fingerprint(model) if settings.durable else None
        # Open all along, so that nobody else writes between two prompts and what is kept is looked through once.
        self.keeper = self._new_keeper() if settings.durable else None
        self.start_s = time.monotonic()

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.close()

    def _generation_config(self) -> transformers.GenerationConfig:
        """The checkpoint's own, less what would contradict the command line: greedy unless told to sample."""
        config = copy.deepcopy(self.model.generation_config)
        settings = self.settings
        pad_token_id = self.tokenizer.pad_token_id
        if pad_token_id is None:
            pad_token_id = self.tokenizer.eos_token_id
        config.update(
            do_sample=settings.do_sample,
            temperature=(settings.temperature or 1.0) if settings.do_sample else None,
            top_p=(settings.top_p or 1.0) if settings.do_sample else None,
            top_k=0 if settings.do_sample else None,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            max_length=None,
            num_return_sequences=1,
            return_dict_in_generate=False,
            use_cache=True,
            prefill_chunk_size=settings.prefill_chunk_size,
            cache_implementation=None,  # the cache is ours
            pad_token_id=0 if pad_token_id is None else pad_token_id,
        )
        return config

    def run(self, prompts: list[Prompt], rows: OutputRows) -> int:
        """Generates for every prompt and writes its row; returns how many failed."""
        failed_count = 0
        if self.settings.weights_on_drive and self.keeper is None:
            self._plan(prompts)
        with _ProgressBar(len(prompts)) as progress:
            for begin in range(0, len(prompts), self.batch_size):
                batch = prompts[begin : begin + self.batch_size]
                for row in self._batch_rows(batch, progress):
                    rows.write(row)
                    if "error" in row:
                        failed_count += 1
                        say(f"row {row['id']}: {row['error']}", style="red")
                    else:
                        self.done_count += 1
                        self.token_count += row["tokens"]
                progress.finish(len(batch), self.token_count)
        return failed_count

    def _plan(self, prompts: list[Prompt]) -> None:
        """Chooses how many rows share a reading of the weights, and says so."""
        lengths = []
        for prompt in prompts[:PLANNED_PROMPTS]:
            with suppress(Exception):  # said when its turn comes
                lengths.append(len(self._encode(prompt)))
        if not lengths:
            return
        stored = parse_kv_dtype(self.settings.kv_dtype) or self.model.dtype
        bits = CODE_BITS.get(stored) or 8 * stored.itemsize
        config = self.model.config
        plan = batching.choose_batch(
            batching.measure(self.model),
            batching.Workload(
                prompt_tokens=lengths * -(-len(prompts) // len(lengths)),
                new_tokens=self.settings.max_new_tokens,
                kv_bytes_per_token=batching.kv_bytes_per_token(config, bits / 8) * self.settings.num_beams,
                kv_budget_bytes=parse_bytes(self.settings.memory_budget),
            ),
            token_bytes=batching.activation_bytes_per_token(config, self.model.dtype.itemsize),
            batch_size=self.settings.batch_size,
            prefill_chunk_size=self.settings.prefill_chunk_size,
            side_by_side=not self.settings.do_sample,
        )
        self.batch_size = plan.batch_size
        self.micro_batch_count = plan.micro_batch_count
        self.generation_config.prefill_chunk_size = plan.prefill_chunk_size
        say(str(plan))

    def _batch_rows(self, prompts: list[Prompt], progress: _ProgressBar) -> Iterator[dict]:
        try:
            encoded = [self._encode(prompt) for prompt in prompts]
            yield from self._generate(prompts, encoded, progress)
        except Exception as error:
            if len(prompts) == 1:
                yield prompts[0].as_row() | {"error": f"{type(error).__name__}: {one_line(error)}"}
                return
            # One row that does not fit, or cannot be encoded, must not cost its neighbours theirs.
            for prompt in prompts:
                yield from self._batch_rows([prompt], progress)

    def _encode(self, prompt: Prompt) -> torch.Tensor:
        """Token ids, [tokens]."""
        text = prompt.content
        if not isinstance(text, str):
            if not self.tokenizer.chat_template:
                raise ValueError('"messages" need a chat template, and this tokenizer has none; use "prompt"')
            text = self.tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
        else:
            ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError("the prompt has no tokens")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) + self.settings.max_new_tokens > limit:
            say(
                f"row {prompt.id}: {len(ids)} tokens and {self.settings.max_new_tokens} new ones are more "
                f"than the {limit} positions that the model was made for",
                style="yellow",
            )
        return torch.tensor(ids)

    def _generate(self, prompts: list[Prompt], encoded: list[torch.Tensor], progress: _ProgressBar) -> list[dict]:
        if self.keeper is not None:
            return [self._generate_kept(*prompts, *encoded, progress)]
        progress.start(sum(len(ids) for ids in encoded))
        if self.micro_batch_count == 1 or len(prompts) == 1:
            return self._generate_batch(prompts, encoded, progress)
        # Those of like lengths together: the less padding, the less of it is stored and read.
        order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
        size = -(-len(prompts) // self.micro_batch_count)
        parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
        tasks = [
            partial(
                self._generate_batch,
                [prompts[row] for row in part],
                [encoded[row] for row in part],
                progress,
                share=len(parts),
            )
            for part in parts
        ]
        rows: list[dict] = [{}] * len(prompts)
        for part, result in zip(parts, self.model.weight_stream.lockstep(tasks), strict=True):
            if isinstance(result, BaseException):
                raise result
            for row, finished in zip(part, result, strict=True):
                rows[row] = finished
        return rows

    def _generate_batch(
        self, prompts: list[Prompt], encoded: list[torch.Tensor], progress: _ProgressBar, *, share: int = 1
    ) -> list[dict]:
        """share: of how many that run side by side."""
        pad_token_id = self.generation_config.pad_token_id
        input_ids = pad_sequence(encoded, batch_first=True, padding_value=pad_token_id, padding_side="left")
        attention_mask = pad_sequence([torch.ones_like(ids) for ids in encoded], batch_first=True, padding_side="left")
        self._seed(prompts[0])
        with StorageCache(
            self.model.config,
            self.settings.kv_dir,
            kv_dtype=self.settings.kv_dtype,
            **self.settings.of_store(share=share),
            sparse=self.settings.choice(),
        ) as cache:
            try:
                sequences = self.model.generate(
                    input_ids.to(self.settings.device),
                    attention_mask=attention_mask.to(self.settings.device),
                    past_key_values=cache,
                    generation_config=self.generation_config,
                    stopping_criteria=[progress.ticker(len(prompts))],
                )
            finally:
                self.moved.add(cache.stats())
        return [
            self._finished_row(prompt, len(ids), new_ids)
            for prompt, ids, new_ids in zip(prompts, encoded, sequences[:, input_ids.shape[1] :].tolist(), strict=True)
        ]

    def _seed(self, prompt: Prompt) -> None:
        if self.settings.do_sample:
            # By row, so that going on after an interruption does not replay the draws of the rows before it.
            torch.manual_seed(self.settings.seed + zlib.crc32(str(prompt.id).encode()))

    # ---- with --durable ---------------------------------------------------------------------------------------------

    def _generate_kept(self, prompt: Prompt, ids: torch.Tensor, progress: _ProgressBar) -> dict:
        with self._open_kept(ids) as cache:
            reused = cache.get_seq_length()
            self.prompt_token_count += len(ids)
            self.reused_token_count += reused
            progress.start(len(ids) - reused)
            try:
                self._prefill_and_keep(cache, ids)
                self._seed(prompt)
                tokens = self._extend(cache, ids, self.generation_config, stopping_criteria=[progress.ticker(1)])
            finally:
                self.moved = Moved()  # the drive counts from when the keeper opened it
                self.moved.add(cache.stats())
        return self._finished_row(prompt, len(ids), tokens[len(ids) :])

    def _new_keeper(self) -> StorageCache:
        try:
            return self._new_cache(_unused_name())
        except (StoreError, NotImplementedError) as error:
            raise UserError(f"--durable: {one_line(error)}") from None

    def _open_kept(self, ids: torch.Tensor) -> StorageCache:
        """A cache that holds as much of a prompt as was ever kept, all but its last token at the most."""
        name = self._kept_name(ids)
        if all(match.name != name for match in self.keeper.store.prefix_matches(ids[:-1])):
            cache = self._new_cache(name)  # an error if other tokens have this name
        else:
            cache = StorageCache.open(
                self.settings.kv_dir,
                name,
                config=self.model.config,
                fingerprint=self.fingerprint,
                device=self.model.device,
                **self.settings.of_store(),
                sparse=self.settings.choice(),
            )
        try:
            held = cache.get_seq_length()
            if held > 0 and (held >= len(ids) or cache.store.token_ids != [ids[:held].tolist()]):
                raise StoreError(f"sequence {name!r} holds other tokens than its name says; remove it (torch-csd rm)")
            match = cache.match_prefix(ids)
            if match is not None and match.length > held:
                if held > 0:
                    cache.reset()
                cache.use_prefix(match, device=self.model.device)
        except BaseException:
            cache.close()
            raise
        return cache

    def _new_cache(self, name: str) -> StorageCache:
        return StorageCache(
            self.model.config,
            self.settings.kv_dir,
            kv_dtype=self.settings.kv_dtype,
            **self.settings.of_store(),
            durable=True,
            name=name,
            fingerprint=self.fingerprint,
            sparse=self.settings.choice(),
        )

    def _kept_name(self, ids: torch.Tensor) -> str:
        """Says what the sequence holds: so many tokens, of this model and kv_dtype."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(json.dumps([self.keeper.store.metadata, ids[:-1].tolist()], sort_keys=True).encode())
        return f"prompt-{digest.hexdigest()}"

    def _prefill_and_keep(self, cache: StorageCache, ids: torch.Tensor) -> None:
        """All but the last token, whose output is the first new one: so what is kept serves the same prompt again.

        The answer is not kept: a row's quantised tail, and what a sliding window has left behind, do not come back
        when a cache is cropped.
        """
        held, end = cache.get_seq_length(), len(ids) - 1
        if held == end:  # somewhere; there is nothing to add
            return
        config = copy.deepcopy(self.generation_config)
        config.update(max_new_tokens=1, min_new_tokens=None, min_length=0, do_sample=False, prefill_chunk_size=None)
        config.update(temperature=None, top_p=None, top_k=None)
        step = self.settings.prefill_chunk_size or end
        committed_s = time.monotonic()
        for stop in [*range(held + step, end, step), end]:
            self._extend(cache, ids[:stop], config)
            if stop == end or time.monotonic() - committed_s >= COMMIT_INTERVAL_S:
                cache.commit(ids[:stop])
                committed_s = time.monotonic()

    def _extend(
        self, cache: StorageCache, ids: torch.Tensor, config: transformers.GenerationConfig, **options: object
    ) -> list[int]:
        """Runs the model over what of ``ids`` the cache does not hold, and on; returns them and the new ones."""
        input_ids = ids[None].to(self.settings.device)
        return self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            generation_config=config,
            **options,
        )[0].tolist()

    # ---- results ----------------------------------------------------------------------------------------------------

    def _finished_row(self, prompt: Prompt, prompt_tokens: int, new_ids: list[int]) -> dict:
        eos_ids = self.generation_config.eos_token_id
        eos_ids = set(eos_ids) if isinstance(eos_ids, list) else {eos_ids}
        # Whatever follows the end of a sequence is padding, up to the longest of the batch.
        stop = next((index for index, token in enumerate(new_ids) if token in eos_ids), None)
        if stop is not None:
            new_ids = new_ids[: stop + 1]
        return prompt.as_row() | {
            "text": self.tokenizer.decode(new_ids, skip_special_tokens=True),
            "tokens": len(new_ids),
            "prompt_tokens": prompt_tokens,
            "finish_reason": "length" if stop is None else "stop",
        }

    def summary(self) -> str:
        elapsed_s = time.monotonic() - self.start_s
        done = f"{count(self.done_count, 'row')}, {count(self.token_count, 'token')} in {elapsed_s:.1f} s"
        if self.keeper is not None:
            done += f", {self.reused_token_count} of {count(self.prompt_token_count, 'prompt token')} reused"
        text = f"{done} ({self.token_count / elapsed_s:.1f} tok/s); {self.moved}"
        if self.settings.weights_on_drive:
            stats = self.model.weight_stream.stats()
            text += (
                f"; weights: {format_bytes(stats['bytes_read'])} from the drive ({stats['io_engine']}), "
                f"{format_bytes(stats['resident_bytes'])} stay in memory"
            )
        return text


class _ProgressBar:
    """Rows done and tokens per second: a live bar on a terminal, else one line for each batch."""

    def __init__(self, row_count: int) -> None:
        self._row_count = row_count
        self._rows_done = 0
        self._tokens_before = 0  # of finished batches
        self._batch_tokens = 0
        self._start_s = time.monotonic()
        console = stderr_console()
        self._is_live = console.is_terminal
        self._bar = Progress(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._task = self._bar.add_task("rows", total=row_count, state="")

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, prompt_tokens: int) -> None:
        """A batch begins, with so many tokens to read in all."""
        self._batch_tokens = 0
        self._bar.update(self._task, state=f"reading {prompt_tokens} tokens")

    def ticker(self, row_count: int) -> Callable[..., torch.Tensor]:
        """A stopping criterion that stops nothing: generate() calls it after every token of so many rows."""

        def tick(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
            self._batch_tokens += row_count
            self._show(self._tokens_before + self._batch_tokens)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return tick

    def finish(self, row_count: int, token_count: int) -> None:
        """A batch is done: so many rows, and so many tokens with all before it."""
        self._rows_done += row_count
        self._tokens_before = token_count
        self._show(token_count)
        self._bar.update(self._task, completed=self._rows_done)
        if not self._is_live:
            say(f"{self._rows_done}/{self._row_count} rows, {token_count} tokens, {self._elapsed_s():.1f} s")

    def _show(self, token_count: int) -> None:
        self._bar.update(self._task, state=f"{token_count} tokens, {token_count / self._elapsed_s():.1f} tok/s")

    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._start_s, 1e-6)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Warnings are shown as one line each; transformers says only what is an error."""

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, UserWarning):
            say(f"warning: {message}", style="yellow")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
