"""What is exported: the MLproject file, its entry points, and how a parameter is written as text."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from radloop.artifact import Each
from radloop.errors import DefinitionError, UnsupportedByEngine
from radloop.pipeline import Node, Pipeline
from radloop.stage.launch import write_whole

NAME = "mlflow-project"


class EntryPoint(msgspec.Struct, frozen=True):
    """An entry point of the MLproject file.

    Attributes:
        parameters: type (string, float, path) and default by name; None where a value must be given.
        command: a shell command with `{name}` for each parameter.
    """

    parameters: dict[str, tuple[str, str | None]]
    command: str


def export(
    pipelines: Sequence[Pipeline],
    folder: Path,
    *,
    home: Path,
    environments: Mapping[str, str] | None = None,
    requirements: Sequence[str] = (),
) -> list[str]:
    """Write an MLflow project and return the names of its entry points.

    Args:
        pipelines: their stages become entry points, and they themselves too: `NAME`, or `NAME-pipeline` beside a stage NAME.
        folder: where; MLproject, a NAME.json for each pipeline, python_env.yaml and requirements.txt.
        home: the default of the parameter `project`, where artifacts and runs are kept.
        environments: interpreter by environment name, the default of `python_NAME` where a stage needs another one.
        requirements: what `--env-manager uv` installs; without them, only `--env-manager local` has radloop.

    Raises:
        UnsupportedByEngine: a stage that an MLproject file cannot hold.
    """
    points: dict[str, EntryPoint] = {}
    for pipeline in pipelines:
        for node in pipeline.nodes:
            point = stage_point(pipeline, node, home, environments or {})
            if node.name in points and points[node.name].parameters != point.parameters:
                raise UnsupportedByEngine(NAME, node.name, "room for two stages of one name with other parameters")
            points.setdefault(node.name, point)
    for pipeline in pipelines:
        name = f"{pipeline.name}-pipeline" if pipeline.name in points else pipeline.name
        points[name] = _pipeline_point(pipeline, home, environments or {})
    folder.mkdir(parents=True, exist_ok=True)
    for pipeline in pipelines:
        write_whole(folder / f"{pipeline.name}.json", pipeline.to_json())
    if requirements:
        write_whole(folder / "requirements.txt", "\n".join([*requirements, ""]).encode())
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        write_whole(
            folder / "python_env.yaml", f'python: "{version}"\ndependencies:\n  - -r requirements.txt\n'.encode()
        )
    write_whole(folder / "MLproject", _mlproject(points, bool(requirements)).encode())
    return list(points)


def stage_point(pipeline: Pipeline, node: Node, home: Path, environments: Mapping[str, str]) -> EntryPoint:
    """The entry point of a stage: its artifacts, gates and parameters. Secret references stay in the spec.

    Raises:
        UnsupportedByEngine: two of them have one name.
    """
    parameters: dict[str, tuple[str, str | None]] = {"project": ("path", str(home.resolve()))}
    options = []
    for name, source in node.inputs.items():
        parameters[name] = _artifact_type(pipeline, source)
        options.append(f"--input {name}={{{name}}}")
    for gate in node.gates:
        parameters[gate_parameter(gate)] = ("path", None)
        options.append(f"--gate {{{gate_parameter(gate)}}}")
    values = {name: value for name, value in node.params.items() if name not in node.secrets}
    values.update(_pythons([node], environments, options))
    for name, value in values.items():
        if name in parameters:
            raise UnsupportedByEngine(NAME, node.name, f"room for a second parameter named {name!r}")
        default = None if node.map and name == node.map.param else as_text(value)
        parameters[name] = ("float" if is_number(value) else "string", default)
        if name in node.params:
            options.append(f"--param {name}={{{name}}}")
    return EntryPoint(parameters, _command("stage", pipeline, options, node.name))


def _artifact_type(pipeline: Pipeline, source: str) -> tuple[str, str | None]:
    """An artifact is a path; several are a JSON list of paths; MLflow has no optional path, so that is text, empty if absent."""
    if source.startswith("input:"):
        given = next(i for i in pipeline.inputs if f"input:{i.name}" == source)
        return ("string", "") if given.optional else ("path", None)
    name, _, output = source.partition(".")
    return ("string" if pipeline.node(name).outputs[output] == Each.name else "path", None)


def _pythons(nodes: Iterable[Node], environments: Mapping[str, str], options: list[str]) -> dict[str, str]:
    """Parameters, by name, for the interpreters of stages that need another environment; `options` pass them on."""
    names = sorted({node.environment for node in nodes} - {"core"})
    options += [f"--python {name}={{{python_parameter(name)}}}" for name in names]
    return {python_parameter(name): environments.get(name, "") for name in names}


def _pipeline_point(pipeline: Pipeline, home: Path, environments: Mapping[str, str]) -> EntryPoint:
    """Its inputs are text: empty means that of the project's latest runs."""
    parameters: dict[str, tuple[str, str | None]] = {"project": ("path", str(home.resolve()))}
    parameters.update({given.name: ("string", "") for given in pipeline.inputs if given.name != "project"})
    options = [f"--input {name}={{{name}}}" for name in parameters if name != "project"]
    parameters.update({n: ("string", path) for n, path in _pythons(pipeline.nodes, environments, options).items()})
    return EntryPoint(parameters, _command("pipeline", pipeline, options))


def _command(what: str, pipeline: Pipeline, options: list[str], *more: str) -> str:
    fixed = shlex.join([what, f"{pipeline.name}.json", *more]).replace("{", "{{").replace("}", "}}")
    return " ".join([f"python -m {__package__} {fixed} --project {{project}}", *options])


def _mlproject(points: Mapping[str, EntryPoint], environment: bool) -> str:
    lines = ["# Written by `radloop export mlflow-project`.", "name: radloop"]
    lines += ["python_env: python_env.yaml"] if environment else []
    lines.append("entry_points:")
    for name, point in points.items():
        lines += [f"  {_yaml(name)}:", "    parameters:"]
        for parameter, (kind, default) in point.parameters.items():
            value = {"type": kind} if default is None else {"type": kind, "default": default}
            lines.append(f"      {_yaml(parameter)}: {_yaml(value)}")
        lines.append(f"    command: {_yaml(point.command)}")
    return "\n".join([*lines, ""])


def _yaml(value: object) -> str:
    """JSON is YAML, but for characters that YAML takes for line breaks or does not take at all."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def gate_parameter(source: str) -> str:
    """The parameter that a gate's verdict is given by: `gate_validate_verdict`."""
    return "gate_" + source.removeprefix("input:").replace(".", "_")


def python_parameter(environment: str) -> str:
    """The parameter that names the interpreter of an environment other than core: `python_tfdv`."""
    return f"python_{environment}"


def is_number(value: object) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_text(value: object) -> str:
    """A parameter as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def from_text(text: str, like: object) -> Any:
    """What `as_text` wrote, read again; `like` is the spec's own value. What is no JSON, where that is null, is a string."""
    if isinstance(like, str):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        if like is None:
            return text
        raise DefinitionError("a parameter cannot be read", expected="JSON", got=f"{text!r}: {error}") from None
