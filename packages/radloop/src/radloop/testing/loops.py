"""What a project's runs made, measured and decided: the same on every engine, or two engines cannot stand for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from radloop.pipeline.records import RunResult, read_run
from radloop.stage.execute import read_verdict


class Made(NamedTuple):
    """What the runs left that came to their end, in their order.

    Attributes:
        datasets: digest of each dataset version.
        models: digest of each trained model.
        metrics: evaluation.json of each.
        verdicts: pipeline, and the verdict of each of its gates by name; a gate's words may tell of traffic.
    """

    datasets: list[str]
    models: list[str]
    metrics: list[Any]
    verdicts: list[tuple[str, dict[str, str]]]


def made(project: Path) -> Made:
    """Read a project's runs; those of the pipelines that `radloop run` knows, not their parts."""
    records = sorted((project / "runs").glob("[0-9]*/run.json"))
    runs = [run for run in map(read_run, records) if run.status == "succeeded"]
    developed = [run for run in runs if run.pipeline == "develop"]
    return Made(
        [run.output("publish.dataset").digest for run in runs if run.pipeline == "prepare"],
        [run.output("train.model").digest for run in developed],
        [run.output("evaluate.evaluation").json("evaluation.json") for run in developed],
        [(run.pipeline, _verdicts(run)) for run in runs],
    )


def _verdicts(run: RunResult) -> dict[str, str]:
    return {name: read_verdict(run.output(name))[0] for name in run.outputs if name.endswith(".verdict")}
