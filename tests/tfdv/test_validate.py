"""Real TFDV, in its own environment, on tables as radloop's own environment writes them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CANARY = "2.25.190083511"


def table(n: int, *, sites: tuple[str, ...] = ("A",), shift: float = 0.0, seed: int = 0, **columns: Any) -> pa.Table:
    """Return a quality table of n instances; `columns` replace columns, and None leaves one out."""
    draw = np.random.default_rng(seed)
    base: dict[str, Any] = {
        "sop_uid": [f"{CANARY}.{i}" for i in range(n)],
        "patient": [f"P{i // 2:032x}" for i in range(n)],
        "path": [f"{CANARY}/{i}.dcm" for i in range(n)],
        "site": draw.choice(sites, n),
        "modality": pa.array(draw.choice(["CR", "DX"], n)).dictionary_encode(),
        "manufacturer": pa.array(["ACME"] * n, pa.large_string()),
        "view_position": ["PA" if i % 3 else None for i in range(n)],
        "sex": draw.choice(["F", "M"], n),
        "age_years": [None if i % 7 == 0 else float(i % 90) for i in range(n)],
        "rows": pa.array([None, *[2000] * (n - 1)], pa.int32()),
        "columns": pa.array([2000] * n, pa.uint16()),
        "bits_stored": draw.choice([12, 14], n),
        "photometric": ["MONOCHROME2"] * n,
        "f_mean": draw.normal(shift, 1.0, n),
        "f_entropy": draw.normal(0.0, 1.0, n).astype(np.float32),
    }
    base.update(columns)
    return pa.table({name: column for name, column in base.items() if column is not None})


CASES: dict[str, tuple[pa.Table | bytes | None, dict[str, Any]]] = {
    "first": (table(300), {}),
    "same": (table(300), {"baseline": "first"}),
    "grown": (table(600, sites=("A", "B"), shift=2.0, seed=1, f_new=np.ones(600)), {"baseline": "first"}),
    "other_vendor": (table(300, manufacturer=["OTHER"] * 300), {"baseline": "first"}),
    "few_other_modality": (table(300, modality=["DX"] * 291 + ["MG"] * 9), {"baseline": "first"}),
    "other_modality": (table(300, modality=["DX"] * 270 + ["MG"] * 30), {"baseline": "first"}),
    "dropped": (table(300, sex=None), {"baseline": "first"}),
    "emptied": (table(300, manufacturer=pa.nulls(300)), {"baseline": "first"}),
    "retyped": (table(300, rows=np.full(300, 1.5), f_mean=["dark"] * 300), {"baseline": "first"}),
    "reviewed": (table(600, sites=("A", "B"), seed=1), {"reviewed_schema": "reviewed.pbtxt", "baseline": "first"}),
    "lenient": (
        table(600, sites=("A", "B"), shift=2.0, seed=1),
        {"baseline": "first", "jensen_shannon_max": 1.0, "l_infinity_max": 1.0},
    ),
    "truncated": (b"PAR1 and then nothing", {}),
    "absent": (None, {}),
    "no_rows": (table(300).slice(0, 0), {}),
    "no_columns": (table(300).select(["sop_uid", "patient"]), {}),
    "infinite": (table(300, f_mean=np.r_[np.inf, np.zeros(299)]), {}),
    "no_baseline": (table(300), {"baseline": "absent"}),
    "bad_schema": (table(300), {"reviewed_schema": "bad.pbtxt"}),
}


def run(python: Path, folder: Path, cases: dict[str, Any], hash_seed: str) -> dict[str, Any]:
    """Validate the cases in one TFDV process, as silent as a stage has to be."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [
        python,
        "-W",
        "error",
        Path(__file__).with_name("run_cases.py"),
        folder / "cases.json",
        folder / "results.json",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where tables and outputs lie."""
    return tmp_path_factory.mktemp("tfdv")


@pytest.fixture(scope="module")
def results(tfdv_python: Path, folder: Path) -> dict[str, Any]:
    """Return what every case came to. TFDV is started again for what needs a first run."""
    cases = {}
    for name, (content, options) in CASES.items():
        if isinstance(content, bytes):
            (folder / f"{name}.parquet").write_bytes(content)
        elif content is not None:
            pq.write_table(content, folder / f"{name}.parquet", compression="zstd")
        options = {key: str(folder / value) if isinstance(value, str) else value for key, value in options.items()}
        cases[name] = {"table": str(folder / f"{name}.parquet"), "out": str(folder / name), **options}
    (folder / "bad.pbtxt").write_text("feature { name: ")
    late = {"reviewed": cases.pop("reviewed")}
    found = run(tfdv_python, folder, cases, hash_seed="1")
    schema = (folder / "first" / "schema.pbtxt").read_text()
    seen = 'string_domain {\n  name: "site"\n'
    assert seen in schema
    (folder / "reviewed.pbtxt").write_text(schema.replace(seen, seen + '  value: "B"\n'))
    late["again"] = {**cases["grown"], "out": str(folder / "again")}
    return found | run(tfdv_python, folder, late, hash_seed="2")


def read(path: Path) -> Any:
    """Return a JSON file's content."""
    return json.loads(path.read_text())


