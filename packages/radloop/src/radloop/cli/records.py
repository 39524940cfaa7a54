"""What the records under runs/ say: how each pipeline last ended, and what waits for a person."""

from __future__ import annotations

from pathlib import Path

import msgspec

from radloop.artifact import Verdict, open_artifact
from radloop.errors import ArtifactError, DefinitionError
from radloop.pipeline.records import Record, RunResult, read_run
from radloop.stage.lock import holder
from radloop.stage.protocol import Request, Result

CLINICAL = "clinical"  # the role that a gate's "wait" asks for (radloop.stage.execute)


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What a person must approve before a run goes on: the digest of a package or of a verdict."""

    digest: str
    kind: str
    role: str
    pipeline: str
    stage: str
    message: str = ""


# Engines whose one process walks the whole run: without it, the run has ended.
_WALKED = ("local", "subprocess", "kubernetes", "mlflow-project")


def runs(project: Path, limit: int | None = None) -> list[RunResult]:
    """The runs there were, latest first. A record that cannot be read (a kill, a full disk) is left out.

    A status may also be running, or interrupted: ended by no choice of its own. What the stages of such a run have left so
    far is read from their own records, for run.json says it only when a run ends.
    """
    found: list[RunResult] = []
    folder = project / "runs"
    for path in sorted(folder.glob("[0-9]*/run.json"), reverse=True):
        if limit is not None and len(found) == limit:
            break
        try:
            run = read_run(path)
            if run.status == "running":
                run = msgspec.structs.replace(run, results=Record.load(project, run.run_id).results)
        except (OSError, msgspec.MsgspecError, DefinitionError):
            continue
        walked = run.status == "running" and run.engine in _WALKED
        if walked and f"run {run.run_id}," not in holder(project, run.pipeline):
            run = msgspec.structs.replace(run, status="interrupted")
        found.append(run)
    return found


def last_runs(project: Path) -> list[RunResult]:
    """The latest run of each pipeline, by the pipeline's name."""
    latest: dict[str, RunResult] = {}
    for run in runs(project):
        latest.setdefault(run.pipeline, run)
    return [latest[name] for name in sorted(latest)]


def waiting(project: Path) -> list[Waiting]:
    """What the latest runs wait for, without asking whether somebody has approved it meanwhile."""
    found = []
    for run in last_runs(project):
        for result in run.results.values():
            if result.status == "waiting":
                found += _subjects(project, project / "runs" / run.run_id / result.node, run, result)
    return found


def _subjects(project: Path, record: Path, run: RunResult, result: Result) -> list[Waiting]:
    """A stage waits for its gates that say wait or, these approved, for the approval of one of its inputs."""
    try:
        paths = (
            [record / "request.json"] if (record / "request.json").exists() else sorted(record.glob("*/request.json"))
        )
        request = msgspec.json.decode(paths[-1].read_bytes(), type=Request)
        subjects = [(project / path, CLINICAL) for path in request.gates if _says_wait(project / path)]
        if request.approval is not None:
            subjects.append((project / str(request.inputs[request.approval.of]), request.approval.role))
        opened = [(open_artifact(path).description, role) for path, role in subjects]
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
