from __future__ import annotations

import importlib.util
import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from torch_csd import KVStore, StorageCache, StoreError
from torch_csd.bench import dense, plots
from torch_csd.bench.accuracy import FAMILIES, Method, Tally, feed, parse_methods
from torch_csd.sparse import PageTopK, SparF

FIGURES = (
    "task context_tokens kv_dtype in_memory method family settings questions positions recall kl perplexity "
    "drive_bytes_per_token memory_bytes_per_token share_of_exact_bytes missing_mass tokens_per_s"
).split()


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> PreTrainedTokenizerBase:
    """One token per byte."""
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    """Two layers of 4 query heads and 2 kv heads, random; scores large enough that heads look at few tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 12
    return model


@pytest.fixture(scope="module")
def tiny(model, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    transformers.logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def accuracy(csd, tiny, tmp_path):
    """accuracy(tasks file, option, ...) -> the command's result, quick, on the tiny model."""
    directory = tmp_path / "kv"
    directory.mkdir()

    def run(file: Path, *options: object, model: Path = tiny):
        options = ["--model", model, "--tasks", file, "--directory", directory, "--memory-budget", "4MiB", *options]
        result = csd("bench", "accuracy", "--quick", *options)
        assert list(directory.iterdir()) == [], "something was left behind"
        return result

    return run


@pytest.fixture
def write(tmp_path):
    """write(name, text or row, ...) -> a file of these lines."""

    def write_lines(name: str, *lines: str | dict) -> Path:
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write_lines


def test_every_method_has_a_row_with_recall_kl_bytes_and_speed(accuracy, write, tmp_path):
    can_plot = importlib.util.find_spec("matplotlib") is not None
    file = write(
        "asked.jsonl",
        {"prompt": "abc " * 60 + "ab", "answer": "c "},
        {"context": "one two " * 40, "questions": [{"prompt": "on", "answer": "e"}, {"prompt": "tw", "answer": "o"}]},
    )
    result = accuracy(file, "--json", "-", *(["--plot", tmp_path / "plots"] if can_plot else []))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    measured = {}
    for row in report["rows"]:
        assert row["name"] in result.stderr
        if row["value"] is None:
            raise AssertionError(row["skipped"])
        figures = row["figures"]
        assert sorted(figures) == sorted(FIGURES)
        assert figures["questions"] == 3 and figures["positions"] == 4
        assert row["value"] == 100 * figures["recall"] and row["unit"] == "%"
        assert figures["kl"] >= 0 and figures["perplexity"] >= 1 and figures["tokens_per_s"] > 0
        measured[figures["kv_dtype"], figures["method"]] = figures
    everywhere = ["exact", "sparf-1/8", "sparf-sketch-1/8", "page-1/8", "page-sketch-1/8", "adaptive-0.99"]
    assert set(measured) == {
        *((dtype, method) for dtype in ("bfloat16", "int8", "int4") for method in everywhere),
        *(("bfloat16", method) for method in ("reference", "h2o-1/8", "window-1/8")),
    }
    assert measured["bfloat16", "reference"]["kl"] == 0
    # Two implementations, whose logits round to bfloat16 differently.
    assert measured["bfloat16", "exact"]["kl"] < measured["bfloat16", "window-1/8"]["kl"] / 10
    for method in ("h2o-1/8", "window-1/8"):
        assert measured["bfloat16", method]["share_of_exact_bytes"] == pytest.approx(1 / 8, rel=0.02)
        assert measured["bfloat16", method]["drive_bytes_per_token"] == 0
    if not can_plot:
        pytest.skip("no plots: matplotlib is not installed (pip install 'torch_csd[bench]')")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["accuracy-asked.png"]


