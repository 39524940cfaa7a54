"""A pipeline as one MLflow run with a child run a stage, and the pipe by which the children's events come back."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from radloop.engines.mlflow_project.project import as_text, gate_parameter, python_parameter, stage_point
from radloop.engines.mlflow_project.runs import Runs, tags_of
from radloop.pipeline import Node
from radloop.pipeline.records import Record, RunResult
from radloop.stage.execute import Emit
from radloop.stage.lock import hold
from radloop.stage.protocol import Event, Request, Result
from radloop.stage.store import sweep

# How a chained entry point tells its child which run and which item it is, and where events are awaited.
PART, EVENTS = "RADLOOP_MLFLOW_PART", "RADLOOP_MLFLOW_EVENTS"


class Chain:
    """The stages of a run as child runs of one MLflow run, in the order of the pipeline."""

    def __init__(
        self,
        record: Record,
        project: Path,
        runs: Runs,
        parent: str,
        environments: Mapping[str, str],
        env: Mapping[str, str],
    ) -> None:
        self.record, self.project, self.runs, self.parent = record, project, runs, parent
        self.environments, self.env = environments, env

    def run(self) -> RunResult:
        """Run what can run, close the record, and say in the parent run how it ended."""
        ended: set[str] = set()
        pipeline, home = self.record.pipeline, self.record.home
        try:
            with hold(home, pipeline.name, self.record.run_id):
                sweep(home)
                for node in pipeline.nodes:
                    if node.needs() <= ended and self._node(node):
                        ended.add(node.name)
        finally:
            result = self.record.close()
        self.runs.log_pipeline(self.parent, self.record, result)
        return result

    def _node(self, node: Node) -> bool:
        indices = range(len(self.record.items(node))) if node.map else (None,)
        return all(self._child(node, index).status == "succeeded" for index in indices)

    def _child(self, node: Node, index: int | None) -> Result:
        request = self.record.request(node, index)
        given = arguments(node, request, self.record.home)
        if node.environment != "core":
            given[python_parameter(node.environment)] = self.environments.get(node.environment, "")
        point = stage_point(self.record.pipeline, node, self.record.home, self.environments)
        parameters = {name: given.get(name, default or "") for name, (_, default) in point.parameters.items()}
        name = node.name if index is None else f"{node.name}[{index}]"
        tags = {**tags_of(self.project, node.name), "mlflow.parentRunId": self.parent}
        child = self.runs.create(name, parameters, tags)
        env = {**self.env, PART: f"{self.record.run_id}/{'' if index is None else index}"}
        self.runs.execute(child, self.project, node.name, given, env)
        result = self._result(node, index, request)
        self.runs.log_stage(child, self.record.home, request, result)
        return result

    def _result(self, node: Node, index: int | None, request: Request) -> Result:
        """What the child left; a child that left nothing has failed."""
        try:
            data = (self.record.folder_of(node, index) / "result.json").read_bytes()
            result = msgspec.json.decode(data, type=Result)
        except (OSError, msgspec.MsgspecError):
            message = "the entry point's process ended without a result: see its lines above"
            result = Result(status="failed", node=node.name, message=message, error="EngineError")
        self.record.keep(node, index, request, result)
        return result


def arguments(node: Node, request: Request, home: Path) -> dict[str, str]:
    """The parameters of a stage's entry point that differ from run to run: its artifacts, gates, and its item."""
    given = {"project": str(home)}
    for name, path in request.inputs.items():
        if isinstance(path, list):
            given[name] = as_text([str(home / one) for one in path])
        else:
            given[name] = str(home / path) if path else ""
    given.update({gate_parameter(gate): str(home / path) for gate, path in zip(node.gates, request.gates, strict=True)})
    if node.map:
        given[node.map.param] = str(request.params[node.map.param])
    return given


@contextlib.contextmanager
def watched(emit: Emit) -> Iterator[str]:
    """A named pipe by which processes that MLflow starts pass their events on as they come; yields its path."""
    failed: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(path := Path(folder, "events"))
        pipe = os.open(
            path, os.O_RDWR
        )  # for both, so that it neither waits for the first writer nor ends with the last

        def follow() -> None:
            with os.fdopen(pipe, "rb") as lines:
                for line in lines:
                    if line == b"\n":
                        return
                    try:
                        emit(msgspec.json.decode(line, type=Event))
                    except msgspec.MsgspecError:
                        continue  # half a line of a process that was killed
                    except BaseException as error:  # noqa: BLE001 - raised where the caller waits for it
                        failed.append(error)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield str(path)
        finally:
            os.write(pipe, b"\n")
            thread.join()
    if failed:
        raise failed[0]
