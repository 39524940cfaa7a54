"""Gates: what an evaluation must show before a model may be registered. Each names its figure and its bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from radloop.errors import GateError
from radloop.learning.evaluate import Compared, Evaluation

Verdict = Literal["pass", "fail", "undetermined"]


class GateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds.

    Attributes:
        auc_lower: the lower 95 % bound of the test AUC must be at least this.
        ece: the expected calibration error on the test part must be at most this.
        subgroup_gap: AUC may differ by at most this between two subgroups of one factor (site, sex, age).
        margin: non-inferiority: the lower 95 % bound of challenger minus champion AUC must be above minus this.
        shortcut_review: metadata alone with a lower 95 % bound of AUC above this needs an approval.
        shortcut_stop: above this the gate refuses.
    """

    auc_lower: float = 0.80
    ece: float = 0.10
    subgroup_gap: float = 0.10
    margin: float = 0.05
    shortcut_review: float = 0.65
    shortcut_stop: float = 0.95


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """One gate's verdict. `detail` is one sentence for a reader; `figure` is None where nothing could be measured."""

    gate: str
    verdict: Verdict
    figure: float | None
    bound: float
    detail: str


def judge(evaluation: Evaluation, config: GateConfig) -> list[Gate]:
    """Every gate's verdict, in a fixed order.

    The gate `non_inferiority` is there only if there is a champion, `provenance` only if the network was trained elsewhere.
    """
    gates = [
        _leakage(evaluation),
        _auc(evaluation, config),
        _calibration(evaluation, config),
        _subgroups(evaluation, config),
        _shortcut(evaluation, config),
    ]
    if evaluation.comparison is not None:
        gates.append(_non_inferiority(evaluation, config))
    if evaluation.trained_elsewhere:
        gates.append(_provenance())
    return gates


def overall(gates: Sequence[Gate]) -> Literal["pass", "stop", "wait"]:
    """Stop if any gate failed, else wait (a person must approve) if any is undetermined, else pass."""
    verdicts = {gate.verdict for gate in gates}
    return "stop" if "fail" in verdicts else "wait" if "undetermined" in verdicts else "pass"


def message(gates: Sequence[Gate]) -> str:
    """One line for each gate that did not pass, or that all passed."""
    open_gates = [g for g in gates if g.verdict != "pass"]
    words = {"fail": "refused", "undetermined": "is undetermined and needs an approval"}
    lines = [f"the {g.gate} gate {words[g.verdict]}: {g.detail}" for g in open_gates]
    return "\n".join(lines) or f"all {len(gates)} gates passed"


def refuse(gates: Sequence[Gate]) -> None:
    """Raise GateError if any gate failed, naming gate, figure and bound."""
    failed = [g for g in gates if g.verdict == "fail"]
    if failed:
        raise GateError(
            message(failed),
            expected="; ".join(f"{g.gate} {g.bound:g}" for g in failed),
            got="; ".join(f"{g.gate} {'nothing' if g.figure is None else f'{g.figure:.3f}'}" for g in failed),
            next_step="read the report's evaluation; add or correct data, or change the bound in radloop.toml [gates]",
        )


def _leakage(evaluation: Evaluation) -> Gate:
    leak = evaluation.leakage
    figure = float(leak.crossing_patients + leak.crossing_pixels + sum(leak.trained_on_test.values()))
    return Gate(gate="leakage", verdict="pass" if leak.clean else "fail", figure=figure, bound=0.0, detail=leak.message)


def _provenance() -> Gate:
    """The leakage gate sees only what radloop trained; nobody but a person can vouch for another network."""
    detail = "the network was trained elsewhere: whether it learnt from patients of the test part is not known"
    return Gate(gate="provenance", verdict="undetermined", figure=None, bound=0.0, detail=detail)


