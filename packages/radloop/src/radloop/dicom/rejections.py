"""Rejection notes that come in: who made images says that nobody should use them (IHE Imaging Object Change Management).

A note is a Key Object Selection whose document title is one of four of CID 7011 (PS3.16); what it names must not be shown, so it
is not trained on and not predicted either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage

from radloop.catalog.audit import record
from radloop.catalog.store import Catalog
from radloop.dicom.deidentify.values import items_of, text_of
from radloop.dicom.landing import Landing

TITLES = {
    "113001": "rejected for quality reasons",
    "113037": "rejected for patient safety reasons",
    "113038": "incorrect modality worklist entry",
    "113039": "data retention policy expired",
}
"""Code values of DCM, and what they say."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A rejection note: its code value, and the original SOPInstanceUIDs that it names."""

    title: str
    names: list[str]


def read_note(ds: Dataset) -> Note | None:
    """What a rejection note says; None of any other instance. What cannot be read of a broken one is left out."""
    if text_of(ds, "SOPClassUID") != KeyObjectSelectionDocumentStorage:
        return None
    for code in items_of(ds, "ConceptNameCodeSequence"):
        title = text_of(code, "CodeValue")
        if text_of(code, "CodingSchemeDesignator") == "DCM" and title in TITLES:
            return Note(title=title, names=sorted(set(_named(ds))))
    return None


def _named(ds: Dataset) -> Iterator[str]:
    """Every instance of the evidence (PS3.3 C.17.6.2.1): a note is about all that it references."""
    for keyword in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence"):
        for study in items_of(ds, keyword):
            for series in items_of(study, "ReferencedSeriesSequence"):
                for one in items_of(series, "ReferencedSOPSequence"):
                    if uid := text_of(one, "ReferencedSOPInstanceUID"):
                        yield uid


def rejected(instances: Iterable[Dataset]) -> set[str]:
    """Original SOPInstanceUIDs that notes among these instances name."""
    notes = [note for ds in instances if (note := read_note(ds)) is not None]
    return {uid for note in notes for uid in note.names}


def take_notes(landing: Landing, catalog: Catalog, *, actor: str) -> int:
    """Withdraw what notes among the complete studies name: known instances now, others when they come. How many are now.

    Dataset versions that hold one, and models that learnt from one, are flagged; the ledger says so.
    """
    rows = [row for row in catalog.ready() if row.sop_class_uid == KeyObjectSelectionDocumentStorage]
    for row in rows:
        record(
            catalog.ledger, "landing read", "landing", actor=actor, why="rejection notes", pseudonyms=[row.study_uid]
        )
        try:
            note = read_note(dcmread(landing.landed(row.source_sha256)))
        except Exception:  # noqa: BLE001, S112 - no DICOM file, or gone: de-identification refuses it with a reason
            continue
        if note is not None:
            names = [landing.pseudonym(uid) for uid in note.names]
            catalog.withdraw(names, note=row.sop_uid, why=TITLES[note.title], actor=actor)
    return len(catalog.refuse_withdrawn(stage=actor))
