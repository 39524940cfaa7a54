"""Compile a pipeline for Kubeflow Pipelines: gates become conditions, a mapped stage a loop, and an exit handler tells."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from radloop.artifact import Each
from radloop.engines.kubeflow import components as c
from radloop.engines.kubeflow.task import python_variable
from radloop.errors import UnsupportedByEngine
from radloop.pipeline import Node, Pipeline

_POD_GRACE_S = 600  # pulling the image and passing artifacts, on top of a stage's own limit
_RESOURCES = ("cpu", "memory", "gpu")


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Where a compiled pipeline runs.

    Attributes:
        image: with radloop and kfp, for stages of the core environment.
        image_tfdv: the same for stages of the environment `tfdv`.
        claim: the PersistentVolumeClaim that holds the project folder.
        secret: the Kubernetes Secret whose keys are the names of `env:NAME` references.
    """

    image: str = "radloop-core:latest"
    image_tfdv: str = "radloop-tfdv:latest"
    claim: str = "radloop-project"
    secret: str = "radloop"  # noqa: S105 - a name

    def image_of(self, environment: str) -> str:
        """The image of an environment."""
        return self.image_tfdv if environment == "tfdv" else self.image


def nest(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    """The gates each node stands behind, outermost first: KFP's conditions nest, and what depends on a node must stand within.

    Raises:
        UnsupportedByEngine: a node needs two that stand behind different gates; or anything else that KFP has not.
    """
    found: dict[str, tuple[str, ...]] = {}
    for node in pipeline.nodes:
        needed = [found[name] for name in node.needs()]
        base = max(needed, key=len, default=())
        if any(base[: len(other)] != other for other in needed):
            raise UnsupportedByEngine("kubeflow", node.name, "gates that do not nest")
        found[node.name] = base + tuple(gate for gate in node.gates if gate not in base)
        _check(pipeline, node, found)
    return found


def _check(pipeline: Pipeline, node: Node, nested: Mapping[str, tuple[str, ...]]) -> None:
    """Raises UnsupportedByEngine for what KFP cannot do for this node."""
    c.stage_source(node)
    if unknown := sorted(set(node.resources) - set(_RESOURCES)):
        raise UnsupportedByEngine("kubeflow", node.name, f"resource {unknown[0]!r}")
    if "{{$" in msgspec.json.encode(node.params).decode():
        raise UnsupportedByEngine("kubeflow", node.name, "parameter with '{{$' in it, which KFP replaces")
    mapped = {other.name for other in pipeline.nodes if other.map is not None}
    if mapped & {gate.split(".")[0] for gate in node.gates}:
        raise UnsupportedByEngine("kubeflow", node.name, "gate over a mapped stage")
    # KFP's compiler breaks on Collected artifacts that enter a condition or a loop (kfp 2.17.3).
    for producer in mapped & {source.split(".")[0] for source in node.inputs.values()}:
        if node.map is not None or nested[node.name] != nested[producer]:
            raise UnsupportedByEngine("kubeflow", node.name, "collection that is used behind a gate or in a loop")


class Compiler:
    """Builds one pipeline's KFP graph.

    Args:
        pipeline: what to compile.
        cluster: where it will run; None for this machine, where resources, secrets and volumes mean nothing.
        pythons: interpreter by environment, on this machine.
    """

    def __init__(
        self, pipeline: Pipeline, cluster: Cluster | None = None, pythons: Mapping[str, str] | None = None
    ) -> None:
        self.pipeline, self.cluster, self.pythons = pipeline, cluster, dict(pythons or {})
        self.nest = nest(pipeline)
        self._tasks: dict[str, Any] = {}
        self._opened: Any = None
        self._run_id: Any = None

    def graph(self) -> Any:
        """KFP's pipeline; its parameters are `project`, `run_id` (of a run that is open already) and `alert`."""
        from kfp import dsl

        def pipeline(project: Any = c.MOUNT, run_id: Any = "", alert: Any = True) -> None:
            self._project = project
            job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
            close = self._component(c.CLOSE, "core")(job=job, alert=alert, project=project)
            self._place(close, None, "core")
            with dsl.ExitHandler(close, name="run"):
                self._open(job, run_id)
                self._group(())

        pipeline.__annotations__ = {"project": str, "run_id": str, "alert": bool}
        name = f"radloop-{self.pipeline.name.replace('.', '-').replace('_', '-')}"
        return dsl.pipeline(name=name, description=f"radloop's pipeline {self.pipeline.name}")(pipeline)

    def _component(self, source: str, environment: str) -> Any:
        # kfp.local warns of an image without "python" in its name; it starts this machine's Python whatever the image.
        return c.component(source, self.cluster.image_of(environment) if self.cluster else "python:3.11")

    def _open(self, job: str, run_id: Any) -> None:
        self._run_id = run_id
        if self.cluster is None and not self.pipeline.inputs:
            return  # on this machine the run is open already, and there is nothing to hand over
        spec = msgspec.json.encode(self.pipeline, order="deterministic").decode()
        start = self._component(c.open_source(self.pipeline), "core")
        self._opened = start(spec=spec, job=job, run_id=run_id, project=self._project)
        self._run_id = self._opened.outputs["Output"]
        self._place(self._opened, None, "core")

    def _group(self, path: tuple[str, ...]) -> None:
        """Add the nodes that stand behind exactly these gates, then each group behind one more."""
        from kfp import dsl

        for node in self.pipeline.nodes:
            if self.nest[node.name] == path:
                self._tasks[node.name] = self._loop(node) if node.map else self._task(node, self._run_id, {})
        depth = len(path)
        inner = dict.fromkeys(
            other[: depth + 1] for other in self.nest.values() if len(other) > depth and other[:depth] == path
        )
        for group in inner:
            gate = group[-1].split(".")[0]
            with dsl.If(self._tasks[gate].outputs["Output"] != "stop", name=f"unless-{gate.replace('_', '-')}-stops"):
                self._group(group)

    def _loop(self, node: Node) -> Any:
        from kfp import dsl

        assert node.map is not None
        listed = self._component(c.ITEMS, "core")(listing=self._source(node.map.over), run_id=self._run_id)
        self._place(listed, None, "core")
        with dsl.ParallelFor(listed.output, name=f"each-{node.name.replace('_', '-')}") as one:
            return self._task(node, one.run, {node.map.param: one.item, "index": one.place})

    def _task(self, node: Node, run_id: Any, mapped: dict[str, Any]) -> Any:
        given = {name: value for name, value in node.params.items() if value is not None}
        given |= {name: self._source(source) for name, source in node.inputs.items()}
        given |= dict(zip(c.gates_of(node), map(self._source, node.gates), strict=False))
        given |= {"project": self._project, "run_id": run_id, "node": node.name, **mapped}
        task = self._component(c.stage_source(node), node.environment)(**given)
        self._place(task, node, node.environment)
        return task

    def _source(self, source: str) -> Any:
        """KFP's handle of an artifact, by its source in our pipeline."""
        from kfp import dsl

        if source.startswith("input:"):
            return self._opened.outputs[source.removeprefix("input:")]
        name, _, output = source.partition(".")
        handle = self._tasks[name].outputs[output]
        return dsl.Collected(handle) if self.pipeline.node(name).outputs[output] == Each.name else handle

    def _place(self, task: Any, node: Node | None, environment: str) -> None:
        """What a task needs of the machine it runs on."""
        task.set_caching_options(
            False
        )  # radloop knows by content what has been made; KFP would skip what looks at the world
        if node and node.retries:
            task.set_retry(node.retries, backoff_duration="30s" if self.cluster else "0s")
        if self.cluster is None:
            if environment in self.pythons:
                task.set_env_variable(python_variable(environment), self.pythons[environment])
            return
        from kfp import kubernetes

        kubernetes.mount_pvc(task, pvc_name=self.cluster.claim, mount_path=c.MOUNT)
        if node is None:
            return
        task.set_display_name(node.name)
        _resources(task, node.resources)
        if node.timeout_s:
            kubernetes.set_timeout(task, math.ceil(node.timeout_s) + _POD_GRACE_S)
        if names := _variables(node):
            kubernetes.use_secret_as_env(task, self.cluster.secret, {name: name for name in names})


def _resources(task: Any, resources: Mapping[str, str]) -> None:
    calls: dict[str, tuple[Callable[..., Any], ...]] = {
        "cpu": (task.set_cpu_request, task.set_cpu_limit),
        "memory": (task.set_memory_request, task.set_memory_limit),
        "gpu": (lambda count: task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(count),),
    }
    for name, amount in resources.items():
        for call in calls[name]:
            call(amount)


def _variables(node: Node) -> list[str]:
    """Names of the environment variables that a node's secrets are in; secrets in files are in the project folder."""
    references = [str(node.params[name]) for name in node.secrets]
    return sorted({one.removeprefix("env:") for one in references if one.startswith("env:")})


def export(pipelines: Iterable[Pipeline], folder: Path, cluster: Cluster) -> list[Path]:
    """Write each pipeline as the YAML that KFP takes, and each of their stages as a component to be composed by hand.

    Args:
        pipelines: what to export.
        folder: receives PIPELINE.yaml and components/STAGE.yaml; each file appears whole.
        cluster: where they will run.

    Raises:
        UnsupportedByEngine: KFP cannot do what a pipeline asks; then nothing is written.
    """
    pipelines = list(pipelines)
    for pipeline in pipelines:
        nest(pipeline)
    (folder / "components").mkdir(parents=True, exist_ok=True)
    written = [_write(Compiler(one, cluster).graph(), folder / f"{one.name}.yaml") for one in pipelines]
    for node in {node.name: node for one in pipelines for node in one.nodes}.values():
        built = c.component(c.stage_source(node), cluster.image_of(node.environment))
        written.append(_write(built, folder / "components" / f"{node.name}.yaml"))
    return written


def _write(compiled: Any, path: Path) -> Path:
    from kfp import compiler

    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    compiler.Compiler().compile(compiled, str(scratch))
    os.replace(scratch, path)
    return path
