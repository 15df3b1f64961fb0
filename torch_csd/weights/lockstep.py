"""Threads that go through the same weights side by side, one computing at a time. Knows nothing of memory or files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_R = TypeVar("_R")
_thread = threading.local()  # baton: that this thread computes with


@dataclass(eq=False)
class Pace:
    """How far a thread is."""

    position: int = -1  # in the order of weights
    steps: int = 0  # weights since it began
    blocked: bool = False  # it waits for another thread
    stopped: bool = False  # it uses no more


class Lockstep:
    """The threads in lockstep, and how far each is. Its methods, but for `run`, are called with the lock of ``changed``
    held."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._paces: dict[int, Pace] = {}  # by thread

    def run(
        self, tasks: Sequence[Callable[[], _R]], *, position: Callable[[], int], leave: Callable[[], None]
    ) -> list[_R | BaseException]:
        """Runs each in a thread of its own; their results or errors, in order.

        position: in the order, where they begin. leave: called by a thread that has ended, without the lock.
        """
        baton = threading.Lock()
        results: list[_R | BaseException] = [RuntimeError("not run")] * len(tasks)
        start = threading.Barrier(len(tasks))

        def run(number: int) -> None:
            try:
                with self._changed:
                    self._paces[threading.get_ident()] = Pace(position())
                start.wait()
                with baton:
                    _thread.baton = baton
                    results[number] = tasks[number]()
            except BaseException as error:  # also KeyboardInterrupt: the caller decides
                results[number] = error
            finally:
                _thread.baton = None
                with self._changed:
                    self._paces.pop(threading.get_ident(), None)
                leave()

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # KeyboardInterrupt comes to this thread alone
            with self._changed:
                for pace in self._paces.values():
                    pace.stopped = True
            for thread in threads:
                thread.join()
            raise
        return results

    def __bool__(self) -> bool:
        return bool(self._paces)

    def pace(self) -> Pace | None:
        """Of this thread; None: it is not in lockstep."""
        return self._paces.get(threading.get_ident())

    def advance(self, index: int | None, count: int) -> int:
        """This thread uses the weight at ``index`` of ``count``, if it has a place: the step at which it does, or -1.

        Raises:
            InterruptedError: it was stopped.
        """
        pace = self.pace()
        if pace is None:
            return -1
        if pace.stopped:
            raise InterruptedError("stopped, with the tasks that it was in lockstep with")
        if index is not None:
            pace.steps += (index - pace.position) % count
            pace.position = index
        return pace.steps

    def leads(self) -> bool:
        """Whether no thread is further than this one."""
        ident = threading.get_ident()
        first = max(self._paces, key=lambda each: (self._paces[each].steps, each), default=ident)
        return first == ident

    def waits_for_others(self) -> bool:
        """Whether this one waits where the others are to use what it is done with. Only the first does, and not where
        all of the others wait, too: so one always goes on."""
        others = [pace for ident, pace in self._paces.items() if ident != threading.get_ident()]
        return self.leads() and not all(pace.blocked for pace in others)

    def is_behind(self, step: int) -> bool:
        """Whether a thread has not come to this step yet."""
        return any(pace.steps < step for pace in self._paces.values())

    def wait(self) -> None:
        """For what another thread does."""
        pace = self.pace()
        if pace is None:
            self._changed.wait()
            return
        pace.blocked = True
        self._changed.notify_all()
        self._changed.wait()
        pace.blocked = False


@contextmanager
def baton_passed() -> Iterator[None]:
    """Lets another thread in lockstep compute while this one waits. Not to be left with the lock held: who has the
    baton may want that."""
    baton = getattr(_thread, "baton", None)
    if baton is None:
        yield
        return
    baton.release()
    try:
        yield
    finally:
        baton.acquire()
