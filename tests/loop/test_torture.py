"""Killed at any moment, prepare and develop go on to the same dataset and the same model: nothing lost, nothing done twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from radloop.artifact import open_artifact
from radloop.catalog.store import Catalog
from radloop.cli.init import make_project
from radloop.pipeline.records import read_run
from radloop.testing.hospital import make_hospital

SETTINGS = """
[task]
name = "opacity"
[accept]
modalities = ["CR", "DX"]
[[ingest.folders]]
path = "hospital/images"
site = "site-a"
[train]
epochs = 1
[evaluate]
minimum_patients = 1
resamples = 50
examples = 2
[gates]
auc_lower = 0.0
ece = 1.0
subgroup_gap = 1.0
shortcut_stop = 1.0
[split]
train = 0.4
validation = 0.3
test = 0.3
[environments]
tfdv = "{tfdv}"
"""
# What must be the same whenever and however often the run was killed.
DIGESTS = ("publish.dataset", "preprocess.tensors", "train.model", "evaluate.evaluation", "package.package")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantoms of 18 patients."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_hospital(folder / "hospital", patients=18, images=24, site="A", seed=3)
    return folder


def project(folder: Path, hospital: Path, keys: Path | None) -> Path:
    """A project over the phantoms; with the keys of another, whose digests it must reach."""
    tfdv = Path(sys.prefix).parent / "tfdv" / "bin" / "python"
    make_project(folder)
    shutil.copytree(hospital / "hospital", folder / "hospital")
    (folder / "radloop.toml").write_text(SETTINGS.format(tfdv=tfdv))
    if keys is not None:
        for name in ("radloop.key", "crosswalk.key"):
            shutil.copy2(keys / name, folder / name)
    labels(folder)
    return folder


def radloop(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "radloop.cli", *arguments, "--project", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def labels(folder: Path) -> None:
    importing = ("--key", "accession", "--key-column", "AccessionNumber", "--value-column", "label", "--site", "site-a")
    done = radloop(folder, "labels", "import", str(folder / "hospital" / "labels.csv"), *importing)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors.decode()


def finish(folder: Path) -> dict[str, Any]:
    """Run both pipelines to their end, approving what waits; the digests and what the catalog holds."""
    for pipeline in ("prepare", "develop"):
        for _ in range(3):
            run = radloop(folder, "run", pipeline)
            _, errors = run.communicate(timeout=280)
            if run.returncode != 4:
                break
            approve(folder)
        assert run.returncode == 0, errors.decode()[-3000:]
    outputs: dict[str, str] = {}
    for record in sorted((folder / "runs").glob("*/run.json")):
        outputs |= read_run(record).outputs
    with Catalog(f"sqlite:///{folder / 'catalog.db'}") as catalog:
        rows = catalog.ledger.rows()
        kinds = {kind: sum(row.kind == kind for row in rows) for kind in ("dataset", "training")}
        kinds["instances"] = sum(sum(per.values()) for per in catalog.counts().values())
        kinds["quarantined"] = len(catalog.quarantined())
        kinds["versions"] = len(catalog.datasets())
        kinds["models"] = len(catalog.models())
    leftovers = [str(p) for p in (folder / "artifacts").glob(".*")]
    return {
        "digests": {name: open_artifact(Path(outputs[name]), verify=True).digest for name in DIGESTS},
        "catalog": kinds,
        "leftovers": leftovers,
    }


def approve(folder: Path) -> None:
    record = sorted((folder / "runs").glob("*/run.json"))[-1]
    digest = read_run(record).output("evaluate.verdict").digest
    with Catalog(f"sqlite:///{folder / 'catalog.db'}") as catalog:
        payload = {"role": "clinical", "why": "torture"}
        catalog.ledger.append("approval", digest, payload, actor="test", key=f"approval:{digest}")


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.torture)])
def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path: Path, hospital: Path, kills: int) -> None:
    """A night's run that dies with the machine must not publish another dataset, nor the same one twice."""
    began = time.monotonic()
    calm = project(tmp_path / "calm", hospital, None)
    expected = finish(calm)
    length = time.monotonic() - began
    random_moments = random.Random(7)
    torn = project(tmp_path / "torn", hospital, calm)
    for number in range(kills):
        pipeline = "develop" if number % 2 and (torn / "datasets").exists() else "prepare"
        run = radloop(torn, "run", pipeline)
        time.sleep(random_moments.uniform(0.2, max(length / 3, 2.0)))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        if run.returncode == 4:
            approve(torn)
    reached = finish(torn)
    other = {name for name in DIGESTS if reached["digests"][name] != expected["digests"][name]}
    assert other == set()
    assert reached == expected
    assert expected["leftovers"] == []
    assert expected["catalog"]["versions"] == expected["catalog"]["dataset"] == 1
