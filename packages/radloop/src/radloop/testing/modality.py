"""A simulated modality: sends files by C-STORE as they are stored, over a real association (PS3.4 Annex B)."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydicom.filereader import read_file_meta_info

from radloop.errors import EngineError

NOT_SENDABLE = "not sendable"
_TRIES = 3
_ANSWER_S = 5.0
_CONTEXTS = 128  # PS3.8 section 9.3.2.2: odd identifiers of one byte


def send(
    files: Iterable[Path],
    host: str,
    port: int,
    *,
    calling_ae: str,
    called_ae: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Send files in order over one association, bytes as stored: also a truncated data set, as a failing disk would.

    Args:
        files: DICOM files; one without a File Meta Information cannot be sent and is counted as "not sendable".
        host, port: of the storage SCP.
        calling_ae, called_ae: AE titles.
        progress: called with (done, total).

    Returns:
        How many by status, four hex digits: "0000" is Success (PS3.4 B.2.3).

    Raises:
        EngineError: no association, or the peer ended it.
    """
    from pynetdicom import _config

    known = [(path, _contexts_of(path)) for path in files]
    contexts = {c for _, c in known if c}
    counts: Counter[str] = Counter()
    association = _associated(contexts, host, port, calling_ae, called_ae)
    before, _config.STORE_SEND_CHUNKED_DATASET = _config.STORE_SEND_CHUNKED_DATASET, True  # bytes as stored
    try:
        for done, (path, context) in enumerate(known, start=1):
            status = NOT_SENDABLE if context is None else _sent(association, path)
            for _ in range(_TRIES - 1):
                if status is not None:
                    break
                # As modalities do after a lost answer; the receiver knows what it has. pynetdicom 3.0.4's own reactor
                # takes one answer in some thousands from under send_c_store.
                association.abort()
                association = _associated(contexts, host, port, calling_ae, called_ae)
                status = _sent(association, path)
            if status is None:
                raise EngineError(
                    "the peer ended the association", expected="a status for each instance", got=f"none at {done}"
                )
            counts[status] += 1
            if progress is not None:
                progress(done, len(known))
    finally:
        _config.STORE_SEND_CHUNKED_DATASET = before
        association.release()
    return dict(counts)


def _contexts_of(path: Path) -> tuple[str, str] | None:
    """(SOP class, transfer syntax) from the File Meta Information; None if there is none."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
    meta = read_file_meta_info(path)
    sop_class, syntax = meta.get("MediaStorageSOPClassUID"), meta.get("TransferSyntaxUID")
    return (str(sop_class), str(syntax)) if sop_class and syntax else None


def _associated(contexts: set[tuple[str, str]], host: str, port: int, calling_ae: str, called_ae: str) -> Any:
    from pynetdicom import AE, evt

    if not 0 < len(contexts) <= _CONTEXTS:
        raise EngineError(
            "cannot propose this", expected=f"1 to {_CONTEXTS} SOP classes and syntaxes", got=len(contexts)
        )
    ae = AE(ae_title=calling_ae)
    ae.dimse_timeout = _ANSWER_S
    for sop_class, syntax in sorted(contexts):
        ae.add_requested_context(sop_class, syntax)
    association = ae.associate(host, port, ae_title=called_ae, evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay)])
    if not association.is_established:
        raise EngineError(
            "the peer accepts no association",
            expected=f"a storage SCP {called_ae} at {host}:{port} that knows {calling_ae}",
            got="rejected" if association.is_rejected else "no answer",
            next_step="start `radloop listen` and name the sender in its settings",
        )
    return association


def _no_delay(event: Any) -> None:
    """Nagle's algorithm and delayed acknowledgement cost 40 ms an instance."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _sent(association: Any, path: Path) -> str | None:
    """The status in four hex digits, or None if no answer came."""
    try:
        status = association.send_c_store(path)
    except ValueError:  # the peer accepted the association, but not this SOP class with this transfer syntax
        return NOT_SENDABLE
    except RuntimeError:  # the association has ended
        return None
    return f"{status.Status:04X}" if "Status" in status else None
