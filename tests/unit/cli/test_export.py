"""What leaves radloop as a file: schemas, pipelines, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from radloop.loop import PIPELINES
from radloop.pipeline import read_pipeline, schema
from radloop.settings import Settings, load

from .conftest import Ran

Run = Callable[..., Ran]
SCHEMAS = Path(__file__).resolve().parents[3] / "docs/schemas"


@pytest.mark.parametrize("name", ["pipeline", "request", "result", "event"])
def test_the_published_schema_is_the_codes(inside: Run, name: str) -> None:
    """Whoever writes an engine reads the schema, not our code."""
    ran = inside("schema", name)
    assert ran.code == 0
    published = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert ran.json == published == json.loads(json.dumps(schema(name)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PIPELINES)
def test_an_exported_pipeline_is_read_back(inside: Run, project: Path, name: str) -> None:
    """What an engine is given must be what would run here, without a secret in it."""
    (project / "radloop.toml").write_text("[split]\ntrain = 0.5\nvalidation = 0.25\n")
    ran = inside("export", "json", name)
    assert read_pipeline(ran.out.encode()) == PIPELINES[name](load(project))
    if name == "prepare":
        assert read_pipeline(ran.out.encode()) != PIPELINES[name](Settings())
    assert (project / "radloop.key").read_text().strip() not in ran.out


def test_a_pipeline_that_is_not_there(inside: Run) -> None:
    """A typo in a deployment script must not write an empty file and succeed."""
    ran = inside("export", "json", "deploy")
    assert ran.code == 1
    assert "prepare, develop, release, watch" in ran.err
    assert ran.out == ""


def test_report_of_a_new_project(inside: Run, project: Path) -> None:
    """The first report must say what is not there yet, not fail for it."""
    ran = inside("report", "--json")
    assert ran.code == 0, ran.err
    page = Path(ran.json["report"])
    assert page == project / "reports/report.html"
    assert "<html" in page.read_text()
