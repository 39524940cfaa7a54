"""Pipelines: frozen data, built in plain Python with explicit handles.

    b = Builder("prepare")
    arrived = b.add(ingest)
    cleaned = b.add(deidentify, received=arrived.received, profile="research")
    prepare = b.build()

A wire that does not fit is a DefinitionError where it is written, at import. `Pipeline` is also the format of
`pipeline.json`: an engine's environment reads it without importing a single stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from radloop.artifact import Each, Kind, Verdict
from radloop.errors import DefinitionError
from radloop.stage import Port, Secret, Stage, plain
from radloop.stage.protocol import SPEC_VERSION, Approval


class Map(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Run a stage once for each item of a listed artifact and collect what the runs leave.

    Attributes:
        over: `node.output` of an artifact with a member `items.json`, a list of strings.
        param: the stage's str parameter that receives the item.
    """

    over: str
    param: str


class Input(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An artifact that a pipeline is given from outside."""

    name: str
    kind: str
    optional: bool = False


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage in a pipeline.

    Attributes:
        name: unique in the pipeline.
        stage: `module:function`.
        inputs: source by input name: `node.output`, or `input:NAME`.
        outputs: kind by output name.
        params: JSON values, defaults included; secrets are references.
        secrets: which of the parameters are secret references.
        gates: `node.output` of verdicts that must let this node run.
    """

    name: str
    stage: str
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    params: dict[str, Any] = {}
    secrets: tuple[str, ...] = ()
    environment: str = "core"
    cache: bool = True
    retries: int = 0
    timeout_s: float | None = None
    resources: dict[str, str] = {}
    gates: tuple[str, ...] = ()
    approval: Approval | None = None
    map: Map | None = None

    def needs(self) -> set[str]:
        """Names of the nodes that must have ended before this one."""
        sources = [*self.inputs.values(), *self.gates, *([self.map.over] if self.map else [])]
        return {source.split(".")[0] for source in sources if not source.startswith("input:")}


class Pipeline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stages wired to each other, in an order in which they can run; `pipeline.json` is this, encoded."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Input, ...] = ()
    spec_version: int = SPEC_VERSION

    def node(self, name: str) -> Node:
        """The node of that name. Raises DefinitionError naming those there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise DefinitionError(
            f"pipeline {self.name} has no stage {name!r}", expected=", ".join(n.name for n in self.nodes), got=name
        )

    def upto(self, name: str) -> Pipeline:
        """One node and all that it needs, in the same order, as a pipeline of its own. Raises DefinitionError as `node`."""
        wanted = {name}
        for node in reversed(self.nodes):
            if node.name in wanted:
                wanted |= node.needs()
        self.node(name)
        if len(wanted) == len(self.nodes):
            return self
        nodes = tuple(node for node in self.nodes if node.name in wanted)
        return msgspec.structs.replace(self, name=f"{self.name}.{name}", nodes=nodes)

    def to_json(self) -> bytes:
        """The bytes of `pipeline.json`, the same for equal pipelines."""
        encoded = msgspec.json.encode(self, order="deterministic")
        return msgspec.json.format(encoded, indent=2) + b"\n"


def read_pipeline(data: bytes) -> Pipeline:
    """Decode `pipeline.json`.

    Raises:
        DefinitionError: not JSON of a pipeline, wired to nothing, or of a newer version (both versions are named).
    """
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("spec_version")
        if not isinstance(version, int) or version > SPEC_VERSION:
            raise DefinitionError(
                "pipeline.json is of a version this radloop does not know",
                expected=f"spec_version up to {SPEC_VERSION}",
                got=f"spec_version {version}",
                next_step="upgrade radloop here, or export again with this version",
            )
        pipeline = msgspec.json.decode(data, type=Pipeline)
    except msgspec.MsgspecError as error:
        raise DefinitionError(
            "pipeline.json cannot be read", expected="the schema of docs/schemas/pipeline.json", got=str(error)
        ) from None
    _check_wires(pipeline)
    return pipeline


def _check_wires(pipeline: Pipeline) -> None:
    known = {f"input:{given.name}" for given in pipeline.inputs}
    for node in pipeline.nodes:
        sources = [*node.inputs.values(), *node.gates, *([node.map.over] if node.map else [])]
        if missing := sorted(set(sources) - known):
            raise DefinitionError(
                f"pipeline {pipeline.name}: stage {node.name!r} is wired to what does not come before it",
                expected=", ".join(sorted(known)) or "no input at all",
                got=", ".join(missing),
            )
        known |= {f"{node.name}.{output}" for output in node.outputs}


class Handle(msgspec.Struct, frozen=True):
    """An artifact that will be there: an output of a node, or a pipeline's input."""

    source: str
    kind: type[Kind]
    each: bool = False
    optional: bool = False


class Added:
    """A node just added: its outputs are attributes that give handles."""

    def __init__(self, node: Node, handles: dict[str, Handle]) -> None:
        self.node, self._handles = node, handles

    def __getattr__(self, name: str) -> Handle:
        try:
            return self._handles[name]
        except KeyError:
            raise DefinitionError(
                f"stage {self.node.name} has no output {name!r}",
                expected=", ".join(self._handles) or "it has no outputs",
                got=name,
            ) from None


class Builder:
    """Collects stages and their wires; `build` freezes them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: dict[str, Node] = {}
        self._inputs: dict[str, Input] = {}

    def input(self, name: str, kind: type[Kind], *, optional: bool = False) -> Handle:
        """Declare an artifact given from outside."""
        self._inputs[name] = Input(name=name, kind=kind.name, optional=optional)
        return Handle(f"input:{name}", kind, False, optional)

    def add(
        self,
        stage: Stage,
        *,
        name: str | None = None,
        gates: Iterable[Handle] = (),
        approval: Approval | None = None,
        over: Handle | None = None,
        over_param: str = "item",
        **wires: Any,
    ) -> Added:
        """Add a stage.

        Args:
            stage: the stage.
            name: its name in the pipeline; the function's name by default.
            gates: verdicts that must let it run.
            approval: the input that a person must have approved first.
            over, over_param: run it once for each item of this artifact, passed as this parameter.
            wires: a handle for each input, a JSON value for each parameter.

        Raises:
            DefinitionError: a wire or a parameter that does not fit.
        """
        name = name or stage.name
        if name in self._nodes:
            raise DefinitionError(f"pipeline {self.name} has two stages named {name!r}", next_step="give one name=...")
        mapped = Map(over=over.source, param=over_param) if over else None
        handles = {k: v for k, v in wires.items() if k in stage.inputs and v is not None}
        params = {k: v for k, v in wires.items() if k not in stage.inputs}
        self._check(name, stage, handles)
        if mapped:
            params.setdefault(over_param, "")
        node = Node(
            name=name,
            stage=stage.ref,
            inputs={k: handles[k].source for k in sorted(handles)},
            outputs={p.name: Each.name if mapped else p.kind.name for p in stage.outputs.values()},
            params=plain(stage.check_params(params)),
            secrets=tuple(sorted(k for k, (hint, _) in stage.params.items() if hint == Secret)),
            environment=stage.environment,
            cache=stage.cache,
            retries=stage.retries,
            timeout_s=stage.timeout_s,
            resources=stage.resources,
            gates=tuple(self._gate(name, gate) for gate in gates),
            approval=self._approval(name, stage, approval),
            map=mapped,
        )
        self._nodes[name] = node
        return Added(
            node, {p.name: Handle(f"{name}.{p.name}", p.kind, mapped is not None) for p in stage.outputs.values()}
        )

    def build(self) -> Pipeline:
        """The frozen pipeline."""
        if not self._nodes:
            raise DefinitionError(f"pipeline {self.name} has no stage")
        return Pipeline(name=self.name, nodes=tuple(self._nodes.values()), inputs=tuple(self._inputs.values()))

    def _check(self, name: str, stage: Stage, handles: dict[str, Handle]) -> None:
        for port in stage.inputs.values():
            handle = handles.get(port.name)
            if handle is None:
                if port.optional:
                    continue
                raise DefinitionError(
                    f"pipeline {self.name}: input {port.name!r} of {name} is not wired", expected=_say(port)
                )
            fits = handle.kind is port.kind and handle.each == port.each and (port.optional or not handle.optional)
            if not fits:
                raise DefinitionError(
                    f"pipeline {self.name}: input {port.name!r} of {name} is wired to another kind",
                    expected=_say(port),
                    got=f"{handle.source} ({_say(handle)})",
                )

    def _gate(self, name: str, gate: Handle) -> str:
        if not issubclass(gate.kind, Verdict):
            raise DefinitionError(
                f"pipeline {self.name}: a gate of {name} is no verdict", expected="verdict", got=gate.kind.name
            )
        return gate.source

    def _approval(self, name: str, stage: Stage, approval: Approval | None) -> Approval | None:
        if approval is not None and approval.of not in stage.inputs:
            raise DefinitionError(
                f"pipeline {self.name}: {name} asks approval of what it does not read",
                expected=", ".join(stage.inputs),
                got=approval.of,
            )
        return approval


def _say(port: Port | Handle) -> str:
    kind = f"each {port.kind.name}" if port.each else port.kind.name
    return f"{kind}, optional" if port.optional else kind


def schema(kind: Literal["pipeline", "request", "result", "event"]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what passes between radloop and an engine."""
    from radloop.stage.protocol import Event, Request, Result

    types: dict[str, Any] = {"pipeline": Pipeline, "request": Request, "result": Result, "event": Event}
    found: dict[str, Any] = msgspec.json.schema(types[kind])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"radloop {kind}", **found}
