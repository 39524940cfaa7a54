"""A storage SCP (PS3.4 Annex B): Success is answered only when the instance is durable, registered or in quarantine.

Bytes go to disk as the peer encoded them, in any transfer syntax, of any storage SOP class, private ones included.

| status | when |
|---|---|
| 0000 | on disk and in the catalog: new, the same again, a revision, or in quarantine with its reason |
| A700 | no space left; nothing of it was kept, send it again |
| A900 | the data set's SOP class or instance UID is not the command's; nothing was kept |
| C000 | the command names no instance, or brings no data set, or the instance could not be kept (the log has the kind of error) |

A data set that lacks a UID, is cut or cannot be read is no mismatch: it is kept in quarantine, and Success is answered.
"""

from __future__ import annotations

import logging
import socketserver
import ssl
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from pynetdicom import _config, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at run time

from radloop.catalog.database import StorageFull
from radloop.dicom.landing import Landing, Mismatch
from radloop.dicom.listener.incoming import Hold, Incoming
from radloop.dicom.listener.messages import Command
from radloop.dicom.listener.status import Status, Tally
from radloop.dicom.listener.upper_layer import LONGEST_PDU, Entity, Server
from radloop.errors import EngineError, SettingsError

LOG = logging.getLogger(__name__)

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
NOT_AS_ANNOUNCED = 0xA900
CANNOT_UNDERSTAND = 0xC000
_POLL_S = 0.1
_REJECTED = {(1, 1, 3): "calling AE", (1, 1, 7): "called AE", (2, 3, 2): "limit"}


