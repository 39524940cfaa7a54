"""A PACS by DIMSE: C-ECHO, C-FIND, C-GET, C-MOVE, C-STORE (PS3.4 Annexes A, B and C, study root).

C-GET is preferred: instances come over the association that we opened, through any firewall. Its contexts name each SOP
class once a transfer syntax, so that the PACS can send what it keeps without transcoding. Where a PACS offers no C-GET,
C-MOVE makes it send to a storage SCP of ours, which it must know by title, host and port.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import ssl
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pydicom.values import convert_value
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import (
    PresentationContext,
    StoragePresentationContexts,
    build_context,
    build_role,
)
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at run time
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from radloop.dicom.listener.upper_layer import Server, UpperLayer
from radloop.dicom.pacs import Fetched, InstanceFound, Pacs, Sent, SeriesFound, Sink
from radloop.dicom.pacs.pace import Patience
from radloop.dicom.pacs.search import STUDY_KEYS, Answer, number
from radloop.dicom.pacs.suboperations import OUT_OF_RESOURCES, Intake, Receiving, in_slices, wait_for
from radloop.errors import PacsError, PacsUnavailable, SettingsError

LOG = logging.getLogger(__name__)

# PHI: pynetdicom would write queries and answers to its log.
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False

FIND, GET, MOVE = (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
_NATIVE = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")  # explicit and implicit VR little endian
_COMPRESSED = (
    *(f"1.2.840.10008.1.2.4.{n}" for n in (70, 90, 91, 80, 81, 50, 51, 57)),  # JPEG, JPEG 2000, JPEG-LS
    *("1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"),  # RLE, deflated, big endian
    *(f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203, 100, 101, 102, 103, 107, 108)),  # HTJ2K, MPEG-2/4, HEVC
)

_COMMON = tuple(
    f"1.2.840.10008.5.1.4.1.1.{end}"
    for end in (
        *("2", "4", "1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "6.1", "3.1", "7", "7.1", "7.2", "7.3", "7.4"),
        *(
            "128",
            "20",
            "12.1",
            "12.2",
            "2.1",
            "4.1",
            "4.3",
            "128.1",
            "12.1.1",
            "12.2.1",
            "13.1.3",
            "13.1.1",
            "2.2",
            "4.4",
        ),
        *("77.1.1", "77.1.4", "77.1.5.1", "77.1.5.4", "66.4", "88.11", "88.22", "88.33", "88.67", "104.1", "11.1"),
        *("481.1", "481.2", "481.3", "481.5", "66", "66.1"),
    )
)
"""Storage SOP classes in the order in which one may meet them: where a PACS does not say which a study is of."""

_MAX_CONTEXTS = 128  # PS3.8 section 9.3.2.2: odd identifiers of one byte
_MAX_PDU = 131072  # dcmtk's largest; the default of 16 KB costs four times the reads
_LIST_UIDS = 100  # in one C-GET or C-MOVE
_UID_KEYS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls whom. `called`: the PACS's AE title; `calling`: ours, which it must know."""

    host: str
    port: int
    called: str
    calling: str = "RADLOOP"

    def __str__(self) -> str:
        return f"{self.called} at {self.host}:{self.port}"


