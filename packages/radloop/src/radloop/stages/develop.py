"""Stages of `develop`: from a dataset version to a registered challenger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from radloop.errors import ArtifactError, SettingsError
from radloop.stage import Home, In, Out, stage
from radloop.stage.execute import log, progress
from radloop.stages.kinds import (
    Dataset,
    Evaluation,
    Model,
    Package,
    Registered,
    Split,
    Tensors,
    Validation,
    Verdict,
)
from radloop.stages.watch import identity


@stage
def split(dataset: In[Dataset], champion_dataset: In[Dataset] | None, split: Out[Split], verdict: Out[Verdict]) -> None:
    """The leakage gate: no patient and no image in two parts, no test patient that the champion learnt from."""
    from radloop.datasets import manifest
    from radloop.datasets import split as parts

    table = manifest.read(dataset.file("manifest.parquet"))
    models = {"the champion": _learnt_from(champion_dataset)[0]} if champion_dataset else {}
    found = parts.leakage(table, models=models, persons=_persons(dataset))
    split.write_json("split.json", {**msgspec.to_builtins(found), "counts": manifest.counts(table)})
    figure = found.crossing_patients + found.crossing_pixels + sum(found.trained_on_test.values())
    told = "pass" if found.clean else "stop"
    gate = {
        "gate": "leakage",
        "verdict": "pass" if found.clean else "fail",
        "figure": figure,
        "bound": 0,
        "detail": found.message,
    }
    verdict.verdict(told, f"the leakage gate {'passed' if found.clean else 'refused'}: {found.message}", [gate])


def _persons(dataset: In[Dataset]) -> dict[str, str]:
    """Patients of the version that were known to be one person when it was made."""
    told = dataset.json("dataset.json")
    assert isinstance(told, dict)
    return dict(told.get("persons", {}))


@stage
def train(
    dataset: In[Dataset],
    tensors: In[Tensors],
    split: In[Split],
    model: Out[Model],
    *,
    config: dict[str, Any] = {},  # noqa: B006 - stages never change their parameters
) -> None:
    """Train the network and keep the epoch with the best validation AUC."""
    from radloop.datasets import manifest
    from radloop.datasets.tensors import TensorSet
    from radloop.learning import train as training

    table = manifest.read(dataset.file("manifest.parquet"))
    chosen = msgspec.convert(config, training.TrainConfig)
    fitted = training.fit(
        TensorSet(tensors.path), table, preprocessing_of(tensors), chosen, model.path, progress=progress
    )
    model.counts.update(epochs=len(fitted.history), best_epoch=fitted.best_epoch)
    log(f"best epoch {fitted.best_epoch} of {len(fitted.history)}, on {fitted.device}")


@stage(cache=False)
def adopt(
    dataset: In[Dataset],
    tensors: In[Tensors],
    split: In[Split],
    model: Out[Model],
    *,
    home: Home,
    config: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Take a network that was made elsewhere, `[train] network`, as the model: tried on images of the train part, not changed.

    It always looks at the file; where that is as it was, nothing after it runs again.
    """
    from radloop.datasets import manifest
    from radloop.datasets.tensors import TensorSet
    from radloop.learning import brought
    from radloop.learning.train import TrainConfig, labelled

    table, chosen = manifest.read(dataset.file("manifest.parquet")), msgspec.convert(config, TrainConfig)
    preprocessing = preprocessing_of(tensors)
    images = TensorSet(tensors.path).gather(labelled(table, "train").sop_uids[:64])
    said = brought.adopt(
        network_path(home, chosen.network),
        chosen.network_output,
        preprocessing,
        preprocessing.windowed(images),
        model.path,
    )
    for sentence in said:
        log(sentence)
    log(f"the network {chosen.network} was taken as it is; nothing was trained")


def network_path(home: Path, path: str) -> Path:
    """Where `[train] network` lies. Raises SettingsError outside the project: engines elsewhere have no other folder."""
    found = (home / path).resolve()
    if not found.is_relative_to(home.resolve()):
        raise SettingsError(
            "[train] network lies outside the project",
            expected="a path inside the project folder",
            got=path,
            next_step="copy the network into it, such as to models/",
        )
    return found


