"""The TFDV environment as an engine meets it: radloop's own modules, and the stage `validate` under its Python."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from radloop.artifact import commit
from radloop.engines import local
from radloop.errors import SettingsError
from radloop.pipeline import Builder, Pipeline
from radloop.stages import prepare
from radloop.stages.kinds import TABLE, Instances, Schema, Validation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOMS = "artifact catalog.store cli.stage datasets.manifest dicom.deidentify dicom.landing imaging.transforms loop stages.prepare"


def test_base_installs_and_imports_beside_tensorflow(tfdv_python: Path) -> None:
    """The base dependencies must suit every environment: with numpy 2 in them, TFDV could not run a stage at all."""
    code = f"import importlib, json, numpy, pandas\nfor room in {ROOMS.split()}: importlib.import_module('radloop.' + room)\n"
    code += "print(json.dumps([numpy.__version__, pandas.__version__]))"
    done = subprocess.run(
        [tfdv_python, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    numpy_version, pandas_version = json.loads(done.stdout)
    assert numpy_version.startswith("1.26.")
    assert pandas_version.startswith("1.5.")


def pipeline() -> Pipeline:
    """Return the stage alone, its table and its baseline given from outside."""
    builder = Builder("validation")
    table = builder.input("checked", Instances)
    baseline = builder.input("baseline", Validation, optional=True)
    reviewed = builder.input("reviewed", Schema)
    builder.add(prepare.validate, checked=table, reviewed=reviewed, baseline=baseline)
    return builder.build()


def instances(folder: Path, sites: list[str]) -> Path:
    """Commit an instance table of 240 rows and return its directory."""
    draw, n = np.random.default_rng(0), 240
    columns = {
        "sop_uid": [f"2.25.{i:04d}" for i in range(n)],
        "modality": ["DX"] * n,
        "site": [sites[i % len(sites)] for i in range(n)],
        "view_position": pa.nulls(n),
        "f_mean": draw.normal(0.0, 1.0, n),
    }
    written = folder / "written"
    written.mkdir(parents=True)
    pq.write_table(pa.table(columns), written / TABLE)
    return commit(written, folder / "instances", Instances, {"instances": n}).path


def schema(folder: Path, text: bytes | None = None) -> Path:
    """Commit what a person reviewed, or nothing, and return its directory."""
    written = folder / "schema-written"
    written.mkdir(parents=True)
    if text is not None:
        (written / "schema.pbtxt").write_bytes(text)
    return commit(written, folder / "schema", Schema, {}).path


def test_stage_validate_runs_under_its_own_python(tfdv_python: Path, tmp_path: Path) -> None:
    """The local engine has to hand the stage over to the other environment, and get artifact and verdict back."""
    environments = {"tfdv": str(tfdv_python)}
    home = tmp_path / "home"
    one = instances(tmp_path / "one", ["A"])
    none = schema(tmp_path / "none")
    given: dict[str, Path | None] = {"checked": one, "reviewed": none, "baseline": None}
    first = local.run(pipeline(), home=home, inputs=given, environments=environments)
    assert first.status == "succeeded", first.message
    assert first.output("validate.validation").json("anomalies.json") == []
    assert first.output("validate.verdict").json("verdict.json")["verdict"] == "pass"  # type: ignore[index]

    two = instances(tmp_path / "two", ["A", "B"])
    given = {"checked": two, "reviewed": none, "baseline": first.output("validate.validation").path}
    second = local.run(pipeline(), home=home, inputs=given, environments=environments)
    assert second.status == "succeeded", second.message
    summary = second.output("validate.validation").json("summary.json")
    assert isinstance(summary, dict)
    assert (summary["schema"], summary["warnings"], summary["drifted"]) == ("baseline", 1, ["site"])

    proposed = second.output("validate.validation").path / "schema.proposed.pbtxt"
    given["reviewed"] = schema(tmp_path / "reviewed", proposed.read_bytes())
    third = local.run(pipeline(), home=home, inputs=given, environments=environments)
    reviewed = third.output("validate.validation").json("summary.json")
    assert isinstance(reviewed, dict)
    assert (reviewed["schema"], reviewed["anomalies"]) == ("reviewed", 0), "a reviewed schema must be looked at anew"


def test_missing_environment_names_the_command(tmp_path: Path) -> None:
    """A pip user has no TFDV environment yet, and must be told how to make one."""
    table = instances(tmp_path / "one", ["A"])
    with pytest.raises(SettingsError, match="radloop setup"):
        local.run(pipeline(), home=tmp_path / "home", inputs={"checked": table, "baseline": None})
