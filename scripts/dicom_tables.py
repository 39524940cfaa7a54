#!/usr/bin/env python3
"""Write dicom/iods.csv and dicom/iod_types.csv from the module tables of PS3.3 that highdicom carries.

    .venvs/core/bin/python scripts/dicom_tables.py

Run it when highdicom brings a new edition of the standard; the tests compare both files with what it would write.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import tag_for_keyword

HERE = Path(__file__).resolve().parents[1] / "packages/radloop/src/radloop/dicom"
TEXT_VRS = frozenset({"LO", "LT", "SH", "ST", "UC", "UT", "UR", "PN", "AE", "AS", "DA", "DT", "TM"})

# SOP classes that PS3.4 has retired, still found in archives, with the IOD nearest to what they held.
RETIRED = {
    "1.2.840.10008.5.1.4.1.1.3": "ultrasound-multi-frame-image",
    "1.2.840.10008.5.1.4.1.1.5": "nuclear-medicine-image",
    "1.2.840.10008.5.1.4.1.1.6": "ultrasound-image",
    "1.2.840.10008.5.1.4.1.1.12.3": "x-ray-angiographic-image",
}
# What is no image: how it is handled. An IOD that stands nowhere here and holds no image is refused.
WAVEFORMS = frozenset(
    str.split("""
    12-lead-ecg ambulatory-ecg general-ecg general-32-bit-ecg arterial-pulse-waveform hemodynamic-waveform
    basic-cardiac-electrophysiology-waveform body-position-waveform electromyogram electrooculogram
    multi-channel-respiratory-waveform respiratory-waveform routine-scalp-electroencephalogram
    sleep-electroencephalogram
    """)
)
OBJECTS = frozenset(
    str.split("""
    autorefraction-measurements c-arm-photon-electron-radiation c-arm-photon-electron-radiation-record
    content-assessment-results ct-performed-procedure-protocol deformable-spatial-registration
    intraocular-lens-calculations keratometry-measurements lensometry-measurements
    macular-grid-thickness-and-volume-report microscopy-bulk-simple-annotations mr-spectroscopy
    ophthalmic-axial-measurements ophthalmic-visual-field-static-perimetry-measurements real-world-value-mapping
    robotic-arm-radiation robotic-arm-radiation-record rt-beams-delivery-instruction rt-beams-treatment-record
    rt-brachy-application-setup-delivery-instruction rt-brachy-treatment-record rt-ion-beams-treatment-record
    rt-ion-plan rt-patient-position-acquisition-instruction rt-physician-intent rt-plan rt-radiation-record-set
    rt-radiation-salvage-record rt-radiation-set rt-radiation-set-delivery-instruction rt-segment-annotation
    rt-structure-set rt-treatment-preparation rt-treatment-summary-record spatial-fiducials spatial-registration
    spectacle-prescription-report stereometric-relationship subjective-refraction-measurements surface-scan-mesh
    surface-scan-point-cloud surface-segmentation tomotherapeutic-radiation tomotherapeutic-radiation-record
    tractography-results visual-acuity-measurements xa-performed-procedure-protocol
    """)
)
NO_IMAGES = ("encapsulated-", "video-")
IMAGES_BY_NAME = frozenset(
    str.split("""
    breast-tomosynthesis-image corneal-topography-map enhanced-us-volume height-map-segmentation
    ophthalmic-thickness-map ophthalmic-optical-coherence-tomography-b-scan-volume-analysis parametric-map rt-dose
    segmentation
    """)
)


def kind_of(iod: str) -> str:
    """How instances of an IOD are handled: image, object, structured, presentation, waveform; empty: refused."""
    if iod.startswith(NO_IMAGES):
        return ""
    if iod in WAVEFORMS:
        return "waveform"
    if iod in OBJECTS:
        return "object"
    if iod.endswith("presentation-state"):
        return "presentation"
    if iod.endswith(("-sr", "-sr-document")) or iod in ("procedure-log", "key-object-selection-document"):
        return "structured"
    return "image" if iod.endswith("-image") or iod in IMAGES_BY_NAME else ""


def _standard(name: str) -> Any:
    return json.loads((resources.files("highdicom") / "_standard" / f"{name}.json").read_text(encoding="utf-8"))


def iods() -> list[tuple[str, str, str]]:
    """SOP class UID, IOD and kind of every storage class, by UID."""
    found = {**_standard("sop_class_iod_map"), **RETIRED}
    return [(uid, iod, kind_of(iod)) for uid, iod in sorted(found.items())]


def _strictest(iod: str, modules: Any, attributes: Any) -> dict[tuple[str, str], str]:
    types: dict[tuple[str, str], str] = {}
    for module in modules[iod]:
        for a in attributes.get(module["key"], ()):
            place = (a["keyword"], a["path"][-1] if a["path"] else "")
            types[place] = min(types.get(place, "3"), (a["type"] or "3")[0])
    return types


def _matters(keyword: str, types: set[str], actions: dict[str, str]) -> bool:
    """Whether the attribute's Type decides what is done: a compound action, a Z, or text that no row names."""
    action = actions.get(keyword)
    if action is not None:
        return "/" in action or (action == "Z" and "1" in types)
    tag = tag_for_keyword(keyword)
    vr = DicomDictionary[tag][0] if tag in DicomDictionary else "UN"
    return vr in TEXT_VRS and bool(types & {"1", "2"})


def types() -> list[tuple[str, str, str, str]]:
    """Keyword, enclosing sequence, usual Type, and exceptions `Type:iod iod;...` where the Type matters."""
    modules, attributes = _standard("iod_module_map"), _standard("module_attribute_map")
    with (HERE / "profile_table.csv").open(encoding="utf-8", newline="") as file:
        actions = {row["keyword"]: row["basic"] for row in csv.DictReader(file)}
    by_place: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for iod in sorted({iod for _, iod, kind in iods() if kind}):
        for place, type_ in _strictest(iod, modules, attributes).items():
            by_place[place][iod] = type_
    rows = []
    for (keyword, parent), of in sorted(by_place.items()):
        if not _matters(keyword, set(of.values()), actions):
            continue
        usual = Counter(of.values()).most_common(1)[0][0]
        others: dict[str, list[str]] = defaultdict(list)
        for iod, type_ in of.items():
            if type_ != usual:
                others[type_].append(iod)
        exceptions = ";".join(f"{type_}:{' '.join(others[type_])}" for type_ in sorted(others))
        rows.append((keyword, parent, usual, exceptions))
    return rows


def main() -> int:
    """Write both files."""
    for name, head, rows in (
        ("iods.csv", ("sop_class_uid", "iod", "kind"), iods()),
        ("iod_types.csv", ("keyword", "parent", "type", "exceptions"), types()),
    ):
        with (HERE / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
