"""What waits is computed together: no request waits for another one to come, only for a free thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

Answer = tuple[NDArray[np.float64], NDArray[np.int64]]
_Asked = tuple[NDArray[np.float32], asyncio.Future[Answer], Callable[[], object] | None]
MOST_IMAGES = 2
"""Images in one call of the model: on a CPU two take a little less time each than one, eight or sixteen more."""


class Batcher:
    """Threads that take their share of what waits and compute it in one call.

    An idle model answers a lone request at once and alone; under load, batches grow by themselves.

    Args:
        compute: images `(n, 1, size, size)` to probabilities and decisions, each `(n,)`.
        threads: calls at once.
        observe: told the number of images of each call.
    """

    def __init__(
        self, compute: Callable[[NDArray[np.float32]], Answer], *, threads: int, observe: Callable[[int], None]
    ) -> None:
        self._compute, self._observe = compute, observe
        # A queue of Python's wakes every thread that waits at it, one after the other: a tenth of a millisecond before each
        # answer. Here one is woken, the one that came to rest last: the model is still in its core's cache.
        self._waiting: deque[_Asked] = deque()
        self._resting: deque[threading.Lock] = deque()
        self._ended = False
        self._count = threads
        self._threads = [threading.Thread(target=self._run, name=f"predict-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that no thread has taken yet."""
        return len(self._waiting)

    def submit(
        self, images: NDArray[np.float32], afterwards: Callable[[], object] | None = None
    ) -> asyncio.Future[Answer]:
        """Queue images that were checked; from the event loop. What is done (cancelled, too late) is not computed.

        Args:
            afterwards: called by the thread that computed, once the answer is on its way.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((images, future, afterwards))
        self._wake()
        return future

    def close(self) -> None:
        """Finish what waits, then end the threads."""
        self._ended = True
        for _ in self._threads:
            self._wake()
        for thread in self._threads:
            thread.join()

    def _wake(self) -> None:
        with suppress(IndexError):
            self._resting.pop().release()

    def _run(self) -> None:
        rest = threading.Lock()
        rest.acquire()
        while True:
            taken = [one for one in self._share() if not one[1].done()]
            if not taken:
                if self._waiting:
                    continue
                if self._ended:
                    return
                self._resting.append(rest)
                if self._waiting or self._ended:  # since it was looked at: perhaps nobody wakes this thread
                    self._wake()
                rest.acquire()
                continue
            answers = self._answers([images for images, _, _ in taken])
            try:
                taken[0][1].get_loop().call_soon_threadsafe(_settle, [future for _, future, _ in taken], answers)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            for _, _, afterwards in taken:
                if afterwards is not None:
                    with suppress(Exception):  # the thread has others to answer
                        afterwards()

    def _share(self) -> list[_Asked]:
        """This thread's share of what waits; nothing if nothing waits."""
        taken: list[_Asked] = []
        images, share = 0, math.ceil(len(self._waiting) / self._count)
        while len(taken) < share and images < MOST_IMAGES:
            try:
                one = self._waiting.popleft()
            except IndexError:  # another thread was faster
                break
            taken.append(one)
            images += len(one[0])
        return taken

    def _answers(self, many: list[NDArray[np.float32]]) -> list[Answer | Exception]:
        """One call for all; if it fails, one for each, so that a request fails by its own fault only."""
        try:
            self._observe(sum(map(len, many)))
            probabilities, decisions = self._compute(many[0] if len(many) == 1 else np.concatenate(many))
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            return [error] if len(many) == 1 else [self._answers([one])[0] for one in many]
        if len(many) == 1:
            return [(probabilities, decisions)]
        ends = np.cumsum([len(one) for one in many])[:-1]
        return list(zip(np.split(probabilities, ends), np.split(decisions, ends), strict=True))


def _settle(futures: list[asyncio.Future[Answer]], answers: list[Any]) -> None:
    for future, answer in zip(futures, answers, strict=True):
        if future.done():  # its client is gone, or its time is up
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
