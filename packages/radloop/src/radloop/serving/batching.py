"""What waits is computed together: no request waits for another one to come, only for a free thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

Answer = tuple[NDArray[np.float64], NDArray[np.int64]]
_Asked = tuple[NDArray[np.float32], asyncio.Future[Answer]]
MOST_IMAGES = 4
"""Images in one call of the model: on a CPU two to four take a little less time each than one, sixteen more (docs/results.md)."""


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
        self._waiting: SimpleQueue[_Asked | None] = SimpleQueue()  # in C: a Condition costs several times as much
        self._count = threads
        self._threads = [threading.Thread(target=self._run, name=f"predict-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that no thread has taken yet."""
        return self._waiting.qsize()

    def submit(self, images: NDArray[np.float32]) -> asyncio.Future[Answer]:
        """Queue images that were checked; from the event loop. What is done (cancelled, too late) is not computed."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put((images, future))
        return future

    def close(self) -> None:
        """Finish what waits, then end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            taken = [one for one in self._share(first) if not one[1].done()]
            if not taken:
                continue
            answers = self._answers([images for images, _ in taken])
            try:
                taken[0][1].get_loop().call_soon_threadsafe(_settle, [future for _, future in taken], answers)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _share(self, first: _Asked) -> list[_Asked]:
        """This thread's share of what waits, `first` included."""
        taken, images = [first], len(first[0])
        share = math.ceil((self._waiting.qsize() + 1) / self._count)
        while len(taken) < share and images < MOST_IMAGES:
            try:
                one = self._waiting.get_nowait()
            except Empty:  # another thread was faster
                break
            if one is None:  # the end, for this thread or another one
                self._waiting.put(None)
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
