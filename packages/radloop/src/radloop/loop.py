"""The loop: prepare, develop, release and watch, the stages wired. Each is built from a project's settings."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from radloop.pipeline import Builder, Handle, Pipeline
from radloop.settings import Settings
from radloop.stage.protocol import Approval
from radloop.stages import develop as d
from radloop.stages import kinds as k
from radloop.stages import prepare as p
from radloop.stages import release as r
from radloop.stages import watch as w


def prepare(settings: Settings) -> Pipeline:
    """From what has arrived to a dataset version. `baseline`: the validation of the champion's dataset version."""
    b = Builder("prepare")
    baseline = b.input("baseline", k.Validation, optional=True)
    key = settings.deidentify.key
    arrived = b.add(
        p.ingest,
        folders=[msgspec.to_builtins(folder) for folder in settings.ingest.folders],
        pacs=[msgspec.to_builtins(source) for source in settings.ingest.pacs],
        task=settings.task.name,
        given_split=settings.split.given,
    )
    cleaned = b.add(
        p.deidentify,
        received=arrived.received,
        profile=settings.deidentify.profile,
        options=list(settings.deidentify.options),
        pixels=settings.deidentify.pixels,
        pixel_rules=list(settings.deidentify.pixel_rules),
        face_cleaner=list(settings.deidentify.face_cleaner),
        face_timeout_s=settings.deidentify.face_timeout_s,
        key=key,
    )
    checked = b.add(
        p.quality,
        clean=cleaned.clean,
        modalities=list(settings.accept.modalities),
        sop_classes=list(settings.accept.sop_classes),
    ).checked
    valid = b.add(p.validate, checked=checked, reviewed=arrived.reviewed, baseline=baseline)
    tensors = b.add(p.preprocess, checked=checked, preprocessing=settings.preprocess).tensors
    b.add(
        p.publish,
        checked=checked,
        labels=arrived.labels,
        tensors=tensors,
        validation=valid.validation,
        gates=[valid.verdict],
        key=key,
        fractions=[settings.split.train, settings.split.validation, settings.split.test],
    )
    return b.build()


def develop(settings: Settings) -> Pipeline:
    """From a dataset version to a registered challenger that passed its gates: `train` and `evaluate` in one."""
    b = Builder("develop")
    given = _given(b)
    _evaluate(b, settings, given, _train(b, settings, given))
    return b.build()


def train(settings: Settings) -> Pipeline:
    """The first half of `develop`: the leakage gate and the training, or the network that was brought instead."""
    b = Builder("train")
    _train(b, settings, _given(b))
    return b.build()


def evaluate(settings: Settings) -> Pipeline:
    """The second half of `develop`: a trained model measured, held against the gates, packaged and registered."""
    b = Builder("evaluate")
    _evaluate(b, settings, _given(b), b.input("model", k.Model))
    return b.build()


def _given(b: Builder) -> dict[str, Handle]:
    return {
        "dataset": b.input("dataset", k.Dataset),
        "tensors": b.input("tensors", k.Tensors),
        "validation": b.input("validation", k.Validation),
        "champion": b.input("champion", k.Package, optional=True),
        "champion_dataset": b.input("champion_dataset", k.Dataset, optional=True),
    }


def _train(b: Builder, settings: Settings, given: dict[str, Handle]) -> Handle:
    dataset = given["dataset"]
    parts = b.add(d.split, dataset=dataset, champion_dataset=given["champion_dataset"])
    return b.add(
        d.adopt if settings.train.get("network") else d.train,
        name="train",
        dataset=dataset,
        tensors=given["tensors"],
        split=parts.split,
        gates=[parts.verdict],
        config=settings.train,
    ).model


