"""A storage SCP (PS3.4 Annex B): Success is answered only when the instance is durable, registered or in quarantine.

Bytes go to disk as the peer encoded them, in any transfer syntax, of any storage SOP class, private ones included.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from pynetdicom import AE, _config, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at run time

from radloop.catalog.database import StorageFull
from radloop.dicom.landing import Landing, OutcomeKind
from radloop.errors import EngineError, SettingsError

LOG = logging.getLogger(__name__)

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
CANNOT_UNDERSTAND = 0xC000


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
        max_associations: how many at once; more are rejected as transient.

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
    ) -> None:
        if not sites:
            raise SettingsError(
                "the listener knows no sender",
                expected="at least one calling AE title with its site code",
                next_step="add the modality's or the PACS's AE title to radloop.toml",
            )
        self._landing, self._address = landing, (host, port)
        self._sites = {title.strip(): site for title, site in sites.items()}
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._ae = AE(ae_title=ae_title)
        self._ae.add_supported_context(Verification)
        self._ae.require_calling_aet = list(self._sites)
        self._ae.require_called_aet = require_called_ae
        self._ae.maximum_associations = max_associations
        self._server: Any = None

    @property
    def counts(self) -> dict[str, int]:
        """How many: `received`, by outcome (`new`, `same`, ...), `failed`, `rejected` associations."""
        with self._counts_lock:
            names = ("received", *OutcomeKind, "failed", "rejected")
            return {str(name): self._counts[name] for name in names}

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
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, lambda _: SUCCESS),
            (evt.EVT_CONN_OPEN, _no_delay),
            (evt.EVT_REJECTED, lambda _: self._count("rejected")),
        ]
        try:
            self._server = self._ae.start_server(self._address, block=False, evt_handlers=handlers)
        except OSError as error:
            host, port = self._address
            raise EngineError(
                f"cannot listen on {host}:{port}",
                expected="a free port on an address of this machine",
                got=error.strerror,
                next_step="stop what uses the port, or set another `port` in radloop.toml",
            ) from error
        return self.port

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Take no new associations, let those under way end for up to `grace_s`, abort what is left."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        deadline = time.monotonic() + grace_s
        while self._ae.active_associations and time.monotonic() < deadline:
            time.sleep(0.02)
        for association in self._ae.active_associations:
            association.abort()
        server.server_close()

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def _on_store(self, event: evt.Event) -> int:
        self._count("received")
        sender = event.assoc.requestor.ae_title.strip()
        try:
            data = event.encoded_dataset()
            outcome = self._landing.receive(data, site=self._sites[sender], sender=sender)
        except StorageFull:
            LOG.error("no space left: an instance from %s was refused", sender)
            self._count("failed")
            return OUT_OF_RESOURCES
        except Exception as error:  # noqa: BLE001 - the peer is told, and may send it again
            LOG.error("an instance from %s could not be kept: %s", sender, type(error).__name__)
            self._count("failed")
            return CANNOT_UNDERSTAND
        self._count(outcome.kind)
        return SUCCESS

    def _count(self, name: str) -> None:
        with self._counts_lock:
            self._counts[name] += 1


def _no_delay(event: evt.Event) -> None:
    """Without this, Nagle's algorithm and delayed acknowledgements hold every C-STORE for 40 ms or more."""
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
