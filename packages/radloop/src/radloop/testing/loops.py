"""What a project's runs made, measured and decided: the same on every engine, or two engines cannot stand for each other.

And what they must not have left anywhere: a patient's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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


def identifiers(hospital: Path) -> tuple[bytes, ...]:
    """Names, identifiers and UIDs of a drawn hospital's originals, long enough not to occur by chance.

    Raises:
        AssertionError: there are hardly any, so that finding none would prove nothing.
    """
    import pydicom

    found: set[str] = set()
    for path in hospital.rglob("IM*.dcm"):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        found |= {str(ds.PatientID), str(ds.AccessionNumber), ds.SOPInstanceUID, ds.StudyInstanceUID}
        found |= {part for part in re.split(r"[\^=]", str(ds.PatientName)) if len(part) >= 6}
    texts = sorted(text.encode().lower() for text in found if len(text) >= 6)
    assert len(texts) > 300, f"only {len(texts)} identifiers in {hospital}"
    return tuple(texts)


def leaks(secrets: Iterable[bytes], folder: Path, but: tuple[str, ...] = ()) -> list[str]:
    """Files in a folder whose name or content holds one of them, but those under the named sub-folders; Parquet is decoded.

    One `in` for each is twenty times as fast as one regular expression of them all.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if inside.parts[0] in but or not path.is_file():
            continue
        text = _table(path) if path.suffix == ".parquet" else path.read_bytes()
        text = (text + b"\n" + str(path).encode()).lower()
        if any(secret in text for secret in secrets):
            found.append(str(inside))
    return found


IDENTIFIED = ("landing", "quarantine", "identity", "hospital")
"""Where identified data may lie in a demo's project."""


def _table(path: Path) -> bytes:
    import pyarrow.parquet as pq

    return "\n".join(map(str, pq.read_table(path).to_pylist())).encode()
