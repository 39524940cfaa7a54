"""The catalog's tables, the words used in them, and the rows as they come out.

Nothing identified is in the catalog: every UID, patient, accession and file key is a pseudonym (`radloop.dicom.uids`),
`tags` holds de-identified attributes, `detail` says what was wrong without a value of an attribute.
Times are ISO 8601 strings in UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import (
    Column,
    ForeignKey,
    Index,
    MetaData,
    Table,
    UniqueConstraint,
)

from radloop.catalog.columns import integer, json_value, string, text
from radloop.catalog.reason import RELEASABLE as RELEASABLE  # these words belong to the tables too
from radloop.catalog.reason import Reason as Reason


class Status(StrEnum):
    """Where one revision of an instance stands."""

    RECEIVED = "received"
    ARCHIVED = "archived"
    QUARANTINED = "quarantined"
    SUPERSEDED = "superseded"


class Recorded(StrEnum):
    """What `Catalog.record` made of a row."""

    NEW = "new"
    SAME = "same"
    REVISION = "revision"
    CONFLICT = "conflict"


class QuarantineState(StrEnum):
    """Where an entry of the quarantine stands; all but `held` were decided by a person or by a newer revision."""

    HELD = "held"
    RETRIED = "retried"
    RELEASED = "released"
    PURGED = "purged"


class KeyKind(StrEnum):
    """What a label is keyed by; the order is that of precedence."""

    INSTANCE = "instance"
    FILE = "file"
    STUDY = "study"
    ACCESSION = "accession"


def now() -> str:
    """The time, ISO 8601 in UTC with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

instances = Table(
    "instances",
    metadata,
    Column("id", integer(), primary_key=True),
    Column("sop_uid", string(64), nullable=False),
    Column("revision", integer(), nullable=False),
    Column("study_uid", string(64), nullable=False),
    Column("series_uid", string(64), nullable=False),
    Column("patient", string(64), nullable=False),
    Column("key_id", string(16), nullable=False),
    Column("accession_key", string(64)),
    Column("file_key", string(64)),
    Column("site", string(64), nullable=False),
    Column("sender", string(64), nullable=False),
    Column("sop_class_uid", string(64), nullable=False),
    Column("modality", string(16)),
    Column("transfer_syntax_uid", string(64), nullable=False),
    Column("source_sha256", string(64), nullable=False),
    Column("source_bytes", integer(), nullable=False),
    Column("received_at", string(32), nullable=False),
    Column("status", string(16), nullable=False),
    Column("archive_path", string(255)),
    Column("file_sha256", string(64)),
    Column("pixel_sha256", string(64)),
    Column("deid_digest", string(64)),
    Column("tags", json_value(), nullable=False),
    Column("batch", integer()),
    UniqueConstraint("sop_uid", "revision"),
    UniqueConstraint("source_sha256", "key_id"),
    Index(None, "status"),
    Index(None, "study_uid"),
    Index(None, "accession_key"),
    Index(None, "pixel_sha256"),
)

# One instance may lie under several paths (a copy in another folder), and a label may be keyed by any of them.
instance_files = Table(
    "instance_files",
    metadata,
    Column("file_key", string(64), primary_key=True),
    Column("sop_uid", string(64), primary_key=True),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("id", integer(), primary_key=True),
    Column("source_sha256", string(64), nullable=False),
    Column("sop_uid", string(64)),
    Column("revision", integer()),
    Column("site", string(64)),
    Column("stage", string(32), nullable=False),
    Column("reason", string(48), nullable=False),
    Column("detail", text(), nullable=False),
    Column("created_at", string(32), nullable=False),
    Column("state", string(16), nullable=False),
    Column("by", string(64)),
    Column("batch", integer()),
    Index(None, "source_sha256"),
    Index(None, "sop_uid"),
    Index(None, "state"),
)

labels = Table(
    "labels",
    metadata,
    Column("id", integer(), primary_key=True),
    Column("task", string(64), nullable=False),
    Column("key_kind", string(16), nullable=False),
    Column("key", string(64), nullable=False),
    Column("value", string(64), nullable=False),
    Column("source", string(128), nullable=False),
    Column("row_revision", integer(), nullable=False),
    Column("imported_at", string(32), nullable=False),
    UniqueConstraint("task", "key_kind", "key", "row_revision"),
)