class Listener:
    """Receives from known modalities and PACS. A context manager.

    Args:
        landing: where instances go.
        ae_title: this AE's title.
        host: address to listen on; loopback unless told otherwise.
        port: 0 lets the system choose.
        sites: calling AE title -> site code. Others are rejected (PS3.8 section 9.3.4: calling AE title not
            recognised).
        require_called_ae: reject also who calls this AE by another title.
        max_associations: how many at once; more are rejected as transient (local limit exceeded). Each holds up to 8 MiB.
        tls: speak TLS only, by this context; `ssl.CERT_REQUIRED` in it asks peers for a certificate.
        idle_s: an association on which nothing comes for so long is aborted; also how long a message may stop within.

    Raises:
        SettingsError: `sites` is empty.
    """

    def __init__(
        self,
        landing: Landing,
        *,
        ae_title: str,
        sites: Mapping[str, str],
        host: str = "127.0.0.1",
        port: int = 0,
        require_called_ae: bool = True,
        max_associations: int = 20,
        tls: ssl.SSLContext | None = None,
        idle_s: float = 60.0,
    ) -> None:
        if not sites:
            raise SettingsError(
                "the listener knows no sender",
                expected="at least one calling AE title with its site code",
                next_step="add the modality's or the PACS's AE title to radloop.toml",
            )
        self._landing, self._address = landing, (host, port)
        self._sites = {title.strip(): site for title, site in sites.items()}
        self._tls = tls
        self._tally = Tally()
        self._ae = Entity(ae_title=ae_title)
        self._ae.add_supported_context(Verification)
        self._ae.require_calling_aet = list(self._sites)
        self._ae.require_called_aet = require_called_ae
        self._ae.maximum_associations = max_associations
        self._ae.maximum_pdu_size = LONGEST_PDU
        self._ae.network_timeout = idle_s
        self._server: Any = None

    @property
    def counts(self) -> dict[str, int]:
        """How many: `received`, by outcome (`new`, `same`, ...), `failed`, `rejected` associations."""
        return self._tally.counts

    def status(self) -> Status:
        """A snapshot: open associations, totals, durations, the last error. No name, no identifier of a patient."""
        return self._tally.status()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def start(self) -> int:
        """Listen in threads of this process; returns the port.

        Raises:
            EngineError: the port is taken, or the address is not this machine's.
        """
        # Private and future storage classes too: pynetdicom offers this as a switch of the whole process only.
        _config.UNRESTRICTED_STORAGE_SERVICE = True
        self._landing.prepare()
        try:
            self._server = self._ae.make_server(
                self._address,
                ssl_context=self._tls,
                evt_handlers=[(evt.EVT_C_ECHO, lambda _: SUCCESS), (evt.EVT_REJECTED, self._on_rejected)],
                server_class=Server,
                serve=lambda association: _Storage(self, association),
                refused=self._on_refused,
            )
        except OSError as error:
            host, port = self._address
            raise EngineError(
                f"cannot listen on {host}:{port}",
                expected="a free port on an address of this machine",
                got=error.strerror,
                next_step="stop what uses the port, or set another `port` in radloop.toml",
            ) from error
        threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="listener", daemon=True).start()
        return self.port

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Take no new associations, let those under way end for up to `grace_s`, abort what is left."""
        if self._server is None:
            return
        server, self._server = self._server, None
        socketserver.BaseServer.shutdown(server)
        server.socket.close()  # new callers are refused at once
        deadline = time.monotonic() + grace_s
        while self._ae.active_associations and time.monotonic() < deadline:
            time.sleep(0.02)
        for association in server.active_associations:
            association.abort()

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def _on_rejected(self, event: evt.Event) -> None:
        answer: Any = event.assoc.acceptor.primitive
        self._tally.rejected(_REJECTED.get((answer.result, answer.result_source, answer.diagnostic), "other"))

    def _on_refused(self, why: str, error: str) -> None:
        LOG.error("a connection was closed: %s failed (%s)", why, error)
        self._tally.rejected(why)


class _Storage:
    """C-STORE on one association; called by its own thread only."""

    def __init__(self, listener: Listener, association: Association) -> None:
        self._landing, self._tally = listener._landing, listener._tally
        self._sender = association.requestor.ae_title.strip()
        self._site = listener._sites[self._sender]
        self._hold = Hold()
        self._peer = self._tally.opened(self._sender)

    def begin(self, command: Command, transfer_syntax_uid: str) -> Incoming | None:
        """Make room for an instance; None when the command names none."""
        if not command.sop_class_uid or not command.sop_uid:
            return None
        return Incoming(
            command,
            transfer_syntax_uid,
            sender=self._sender,
            site=self._site,
            landing=self._landing,
            hold=self._hold,
        )

    def finish(self, command: Command, incoming: Incoming | None) -> tuple[int, str]:
        """Keep it, and only then say so."""
        began = time.perf_counter()
        name, status, comment = self._keep(incoming)
        size = incoming.size if incoming is not None else 0
        self._tally.stored(self._peer, name, size, time.perf_counter() - began)
        return status, comment

    def _keep(self, incoming: Incoming | None) -> tuple[str, int, str]:
        try:
            if incoming is None:
                return self._failed("a command without instance UIDs, or without a data set", CANNOT_UNDERSTAND)
            return self._landing.receive_one(incoming.complete()).kind, SUCCESS, ""
        except StorageFull:
            return self._failed("no space left", OUT_OF_RESOURCES)
        except Mismatch as error:
            return self._failed(error.what, NOT_AS_ANNOUNCED)
        except Exception as error:  # noqa: BLE001 - the peer is told, and may send it again
            return self._failed(f"could not be kept: {type(error).__name__}", CANNOT_UNDERSTAND)

    def _failed(self, what: str, status: int) -> tuple[str, int, str]:
        LOG.error("an instance from %s was refused (%04X): %s", self._sender, status, what)
        self._tally.failed(self._sender, what)
        return "failed", status, what

    def malformed(self, what: str) -> None:
        """The peer sent what is no DICOM."""
        LOG.error("the association of %s is aborted: %s", self._sender, what)
        self._tally.failed(self._sender, what)

    def ended(self, *, released: bool) -> None:
        """The association is over."""
        self._tally.closed(self._peer, released=released)
        LOG.info("an association of %s %s", self._sender, "is over" if released else "broke off")
