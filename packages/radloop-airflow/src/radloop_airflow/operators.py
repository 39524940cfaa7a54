"""Operators: the tasks of a DAG that `dag_from_spec` makes.

    due (or a sensor) -> open -> the pipeline's stages -> close

Each runs in an Airflow worker, which knows radloop's base only, and starts the Python of the environment that knows the rest.
Tasks share the run's record under the project's home, not XCom: that holds a run id, statuses and digests.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, DownstreamTasksSkipped

from radloop.artifact import Verdict, open_artifact
from radloop.errors import RadloopError
from radloop.pipeline import Node
from radloop.pipeline.records import Record
from radloop.pipeline.run import Launcher, run_node
from radloop.stage.execute import read_verdict
from radloop.stage.launch import end_all
from radloop.stage.protocol import Event, Result
from radloop.stage.store import sweep
from radloop_airflow.approval import ask_person, record_answer, waits_for
from radloop_airflow.assets import asset
from radloop_airflow.core import Core

if TYPE_CHECKING:
    from airflow.sdk import Context

_PROGRESS_EVERY_S = 5.0


@contextlib.contextmanager
def refused(*, retry: bool = False) -> Iterator[None]:
    """Turn radloop's own errors into a task's failure, with their text; one that trying again cannot mend, by default."""
    try:
        yield
    except RadloopError as error:
        raise (AirflowException if retry else AirflowFailException)(str(error)) from None


class _Operator(BaseOperator):
    """What all have: a project, and the core environment's Python (see `Core`)."""

    def __init__(self, *, project: str, core: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.project, self.core = project, core

    @property
    def asked(self) -> Core:
        """The project's core environment."""
        return Core(self.project, self.core)

    def opened(self, context: Context) -> Record:
        """The record of this DAG run's run. Fails the task where none was opened."""
        told = context["ti"].xcom_pull(task_ids=OPEN)
        if not told:
            raise AirflowFailException(f"the run was never opened: see the log of the task {OPEN!r}")
        return Record.load(Path(self.project), told["run_id"])


OPEN, CLOSE, DUE = "open", "close", "due"


class RadloopDueOperator(_Operator):
    """Goes on if a pipeline has something new to do, and skips the rest of the DAG otherwise; the log says why.

    The DAG's parameter `always` passes it.
    """

    ui_color = "#e6f1f2"

    def __init__(self, *, pipeline: str, **options: Any) -> None:
        super().__init__(**options)
        self.pipeline = pipeline

    def execute(self, context: Context) -> str:
        """Ask `radloop engine due`."""
        if context["params"].get("always"):
            return "asked for by a person"
        with refused(retry=True):
            told = self.asked.ask("engine", "due", self.pipeline)
        self.log.info("%s is %s: %s", self.pipeline, "due" if told["due"] else "not due", told["why"])
        if not told["due"]:
            rest = [task.task_id for task in self.get_flat_relatives(upstream=False)]
            raise DownstreamTasksSkipped(tasks=rest)  # type: ignore[no-untyped-call]
        return str(told["why"])


class RadloopOpenOperator(_Operator):
    """Begins a run: finds the pipeline's inputs and opens its record. Refused while another run of the pipeline works.

    Args:
        pipeline: its name.
        spec: its pipeline.json.
    """

    ui_color = "#e6f1f2"

    def __init__(self, *, pipeline: str, spec: str, **options: Any) -> None:
        super().__init__(**options)
        self.pipeline, self.spec = pipeline, spec

    def execute(self, context: Context) -> dict[str, Any]:
        """Ask `radloop engine open`; its run id and inputs."""
        with refused():
            by = getattr(context["dag_run"], "triggering_user_name", None) or ""  # nobody, of a schedule or an asset
            more = ("--engine", "airflow", "--spec", self.spec, "--by", by)
            told = self.asked.ask("engine", "open", self.pipeline, *more)
        sweep(Path(self.project))
        self.log.info("run %s of %s, inputs: %s", told["run_id"], self.pipeline, told["inputs"] or "none")
        return told


class RadloopCloseOperator(_Operator):
    """Ends a run, however its stages ended; fails unless it succeeded, so that no DAG run is green when the run is not.

    What others wait for is announced here, as assets, and not by the stage that makes it: a pipeline takes its inputs from runs
    that have ended.

    Args:
        alert: mail the recipients of `[alerts]` in radloop.toml where it did not succeed.
        announces: by asset name, the `stage.output` it stands for.
    """

    ui_color = "#e6f1f2"

    def __init__(self, *, alert: bool = True, announces: dict[str, str] | None = None, **options: Any) -> None:
        super().__init__(outlets=[asset(options["project"], name) for name in announces or {}], **options)
        self.alert, self.announces = alert, announces or {}

    def execute(self, context: Context) -> dict[str, Any]:
        """Ask `radloop engine close`."""
        with refused():
            run_id = self.opened(context).run_id
            told = self.asked.ask("engine", "close", run_id, *(["--alert"] if self.alert else []))
        if told["status"] != "succeeded":
            raise AirflowFailException(f"{told['status']}: {told['message']}")
        for name, source in self.announces.items():
            node, _, output = source.partition(".")
            made = told["results"][node]["outputs"][output]
            extra = {"digest": made["digest"], "run_id": run_id, "source": source, **made.get("counts", {})}
            context["outlet_events"][asset(self.project, name)].extra.update(extra)
        return {"run_id": run_id, "status": told["status"]}


class RadloopItemsOperator(_Operator):
    """Lists what a mapped stage runs once for each of: its indices, for dynamic task mapping."""

    def __init__(self, *, node: str, **options: Any) -> None:
        super().__init__(**options)
        self.node = node

    def execute(self, context: Context) -> list[int]:
        """The indices of the items that an earlier stage has listed."""
        with refused():
            record = self.opened(context)
            items = record.items(record.pipeline.node(self.node))
        if len(items) > (most := conf.getint("core", "max_map_length")):
            raise AirflowFailException(
                f"{len(items)} items are more than Airflow maps\n  expected: at most {most}\n"
                "  next: raise AIRFLOW__CORE__MAX_MAP_LENGTH"
            )
        return list(range(len(items)))


class RadloopStageOperator(_Operator):
    """Runs one stage of a run, under the Python of its environment.

    A failed stage is tried again as its `retries` say; one that a gate stops is not, and shows the gate's own words. One that
    waits for a person asks in Airflow's required actions (`ask`), or fails with the command that approves.

    Args:
        node: the stage's name in the pipeline.
        index: which item, of a mapped one.
        ask: ask a person in Airflow; otherwise `radloop approve` is what helps.
        approvers: who may answer, by role; anyone whom Airflow lets, where a role is not in it.
    """

    ui_color = "#d7ebe4"

    def __init__(
        self,
        *,
        node: str,
        index: int | None = None,
        ask: bool = True,
        approvers: dict[str, list[str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.node, self.index = node, index
        self.ask, self.approvers = ask, approvers or {}

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the stage; what it left, by digest."""
        with refused():
            record = self.opened(context)
            result = self._run(record, record.pipeline.node(self.node), context)
            if result.status == "waiting" and self.ask and waits_for(self, record):
                ask_person(self, context, record, result)
            return self._concluded(record, result)

    def answered(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after a person's answer: record the approval, ask the gates again that look at the world, and run."""
        with refused():
            record = self.opened(context)
            record_answer(self, record, event)
            for name in again(record, record.pipeline.node(self.node)):
                self._run(record, record.pipeline.node(name), context)
            result = self._run(record, record.pipeline.node(self.node), context)
            return self._concluded(record, result)

    def on_kill(self) -> None:
        """End the stage's process and all it has started."""
        end_all()

    def _run(self, record: Record, node: Node, context: Context) -> Result:
        index = self.index if node.name == self.node else None
        launcher = Launcher(self.asked.environments())
        emit = record.emitter(self._watch())
        return run_node(record, node, index, launcher, emit, attempt=context["ti"].try_number)

    def _watch(self) -> Callable[[Event], None]:
        """What puts events into the task's log; progress at most every few seconds."""
        said = 0.0

        def watch(event: Event) -> None:
            nonlocal said
            if event.event != "progress":
                self.log.info("%s: %s", event.node, " ".join(filter(None, (event.event, event.status, event.message))))
            elif (now := time.monotonic()) - said >= _PROGRESS_EVERY_S:
                self.log.info("%s: %s of %s %s", event.node, event.done, event.total, event.message)
                said = now

        return watch

    def _concluded(self, record: Record, result: Result) -> dict[str, Any]:
        if result.status == "failed":
            raise AirflowException(result.message)
        if result.status != "succeeded":
            raise AirflowFailException(result.message)
        if stop := last_word(record, record.pipeline.node(self.node), result):
            raise AirflowFailException(stop)
        digests = {output: description.digest for output, description in result.outputs.items()}
        return {"status": result.status, "place": result.place, "cached": result.cached, "outputs": digests}


def last_word(record: Record, node: Node, result: Result) -> str:
    """What a verdict says that stops the run and has no stage behind it to be stopped; else empty."""
    gated = {gate for other in record.pipeline.nodes for gate in other.gates}
    for output, kind in node.outputs.items():
        if kind == Verdict.name and f"{node.name}.{output}" not in gated:
            verdict, message = read_verdict(open_artifact(record.home / result.place / output))
            if verdict == "stop":
                return message
    return ""


def again(record: Record, node: Node) -> list[str]:
    """Stages that look at the world and whose verdicts a person let pass: they go on where they stood (a canary's steps)."""
    gates = record.request(node).gates if not node.map else ()
    waited = [read_verdict(open_artifact(record.home / gate))[0] == "wait" for gate in gates]
    names = [source.partition(".")[0] for source, wait in zip(node.gates, waited, strict=False) if wait]
    return [name for name in names if not record.pipeline.node(name).cache]
