from __future__ import annotations

import multiprocessing
import secrets
import threading
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radloop.catalog.schema import Archived, Instance, InstanceRow, QuarantineState, Reason, Recorded, Refused, Status
from radloop.catalog.store import Catalog
from radloop.errors import DataError


def _row(
    sop: str = "I1", sha: str = "a", *, patient: str = "P1", file: str | None = None, site: str = "A"
) -> InstanceRow:
    return InstanceRow(
        sop_uid=sop,
        study_uid="S1",
        series_uid="R1",
        patient=patient,
        key_id="k",
        site=site,
        sender="MODALITY",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        source_sha256=sha,
        source_bytes=10,
        modality="CR",
        file_key=file,
    )


def _same(_row: InstanceRow, _stored: Instance) -> bool:
    return True


def _other(_row: InstanceRow, _stored: Instance) -> bool:
    return False


def _never(_row: InstanceRow, _stored: Instance) -> bool:
    raise AssertionError("nothing to compare")


def _archive(catalog: Catalog, sop: str, revision: int = 1, deid: str = "deid") -> int:
    path = f"S1/R1/{sop}.dcm"
    row = Archived(
        sop_uid=sop, revision=revision, archive_path=path, file_sha256="f", deid_digest=deid, tags={"modality": "CR"}
    )
    return catalog.mark_archived([row])


def test_what_arrives_is_new_same_revision_or_conflict(catalog: Catalog) -> None:
    """If this failed, a study sent twice would be trained on twice, or a corrected header be lost."""
    assert catalog.record(_row(sha="a"), _never) is Recorded.NEW
    assert catalog.record(_row(sha="a"), _never) is Recorded.SAME
    assert catalog.record(_row(sha="b"), _same) is Recorded.REVISION
    assert catalog.record(_row(sha="c"), _other) is Recorded.CONFLICT
    assert catalog.record(_row(sha="a"), _never) is Recorded.SAME  # the older bytes again bring nothing back
    assert [(r.revision, r.source_sha256, r.status) for r in catalog.revisions("I1")] == [
        (1, "a", Status.SUPERSEDED),
        (2, "b", Status.RECEIVED),
    ]
    assert [(row.sop_uid, row.revision) for row in catalog.pending()] == [("I1", 2)]
    [ledger_row] = catalog.ledger.rows("revision")
    assert (ledger_row.subject, ledger_row.payload["revision"]) == ("I1", 2)


class Sent(NamedTuple):
    sop: str
    pixels: str
    header: str
    patient: str