def test_a_text_has_no_answers_so_kl_and_perplexity_are_what_is_measured(accuracy, write):
    file = write("story.txt", "It was a dark night and it went on. " * 20)
    result = accuracy(file, "--context", "128,512", "--last", "3", "--methods", "exact", "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert {row["figures"]["task"] for row in rows} == {"story 128", "story 512"}
    for row in rows:
        figures = row["figures"]
        assert figures["recall"] is None and figures["positions"] == 3 and row["unit"] == "ppl"
        assert row["value"] == figures["perplexity"] >= 1
        assert figures["context_tokens"] in (127, 511)  # and the token that the first step is given


def test_an_answer_is_right_if_greedy_decoding_writes_it(accuracy, write, checkpoint, lookups):
    wrong = lookups[0].answer[:-2] + "?" + lookups[0].answer[-1]
    rows = [{"prompt": lookups[0].prompt, "answer": answer} for answer in (lookups[0].answer, wrong)]
    options = ["--methods", "exact,window-1/8", "--kv-dtype", "float32,int4", "--json", "-"]
    result = accuracy(write("ledger.jsonl", *rows), *options, model=checkpoint)
    assert result.exit_code == 0, result.stderr
    recall = {row["name"]: row["figures"]["recall"] for row in json.loads(result.stdout)["rows"]}
    assert recall["ledger, float32, exact"] == recall["ledger, int4, exact"] == 0.5
    # The name stands far before the window.
    assert recall["ledger, float32, sliding window 1/8"] == 0


def test_the_bundled_model_recalls_by_exact_attention_what_a_window_has_forgotten(csd, tmp_path):
    options = ["--methods", "exact,window-1/8", "--context", "1k", "--kv-dtype", "bfloat16", "--directory", tmp_path]
    result = csd("bench", "accuracy", "--questions", "20", *options, "--json", "-")
    assert result.exit_code == 0, result.stderr
    figures = {row["figures"]["method"]: row["figures"] for row in json.loads(result.stdout)["rows"]}
    assert figures["exact"]["questions"] == 20 and figures["exact"]["context_tokens"] == 1024
    assert figures["exact"]["recall"] >= 0.9 > 0.5 >= figures["window-1/8"]["recall"]
    assert figures["exact"]["kl"] < 0.01 < figures["window-1/8"]["kl"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{}"], 'line 1: no "prompt": wanted {"prompt": ..., "answer": ...} or'),
        (["", "{"], "line 2: not JSON"),
        (["[1]"], "line 1: wanted {"),
        ([{"prompt": "ab", "answer": "c"}, {"prompt": "ab"}], 'line 2: no "answer"'),
        ([{"prompt": "ab", "answer": 7}], "line 1: answer must be a text that is not empty, got 7"),
        ([{"prompt": "a", "answer": "c"}], "line 1: prompt must be two tokens at least, got 1"),
        ([{"context": "", "questions": []}], "line 1: context must be a text"),
        ([{"context": "ab", "questions": []}], "line 1: questions must be a list"),
        ([{"context": "ab", "questions": [{"prompt": "a"}]}], 'line 1: no "answer": wanted questions of'),
        ([], "no rows; wanted JSON lines"),
    ],
)
def test_a_bad_line_is_named_with_what_was_wanted(accuracy, write, lines, reason):
    result = accuracy(write("tasks.jsonl", *lines))
    assert result.exit_code == 2
    assert reason in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--methods", "page-1/8,nearest"], "a method must be one of exact, sparf"),
        (["--methods", "page-0"], "got 'page-0'"),
        (["--methods", "adaptive-1"], "got 'adaptive-1'"),
        (["--methods", ","], "at least one method"),
        (["--context", "4k"], "wanted 4096 tokens of context and 8 to predict, the text has"),
        (["--context", "1"], "wanted 2 tokens of context"),
        (["--model", "/none/at/all"], "no such directory; wanted a Hugging Face checkpoint"),
        (["--tasks", "/none/at/all"], "no such file"),
        (["--kv-dtype", "int3"], "kv_dtype must be one of"),
    ],
)
def test_what_cannot_work_is_one_line(accuracy, write, options, reason):
    result = accuracy(write("text.txt", "a short text"), *options)
    assert result.exit_code == 2
    assert reason in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_options_that_do_not_go_together_are_refused(csd, accuracy, write):
    assert "--tasks wants --model" in csd("bench", "accuracy", "--tasks", write("a.txt", "a")).stderr
    assert "--last goes with --tasks" in csd("bench", "accuracy", "--last", "3").stderr
    rows = write("a.jsonl", {"prompt": "ab", "answer": "c"})
    assert "--context and --last go with a text" in accuracy(rows, "--context", "1k").stderr


