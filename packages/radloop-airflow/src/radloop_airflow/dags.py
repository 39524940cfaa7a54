"""`dag_from_spec`: a DAG made of a `pipeline.json`, in a DAG file of three lines."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import DAG, AssetAny, AssetOrTimeSchedule, BaseOperator, CronTriggerTimetable, Param

from radloop.artifact import Each
from radloop.errors import DefinitionError, UnsupportedByEngine
from radloop.pipeline import Node, Pipeline, read_pipeline
from radloop_airflow.assets import announced, asset, read
from radloop_airflow.operators import (
    CLOSE,
    DUE,
    OPEN,
    RadloopCloseOperator,
    RadloopDueOperator,
    RadloopItemsOperator,
    RadloopOpenOperator,
    RadloopStageOperator,
)
from radloop_airflow.sensors import RadloopDueSensor

_FROM = datetime(2025, 1, 1, tzinfo=UTC)
_TASK_ID = re.compile(r"[A-Za-z0-9_.-]{1,200}")


def dag_from_spec(
    spec: str | Path,
    *,
    project: str | Path,
    core: str = "",
    dag_id: str = "",
    begin: Literal["at once", "if due", "when due"] = "at once",
    schedule: str | timedelta | None = None,
    on: Sequence[str] = (),
    ask: bool = True,
    approvers: Mapping[str, Sequence[str]] | None = None,
    notify: Sequence[str] = (),
    poke_s: float = 30.0,
    retry_delay_s: float = 10.0,
    pool: str = "",
    **options: Any,
) -> DAG:
    """Make the DAG of a pipeline.

    Args:
        spec: its pipeline.json (`radloop export`); relative to the DAG file.
        project: the project's folder, the same on every worker.
        core: interpreter of radloop's core environment on the workers; `[environments] core` in radloop.toml by default.
        dag_id: the pipeline's name by default.
        begin: "if due" skips a run that has nothing new to do, "when due" waits for it in the triggerer.
        schedule: a cron expression or preset such as `@continuous`.
        on: assets of this project (`dataset`, `model`, ...) any of which starts a run; with `schedule`, either does.
        ask: a stage that waits for a person asks in Airflow; without it, it fails with the command that approves.
        approvers: Airflow users who may answer, by role; whoever may act on the DAG, by default.
        notify: mail addresses that are told of a run that did not succeed, over the connection `smtp_default`.
        poke_s: seconds between two questions whether the pipeline is due.
        retry_delay_s: seconds before a failed stage is tried again.
        pool: the pool of stages that declare resources; it must exist.
        options: anything else that a DAG takes.

    Raises:
        DefinitionError: the spec cannot be read, or is of a newer version.
        UnsupportedByEngine: the pipeline asks what Airflow cannot do.
    """
    path = _beside_caller(Path(spec))
    pipeline = _read(path)
    check(pipeline)
    named: dict[str, Any] = {"project": str(project), "core": core}
    standard = _standard(pipeline, str(project), timedelta(seconds=retry_delay_s))
    with DAG(
        dag_id or pipeline.name, **{**standard, "schedule": _schedule(str(project), schedule, on), **options}
    ) as dag:
        inlets = [asset(str(project), name) for name in read(pipeline)]
        opened = RadloopOpenOperator(
            task_id=OPEN, pipeline=pipeline.name, spec=str(path), retries=0, inlets=inlets, **named
        )
        if begin == "if due":
            RadloopDueOperator(task_id=DUE, pipeline=pipeline.name, **named) >> opened
        elif begin == "when due":
            RadloopDueSensor(task_id=DUE, pipeline=pipeline.name, poke_s=poke_s, **named) >> opened
        closed = RadloopCloseOperator(
            task_id=CLOSE,
            announces=announced(pipeline),
            alert=not notify,  # one mail is enough
            on_failure_callback=[_notifier(pipeline, notify)] if notify else None,
            trigger_rule="all_done",
            retries=0,
            **named,
        )
        by_role = {role: list(users) for role, users in (approvers or {}).items()}
        _stages(pipeline, opened, closed, pool, ask=ask, approvers=by_role, **named)
    return dag


def check(pipeline: Pipeline) -> None:
    """Refuse what Airflow cannot do. Raises UnsupportedByEngine, naming stage and feature."""
    mapped = {node.name for node in pipeline.nodes if node.map}
    taken = {OPEN, CLOSE, DUE} | {_listing(name) for name in mapped}
    for node in pipeline.nodes:
        if node.name in taken:
            raise UnsupportedByEngine("airflow", node.name, "stage of this name: it is that of a task of its own")
        if not _TASK_ID.fullmatch(node.name):
            raise UnsupportedByEngine("airflow", node.name, "task id but of ASCII letters, digits, '_', '-' and '.'")
        if node.map and node.map.over.partition(".")[0] in mapped:
            raise UnsupportedByEngine("airflow", node.name, "mapping over what a mapped stage leaves")


def _stages(pipeline: Pipeline, opened: BaseOperator, closed: BaseOperator, pool: str, **named: Any) -> None:
    tasks: dict[str, Any] = {}
    mapped = {node.name for node in pipeline.nodes if node.map}
    for node in pipeline.nodes:
        options = {**named, **_task_options(node, pool)}
        if node.needs() & mapped:  # of no items none runs, which is no failure
            options["trigger_rule"] = "none_failed"
        before = [tasks[name] for name in sorted(node.needs())] or [opened]
        if node.map:
            given = {"project": named["project"], "core": named["core"]}
            listing = RadloopItemsOperator(task_id=_listing(node.name), node=node.name, retries=0, **given)
            before >> listing
            tasks[node.name] = RadloopStageOperator.partial(**options).expand(index=listing.output)
        else:
            tasks[node.name] = RadloopStageOperator(**options)
        before >> tasks[node.name]
    needed = set().union(*(node.needs() for node in pipeline.nodes))
    for name, task in tasks.items():
        if name not in needed:
            task >> closed


def _task_options(node: Node, pool: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "task_id": node.name,
        "node": node.name,
        "retries": node.retries,
        "doc_md": _say_node(node),
    }
    if pool and node.resources:
        options["pool"] = pool
    return options


def _listing(name: str) -> str:
    return f"{name}-items"


def _beside_caller(spec: Path) -> Path:
    """A relative path is meant from the DAG file: the first caller outside this module."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return (Path(frame.f_code.co_filename).parent / spec).resolve() if frame else spec.resolve()