def found(folder: Path, case: str) -> dict[tuple[str, str], str]:
    """Return the severity of each anomaly, by feature and type."""
    return {(row["feature"], row["type"]): row["severity"] for row in read(folder / case / "anomalies.json")}


def test_first_version_infers_its_schema_and_passes(results: dict[str, Any], folder: Path) -> None:
    """A stranger's first dataset would otherwise be stopped by a schema that nobody wrote."""
    assert results["first"] == {
        "verdict": "pass",
        "schema": "inferred",
        "instances": 300,
        "features": 12,
        "anomalies": 0,
        "stops": 0,
        "warnings": 0,
        "drifted": None,
    }
    assert read(folder / "first" / "summary.json") == results["first"]
    assert read(folder / "first" / "drift.json")["features"] == []
    assert not (folder / "first" / "schema.proposed.pbtxt").exists()


def test_same_data_has_no_anomaly_and_no_drift(results: dict[str, Any], folder: Path) -> None:
    """Alarms on nothing teach people to ignore alarms."""
    assert results["same"]["anomalies"] == 0
    assert results["same"]["drifted"] == []
    assert {row["drift"] for row in read(folder / "same" / "drift.json")["features"]} == {0.0}


def test_second_site_warns_and_drifts_but_does_not_stop(results: dict[str, Any], folder: Path) -> None:
    """The loop exists for the second site: it must be told about it, and not be stopped by it."""
    assert results["grown"]["verdict"] == "pass"
    assert results["grown"]["schema"] == "baseline"
    assert results["grown"]["drifted"] == ["f_mean", "site"]
    assert found(folder, "grown") == {
        ("f_new", "SCHEMA_NEW_COLUMN"): "warn",
        ("site", "ENUM_TYPE_UNEXPECTED_STRING_VALUES"): "warn",
    }
    assert 'value: "B"' in (folder / "grown" / "schema.proposed.pbtxt").read_text()


def test_both_comparators_measure(results: dict[str, Any], folder: Path) -> None:
    """Skew measured as nothing would hide every difference: it must be the distance that the drift comparator gives."""
    rows = {row["feature"]: row for row in read(folder / "grown" / "drift.json")["features"]}
    half = rows["site"]
    assert half["measure"] == "l_infty"
    assert half["drift"] == half["skew"] == pytest.approx(0.5, abs=0.06)
    assert rows["f_mean"]["measure"] == "jensen_shannon_divergence"
    assert rows["f_mean"]["drift"] == rows["f_mean"]["skew"] > 0.3
    assert rows["f_entropy"]["drift"] < 0.1
    assert "f_new" not in rows


def test_thresholds_are_the_callers(results: dict[str, Any]) -> None:
    """A hospital's own bounds would otherwise be ignored in silence."""
    assert results["lenient"]["drifted"] == []


