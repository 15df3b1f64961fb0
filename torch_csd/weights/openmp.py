"""Lets torch's threads sleep between its calls, where weights come from a drive."""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()
_threads: list[threading.Thread] = []


def let_idle_threads_sleep() -> None:
    """From now on in this process, as far as OpenMP allows it; doing it again changes nothing.

    GNU's OpenMP lets threads spin for milliseconds after each call of torch, on cores that the reader of the drive and
    the kernels for quantised weights want: on 2 cores, with another process on one of them, a step with int4 weights
    took 1.1 to 1.9 s, and 0.2 s without (2026-11-26). OMP_WAIT_POLICY=passive is read before anyone can set it here;
    but threads hardly spin once OpenMP has more of them than there are cores (gomp_managed_threads in its sources). So
    a thread asks for its own, once, and keeps them, asleep. With fewer of torch's threads than cores nothing changes:
    then there are cores to spin on.
    """
    with _lock:
        if _threads:
            return
        asked = threading.Event()
        _threads.append(threading.Thread(target=_ask, args=(asked,), name="torch_csd-openmp", daemon=True))
        _threads[0].start()
    asked.wait()


def _ask(asked: threading.Event) -> None:
    torch.zeros(2**17).add_(1)  # torch divides what is larger than 2**15
    asked.set()
    threading.Event().wait()