patients = Table(
    "patients",
    metadata,
    Column("patient", string(64), primary_key=True),
    Column("key_id", string(16), nullable=False),
    Column("part", string(16), nullable=False),
    Column("decided_at", string(32), nullable=False),
)

datasets = Table(
    "datasets",
    metadata,
    Column("digest", string(64), primary_key=True),
    Column("number", integer(), nullable=False, unique=True),
    Column("created_at", string(32), nullable=False),
    Column("path", string(255), nullable=False),
    Column("parent", string(64)),
    Column("counts", json_value(), nullable=False),
    Column("flags", json_value(), nullable=False),
)

dataset_members = Table(
    "dataset_members",
    metadata,
    Column("digest", string(64), ForeignKey("datasets.digest"), primary_key=True),
    Column("sop_uid", string(64), primary_key=True),
    Column("revision", integer(), nullable=False),
    Column("patient", string(64), nullable=False),
    Column("part", string(16), nullable=False),
    Index(None, "sop_uid"),
)

models = Table(
    "models",
    metadata,
    Column("digest", string(64), primary_key=True),
    Column("dataset_digest", string(64), ForeignKey("datasets.digest"), nullable=False),
    Column("preprocessing_digest", string(64), nullable=False),
    Column("version", string(64)),
    Column("created_at", string(32), nullable=False),
    Column("info", json_value(), nullable=False),
    Column("flags", json_value(), nullable=False),
    Index(None, "dataset_digest"),
)

ledger = Table(
    "ledger",
    metadata,
    Column("seq", integer(), primary_key=True),
    Column("key", string(255), unique=True),
    Column("at", string(32), nullable=False),
    Column("kind", string(32), nullable=False),
    Column("subject", string(255), nullable=False),
    Column("actor", string(64), nullable=False),
    Column("payload", json_value(), nullable=False),
    Column("prev_hash", string(64)),
    Column("hash", string(64)),
    Index(None, "kind", "subject"),
)

# A study is released to the pipeline when it is complete; `through`: the newest `instances.id` released so far.
studies = Table(
    "studies",
    metadata,
    Column("study_uid", string(64), primary_key=True),
    Column("revision", integer(), nullable=False),
    Column("through", integer(), nullable=False),
    Column("expected", integer()),
    Column("released_at", string(32)),
)

# Two pseudonyms that are one person; patient_a sorts before patient_b.
patient_links = Table(
    "patient_links",
    metadata,
    Column("patient_a", string(64), primary_key=True),
    Column("patient_b", string(64), primary_key=True),
    Column("reason", string(64), nullable=False),
    Column("by", string(64), nullable=False),
    Column("linked_at", string(32), nullable=False),
)

# How far each audit sink has been told the ledger.
audit_sinks = Table(
    "audit_sinks",
    metadata,
    Column("sink", string(128), primary_key=True),
    Column("seq", integer(), nullable=False),
    Column("at", string(32), nullable=False),
)

# What was fetched from a PACS (`catalog.fetched`): a study that has grown there is fetched again.
pacs_studies = Table(
    "pacs_studies",
    metadata,
    Column("source", string(64), primary_key=True),
    Column("study_uid", string(64), primary_key=True),
    Column("listed", integer(), nullable=False),
    Column("missing", integer(), nullable=False),
    Column("at", string(32), nullable=False),
)

# Which study dates were asked for; `since` is empty for all.
pacs_queries = Table(
    "pacs_queries",
    metadata,
    Column("source", string(64), primary_key=True),
    Column("query", string(64), primary_key=True),
    Column("since", string(10), nullable=False),
    Column("through", string(10), nullable=False),
)

# Instances that a rejection note named, here or not.
withdrawn = Table(
    "withdrawn",
    metadata,
    Column("sop_uid", string(64), primary_key=True),
    Column("note", string(64), nullable=False),
    Column("why", string(64), nullable=False),
    Column("at", string(32), nullable=False),
)

