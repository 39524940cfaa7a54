"""Airflow assets of a project: what its pipelines leave for each other."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import Asset

from radloop.pipeline import Node

KINDS = ("dataset", "decision", "evaluation", "labels", "model", "registered")
"""Kinds of artifact that other pipelines or people wait for; each an asset of its kind's name."""

CHAMPION = "champion"
_PROMOTE = ("promote", "released")


def asset(project: str, name: str) -> Asset:
    """An asset of a project, such as its `dataset`: `opacity/dataset`."""
    return Asset(name=f"{Path(project).name}/{name}", uri=f"x-radloop:{project}/{name}")


def outlets_of(node: Node) -> dict[str, str]:
    """Asset name by output, of what a stage leaves and others wait for."""
    found = {output: kind for output, kind in node.outputs.items() if kind in KINDS}
    if node.name == _PROMOTE[0] and node.outputs.get(_PROMOTE[1]) == _PROMOTE[1]:
        found[_PROMOTE[1]] = CHAMPION
    return found