@pytest.mark.parametrize(
    ("case", "verdict", "anomalies"),
    [
        ("other_vendor", "pass", {("manufacturer", "ENUM_TYPE_UNEXPECTED_STRING_VALUES"): "warn"}),
        ("few_other_modality", "pass", {("modality", "ENUM_TYPE_UNEXPECTED_STRING_VALUES"): "warn"}),
        ("other_modality", "stop", {("modality", "ENUM_TYPE_UNEXPECTED_STRING_VALUES"): "stop"}),
        ("dropped", "stop", {("sex", "SCHEMA_MISSING_COLUMN"): "stop"}),
        ("emptied", "stop", {("manufacturer", "FEATURE_TYPE_NOT_PRESENT"): "stop"}),
        ("retyped", "stop", {("rows", "UNEXPECTED_DATA_TYPE"): "stop", ("f_mean", "UNEXPECTED_DATA_TYPE"): "stop"}),
    ],
)
def test_what_stops_and_what_warns(
    results: dict[str, Any], folder: Path, case: str, verdict: str, anomalies: dict[tuple[str, str], str]
) -> None:
    """A broken table must not become a dataset version, and an ordinary change must not stop the hospital."""
    assert found(folder, case) == anomalies
    assert results[case]["verdict"] == verdict
    assert results[case]["stops"] == sum(severity == "stop" for severity in anomalies.values())


def test_reviewed_schema_is_in_force(results: dict[str, Any], folder: Path) -> None:
    """What a person accepted must not be reported again, or nobody would review anything."""
    assert results["reviewed"]["schema"] == "reviewed"
    assert found(folder, "reviewed") == {}
    assert 'value: "B"' in (folder / "reviewed" / "schema.pbtxt").read_text()


def test_output_is_the_same_in_every_process(results: dict[str, Any], folder: Path) -> None:
    """An output that differs between runs would change the dataset's key, and nothing could be resumed or traced."""
    assert results["again"] == results["grown"]
    names = sorted(path.name for path in (folder / "grown").iterdir())
    expected = [
        "anomalies.json",
        "drift.json",
        "schema.pbtxt",
        "schema.proposed.pbtxt",
        "statistics.json",
        "statistics.pbtxt",
    ]
    assert names == [*expected, "summary.json"]
    for name in names:
        digests = {hashlib.sha256((folder / case / name).read_bytes()).hexdigest() for case in ("grown", "again")}
        assert len(digests) == 1, name


def test_no_identifier_and_no_path_is_written(results: dict[str, Any], folder: Path) -> None:
    """Statistics travel in reports: a pseudonym in them would point to a patient."""
    for path in (folder / "grown").iterdir():
        text = path.read_text()
        assert CANARY not in text
        assert "P0000" not in text
        assert str(folder) not in text


def test_compact_statistics_are_right(results: dict[str, Any], folder: Path) -> None:
    """The report shows these figures; they are compared with numpy's here."""
    features = read(folder / "first" / "statistics.json")["features"]
    source = table(300)
    mean = source["f_mean"].to_numpy()
    assert features["f_mean"]["mean"] == pytest.approx(mean.mean())
    assert features["f_mean"]["std"] == pytest.approx(mean.std())
    assert (features["f_mean"]["min"], features["f_mean"]["max"]) == (mean.min(), mean.max())
    assert len(features["f_mean"]["deciles"]) == 11
    assert features["age_years"]["missing"] == source["age_years"].null_count == 43
    assert features["rows"]["count"] == 299
    assert features["manufacturer"] == {
        "kind": "category",
        "count": 300,
        "missing": 0,
        "unique": 1,
        "top": [{"value": "ACME", "count": 300}],
    }


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("truncated", "ArtifactError", "the table cannot be read as Parquet"),
        ("absent", "ArtifactError", "there is no table to validate"),
        ("no_rows", "DataError", "the table has no rows"),
        ("no_columns", "DataError", "no column to validate"),
        ("infinite", "DataError", "a feature is infinite"),
        ("no_baseline", "ArtifactError", "the baseline's statistics cannot be read"),
        ("bad_schema", "SettingsError", "the reviewed schema cannot be read"),
    ],
)
def test_bad_input_is_named(results: dict[str, Any], folder: Path, case: str, error: str, text: str) -> None:
    """A trace from inside TensorFlow tells nobody what to do."""
    assert results[case]["error"] == error
    assert text in results[case]["text"]
    assert not (folder / case / "summary.json").exists()
