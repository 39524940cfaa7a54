"""One peer de-identifies a folder, as its documentation says. Run by deidentification_score.py in an environment that holds it.

Usage: peer_deidentify.py deid|dicom-anonymizer|dicognito IN OUT [RECIPE]

Each file of IN is written under the same relative path of OUT; one that the peer fails on is left out and its error counted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path


def deid(files: list[Path], target: Callable[[Path], Path]) -> Counter[str]:
    """deid with its recipe `deid.dicom` (default), private tags removed."""
    from deid.config import DeidRecipe
    from deid.dicom import get_identifiers, replace_identifiers

    recipe, failed = DeidRecipe(), Counter()
    for file in files:
        try:
            ids = get_identifiers([str(file)])
            done = replace_identifiers(
                dicom_files=[str(file)], deid=recipe, ids=ids, save=False, remove_private=True, strip_sequences=True
            )
            done[0].save_as(target(file))
        except Exception as error:  # noqa: BLE001 - what a peer raises is its own
            failed[f"{type(error).__name__}: {error}"[:120]] += 1
    return failed


def dicom_anonymizer(files: list[Path], target: Callable[[Path], Path]) -> Counter[str]:
    """dicom-anonymizer with its default rules: the Basic profile's table, private tags removed."""
    from dicomanonymizer import anonymize_dicom_file

    failed: Counter[str] = Counter()
    for file in files:
        try:
            anonymize_dicom_file(str(file), str(target(file)))
        except Exception as error:  # noqa: BLE001 - what a peer raises is its own
            failed[f"{type(error).__name__}: {error}"[:120]] += 1
    return failed


def dicognito(files: list[Path], target: Callable[[Path], Path]) -> Counter[str]:
    """dicognito as its README shows, one anonymizer for the set."""
    import pydicom
    from dicognito.anonymizer import Anonymizer

    anonymizer, failed = Anonymizer(seed="1"), Counter()
    for file in files:
        try:
            with pydicom.dcmread(file) as dataset:
                anonymizer.anonymize(dataset)
                dataset.save_as(target(file))
        except Exception as error:  # noqa: BLE001 - what a peer raises is its own
            failed[f"{type(error).__name__}: {error}"[:120]] += 1
    return failed


def main(name: str, source: Path, out: Path) -> None:
    """De-identify and print what failed."""

    def target(file: Path) -> Path:
        path = out / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    peers = {"deid": deid, "dicom-anonymizer": dicom_anonymizer, "dicognito": dicognito}
    print(json.dumps(peers[name](sorted(source.rglob("*.dcm")), target)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