def _evaluate(b: Builder, settings: Settings, given: dict[str, Handle], model: Handle) -> None:
    dataset, tensors = given["dataset"], given["tensors"]
    measured = b.add(
        d.evaluate,
        dataset=dataset,
        tensors=tensors,
        model=model,
        champion=given["champion"],
        champion_dataset=given["champion_dataset"],
        task=settings.task.name,
        config=settings.evaluate,
        gates_config=settings.gates,
    )
    package = b.add(
        d.package,
        dataset=dataset,
        tensors=tensors,
        model=model,
        evaluation=measured.evaluation,
        gates=[measured.verdict],
        task=settings.task.name,
        intended_use=settings.task.intended_use,
        modalities=list(settings.accept.modalities),
        gates_config=settings.gates,
    ).package
    b.add(
        d.register,
        dataset=dataset,
        tensors=tensors,
        validation=given["validation"],
        model=model,
        evaluation=measured.evaluation,
        package=package,
        config=settings.train,
    )


def release(settings: Settings) -> Pipeline:
    """From a registered challenger to the champion: smoke test, shadow, approval, canary, promotion."""
    b = Builder("release")
    package, registered = b.input("package", k.Package), b.input("registered", k.Registered)
    approval = Approval(of="package", role=settings.release.approver_role)
    wait_s, judge = settings.release.wait_s, settings.release.judge
    smoked = b.add(r.smoke, package=package, registered=registered, wait_s=wait_s)
    shadowed = b.add(
        r.shadow, package=package, registered=registered, smoked=smoked.released, judge=judge, wait_s=wait_s
    )
    canary = b.add(
        r.canary,
        package=package,
        registered=registered,
        shadowed=shadowed.released,
        gates=[shadowed.verdict],
        approval=approval,
        judge=judge,
        steps=list(settings.release.steps),
        clinical_canary=settings.release.clinical_canary,
        wait_s=wait_s,
    )
    b.add(
        r.promote,
        package=package,
        registered=registered,
        proven=canary.released,
        gates=[canary.verdict],
        approval=approval,
        wait_s=wait_s,
    )
    return b.build()


def watch(settings: Settings) -> Pipeline:
    """From the prediction log to drift, performance, alerts, a labelling request, and whether to train again."""
    b = Builder("watch")
    dataset, evaluation = b.input("dataset", k.Dataset), b.input("evaluation", k.Evaluation)
    package = b.input("package", k.Package)
    window, drift = _drift(b, settings, dataset, evaluation, package)
    performance = b.add(
        w.performance,
        predictions=window,
        evaluation=evaluation,
        package=package,
        task=settings.task.name,
        label_definition=settings.watch.label_definition,
    ).performance
    b.add(
        w.alert,
        drift=drift,
        performance=performance,
        predictions=window,
        package=package,
        smtp=msgspec.to_builtins(settings.alerts),
        label_request_size=settings.watch.label_request_size,
    )
    _decide(b, settings, drift, dataset)
    return b.build()


def retrain(settings: Settings) -> Pipeline:
    """The part of `watch` that new labels ask for: is it time to train again?"""
    b = Builder("retrain")
    dataset, evaluation = b.input("dataset", k.Dataset), b.input("evaluation", k.Evaluation)
    _, drift = _drift(b, settings, dataset, evaluation, b.input("package", k.Package))
    _decide(b, settings, drift, dataset)
    return b.build()


def _drift(
    b: Builder, settings: Settings, dataset: Handle, evaluation: Handle, package: Handle
) -> tuple[Handle, Handle]:
    window = b.add(w.collect, package=package, patients=settings.watch.window_patients).predictions
    found = b.add(
        w.drift, predictions=window, dataset=dataset, evaluation=evaluation, thresholds=settings.watch.drift
    ).drift
    return window, found


def _decide(b: Builder, settings: Settings, drift: Handle, dataset: Handle) -> None:
    b.add(
        w.decide,
        drift=drift,
        dataset=dataset,
        task=settings.task.name,
        label_definition=settings.watch.label_definition,
        patients_per_class=settings.watch.retrain_patients_per_class,
    )


PIPELINES: dict[str, Callable[[Settings], Pipeline]] = {
    "prepare": prepare,
    "develop": develop,
    "release": release,
    "watch": watch,
}
"""The loop, in its order."""

PARTS: dict[str, Callable[[Settings], Pipeline]] = {"train": train, "evaluate": evaluate, "retrain": retrain}
"""Parts of them, for engines that start each by an event of its own."""
