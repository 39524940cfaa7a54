"""Instances that rejection notes named."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from radloop.catalog.columns import string

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the new table."""
    op.create_table(
        "withdrawn",
        sa.Column("sop_uid", string(64), nullable=False),
        sa.Column("note", string(64), nullable=False),
        sa.Column("why", string(64), nullable=False),
        sa.Column("at", string(32), nullable=False),
        sa.PrimaryKeyConstraint("sop_uid", name="pk_withdrawn"),
    )
