"""Group commit for what associations bring at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Waiting(Generic[T, R]):
    """One item that waits for its commit."""

    __slots__ = ("done", "error", "item", "result")
    result: R

    def __init__(self, item: T) -> None:
        self.item, self.done = item, False
        self.error: BaseException | None = None


class Together(Generic[T, R]):
    """The first that comes commits for all that wait by then; a call returns when its own item is committed.

    Args:
        commit: takes items, returns a result for each, or raises; then each that waits raises the same.
    """

    def __init__(self, commit: Callable[[list[T]], Sequence[R]]) -> None:
        self._commit = commit
        self._turn, self._joining = threading.Lock(), threading.Lock()
        self._queue: list[_Waiting[T, R]] = []

    def __call__(self, item: T) -> R:
        """Commit one item, with all that wait; its result."""
        mine: _Waiting[T, R] = _Waiting(item)
        with self._joining:
            self._queue.append(mine)
        with self._turn:
            if not mine.done:
                with self._joining:
                    group, self._queue = self._queue, []
                self._run(group)
        if mine.error is not None:
            raise mine.error
        return mine.result

    def _run(self, group: list[_Waiting[T, R]]) -> None:
        try:
            for waiting, result in zip(group, self._commit([waiting.item for waiting in group]), strict=True):
                waiting.result = result
        except BaseException as error:  # noqa: BLE001 - each that waits raises it
            for waiting in group:
                waiting.error = error
        for waiting in group:
            waiting.done = True
