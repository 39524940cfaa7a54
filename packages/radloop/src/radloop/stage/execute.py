"""Run one stage from its request: the same code under every engine. What was made from the same before is not made again."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from radloop.artifact import Artifact, Output, Verdict, commit, each, open_artifact
from radloop.errors import DefinitionError, NotYet, RadloopError
from radloop.stage import Port, Stage, load, store
from radloop.stage.keys import key
from radloop.stage.lock import hold
from radloop.stage.protocol import SPEC_VERSION, Event, Request, Result

T = TypeVar("T")
Emit = Callable[[Event], None]
# Whether the artifact of this digest was approved by someone who holds this role.
Approved = Callable[[str, str], bool]

_emit: ContextVar[tuple[str, Emit] | None] = ContextVar("radloop_emit", default=None)
_PROGRESS_EVERY_S = 0.1


def never_approved(digest: str, role: str) -> bool:
    """The approvals of an engine that was given none: nothing is approved."""
    return False


def log(message: str) -> None:
    """Say something to whoever watches the stage. Never PHI."""
    if (here := _emit.get()) is not None:
        here[1](Event(event="log", node=here[0], at=time.time(), message=message))


def progress(done: int, total: int, message: str = "") -> None:
    """Report progress; the plain callback that domain functions take."""
    if (here := _emit.get()) is not None:
        here[1](Event(event="progress", node=here[0], at=time.time(), done=done, total=total, message=message))


def track(items: Iterable[T], total: int | None = None, message: str = "") -> Iterator[T]:
    """Yield the items and report progress, at most ten times a second."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    said = 0.0
    for done, item in enumerate(items):
        if (now := time.monotonic()) - said > _PROGRESS_EVERY_S:
            progress(done, total, message)
            said = now
        yield item
    progress(total, total, message)


def execute(request: Request, emit: Emit, approved: Approved = never_approved) -> Result:
    """Run the stage a request names, commit its outputs, and say how it ended. Never raises for a stage's failure.

    What stands under the same key is taken instead (`cached`). A gate that says stop gives `stopped`; one that says wait,
    or a missing approval, or `NotYet`, gives `waiting`; any other exception gives `failed` with its message. `emit` receives
    `started`, progress and log lines, and always, last, `closed`.
    """
    began = time.perf_counter()
    emit(Event(event="started", node=request.node, at=time.time()))
    token = _emit.set((request.node, emit))
    try:
        with _lock(request):
            result = _run(load(request.stage), request, approved)
    except NotYet as error:
        result = Result(status="waiting", node=request.node, message=str(error), error=type(error).__name__)
    except RadloopError as error:
        result = Result(status="failed", node=request.node, message=str(error), error=type(error).__name__)
    except Exception as error:  # noqa: BLE001 - whatever a stage raises is its failure, with its own words
        result = Result(status="failed", node=request.node, message=_words(error), error=type(error).__name__)
    finally:
        _emit.reset(token)
    result = msgspec.structs.replace(result, seconds=0.0 if result.cached else round(time.perf_counter() - began, 6))
    said = "unchanged" if result.cached else result.message
    emit(Event(event="closed", node=request.node, at=time.time(), status=result.status, message=said))
    return result


def _words(error: Exception) -> str:
    """What is told of an error that is not radloop's own: its class and where it was raised.

    Its text may repeat a value out of someone's file, and a result travels: to an orchestrator's log, to MLflow, into a mail.
    """
    if isinstance(error, OSError):
        text = error.strerror or "its text is left out"
    elif (
        isinstance(error, ImportError | NameError | AttributeError | MemoryError)
        or os.environ.get("RADLOOP_DEBUG") == "1"
    ):
        text = str(error)
    else:
        text = "its text is left out, for it may hold PHI; RADLOOP_DEBUG=1 shows it"
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-6))
    return f"{type(error).__name__}: {text}\n{frames}".rstrip()


def _lock(request: Request) -> contextlib.AbstractContextManager[None]:
    if not (request.pipeline and request.run_id):
        return contextlib.nullcontext()
    return hold(Path(request.home), request.pipeline, request.run_id)


