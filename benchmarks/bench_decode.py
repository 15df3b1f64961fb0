"""Decode attention over stored K and V: cold against the drive, hot against memory and torch's own attention.

    python benchmarks/bench_decode.py --directory /nvme/kv

One new token (q_len 1) attends to a cache of --size bytes: bf16, 32 query and 8 kv heads, head_dim 128. Cold: every
page is read from the drive with O_DIRECT, so no page cache is in play; the file is as large as --size. Hot: all pages
resident. Pairs are interleaved and ratios are medians, because drives and shared machines drift within minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from common import DriveRoof, Report, Row, has_fio, median_ratio, memory_read_gbs, seconds

from torch_csd import KVStore
from torch_csd.config import parse_bytes

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
CHUNK = 4096  # tokens appended at once


def fill(store: KVStore, tokens: int) -> None:
    for begin in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - begin)
        store.append(0, *(torch.randn(1, KV_HEADS, count, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2)))
    store.flush()


def bench_cold(report: Report, arguments: argparse.Namespace, tokens: int) -> None:
    q = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
    with KVStore(
        arguments.directory,
        memory_budget=arguments.memory_budget,
        io_engine=arguments.io_engine,
        threads=arguments.threads,
        resident=False,
    ) as store:
        fill(store, tokens)
        if not store.stats()["direct_io"]:
            print(
                f"{store.stats()['io_reason']}: reads go through the page cache, so there is no cold row",
                file=sys.stderr,
            )
            return
        rates, fio_rates, huge_rates = [], [], []
        with DriveRoof(store.directory, tokens * TOKEN_BYTES) as roof:
            for _ in range(arguments.rounds):
                before = [roof.fio() if has_fio() else 0.0, roof.huge_pages()]
                drive_bytes = store.stats()["drive_read_bytes"]
                elapsed = seconds(lambda: store.attend(0, q))
                rates.append((store.stats()["drive_read_bytes"] - drive_bytes) / elapsed / 1e9)
                after = [roof.fio() if has_fio() else 0.0, roof.huge_pages()]
                fio_rates.append((before[0] + after[0]) / 2)
                huge_rates.append((before[1] + after[1]) / 2)
        stats = store.stats()
    ratios, roofs = {}, {}
    for name, measured in (("fio", fio_rates), ("O_DIRECT into huge pages", huge_rates)):
        if min(measured) > 0:
            ratios[name] = median_ratio(rates, measured)
            roofs[name] = statistics.median(measured)
    waiting = stats["io_wait_s"] / (stats["io_wait_s"] + stats["compute_s"])
    note = f"[{stats['io_engine']}, {stats['threads']} threads, {waiting:.0%} of their time waiting for the drive]"
    report.add(Row("cold decode attention, bf16", statistics.median(rates), "GB/s", ratios, roofs, note))


def bench_hot(report: Report, arguments: argparse.Namespace, tokens: int) -> None:
    q = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
    kv_bytes = tokens * TOKEN_BYTES
    with KVStore(arguments.directory, memory_budget=2 * kv_bytes, threads=arguments.threads) as store:
        fill(store, tokens)
        k, v = store.read(0)
        calls = {
            "ours": lambda: store.attend(0, q),
            "torch SDPA, group folded into q_len": lambda: F.scaled_dot_product_attention(
                q.view(1, KV_HEADS, GROUP, HEAD_DIM), k, v
            ),
            "torch SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in (*calls, "memory read")}
        for call in calls.values():
            call()
        for _ in range(arguments.rounds):
            for name, call in calls.items():
                rates[name].append(kv_bytes / seconds(call) / 1e9)
            rates["memory read"].append((memory_read_gbs(k) + memory_read_gbs(v)) / 2)
        assert store.stats()["drive_read_bytes"] == 0
        stats = store.stats()
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    best = max((name for name in calls if name != "ours"), key=medians.__getitem__)
    names = {"memory read": "memory read", best: f"best {best}"}
    report.add(
        Row(
            "hot decode attention, bf16",
            medians["ours"],
            "GB/s",
            {label: median_ratio(rates["ours"], rates[name]) for name, label in names.items()},
            {label: medians[name] for name, label in names.items()},
            f"[{stats['simd']}, {stats['threads']} threads]",
        )
    )
    for name in calls:
        if name != "ours":
            report.add(Row(f"  {name}", medians[name], "GB/s"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=None, help="where the KV file lies (default: the temporary directory)")
    parser.add_argument("--size", default="1GiB", help="bytes of K and V (default 1GiB)")
    parser.add_argument("--memory-budget", default="128MiB", help="of the cold rows (default 128MiB)")
    parser.add_argument("--io-engine", default="auto", choices=["auto", "io_uring", "pread"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved pairs to take the median of (default 9)")
    parser.add_argument("--quick", action="store_true", help="128 MiB, 3 rounds: does it run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = "128MiB", 3
    torch.manual_seed(0)
    tokens = parse_bytes(arguments.size) // TOKEN_BYTES // CHUNK * CHUNK or CHUNK
    report = Report(f"decode attention over {tokens} tokens ({tokens * TOKEN_BYTES / 2**30:.2f} GiB)", arguments.json)
    bench_cold(report, arguments, tokens)
    bench_hot(report, arguments, tokens)
    report.finish()


if __name__ == "__main__":
    main()
