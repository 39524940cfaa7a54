"""From one model to the next: what the stages deploy, judge, promote and roll back do.

Each step writes the desired state and waits until it is observed. All there is to remember stands in
`serving/desired.json`; a step that was done already changes nothing, so a release that was killed is run again as it
was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from radloop.errors import ServingError
from radloop.imaging.transforms import Preprocessing
from radloop.serving import client
from radloop.serving.desired import (
    Desired,
    ModelRef,
    Models,
    Observed,
    Routing,
    State,
    desire,
    desired,
    desired_mtime_ns,
    observed,
    supervisor_pid,
)

STEPS = (5, 25, 50, 100)
"""Shares of a canary's answers, in percent."""

SMOKE_TOLERANCE = 1e-4
_POLL_S = 0.05
_SILENCE_S = 10.0


class Smoke(msgspec.Struct, frozen=True):
    """How far served probabilities are from those stored with the package, over `n` reference images."""

    n: int
    max_absolute_difference: float


def single(home: Path, champion: ModelRef) -> State:
    """All answers from `champion`; the one before stays known as `previous`."""
    now = desired(home) or Desired()
    before = now.models.champion
    previous = now.models.previous if before == champion else before
    return State(models=Models(champion=champion, previous=previous))


def shadow(home: Path, challenger: ModelRef) -> State:
    """The challenger is asked too; its answers are logged and thrown away.

    Raises:
        ServingError: no model is served yet.
    """
    return _beside(home, challenger, Routing("shadow"))


def canary(home: Path, challenger: ModelRef, percent: int) -> State:
    """The challenger gives `percent` of the answers. Raises as `shadow`."""
    return _beside(home, challenger, Routing("canary", percent))


def promoted(home: Path) -> State:
    """The challenger becomes the champion, the champion `previous`.

    Raises:
        ServingError: there is no challenger.
    """
    now = desired(home) or Desired()
    if now.models.challenger is None:
        raise ServingError("there is no challenger to promote", next_step="release a model version first")
    return State(models=Models(champion=now.models.challenger, previous=now.models.champion))


def rolled_back(home: Path) -> State:
    """Without the challenger if there is one, else back to the champion before.

    Raises:
        ServingError: there is nothing to go back to.
    """
    models = (desired(home) or Desired()).models
    if models.challenger is not None:
        return State(models=Models(champion=models.champion, previous=models.previous))
    if models.previous is None:
        raise ServingError(
            "there is nothing to roll back to",
            expected="a challenger under release, or a champion before this one",
            got="neither",
            next_step="`radloop status` shows what is served",
        )
    return State(models=Models(champion=models.previous))


def steps_left(home: Path, challenger: ModelRef) -> tuple[int, ...]:
    """The canary steps that a release of `challenger`, begun or not, still has before it."""
    now = desired(home) or Desired()
    begun = now.models.challenger == challenger and now.routing.strategy == "canary"
    return tuple(step for step in STEPS if step > (now.routing.percent if begun else 0))


def deploy(
    home: Path, state: State, *, timeout_s: float = 60.0, progress: Callable[[int, int], None] | None = None
) -> Observed:
    """`desire`, then `wait_for`."""
    return wait_for(home, desire(home, state), timeout_s=timeout_s, progress=progress)


def wait_for(
    home: Path, generation: int, *, timeout_s: float = 60.0, progress: Callable[[int, int], None] | None = None
) -> Observed:
    """Wait until the supervisor has brought a generation (or a later one) into effect and its predictors are ready.

    Args:
        progress: called with (predictors ready, predictors wanted) whenever that changes.

    Raises:
        ServingError: no supervisor runs; a predictor refuses to start; time is up. With the supervisor's own words.
    """
    until, shown = time.monotonic() + timeout_s, (-1, -1)
    while True:
        _check_supervisor(home)
        now = observed(home)
        if now is not None and _is_fresh(now, home):
            count = (sum(model.ready for model in now.models), len(now.models))
            if progress is not None and count != shown:
                progress(*(shown := count))
            if now.generation >= generation and count[0] == count[1] and now.gateway.ready:
                return now
            _check_refused(now)
        if time.monotonic() > until:
            raise ServingError(
                f"the release was not in effect within {timeout_s:g} s",
                expected=f"generation {generation} with every predictor ready",
                got=_in_words(now),
                next_step="look at serving/logs and run the same command again: it goes on where it stopped",
            )
        time.sleep(_POLL_S)


