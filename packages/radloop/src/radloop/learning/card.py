"""The model card (Mitchell et al., FAT* 2019): what it is for, what it was shown, how well it did, where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from radloop.learning.evaluate import Evaluation
from radloop.learning.gates import Gate
from radloop.learning.package import Identity, Inputs
from radloop.learning.statistics import Interval

NOT_A_DEVICE = (
    "This is not a medical device. It has no regulatory clearance. It must not be used to diagnose, to treat, or to"
    " decide about the care of a person; whoever would change that carries out the conformity assessment that their"
    " law asks for."
)
LIMITS = (
    "Figures hold for the sites, scanners, ages and prevalence of the test part; elsewhere they are unknown.",
    "The probability is calibrated at the validation part's prevalence; predictive values are for the declared one.",
    "Subgroups marked insufficient evidence were not shown to work.",
    "Inputs of another modality are refused; another body part or projection is not noticed.",
    "Pictures of where an answer came from are no explanation.",
)
ELSEWHERE = (
    "The network was trained elsewhere; on whose patients is not known here. Where patients of the test part were among them,"
    " its figures are too good. Calibration and threshold were fitted here, on the validation part."
)


def card(
    evaluation: Evaluation,
    gates: Sequence[Gate],
    identity: Identity,
    inputs: Inputs,
    *,
    intended_use: str,
) -> dict[str, Any]:
    """The card as plain JSON-able data; nothing in it tells a time, a host or a path."""
    return {
        "task": identity.task,
        "not_a_medical_device": NOT_A_DEVICE,
        "intended_use": intended_use or "none was stated: research and development only",
        "identity": msgspec.to_builtins(identity),
        "inputs": msgspec.to_builtins(inputs),
        "decision": msgspec.to_builtins(evaluation.decision),
        "data": evaluation.parts,
        "metrics": msgspec.to_builtins(evaluation.metrics),
        "subgroups": msgspec.to_builtins(evaluation.subgroups),
        "shortcut": msgspec.to_builtins(evaluation.shortcut),
        "gates": msgspec.to_builtins(list(gates)),
        "training": ELSEWHERE if evaluation.trained_elsewhere else "by radloop, on the train part",
        "limits": list(LIMITS),
    }


def write(data: dict[str, Any], folder: Path) -> None:
    """Write `model_card.json` and `MODEL_CARD.md` into a package folder."""
    text = msgspec.json.format(msgspec.json.encode(data, order="deterministic"), indent=1)
    (folder / "model_card.json").write_bytes(text + b"\n")
    (folder / "MODEL_CARD.md").write_text(markdown(data), encoding="utf-8")


def markdown(data: dict[str, Any]) -> str:
    """The card for a reader."""
    inputs, decision, identity = data["inputs"], data["decision"], data["identity"]
    modalities = ", ".join(inputs["modalities"]) or "any modality"
    lines = [
        f"# Model card: {data['task']}",
        "",
        f"**{data['not_a_medical_device']}**",
        "",
        f"Intended use: {data['intended_use']}",
        "",
        f"Input: one grey-scale image ({modalities}), averaged down to {inputs['size']} x {inputs['size']} pixels."
        f" Output: probability of {_cell(inputs['positive'])} against {_cell(inputs['negative'])}, and a decision from"
        f" {decision['threshold']:.3f} on.",
        "",
        *_table(("identity", "value"), [(k.replace("_", " "), v) for k, v in identity.items()]),
        "## Data",
        "",
        f"Trained: {data['training']}",
        "",
        *_table(
            ("part", "patients", "images", "positive images"),
            [(k, v["patients"], v["images"], v["positive"]) for k, v in data["data"].items()],
        ),
        "## Performance on the test part",
        "",
        f"95 % intervals resample patients. PPV and NPV at a prevalence of {decision['prevalence']:.3g}.",
        "",
        *_table(("figure", "value", "95 % interval"), [(k, *_interval(v)) for k, v in data["metrics"].items()]),
        "## Subgroups (AUC)",
        "",
        *_table(
            ("factor", "value", "patients", "positive", "AUC", "95 % interval"),
            [
                (g["factor"], g["value"], g["patients"], g["positive"], *_interval(g["auc"], g["note"]))
                for g in data["subgroups"]
            ],
        ),
        "## Gates",
        "",
        *_table(("gate", "verdict", "why"), [(g["gate"], g["verdict"], g["detail"]) for g in data["gates"]]),
        "## Limits",
        "",
        *(f"- {limit}" for limit in data["limits"]),
        "",
    ]
    return "\n".join(lines)


def _interval(value: dict[str, Any] | None, note: str = "") -> tuple[str, str]:
    if value is None:
        return note, ""
    interval = msgspec.convert(value, Interval)
    return f"{interval.value:.3f}", f"{interval.lower:.3f} to {interval.upper:.3f} ({interval.method})"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(_cell(v) for v in row)} |" for row in rows), ""]
