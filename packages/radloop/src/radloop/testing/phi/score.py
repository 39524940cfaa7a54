"""The score of a de-identification: correct over required actions, as the MIDI-B challenge counts them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from radloop.testing.phi import pixels as hidden
from radloop.testing.phi.answers import (
    CODESTREAM,
    FILE_NAME,
    META,
    PREAMBLE,
    TRAILER,
    UNUSED_BITS,
    Action,
    Answer,
    Requirement,
)


@dataclass(frozen=True)
class Output:
    """What became of one instance.

    Attributes:
        name: path of the file relative to the output folder; data: its bytes.
    """

    name: str
    data: bytes


@dataclass(frozen=True)
class Failure:
    """One requirement that was not met; `got` is what stands there (synthetic, so it may be shown)."""

    file: str
    modality: str
    requirement: Requirement
    got: str


@dataclass
class Score:
    """Required and correct by action, and what failed."""

    required: dict[Action, int] = field(default_factory=dict)
    correct: dict[Action, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Instances without output: every requirement on them counts as not met."""

    @property
    def share(self) -> float:
        """Correct over required, of all actions together; 1 where nothing is required."""
        required = sum(self.required.values())
        return sum(self.correct.values()) / required if required else 1.0

    def table(self) -> str:
        """Markdown: one line an action, then all."""
        lines = ["| action | required | correct | share |", "|---|---|---|---|"]
        for action in self.required:
            needed, met = self.required[action], self.correct.get(action, 0)
            lines.append(f"| {action} | {needed} | {met} | {met / needed:.2%} |")
        needed, met = sum(self.required.values()), sum(self.correct.values())
        return "\n".join([*lines, f"| all | {needed} | {met} | {self.share:.2%} |"])

    def misses(self) -> dict[tuple[str, str], int]:
        """How many failures by action and attribute path, most frequent first."""
        counted: dict[tuple[str, str], int] = {}
        for failure in self.failures:
            key = (str(failure.requirement.action), failure.requirement.path)
            counted[key] = counted.get(key, 0) + 1
        return dict(sorted(counted.items(), key=lambda item: -item[1]))


def score(answers: Iterable[Answer], outputs: Mapping[str, Output], *, options: Iterable[str] = ()) -> Score:
    """Hold outputs against an answer key.

    Which UID and which patient became which is read off the outputs: the first that is seen of each holds for all.

    Args:
        answers: the key.
        outputs: by `Answer.file`; an instance that is not among them was refused.
        options: code values (PS3.16 CID 7050) that the de-identification claims.
    """
    answers, chosen, result = list(answers), frozenset(options), Score()
    instances = {a.file: _Instance(a, outputs[a.file]) for a in answers if a.file in outputs}
    judge = _Judge(instances.values(), chosen)
    for answer in answers:
        instance = instances.get(answer.file)
        if instance is None:
            result.missing.append(answer.file)
        for requirement in (r for r in answer.requirements if r.holds(chosen)):
            action = requirement.action
            result.required[action] = result.required.get(action, 0) + 1
            got = "no output" if instance is None else judge.fault(instance, requirement)
            if got is None:
                result.correct[action] = result.correct.get(action, 0) + 1
            else:
                result.failures.append(Failure(answer.file, answer.modality, requirement, got))
    return result


class _Instance:
    """One output, read."""

    def __init__(self, answer: Answer, output: Output) -> None:
        self.answer, self.output = answer, output
        self.ds = pydicom.dcmread(_stream(output.data), force=True)
        self._pixels: NDArray[Any] | Exception | None = None

    def values(self, path: str) -> list[str] | None:
        """Values at a path as text; None if the attribute is not there."""
        element = _find(self.ds, path)
        if element is None:
            return None
        value = element.value
        if isinstance(value, bytes):
            return list(_readings(value)) if value else []
        if element.VR == "SQ":
            return [str(item) for item in value]
        if value is None or value == "":
            return []
        many = not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "components")
        return [str(v) for v in value] if many else [str(value)]

    def pixels(self) -> NDArray[Any] | Exception:
        """The decoded pixels, or why there are none."""
        if self._pixels is None:
            try:
                self._pixels = hidden.decoded(self.ds)
            except Exception as error:  # noqa: BLE001 - an output that cannot be decoded has not retained its pixels
                self._pixels = error
        return self._pixels


