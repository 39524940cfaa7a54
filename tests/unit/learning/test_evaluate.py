"""Evaluation, shortcut audit and gates: figures with evidence, or an honest "undetermined"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.errors import DataError, GateError
from radloop.learning import evaluate, gates, shortcut
from radloop.learning.evaluate import Champion, EvaluateConfig
from radloop.learning.gates import GateConfig
from radloop.learning.statistics import Interval

QUICK = EvaluateConfig(resamples=200, minimum_patients=5, examples=0, threads=1)


def again(trained: Any, out: Path, table: pa.Table | None = None, **options: Any) -> evaluate.Evaluation:
    """Evaluate the trained model once more."""
    toy, config = trained.toy, options.pop("config", QUICK)
    table = toy.table if table is None else table
    return evaluate.evaluate(trained.model, toy.tensors, table, toy.preprocessing, config, out, task="disc", **options)


def column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with one column replaced."""
    return table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))


def test_every_figure_is_there(trained: Any) -> None:
    """A reader who signs off needs each of them, with its interval around it."""
    found = trained.evaluation
    assert set(found.metrics) == {"auc", "sensitivity", "specificity", "brier", "ece", "ppv", "npv"}
    for name, interval in found.metrics.items():
        assert 0 <= interval.lower <= interval.value <= interval.upper <= 1, name
    assert found.metrics["auc"].value > 0.9
    assert found.parts["test"] == {"images": 192, "patients": 96, "positive": found.parts["test"]["positive"]}
    assert {(g.factor, g.value) for g in found.subgroups} >= {
        ("site", "A"),
        ("sex", "F"),
        ("age", "0-17"),
        ("age", "80+"),
    }
    assert found.roc[0] == (0, 0)
    assert found.roc[-1] == (1, 1)
    assert sum(n for _, _, n in found.reliability) == 192


def test_figures_are_those_of_the_predictions(trained: Any) -> None:
    """The report's numbers must follow from the predictions that were kept, or nobody can check them."""
    from sklearn.metrics import brier_score_loss, roc_auc_score

    rows = pq.read_table(trained.out / "predictions.parquet").to_pandas()
    test, found = rows[rows.part == "test"], trained.evaluation
    called = test.probability >= found.decision.threshold
    sensitivity, specificity = called[test.label == 1].mean(), 1 - called[test.label == 0].mean()
    assert found.metrics["auc"].value == pytest.approx(roc_auc_score(test.label, test.logit))
    assert found.metrics["brier"].value == pytest.approx(brier_score_loss(test.label, test.probability))
    assert found.metrics["sensitivity"].value == pytest.approx(sensitivity)
    assert found.metrics["specificity"].value == pytest.approx(specificity)
    pre = found.decision.prevalence
    bayes = sensitivity * pre / (sensitivity * pre + (1 - specificity) * (1 - pre))
    assert found.metrics["ppv"].value == pytest.approx(bayes)
    assert set(rows.part) == {"validation", "test"}
    assert rows.sop_uid.is_monotonic_increasing


def test_the_test_part_changes_no_decision(trained: Any, tmp_path: Path) -> None:
    """Threshold and calibration chosen on test patients would promise what the next patients do not get."""
    parts, labels = trained.toy.table["part"].to_pylist(), trained.toy.table["label"].to_pylist()
    flipped = [1 - v if p == "test" else v for p, v in zip(parts, labels, strict=True)]
    found = again(trained, tmp_path, column(trained.toy.table, "label", flipped))
    assert found.decision == trained.evaluation.decision
    assert found.metrics["auc"].value == pytest.approx(1 - trained.evaluation.metrics["auc"].value)


def test_it_repeats_and_reads_back(trained: Any, tmp_path: Path) -> None:
    """An evaluation that differs from run to run cannot be a cached stage, nor be audited."""
    config = EvaluateConfig(resamples=300, minimum_patients=5, threads=1)
    found = again(trained, tmp_path, config=config)
    assert (tmp_path / "evaluation.json").read_bytes() == (trained.out / "evaluation.json").read_bytes()
    assert evaluate.read(tmp_path) == found


