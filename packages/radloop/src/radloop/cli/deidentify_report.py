"""The report of `radloop deidentify`: facts without any name, as JSON or as one HTML file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radloop.cli import output

if TYPE_CHECKING:
    from radloop.dicom.batch import Recipe, Summary
    from radloop.dicom.profile import Profile

OUTCOMES = {
    "cleaned": "cleaned",
    "kept": "cleaned by an earlier run",
    "same": "copies of these",
    "refused": "refused",
}
_ACTIONS = {
    "REMOVE": "removed",
    "EMPTY": "emptied",
    "DUMMY": "dummy",
    "MAP_UID": "UID replaced",
    "SHIFT": "date moved",
    "AGE": "age capped",
    "CLEAN": "words kept",
    "RECURSE": "items cleaned",
    "KEEP": "kept",
    "KEEP_STRING": "kept if fit",
    "KEEP_TEXT": "text kept",
    "CODE": "code",
}
_PLACES = 50


def facts(summary: Summary, recipe: Recipe, *, dry_run: bool) -> dict[str, Any]:
    """All that the report says, JSON-able. Names attributes and pseudonymous counts, never a value or a path."""
    from radloop.dicom.profile import TABLE_SOURCE

    deidentifier = recipe.deidentifier()
    profile = deidentifier.profile
    attributes: dict[str, dict[str, int]] = {}
    # Keywords first, then what has none: private attributes and group lengths.
    for (path, action), count in sorted(
        summary.attributes.items(), key=lambda row: (row[0][0].startswith("("), row[0])
    ):
        attributes.setdefault(path, {})[action] = count
    return {
        "version": version("radloop"),
        "generated_at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
        "dry_run": dry_run,
        "profile": profile.name,
        "options": list(profile.options),
        "codes": [{"value": value, "meaning": meaning} for value, meaning in profile.codes],
        "temporal": profile.temporal,
        "table": TABLE_SOURCE,
        "pixels_mode": recipe.pixels,
        "site": recipe.site,
        "key_id": deidentifier.pseudonymiser.key_id,
        "files": {
            "all": summary.files,
            **{name: summary.outcomes[name] for name in OUTCOMES},
            "dicomdir": summary.skipped,
        },
        "patients": len(summary.patients),
        "studies": len(summary.studies),
        "series": len(summary.series),
        "refused": _refused(summary),
        "pixels": [{"decision": name, "files": count} for name, count in sorted(summary.pixels.items())],
        "attributes": [{"path": path, "actions": actions} for path, actions in attributes.items()],
        "left": _left(summary, recipe, profile),
    }


def _refused(summary: Summary) -> list[dict[str, Any]]:
    places: dict[str, list[int]] = {}
    for number, reason in summary.refused:
        places.setdefault(reason, []).append(number)
    return [
        {"reason": reason, "what": what, "files": count, "places": places[reason][:_PLACES]}
        for (reason, what), count in sorted(summary.reasons.items(), key=lambda row: (-row[1], row[0]))
    ]


def _left(summary: Summary, recipe: Recipe, profile: Profile) -> list[str]:
    """What the reader must still see to."""
    unseen = sum(count for decision, count in summary.pixels.items() if decision.endswith("not looked at"))
    faces = "Faces in head CT and MR are not removed."
    if profile.cleans_faces:
        faces = "Render a sample of the heads: that a face is gone is what your face cleaner says."
        faces = faces if recipe.face_cleaner else "Images that may show a face were refused, as far as headers tell."
    said = [
        f"Look for text in the pixels of {output.plural(unseen, 'file')}, or of a sample: radloop did not."
        if unseen
        else "Look at a sample of the images: what was done about text in the pixels is under Pixels.",
        faces,
        "Keep the key apart from the images. Who has both can test whether a known patient is among them, and undo "
        "date shifts.",
    ]
    if summary.outcomes["refused"]:
        said.insert(0, "Decide on the refused files: they are not in the output.")
    if profile.shifts_dates:
        said.append("Dates were moved, not removed: that is not HIPAA Safe Harbor (45 CFR 164.514(b)(2)).")
    if profile.keeps_dates:
        said.append("Dates are the true ones: that is not HIPAA Safe Harbor (45 CFR 164.514(b)(2)).")
    if profile.name != "basic":
        said.append("Sex, age and other characteristics are kept: few patients may share a rare combination.")
    said.append(
        "Have it agreed to: a data use agreement, an ethics approval or an expert determination is not in here."
    )
    return said


def write(path: Path, told: dict[str, Any]) -> None:
    """The report, whole or not there: JSON for .json, else HTML."""
    import msgspec

    data = msgspec.json.format(msgspec.json.encode(told), indent=2) if path.suffix == ".json" else _html(told).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _html(told: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    files = told["files"]
    there = files["cleaned"] + files["kept"]
    counted = [
        (said, files[name]) for name, said in {"all": "files", **OUTCOMES, "dicomdir": "DICOMDIR left out"}.items()
    ]
    counted += [(name, told[name]) for name in ("patients", "studies", "series")]
    places = sorted({place for row in told["refused"] for place in row["places"]})
    more = " and more" if len(places) < files["refused"] else ""
    environment = Environment(
        loader=PackageLoader("radloop.cli"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("deidentify.html.j2").render(
        **told,
        headline=f"{output.plural(there, 'file')} in the output, of {output.plural(files['all'], 'file')}.",
        counted=counted,
        output_files=there,
        actions=_ACTIONS,
        places=", ".join(map(str, places)) + more,
    )
