"""MLflow, for real, on SQLite: nothing is registered twice, and what is registered loads anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from radloop.errors import EngineError
from radloop.learning.package import Packaged, example_dicom
from radloop.learning.tracking import DatasetVersion, Tracking


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MLflow keeps its things."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def tracking(store: Path) -> Tracking:
    """One store for all tests: making one takes seconds."""
    return opened(store)


def opened(store: Path) -> Tracking:
    """The store, opened."""
    return Tracking(f"sqlite:///{store}/mlflow.db", store / "artifacts", "disc")


def log(tracking: Tracking, key: str, artifacts: Path | None = None) -> str:
    """A run with everything."""
    rows = pd.DataFrame({"sop_uid": ["2.25.1"], "label": [1], "part": ["train"]})
    return tracking.log_run(
        key, name="train", params={"epochs": 2}, metrics={"auc": 0.93},
        history=[{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25}],
        datasets=[DatasetVersion(name="disc", digest="ab" * 32, context="train", rows=rows, source="radloop:abab")],
        tags={"radloop.model_digest": "m" * 64}, artifacts=artifacts,
    )  # fmt: skip


def test_a_run_holds_what_was_logged(tracking: Tracking, trained: Any) -> None:
    """What MLflow's page does not show, nobody will look up in files."""
    client = tracking._client
    run = client.get_run(log(tracking, "first", trained.out))
    assert run.data.params == {"epochs": "2"}
    assert run.data.metrics == {"auc": 0.93, "train_loss": 0.25}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2]
    assert run.data.tags["radloop.model_digest"] == "m" * 64
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == ("ab" * 32)[:36]
    assert {tag.key: tag.value for tag in used.tags}["radloop.dataset_digest"] == "ab" * 32
    assert "evaluation/evaluation.json" in [f.path for f in client.list_artifacts(run.info.run_id, "evaluation")]


def test_no_user_host_or_path_is_logged(tracking: Tracking, store: Path) -> None:
    """The tracking server is read by more people than the machine."""
    run = tracking._client.get_run(log(tracking, "first"))
    assert not [key for key in run.data.tags if key.startswith(("mlflow.user", "mlflow.source"))]
    assert str(store) not in str(run.inputs)


def test_the_same_work_is_one_run(tracking: Tracking, store: Path) -> None:
    """A stage that is run again after a kill must not fill the page with copies."""
    run_id = log(tracking, "again")
    assert log(opened(store), "again") == run_id
    cut = tracking._client.create_run(tracking.experiment_id, tags={"radloop.key": "cut short"}).info.run_id
    whole = log(tracking, "cut short")
    assert whole != cut
    assert log(tracking, "cut short") == whole


def test_the_same_package_is_one_version(tracking: Tracking, store: Path, trained: Any, tmp_path: Path) -> None:
    """Two versions of one model would be judged against each other."""
    run_id = log(tracking, "register")
    first = tracking.register(trained.package, name="disc", run_id=run_id)
    assert opened(store).register(trained.package, name="disc", run_id=run_id) == first
    other = Path(shutil.copytree(trained.package, tmp_path / "package"))
    (other / "MODEL_CARD.md").write_text("another card")
    second = tracking.register(other, name="disc", run_id=run_id)
    assert second == first + 1
    found = tracking._client.get_model_version("disc", str(first))
    assert found.tags["radloop.model_digest"] == trained.identity.model_digest
    assert found.run_id == run_id


def test_a_registration_cut_short_is_taken_up(tracking: Tracking, trained: Any, tmp_path: Path) -> None:
    """A kill between logging and registering must leave one whole model, not a half one that is served."""
    from radloop.artifact import digest_of, file_digest
    from radloop.learning.tracking import PACKAGE

    package = Path(shutil.copytree(trained.package, tmp_path / "package"))
    (package / "MODEL_CARD.md").write_text("cut short")
    digest = digest_of({f.name: file_digest(f) for f in package.iterdir()})
    run_id = log(tracking, "half")
    client = tracking._client
    half = client.create_logged_model(tracking.experiment_id, "model", run_id, tags={PACKAGE: digest})
    version = tracking.register(package, name="disc", run_id=run_id)
    assert client.get_model_version("disc", str(version)).model_id != half.model_id
    whole = client.search_logged_models([tracking.experiment_id], f"tags.`{PACKAGE}` = '{digest}'")
    assert len(whole) == 1


def test_aliases(tracking: Tracking, trained: Any) -> None:
    """Champion and challenger are what serving and people go by."""
    version = tracking.register(trained.package, name="disc", run_id=log(tracking, "alias"))
    assert tracking.alias("disc", "champion") is None
    assert tracking.alias("nobody", "champion") is None
    tracking.set_alias("disc", "champion", version)
    assert tracking.alias("disc", "champion") == version
    tracking.drop_alias("disc", "champion")
    tracking.drop_alias("disc", "champion")
    assert tracking.alias("disc", "champion") is None


def test_a_dead_server_is_said_soon(free_port: int) -> None:
    """MLflow's own default is to try for five minutes."""
    with pytest.raises(EngineError, match=r"check \[mlflow\] uri"):
        Tracking(f"http://127.0.0.1:{free_port}", None, "disc")


@pytest.mark.slow
def test_the_model_loads_in_an_empty_environment(tracking: Tracking, trained: Any, tmp_path: Path) -> None:
    """In two years the checkout is gone and the model must still answer, and answer the same."""
    version = tracking.register(trained.package, name="disc", run_id=log(tracking, "empty"))
    model = Path(tracking.location("disc", version).removeprefix("file://"))
    python = tmp_path / "venv/bin/python"
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.prefix).parent / "uv/bin"))
    venv.create(tmp_path / "venv", with_pip=uv is None)
    pip = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    subprocess.run([*pip, "--quiet", "-r", str(model / "requirements.txt")], cwd=tmp_path, env=clean, check=True)
    code = (
        "import sys, mlflow.pyfunc, radloop\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "answer = model.predict(model.input_example)\n"
        "print(radloop.__file__)\n"
        "print(repr(float(answer.probability[0])), int(answer.decision[0]), 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [str(python), "-I", "-c", code, str(model)], cwd=tmp_path, env=clean, check=True, capture_output=True, text=True
    )
    where, answer = done.stdout.strip().splitlines()[-2:]
    assert where.startswith(str(tmp_path / "venv"))
    packaged = Packaged(trained.package)
    expected = packaged.predict_dicom(example_dicom(packaged.inputs))
    probability, decision, torch = answer.split()
    assert float(probability) == pytest.approx(expected.probability, abs=1e-6)
    assert int(decision) == expected.decision
    assert torch == "False"
