"""What the records under runs/ say: how each pipeline last ended, and what waits for a person."""

from __future__ import annotations

import fcntl
from pathlib import Path

import msgspec

from radloop.artifact import Verdict, open_artifact
from radloop.errors import ArtifactError
from radloop.stage.protocol import Request, Result

CLINICAL = "clinical"  # the role that a gate's "wait" asks for (radloop.stage.execute)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a pipeline as its record tells. `status` may also be running, or interrupted: ended by no choice of its own."""

    run_id: str
    pipeline: str
    status: str
    results: dict[str, Result] = {}
    outputs: dict[str, str] = {}
    message: str = ""
    seconds: float = 0.0


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What a person must approve before a run goes on: the digest of a package or of a verdict."""

    digest: str
    kind: str
    role: str
    pipeline: str
    stage: str
    message: str = ""


def runs(project: Path, limit: int | None = None) -> list[Run]:
    """The runs there were, latest first. A record that cannot be read (a kill, a full disk) is left out."""
    found: list[Run] = []
    folder = project / "runs"
    for path in sorted(folder.glob("[0-9]*/run.json"), reverse=True):
        if limit is not None and len(found) == limit:
            break
        try:
            run = msgspec.json.decode(path.read_bytes(), type=Run)
        except (OSError, msgspec.MsgspecError):
            continue
        if run.status == "running" and not _is_held(folder / f".{run.pipeline}.lock", run.run_id):
            run = msgspec.structs.replace(run, status="interrupted")
        found.append(run)
    return found


def last_runs(project: Path) -> list[Run]:
    """The latest run of each pipeline, by the pipeline's name."""
    latest: dict[str, Run] = {}
    for run in runs(project):
        latest.setdefault(run.pipeline, run)
    return [latest[name] for name in sorted(latest)]


def waiting(project: Path) -> list[Waiting]:
    """What the latest runs wait for, without asking whether somebody has approved it meanwhile."""
    found = []
    for run in last_runs(project):
        for name, result in run.results.items():
            if result.status == "waiting":
                found += _subjects(project / "runs" / run.run_id / name, run, result)
    return found


def _subjects(record: Path, run: Run, result: Result) -> list[Waiting]:
    """A stage waits for its gates that say wait or, these approved, for the approval of one of its inputs."""
    try:
        paths = (
            [record / "request.json"] if (record / "request.json").exists() else sorted(record.glob("*/request.json"))
        )
        request = msgspec.json.decode(paths[-1].read_bytes(), type=Request)
        subjects = [(path, CLINICAL) for path in request.gates if _says_wait(Path(path))]
        if request.approval is not None:
            subjects.append((request.inputs[request.approval.of] or "", request.approval.role))
        opened = [(open_artifact(Path(path)).description, role) for path, role in subjects]
    except (OSError, IndexError, KeyError, msgspec.MsgspecError, ArtifactError):
        return []  # removed since: the next run will say anew what it waits for
    message = result.message.splitlines()[0] if result.message else ""
    return [
        Waiting(digest=d.digest, kind=d.kind, role=role, pipeline=run.pipeline, stage=result.node, message=message)
        for d, role in opened
    ]


def _says_wait(path: Path) -> bool:
    content = open_artifact(path, Verdict).json("verdict.json")
    return isinstance(content, dict) and content.get("verdict") == "wait"


def _is_held(lock: Path, run_id: str) -> bool:
    """Whether a living process holds a pipeline's lock for this run."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return run_id in file.read()
    except OSError:
        return False
    return False
