from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from radloop.catalog.store import Catalog


@pytest.fixture
def catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home}/catalog.db")


def test_rows_come_back_in_order_and_by_kind_and_subject(catalog: Catalog) -> None:
    """If this failed, nobody could show who approved what, and when."""
    catalog.ledger.append("approval", "model-1", {"role": "physicist"}, actor="ada")
    catalog.ledger.append("release", "model-1", {"share": 100}, actor="radloop")
    catalog.ledger.append("approval", "model-2", {"role": "radiologist"}, actor="bob")
    rows = catalog.ledger.rows()
    assert [(row.seq, row.kind, row.subject) for row in rows] == [
        (1, "approval", "model-1"),
        (2, "release", "model-1"),
        (3, "approval", "model-2"),
    ]
    assert (rows[0].payload, rows[0].actor, rows[0].prev_hash, rows[0].hash) == (
        {"role": "physicist"},
        "ada",
        None,
        None,
    )
    assert rows[0].at <= rows[1].at <= rows[2].at
    assert [row.subject for row in catalog.ledger.rows("approval")] == ["model-1", "model-2"]
    assert [row.kind for row in catalog.ledger.rows(subject="model-1")] == ["approval", "release"]


def test_a_key_makes_an_append_idempotent(catalog: Catalog) -> None:
    """If this failed, a stage killed and run again would appear to have happened twice."""
    assert catalog.ledger.append("gate", "m", {"figure": 0.98}, actor="judge", key="gate:m:auc")
    assert not catalog.ledger.append("gate", "m", {"figure": 0.12}, actor="judge", key="gate:m:auc")
    assert catalog.ledger.append("gate", "m", {}, actor="judge")
    assert catalog.ledger.append("gate", "m", {}, actor="judge")
    assert [row.payload for row in catalog.ledger.rows("gate")] == [{"figure": 0.98}, {}, {}]


def test_an_unknown_kind_is_refused(catalog: Catalog) -> None:
    """If this failed, a mistyped kind would hide a row from every report."""
    with pytest.raises(ValueError, match="relase"):
        catalog.ledger.append("relase", "m", {}, actor="x")
    with pytest.raises(ValueError, match="relase"):
        catalog.ledger.rows("relase")


@pytest.mark.parametrize("statement", ["UPDATE ledger SET actor = 'nobody'", "DELETE FROM ledger"])
def test_the_database_itself_refuses_to_change_the_past(catalog: Catalog, statement: str) -> None:
    """If this failed, a row could be removed by any bug or hand, and the evidence would be worth nothing."""
    catalog.ledger.append("approval", "model-1", {}, actor="ada")
    with pytest.raises(DatabaseError, match="append-only"), catalog._write() as connection:
        connection.execute(text(statement))
    assert [row.actor for row in catalog.ledger.rows()] == ["ada"]