class Dimse(Pacs):
    """A PACS that speaks DIMSE.

    Args:
        name: see `Pacs`; as are `patience` and `cut_at`.
        address: who calls whom.
        move_port: where the PACS sends on C-MOVE, on `move_host` of this machine, to the title `move_ae` (`calling`, if
            empty); None: C-MOVE is not used. 0 lets the system choose, which suits tests only.
        move_first: do not try C-GET.
        timeout_s: longest wait for a connection, and for each message of the PACS.
        tls: see `radloop.dicom.pacs.tls`.
        move_tls: what we receive by on C-MOVE, see `radloop.dicom.tls.server_context`; None: not by TLS.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        *,
        move_port: int | None = None,
        move_host: str = "127.0.0.1",
        move_ae: str = "",
        move_first: bool = False,
        timeout_s: float = 60.0,
        tls: ssl.SSLContext | None = None,
        move_tls: ssl.SSLContext | None = None,
        patience: Patience | None = None,
        cut_at: int = 0,
    ) -> None:
        super().__init__(name, patience=patience, cut_at=cut_at)
        self.address, self._tls, self._timeout_s = address, tls, timeout_s
        self._receiver = _Receiver(move_ae or address.calling, address.called, move_host, move_port, move_tls)
        self._gets = not move_first
        self._finding: Association | None = None
        self._classes: tuple[str, set[str]] = ("", set())

    def echo(self) -> None:
        """C-ECHO (PS3.4 Annex A)."""
        with self._associated([build_context(Verification)]) as association:
            self._status(association.send_c_echo(), "C-ECHO")

    # Finding

    def search(self, keys: dict[str, str]) -> tuple[list[Answer], bool]:
        """One C-FIND at the study level."""
        return self._c_find("STUDY", keys, STUDY_KEYS)

    def series(self, study_uid: str) -> list[SeriesFound]:
        """C-FIND at the series level."""
        wanted = ("SeriesInstanceUID", "Modality", "SeriesDescription", "NumberOfSeriesRelatedInstances")
        answers, _ = self._c_find("SERIES", {"StudyInstanceUID": study_uid}, wanted)
        return [
            SeriesFound(
                series_uid=_text(answer, "SeriesInstanceUID"),
                modality=_text(answer, "Modality"),
                description=_text(answer, "SeriesDescription"),
                instances=number(answer, "NumberOfSeriesRelatedInstances"),
            )
            for answer in answers
            if _text(answer, "SeriesInstanceUID")
        ]

    def instances(self, study_uid: str, series_uid: str | None = None) -> list[InstanceFound]:
        """C-FIND at the image level, series by series: few PACS search it relationally."""
        found = []
        for series in [series_uid] if series_uid else [one.series_uid for one in self.series(study_uid)]:
            keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series}
            answers, whole = self._c_find("IMAGE", keys, ("SOPInstanceUID", "SOPClassUID"))
            if not whole:
                raise PacsError(
                    f"{self.name} lists only some of the instances of a series",
                    next_step="ask for the PACS's limit of answers to be raised",
                )
            found += [
                InstanceFound(sop_uid=uid, series_uid=series, sop_class_uid=_text(answer, "SOPClassUID"))
                for answer in answers
                if (uid := _text(answer, "SOPInstanceUID"))
            ]
        self._classes = (study_uid, {one.sop_class_uid for one in found} - {""})
        return found

    def _c_find(self, level: str, keys: dict[str, str], wanted: Sequence[str]) -> tuple[list[Answer], bool]:
        """Answers, and whether they are all: a PACS that stops early says Cancel or Out of Resources."""
        identifier = _identifier(level, {**dict.fromkeys(wanted, ""), **keys})
        answers: list[Answer] = []
        association = self._find_association()
        try:
            for status, answer in association.send_c_find(identifier, FIND):
                code = self._code(status, association)
                if code in (0xFF00, 0xFF01) and answer is not None:
                    answers.append(_answer(answer))
                elif code == 0xFE00 or (code == OUT_OF_RESOURCES and answers):
                    return answers, False
                else:
                    self._status(status, "C-FIND")
        except RuntimeError:  # it ended before the request was sent
            raise self._broke_off() from None
        except PacsError:
            self._end_finding()
            raise
        return answers, True

    def _find_association(self) -> Association:
        """One association for all searches in a row."""
        if self._finding is None or not _alive(self._finding):
            self._end_finding()
            self._finding = self._associate([build_context(FIND)])
        return self._finding

    def _end_finding(self) -> None:
        if self._finding is not None:
            _end(self._finding)
        self._finding = None

    # Fetching

    def fetch(
        self,
        study_uid: str,
        sink: Sink,
        *,
        series_uid: str | None = None,
        instances: Sequence[InstanceFound] | None = None,
        attempt: int = 0,
    ) -> Fetched:
        """C-GET, or C-MOVE where the PACS offers no C-GET and a storage SCP of ours is configured.

        Success is answered to each C-STORE when the sink has taken the instance, which need not be durable yet: a PACS
        keeps what it sends on request.
        """
        if instances is not None:
            classes = {one.sop_class_uid for one in instances} - {""}
        else:
            if self._classes[0] != study_uid:
                self.instances(study_uid, series_uid)
            classes = self._classes[1]
        done = Fetched(received=0, failed=0, way="")
        for identifier in _wanted(study_uid, series_uid, instances):
            part = self._retrieve(identifier, classes, Intake(sink), attempt)
            done = Fetched(received=done.received + part.received, failed=done.failed + part.failed, way=part.way)
        return done

    def _retrieve(self, identifier: Dataset, classes: set[str], intake: Intake, attempt: int) -> Fetched:
        if self._gets:
            try:
                return self._c_get(identifier, _storage_contexts(classes, attempt), intake)
            except _NotOffered:
                self._gets = False
                if not self._receiver.usable:
                    raise PacsError(
                        f"{self.name} offers no C-GET",
                        expected="C-GET, or a port on which the PACS may send to us (C-MOVE)",
                        next_step="set move_port of this PACS in radloop.toml, and register our AE title at the PACS",
                    ) from None
                LOG.warning("%s offers no C-GET: it is asked by C-MOVE", self.name)
        if not self._receiver.usable:
            raise SettingsError(
                f"{self.name} cannot be asked by C-MOVE: no port to receive on",
                next_step="set move_port under [pacs.NAME] in radloop.toml",
            )
        return self._c_move(identifier, intake, attempt)

    def _c_get(self, identifier: Dataset, storage: list[PresentationContext], intake: Intake) -> Fetched:
        self._end_finding()  # one association at a time
        contexts = [build_context(GET), *storage]
        roles = [build_role(uid, scp_role=True) for uid in sorted({str(c.abstract_syntax) for c in storage})]
        with self._associated(contexts, roles=roles, intake=intake) as association:
            if not any(c.abstract_syntax == GET for c in association.accepted_contexts):
                raise _NotOffered
            return self._sub_operations(association, association.send_c_get(identifier, GET), intake, "C-GET")

    def _c_move(self, identifier: Dataset, intake: Intake, attempt: int) -> Fetched:
        self._end_finding()
        with self._receiver.taking(intake, attempt), self._associated([build_context(MOVE)]) as association:
            if not association.accepted_contexts:
                raise PacsError(f"{self.name} offers neither C-GET nor C-MOVE in the study root model")
            answers = association.send_c_move(identifier, self._receiver.title, MOVE)
            return self._sub_operations(association, answers, intake, "C-MOVE")

    def _sub_operations(
        self, association: Association, answers: Iterator[tuple[Dataset, Dataset | None]], intake: Intake, way: str
    ) -> Fetched:
        failed = 0
        wait_for(association, intake, self._timeout_s)
        for status, _ in answers:
            if intake.error is not None:  # our side cannot go on: nothing more need be sent
                association.abort()
                raise intake.error
            code = self._code(status, association)
            failed = int(status.get("NumberOfFailedSuboperations") or 0)
            if code == 0xA801:
                raise PacsError(
                    f"{self.name} does not know the AE title it is to send to",
                    expected=f"{self._receiver.title} in its list of nodes, with this machine's name and port",
                    next_step="ask who runs the PACS to register it",
                )
            if code == 0x0122 or (code >> 8 == 0xA9 and way == "C-GET"):
                raise _NotOffered
            # A702 is also what a PACS says when each sub-operation failed.
            if code not in (0xFF00, 0xB000, 0xFE00) and not (code == 0xA702 and failed):
                self._status(status, way)
        if intake.error is not None:
            raise intake.error
        return Fetched(received=intake.received, failed=failed, way=way)

    # Sending

    def send(self, files: Iterable[Path]) -> list[Sent]:
        """C-STORE, bytes as they lie in the files, with one association for each 128 kinds of instances."""
        known = [(path, *_kind(path)) for path in files]
        kinds = sorted({(sop_class, syntax) for _, sop_class, syntax in known})
        sent = []
        for start in range(0, len(kinds), _MAX_CONTEXTS):
            some = kinds[start : start + _MAX_CONTEXTS]
            before, _config.STORE_SEND_CHUNKED_DATASET = _config.STORE_SEND_CHUNKED_DATASET, True
            try:
                with self._associated([build_context(*kind) for kind in some]) as association:
                    sent += [self._store(association, path) for path, *kind in known if tuple(kind) in some]
            finally:
                _config.STORE_SEND_CHUNKED_DATASET = before
        return sent

    def _store(self, association: Association, path: Path) -> Sent:
        try:
            status = association.send_c_store(path)
        except ValueError:  # this SOP class, or this transfer syntax of it, was not accepted
            return Sent(path=path, status=0x0122)
        except RuntimeError:
            raise self._broke_off() from None
        return Sent(path=path, status=self._code(status, association))

    # Associations

    @contextmanager
    def _associated(
        self,
        contexts: Sequence[PresentationContext],
        *,
        roles: Sequence[Any] = (),
        intake: Intake | None = None,
    ) -> Iterator[Association]:
        association = self._associate(contexts, roles=roles, intake=intake)
        try:
            yield association
        except RuntimeError:  # pynetdicom's word for an association that has ended meanwhile
            raise self._broke_off() from None
        finally:
            _end(association)

    def _associate(
        self,
        contexts: Sequence[PresentationContext],
        *,
        roles: Sequence[Any] = (),
        intake: Intake | None = None,
    ) -> Association:
        ae = _Ae(ae_title=self.address.calling, intake=intake)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = self._timeout_s
        ae.connection_timeout = self._timeout_s
        handlers: list[Any] = [(evt.EVT_CONN_OPEN, _no_delay)]
        if intake is not None:
            handlers.append((evt.EVT_CONN_OPEN, in_slices))
        association = ae.associate(
            self.address.host,
            self.address.port,
            contexts=list(contexts),
            ae_title=self.address.called,
            max_pdu=_MAX_PDU,
            ext_neg=list(roles),
            evt_handlers=handlers,
            tls_args=(self._tls, self.address.host) if self._tls else None,
        )
        if not association.is_established:
            raise self._no_association(association)
        association._reactor_checkpoint = held = _Held()
        held.parked.wait(self._timeout_s)
        return association

    def _no_association(self, association: Association) -> PacsError:
        answer = association.acceptor.primitive
        if association.is_rejected and answer is not None:
            told = str(answer.reason_str)
            if answer.result == 0x02 or (answer.result_source == 0x03):
                return PacsUnavailable(f"{self.name} takes no association now", got=told)
            return PacsError(
                f"{self.name} rejects us",
                expected=f"{self.address} to know our AE title {self.address.calling}",
                got=told,
                next_step="compare both AE titles with the PACS's list of nodes",
            )
        if association.acse.is_aborted("a-abort") or (association.is_aborted and self._reached(association)):
            return PacsUnavailable(f"{self.name} aborts the association", expected=f"{self.address} to accept it")
        return PacsUnavailable(
            f"{self.name} cannot be reached",
            expected=f"{self.address}",
            got=f"no answer in {self._timeout_s:g} s"
            if self._reached(association)
            else "no connection by TLS with these certificates"
            if self._tls
            else "no connection",
            next_step=f"check host, port and firewall; radloop pacs echo {self.name}",
        )

    @staticmethod
    def _reached(association: Association) -> bool:
        transport = association.dul.socket
        return transport is not None and bool(transport._is_connected)

    def _code(self, status: Dataset, association: Association) -> int:
        """The status of a message. Raises PacsUnavailable when there is none: the association has ended."""
        if "Status" not in status:
            raise self._broke_off()
        return int(status.Status)

    def _broke_off(self) -> PacsUnavailable:
        return PacsUnavailable(f"{self.name} ended the association, or was silent for {self._timeout_s:g} s")

    def _status(self, status: Dataset, service: str) -> None:
        """Return on Success. Raises PacsUnavailable on Out of Resources (A7xx), PacsError on every other status."""
        if "Status" not in status:
            raise self._broke_off()
        code = int(status.Status)
        if code == 0:
            return
        kind = PacsUnavailable if code >> 8 == 0xA7 else PacsError
        # ErrorComment is left out: some PACS repeat the query in it.
        raise kind(
            f"{self.name} refuses a {service}",
            expected="status 0000",
            got=f"status {code:04X} (PS3.4)",
            next_step=f"see its log; it must reach {self._receiver.title} at our host and move_port"
            if service == "C-MOVE"
            else None,
        )

    def close(self) -> None:
        """Release the association of searches and stop receiving."""
        self._end_finding()
        self._receiver.stop()


class _NotOffered(Exception):
    """The PACS does not do C-GET."""


class _Receiver:
    """The storage SCP that a PACS sends to on C-MOVE: from that PACS only, and only while something is asked for."""

    def __init__(self, title: str, sender: str, host: str, port: int | None, tls: ssl.SSLContext | None) -> None:
        self.title, self._sender, self._address, self._tls = title, sender, (host, port), tls
        self._intake: Intake | None = None
        self._attempt = 0
        self._server: Any = None

    @property
    def usable(self) -> bool:
        return self._address[1] is not None

    @contextmanager
    def taking(self, intake: Intake, attempt: int) -> Iterator[None]:
        self._start()
        self._intake, self._attempt = intake, attempt
        try:
            yield
        finally:
            self._intake = None

    def _start(self) -> None:
        if self._server is not None:
            return
        _config.UNRESTRICTED_STORAGE_SERVICE = True  # every storage SOP class, private ones too
        ae = AE(ae_title=self.title)
        ae.add_supported_context(Verification)
        ae.maximum_pdu_size = _MAX_PDU
        ae.require_calling_aet = [self._sender]
        host, port = self._address[0], self._address[1] or 0
        try:
            self._server = ae.make_server(
                (host, port),
                ssl_context=self._tls,
                evt_handlers=[(evt.EVT_REQUESTED, self._choose)],
                server_class=Server,
                serve=lambda _: Receiving(lambda: self._intake),
                refused=lambda what, error: LOG.warning("a connection to move_port failed: %s (%s)", what, error),
            )
        except OSError as error:
            raise SettingsError(
                f"cannot receive on {host}:{port}",
                expected="a free port: `radloop listen` needs one of its own",
                got=error.strerror or type(error).__name__,
                next_step="set another move_port, and register it at the PACS",
            ) from None
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="c-move", daemon=True).start()

    def _choose(self, event: evt.Event) -> None:
        """Of the syntaxes that a context names, the first is taken: at a later attempt, see to another being first."""
        request = event.assoc.requestor.primitive
        if not self._attempt or request is None:
            return
        liked = _NATIVE if self._attempt == 1 else _COMPRESSED
        for context in request.presentation_context_definition_list:
            context.transfer_syntax = sorted(context.transfer_syntax, key=lambda syntax: syntax not in liked)

    def stop(self) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        socketserver.BaseServer.shutdown(server)
        server.socket.close()
        for association in server.ae.active_associations:
            association.abort()


def _wanted(study_uid: str, series_uid: str | None, instances: Sequence[InstanceFound] | None) -> Iterator[Dataset]:
    """Identifiers of the retrievals (PS3.4 section C.4.3.1.3): instances in lists of UIDs, one series at a time."""
    if instances is None:
        keys = {"StudyInstanceUID": study_uid}
        yield (
            _identifier("SERIES", {**keys, "SeriesInstanceUID": series_uid})
            if series_uid
            else _identifier("STUDY", keys)
        )
        return
    by_series: dict[str, list[str]] = {}
    for one in instances:
        by_series.setdefault(one.series_uid, []).append(one.sop_uid)
    for series, uids in by_series.items():
        for start in range(0, len(uids), _LIST_UIDS):
            some = "\\".join(uids[start : start + _LIST_UIDS])
            keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series, "SOPInstanceUID": some}
            yield _identifier("IMAGE", keys)


def _storage_contexts(classes: Iterable[str], attempt: int = 0) -> list[PresentationContext]:
    """What we can take: each SOP class once a transfer syntax, so that the PACS can send every instance as it keeps it.

    Some PACS take the first context of a SOP class for all its instances, and fail where they would have to transcode.
    What is missing after that comes at the second attempt, uncompressed only, or at the third, compressed only. 127
    contexts must do: of too many classes, or unknown ones, some share a context among several syntaxes.
    """
    groups = ((_NATIVE, _COMPRESSED), (_NATIVE,), (_COMPRESSED,))[min(attempt, 2)]
    known, room = sorted(classes), _MAX_CONTEXTS - 1
    syntaxes = [syntax for group in groups for syntax in group]
    if known and len(known) * len(syntaxes) <= room:
        return [build_context(uid, syntax) for uid in known for syntax in syntaxes]
    named = known or list(dict.fromkeys([*_COMMON, *(str(one.abstract_syntax) for one in StoragePresentationContexts)]))
    return [build_context(uid, list(group)) for uid in named for group in groups][:room]


def _identifier(level: str, keys: dict[str, str]) -> Dataset:
    """Query keys as a data set, in the smallest character set that holds them (PS3.4 section C.4.1.1.3.1)."""
    identifier = Dataset()
    text = "".join(keys.values())
    if not text.isascii():
        with suppress(UnicodeEncodeError):
            text.encode("latin-1")
            identifier.SpecificCharacterSet = "ISO_IR 100"
        if "SpecificCharacterSet" not in identifier:
            identifier.SpecificCharacterSet = "ISO_IR 192"
    identifier.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        several: Any = value.split("\\") if keyword in _UID_KEYS and "\\" in value else value
        # Not validated: a warning would repeat the value.
        identifier.add(DataElement(keyword, dictionary_VR(keyword), several, validation_mode=0))
    return identifier


def _answer(identifier: Dataset) -> Answer:
    """An identifier as text by keyword, decoded by its own SpecificCharacterSet."""
    encodings = convert_encodings(identifier.get("SpecificCharacterSet") or "")
    found = {}
    for tag in list(identifier.keys()):  # iterating the data set would convert and validate each element
        element: Any = identifier.get_item(tag)
        keyword = keyword_for_tag(tag)
        if not keyword or not element.value:
            continue
        value = element.value
        if isinstance(element, RawDataElement):
            with warnings.catch_warnings(action="ignore"):  # of values that are not as their VR wants them: PHI
                value = convert_value(element.VR or dictionary_VR(tag), element, encodings)
        values = value if isinstance(value, (list, MultiValue)) else [value]
        if told := tuple(text for one in values if (text := str(one).strip(" \0"))):
            found[keyword] = told
    return found


def _text(answer: Answer, keyword: str) -> str:
    return "\\".join(answer.get(keyword, ()))


def _kind(path: Path) -> tuple[str, str]:
    """SOP class and transfer syntax of a file. Raises PacsError when it does not say."""
    try:
        meta = read_file_meta_info(path)
        return str(UID(meta.MediaStorageSOPClassUID)), str(UID(meta.TransferSyntaxUID))
    except Exception:  # noqa: BLE001 - pydicom raises many kinds on broken input
        raise PacsError("a file to send has no File Meta Information", next_step="send DICOM files only") from None


class _Ae(AE):
    """pynetdicom (3.0.4) forgets a socket without closing it when the connection fails or the peer is gone.

    `intake`: takes the instances that come over its association.
    """

    def __init__(self, ae_title: str, intake: Intake | None = None) -> None:
        super().__init__(ae_title)
        self._intake = intake

    def _create_socket(self, assoc: Association, address: Any, tls_args: Any) -> Any:
        made = super()._create_socket(assoc, address, tls_args)
        if self._intake is not None:
            assoc.dul.socket = made  # the upper layer wants to know it; who called us sets it again
            UpperLayer(assoc, lambda _: Receiving(lambda: self._intake)).socket = None
        shut_down = made._shutdown_socket

        def close() -> None:
            connection = made.socket
            shut_down()
            if connection is not None:
                connection.close()

        made._shutdown_socket = close  # type: ignore[method-assign]
        return made


class _Held(threading.Event):
    """In place of the event that pauses a requestor's reactor: it parks the reactor for good.

    pynetdicom (3.0.4) pauses it for each message, but may believe it paused when it is just waking up: the reactor then
    takes an answer off the queue that was ours, and a study is missing from a list without a word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parked = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.parked.set()
        return super().wait(timeout)

    def set(self) -> None:
        """Nothing: only `let_go` wakes the reactor."""

    def clear(self) -> None:
        """Nothing: it is parked already."""

    def let_go(self) -> None:
        """Let the reactor's thread see that the association has ended."""
        super().set()


def _alive(association: Association) -> bool:
    """Whether it can take a request; nobody but us looks for the peer's release and abort while the reactor is parked."""
    acse = association.acse
    return association.is_established and not acse.is_aborted() and not acse.is_release_requested()


def _end(association: Association) -> None:
    """Release it, or, where that is too late, see that its thread and its socket end."""
    if association.is_established and not association.acse.is_aborted():
        association.release()
    association.kill()
    if isinstance(held := association._reactor_checkpoint, _Held):
        held.let_go()


def _no_delay(event: evt.Event) -> None:
    """Without this, Nagle's algorithm and delayed acknowledgements cost 40 ms an instance."""
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