def smoke(
    package: Path, url: str, *, token: str | None = None, model: str = "default", tolerance: float = SMOKE_TOLERANCE
) -> Smoke:
    """Send the package's reference images and compare the answers with the packaged ones.

    Args:
        package: the package folder.
        url: of the predictor or the gateway.

    Raises:
        ServingError: an answer differs by more than `tolerance`, or there is none.
    """
    preprocessing = msgspec.json.decode((package / "preprocessing.json").read_bytes(), type=Preprocessing)
    with np.load(package / "reference.npz", allow_pickle=False) as stored:
        inputs, outputs = preprocessing.windowed(stored["native"]), stored["probabilities"].reshape(-1)
    got = np.array(client.predict_tensor(url, inputs, token=token, model=model))
    if got.shape != outputs.shape:
        raise ServingError("the smoke test got another number of answers", expected=outputs.size, got=got.size)
    worst = float(np.abs(got - outputs).max())
    if not worst <= tolerance:
        raise ServingError(
            "the served model does not answer as the packaged one",
            expected=f"probabilities within {tolerance:g} of reference.npz",
            got=f"a difference of {worst:g}",
            next_step="package the model again; if that does not help, this machine computes differently",
        )
    return Smoke(n=len(outputs), max_absolute_difference=worst)


def predictor_url(now: Observed, model_digest: str) -> str:
    """Where one model's predictor listens, past the gateway: for a smoke test before any traffic.

    Raises:
        ServingError: no such predictor is ready.
    """
    for model in now.models:
        if model.digest == model_digest and model.port is not None:
            return f"http://127.0.0.1:{model.port}"
    raise ServingError("this model is not served", expected=model_digest, got=_in_words(now))


def gateway_url(home: Path) -> str:
    """Where the gateway listens.

    Raises:
        ServingError: no supervisor runs, or its gateway is not ready.
    """
    _check_supervisor(home)
    now = observed(home)
    if now is not None and now.gateway.url:
        return now.gateway.url
    if now is None or now.gateway.port is None:
        raise ServingError("the gateway is not ready", got=_in_words(now), next_step="wait a moment and ask again")
    return f"http://127.0.0.1:{now.gateway.port}"


def _beside(home: Path, challenger: ModelRef, routing: Routing) -> State:
    now = desired(home) or Desired()
    if now.models.champion is None:
        raise ServingError(
            f"{routing.strategy} needs a champion", got="no model is served", next_step="release a first version"
        )
    models = Models(champion=now.models.champion, challenger=challenger, previous=now.models.previous)
    return State(models=models, routing=routing)


def _check_supervisor(home: Path) -> None:
    if supervisor_pid(home) is None:
        raise ServingError(
            "nothing serves this home",
            expected="a running `radloop serve`",
            got="none",
            next_step="start `radloop serve` in another terminal (or as a service), then run this again",
        )


def _is_fresh(now: Observed, home: Path) -> bool:
    """Whether the report is of the supervisor that runs now, and of the desired state as it is now."""
    age_s = (datetime.now(UTC) - datetime.fromisoformat(now.at)).total_seconds()
    return now.pid == supervisor_pid(home) and age_s < _SILENCE_S and now.desired_mtime_ns >= desired_mtime_ns(home)


def _check_refused(now: Observed) -> None:
    for model in now.models:
        if model.refused:
            raise ServingError(
                f"the predictor of version {model.version} refuses to start",
                got=model.last_error,
                next_step="mend the cause, then roll back or release again",
            )


def _in_words(now: Observed | None) -> str:
    if now is None:
        return "no report from the supervisor"
    parts = [f"generation {now.generation}"]
    if now.error:
        parts.append(now.error)
    if not now.gateway.ready:
        parts.append(f"gateway not ready ({now.gateway.last_error or 'starting'})")
    for model in now.models:
        state = "ready" if model.ready else f"not ready, {model.restarts} restarts ({model.last_error or 'starting'})"
        parts.append(f"{model.name} version {model.version} {state}")
    return "; ".join(parts)