class _Judge:
    """Whether requirements are met, with what became of UIDs, patients and dates over the whole set."""

    def __init__(self, instances: Iterable[_Instance], options: frozenset[str]) -> None:
        self.moves = bool(options & {"113107"})
        self.uids: dict[str, str] = {}
        self.patients: dict[str, str] = {}
        self.shifts: dict[str, int] = {}
        top = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
        for instance in instances:
            for r in instance.answer.requirements:
                if r.action is Action.UID_CONSISTENT and r.path in top:
                    self.uids.setdefault(r.value, _first(instance.values(r.path)))
                elif r.action is Action.PATID_CONSISTENT:
                    self.patients.setdefault(r.value, _first(instance.values(r.path)))
                elif r.action is Action.DATE_SHIFTED and r.path == "StudyDate":
                    shift = _days(r.value, _first(instance.values(r.path)))
                    if shift is not None:
                        self.shifts.setdefault(instance.answer.patient_id, shift)
        self.shared = {new for new in self.uids.values() if list(self.uids.values()).count(new) > 1}
        self.shared_patients = {n for n in self.patients.values() if list(self.patients.values()).count(n) > 1}

    def fault(self, instance: _Instance, r: Requirement) -> str | None:
        """What is wrong; None if the requirement is met."""
        if r.action in (Action.PIXELS_HIDDEN, Action.PIXELS_RETAINED):
            return _pixel_fault(instance, r)
        if r.action is Action.TEXT_REMOVED:
            texts = _place(instance, r.path)
            if r.path in _BINARY:  # in which four characters in a row occur by chance, as in a UID
                return r.value if any(r.value in text for text in texts) else None
            return _left(r.value, texts)
        values = instance.values(r.path)
        if r.action is Action.TAG_RETAINED:
            return None if values is not None else "absent"
        if r.action is Action.TEXT_NOTNULL:
            return None if values and any(values) else "empty" if values is not None else "absent"
        if r.action is Action.TEXT_RETAINED:
            return None if values and _holds(values, r.value) else f"{values}"
        if r.action is Action.DATE_SHIFTED:
            return self._date_fault(instance, r, values)
        if r.action is Action.UID_CHANGED:
            return None if r.value not in (values or []) else r.value
        known, shared = (
            (self.uids, self.shared) if r.action is Action.UID_CONSISTENT else (self.patients, self.shared_patients)
        )
        if values is None:
            return None  # a reference that is gone is inconsistent with nothing
        got = _first(values)
        expected = known.setdefault(r.value, got)
        return None if got == expected and got and got not in shared else f"{got} for {expected}"

    def _date_fault(self, instance: _Instance, r: Requirement, values: list[str] | None) -> str | None:
        if not values or not values[0]:
            return None
        if any(r.value in v for v in values):
            return values[0]
        if not self.moves:
            return None
        shift, expected = _days(r.value, values[0]), self.shifts.get(instance.answer.patient_id)
        return None if shift is not None and shift == expected else f"{values[0]}, moved otherwise"


def _find(ds: Dataset, path: str) -> pydicom.DataElement | None:
    """The element at a path; None if any part of it is not there or unreadable."""
    try:
        if private := re.fullmatch(r"\(([0-9A-F]{4}),([0-9A-F]{2}) (.+)\)", path):
            block = ds.private_block(int(private[1], 16), private[3])
            return block[int(private[2], 16)]
        if plain := re.fullmatch(r"\(([0-9A-F]{4}),([0-9A-F]{4})\)", path):
            return ds[int(plain[1] + plain[2], 16)]
        *parents, keyword = path.split(".")
        for part in parents:
            name, number = part.rstrip("]").split("[")
            ds = ds[name].value[int(number)]
        return ds[keyword]
    except Exception:  # noqa: BLE001 - absent, or nothing a reader could show
        return None


def _place(instance: _Instance, path: str) -> list[str]:
    """The texts of an attribute or of a place that is none."""
    ds = instance.ds
    if path == FILE_NAME:
        return [instance.output.name]
    if path == PREAMBLE:
        return list(_readings(instance.output.data[:128]))
    if path == META:
        return [
            t for e in ds.file_meta for t in ([str(e.value)] if not isinstance(e.value, bytes) else _readings(e.value))
        ]
    if path == UNUSED_BITS:
        return list(_readings(hidden.unused_bits(ds)))
    if path == CODESTREAM:
        return list(_readings(ds.PixelData)) if "PixelData" in ds else []
    if path == TRAILER:
        return list(_readings(instance.output.data[-200:]))
    return instance.values(path) or []


def _readings(value: bytes) -> Iterable[str]:
    yield value.decode("latin-1")
    for codec in _CODECS:
        yield value.decode(codec, "ignore")


_CODECS = str.split("""
    utf-8 utf-16-le gb18030 iso2022_jp_2 shift_jis euc_kr iso8859_2 iso8859_5 iso8859_6 iso8859_7 iso8859_8 iso8859_9 tis_620
    """)


_BINARY = frozenset({FILE_NAME, CODESTREAM, UNUSED_BITS, TRAILER, PREAMBLE})
_STOP_WORDS = frozenset(str.split("a and at by da de del der des di du for in la le of on the to und von"))


def _left(secret: str, texts: list[str]) -> str | None:
    """The secret, or a word of it, if it is in one of the texts.

    Words of three letters and less count as a whole only; articles, and numbers of one or two digits beside other words of
    the secret, not at all (the challenge drops stop words too, and takes a date for one word).
    """
    words = [w for w in re.split(r"[^\w]+", secret.casefold()) if w] or [secret.casefold()]
    if len(words) > 1:
        words = [w for w in words if w not in _STOP_WORDS and not (w.isdigit() and len(w) < 3)]
    for text in (t.casefold() for t in texts):
        if secret and secret.casefold() in text and len(secret) > 3:
            return secret
        whole = set(re.split(r"[^\w]+", text))
        for word in words:
            if word in whole if len(word) <= 3 else word in text:
                return word
    return None


def _holds(values: list[str], text: str) -> bool:
    try:
        return any(abs(float(v) - float(text)) <= 1e-5 * abs(float(text)) for v in values)
    except ValueError:
        return any(text.casefold() in v.casefold() for v in values)


def _pixel_fault(instance: _Instance, r: Requirement) -> str | None:
    if r.path == "(6000,3000)":
        element = _find(instance.ds, r.path)
        return None if element is None or not any(element.value or b"") else "ink in the overlay"
    pixels = instance.pixels()
    if isinstance(pixels, Exception):
        return f"not decoded: {type(pixels).__name__}"
    if r.action is Action.PIXELS_RETAINED:
        return None if hidden.digest(pixels, r.boxes) == r.value else "other pixels"
    return None if hidden.is_hidden(r.boxes[0], float(r.value), pixels) else "legible"


def _first(values: list[str] | None) -> str:
    return values[0] if values else ""


def _days(before: str, after: str) -> int | None:
    try:
        first, second = (date(int(t[:4]), int(t[4:6]), int(t[6:8])) for t in (before, after))
    except ValueError:
        return None
    return (second - first).days


def _stream(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)
