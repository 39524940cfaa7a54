"""Threads that compute what waits: nobody's question may be left lying, whatever threads rest at that moment."""

from __future__ import annotations

import asyncio
import functools
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from radloop.serving.batching import MOST_IMAGES, Answer, Batcher


def _compute(images: NDArray[np.float32]) -> Answer:
    """Each image's first value, and which half it is in."""
    if np.isnan(images).any():
        raise ValueError("not a number")
    found = images[:, 0, 0, 0].astype(np.float64)
    return found, (found > 0.5).astype(np.int64)


def _image(value: float) -> NDArray[np.float32]:
    return np.full((1, 1, 2, 2), value, np.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_question_gets_its_own_answer(threads: int) -> None:
    """A wake-up that is lost would be a study that nobody reads: pauses of all lengths, so that threads rest and wake."""
    sizes: list[int] = []
    after: list[float] = []

    async def ask(number: int, batcher: Batcher) -> None:
        for turn in range(200):
            value = (number * 200 + turn) / 2000
            probabilities, decisions = await batcher.submit(_image(value), functools.partial(after.append, value))
            assert probabilities.tolist() == [np.float32(value)] and decisions.tolist() == [int(value > 0.5)]
            if turn % 7 == number % 7:
                await asyncio.sleep(0.0003 * (turn % 5))

    async def all_of_them() -> None:
        batcher = Batcher(_compute, threads=threads, observe=sizes.append)
        async with asyncio.timeout(60):
            await asyncio.gather(*(ask(number, batcher) for number in range(8)))
        await asyncio.to_thread(batcher.close)
        assert batcher.waiting == 0

    asyncio.run(all_of_them())
    assert sum(sizes) == len(after) == 1600 and max(sizes) <= MOST_IMAGES


def test_one_bad_image_fails_alone() -> None:
    """Else a sender of rubbish would take the answers of others with it."""

    async def ask() -> None:
        batcher = Batcher(_compute, threads=1, observe=lambda _: time.sleep(0.01))
        asked = [batcher.submit(_image(value)) for value in (0.25, float("nan"), 0.75)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        batcher.close()
        assert isinstance(answers[1], ValueError)
        assert [answers[0][0].tolist(), answers[2][0].tolist()] == [[0.25], [0.75]]

    asyncio.run(ask())


def test_what_waits_at_the_end_is_finished() -> None:
    """A predictor that is told to end has taken these studies: they are answered first."""

    async def ask() -> None:
        batcher = Batcher(_compute, threads=2, observe=lambda _: time.sleep(0.01))
        asked = [batcher.submit(_image(number / 20)) for number in range(20)]
        await asyncio.to_thread(batcher.close)
        answers = await asyncio.gather(*asked)
        assert [round(float(found[0]) * 20) for found, _ in answers] == list(range(20))

    asyncio.run(ask())


def test_what_is_done_afterwards_may_fail() -> None:
    """Where memory is short, a digest that cannot be found must not end the thread that would have read the next study."""

    async def ask() -> None:
        batcher = Batcher(_compute, threads=1, observe=lambda _: None)
        async with asyncio.timeout(10):
            for value in (0.25, 0.75):
                assert (await batcher.submit(_image(value), lambda: 1 // 0))[0].tolist() == [value]
        batcher.close()

    asyncio.run(ask())
