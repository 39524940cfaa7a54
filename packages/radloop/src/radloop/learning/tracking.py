"""Experiments, runs, models and aliases in MLflow. The only module that imports it.

Everything goes through `MlflowClient` with an explicit URI: MLflow's fluent functions keep the tracking server, the
active run and the experiment in globals, which two pipelines in one process would share.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

# A hospital's machine tells nobody what it runs; a dead server fails in seconds, not in five minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

with warnings.catch_warnings():
    # MLflow 3.17 warns about type hints of its own when it is imported.
    warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
    import mlflow.pyfunc

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from radloop.artifact import digest_of, file_digest
from radloop.errors import EngineError
from radloop.learning import runtimes
from radloop.learning.package import Identity, Inputs, example_dicom

logging.getLogger("mlflow").setLevel(logging.WARNING)  # creating a store is no news to who runs a loop

KEY = "radloop.key"
PACKAGE = "radloop.package_digest"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "dicom")]),
    outputs=Schema([ColSpec("double", "probability"), ColSpec("long", "decision")]),
)
_NOISE = (
    ".*``noload`` loader strategy is deprecated",  # MLflow 3.17's store under SQLAlchemy 2.1
    "Operation with range is deprecated",  # MLflow 3.17's examples under pandas 3.1
)
_TYPES = {"i": "long", "u": "long", "f": "double", "b": "boolean"}
_PIXELS = ("pillow", "pyjpegls", "pylibjpeg-openjpeg", "python-gdcm")


# A uv environment has no pip; that the conda.yaml nobody uses then names none is no news.
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
# Nor that a checkout's version has not the digest that its wheel's has.
logging.getLogger("mlflow.utils.requirements_utils").setLevel(logging.ERROR)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that MLflow raises about itself."""
    with warnings.catch_warnings():
        for text in _NOISE:
            warnings.filterwarnings("ignore", text)
        yield


class DatasetVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset version that a run used.

    Attributes:
        name, digest: the task or dataset's name and the manifest's digest.
        context: what for: training, validation, test.
        rows: a frame of the instances, such as sop_uid, part and label: MLflow shows its columns and length, no value.
        source: where it lies, as radloop names it, such as `datasets/DIGEST.parquet`.
    """

    name: str
    digest: str
    context: str
    rows: pd.DataFrame
    source: str


class Tracking:
    """One experiment on one tracking server or store.

    Args:
        uri: `sqlite:////path/mlflow.db`, `postgresql+psycopg2://...` or `http(s)://...`.
        artifact_root: folder for a new experiment's files; None leaves it to the server.
        experiment: its name, one a task.

    Raises:
        EngineError: the store cannot be reached.
    """

    def __init__(self, uri: str, artifact_root: Path | None, experiment: str) -> None:
        self.uri, self.experiment = uri, experiment
        try:
            with _quiet():
                self._client = MlflowClient(uri, uri)
                self.experiment_id = self._experiment(artifact_root)
        except (MlflowException, OSError) as error:
            raise EngineError(
                "MLflow cannot be reached",
                expected="a store or server at the tracking URI",
                got=_without_password(str(error).splitlines()[0], uri)[:300],
                next_step="check [mlflow] uri and password in radloop.toml, and that the server runs",
            ) from None

    def _experiment(self, root: Path | None) -> str:
        location = None if root is None else root.resolve().as_uri()
        if (found := self._client.get_experiment_by_name(self.experiment)) is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self.experiment, artifact_location=location))
        except MlflowException as error:  # another process was first
            if (found := self._client.get_experiment_by_name(self.experiment)) is None:
                raise error
            return str(found.experiment_id)

    def log_run(
        self,
        key: str,
        *,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, float]] = (),
        datasets: Sequence[DatasetVersion] = (),
        tags: Mapping[str, str] | None = None,
        artifacts: Path | None = None,
    ) -> str:
        """Record one training with its evaluation; returns the run's id. The same key twice gives the same run.

        Args:
            key: names the work, such as the stage's key. A run of that key that was cut short is logged anew.
            name: for people.
            params: configuration, flat.
            metrics: final figures.
            history: one mapping an epoch, with `epoch` as the step.
            datasets: dataset versions used.
            tags: digests of dataset, preprocessing, code and the like.
            artifacts: a folder, logged as `evaluation/`.
        """
        client = self._client
        finished = self._run_of(key)
        if finished is not None:
            return finished
        run_id = str(client.create_run(self.experiment_id, run_name=name, tags={KEY: key}).info.run_id)
        now = int(time.time() * 1000)
        points = [Metric(k, float(v), now, 0) for k, v in metrics.items()]
        points += [
            Metric(k, float(v), now, int(line["epoch"])) for line in history for k, v in line.items() if k != "epoch"
        ]
        client.log_batch(
            run_id,
            points,
            [Param(k, str(v)) for k, v in params.items()],
            [RunTag(k, str(v)) for k, v in (tags or {}).items()],
        )
        if datasets:
            client.log_inputs(run_id, [_dataset_input(dataset) for dataset in datasets])
        if artifacts is not None:
            client.log_artifacts(run_id, str(artifacts), "evaluation")
        client.set_terminated(run_id, "FINISHED")
        return run_id

    def _run_of(self, key: str) -> str | None:
        """The finished run of a key; unfinished ones are deleted."""
        finished = None
        for run in self._client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'"):
            if run.info.status == "FINISHED":
                finished = str(run.info.run_id)
            else:
                self._client.delete_run(run.info.run_id)
        return finished

    def register(self, package: Path, *, name: str, run_id: str, tags: Mapping[str, str] | None = None) -> int:
        """Log a package as a model of a run and register it; returns the version's number.

        The same package twice gives the same version. The model holds the package, radloop's wheel with it, a
        signature, an example and pinned requirements: `pip install -r requirements.txt` in the model's folder, then
        `mlflow.pyfunc.load_model`, needs no checkout.
        """
        client = self._client
        digest = digest_of({f.relative_to(package).as_posix(): file_digest(f) for f in _files(package)})
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for found in client.search_model_versions(f"name = '{name}' and tags.`{PACKAGE}` = '{digest}'"):
            return int(found.version)
        model_id, location = self._logged_model(package, digest, run_id)
        identity = msgspec.json.decode((package / "identity.json").read_bytes(), type=Identity)
        marks = {PACKAGE: digest, "radloop.model_digest": identity.model_digest, "radloop.wheel": identity.radloop}
        version = client.create_model_version(
            name, location, run_id=run_id, model_id=model_id, tags={**marks, **(tags or {})}
        )
        return int(version.version)

    def _logged_model(self, package: Path, digest: str, run_id: str) -> tuple[str, str]:
        """Id and location of the logged model of a package digest; one cut short is removed and logged anew."""
        client = self._client
        for model in client.search_logged_models([self.experiment_id], f"tags.`{PACKAGE}` = '{digest}'"):
            if model.status == LoggedModelStatus.READY:
                return str(model.model_id), str(model.artifact_location)
            client.delete_logged_model(model.model_id)
        model = client.create_logged_model(self.experiment_id, "model", run_id, tags={PACKAGE: digest})
        with tempfile.TemporaryDirectory() as folder:
            save(package, Path(folder, "model"), model_id=model.model_id, run_id=run_id)
            client.log_model_artifacts(model.model_id, str(Path(folder, "model")))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id), str(model.artifact_location)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias, such as `champion` or `challenger`, at a version."""
        self._client.set_registered_model_alias(name, alias, str(version))

    def alias(self, name: str, alias: str) -> int | None:
        """The version that an alias points at, None if there is none."""
        try:
            return int(self._client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def drop_alias(self, name: str, alias: str) -> None:
        """Remove an alias; nothing happens if it is not there."""
        if self.alias(name, alias) is not None:
            self._client.delete_registered_model_alias(name, alias)

    def fetch(self, name: str, version: int, folder: Path) -> Path:
        """Copy a version's package out of the registry into a new folder; returns it. A predictor can start from it."""
        from mlflow.artifacts import download_artifacts

        source = f"{self.location(name, version).rstrip('/')}/data/package"
        with tempfile.TemporaryDirectory() as place, _quiet():
            found = download_artifacts(artifact_uri=source, dst_path=place, tracking_uri=self.uri)
            return Path(shutil.copytree(found, folder))

    def load(self, name: str, version: int) -> Any:
        """A version as MLflow's own users load it: `predict` takes a frame with a column `dicom`."""
        with _quiet():
            return mlflow.pyfunc.load_model(self.location(name, version))

    def location(self, name: str, version: int) -> str:
        """Where a version's MLflow model lies, for `mlflow.pyfunc.load_model`."""
        return str(self._client.get_model_version_download_uri(name, str(version)))


def _without_password(text: str, uri: str) -> str:
    """MLflow's messages may quote the URI."""
    quoted = urlsplit(uri).password
    return text if quoted is None else text.replace(quoted, "***").replace(unquote(quoted), "***")


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _dataset_input(version: DatasetVersion) -> DatasetInput:
    """What `mlflow.data.from_pandas` makes, without its guesses. MLflow keeps 36 characters of a digest, a tag all."""
    columns = [
        {"type": _TYPES.get(kind.kind, "string"), "name": str(name), "required": False}
        for name, kind in version.rows.dtypes.items()
    ]
    dataset = Dataset(
        name=version.name,
        digest=version.digest[:36],
        source_type="local",
        source=msgspec.json.encode({"uri": version.source}).decode(),
        schema=msgspec.json.encode({"mlflow_colspec": columns}).decode(),
        profile=msgspec.json.encode({"num_rows": len(version.rows)}).decode(),
    )
    tags = [InputTag("mlflow.data.context", version.context), InputTag("radloop.dataset_digest", version.digest)]
    return DatasetInput(dataset, tags)


def save(package: Path, path: Path, *, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write a package as an MLflow model folder at `path`: `MLmodel`, `requirements.txt`, `data/package/`."""
    from mlflow.models import Model

    inputs = msgspec.json.decode((package / "inputs.json").read_bytes(), type=Inputs)
    (wheel,) = package.glob("radloop-*.whl")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        copy = shutil.copytree(package, Path(folder, "package"))
        mlflow.pyfunc.save_model(
            path=str(path),
            loader_module="radloop.learning.pyfunc",
            data_path=str(copy),
            mlflow_model=Model(model_id=model_id, run_id=run_id),
            signature=SIGNATURE,
            input_example=pd.DataFrame({"dicom": [example_dicom(inputs)]}),
            # pip and uv read a path to a wheel from where they run, one to a folder of wheels from where requirements.txt lies;
            # `mlflow models build-docker` runs pip elsewhere.
            pip_requirements=[
                "--find-links data/package",
                f"radloop=={wheel.name.split('-')[1]}",
                *requirements(runtimes.framework(package)),
            ],
        )


def requirements(framework: str = "onnxruntime") -> list[str]:
    """What a model needs beside radloop's wheel, `framework` to run its network, pinned to the versions installed here."""
    declared = [line for line in metadata.requires("radloop") or [] if "extra ==" not in line]
    names = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in declared}
    return [f"{name}=={metadata.version(name)}" for name in sorted({*names, *_PIXELS, "mlflow", framework})]
