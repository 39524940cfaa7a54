"""Synthetic PHI, its answer key and the score: a score that cannot fall measures nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian

from radloop.testing.phi.answers import PLACES, Action, Answer, Requirement, read_key, write_key
from radloop.testing.phi.generate import Specimen, generate, secrets_in, write
from radloop.testing.phi.pixels import decoded
from radloop.testing.phi.score import Output, Score, score

OPTIONS = frozenset({"113107", "113108"})


@pytest.fixture(scope="module")
def specimens() -> list[Specimen]:
    return list(generate(5, 44))


@pytest.fixture(scope="module")
def perfect(specimens: list[Specimen]) -> dict[str, Output]:
    return {s.file: Output(f"{n}.dcm", toy(s)) for n, s in enumerate(specimens)}


def toy(specimen: Specimen) -> bytes:
    """A cleaner that knows the answers: what a score of 1 has to be given for."""
    ds = pydicom.dcmread(io.BytesIO(specimen.data))
    required = [r for r in specimen.answer.requirements if r.holds(OPTIONS)]
    present = {r.path: "" for r in required if r.action is Action.TAG_RETAINED}
    present |= {r.path: "REMOVED" for r in required if r.action is Action.TEXT_NOTNULL}
    for r in required:
        if r.action is Action.TEXT_REMOVED and r.path not in PLACES and not r.path.startswith("("):
            place(ds, r.path, present.get(r.path))
        elif r.action is Action.UID_CHANGED:
            place(ds, r.path, renamed(r.value))
        elif r.action is Action.PATID_CONSISTENT:
            place(ds, r.path, "P" + renamed(r.value)[-9:])
        elif r.action is Action.DATE_SHIFTED:
            old = ds_at(ds, r.path)[r.path.split(".")[-1]].value if present_at(ds, r.path) else ""
            place(ds, r.path, earlier(str(old)))
    uncovered(ds, [box for r in required if r.action is Action.PIXELS_HIDDEN for box in r.boxes])
    for tag in [t for t in list(ds.keys()) if t.is_private or t.group in (0x6000, 0xFFFC)]:
        del ds[tag]
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.preamble = b"\0" * 128
    return written(ds)


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def renamed(identifier: str) -> str:
    return f"2.25.{int.from_bytes(identifier.encode(), 'big') % 10**30}"


def earlier(text: str) -> str:
    """A year of the Gregorian cycle earlier: 146,097 days are 400 years."""
    return f"{int(text[:4]) - 400:04d}{text[4:]}" if text else ""


def ds_at(ds: Dataset, path: str) -> Dataset:
    for part in path.split(".")[:-1]:
        name, number = part.rstrip("]").split("[")
        ds = ds[name].value[int(number)]
    return ds


def present_at(ds: Dataset, path: str) -> bool:
    return path.split(".")[-1] in ds_at(ds, path)


def place(ds: Dataset, path: str, value: str | None) -> None:
    item, keyword = ds_at(ds, path), path.split(".")[-1]
    if value is None:
        if keyword in item:
            del item[keyword]
    else:
        setattr(item, keyword, value)


def uncovered(ds: Dataset, boxes: list[object]) -> None:
    """Paint over the boxes and write the pixels uncompressed, without what stood in unused bits."""
    if "PixelData" not in ds or ds.BitsAllocated == 1:
        return
    pixels = np.array(decoded(ds))
    for box in boxes:
        pixels[box.frame, box.top : box.bottom, box.left : box.right] = 0  # type: ignore[attr-defined]
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OW" if ds.BitsAllocated == 16 else "OB"
    ds["PixelData"].is_undefined_length = False


def result(answers: list[Answer], outputs: dict[str, Output]) -> Score:
    return score(answers, outputs, options=OPTIONS)


def test_a_perfect_cleaner_scores_one(specimens: list[Specimen], perfect: dict[str, Output]) -> None:
    """If the key contradicted itself, nobody's score would mean anything."""
    scored = result([s.answer for s in specimens], perfect)
    assert scored.failures == []
    assert scored.share == 1
    assert set(scored.required) == set(Action)
    assert min(scored.required.values()) > 20


def test_doing_nothing_scores_low(specimens: list[Specimen]) -> None:
    """Every planted value is seen by the scorer in its place: a scorer blind for one script would flatter everybody."""
    same = {s.file: Output(s.file, s.data) for s in specimens}
    scored = result([s.answer for s in specimens], same)
    kept = {Action.TAG_RETAINED, Action.TEXT_NOTNULL, Action.TEXT_RETAINED, Action.PIXELS_RETAINED}
    kept |= {Action.UID_CONSISTENT, Action.PATID_CONSISTENT}
    for action in Action:
        assert scored.correct.get(action, 0) == (scored.required[action] if action in kept else 0), action


def test_an_instance_without_output_earns_nothing(specimens: list[Specimen], perfect: dict[str, Output]) -> None:
    """Refusing everything is no de-identification."""
    outputs = dict(list(perfect.items())[1:])
    scored = result([s.answer for s in specimens], outputs)
    assert scored.missing == [specimens[0].file]
    assert {f.file for f in scored.failures} == {specimens[0].file}
    assert scored.share < 1


def spoil(data: bytes, change: Callable[[Dataset], None]) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(data))
    change(ds)
    return written(ds)


def blank(ds: Dataset) -> None:
    ds.Manufacturer = ""


def drop(ds: Dataset) -> None:
    del ds.AccessionNumber


def name(ds: Dataset) -> None:
    ds.PatientName = "Dr. Nobody"