@given(
    sent=st.lists(
        st.builds(
            Sent, *(st.sampled_from(values) for values in (["I1", "I2"], ["x", "y"], ["1", "2", "3"], ["P1", "P2"]))
        ),
        max_size=12,
    ),
    batches=st.booleans(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_arrivals_gives_what_the_rules_say(catalog: Catalog, sent: list[Sent], batches: bool) -> None:
    """If this failed, the catalog's state would depend on how arrivals were batched, or break a rule for some order."""
    fresh = secrets.token_hex(4)  # one catalog for all examples, instances of their own for each
    sent = [one._replace(sop=fresh + one.sop) for one in sent]
    expected: dict[str, list[Sent]] = {}
    verdicts = []
    for one in sent:
        held = expected.setdefault(one.sop, [])
        if one in held:
            verdicts.append("same")
        elif not held:
            verdicts.append("new")
            held.append(one)
        elif held[-1].pixels == one.pixels:
            verdicts.append("revision")
            held.append(one)
        else:
            verdicts.append("conflict")
    rows = [_row(one.sop, "-".join(one), patient=one.patient, file="F" + one.header) for one in sent]

    def compare(row: InstanceRow, stored: Instance) -> bool:
        return row.source_sha256.split("-")[1] == stored.source_sha256.split("-")[1]

    got = catalog.record_many(rows, compare) if batches else [catalog.record(row, compare) for row in rows]
    assert [str(verdict) for verdict in got] == verdicts
    for sop, held in expected.items():
        revisions = catalog.revisions(sop)
        assert [row.source_sha256 for row in revisions] == ["-".join(one) for one in held]
        assert [row.revision for row in revisions] == list(range(1, len(held) + 1))
        assert [row.status for row in revisions[:-1]] == [Status.SUPERSEDED] * (len(held) - 1)
        assert catalog.current(sop) == revisions[-1]
        assert revisions[-1].patient == held[-1].patient


def test_a_writer_that_comes_between_the_comparison_and_the_decision_is_seen(catalog: Catalog) -> None:
    """If this failed, two associations that correct one instance at once could leave two current revisions."""
    catalog.record(_row(sha="a"), _never)
    seen = []

    def compare(_arrived: InstanceRow, stored: Instance) -> bool:
        seen.append(stored.source_sha256)
        if len(seen) == 1:
            assert catalog.record(_row(sha="b"), _same) is Recorded.REVISION
        return True

    assert catalog.record(_row(sha="c"), compare) is Recorded.REVISION
    assert seen == ["a", "b"]
    assert [(row.revision, row.source_sha256) for row in catalog.revisions("I1")] == [(1, "a"), (2, "b"), (3, "c")]


def test_threads_that_send_the_same_record_it_once(catalog: Catalog) -> None:
    """If this failed, a PACS that sends over several associations would make several instances of one."""
    verdicts: list[Recorded] = []

    def send() -> None:
        verdicts.extend(catalog.record(_row(f"I{n}", f"sha{n}"), _same) for n in range(25))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(verdicts) == {Recorded.NEW: 25, Recorded.SAME: 125}
    assert len(catalog.pending()) == 25


def _send_from_process(url: str, results: multiprocessing.Queue[list[str]]) -> None:
    with Catalog(url) as catalog:
        results.put([str(catalog.record(_row(f"I{n}", f"sha{n}"), _same)) for n in range(25)])


def test_processes_that_send_the_same_record_it_once(url: str) -> None:
    """If this failed, a listener and a folder import at the same time would double instances or fail."""
    Catalog(url).close()
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[list[str]] = context.Queue()
    running = [context.Process(target=_send_from_process, args=(url, results)) for _ in range(3)]
    for process in running:
        process.start()
    verdicts = Counter(verdict for _ in running for verdict in results.get(timeout=60))
    for process in running:
        process.join(timeout=60)
    assert verdicts == {"new": 25, "same": 50}


def test_the_archive_marks_only_what_is_current_and_in_use(catalog: Catalog) -> None:
    """If this failed, a slow de-identification could put an older revision, or a refused instance, back in use."""
    catalog.record(_row(sha="a"), _never)
    catalog.record(_row(sha="b"), _same)
    assert _archive(catalog, "I1", revision=1) == 0
    assert _archive(catalog, "I1", revision=2) == 1
    [row] = catalog.archived()
    assert (row.archive_path, row.tags, row.status) == ("S1/R1/I1.dcm", {"modality": "CR"}, Status.ARCHIVED)
    assert catalog.archived(["I1", "I9"]) == [row]
    assert catalog.pending() == []
    catalog.refuse([Refused(sop_uid="I1", revision=2, reason=Reason.EMPTY_IMAGE)], stage="quality")
    assert _archive(catalog, "I1", revision=2) == 0
    assert catalog.archived() == []


def test_a_changed_deidentification_makes_archived_instances_pending(catalog: Catalog) -> None:
    """If this failed, a corrected PHI rule would not reach what was cleaned before it."""
    for sop in ("I1", "I2", "I3"):
        catalog.record(_row(sop, sop), _never)
    _archive(catalog, "I1", deid="old")
    _archive(catalog, "I2", deid="new")
    assert [row.sop_uid for row in catalog.pending(deid_digest="new")] == ["I1", "I3"]
    assert [row.sop_uid for row in catalog.pending()] == ["I3"]


def test_pixel_digests_are_kept(catalog: Catalog) -> None:
    """If this failed, duplicates between two runs would not be found."""
    catalog.record(_row(), _never)
    catalog.set_pixel_digests([("I1", 1, "pix")])
    _archive(catalog, "I1")
    assert catalog.current("I1").pixel_sha256 == "pix"  # type: ignore[union-attr]


def test_an_ingest_batch_is_sealed_once(catalog: Catalog) -> None:
    """If this failed, the ledger would count arrivals twice, or miss those of a killed run."""
    catalog.record_many([_row("I1", "a"), _row("I2", "b", patient="P2", site="B")], _never)
    catalog.record(_row("I1", "c"), _same)
    catalog.quarantine(stage="landing", reason=Reason.NOT_DICOM, detail="", source_sha256="q", site="A")
    payload = catalog.seal_ingest(actor="ingest")
    assert payload == {
        "instances": 2,
        "revisions": 1,
        "patients": 2,
        "studies": 1,
        "sites": {"A": 2, "B": 1},
        "quarantined": {"NOT_DICOM": 1},
    }
    assert catalog.seal_ingest(actor="ingest") is None
    catalog.refuse([Refused(sop_uid="I2", revision=1, reason=Reason.EMPTY_IMAGE)], stage="quality")
    assert catalog.seal_ingest(actor="ingest") is None  # a later stage's refusal is no arrival
    catalog.record(_row("I3", "d"), _never)
    assert catalog.seal_ingest(actor="ingest")["instances"] == 1  # type: ignore[index]
    assert len(catalog.ledger.rows("ingest")) == 2


def test_bytes_held_twice_for_one_reason_are_held_once(catalog: Catalog) -> None:
    """If this failed, a modality that repeats a broken file all night would bury the rest of the quarantine."""
    held = {"stage": "landing", "detail": "x", "source_sha256": "q"}
    first = catalog.quarantine(reason=Reason.TRUNCATED, **held)
    assert catalog.quarantine(reason=Reason.TRUNCATED, **held) == first
    assert catalog.quarantine(reason=Reason.NOT_DICOM, **held) != first
    assert [row.reason for row in catalog.quarantined()] == [Reason.TRUNCATED, Reason.NOT_DICOM]
    assert [row.id for row in catalog.quarantined(reason=Reason.TRUNCATED)] == [first]


def test_what_a_stage_refuses_leaves_use_and_is_kept_with_its_reason(catalog: Catalog) -> None:
    """If this failed, a refused image would stay in datasets, or vanish without a trace."""
    catalog.record_many([_row("I1", "a"), _row("I2", "b")], _never)
    refusal = Refused(sop_uid="I1", revision=1, reason=Reason.BAD_GEOMETRY, detail="spacing is 0")
    assert catalog.refuse([refusal], stage="quality") == [refusal]
    assert catalog.refuse([refusal], stage="quality") == [refusal]
    [row] = catalog.quarantined()
    assert (row.sop_uid, row.revision, row.stage, row.detail, row.site) == ("I1", 1, "quality", "spacing is 0", "A")
    assert [instance.sop_uid for instance in catalog.pending()] == ["I2"]
    assert catalog.counts() == {"A": {"quarantined": 1, "received": 1}}
    with pytest.raises(DataError, match="does not know"):
        catalog.refuse([Refused(sop_uid="I9", revision=1, reason=Reason.EMPTY_IMAGE)], stage="quality")


def test_a_released_instance_is_in_use_and_not_refused_again_for_the_same(catalog: Catalog) -> None:
    """If this failed, a person's decision would be undone by the next run."""
    catalog.record(_row(), _never)
    _archive(catalog, "I1")
    refusal = Refused(sop_uid="I1", revision=1, reason=Reason.SATURATED_IMAGE)
    catalog.refuse([refusal], stage="quality")
    [held] = catalog.quarantined()
    catalog.settle(held.id, QuarantineState.RELEASED, by="ada")
    catalog.settle(held.id, QuarantineState.PURGED, by="bob")  # settled already: nothing
    assert [row.status for row in catalog.archived()] == [Status.ARCHIVED]
    assert catalog.refuse([refusal], stage="quality") == []
    other = Refused(sop_uid="I1", revision=1, reason=Reason.BAD_WINDOW)
    assert catalog.refuse([other], stage="quality") == [other]
    [row] = catalog.ledger.rows("quarantine")
    assert (row.actor, row.payload["state"]) == ("ada", "released")


def test_an_instance_held_for_two_reasons_needs_both_released(catalog: Catalog) -> None:
    """If this failed, releasing an odd window would also release what another check had refused."""
    catalog.record(_row(), _never)
    for reason in (Reason.BAD_WINDOW, Reason.SATURATED_IMAGE):
        catalog.refuse([Refused(sop_uid="I1", revision=1, reason=reason)], stage="quality")
    first, second = catalog.quarantined()
    catalog.settle(first.id, QuarantineState.RELEASED, by="ada")
    assert catalog.pending() == []
    catalog.settle(second.id, QuarantineState.RELEASED, by="ada")
    assert [row.sop_uid for row in catalog.pending()] == ["I1"]


def test_a_retried_instance_is_looked_at_anew_by_every_stage(catalog: Catalog) -> None:
    """If this failed, a corrected check would not be applied to what the faulty one had refused."""
    catalog.record(_row(), _never)
    _archive(catalog, "I1")
    refusal = Refused(sop_uid="I1", revision=1, reason=Reason.BAD_WINDOW)
    catalog.refuse([refusal], stage="quality")
    catalog.settle(catalog.quarantined()[0].id, QuarantineState.RETRIED, by="ada")
    assert [row.sop_uid for row in catalog.pending()] == ["I1"]
    assert catalog.refuse([refusal], stage="quality") == [refusal]


def test_a_corrected_instance_replaces_a_refused_one(catalog: Catalog) -> None:
    """If this failed, a modality's correction of a bad header would stay outside."""
    catalog.record(_row(sha="a"), _never)
    catalog.refuse([Refused(sop_uid="I1", revision=1, reason=Reason.BAD_GEOMETRY)], stage="quality")
    assert catalog.record(_row(sha="b"), _same) is Recorded.REVISION
    assert [(row.revision, row.status) for row in catalog.pending()] == [(2, Status.RECEIVED)]
    assert catalog.quarantined() == []
    stale = Refused(sop_uid="I1", revision=1, reason=Reason.BAD_GEOMETRY)
    assert catalog.refuse([stale], stage="quality") == []  # a stage that looked at the older revision


def test_one_path_may_name_two_copies_of_one_instance(catalog: Catalog) -> None:
    """If this failed, a label keyed by the second copy's path would never find its image."""
    catalog.record_many([_row(file="F1"), _row(file="F2")], _never)
    with catalog._read() as connection:
        from radloop.catalog import schema

        pairs = {tuple(row) for row in connection.execute(schema.instance_files.select())}
    assert pairs == {("F1", "I1"), ("F2", "I1")}