def test_examples_show_each_outcome_of_different_patients(trained: Any) -> None:
    """A reader learns from mistakes; eight views of one patient teach nothing."""
    from PIL import Image

    shown = trained.evaluation.examples
    assert 0 < len(shown) <= 8
    patients = dict(
        zip(trained.toy.table["sop_uid"].to_pylist(), trained.toy.table["patient"].to_pylist(), strict=True)
    )
    assert len({patients[e.sop_uid] for e in shown}) == len(shown)
    for example in shown:
        called = example.probability >= trained.evaluation.decision.threshold
        assert example.outcome == ("T" if called == example.label else "F") + ("P" if called else "N")
        with Image.open(trained.out / example.file) as picture:
            assert picture.size == (2 * 2 * 32, 2 * 32)


def test_saliency_finds_the_disc(trained: Any) -> None:
    """A heat map that points elsewhere than at the finding would mislead whoever signs off."""
    from radloop.learning import network, saliency

    y, x = np.mgrid[:32, :32]
    images = np.full((2, 1, 32, 32), 0.3, np.float32)
    images[0, 0][(y - 8) ** 2 + (x - 24) ** 2 < 25] = 1
    images[1, 0][(y - 24) ** 2 + (x - 24) ** 2 < 25] = 1
    heat = saliency.grad_cam(network.load(trained.model), images)
    assert heat.shape == (2, 32, 32)
    assert heat.min() >= 0
    assert heat.max() <= 1
    assert heat[0, :16].sum() > heat[0, 16:].sum()
    assert heat[1, 16:].sum() > heat[1, :16].sum()


def test_a_thin_subgroup_is_insufficient_evidence(trained: Any, tmp_path: Path) -> None:
    """Two patients of 80 years who were right by luck must not read as "works in the old"."""
    found = again(trained, tmp_path, config=EvaluateConfig(resamples=100, minimum_patients=30, examples=0, threads=1))
    old = next(g for g in found.subgroups if g.value == "80+")
    assert old.auc is None
    assert old.note == "insufficient evidence"
    gate = next(g for g in gates.judge(found, GateConfig(subgroup_gap=1)) if g.gate == "subgroups")
    assert gate.verdict == "undetermined"
    assert "age 80+" in gate.detail


def test_one_class_in_test_is_said(trained: Any, tmp_path: Path) -> None:
    """No AUC exists then; scikit-learn's warning and a NaN would pass every gate."""
    parts, labels = trained.toy.table["part"].to_pylist(), trained.toy.table["label"].to_pylist()
    ones = [1 if p == "test" else v for p, v in zip(parts, labels, strict=True)]
    with pytest.raises(DataError, match="the test part does not hold both classes"):
        again(trained, tmp_path, column(trained.toy.table, "label", ones))


def test_the_champion_is_met_on_patients_new_to_both(trained: Any, tmp_path: Path) -> None:
    """A champion tested on patients it learnt from looks unbeatable, or a worse challenger replaces it."""
    table = trained.toy.table
    learnt = {
        p for p, part in zip(table["patient"].to_pylist(), table["part"].to_pylist(), strict=True) if part != "test"
    }
    champion = Champion("version 1", trained.package, learnt, {"A"})
    found = again(trained, tmp_path / "a", champion=champion).comparison
    assert found is not None
    assert found.overall is not None
    assert found.overall.difference is not None
    assert found.overall.difference.value == pytest.approx(0, abs=1e-9)
    assert found.overall.patients == 96
    assert [(s.site, s.new) for s in found.sites] == [("A", False), ("B", True)]
    leaking = Champion("version 1", trained.package, {*learnt, "P0003", "P0004"}, {"A"})
    measured = again(trained, tmp_path / "b", champion=leaking)
    assert measured.comparison is not None
    assert measured.comparison.excluded_patients == 2
    judged = {g.gate: g for g in gates.judge(measured, GateConfig())}
    assert judged["leakage"].verdict == "fail"
    assert "2 of 96 test patients" in judged["leakage"].detail
    assert judged["non_inferiority"].verdict == "pass"