label_requests = Table(
    "label_requests",
    metadata,
    Column("id", string(64), primary_key=True),
    Column("opened_at", string(32), nullable=False),
    Column("status", string(16), nullable=False),
    Column("sop_uids", json_value(), nullable=False),
    Column("why", text(), nullable=False),
)


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as it was received: what `Catalog.record` takes. Every identifier is a pseudonym."""

    sop_uid: str
    study_uid: str
    series_uid: str
    patient: str
    key_id: str
    site: str
    sender: str
    sop_class_uid: str
    transfer_syntax_uid: str
    source_sha256: str
    source_bytes: int
    accession_key: str | None = None
    file_key: str | None = None
    modality: str | None = None


class Instance(InstanceRow, frozen=True, kw_only=True):
    """One revision of an instance as the catalog holds it. `tags` are `radloop.dicom.tags.describe`'s."""

    revision: int
    received_at: str
    status: Status
    archive_path: str | None = None
    file_sha256: str | None = None
    pixel_sha256: str | None = None
    deid_digest: str | None = None
    tags: dict[str, Any] = {}
    batch: int | None = None


class Archived(msgspec.Struct, frozen=True, kw_only=True):
    """What de-identification adds to one revision. `archive_path` is relative to the archive's root."""

    sop_uid: str
    revision: int
    archive_path: str
    file_sha256: str
    deid_digest: str
    pixel_sha256: str | None = None
    tags: dict[str, Any] = {}


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the quarantine. `detail` holds no value of an attribute."""

    id: int
    source_sha256: str
    sop_uid: str | None
    revision: int | None
    site: str | None
    stage: str
    reason: Reason
    detail: str
    created_at: str
    state: QuarantineState
    by: str | None
    batch: int | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that a stage refuses. `detail` holds no value of an attribute."""

    sop_uid: str
    revision: int
    reason: Reason
    detail: str = ""


class LabelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One label to import. `key` is a pseudonym made by `radloop.dicom.uids`; `row` is its line in the file."""

    key_kind: KeyKind
    key: str
    value: str
    row: int | None = None


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """The value in force for one key."""

    task: str
    key_kind: KeyKind
    key: str
    value: str
    source: str
    row_revision: int
    imported_at: str


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """Labels joined to instances.

    `values`: pseudonymous SOP instance UID -> (value, kind of key it came from).
    `contradicting`: instances without a value because labels of the same kind say different things of them, or
    because their file path names several instances.
    """

    values: dict[str, tuple[str, KeyKind]]
    contradicting: list[str]


class LabelImport(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one label import. `unmatched` keys are known to no instance yet; they are kept."""

    rows: int
    new: int
    corrected: int
    unchanged: int
    unmatched: int


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One instance in one dataset version."""

    sop_uid: str
    revision: int
    patient: str
    part: str


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset version. `flags`: name -> the pseudonymous SOP instance UIDs that caused it."""

    digest: str
    number: int
    created_at: str
    path: str
    parent: str | None
    counts: dict[str, Any]
    flags: dict[str, list[str]]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One trained model and the dataset version it was trained on. `flags` as those of `Dataset`."""

    digest: str
    dataset_digest: str
    preprocessing_digest: str
    version: str | None
    created_at: str
    info: dict[str, Any]
    flags: dict[str, list[str]]


class Affected(msgspec.Struct, frozen=True, kw_only=True):
    """Digests of the dataset versions that hold some instances, and of the models trained on them."""

    datasets: list[str]
    models: list[str]


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """From a model back to the instances it was trained on."""

    model: Model
    dataset: Dataset
    members: list[Member]


class LabelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for labels that drift opened. `status`: open or closed."""

    id: str
    opened_at: str
    status: str
    sop_uids: list[str]
    why: str


class StudyState(msgspec.Struct, frozen=True, kw_only=True):
    """A study with instances that have come since it was last released to the pipeline, or since some moment.

    `revision`: how often it was released; 0, never. `new`: instances (and revisions of instances) not released yet.
    `present`: instances of it in the catalog, released or not. `expected`: what a PACS said it holds of it.
    """

    study_uid: str
    revision: int
    new: int
    present: int
    last_at: str
    expected: int | None = None
    through: int = 0
    """Number of its newest instance: another one is another state of the study."""


class PatientLink(msgspec.Struct, frozen=True, kw_only=True):
    """Two pseudonyms that are one person; `patient_a` sorts before `patient_b`."""

    patient_a: str
    patient_b: str
    reason: str
    by: str
    linked_at: str


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the append-only ledger. `hash` is made of the row and of `prev_hash`, the hash of the row before it."""

    seq: int
    key: str | None
    at: str
    kind: str
    subject: str
    actor: str
    payload: dict[str, Any]
    prev_hash: str | None = None
    hash: str | None = None
