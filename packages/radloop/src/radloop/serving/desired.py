"""What shall be served and what is: `serving/desired.json`, `observed.json`, and the lock of the one supervisor."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from radloop.errors import ServingError
from radloop.serving.gateway import Strategy, replace_json


class ModelRef(msgspec.Struct, frozen=True):
    """A model package: its folder (absolute, or relative to the home), the registry's version and its digest."""

    package: str
    version: str
    model_digest: str


class Models(msgspec.Struct, frozen=True, omit_defaults=True):
    """`previous` is the champion before this one: where a roll-back goes."""

    champion: ModelRef | None = None
    challenger: ModelRef | None = None
    previous: ModelRef | None = None


class Routing(msgspec.Struct, frozen=True):
    """`percent` of the answers come from the challenger under "canary"; 0 otherwise."""

    strategy: Strategy = "single"
    percent: int = 0


class State(msgspec.Struct, frozen=True):
    """What shall be served.

    Raises:
        ServingError: made with a combination that means nothing.
    """

    models: Models = Models()
    routing: Routing = Routing()

    def __post_init__(self) -> None:
        if not 0 <= self.routing.percent <= 100:
            raise ServingError("percent is no share", expected="0 to 100", got=self.routing.percent)
        if self.routing.percent and self.routing.strategy != "canary":
            raise ServingError("only a canary has a share", expected="percent 0", got=self.routing)
        if self.routing.strategy != "single":
            if self.models.champion is None or self.models.challenger is None:
                raise ServingError(f"{self.routing.strategy} needs two models", expected="a champion and a challenger")
            if self.models.champion.model_digest == self.models.challenger.model_digest:
                raise ServingError("champion and challenger are the same model", got=self.models.champion.model_digest)


class Desired(State, frozen=True):
    """`State` with its number; a new state has a new one."""

    generation: int = 0


class ObservedModel(msgspec.Struct, frozen=True):
    """One predictor as the supervisor sees it. `refused`: it will not start; `last_error` says why."""

    name: str
    version: str
    digest: str
    port: int | None
    ready: bool
    restarts: int
    refused: bool
    last_error: str | None


class ObservedGateway(msgspec.Struct, frozen=True):
    """The gateway as the supervisor sees it: Envoy at a port of this machine, or a cluster's at its `url`."""

    port: int | None
    ready: bool
    restarts: int
    last_error: str | None
    url: str | None = None


class Observed(msgspec.Struct, frozen=True):
    """What is served.

    generation: the last desired state that took full effect. desired_mtime_ns: of the desired.json that this report
    looks at. routing: what is in effect: "single" too while the champion stands in for a challenger that is not ready (on
    Kubernetes). error: what hinders the next generation.
    """

    generation: int
    desired_mtime_ns: int
    models: list[ObservedModel]
    routing: Routing
    gateway: ObservedGateway
    pid: int
    at: str
    error: str | None = None


def folder(home: Path) -> Path:
    """`home/serving`, made if absent (0700)."""
    path = home / "serving"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def desire(home: Path, state: State) -> int:
    """Write the desired state, whole. The same state again changes nothing, but a predictor that refused is tried anew.

    Returns:
        The generation to wait for.
    """
    place = folder(home)
    with _locked(place / "desired.lock"):
        now = desired(home)
        if now is not None and (now.models, now.routing) == (state.models, state.routing):
            os.utime(place / "desired.json")
            return now.generation
        generation = 1 if now is None else now.generation + 1
        made = Desired(models=state.models, routing=state.routing, generation=generation)
        replace_json(place / "desired.json", made)
        return generation


def desired(home: Path) -> Desired | None:
    """The desired state, None if nothing was ever asked for.

    Raises:
        ServingError: the file cannot be understood.
    """
    path = home / "serving" / "desired.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Desired)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ServingError(
            "serving/desired.json cannot be understood",
            expected="what radloop wrote there",
            got=error,
            next_step="undo the change, or delete the file and release again",
        ) from None


def desired_mtime_ns(home: Path) -> int:
    """When the desired state was last written, 0 if never."""
    try:
        return (home / "serving" / "desired.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def observed(home: Path) -> Observed | None:
    """What the supervisor last reported, None if there is no report."""
    try:
        return msgspec.json.decode((home / "serving" / "observed.json").read_bytes(), type=Observed)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def supervisor_pid(home: Path) -> int | None:
    """Pid of the supervisor that runs on this home, None if none does."""
    path = home / "serving" / "supervisor.lock"
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(path.read_text().strip() or 0)
    finally:
        os.close(file)
    return None


@contextmanager
def supervising(home: Path) -> Iterator[None]:
    """Hold the home's one supervisor lock; it falls with the process, however that ends.

    Raises:
        ServingError: another supervisor holds it; names it.
    """
    path = folder(home) / "supervisor.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServingError(
                "another `radloop serve` supervises this home",
                expected="one supervisor",
                got=f"process {path.read_text().strip() or '?'}",
                next_step="use that one, or end it first",
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