def test_a_champion_that_cannot_run_here_is_undetermined(trained: Any, tmp_path: Path) -> None:
    """After a change of preprocessing the old model cannot be compared: a person must decide, not a default."""
    import shutil

    package = shutil.copytree(trained.package, tmp_path / "package")
    identity = msgspec.json.decode((package / "identity.json").read_bytes())
    identity["preprocessing_digest"] = "0" * 64
    (package / "identity.json").write_bytes(msgspec.json.encode(identity))
    measured = again(trained, tmp_path / "e", champion=Champion("version 1", package, set()))
    gate = next(g for g in gates.judge(measured, GateConfig()) if g.gate == "non_inferiority")
    assert gate.verdict == "undetermined"
    assert "preprocesses images differently" in gate.detail
    assert gates.overall([gate]) == "wait"


def audit_of(site: list[str], labels: list[int], **columns: list[Any]) -> shortcut.Shortcut:
    """The audit of a manifest with one image a patient."""
    n = len(labels)
    base = {"sop_uid": [f"{i:04d}" for i in range(n)], "patient": [f"P{i}" for i in range(n)], "site": site}
    table = pa.table({**base, **columns, "label": pa.array(labels, pa.int8())})
    return shortcut.audit(table, resamples=200)


def test_a_scanner_that_tells_the_label_is_found() -> None:
    """Sick patients from one scanner, healthy from another: the network learns the scanner, and the AUC is worthless."""
    random = np.random.default_rng(0)
    labels = random.integers(2, size=300).tolist()
    site = [("A" if random.random() < 0.9 else "B") if v else ("B" if random.random() < 0.9 else "A") for v in labels]
    noise = random.normal(size=300).tolist()
    found = audit_of(site, labels, lossy_ratio=noise, rows=[512] * 300, view_position=[None] * 300)
    assert found.auc is not None
    assert found.auc.lower > 0.8
    assert list(found.fields) == ["site", "lossy_ratio"]
    assert found.fields["site"] > 0.85
    assert found.fields["lossy_ratio"] < 0.65


def test_whether_a_field_is_there_is_a_shortcut_too() -> None:
    """A contrast agent is written down for those who got one: the blank is the label."""
    labels = [0, 1] * 50
    found = audit_of(["A"] * 100, labels, view_position=["PA" if v else None for v in labels])
    assert found.fields["view_position"] > 0.99


def test_metadata_without_the_label_is_clean() -> None:
    """An audit that cries at chance would stop every release."""
    random = np.random.default_rng(1)
    labels = random.integers(2, size=400).tolist()
    found = audit_of(random.choice(list("ABC"), 400).tolist(), labels, rows=random.integers(500, 600, 400).tolist())
    assert found.auc is not None
    assert found.auc.lower < 0.55


def test_a_folder_of_one_scanner_has_nothing_to_learn_from() -> None:
    """Constant metadata is the good case, not an error."""
    found = audit_of(["A"] * 60, [0, 1] * 30)
    assert found.auc is not None
    assert found.auc.value == 0.5


def test_too_few_patients_for_an_audit_is_undetermined() -> None:
    """A cross-validation of six patients says nothing, and must not pass for "no shortcut"."""
    found = audit_of(list("ABABAB"), [0, 1] * 3)
    assert found.auc is None
    assert "insufficient evidence" in found.reason


def with_figures(base: evaluate.Evaluation, **changes: Any) -> evaluate.Evaluation:
    """An evaluation with other figures."""
    metrics = {**base.metrics, **{k: v for k, v in changes.items() if k in base.metrics}}
    others = {k: v for k, v in changes.items() if k not in base.metrics}
    return msgspec.structs.replace(base, metrics=metrics, **others)


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_auc_gate_looks_at_the_lower_bound(trained: Any, lower: float, bound: float) -> None:
    """A fine estimate on twenty patients is no evidence."""
    measured = with_figures(trained.evaluation, auc=Interval(max(lower, 0.99), lower, 1.0))
    gate = next(g for g in gates.judge(measured, GateConfig(auc_lower=bound)) if g.gate == "auc")
    assert gate.verdict == ("pass" if lower >= bound else "fail")
    assert gate.figure == lower