def _read(path: Path) -> Pipeline:
    try:
        return read_pipeline(path.read_bytes())
    except OSError as error:
        raise DefinitionError(
            "pipeline.json cannot be read",
            expected="a file that `radloop export airflow` wrote, beside the DAG file",
            got=str(error),
        ) from None


def _standard(pipeline: Pipeline, project: str, retry_delay: timedelta) -> dict[str, Any]:
    """What a DAG is given unless its file says otherwise: one run at a time, for a second is refused while the first works."""
    return {
        "start_date": _FROM,
        "catchup": False,
        "max_active_runs": 1,
        "tags": ["radloop", Path(project).name],
        "doc_md": _say_pipeline(pipeline),
        "params": {"always": Param(False, type="boolean", description="Run even if nothing new is there.")},
        "default_args": {"retries": 3, "retry_delay": retry_delay, "retry_exponential_backoff": False},
    }


def _schedule(project: str, time: str | timedelta | None, on: Sequence[str]) -> Any:
    condition = AssetAny(*(asset(project, name) for name in on)) if on else None
    if condition is None:
        return time
    if time is None:
        return condition
    if not isinstance(time, str):
        raise DefinitionError("a schedule beside assets must be a cron expression", expected="'@daily'", got=time)
    return AssetOrTimeSchedule(timetable=CronTriggerTimetable(time, timezone="UTC"), assets=condition)


def _notifier(pipeline: Pipeline, to: Sequence[str]) -> SmtpNotifier:
    return SmtpNotifier(
        to=list(to),
        subject="radloop: {{ dag.dag_id }} did not succeed",
        html_content=f"<p>The pipeline {pipeline.name} did not succeed: DAG run {{{{ run_id }}}}.</p>"
        "<p>{{ exception | e }}</p><p><a href='{{ ti.log_url }}'>log</a></p>",
    )


def _say_pipeline(pipeline: Pipeline) -> str:
    return f"radloop pipeline `{pipeline.name}`: " + ", ".join(f"`{node.name}`" for node in pipeline.nodes)


def _say_node(node: Node) -> str:
    """What a person sees of a stage in Airflow. Secrets stand in it as the references that the spec holds."""
    facts: dict[str, Any] = {
        "stage": node.stage,
        "environment": node.environment,
        "reads": ", ".join(node.inputs.values()),
        "leaves": ", ".join(
            f"{output} ({'each' if kind == Each.name else kind})" for output, kind in node.outputs.items()
        ),
        "stopped by": ", ".join(node.gates),
        "approval": f"of {node.approval.of}, by {node.approval.role}" if node.approval else "",
        "once for each of": node.map.over if node.map else "",
        "limit": f"{node.timeout_s:g} s" if node.timeout_s else "",
        "parameters": f"`{msgspec.json.encode(node.params).decode()}`" if node.params else "",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
