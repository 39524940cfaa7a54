from __future__ import annotations

from datetime import UTC, datetime, timedelta

from radloop.catalog.schema import Archived, Instance, InstanceRow, Member
from radloop.catalog.store import Catalog
from radloop.catalog.studies import LATE, complete, seconds_left


def _come(catalog: Catalog, sop: str, *, study: str = "S1", sha: str = "", sender: str = "CT1") -> None:
    row = InstanceRow(
        sop_uid=sop,
        study_uid=study,
        series_uid="R1",
        patient="P1",
        key_id="k",
        site="A",
        sender=sender,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        source_sha256=sha or f"sha-{sop}",
        source_bytes=10,
    )

    def same(_row: InstanceRow, _stored: Instance) -> bool:
        return True

    catalog.record(row, same)


def _archive(catalog: Catalog, sop: str, revision: int = 1) -> None:
    done = Archived(sop_uid=sop, revision=revision, archive_path=f"{sop}.dcm", file_sha256="f", deid_digest="d")
    assert catalog.mark_archived([done]) == 1


def _dataset(catalog: Catalog, digest: str, *sops: str) -> None:
    members = [Member(sop_uid=sop, revision=1, patient="P1", part="train") for sop in sops]
    catalog.add_dataset(digest, path=f"{digest}.parquet", members=members, actor="test")


def test_half_a_study_does_not_reach_the_pipeline(catalog: Catalog) -> None:
    """If this failed, a model would learn from, or be asked about, half a CT."""
    _come(catalog, "I1")
    [study] = catalog.unreleased()
    assert (study.study_uid, study.revision, study.new, study.present) == ("S1", 0, 1, 1)
    assert catalog.ready() == []
    at = datetime.fromisoformat(study.last_at)
    assert complete([study], 60, at + timedelta(seconds=59)) == []
    assert seconds_left([study], 60, at + timedelta(seconds=59)) == 1
    assert complete([study], 60, at + timedelta(seconds=60)) == [study]
    assert seconds_left([study], 60, at + timedelta(seconds=70)) == 0
    assert catalog.release(["S1"], actor="ingest") == {"S1": 1}
    assert [row.sop_uid for row in catalog.ready()] == ["I1"]
    assert catalog.unreleased() == []
    assert catalog.release(["S1"], actor="ingest") == {}


def test_the_count_a_pacs_names_ends_the_wait(catalog: Catalog) -> None:
    """If this failed, every study would wait out the quiet period although all of it is there."""
    _come(catalog, "I1")
    catalog.expect({"S1": 2, "S2": 5})
    catalog.expect({"S1": 2})
    assert complete(catalog.unreleased(), 3600) == []
    _come(catalog, "I2")
    [study] = complete(catalog.unreleased(), 3600)
    assert (study.expected, study.present) == (2, 2)
    assert catalog.release(["S1"], actor="ingest") == {"S1": 1}


def test_a_late_instance_makes_a_new_revision_and_flags_who_used_the_older(catalog: Catalog) -> None:
    """If this failed, an image that comes after the run would be lost, or nobody would know that a version lacks it."""
    for sop in ("I1", "I2"):
        _come(catalog, sop)
    _come(catalog, "other", study="S2")
    catalog.release(["S1", "S2"], actor="ingest")
    for sop in ("I1", "I2", "other"):
        _archive(catalog, sop)
    _dataset(catalog, "a" * 64, "I1", "I2")
    _dataset(catalog, "b" * 64, "other")
    catalog.add_model("m" * 64, dataset_digest="a" * 64, preprocessing_digest="p")
    _come(catalog, "I3")
    [late] = catalog.unreleased()
    assert (late.revision, late.new, late.present) == (1, 1, 3)
    assert catalog.ready() == []
    assert catalog.release(["S1"], actor="ingest") == {"S1": 2}
    assert [row.sop_uid for row in catalog.ready()] == ["I3"]
    assert [version.flags for version in catalog.datasets()] == [{LATE: ["I3"]}, {}]
    assert catalog.models()[0].flags == {LATE: ["I3"]}
    assert catalog.study_revisions() == {"S1": 2}
    [row] = catalog.ledger.rows("revision", "S1")
    assert row.payload == {"study_revision": 2, "late": 1, "revised": 0}


def test_a_corrected_header_is_a_revision_of_the_study_but_nothing_was_missing(catalog: Catalog) -> None:
    """If this failed, each correction in the PACS would cry that a dataset version is incomplete."""
    _come(catalog, "I1")
    catalog.release(["S1"], actor="ingest")
    _archive(catalog, "I1")
    _dataset(catalog, "a" * 64, "I1")
    _come(catalog, "I1", sha="corrected")
    assert catalog.release(["S1"], actor="ingest") == {"S1": 2}
    assert catalog.datasets()[0].flags == {}
    assert catalog.ledger.rows("revision", "S1")[0].payload == {"study_revision": 2, "late": 0, "revised": 1}


def test_the_same_again_changes_nothing(catalog: Catalog) -> None:
    """If this failed, a study sent twice would look as if something had been late."""
    _come(catalog, "I1")
    catalog.release(["S1"], actor="ingest")
    _come(catalog, "I1")
    assert catalog.unreleased() == []
    assert catalog.study_revisions() == {}


def test_a_folder_that_was_read_is_complete_but_not_what_a_modality_is_still_sending(catalog: Catalog) -> None:
    """If this failed, `radloop ingest FOLDER` would be followed by a minute's wait, or end a modality's study too early."""
    _come(catalog, "I1", sender="folder")
    _come(catalog, "I2", study="S2", sender="folder")
    _come(catalog, "I3", study="S2", sender="CT1")
    _come(catalog, "I4", study="S3", sender="CT1")
    assert catalog.release_from("folder", actor="folder") == {"S1": 1}
    assert [study.study_uid for study in catalog.unreleased()] == ["S2", "S3"]
    catalog.release_instance("I3", actor="ada")
    assert [study.study_uid for study in catalog.unreleased()] == ["S3"]
    assert [row.sop_uid for row in catalog.ready()] == ["I1", "I2", "I3"]


def test_a_refused_instance_that_is_retried_does_not_wait_again(catalog: Catalog) -> None:
    """If this failed, `radloop quarantine retry` would seem to do nothing for a minute."""
    from radloop.catalog.schema import Reason, Refused

    _come(catalog, "I1")
    catalog.release(["S1"], actor="ingest")
    catalog.refuse([Refused(sop_uid="I1", revision=1, reason=Reason.EMPTY_IMAGE)], stage="quality")
    assert catalog.ready() == []
    [held] = catalog.quarantined()
    from radloop.catalog.schema import QuarantineState

    catalog.settle(held.id, QuarantineState.RETRIED, by="ada")
    assert [row.sop_uid for row in catalog.ready()] == ["I1"]


def test_times_are_compared_in_utc(catalog: Catalog) -> None:
    """If this failed, every study of a hospital east of Greenwich would be complete at once."""
    _come(catalog, "I1")
    assert complete(catalog.unreleased(), 30) == []
    assert complete(catalog.unreleased(), 30, datetime.now(UTC) + timedelta(seconds=31))
