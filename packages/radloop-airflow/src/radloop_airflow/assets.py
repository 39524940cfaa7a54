"""Airflow assets of a project: what its pipelines leave for each other."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import Asset

from radloop.pipeline import Pipeline

KINDS = ("dataset", "decision", "evaluation", "labels", "model", "registered")
"""Kinds of artifact that other pipelines or people wait for; each an asset of its kind's name."""

CHAMPION = "champion"
_PROMOTE = ("promote", "released")


def asset(project: str, name: str) -> Asset:
    """An asset of a project, such as its `dataset`: `opacity/dataset`."""
    return Asset(name=f"{Path(project).name}/{name}", uri=f"x-radloop:{project}/{name}")


def announced(pipeline: Pipeline) -> dict[str, str]:
    """What a pipeline leaves and others wait for: `stage.output` by asset name."""
    found = {}
    for node in pipeline.nodes:
        if not node.map:
            found.update({kind: f"{node.name}.{output}" for output, kind in node.outputs.items() if kind in KINDS})
        if node.name == _PROMOTE[0] and node.outputs.get(_PROMOTE[1]) == _PROMOTE[1]:
            found[CHAMPION] = ".".join(_PROMOTE)
    return found


def read(pipeline: Pipeline) -> list[str]:
    """Asset names of what a pipeline reads and others leave."""
    names = {given.kind for given in pipeline.inputs if given.kind in KINDS}
    return sorted(names | {given.name for given in pipeline.inputs if given.name == CHAMPION})
