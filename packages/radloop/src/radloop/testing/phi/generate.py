"""A seeded set of instances with synthetic PHI and its answer key."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from radloop.testing.phi import pixels as hidden
from radloop.testing.phi.answers import FILE_NAME, Action, Answer, Box, Requirement, write_key
from radloop.testing.phi.identities import MORE_SCRIPTS, Identity, identity
from radloop.testing.phi.objects import KINDS, Kind, build
from radloop.testing.phi.planting import Planting, Visit, as_date, plant_header, require_kept, spoken, words_of


@dataclass(frozen=True)
class Specimen:
    """One instance with PHI.

    Attributes:
        file: relative path, which names the patient too; data: the Part 10 file's bytes.
        answer: what is required; who: of whom it is.
    """

    file: str
    data: bytes
    answer: Answer
    who: Identity


def generate(
    seed: int, instances: int, *, kinds: tuple[str, ...] = tuple(KINDS), burned_in: bool = True
) -> Iterator[Specimen]:
    """Draw instances: patients with one or two studies each, a kind after the other, two instances of each image kind.

    Args:
        seed: the same seed gives the same bytes.
        instances: how many.
        kinds: of `objects.KINDS`.
        burned_in: whether consoles wrote over ultrasound and screenshots, and into some radiographs.
    """
    rng, made, study = np.random.default_rng(seed), 0, 0
    visit = _visit(seed, 0, rng)
    while made < instances:
        kind = KINDS[kinds[study % len(kinds)]]
        dependent = kind.modality in ("SEG", "RTSTRUCT", "SR")
        if not dependent and study:  # these describe the images of the visit before them
            visit = _visit(seed, study, rng)
        for number in range(min(1 if dependent else 2, instances - made)):
            yield _specimen(kind, visit, study, number + 1, rng, burned_in)
            made += 1
        study += 1


def write(folder: Path, specimens: Iterator[Specimen]) -> list[Answer]:
    """Write a set as files under `folder/images`, and its key as `folder/answer_key.json`."""
    answers = []
    for specimen in specimens:
        path = folder / "images" / specimen.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(specimen.data)
        answers.append(specimen.answer)
    write_key(answers, folder / "answer_key.json")
    return answers


def secrets_in(specimen: Specimen) -> frozenset[str]:
    """What may stand nowhere in the output's bytes, in no encoding: long enough not to occur by chance."""
    who, found = specimen.who, set()
    for name in (who.patient_name, who.mother, who.referring, who.performing, who.operator, who.reader):
        found |= {w for w in words_of(name) if len(w) > (5 if w.isascii() else 2)}
        found |= {name, spoken(name)}
    found |= {who.patient_id, who.other_id, who.address, who.phone, who.email, who.institution, who.birth_name}
    found |= {who.device_serial, specimen.answer.sop_uid}
    return frozenset(found)


def _visit(seed: int, study: int, rng: np.random.Generator) -> Visit:
    """Each third visit is a former patient's."""
    who = identity(1000 * seed + (study - 1 if study % 3 == 2 else study), MORE_SCRIPTS)
    day = date(2015, 1, 1) + timedelta(days=int(rng.integers(3400)))
    day = max(day, as_date(who.birth_date) + timedelta(days=7000))
    accession = f"A{int(rng.integers(10**7, 10**8))}"
    digits = "".join(c for c in who.patient_id if c.isdigit()).lstrip("0")
    root = f"1.2.826.0.1.3680043.9.{digits}.{day:%Y%m%d}.{study + 1}"  # as some modalities make them
    return Visit(who, day, accession, root, root + ".99")


def _specimen(kind: Kind, visit: Visit, study: int, number: int, rng: np.random.Generator, burned_in: bool) -> Specimen:
    ds, pixels = build(kind, rng)
    p = Planting(ds, visit, kind, rng)
    series_uid = f"{visit.study_uid}.{study}"
    sop_uid = f"{series_uid}.{number}"
    plant_header(p, number, sop_uid, series_uid)
    if pixels is not None:
        _plant_pixels(p, pixels, burned_in)
        visit.previous.append((kind.sop_class, sop_uid))
    require_kept(p)
    who = visit.who
    folder = f"{who.patient_id}_{as_date(who.birth_date):%d%b%Y}"
    file = f"{folder}/{visit.accession}_{kind.modality}/IM{study:04d}_{number:02d}.dcm"
    p.require(Action.TEXT_REMOVED, FILE_NAME, who.patient_id)
    p.require(Action.TEXT_REMOVED, FILE_NAME, visit.accession)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = UID(kind.sop_class), UID(sop_uid)
    data = _written(p)
    answer = Answer(file, sop_uid, who.patient_id, kind.modality, tuple(_once(p.required)))
    return Specimen(file, data, answer, who)


def _plant_pixels(p: Planting, pixels: Any, burned_in: bool) -> None:
    kind = p.kind
    boxes: tuple[Box, ...] = ()
    if kind.modality in ("CR", "DX"):
        hidden.mark_side(p, pixels)
    always = kind.modality in ("US", "OT")
    if burned_in and (always or (kind.modality in ("CR", "DX") and p.chance(0.5))):
        boxes = hidden.burn_in(p, pixels)
    if always or boxes:  # consoles seldom fill it in, and CR readers write NO whatever is on the film
        p.ds.BurnedInAnnotation = "NO" if kind.modality in ("CR", "DX") else ""
        if not p.ds.BurnedInAnnotation:
            del p.ds.BurnedInAnnotation
    if kind.modality == "CT" and p.chance(0.3):
        hidden.hide_in_unused_bits(p, pixels)
    syntaxes = {"CR": JPEGBaseline8Bit, "US": JPEGBaseline8Bit, "DX": JPEG2000Lossless, "CT": RLELossless}
    plain = str(p.ds.file_meta.TransferSyntaxUID)
    syntax = syntaxes.get(kind.modality, plain) if p.chance(0.4) else plain
    if any(r.path == "(unused bits)" for r in p.required):
        syntax = ExplicitVRLittleEndian
    comment = f"{p.who.patient_id} {hidden.latin(p)}" if p.chance(0.5) else ""
    hidden.write(p, pixels, str(syntax), comment)
    hidden.require_pixels(p, boxes)
    if kind.modality in ("CR", "CT", "MR", "PT") and p.chance(0.25):
        hidden.overlay(p)
    if p.chance(0.15):
        hidden.trail(p)


def _written(p: Planting) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, p.ds, enforce_file_format=True)
    return buffer.getvalue()


def _once(requirements: list[Requirement]) -> Iterator[Requirement]:
    """Each requirement once."""
    yield from dict.fromkeys(requirements)