def _auc(evaluation: Evaluation, config: GateConfig) -> Gate:
    auc = evaluation.metrics["auc"]
    return Gate(
        gate="auc",
        verdict="pass" if auc.lower >= config.auc_lower else "fail",
        figure=auc.lower,
        bound=config.auc_lower,
        detail=f"AUC {auc.value:.3f}, lower 95 % bound {auc.lower:.3f}; at least {config.auc_lower:g} is asked",
    )


def _calibration(evaluation: Evaluation, config: GateConfig) -> Gate:
    ece = evaluation.metrics["ece"]
    return Gate(
        gate="calibration",
        verdict="pass" if ece.value <= config.ece else "fail",
        figure=ece.value,
        bound=config.ece,
        detail=f"expected calibration error {ece.value:.3f}; at most {config.ece:g} is asked",
    )


def _subgroups(evaluation: Evaluation, config: GateConfig) -> Gate:
    """A gap too large fails; a subgroup without evidence is never a pass. A factor of one value has no gap."""
    widest = evaluation.gaps[0] if evaluation.gaps else None
    values: dict[str, int] = {}
    for group in evaluation.subgroups:
        values[group.factor] = values.get(group.factor, 0) + 1
    thin = [
        f"{g.factor} {g.value} ({g.patients} patients)"
        for g in evaluation.subgroups
        if g.auc is None and values[g.factor] > 1
    ]
    figure = None if widest is None else widest.difference
    seen = (
        "no two subgroups could be compared"
        if widest is None
        else (
            f"AUC differs by {widest.difference:.3f} between {widest.factor} {widest.low} and {widest.high}; "
            f"at most {config.subgroup_gap:g} is allowed"
        )
    )
    blank = [g.factor for g in evaluation.subgroups if g.value == "unknown" and values[g.factor] == 1]
    if blank:
        seen += f"; not recorded, hence not examined: {', '.join(blank)}"
    verdict: Verdict = "pass"
    if figure is not None and figure > config.subgroup_gap:
        verdict = "fail"
    elif thin:
        verdict, seen = "undetermined", f"insufficient evidence for {', '.join(thin)}; {seen}"
    return Gate(gate="subgroups", verdict=verdict, figure=figure, bound=config.subgroup_gap, detail=seen)


def _shortcut(evaluation: Evaluation, config: GateConfig) -> Gate:
    audit = evaluation.shortcut
    if audit.auc is None:
        return Gate(
            gate="shortcut", verdict="undetermined", figure=None, bound=config.shortcut_review, detail=audit.reason
        )
    lower = audit.auc.lower
    stop, review = lower > config.shortcut_stop, lower > config.shortcut_review
    strongest = ", ".join(f"{name} {value:.2f}" for name, value in list(audit.fields.items())[:3])
    return Gate(
        gate="shortcut",
        verdict="fail" if stop else "undetermined" if review else "pass",
        figure=lower,
        bound=config.shortcut_stop if stop else config.shortcut_review,
        detail=f"metadata alone predicts the label with AUC {audit.auc.value:.3f}, lower 95 % bound {lower:.3f}"
        f" (review above {config.shortcut_review:g}, stop above {config.shortcut_stop:g})"
        + (f"; strongest fields: {strongest}" if strongest else ""),
    )


def _non_inferiority(evaluation: Evaluation, config: GateConfig) -> Gate:
    comparison = evaluation.comparison
    compared: Compared | None = comparison.overall if comparison is not None else None
    if comparison is None or compared is None or compared.difference is None:
        why = "no champion" if comparison is None else comparison.reason or (compared.note if compared else "")
        return Gate(gate="non_inferiority", verdict="undetermined", figure=None, bound=-config.margin, detail=why)
    difference = compared.difference
    return Gate(
        gate="non_inferiority",
        verdict="pass" if difference.lower > -config.margin else "fail",
        figure=difference.lower,
        bound=-config.margin,
        detail=f"AUC minus that of {comparison.champion} on the same {compared.patients} patients is"
        f" {difference.value:+.3f}, lower 95 % bound {difference.lower:+.3f}; above {-config.margin:+g} is asked",
    )
