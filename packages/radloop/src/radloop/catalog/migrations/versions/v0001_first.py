"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from radloop.catalog.columns import integer, json_value, string, text

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "datasets",
        sa.Column("digest", string(64), nullable=False),
        sa.Column("number", integer(), nullable=False),
        sa.Column("created_at", string(32), nullable=False),
        sa.Column("path", string(255), nullable=False),
        sa.Column("parent", string(64), nullable=True),
        sa.Column("counts", json_value(), nullable=False),
        sa.Column("flags", json_value(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_datasets"),
        sa.UniqueConstraint("number", name="uq_datasets_number"),
    )
    op.create_table(
        "instance_files",
        sa.Column("file_key", string(64), nullable=False),
        sa.Column("sop_uid", string(64), nullable=False),
        sa.PrimaryKeyConstraint("file_key", "sop_uid", name="pk_instance_files"),
    )
    op.create_table(
        "instances",
        sa.Column("id", integer(), nullable=False),
        sa.Column("sop_uid", string(64), nullable=False),
        sa.Column("revision", integer(), nullable=False),
        sa.Column("study_uid", string(64), nullable=False),
        sa.Column("series_uid", string(64), nullable=False),
        sa.Column("patient", string(64), nullable=False),
        sa.Column("key_id", string(16), nullable=False),
        sa.Column("accession_key", string(64), nullable=True),
        sa.Column("file_key", string(64), nullable=True),
        sa.Column("site", string(64), nullable=False),
        sa.Column("sender", string(64), nullable=False),
        sa.Column("sop_class_uid", string(64), nullable=False),
        sa.Column("modality", string(16), nullable=True),
        sa.Column("transfer_syntax_uid", string(64), nullable=False),
        sa.Column("source_sha256", string(64), nullable=False),
        sa.Column("source_bytes", integer(), nullable=False),
        sa.Column("received_at", string(32), nullable=False),
        sa.Column("status", string(16), nullable=False),
        sa.Column("archive_path", string(255), nullable=True),
        sa.Column("file_sha256", string(64), nullable=True),
        sa.Column("pixel_sha256", string(64), nullable=True),
        sa.Column("deid_digest", string(64), nullable=True),
        sa.Column("tags", json_value(), nullable=False),
        sa.Column("batch", integer(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_instances"),
        sa.UniqueConstraint("sop_uid", "revision", name="uq_instances_sop_uid_revision"),
        sa.UniqueConstraint("source_sha256", "key_id", name="uq_instances_source_sha256_key_id"),
    )
    op.create_index("ix_instances_accession_key", "instances", ["accession_key"])
    op.create_index("ix_instances_pixel_sha256", "instances", ["pixel_sha256"])
    op.create_index("ix_instances_status", "instances", ["status"])
    op.create_index("ix_instances_study_uid", "instances", ["study_uid"])
    op.create_table(
        "label_requests",
        sa.Column("id", string(64), nullable=False),
        sa.Column("opened_at", string(32), nullable=False),
        sa.Column("status", string(16), nullable=False),
        sa.Column("sop_uids", json_value(), nullable=False),
        sa.Column("why", text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_label_requests"),
    )
    op.create_table(
        "labels",
        sa.Column("id", integer(), nullable=False),
        sa.Column("task", string(64), nullable=False),
        sa.Column("key_kind", string(16), nullable=False),
        sa.Column("key", string(64), nullable=False),
        sa.Column("value", string(64), nullable=False),
        sa.Column("source", string(128), nullable=False),
        sa.Column("row_revision", integer(), nullable=False),
        sa.Column("imported_at", string(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        sa.UniqueConstraint("task", "key_kind", "key", "row_revision", name="uq_labels_task_key_kind_key_row_revision"),
    )
    op.create_table(
        "ledger",
        sa.Column("seq", integer(), nullable=False),
        sa.Column("key", string(255), nullable=True),
        sa.Column("at", string(32), nullable=False),
        sa.Column("kind", string(32), nullable=False),
        sa.Column("subject", string(255), nullable=False),
        sa.Column("actor", string(64), nullable=False),
        sa.Column("payload", json_value(), nullable=False),
        sa.Column("prev_hash", string(64), nullable=True),
        sa.Column("hash", string(64), nullable=True),
        sa.PrimaryKeyConstraint("seq", name="pk_ledger"),
        sa.UniqueConstraint("key", name="uq_ledger_key"),
    )
    op.create_index("ix_ledger_kind_subject", "ledger", ["kind", "subject"])
    op.create_table(
        "patients",
        sa.Column("patient", string(64), nullable=False),
        sa.Column("key_id", string(16), nullable=False),
        sa.Column("part", string(16), nullable=False),
        sa.Column("decided_at", string(32), nullable=False),
        sa.PrimaryKeyConstraint("patient", name="pk_patients"),
    )
    op.create_table(
        "quarantine",
        sa.Column("id", integer(), nullable=False),
        sa.Column("source_sha256", string(64), nullable=False),
        sa.Column("sop_uid", string(64), nullable=True),
        sa.Column("revision", integer(), nullable=True),
        sa.Column("site", string(64), nullable=True),
        sa.Column("stage", string(32), nullable=False),
        sa.Column("reason", string(48), nullable=False),
        sa.Column("detail", text(), nullable=False),
        sa.Column("created_at", string(32), nullable=False),
        sa.Column("state", string(16), nullable=False),
        sa.Column("by", string(64), nullable=True),
        sa.Column("batch", integer(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_quarantine"),
    )
    op.create_index("ix_quarantine_sop_uid", "quarantine", ["sop_uid"])
    op.create_index("ix_quarantine_source_sha256", "quarantine", ["source_sha256"])
    op.create_index("ix_quarantine_state", "quarantine", ["state"])
    op.create_table(
        "dataset_members",
        sa.Column("digest", string(64), nullable=False),
        sa.Column("sop_uid", string(64), nullable=False),
        sa.Column("revision", integer(), nullable=False),
        sa.Column("patient", string(64), nullable=False),
        sa.Column("part", string(16), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["datasets.digest"], name="fk_dataset_members_digest"),
        sa.PrimaryKeyConstraint("digest", "sop_uid", name="pk_dataset_members"),
    )
    op.create_index("ix_dataset_members_sop_uid", "dataset_members", ["sop_uid"])
    op.create_table(
        "models",
        sa.Column("digest", string(64), nullable=False),
        sa.Column("dataset_digest", string(64), nullable=False),
        sa.Column("preprocessing_digest", string(64), nullable=False),
        sa.Column("version", string(64), nullable=True),
        sa.Column("created_at", string(32), nullable=False),
        sa.Column("info", json_value(), nullable=False),
        sa.Column("flags", json_value(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_digest"], ["datasets.digest"], name="fk_models_dataset_digest"),
        sa.PrimaryKeyConstraint("digest", name="pk_models"),
    )
    op.create_index("ix_models_dataset_digest", "models", ["dataset_digest"])
    _make_ledger_append_only()


def _make_ledger_append_only() -> None:
    """No row of the ledger is ever changed or removed, whoever asks: the database refuses."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER ledger_no_{verb.lower()} BEFORE {verb} ON ledger "
                "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE ON ledger "
        "FOR EACH ROW EXECUTE FUNCTION ledger_refuse()"
    )
    op.execute(
        "CREATE TRIGGER ledger_no_truncate BEFORE TRUNCATE ON ledger "
        "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()"
    )