def read_verdict(artifact: Artifact[Any]) -> tuple[str, str]:
    """Verdict (pass, stop, wait) and message of a verdict artifact."""
    content = artifact.json("verdict.json")
    assert isinstance(content, dict)
    return str(content["verdict"]), str(content["message"])


class _Opened:
    """What a request is given, opened: inputs by name, gates in order."""

    def __init__(self, stage: Stage, request: Request, home: Path) -> None:
        if request.spec_version > SPEC_VERSION:
            raise DefinitionError(
                "the request is of a newer version", expected=f"at most {SPEC_VERSION}", got=request.spec_version
            )
        self.inputs = {name: _open(stage, port, request.inputs.get(name), home) for name, port in stage.inputs.items()}
        self.gates = [open_artifact(home / path, Verdict) for path in request.gates]

    def digests(self) -> dict[str, str | None]:
        """Content digest of each input and gate. With the gates in a key, what ran once under them need not ask again."""
        found = {name: given.digest if given else None for name, given in self.inputs.items()}
        return found | {f"gate {number}": gate.digest for number, gate in enumerate(self.gates)}


def _open(stage: Stage, port: Port, given: str | list[str] | None, home: Path) -> Artifact[Any] | None:
    if given is None and not port.optional:
        raise DefinitionError(f"stage {stage.name}: input {port.name!r} is missing", expected="an artifact directory")
    if given is None:
        return None
    if isinstance(given, list) != port.each:
        raise DefinitionError(
            f"stage {stage.name}: input {port.name!r} is of another number",
            expected="a list of artifacts" if port.each else "one artifact",
            got=given,
        )
    if isinstance(given, list):
        return each([home / path for path in given], port.kind)
    return open_artifact(home / given, port.kind)


def _held(request: Request, opened: _Opened, approved: Approved) -> Result | None:
    """The result of a stage that gates or a missing approval hold back; None when it may run."""
    for gate in opened.gates:
        verdict, message = read_verdict(gate)
        if verdict == "stop":
            return Result(status="stopped", node=request.node, message=message)
        if verdict == "wait" and not approved(gate.digest, "clinical"):
            return Result(
                status="waiting",
                node=request.node,
                message=f"{message}\n  next: radloop approve {gate.digest[:12]} --why ...",
            )
    if request.approval is not None:
        given = opened.inputs[request.approval.of]
        subject = given.digest if given else ""
        if not approved(subject, request.approval.role):
            return Result(
                status="waiting",
                node=request.node,
                message=f"waits for the approval of {request.approval.of} {subject[:12]} by a person with the role "
                f"{request.approval.role!r}\n  next: radloop approve {subject[:12]} --why ...",
            )
    return None


def _run(stage: Stage, request: Request, approved: Approved) -> Result:
    home = Path(request.home).resolve()
    arguments: dict[str, Any] = dict(stage.check_params(request.params))
    if stage.home is not None:
        arguments[stage.home] = home
    opened = _Opened(stage, request, home)
    made_of = key(request, opened.digests())
    if stage.cache and (known := store.find(home, made_of)) is not None:
        return msgspec.structs.replace(known, node=request.node, cached=True)
    if (held := _held(request, opened, approved)) is not None:
        return held
    with store.writing(home, made_of) as folder:
        outputs: dict[str, Output[Any]] = {name: Output(folder / f".{name}") for name in stage.outputs}
        for out in outputs.values():
            out.path.mkdir()
        stage.function(**arguments, **opened.inputs, **outputs)
        result = Result(status="succeeded", node=request.node)
        for name, out in outputs.items():
            made = commit(out.path, folder / name, stage.outputs[name].kind, out.counts)
            result.outputs[name] = made.description
            if issubclass(stage.outputs[name].kind, Verdict):
                result = msgspec.structs.replace(result, message=read_verdict(made)[1])
        place = made_of if stage.cache else store.key_of_made(request.stage, result)
        return store.publish(home, folder, place, result)