def unmoved(ds: Dataset) -> None:
    ds.SeriesDate = f"{int(ds.SeriesDate[:4]) + 1}{ds.SeriesDate[4:]}"


def other_uid(ds: Dataset) -> None:
    ds.StudyInstanceUID = "2.25.7"


def other_patient(ds: Dataset) -> None:
    ds.PatientID = "P7"


def no_uid(ds: Dataset) -> None:
    ds.SeriesInstanceUID = ""


def dot(ds: Dataset) -> None:
    value = bytearray(ds.PixelData)
    value[-50:-40] = bytes(255 - b for b in value[-50:-40])
    ds.PixelData = bytes(value)


@pytest.mark.parametrize(
    ("change", "actions"),
    [
        (blank, {Action.TEXT_RETAINED}),
        (drop, {Action.TAG_RETAINED}),
        (unmoved, {Action.DATE_SHIFTED}),
        (other_uid, {Action.UID_CONSISTENT}),
        (other_patient, {Action.PATID_CONSISTENT}),
        (no_uid, {Action.TEXT_NOTNULL, Action.UID_CONSISTENT}),
        (dot, {Action.PIXELS_RETAINED}),
    ],
)
def test_each_action_sees_its_own_violation(
    change: Callable[[Dataset], None],
    actions: set[Action],
    specimens: list[Specimen],
    perfect: dict[str, Output],
) -> None:
    """A requirement that nothing violates is decoration."""
    number = next(n for n, s in enumerate(specimens) if s.answer.modality == "MR" and s.file.endswith("_02.dcm"))
    file = specimens[number].file
    spoiled = perfect | {file: Output("x.dcm", spoil(perfect[file].data, change))}
    scored = result([s.answer for s in specimens], spoiled)
    assert {f.requirement.action for f in scored.failures} == actions
    assert {f.file for f in scored.failures} == {file}


@pytest.mark.parametrize("action", [Action.TEXT_REMOVED, Action.UID_CHANGED, Action.DATE_SHIFTED])
def test_what_comes_back_is_seen(action: Action, specimens: list[Specimen], perfect: dict[str, Output]) -> None:
    """One value put back is one failure, in its attribute."""
    for specimen in specimens[:12]:
        paths = [r for r in specimen.answer.requirements if r.holds(OPTIONS) and r.action is action]
        for r in [r for r in paths if r.path not in PLACES and not r.path.startswith("(")][::5]:
            back = spoil(perfect[specimen.file].data, lambda ds, r=r: place(ds, r.path, r.value))
            one = score([only(specimen.answer, r)], {specimen.file: Output("x.dcm", back)}, options=OPTIONS)
            assert [f.requirement for f in one.failures] == [r], r


def only(answer: Answer, requirement: Requirement) -> Answer:
    return Answer(answer.file, answer.sop_uid, answer.patient_id, answer.modality, (requirement,))


def test_text_that_is_left_in_pixels_is_seen(specimens: list[Specimen], perfect: dict[str, Output]) -> None:
    """Half a name painted over is a name."""
    burned = [
        s for s in specimens if any(r.action is Action.PIXELS_HIDDEN and len(r.boxes) for r in s.answer.requirements)
    ]
    assert len(burned) > 5
    for specimen in burned:
        ds = pydicom.dcmread(io.BytesIO(specimen.data))
        pixels = np.array(decoded(ds))
        boxes = [r.boxes[0] for r in specimen.answer.requirements if r.action is Action.PIXELS_HIDDEN and r.boxes]
        for box in boxes:
            pixels[box.frame, box.top : box.bottom, box.left : (box.left + box.right) // 2] = 0
        clean = pydicom.dcmread(io.BytesIO(perfect[specimen.file].data))
        clean.PixelData = pixels.tobytes()
        half = {specimen.file: Output("x.dcm", written(clean))}
        failed = score([specimen.answer], half, options=OPTIONS).failures
        assert [f.requirement.action for f in failed].count(Action.PIXELS_HIDDEN) == len(boxes)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, specimens: list[Specimen]) -> None:
    """Otherwise a score of today cannot be compared with one of tomorrow."""
    again = list(generate(5, 3))
    assert [s.data for s in again] == [s.data for s in specimens[:3]]
    assert [s.data for s in generate(6, 3)] != [s.data for s in again]
    answers = write(tmp_path, iter(again))
    assert read_key(tmp_path / "answer_key.json") == answers == [s.answer for s in again]
    assert (tmp_path / "images" / again[0].file).read_bytes() == again[0].data
    write_key([], tmp_path / "empty.json")
    assert read_key(tmp_path / "empty.json") == []


def test_every_object_is_dicom_and_names_are_in_many_scripts(specimens: list[Specimen]) -> None:
    """What no reader opens proves nothing; nor does a set in English only."""
    many = list(generate(11, 150, burned_in=False))
    read = [pydicom.dcmread(io.BytesIO(s.data)) for s in many]
    assert {str(ds.get("SpecificCharacterSet")) for ds in read} >= {"ISO_IR 192", "GB18030", "ISO_IR 126", "ISO_IR 144"}
    assert len({str(ds.SpecificCharacterSet) for ds in read}) >= 11
    assert {ds.Modality for ds in read} == {"CR", "DX", "CT", "MR", "US", "PT", "MG", "OT", "SR", "SEG", "RTSTRUCT"}
    assert len({ds.file_meta.TransferSyntaxUID for ds in read}) == 5
    for specimen, ds in zip(many, read, strict=True):
        assert str(ds.PatientName) == specimen.who.patient_name
        assert specimen.who.patient_id in secrets_in(specimen)
        assert specimen.who.patient_id.encode() in specimen.data
