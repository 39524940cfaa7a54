"""Kubeflow components: one for each stage, its Python generated from the stage's signature, readable in the compiled YAML."""

from __future__ import annotations

import linecache
import types
import typing
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

import msgspec

from radloop.artifact import Verdict
from radloop.engines.kubeflow.task import GATE
from radloop.errors import UnsupportedByEngine
from radloop.pipeline import Node, Pipeline
from radloop.stage import Port, Stage, load

MOUNT = "/project"
TYPES = {
    **dict.fromkeys(("instances", "labels", "dataset", "tensors", "split", "predictions"), "Dataset"),
    **dict.fromkeys(("model", "package"), "Model"),
    **dict.fromkeys(("evaluation", "performance", "drift", "verdict"), "Metrics"),
}
"""KFP's artifact type by kind; `Artifact` for any other. The report of the loop is its HTML."""
OWN = ("project", "run_id", "node", "index")
"""Parameters that every component has besides its stage's."""
_PARAMETERS = {"bool", "int", "float", "str", "list", "dict"}


def type_of(kind: str) -> str:
    """KFP's type for a kind of artifact."""
    return TYPES.get(kind, "Artifact")


def gates_of(node: Node) -> list[str]:
    """Names of a component's inputs for gates: one at least, so that a published component can stand behind a gate."""
    return [GATE, *(f"{GATE}_{number}" for number in range(2, len(node.gates) + 1))]


def verdict_of(node: Node) -> str | None:
    """The output that is this node's verdict, if it is a gate."""
    found = [name for name, kind in node.outputs.items() if kind == Verdict.name]
    if len(found) > 1:
        raise UnsupportedByEngine("kubeflow", node.name, "condition on more than one verdict of a stage")
    return found[0] if found else None


def stage_source(node: Node) -> str:
    """The Python of a node's component.

    Raises:
        UnsupportedByEngine: a name that the component needs for itself.
    """
    stage = load(node.stage)
    taken = {*OWN, *gates_of(node)} & {*stage.inputs, *stage.outputs, *stage.params}
    if taken:
        name = min(taken)
        raise UnsupportedByEngine("kubeflow", node.name, f"argument {name!r} to give away (its components use it)")
    lines = [f"{port.name}: {_annotation(port)}" for port in stage.inputs.values()]
    lines += [f"{port.name}: Output[{type_of(port.kind.name)}]" for port in stage.outputs.values()]
    lines += [_parameter(stage, node, name) for name in stage.params]
    lines += [f'project: str = "{MOUNT}"', 'run_id: str = ""', f"node: str = {node.name!r}", "index: int = -1"]
    lines += [f"{name}: Input[Metrics] = None" for name in gates_of(node)]
    call = f"run_stage({node.stage!r}, {node.environment!r}, {node.timeout_s!r}, given)"
    gate = verdict_of(node) is not None
    doc = (stage.__doc__ or f"The stage {node.stage}.").strip()
    body = [_docstring(doc), "given = dict(locals())", "from radloop.engines.kubeflow.task import run_stage", ""]
    return _function(stage.name, lines, "str" if gate else None, [*body, f"return {call}" if gate else call])


def open_source(pipeline: Pipeline) -> str:
    """The Python of the component that begins a run and yields the pipeline's inputs."""
    inputs = {given.name: given.kind for given in pipeline.inputs}
    if taken := {"spec", "job", *OWN} & set(inputs):
        raise UnsupportedByEngine(
            "kubeflow", pipeline.name, f"input {min(taken)!r} to give away (its components use it)"
        )
    lines = ["spec: str", "job: str", f'project: str = "{MOUNT}"', 'run_id: str = ""']
    lines += [f"{name}: Output[{type_of(kind)}]" for name, kind in inputs.items()]
    outputs = ", ".join(f"{name!r}: {name}" for name in inputs)
    body = [
        _docstring(f"Begin a run of the pipeline {pipeline.name}."),
        "from radloop.engines.kubeflow.task import open_run",
        "",
        f"return open_run(spec, project, job, run_id, {{{outputs}}})",
    ]
    return _function(f"open_{pipeline.name.replace('-', '_').replace('.', '_')}", lines, "str", body)


ITEMS = '''def items(listing: Input[Artifact], run_id: str) -> list:
    """What a mapped stage runs once for each of."""
    from radloop.engines.kubeflow.task import list_items

    return list_items(listing, run_id)
'''

CLOSE = f'''def close(
    *,
    job: str,
    status: dsl.PipelineTaskFinalStatus,
    report: Output[HTML],
    alert: bool = True,
    project: str = "{MOUNT}",
):
    """End the run, tell the recipients of [alerts] if it did not succeed, and write the report of the loop."""
    if not alert:  # somebody waits for this run, and ends it
        return
    from radloop.engines.kubeflow.task import close_run

    close_run(project, job, status.state, report)
'''


def component(source: str, image: str) -> Any:
    """The KFP component of a function's source."""
    from kfp import dsl

    known = ("Artifact", "Dataset", "HTML", "Input", "Metrics", "Model", "Output")
    names: dict[str, Any] = {"dsl": dsl, "List": typing.List, **{name: getattr(dsl, name) for name in known}}  # noqa: UP006
    name = source[len("def ") : source.index("(")]
    file = f"<radloop component {name}>"
    linecache.cache[file] = (
        len(source),
        None,
        source.splitlines(keepends=True),
        file,
    )  # KFP asks inspect for the source
    exec(compile(source, file, "exec", dont_inherit=True), names)  # noqa: S102 - generated above, from a stage's signature
    return dsl.component(names[name], base_image=image, install_kfp_package=False)


def _annotation(port: Port) -> str:
    name = type_of(port.kind.name)
    return f"Input[List[{name}]]" if port.each else f"Input[{name}] = None" if port.optional else f"Input[{name}]"


def _parameter(stage: Stage, node: Node, name: str) -> str:
    """A parameter with its KFP type, and its value in this pipeline as the default."""
    hint, _ = stage.params[name]
    value = node.params.get(name)
    mapped = node.map is not None and node.map.param == name
    kind = type(value).__name__ if value is not None else _json_type(hint)
    if kind not in _PARAMETERS:
        raise UnsupportedByEngine("kubeflow", node.name, f"parameter of the type of {name!r}")
    return f"{name}: {kind}" if mapped else f"{name}: {kind} = {value!r}"


def _json_type(hint: Any) -> str:
    """The JSON type of a parameter whose value is none."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    hint = get_origin(hint) or hint
    if isinstance(hint, type) and issubclass(hint, (list, tuple, set, frozenset)):
        return "list"
    if isinstance(hint, type) and issubclass(hint, (dict, msgspec.Struct)):
        return "dict"
    return hint.__name__ if isinstance(hint, type) and hint.__name__ in _PARAMETERS else "str"


def _docstring(text: str) -> str:
    return '"""' + text.replace("\\", "\\\\").replace('"""', "'''") + '"""'


def _function(name: str, arguments: Iterable[str], returns: str | None, body: Iterable[str]) -> str:
    listed = "".join(f"    {line},\n" for line in arguments)
    inner = "".join(f"    {line}\n" if line else "\n" for line in body)
    return f"def {name}(\n    *,\n{listed}){f' -> {returns}' if returns else ''}:\n{inner}"
