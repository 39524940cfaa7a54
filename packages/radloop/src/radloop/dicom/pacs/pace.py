"""How gently a PACS is asked: pauses between tries, a rate, and the hours in which it may be fetched from."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from datetime import datetime
from datetime import time as clock
from typing import TypeVar

import msgspec

from radloop.errors import PacsUnavailable, SettingsError

T = TypeVar("T")
_HOURS = re.compile(r"(\d{2}):(\d{2})-(\d{2}):(\d{2})")


class Patience(msgspec.Struct, frozen=True):
    """How often something is tried, and how long the pauses are: doubled each time, with jitter.

    A PACS that says how long to wait (Retry-After) is believed, up to `longest_s`.
    """

    tries: int = 5
    first_s: float = 1.0
    longest_s: float = 60.0

    def pause_s(self, failures: int, asked_s: float | None = None) -> float:
        """The pause after so many failures in a row, at least 1."""
        if asked_s is not None:
            return min(asked_s, self.longest_s)
        # Half of it is chance: clients that failed together must not come back together.
        return min(self.first_s * 2.0 ** (failures - 1), self.longest_s) * random.uniform(0.5, 1.0)  # noqa: S311


def again(work: Callable[[], T], patience: Patience) -> T:
    """The result of `work`, tried again while the PACS is unavailable; its last error when `tries` is used up."""
    for failures in range(1, patience.tries):
        try:
            return work()
        except PacsUnavailable as error:
            time.sleep(patience.pause_s(failures, error.retry_after_s))
    return work()


class Rate:
    """At most so many instances a second, evenly: `wait` returns when the next one may be taken. 0: no limit."""

    def __init__(self, per_s: float) -> None:
        self._step_s = 1 / per_s if per_s > 0 else 0.0
        self._next = 0.0

    def wait(self) -> None:
        """Sleep until it is time. Lost time is not made up for: a pause must not be followed by a burst."""
        now = time.monotonic()
        if self._step_s == 0:
            return
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + self._step_s


class Hours:
    """When a PACS may be fetched from, such as `19:00-06:00` by this machine's clock; empty: always.

    Raises:
        SettingsError: it is not written so.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if not text:
            return
        match = _HOURS.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            begin_h, begin_m, end_h, end_m = (int(part) for part in match.groups())
            self._begin, self._end = clock(begin_h, begin_m), clock(end_h, end_m)
        except ValueError:
            raise SettingsError("the hours of a PACS cannot be read", expected="HH:MM-HH:MM", got=text) from None

    def open(self, at: datetime | None = None) -> bool:
        """Whether it is time. `at`: local time, now by default. The first minute is within, the last is not."""
        if not self.text:
            return True
        now = (at or datetime.now().astimezone()).time()
        if self._begin <= self._end:
            return self._begin <= now < self._end
        return now >= self._begin or now < self._end
