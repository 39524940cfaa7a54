"""Which part (train, validation, test) a patient belongs to, and whether patients leak between parts.

A patient's part follows from a keyed hash of the pseudonym (`Pseudonymiser.fraction`) and is decided once: the caller
stores it and passes it back, so that later versions of a dataset never move a patient.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import combinations

import msgspec
import pyarrow as pa

from radloop.errors import DataError, GateError, SettingsError

PARTS = ("train", "validation", "test")

ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "validate", "dev", "development", "tune", "tuning"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout", "held-out", "evaluation"), "test"),
}
"""What a user's split column may say, compared in lower case."""


def part(fraction: float, fractions: Sequence[float] = (0.7, 0.15, 0.15)) -> str:
    """The part of a patient whose keyed hash is `fraction`, uniform in [0, 1).

    The interval is laid out test, validation, train: growing the training share later moves nobody into test.

    Raises:
        SettingsError: fractions are not three non-negative numbers that sum to 1.
    """
    if len(fractions) != len(PARTS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise SettingsError(
            "the split's fractions cannot be used",
            expected="three numbers >= 0 (train, validation, test) that sum to 1",
            got=", ".join(str(f) for f in fractions),
        )
    _, validation, test = fractions
    if fraction < test:
        return "test"
    return "validation" if fraction < test + validation else "train"


def parts(
    patients: Iterable[str],
    fraction: Callable[[str], float],
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    *,
    decided: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Each patient's part, sorted by patient. A part already decided is kept whatever the fractions say now.

    Args:
        patients: pseudonyms; repeats do no harm.
        fraction: `Pseudonymiser.fraction`.
        fractions: shares of train, validation, test.
        decided: parts of earlier versions (the catalog's `patients` table).
    """
    before = decided or {}
    return {p: before.get(p) or part(fraction(p), fractions) for p in sorted(set(patients))}


def given(values: Mapping[str, str]) -> dict[str, str]:
    """Parts from a split that the user brought: sop_uid to part, from sop_uid to what the column said.

    Nothing is said here of leakage: `leakage` looks at the manifest that comes of it.

    Raises:
        DataError: a value is none of `ALIASES`. It is counted, not shown: a wrongly chosen column may hold names.
    """
    wanted = {uid: ALIASES.get(str(value).strip().casefold()) for uid, value in values.items()}
    unknown = [uid for uid, value in wanted.items() if value is None]
    if unknown:
        raise DataError(
            "the split column holds values that name no part",
            expected=", ".join(sorted(ALIASES)),
            got=f"{len({values[uid] for uid in unknown})} other values in {len(unknown)} of {len(values)} rows",
            next_step="correct the column, or leave it out: radloop then splits by patient",
        )
    return {uid: value for uid, value in wanted.items() if value is not None}


class Leakage(msgspec.Struct, frozen=True, kw_only=True):
    """Patients where they must not be. Counts only: who they are never leaves the manifest.

    Attributes:
        patients: patients of the version.
        crossing_patients: patients with instances in more than one part.
        crossing: the same for each pair of parts, such as `{"train+test": 30}`.
        parts: patients of each part.
        crossing_pixels: distinct pixel contents that stand in more than one part.
        trained_on_test: for each other model, how many of this version's test patients it learnt from.
    """

    patients: int
    crossing_patients: int
    crossing: dict[str, int] = {}
    parts: dict[str, int] = {}
    crossing_pixels: int = 0
    trained_on_test: dict[str, int] = {}

    @property
    def clean(self) -> bool:
        """Nothing leaks."""
        return not (self.crossing_patients or self.crossing_pixels or any(self.trained_on_test.values()))

    @property
    def message(self) -> str:
        """One sentence with the counts."""
        found = []
        if self.crossing_patients:
            pairs = ", ".join(f"{pair}: {n}" for pair, n in self.crossing.items() if n)
            found.append(f"{self.crossing_patients} of {self.patients} patients are in more than one part ({pairs})")
        if self.crossing_pixels:
            found.append(f"{self.crossing_pixels} images stand in more than one part, pixel for pixel")
        found += [
            f"{n} of {self.parts.get('test', 0)} test patients were learnt from by {model}"
            for model, n in sorted(self.trained_on_test.items())
            if n
        ]
        return "; ".join(found) or f"no patient of {self.patients} is in more than one part"


def leakage(
    table: pa.Table,
    *,
    models: Mapping[str, Collection[str]] | None = None,
    persons: Mapping[str, str] | None = None,
) -> Leakage:
    """Look for patients and pixels that cross between parts, and for test patients that other models learnt from.

    Args:
        table: a manifest: columns patient and part; pixel_sha256 is used where it is there.
        models: for each other model of a comparison, the pseudonyms of its training and validation patients (early
            stopping, calibration and threshold are learnt from validation).
        persons: pseudonym -> the one that stands for the person, of patients that were linked: they count as one patient.
    """
    same = persons or {}
    patient_parts: dict[str, set[str]] = defaultdict(set)
    for patient, found in _parts_of(table, "patient").items():
        patient_parts[same.get(patient, patient)] |= found
    in_part: Counter[str] = Counter(p for found in patient_parts.values() for p in found)
    pairs = {f"{a}+{b}": sum({a, b} <= found for found in patient_parts.values()) for a, b in combinations(PARTS, 2)}
    pixels = _parts_of(table, "pixel_sha256") if "pixel_sha256" in table.column_names else {}
    test = {patient for patient, found in patient_parts.items() if "test" in found}
    return Leakage(
        patients=len(patient_parts),
        crossing_patients=sum(len(found) > 1 for found in patient_parts.values()),
        crossing=pairs,
        parts={p: in_part[p] for p in PARTS},
        crossing_pixels=sum(len(found) > 1 for found in pixels.values()),
        trained_on_test={
            name: len(test.intersection(same.get(patient, patient) for patient in seen))
            for name, seen in sorted((models or {}).items())
        },
    )


def _parts_of(table: pa.Table, column: str) -> dict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for key, where in zip(table[column].to_pylist(), table["part"].to_pylist(), strict=True):
        if key is not None and where is not None:
            found[key].add(where)
    return dict(found)


def refuse(leak: Leakage) -> None:
    """Raise GateError if anything leaks, naming how many of how many."""
    if not leak.clean:
        raise GateError(
            f"the leakage gate refused: {leak.message}",
            expected="0 patients in more than one part",
            got=leak.message,
            next_step="drop the given split (radloop splits by patient), or correct it so that no patient crosses",
        )
