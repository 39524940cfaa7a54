"""What was refused is shown, decided by a person, and never named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from radloop.catalog.reason import Reason
from radloop.cli.quarantine import MEANING
from radloop.stages.project import open_catalog

from .conftest import Ran, write_dicom

Run = Callable[..., Ran]


@pytest.fixture
def conflict(inside: Run, tmp_path: Path) -> int:
    """Two files of one SOPInstanceUID with other pixels, and one without PatientID; the id of the conflict."""
    write_dicom(tmp_path / "in/1.dcm")
    twin = pydicom.dcmread(write_dicom(tmp_path / "in/2.dcm"))
    twin.PixelData = bytes(2048)
    twin.save_as(tmp_path / "in/2.dcm")
    write_dicom(tmp_path / "in/3.dcm", study=9, patient="")
    assert inside("ingest", str(tmp_path / "in"), "--site", "site-a").code == 0
    rows = inside("quarantine", "list", "--reason", "uid_conflict", "--json").json["entries"]
    assert len(rows) == 1
    return int(rows[0]["id"])


def test_every_reason_is_explained() -> None:
    """A reason in capitals tells a radiographer nothing."""
    assert set(MEANING) == set(Reason)


def test_list_counts_by_reason(inside: Run, conflict: int) -> None:
    """Whether one file was refused or a whole scanner's is the first thing to know."""
    told = inside("quarantine", "list", "--json").json
    assert told["counts"] == {"NO_PATIENT_ID": 1, "UID_CONFLICT": 1}
    ran = inside("quarantine", "list")
    assert "its SOPInstanceUID is known, with other pixels" in ran.out


def test_a_reason_that_does_not_exist(inside: Run, conflict: int) -> None:
    """A typo must not read as an empty quarantine."""
    ran = inside("quarantine", "list", "--reason", "UID_CONFLIKT")
    assert ran.code == 1
    assert "UID_CONFLICT" in ran.err


def test_release_replaces_and_records_who(inside: Run, project: Path, conflict: int) -> None:
    """Who decided that the other pixels are right must stand in the ledger for ever."""
    assert inside("quarantine", "release", str(conflict), "--by", "A. Ito").code == 0
    with open_catalog(project) as catalog:
        row = catalog.quarantine_row(conflict)
        assert (row.state, row.by) == ("released", "A. Ito")
        assert any(r.actor == "A. Ito" for r in catalog.ledger.rows(kind="quarantine"))


def test_what_has_no_patient_cannot_be_released(inside: Run, conflict: int) -> None:
    """An image of nobody would become a patient of its own, in any part of the split."""
    number = inside("quarantine", "list", "--reason", "NO_PATIENT_ID", "--json").json["entries"][0]["id"]
    ran = inside("quarantine", "release", str(number))
    assert ran.code == 1
    assert "cannot be released" in ran.err
    assert not inside("quarantine", "show", str(number), "--json").json["releasable"]


def test_retry_holds_again_what_is_still_wrong(inside: Run, conflict: int) -> None:
    """A retry that let it pass would be a release without a name."""
    ran = inside("quarantine", "retry", str(conflict))
    assert ran.code == 0
    assert "held again: UID_CONFLICT" in ran.out
    assert inside("quarantine", "list", "--json").json["counts"]["UID_CONFLICT"] == 1


def test_one_wrong_id_does_not_hide_the_others(inside: Run, conflict: int) -> None:
    """Half done must say which half."""
    ran = inside("quarantine", "retry", str(conflict), "999", "--json")
    assert ran.code == 1
    assert [("outcome" in line, "error" in line) for line in ran.json] == [(True, False), (False, True)]


def test_purge_removes_the_bytes_and_keeps_the_record(inside: Run, project: Path, conflict: int) -> None:
    """What must not be kept must be gone, and that it was there must not."""
    kept = list((project / "quarantine").glob("??/*.bin"))
    assert inside("quarantine", "purge", str(conflict), "--by", "A. Ito").code == 0
    assert len(list((project / "quarantine").glob("??/*.bin"))) == len(kept) - 1
    assert inside("quarantine", "list", "--json").json["counts"] == {"NO_PATIENT_ID": 1}
    assert inside("quarantine", "list", "--all", "--json").json["counts"]["UID_CONFLICT"] == 1
    again = inside("quarantine", "purge", str(conflict))
    assert again.code == 1
    assert "is settled" in again.err
