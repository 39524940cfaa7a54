from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk, Entry, Identity
from radloop.errors import DataError, SettingsError

OLD, NEW = b"o" * 32, b"n" * 32
NAME = "CANARY-4711"


@pytest.fixture
def catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home}/catalog.db")


def _path(home: Path) -> Path:
    return home / "identity" / "crosswalk.db"


def _patient(pseudonym: str = "P1", name: str = NAME) -> Entry:
    return Entry(Identity.PATIENT, pseudonym, {"PatientID": name, "site": "A"})


def _bytes_on_disk(home: Path) -> bytes:
    return b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())


def test_what_was_put_comes_back_and_nothing_of_it_is_readable_on_disk(home: Path, catalog: Catalog) -> None:
    """If this failed, a stolen disk would name the patients, or results could not go back to the PACS."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    assert crosswalk.put_many([_patient(), Entry(Identity.STUDY, "S1", {"StudyInstanceUID": "1.2.3.4711"})]) == 2
    assert crosswalk.get(Identity.PATIENT, "P1", who="ada", why="result") == {"PatientID": NAME, "site": "A"}
    assert crosswalk.get(Identity.PATIENT, "P2", who="ada", why="result") is None
    assert crosswalk.get(Identity.STUDY, "P1", who="ada", why="result") is None
    crosswalk.close()
    on_disk = _bytes_on_disk(home)
    assert NAME.encode() not in on_disk
    assert b"4711" not in on_disk
    assert _path(home).stat().st_mode & 0o777 == 0o600
    assert _path(home).parent.stat().st_mode & 0o777 == 0o700


def test_the_same_again_changes_nothing(home: Path, catalog: Catalog) -> None:
    """If this failed, a batch repeated after a kill would fail, or change who a pseudonym is."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    assert crosswalk.put_many([_patient(), _patient(name="first of a batch wins not")]) == 1
    assert crosswalk.put_many([_patient(name="other")]) == 0
    assert crosswalk.get(Identity.PATIENT, "P1", who="x", why="y") == {"PatientID": NAME, "site": "A"}
    assert crosswalk.count() == 1


def test_every_read_is_in_the_ledger_with_who_and_why_and_no_value(home: Path, catalog: Catalog) -> None:
    """If this failed, somebody could look up patients without a trace, or the trace itself would leak them."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    crosswalk.put_many([_patient("P1"), _patient("P2")])
    crosswalk.get_many(Identity.PATIENT, ["P2", "P1", "P3"], who="ada", why="withdrawal of consent")
    [row] = catalog.ledger.rows("audit")
    assert row.actor == "ada"
    assert row.payload == {
        "action": "read",
        "kind": "patient",
        "why": "withdrawal of consent",
        "pseudonyms": ["P1", "P2", "P3"],
    }
    assert NAME not in repr(_patient())


def test_a_read_that_cannot_be_recorded_is_not_answered(home: Path, catalog: Catalog) -> None:
    """If this failed, breaking the ledger would be a way to read identities unseen."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    crosswalk.put_many([_patient()])
    with catalog._write() as connection:
        connection.exec_driver_sql("DROP TABLE ledger")
    with pytest.raises(Exception, match="ledger"):
        crosswalk.get(Identity.PATIENT, "P1", who="ada", why="result")


def test_the_wrong_key_is_told(home: Path, catalog: Catalog) -> None:
    """If this failed, a mixed-up key would write what nobody can read."""
    Crosswalk(_path(home), OLD, catalog.ledger).close()
    with pytest.raises(SettingsError, match="does not open this crosswalk"):
        Crosswalk(_path(home), NEW, catalog.ledger)
    with pytest.raises(SettingsError, match="too short"):
        Crosswalk(_path(home), b"short", catalog.ledger)
    assert len(bytes.fromhex(Crosswalk.new_key().decode())) == 32
    assert Crosswalk.new_key() != Crosswalk.new_key()


