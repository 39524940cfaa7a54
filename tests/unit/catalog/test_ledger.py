from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from radloop.catalog.ledger import GENESIS
from radloop.catalog.store import Catalog


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
    assert (rows[0].payload, rows[0].actor) == ({"role": "physicist"}, "ada")
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


def _tamper(catalog: Catalog, statement: str) -> None:
    """As somebody with the database's own tools would: the triggers are taken away first."""
    with catalog._write() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("DROP TRIGGER ledger_append_only ON ledger"))
        else:
            for trigger in ("ledger_no_update", "ledger_no_delete"):
                connection.execute(text(f"DROP TRIGGER {trigger}"))
        connection.execute(text(statement))


def test_each_row_seals_those_before_it(catalog: Catalog) -> None:
    """If this failed, the ledger would be a table like any other."""
    assert catalog.ledger.head() == (0, GENESIS)
    for number in range(5):
        catalog.ledger.append("gate", f"m{number}", {"figure": 0.1 * number, "list": (1, 2), "ü": "é"}, actor="judge")
    rows = catalog.ledger.rows()
    assert rows[0].prev_hash == GENESIS
    assert [row.prev_hash for row in rows[1:]] == [row.hash for row in rows[:-1]]
    found = catalog.ledger.verify()
    assert (found.rows, found.seq, found.hash, found.broken) == (5, 5, rows[-1].hash, None)
    assert catalog.ledger.head() == (5, rows[-1].hash)


@pytest.mark.parametrize(
    ("statement", "seq", "what"),
    [
        ("UPDATE ledger SET actor = 'nobody' WHERE seq = 2", 2, "changed"),
        ("UPDATE ledger SET payload = '{}' WHERE seq = 4", 4, "changed"),
        ("DELETE FROM ledger WHERE seq = 3", 4, "removed"),
        ("DELETE FROM ledger WHERE seq = 1", 2, "removed"),
        ("UPDATE ledger SET seq = 9 WHERE seq = 2", 3, "removed"),
    ],
)
def test_a_changed_past_is_found(catalog: Catalog, statement: str, seq: int, what: str) -> None:
    """If this failed, whoever has the database file could rewrite who approved what."""
    for number in range(5):
        catalog.ledger.append("gate", f"m{number}", {"figure": number}, actor="judge")
    _tamper(catalog, statement)
    broken = catalog.ledger.verify().broken
    assert broken is not None
    assert (broken.seq, what in broken.what) == (seq, True)


def test_what_a_sink_was_sent_never_goes_back(catalog: Catalog) -> None:
    """If this failed, an audit repository would get messages twice, or miss some."""
    assert catalog.ledger.sent("udp://a:514") == 0
    catalog.ledger.set_sent("udp://a:514", 4)
    catalog.ledger.set_sent("udp://a:514", 3)
    catalog.ledger.set_sent("udp://b:514", 1)
    assert (catalog.ledger.sent("udp://a:514"), catalog.ledger.sent("udp://b:514")) == (4, 1)
