"""Run one stage from its request: the same code under every engine."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from radloop.artifact import Artifact, Description, Each, Kind, Output, Verdict, commit, open_artifact
from radloop.errors import DefinitionError, RadloopError
from radloop.stage import Stage, load
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

    A gate that says stop gives `stopped`; one that says wait, or a missing approval, gives `waiting`; an exception
    gives `failed` with its message. `emit` receives `started`, progress and log lines, and always, last, `closed`.
    """
    began = time.perf_counter()
    emit(Event(event="started", node=request.node, at=time.time()))
    token = _emit.set((request.node, emit))
    try:
        result = _held(request, approved) or _run(load(request.stage), request)
    except RadloopError as error:
        result = Result(status="failed", node=request.node, message=str(error), error=type(error).__name__)
    except Exception as error:  # noqa: BLE001 - whatever a stage raises is its failure, with its own words
        message = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
        result = Result(status="failed", node=request.node, message=message, error=type(error).__name__)
    finally:
        _emit.reset(token)
    result = msgspec.structs.replace(result, seconds=round(time.perf_counter() - began, 6))
    emit(Event(event="closed", node=request.node, at=time.time(), status=result.status, message=result.message))
    return result


def read_verdict(artifact: Artifact[Any]) -> tuple[str, str]:
    """Verdict (pass, stop, wait) and message of a verdict artifact."""
    content = artifact.json("verdict.json")
    assert isinstance(content, dict)
    return str(content["verdict"]), str(content["message"])


def _held(request: Request, approved: Approved) -> Result | None:
    """The result of a stage that gates or a missing approval hold back; None when it may run."""
    if request.spec_version > SPEC_VERSION:
        raise DefinitionError(
            "the request is of a newer version", expected=f"at most {SPEC_VERSION}", got=request.spec_version
        )
    for path in request.gates:
        gate = open_artifact(Path(path), Verdict)
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
        subject = open_artifact(Path(request.inputs[request.approval.of] or "")).digest
        if not approved(subject, request.approval.role):
            return Result(
                status="waiting",
                node=request.node,
                message=f"waits for the approval of {request.approval.of} {subject[:12]} by a person with the role "
                f"{request.approval.role!r}\n  next: radloop approve {subject[:12]} --why ...",
            )
    return None


def _run(stage: Stage, request: Request) -> Result:
    arguments: dict[str, Any] = dict(stage.check_params(request.params))
    if stage.home is not None:
        arguments[stage.home] = Path(request.home)
    for name, port in stage.inputs.items():
        path = request.inputs.get(name)
        if path is None and not port.optional:
            raise DefinitionError(f"stage {stage.name}: input {name!r} is missing", expected="an artifact directory")
        arguments[name] = None if path is None else open_artifact(Path(path), Each if port.each else port.kind)
    if set(request.outputs) != set(stage.outputs):
        raise DefinitionError(
            f"stage {stage.name}: outputs do not match", expected=sorted(stage.outputs), got=sorted(request.outputs)
        )
    outputs: dict[str, Output[Any]] = {name: Output(_scratch(Path(path))) for name, path in request.outputs.items()}
    try:
        stage.function(**arguments, **outputs)
        written = {
            name: _commit(out, Path(request.outputs[name]), stage.outputs[name].kind) for name, out in outputs.items()
        }
    finally:
        for out in outputs.values():
            shutil.rmtree(out.path, ignore_errors=True)
    message = ""
    for name, port in stage.outputs.items():
        if issubclass(port.kind, Verdict):
            message = read_verdict(open_artifact(Path(request.outputs[name])))[1]
    return Result(status="succeeded", node=request.node, outputs=written, message=message)


def _scratch(final: Path) -> Path:
    folder = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _commit(out: Output[Any], final: Path, kind: type[Kind]) -> Description:
    return commit(out.path, final, kind, out.counts).description
