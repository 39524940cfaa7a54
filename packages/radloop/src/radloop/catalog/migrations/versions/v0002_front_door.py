"""Studies and their revisions, patients that are one person, what audit sinks were sent; the ledger's hash chain."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from radloop.catalog.columns import integer, json_value, string
from radloop.catalog.ledger import GENESIS, hash_of

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the new tables, and chain the rows that the ledger has."""
    op.create_table(
        "studies",
        sa.Column("study_uid", string(64), nullable=False),
        sa.Column("revision", integer(), nullable=False),
        sa.Column("through", integer(), nullable=False),
        sa.Column("expected", integer(), nullable=True),
        sa.Column("released_at", string(32), nullable=True),
        sa.PrimaryKeyConstraint("study_uid", name="pk_studies"),
    )
    op.create_table(
        "patient_links",
        sa.Column("patient_a", string(64), nullable=False),
        sa.Column("patient_b", string(64), nullable=False),
        sa.Column("reason", string(64), nullable=False),
        sa.Column("by", string(64), nullable=False),
        sa.Column("linked_at", string(32), nullable=False),
        sa.PrimaryKeyConstraint("patient_a", "patient_b", name="pk_patient_links"),
    )
    op.create_table(
        "audit_sinks",
        sa.Column("sink", string(128), nullable=False),
        sa.Column("seq", integer(), nullable=False),
        sa.Column("at", string(32), nullable=False),
        sa.PrimaryKeyConstraint("sink", name="pk_audit_sinks"),
    )
    op.create_table(
        "pacs_studies",
        sa.Column("source", string(64), nullable=False),
        sa.Column("study_uid", string(64), nullable=False),
        sa.Column("listed", integer(), nullable=False),
        sa.Column("missing", integer(), nullable=False),
        sa.Column("at", string(32), nullable=False),
        sa.PrimaryKeyConstraint("source", "study_uid", name="pk_pacs_studies"),
    )
    op.create_table(
        "pacs_queries",
        sa.Column("source", string(64), nullable=False),
        sa.Column("query", string(64), nullable=False),
        sa.Column("since", string(10), nullable=False),
        sa.Column("through", string(10), nullable=False),
        sa.PrimaryKeyConstraint("source", "query", name="pk_pacs_queries"),
    )
    _release_what_was_there()
    _chain_ledger()


def _release_what_was_there() -> None:
    """Before this version an instance was used as soon as it had come: what a run has seen does not wait again."""
    op.execute(
        "INSERT INTO studies (study_uid, revision, through, expected, released_at) "
        "SELECT study_uid, 1, max(id), NULL, max(received_at) FROM instances WHERE status <> 'received' GROUP BY study_uid"
    )


def _chain_ledger() -> None:
    connection = op.get_bind()
    ledger = sa.table(
        "ledger",
        *(sa.column(name) for name in ("seq", "key", "at", "kind", "subject", "actor", "prev_hash", "hash")),
        sa.column("payload", json_value()),
    )
    rows = connection.execute(sa.select(ledger).order_by(ledger.c.seq)).mappings().all()
    if not rows:
        return
    dropped, made = _triggers(connection.dialect.name)
    for statement in dropped:
        op.execute(statement)
    before = GENESIS
    for row in rows:
        after = hash_of(dict(row), before)
        connection.execute(sa.update(ledger).where(ledger.c.seq == row["seq"]).values(prev_hash=before, hash=after))
        before = after
    for statement in made:
        op.execute(statement)


def _triggers(dialect: str) -> tuple[list[str], list[str]]:
    """Statements that let the ledger be changed, and those that forbid it again (as 0001 made them)."""
    if dialect == "sqlite":
        return (
            ["DROP TRIGGER ledger_no_update"],
            [
                "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger "
                "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            ],
        )
    return ["ALTER TABLE ledger DISABLE TRIGGER USER"], ["ALTER TABLE ledger ENABLE TRIGGER USER"]
