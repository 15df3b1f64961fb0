"""The processes that test_crash.py kills: forked from one that has imported everything and has opened no store.

Reads one JSON request a line: what to run, and when to send SIGKILL: so many seconds after so many reports of the
child. Answers with the exit status, one line each. The reports go to the file that the request names, each in one
write(), so that what a child has said survives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import sys
import time
import traceback

sys.path[:0] = [
    os.path.dirname(os.path.abspath(__file__)),
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "hf"),
]

import models  # noqa: E402
import torch  # noqa: E402
from durable_walk import Walk  # noqa: E402

from torch_csd import KVStore, StorageCache  # noqa: E402


def make_model() -> torch.nn.Module:
    """Pages of 64 KiB in float32: eight of them are all that a memory_budget of 1 MiB keeps in memory.

    Of the first 40 seeds the one whose texts are the least in doubt: see GAP_MIN in test_crash.py.
    """
    return models.make_model("llama", "csd", seed=35, num_key_value_heads=4, head_dim=32)


class ReportingCache(StorageCache):
    """Keeps what was appended since the last report."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        fresh = self.__dict__.setdefault("fresh", {})
        fresh.setdefault(layer_idx, []).append((key_states.numpy().copy(), value_states.numpy().copy()))
        return out


def decode(report, model, *, directory, name, tokens, is_new, kv_dtype, length_max, seed, **settings) -> None:
    """Goes on with a text, committing every few tokens. The last of ``tokens`` is not in the cache yet."""
    rng = random.Random(seed)
    if is_new:
        cache = ReportingCache(model.config, directory, durable=True, name=name, kv_dtype=kv_dtype, **settings)
        fed = tokens
    else:
        cache = ReportingCache.open(directory, name, config=model.config, **settings)
        assert cache.get_seq_length() == len(tokens) - 1
        fed = tokens[-1:]
    report({"event": "opened"})
    tokens = list(tokens)
    with torch.inference_mode():
        while len(tokens) <= length_max:
            for _ in range(rng.randrange(1, 7)):
                logits = model(torch.tensor([fed]), past_key_values=cache).logits
                fed = [int(logits[0, -1].argmax())]
                tokens += fed
            length = cache.get_seq_length()
            report({"event": "begin", "length": length, "tokens": tokens, "kv": cache.__dict__.pop("fresh")})
            cache.commit(torch.tensor([tokens]))
            report({"event": "end", "length": length})


def walk(report, model, *, directory, seed, **settings) -> None:
    steps = Walk(directory, lambda event, state: report({"event": event, "state": state}), seed=seed, **settings)
    report({"event": "opened"})
    while True:
        steps.step()


def fork(report, model, *, directory, name, **settings) -> None:
    """Leaves a process behind that was forked while the store was open."""
    store = KVStore.open(directory, name, **settings)
    left_behind = os.fork()
    if left_behind:
        report({"event": "forked", "process": left_behind})
    time.sleep(60)
    store.close()


def run(request: dict, model: torch.nn.Module) -> None:
    descriptor = os.open(request["report"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def report(record: dict) -> None:
        data = pickle.dumps(record)
        data = len(data).to_bytes(8, "little") + data
        assert os.write(descriptor, data) == len(data)

    {"decode": decode, "walk": walk, "fork": fork}[request["what"]](report, model, **request["arguments"])


def report_count(path: str) -> int:
    return len(read_reports(path))


def read_reports(path: str) -> list[bytes]:
    """Those that are complete."""
    reports = []
    data = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        data = file.read()
    begin = 0
    while len(data) >= begin + 8:
        end = begin + 8 + int.from_bytes(data[begin : begin + 8], "little")
        if end > len(data):
            break
        reports.append(data[begin + 8 : end])
        begin = end
    return reports


def is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main() -> None:
    torch.set_num_threads(1)
    model = make_model()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(request, model)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        while report_count(request["report"]) < request["kill_after_reports"] and is_running(child):
            time.sleep(0.001)
        time.sleep(request["kill_after_s"])
        os.kill(child, signal.SIGKILL)  # not reaped yet: the number is still this child's
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
