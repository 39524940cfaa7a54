"""Desired states as data: which step follows which, and that running a step again changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from radloop.errors import ServingError
from radloop.serving import rollout
from radloop.serving.desired import ModelRef, Models, Routing, State, desire, desired, supervising, supervisor_pid

ONE, TWO, THREE = (ModelRef(f"models/{n}", str(n), str(n) * 64) for n in (1, 2, 3))


def now(home: Path) -> State:
    made = desired(home)
    assert made is not None
    return State(models=made.models, routing=made.routing)


def test_a_release_step_by_step(home: Path) -> None:
    """Whoever reads desired.json after a crash must find where the release was, and the way back."""
    assert desired(home) is None
    desire(home, rollout.single(home, ONE))
    desire(home, rollout.shadow(home, TWO))
    assert now(home) == State(models=Models(ONE, TWO), routing=Routing("shadow"))
    assert rollout.steps_left(home, TWO) == (5, 25, 50, 100)
    desire(home, rollout.canary(home, TWO, 25))
    assert rollout.steps_left(home, TWO) == (50, 100)
    assert rollout.steps_left(home, THREE) == (5, 25, 50, 100), "another model's steps were taken for this one's"
    desire(home, rollout.promoted(home))
    assert now(home) == State(models=Models(champion=TWO, previous=ONE))
    desire(home, rollout.single(home, TWO))
    assert now(home) == State(models=Models(champion=TWO, previous=ONE)), "the way back was lost by asking again"


def test_the_same_state_is_no_new_generation(home: Path) -> None:
    """A stage that is run again must not restart the release, nor leave the judge's window."""
    first = desire(home, rollout.single(home, ONE))
    assert desire(home, rollout.single(home, ONE)) == first
    assert desire(home, rollout.shadow(home, TWO)) == first + 1


def test_rolling_back(home: Path) -> None:
    """First the challenger goes, then the champion before comes back; never to nothing."""
    desire(home, rollout.single(home, ONE))
    with pytest.raises(ServingError, match="nothing to roll back to"):
        rollout.rolled_back(home)
    desire(home, rollout.single(home, TWO))
    desire(home, rollout.canary(home, THREE, 5))
    desire(home, rollout.rolled_back(home))
    assert now(home) == State(models=Models(champion=TWO, previous=ONE))
    desire(home, rollout.rolled_back(home))
    assert now(home) == State(models=Models(champion=ONE))


def test_states_that_mean_nothing_are_refused(home: Path) -> None:
    """A canary of 500 % or of the champion itself would be accepted by Envoy in one way or another."""
    both = Models(ONE, TWO)
    with pytest.raises(ServingError, match="percent is no share"):
        State(models=both, routing=Routing("canary", 500))
    with pytest.raises(ServingError, match="only a canary has a share"):
        State(models=both, routing=Routing("shadow", 5))
    with pytest.raises(ServingError, match="needs two models"):
        State(models=Models(ONE), routing=Routing("shadow"))
    with pytest.raises(ServingError, match="are the same model"):
        State(models=Models(ONE, ONE), routing=Routing("shadow"))
    with pytest.raises(ServingError, match="no challenger to promote"):
        rollout.promoted(home)


def test_writers_at_once_lose_no_state(home: Path) -> None:
    """A roll-back typed while a release runs must not be overwritten unseen: each write has its own generation."""
    got: list[int] = []

    def write(number: int) -> None:
        for n in range(20):
            got.append(desire(home, State(models=Models(ModelRef("p", f"{number}.{n}", "d")))))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, 81))


def test_one_supervisor_a_home(home: Path) -> None:
    """Two would fight over the same port and files; after a kill the lock must not stay."""
    assert supervisor_pid(home) is None
    with supervising(home):
        assert supervisor_pid(home) == os.getpid()
        with pytest.raises(ServingError, match="another `radloop serve`"), supervising(home):
            pass
    assert supervisor_pid(home) is None
    code = f"""
import os, time
from pathlib import Path
from radloop.serving.desired import supervising
with supervising(Path({str(home)!r})):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert supervisor_pid(home) is None


def test_waiting_without_a_supervisor_says_so(home: Path) -> None:
    """Else `radloop run release` hangs for a minute before it says that nothing serves."""
    with pytest.raises(ServingError, match="nothing serves this home") as caught:
        rollout.wait_for(home, 1)
    assert "radloop serve" in str(caught.value)
