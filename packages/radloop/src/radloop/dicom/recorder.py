"""Group commit for what associations bring at the same time."""

from __future__ import annotations

import threading

import msgspec

from radloop.catalog.schema import InstanceRow, Recorded
from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk, Row


class _Ticket(msgspec.Struct):
    """One instance that waits to be recorded."""

    rows: list[Row]
    row: InstanceRow
    verdict: Recorded | None = None
    error: BaseException | None = None
    done: bool = False


class Recorder:
    """Group commit: the first that comes records for all that wait by then."""

    def __init__(self, crosswalk: Crosswalk, catalog: Catalog) -> None:
        self._crosswalk, self._catalog = crosswalk, catalog
        self._turn, self._joining = threading.Lock(), threading.Lock()
        self._waiting: list[_Ticket] = []

    def record(self, rows: list[Row], row: InstanceRow) -> Recorded | None:
        """Crosswalk entries, then the row; None where pixels must be compared. Raises what the commit raised."""
        ticket = _Ticket(rows, row)
        with self._joining:
            self._waiting.append(ticket)
        with self._turn:
            if not ticket.done:
                with self._joining:
                    together, self._waiting = self._waiting, []
                self._commit(together)
        if ticket.error is not None:
            raise ticket.error
        return ticket.verdict

    def _commit(self, tickets: list[_Ticket]) -> None:
        try:
            self._crosswalk.put_rows([row for ticket in tickets for row in ticket.rows], durable=False)
            verdicts = self._catalog.record_new([ticket.row for ticket in tickets])
            for ticket, verdict in zip(tickets, verdicts, strict=True):
                ticket.verdict = verdict
        except BaseException as error:  # noqa: BLE001 - each that waits raises it
            for ticket in tickets:
                ticket.error = error
        for ticket in tickets:
            ticket.done = True