def test_a_context_longer_than_the_model_was_made_for_is_skipped(accuracy, write):
    result = accuracy(write("text.txt", "a b c d " * 300), "--context", "2k", "--methods", "exact", "--json", "-")
    (row,) = json.loads(result.stdout)["rows"]
    assert row["value"] is None and row["skipped"] == "2056 tokens, and the model was made for 2048"


def test_what_a_cache_cannot_do_is_a_skipped_row_and_spoils_no_other(accuracy, write, monkeypatch):
    """SparF is refused when it is set, page top-k fails in the middle of a forward; adaptive is exact here."""
    append, asked = KVStore.append, []

    def set_sparse(cache, sparse):
        if isinstance(sparse, SparF):
            raise NotImplementedError("no SparF here")
        asked[:] = [sparse]

    def fail(store, layer, *states):
        if layer == 1 and isinstance(asked[0], PageTopK):
            raise StoreError("the drive is gone")
        return append(store, layer, *states)

    file = write("asked.jsonl", {"context": "ab " * 50, "questions": [{"prompt": "?ab", "answer": " ab"}] * 2})
    methods = ["--methods", "exact,sparf-1/8,page-1/8,adaptive-0.99", "--kv-dtype", "float32", "--json", "-"]
    monkeypatch.setattr(StorageCache, "sparse", property(lambda cache: None, set_sparse), raising=False)
    expected = json.loads(accuracy(file, "--methods", "exact", *methods[2:]).stdout)["rows"][-1]["figures"]
    monkeypatch.setattr(KVStore, "append", fail)
    asked.append(None)
    rows = {row["name"].split(", ")[-1]: row for row in json.loads(accuracy(file, *methods).stdout)["rows"]}
    assert rows["SparF 1/8"]["skipped"] == "no SparF here"
    assert rows["page top-k 1/8"]["skipped"] == "the drive is gone"
    for name in ("exact", "adaptive 0.99"):
        assert rows[name]["figures"]["kl"] == pytest.approx(expected["kl"], abs=1e-9)
        assert rows[name]["figures"]["questions"] == 2


# ---- methods ---------------------------------------------------------------------------------------------------


def test_methods_by_name_alone_are_those_of_the_default_amounts():
    assert [method.name for method in parse_methods("window,page-1/4,exact,adaptive")] == [
        "exact",
        "page-1/4",
        "adaptive-0.99",
        "adaptive-0.999",
        *("window-1/8", "window-1/16", "window-1/32"),
    ]
    assert {method.name for method in parse_methods(",".join(FAMILIES))} >= {"sparf-1/32", "sparf-sketch-1/32"}
    assert parse_methods("sparf-sketch-1/8") == [Method("sparf-sketch", Fraction(1, 8))]


@pytest.mark.parametrize("share", ["1/8", "1/16", "1/32"])
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 4096), (128, 65536)])
def test_sparf_reads_its_share_by_the_accounting_of_sparq(share, head_dim, tokens):
    settings = Method("sparf", Fraction(share)).sparse(head_dim, tokens)
    step1 = Fraction(settings.channels, 2 * head_dim)
    step2 = Fraction(settings.tokens + settings.local, tokens)
    assert step1 == step2 == Fraction(share) / 2
    assert settings.step1 == "channels"
    assert Method("sparf-sketch", Fraction(share)).sparse(head_dim, tokens).step1 == "sketch"


def test_sparf_settings_are_in_range_where_there_are_few_tokens():
    for tokens in range(2, 300):
        Method("sparf", Fraction(1, 32)).sparse(16, tokens)