def test_a_refusal_names_gate_figure_and_bound(trained: Any) -> None:
    """Whoever is stopped must know by what, by how much, and what to do."""
    measured = with_figures(
        trained.evaluation, auc=Interval(0.82, 0.71, 0.9), ece=Interval(0.2, 0.1, 0.3),
        shortcut=shortcut.Shortcut(auc=Interval(0.99, 0.97, 1.0), fields={"site": 0.99}),
    )  # fmt: skip
    judged = gates.judge(measured, GateConfig())
    assert gates.overall(judged) == "stop"
    text = gates.message(judged)
    assert "the auc gate refused: AUC 0.820, lower 95 % bound 0.710; at least 0.8 is asked" in text
    assert "the calibration gate refused: expected calibration error 0.200; at most 0.1 is asked" in text
    assert "the shortcut gate refused: metadata alone predicts the label with AUC 0.990" in text
    assert "strongest fields: site 0.99" in text
    with pytest.raises(GateError, match=r"auc 0\.710; calibration 0\.200; shortcut 0\.970"):
        gates.refuse(judged)


def test_a_shortcut_in_between_waits_for_a_person(trained: Any) -> None:
    """JPEG size alone reaches 0.90 on a public set: neither silence nor a stop is right, a person must read it."""
    measured = with_figures(trained.evaluation, shortcut=shortcut.Shortcut(auc=Interval(0.9, 0.88, 0.92)))
    gate = next(g for g in gates.judge(measured, GateConfig()) if g.gate == "shortcut")
    assert gate.verdict == "undetermined"


@pytest.mark.parametrize(
    ("gap", "verdict"), [(0.02, "pass"), (0.3, "fail")]
)  # fmt: skip
def test_a_wide_gap_between_subgroups_refuses(trained: Any, gap: float, verdict: str) -> None:
    """A model that fails one sex hides behind a good average."""
    groups = [
        evaluate.Subgroup(factor="sex", value=v, patients=50, positive=20, negative=30, auc=Interval(a, a, a))
        for v, a in (("F", 0.95 - gap), ("M", 0.95))
    ]
    measured = with_figures(trained.evaluation, subgroups=groups, gaps=[evaluate.Gap("sex", "F", "M", gap)])
    gate = next(g for g in gates.judge(measured, GateConfig()) if g.gate == "subgroups")
    assert gate.verdict == verdict
    assert "sex F and M" in gate.detail


@given(st.lists(st.sampled_from(["pass", "fail", "undetermined"])))
def test_one_refusal_stops_and_doubt_waits(verdicts: list[Any]) -> None:
    """Nine gates passed do not outvote the tenth."""
    found = gates.overall([gates.Gate(gate="g", verdict=v, figure=0, bound=0, detail="") for v in verdicts])
    assert found == ("stop" if "fail" in verdicts else "wait" if "undetermined" in verdicts else "pass")


@pytest.mark.parametrize(
    ("years", "band"),
    [(0, "0-17"), (17.9, "0-17"), (18, "18-39"), (39, "18-39"), (60, "60-79"), (80, "80+"), (90, "80+"), (None, "unknown"),
     (float("nan"), "unknown"), (-1, "unknown")],
)  # fmt: skip
def test_age_bands(years: float | None, band: str) -> None:
    """A patient in the wrong band is in the wrong row of the table a regulator reads."""
    assert evaluate.age_band(years) == band


def test_predictive_values_follow_bayes() -> None:
    """PPV at the test part's prevalence would promise five times too much in screening."""
    assert float(evaluate.ppv(0.9, 0.9, 0.1)) == pytest.approx(0.5)
    assert float(evaluate.npv(0.9, 0.9, 0.1)) == pytest.approx(0.81 / 0.82)
    assert float(evaluate.ppv(0.0, 1.0, 0.1)) == 0


def test_a_factor_that_nobody_recorded_is_told(trained: Any) -> None:
    """A gate passed without a word on sex would read as "the same in women and men"."""
    groups = [
        evaluate.Subgroup(factor=f, value=v, patients=50, positive=20, negative=30, auc=Interval(0.9, 0.8, 1.0))
        for f, v in (("site", "A"), ("sex", "unknown"))
    ]
    measured = with_figures(trained.evaluation, subgroups=groups, gaps=[])
    gate = next(g for g in gates.judge(measured, GateConfig()) if g.gate == "subgroups")
    assert gate.detail.endswith("not recorded, hence not examined: sex")
