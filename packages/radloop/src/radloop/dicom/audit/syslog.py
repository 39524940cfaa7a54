"""A syslog sink for audit messages (PS3.15 sections A.6 and A.7; RFC 5424 over UDP, TCP by RFC 6587, TLS by RFC 5425).

The ledger is the queue: how far a sink has been told stands in the catalog, so a sink that is down stops nobody's work and gets
all later. Over UDP nobody knows what arrived; over TCP and TLS what a dying sink had accepted but not read may be lost.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from radloop.catalog.ledger import Ledger
from radloop.catalog.schema import LedgerRow
from radloop.dicom.audit.message import auditable, message
from radloop.errors import SettingsError

_PORTS = {"udp": 514, "tcp": 601, "tls": 6514}
_PRIORITY = 10 * 8 + 5  # facility security/authorization, severity notice (PS3.15 section A.6)
_MSGID = "DICOM+RFC3881"
_BATCH = 200
_WAIT_S = 5.0
_LONGEST_UDP = 65_000


class Sink:
    """One connection to a syslog server. A context manager.

    Args:
        url: `udp://HOST[:PORT]`, `tcp://...` or `tls://...`.
        ca: PEM, who signed a TLS server's certificate; without, those this system trusts.

    Raises:
        SettingsError: the URL is none of these.
        OSError: the server cannot be reached.
    """

    def __init__(self, url: str, *, ca: Path | None = None) -> None:
        self.url = url
        self._scheme, host, port = parse(url)
        self._host = socket.gethostname()
        kind = socket.SOCK_DGRAM if self._scheme == "udp" else socket.SOCK_STREAM
        family, _, _, _, address = socket.getaddrinfo(host, port, type=kind)[0]
        plain = socket.socket(family, kind)
        self._socket = plain
        try:
            plain.settimeout(_WAIT_S)
            plain.connect(address)
            if self._scheme == "tls":
                context = ssl.create_default_context(cafile=str(ca) if ca else None)
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                self._socket = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, row: LedgerRow, source: str) -> None:
        """Send the message of one row. Raises OSError."""
        frame = frame_of(row, source, self._host)
        if self._scheme == "udp":
            if (
                len(frame) > _LONGEST_UDP
            ):  # a datagram cannot hold it: the row without whom it was about, who are in the ledger
                short = {name: value for name, value in row.payload.items() if name != "pseudonyms"}
                short["objects"] = len(row.payload["pseudonyms"])
                frame = frame_of(_with(row, short), source, self._host)
            self._socket.send(frame)
            return
        self._refuse_ended()
        self._socket.sendall(b"%d %s" % (len(frame), frame))

    def _refuse_ended(self) -> None:
        """A peer that has closed still takes bytes once: look first."""
        self._socket.settimeout(0)
        try:
            said = self._socket.recv(1024)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        finally:
            self._socket.settimeout(_WAIT_S)
        if not said:
            raise ConnectionResetError("the syslog server has closed the connection")


def parse(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a sink's URL. Raises SettingsError."""
    found = re.fullmatch(r"(udp|tcp|tls)://(\[[0-9A-Fa-f:]+\]|[^\[\]:/@]+)(?::(\d{1,5}))?/?", url)
    if found is None or int(found[3] or 1) > 65535:
        raise SettingsError(
            "the syslog sink is no address",
            expected="udp://HOST[:PORT], tcp://HOST[:PORT] or tls://HOST[:PORT]",
            got=url,
            next_step="correct syslog under [audit] in radloop.toml",
        )
    return found[1], found[2].strip("[]"), int(found[3] or _PORTS[found[1]])


def frame_of(row: LedgerRow, source: str, host: str) -> bytes:
    """The syslog message of one row (RFC 5424 section 6), without a transport's framing."""
    name = re.sub(r"[^\x21-\x7e]", "", host)[:255] or "-"
    header = f"<{_PRIORITY}>1 {row.at} {name} radloop {os.getpid()} {_MSGID} - "
    return header.encode("ascii") + b"\xef\xbb\xbf" + message(row, source)


def drain(ledger: Ledger, url: str, source: str, *, home: Path, ca: Path | None = None) -> int:
    """Send what the sink has not been told yet, in order; how many messages. Of two processes at once, one does it.

    Raises:
        SettingsError: the URL is none.
        OSError: the sink cannot be reached, or broke off; what was sent is noted, the rest waits for the next time.
    """
    parse(url)
    done = 0
    with _alone(home) as mine:
        if not mine:
            return 0
        after = ledger.sent(url)
        rows = ledger.since(after, _BATCH)
        if not rows:
            return 0
        with Sink(url, ca=ca) as sink:
            while rows:
                told = after
                try:
                    for row in rows:
                        if auditable(row):
                            sink.send(row, source)
                            done += 1
                        told = row.seq
                finally:
                    if told != after:
                        ledger.set_sent(url, told)
                after = told
                rows = ledger.since(after, _BATCH)
    return done


@contextmanager
def _alone(home: Path) -> Iterator[bool]:
    handle = os.open(home / ".audit.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def _with(row: LedgerRow, payload: dict[str, object]) -> LedgerRow:
    import msgspec

    return msgspec.structs.replace(row, payload=payload)