def test_a_rotated_key_opens_what_the_old_one_no_longer_does(home: Path, catalog: Catalog) -> None:
    """If this failed, a leaked key would stay good for ever, or a rotation would lose the identities."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    crosswalk.put_many([_patient(f"P{n}", f"{NAME}-{n}") for n in range(20)])
    assert crosswalk.rotate(NEW, by="ada") == 20
    assert crosswalk.get(Identity.PATIENT, "P7", who="x", why="y") == {"PatientID": f"{NAME}-7", "site": "A"}
    crosswalk.close()
    with pytest.raises(SettingsError, match="does not open"):
        Crosswalk(_path(home), OLD, catalog.ledger)
    with Catalog(f"sqlite:///{home}/catalog.db") as again:
        opened = Crosswalk(_path(home), [NEW, OLD], again.ledger)  # the key file before the old key is taken out
        assert opened.get(Identity.PATIENT, "P19", who="x", why="y") == {"PatientID": f"{NAME}-19", "site": "A"}
    rotation = next(row for row in catalog.ledger.rows("audit") if row.payload["action"] == "rotate")
    assert (rotation.actor, rotation.payload["values"]) == ("ada", 20)


def test_both_keys_open_a_crosswalk_whose_rotation_did_not_happen(home: Path, catalog: Catalog) -> None:
    """If this failed, a machine switched off between the new key file and the rotation would be locked out."""
    Crosswalk(_path(home), OLD, catalog.ledger).put_many([_patient()])
    both = Crosswalk(_path(home), [NEW, OLD], catalog.ledger)
    assert both.get(Identity.PATIENT, "P1", who="x", why="y") is not None


def test_a_process_that_missed_the_rotation_writes_nothing_under_the_old_key(home: Path, catalog: Catalog) -> None:
    """If this failed, a listener left running through a rotation would write identities that the new key cannot read."""
    listening = Crosswalk(_path(home), OLD, catalog.ledger)
    listening.put_many([_patient("P1")])
    Crosswalk(_path(home), OLD, catalog.ledger).rotate(NEW, by="ada")
    with pytest.raises(SettingsError, match="restart what still runs"):
        listening.put_many([_patient("P2")])
    assert Crosswalk(_path(home), NEW, catalog.ledger).count() == 1


def test_a_value_that_was_tampered_with_is_not_returned(home: Path, catalog: Catalog) -> None:
    """If this failed, a result could be sent back to another patient than its own."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    crosswalk.put_many([_patient()])
    with sqlite3.connect(_path(home)) as database:
        database.execute("UPDATE identity SET value = substr(value, 1, length(value) - 4) || 'AAA='")
    with pytest.raises(SettingsError, match="damaged"):
        crosswalk.get(Identity.PATIENT, "P1", who="x", why="y")


@pytest.mark.parametrize("way", ["put", "put again", "quick", "quick, other process"])
def test_two_uids_with_one_pseudonym_are_an_error(home: Path, catalog: Catalog, way: str) -> None:
    """Two studies that become one would show one patient's images as another's."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    first = Entry(Identity.STUDY, "2.25.7", {"StudyInstanceUID": "1.2.3"})
    crosswalk.put_many([first])
    if way == "quick, other process":
        crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    same = Entry(Identity.STUDY, "2.25.7", {"StudyInstanceUID": "1.2.3\0"})
    other = Entry(Identity.STUDY, "2.25.7", {"StudyInstanceUID": "1.2.4"})

    def put(entry: Entry) -> None:
        if way.startswith("quick"):
            crosswalk.put_rows(crosswalk.encrypted([entry]), durable=False)
        else:
            crosswalk.put_many([entry])

    if way != "quick, other process":
        put(same)
    if way == "put again":
        crosswalk.close()
    with pytest.raises(DataError, match="two UIDs of one kind"):
        put(other)
    assert crosswalk.get(Identity.STUDY, "2.25.7", who="t", why="t") == {"StudyInstanceUID": "1.2.3"}


def test_a_patient_may_be_written_in_several_ways(home: Path, catalog: Catalog) -> None:
    """PatientIDs that differ in case are one patient, and no collision."""
    crosswalk = Crosswalk(_path(home), OLD, catalog.ledger)
    crosswalk.put_many([_patient(name="mrn-1")])
    crosswalk.put_many([_patient(name="MRN-1 ")])
    crosswalk.put_rows(crosswalk.encrypted([_patient(name="Mrn-1")]))