@stage
def evaluate(
    dataset: In[Dataset],
    tensors: In[Tensors],
    model: In[Model],
    champion: In[Package] | None,
    champion_dataset: In[Dataset] | None,
    evaluation: Out[Evaluation],
    verdict: Out[Verdict],
    *,
    home: Home,
    task: str = "finding",
    config: dict[str, Any] = {},  # noqa: B006
    gates_config: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Measure on test patients, beside the champion where there is one, and hold the figures against the gates."""
    from radloop.datasets import manifest
    from radloop.datasets.tensors import TensorSet
    from radloop.learning import evaluate as measuring
    from radloop.learning import gates
    from radloop.stages.project import open_catalog

    beside = None
    if champion and champion_dataset:
        patients, sites = _learnt_from(champion_dataset)
        beside = measuring.Champion(f"champion {champion.digest[:12]}", champion.path, patients, sites)
    measured = measuring.evaluate(
        model.path,
        TensorSet(tensors.path),
        manifest.read(dataset.file("manifest.parquet")),
        preprocessing_of(tensors),
        msgspec.convert(config, measuring.EvaluateConfig),
        evaluation.path,
        task=task,
        champion=beside,
        progress=progress,
    )
    judged = gates.judge(measured, msgspec.convert(gates_config, gates.GateConfig))
    told = gates.overall(judged)
    rows = msgspec.to_builtins(judged)
    with open_catalog(home) as catalog:
        for row in rows:
            key = f"gate:{model.digest}:{dataset.digest}:{row['gate']}:{row['verdict']}:{row['figure']}"
            catalog.ledger.append("gate", model.digest, row, actor="evaluate", key=key[:255])
    verdict.verdict(told, gates.message(judged), rows)


@stage
def package(
    dataset: In[Dataset],
    tensors: In[Tensors],
    model: In[Model],
    evaluation: In[Evaluation],
    package: Out[Package],
    *,
    home: Home,
    task: str = "finding",
    intended_use: str = "",
    modalities: list[str] = ["CR", "DX"],  # noqa: B006
    gates_config: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Put all that serving needs into one folder: the network as ONNX, or as it was brought, compared with its source."""
    from radloop.datasets import manifest
    from radloop.datasets.tensors import TensorSet
    from radloop.learning import card, gates
    from radloop.learning import evaluate as measuring
    from radloop.learning import package as packaging

    table = manifest.read(dataset.file("manifest.parquet"))
    labelled = [row["sop_uid"] for row in table.to_pylist() if row["label"] is not None]
    inputs = packaging.Inputs(
        modalities=modalities, size=preprocessing_of(tensors).size, positive=f"{task} present", negative=f"no {task}"
    )
    made = packaging.build(
        model.path,
        evaluation.path,
        TensorSet(tensors.path),
        labelled,
        package.path,
        task=task,
        dataset_digest=manifest.digest(table),
        key_id=str(table["key_id"][0].as_py()),
        inputs=inputs,
    )
    measured = measuring.read(evaluation.path)
    judged = gates.judge(measured, msgspec.convert(gates_config, gates.GateConfig))
    card.write(card.card(measured, judged, made, inputs, intended_use=intended_use), package.path)


@stage
def register(
    dataset: In[Dataset],
    tensors: In[Tensors],
    validation: In[Validation],
    model: In[Model],
    evaluation: In[Evaluation],
    package: In[Package],
    registered: Out[Registered],
    *,
    home: Home,
    config: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Log run, metrics, dataset version and model to MLflow; the new version becomes the challenger."""
    from radloop.datasets import manifest
    from radloop.stages.project import open_catalog, open_tracking

    table = manifest.read(dataset.file("manifest.parquet"))
    digest, served = manifest.digest(table), identity(package)["model_digest"]
    version, run_id = _track(open_tracking(home), table, digest, model, evaluation, package, config)
    places = {
        name: str(artifact.path.resolve().relative_to(home.resolve()))
        for name, artifact in (
            *(("dataset", dataset), ("tensors", tensors), ("validation", validation)),
            *(("model", model), ("evaluation", evaluation), ("package", package)),
        )
    }
    with open_catalog(home) as catalog:
        catalog.add_model(
            served,
            dataset_digest=digest,
            preprocessing_digest=preprocessing_of(tensors).digest,
            version=version,
            info={**places, "run_id": run_id, "package_digest": package.digest, **_trained(model)},
        )
        catalog.ledger.append(
            "training",
            served,
            {"dataset": digest, "version": version, "weights": model.digest, "package": package.digest},
            actor="register",
            key=f"training:{served}:{digest}",
        )
        labelled = {row["sop_uid"] for row in table.to_pylist() if row["label"] is not None}
        for request in catalog.label_requests("open"):
            if labelled & set(request.sop_uids):
                catalog.close_label_request(request.id, actor="register")
    registered.write_json("registered.json", {"version": version, "package": package.digest})


def _track(
    tracking: Any,
    table: Any,
    digest: str,
    model: In[Model],
    evaluation: In[Evaluation],
    package: In[Package],
    config: dict[str, Any],
) -> tuple[str, str]:
    """Log the run and register the package as the challenger: version and run id."""
    from radloop.learning import evaluate as measuring
    from radloop.learning.tracking import DatasetVersion
    from radloop.learning.train import TrainConfig

    measured = measuring.read(evaluation.path)
    told = identity(package)
    history = model.json("history.json")
    assert isinstance(history, dict | list)
    epochs = history if isinstance(history, list) else history["epochs"]
    metrics = {name: figure.value for name, figure in measured.metrics.items()}
    metrics |= {f"{name}_lower": figure.lower for name, figure in measured.metrics.items()}
    rows = table.select(["sop_uid", "part", "label", "site"]).to_pandas()
    run_id = tracking.log_run(
        f"{model.digest}:{evaluation.digest}",
        name=f"model {told['model_digest'][:12]}",
        params=_params(model, msgspec.convert(config, TrainConfig)),
        metrics=metrics,
        history=epochs,
        datasets=[
            DatasetVersion(
                name=told["task"],
                digest=digest,
                context=part,
                rows=rows[rows["part"] == part],
                source=f"radloop:{digest}",
            )
            for part in ("train", "validation", "test")
        ],
        tags={f"radloop.{name}": told[name] for name in ("model_digest", "dataset_digest", "preprocessing_digest")},
        artifacts=evaluation.path,
    )
    version = tracking.register(package.path, name=told["task"], run_id=run_id)
    tracking.set_alias(told["task"], "challenger", version)
    return str(version), run_id


def _trained(model: In[Model]) -> dict[str, str]:
    """What the catalog says of a model that radloop did not train: `radloop trace` must not name our patients as its teachers."""
    from radloop.catalog.lineage import ELSEWHERE
    from radloop.learning import runtimes

    return {} if runtimes.origin(model.path) is None else {"trained": ELSEWHERE}


def _params(model: In[Model], config: Any) -> dict[str, Any]:
    """What a run's page says of how the model came to be."""
    from radloop.learning import runtimes

    told = runtimes.origin(model.path)
    if told is None:
        return {name: value for name, value in msgspec.to_builtins(config).items() if not name.startswith("network")}
    return {"trained": "elsewhere", "network_form": told.form, "network_output": told.gives}


def preprocessing_of(tensors: In[Tensors]) -> Any:
    """The preprocessing that made the tensors. Raises ArtifactError if the code has changed since."""
    from radloop.imaging.transforms import Preprocessing

    told = tensors.json("preprocessing.json")
    assert isinstance(told, dict)
    chosen = msgspec.convert(told["parameters"], Preprocessing)
    if chosen.digest != told["digest"]:
        raise ArtifactError(
            "these tensors were made by another version of the preprocessing",
            expected=told["digest"],
            got=chosen.digest,
            next_step="radloop run prepare",
        )
    return chosen


def _learnt_from(dataset: In[Dataset]) -> tuple[set[str], set[str]]:
    """Patients and sites that a model of this dataset version learnt from: validation chose its epoch and threshold."""
    from radloop.stages.prepare import read_table

    rows = [row for row in read_table(dataset.file("manifest.parquet")) if row["part"] in ("train", "validation")]
    return {row["patient"] for row in rows}, {row["site"] for row in rows}
