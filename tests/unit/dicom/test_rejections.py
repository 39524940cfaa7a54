"""Rejection notes from whoever made the images: what they name is not used any more, here or when it comes."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from radloop.catalog.schema import Archived, Member, QuarantineState, Reason, Status
from radloop.catalog.store import Catalog
from radloop.dicom import results
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.rejections import read_note, take_notes
from radloop.dicom.uids import Pseudonymiser
from radloop.serving.reading import images_of

KEY = bytes(range(32))
QUALITY = Code("113001", "DCM", "Rejected for Quality Reasons")
AT = datetime(2026, 11, 27, tzinfo=UTC)


@pytest.fixture
def landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


def image(number: int) -> Dataset:
    ds = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
    return ds


def note(*named: Dataset, title: Code = QUALITY) -> Dataset:
    return KeyObjectSelectionDocument(
        evidence=named,
        content=KeyObjectSelection(document_title=title, referenced_objects=named),
        manufacturer="Archive",
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )


def written(ds: Dataset) -> bytes:
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def receive(landing: Landing, *instances: Dataset) -> list[str]:
    told = [landing.receive(written(ds), site="A", sender="CT1").sop_uid for ds in instances]
    landing.complete("CT1")
    return [str(uid) for uid in told]


def test_what_a_note_names_is_withdrawn_and_what_used_it_is_flagged(landing: Landing) -> None:
    """If this failed, images of the wrong patient, rejected for safety, would stay in every later dataset version."""
    catalog = landing.catalog
    bad, good = receive(landing, image(1), image(2))
    rows = [
        Archived(sop_uid=uid, revision=1, archive_path=uid, file_sha256=uid, deid_digest="d") for uid in (bad, good)
    ]
    catalog.mark_archived(rows)
    members = [Member(sop_uid=uid, revision=1, patient="P", part="train") for uid in (bad, good)]
    catalog.add_dataset("a" * 64, path="a", members=members, counts={}, actor="publish")
    catalog.add_model("m" * 64, dataset_digest="a" * 64, preprocessing_digest="p")
    receive(landing, note(image(1)))
    assert take_notes(landing, catalog, actor="ingest") == 1
    assert [row.sop_uid for row in catalog.archived()] == [good]
    [held] = catalog.quarantined(reason=Reason.WITHDRAWN)
    assert (held.sop_uid, held.detail) == (bad, "rejected for quality reasons")
    assert catalog.dataset("1").flags["withdrawn"] == catalog.model("m" * 64).flags["withdrawn"] == [bad]
    [row] = catalog.ledger.rows("withdrawal")
    assert row.payload == {"why": "rejected for quality reasons", "instances": 1}
    assert catalog.ledger.rows("audit")[-1].payload["action"] == "landing read"
    assert take_notes(landing, catalog, actor="ingest") == 0, "the same note again changes nothing"
    assert len(catalog.ledger.rows("withdrawal")) == 1


def test_an_image_that_comes_after_its_note_is_not_used(landing: Landing) -> None:
    """PACS forward in any order: the image would come in through the back door."""
    catalog = landing.catalog
    receive(landing, note(image(1)))
    assert take_notes(landing, catalog, actor="ingest") == 0
    [late] = receive(landing, image(1))
    assert take_notes(landing, catalog, actor="ingest") == 1
    assert catalog.current(late).status == Status.QUARANTINED  # type: ignore[union-attr]


def test_a_person_may_overrule_a_note(landing: Landing) -> None:
    """A note by mistake must not lose an image for ever, nor come back every night."""
    catalog = landing.catalog
    [uid] = receive(landing, image(1))
    receive(landing, note(image(1)))
    take_notes(landing, catalog, actor="ingest")
    [held] = catalog.quarantined(reason=Reason.WITHDRAWN)
    landing.release(held.id, by="ada")
    assert take_notes(landing, catalog, actor="ingest") == 0
    assert catalog.quarantined(reason=Reason.WITHDRAWN, state=QuarantineState.HELD) == []
    assert catalog.current(uid).status == Status.RECEIVED  # type: ignore[union-attr]


def test_other_key_objects_withdraw_nothing(landing: Landing) -> None:
    """A radiologist's selection "of interest" would throw the best images out."""
    catalog = landing.catalog
    receive(landing, image(1), note(image(1), title=Code("113000", "DCM", "Of Interest")))
    assert take_notes(landing, catalog, actor="ingest") == 0
    assert read_note(image(1)) is None


def test_what_a_note_of_the_study_names_is_not_answered() -> None:
    """A report on a rejected image would stand in front of its reader."""
    files = [written(image(1)), written(image(2)), written(note(image(1)))]
    assert [str(one.ds.SOPInstanceUID) for one in images_of(files)] == ["1.2.3.2"]


def test_our_own_note_is_one_too() -> None:
    """What we withdraw must be understood by ourselves."""
    algorithm = results.Algorithm(name="t", version="1", digest="d" * 64)
    said = results.Analysis(prediction_id="p", finding="f", probability=0.5, decision=1, threshold=0.4)
    wrong = results.picture(image(1), None, np.zeros((64, 64), np.uint8), said, algorithm, at=AT)
    told = read_note(results.rejection([wrong], "patient safety", at=AT))
    assert told is not None and (told.title, told.names) == ("113037", [str(wrong.SOPInstanceUID)])


def test_what_can_be_read_of_a_broken_note_counts() -> None:
    """If this failed, one broken object of an archive would keep a study without an answer, or let a rejected image through."""
    images = [image(1), image(2), image(3)]
    data = written(note(images[0], images[1]))
    item = data.index(b"\x08\x00\x55\x11UI")
    broken = data[: item + 4] + b"QC" + data[item + 6 :]  # no VR, so one of the two is not named
    found = read_note(pydicom.dcmread(io.BytesIO(broken)))
    assert found is not None and len(found.names) == 1
    assert len(images_of([*map(written, images), broken])) == 2
    untitled = data.replace(b"\x08\x00\x00\x01SH", b"\x08\x00\x00\x01QC")
    assert read_note(pydicom.dcmread(io.BytesIO(untitled))) is None
    assert len(images_of([*map(written, images), untitled])) == 3