def test_kl_and_recall_are_of_the_positions_of_the_answer():
    torch.manual_seed(0)
    ours, reference = torch.randn(2, 3, 7, dtype=torch.float64).log_softmax(-1)
    tally = Tally()
    tally.add(ours, reference, ours.argmax(-1).tolist(), [0.1] * 3)
    tally.add(ours, reference, [*ours.argmax(-1).tolist()[:2], int(ours[2].argmin())], [0.1] * 3)
    assert (tally.right, tally.questions, tally.steps) == (1, 2, 6)
    expected = torch.nn.functional.kl_div(ours, reference, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(torch.tensor(tally.kl[:3], dtype=torch.float64), expected)
    assert tally.loss[:3] == pytest.approx((-ours.max(-1).values).tolist())


# ---- the caches in memory --------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_reference_is_what_transformers_computes(model, tiny):
    ids = torch.randint(0, 256, (1, 90))
    stock = model(ids, past_key_values=DynamicCache(config=model.config), output_attentions=True)
    ours = LlamaForCausalLM.from_pretrained(tiny).eval()
    dense.use(ours)
    cache = dense.ExactCache(ours.config, capacity=100)
    feed(ours, cache, ids[0, :50].tolist())
    logits = ours(ids[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(logits, stock.logits[:, 50:], atol=2e-5, rtol=1e-4)
    for layer, weights in zip(cache.layers, stock.attentions, strict=True):
        expected = weights[0].sum(dim=1).view(2, 2, -1).sum(dim=1)  # over queries, over the heads of a kv head
        torch.testing.assert_close(layer.received, expected, atol=1e-4, rtol=1e-4)

    # What comes after is taken back, the attention that it paid included.
    state, before = cache.state(), [layer.received.clone() for layer in cache.layers]
    feed(ours, cache, [1, 2, 3])
    cache.restore(state)
    assert cache.get_seq_length() == 90
    assert all(torch.equal(layer.received, old) for layer, old in zip(cache.layers, before, strict=True))


def evict_plainly(q, k, v, received, policy, budget):
    """The same in Python's own words: for each kv head the positions it keeps, and what each has received."""
    (kv_heads, total, head_dim), group, past = k.shape, q.shape[0] // k.shape[0], received.shape[1]
    outs = []
    kept = [{position: float(received[head, position]) for position in range(past)} for head in range(kv_heads)]
    for position in range(past, total):
        out = torch.empty(q.shape[0], head_dim)
        for head, scores in enumerate(kept):
            scores[position] = 0.0
            if position == past:  # what was there is cut down first, before there is a new token
                del scores[position]
                drop(scores, policy, budget)
                scores[position] = 0.0
            drop(scores, policy, budget)
            positions = sorted(scores)
            for g in range(head * group, (head + 1) * group):
                logits = [float(q[g, position] @ k[head, at]) / math.sqrt(head_dim) for at in positions]
                total_weight = sum(math.exp(logit - max(logits)) for logit in logits)
                weights = [math.exp(logit - max(logits)) / total_weight for logit in logits]
                out[g] = sum(weight * v[head, at] for weight, at in zip(weights, positions, strict=True))
                for weight, at in zip(weights, positions, strict=True):
                    scores[at] += weight
        outs.append(out)
    return torch.stack(outs), [sorted(scores) for scores in kept]


def drop(scores: dict[int, float], policy: str, budget: int) -> None:
    while len(scores) > budget:
        positions = sorted(scores)
        if policy == "h2o":
            others = positions[: len(positions) - budget // 2]
            del scores[min(others, key=lambda position: scores[position])]
        else:
            del scores[positions[4]]


@pytest.mark.parametrize("policy", ["h2o", "window"])
def test_eviction_is_what_a_plain_loop_does(policy):
    torch.manual_seed(1)
    past_tokens, new_tokens, budget = 40, 9, 12
    total = past_tokens + new_tokens
    q, k, v = 2 * torch.randn(4, total, 8), 2 * torch.randn(2, total, 8), torch.randn(2, total, 8)
    past = dense.ExactLayer(capacity=past_tokens)
    past.update(k[None, :, :past_tokens], v[None, :, :past_tokens])
    past.attend(q[None, :, :past_tokens], 8**-0.5)
    expected, kept = evict_plainly(q, k, v, past.received, policy, budget)
    layer = dense.EvictingLayer(past, getattr(dense, policy), budget)
    for index, position in enumerate(range(past_tokens, total)):
        at = slice(position, position + 1)
        keys, _ = layer.update(k[None, :, at], v[None, :, at])
        assert keys.memory_layer is layer and keys.shape[2] == budget and layer.get_seq_length() == position + 1
        out = layer.attend(q[None, :, at], 8**-0.5)
        torch.testing.assert_close(out[0, 0], expected[index], atol=1e-5, rtol=1e-4)
    for head, positions in enumerate(kept):
        assert torch.equal(layer.keys[0, head], k[head, positions])
        if policy == "window":
            assert positions == [*range(4), *range(total - budget + 4, total)]
    assert past.length == past_tokens and torch.equal(past.keys[0], k[:, :past_tokens])


# ---- pictures and tables ---------------------------------------------------------------------------------------


def made_up_report() -> dict:
    """Every method at 16k and a text; figures as they might be."""
    rows = []
    methods = parse_methods(",".join(FAMILIES))
    for task, answered in (("16k", True), ("text 4k", False)):
        for dtype, size in (("bfloat16", 1.0), ("int4", 0.31)):
            for method in [None, *methods]:
                in_memory = method is None or method.policy is not None
                if in_memory and dtype != "bfloat16":
                    continue
                share = float(method.amount) if method and method.family != "adaptive" else 0.3 if method else 1.0
                rows.append(
                    {
                        "task": task, "context_tokens": 16384, "kv_dtype": dtype, "in_memory": in_memory,
                        "method": method.name if method else "reference", "settings": "",
                        "family": method.family if method else "reference", "questions": 100, "positions": 400,
                        "recall": min(1.0, 0.5 + share) if answered else None, "kl": (1 - share) * size,
                        "perplexity": 3.0 - share, "drive_bytes_per_token": 0.0 if in_memory else share * size * 2**24,
                        "memory_bytes_per_token": share * 2**24 if in_memory else 2.0**14,
                        "share_of_exact_bytes": share * size, "tokens_per_s": 100 / share,
                    }
                )  # fmt: skip
    machine = {"date": "", "torch": "2", "io_engine": "pread", "simd": "serial", "quick": False}
    rows = [{"name": "", "value": 1.0, "figures": figures} for figures in rows]
    rows.append({"name": "64k, int8, SparF 1/8", "value": None, "figures": {}, "skipped": "no"})
    labels = {"plot_x": "bytes read per token", "title": "accuracy of sparse attention: recall, 16k"}
    return {"name": "accuracy", "machine": machine, "rows": rows, **labels}


def test_a_picture_is_drawn_for_every_context(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no plots: matplotlib is not installed (pip install 'torch_csd[bench]')")
    paths = plots.draw_accuracy(made_up_report(), tmp_path)
    assert [path.name for path in paths] == ["accuracy-16k.png", "accuracy-text-4k.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_json_becomes_a_table_with_a_line_for_every_method(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "table.py"
    spec = importlib.util.spec_from_file_location("table", path)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    lines = list(table.accuracy_lines(made_up_report()))
    methods = parse_methods(",".join(FAMILIES))
    for method in methods:
        name = f"| {method.name}, in memory |" if method.policy else f"| {method.name} |"
        assert sum(line.startswith(name) for line in lines) == 2
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 * (len(methods) + 2) and {line.count("|") for line in rows} == {2 + 2 * 4}
    assert "| page-1/8 | 62 | 0.88 | 0.125 | 800 | 62 | 0.27 |" in "\n".join(lines)


def test_the_script_is_the_command(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "bench_accuracy.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as exit:
        exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__"})
    assert exit.value.code == 0 and "--methods" in capsys.readouterr().out


def test_every_family_of_methods_has_a_line_in_the_pictures():
    assert list(plots.FAMILY_STYLES) == list(FAMILIES)
