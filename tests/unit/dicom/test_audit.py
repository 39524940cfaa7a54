"""Audit messages: their shape as PS3.15 section A.5.1 gives it, and a syslog server that comes and goes."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from radloop.catalog.audit import record
from radloop.catalog.schema import LedgerRow
from radloop.catalog.store import Catalog
from radloop.dicom.audit import auditable, drain, message
from radloop.dicom.audit.syslog import parse
from radloop.errors import SettingsError

# PS3.15 A.5.1: element -> attributes that it must have, that it may have, and its children in order with their number.
CODE = ({"csd-code", "codeSystemName", "originalText"}, {"displayName"}, ())
SHAPE: dict[str, tuple[set[str], set[str], tuple[tuple[str, str], ...]]] = {
    "AuditMessage": (
        set(),
        set(),
        (
            ("EventIdentification", "1"),
            ("ActiveParticipant", "+"),
            ("AuditSourceIdentification", "1"),
            ("ParticipantObjectIdentification", "*"),
        ),
    ),
    "EventIdentification": (
        {"EventDateTime", "EventOutcomeIndicator"},
        {"EventActionCode"},
        (("EventID", "1"), ("EventTypeCode", "*"), ("EventOutcomeDescription", "?")),
    ),
    "EventID": CODE,
    "EventTypeCode": CODE,
    "RoleIDCode": CODE,
    "ParticipantObjectIDTypeCode": CODE,
    "ActiveParticipant": (
        {"UserID", "UserIsRequestor"},
        {"AlternativeUserID", "UserName", "NetworkAccessPointID", "NetworkAccessPointTypeCode"},
        (("RoleIDCode", "*"), ("MediaIdentifier", "?")),
    ),
    "AuditSourceIdentification": ({"AuditSourceID"}, {"AuditEnterpriseSiteID"}, (("AuditSourceTypeCode", "*"),)),
    "AuditSourceTypeCode": ({"csd-code"}, {"codeSystemName", "originalText", "displayName"}, ()),
    "ParticipantObjectIdentification": (
        {"ParticipantObjectID"},
        {
            "ParticipantObjectTypeCode",
            "ParticipantObjectTypeCodeRole",
            "ParticipantObjectDataLifeCycle",
            "ParticipantObjectSensitivity",
        },
        (
            ("ParticipantObjectIDTypeCode", "1"),
            ("ParticipantObjectName", "?"),
            ("ParticipantObjectQuery", "?"),
            ("ParticipantObjectDetail", "*"),
            ("ParticipantObjectDescription", "*"),
        ),
    ),
    "ParticipantObjectDetail": ({"type", "value"}, set(), ()),
}
EVENTS = {"110100", "110101", "110103", "110104", "110106", "110107", "110110", "110112", "110113"}


def check_shape(element: ElementTree.Element) -> None:
    """Fail unless an element is as the schema wants it."""
    must, may, children = SHAPE[element.tag]
    assert must <= set(element.attrib) <= must | may, (element.tag, element.attrib)
    names = "".join(f"<{child.tag}>" for child in element)
    wanted = "".join(f"(<{name}>){'' if number == '1' else number}" for name, number in children)
    assert re.fullmatch(wanted, names), (element.tag, names)
    for child in element:
        check_shape(child)


@pytest.fixture
def catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home}/catalog.db")


def _fill(catalog: Catalog) -> None:
    ledger = catalog.ledger
    record(ledger, "listen start", "listen", actor="ada", detail={"port": 11112})
    record(ledger, "landing read", "landing", actor="deidentify", pseudonyms=["P1", "P2"], detail={"instances": 7})
    told = {"action": "read", "kind": "study", "why": 'results <back> & "forth"', "pseudonyms": ["2.25.7"]}
    ledger.append("audit", "crosswalk", told, actor="bob")
    ledger.append("quarantine", "2.25.9", {"id": 1, "reason": "PHI_FOUND", "state": "purged"}, actor="bob")
    ledger.append("ingest", "f" * 64, {"instances": 3}, actor="listen")
    ledger.append("gate", "m", {"figure": 1}, actor="evaluate")
    record(ledger, "backup", "catalog", actor="ada", failed=True)
    record(ledger, "something new", "catalog", actor="ada")


def test_each_message_has_the_shape_of_the_standard(catalog: Catalog) -> None:
    """If this failed, an audit repository would refuse our messages, and nobody would notice."""
    _fill(catalog)
    rows = [row for row in catalog.ledger.rows() if auditable(row)]
    assert [row.seq for row in rows] == [1, 2, 3, 4, 5, 7, 8]
    found = []
    for row in rows:
        root = ElementTree.fromstring(message(row, "radloop-ward-3"))
        check_shape(root)
        event = root.find("EventIdentification")
        assert event is not None
        code, source = event.find("EventID"), root.find("AuditSourceIdentification")
        assert code is not None
        assert code.attrib["csd-code"] in EVENTS
        assert code.attrib["codeSystemName"] == "DCM"
        assert source is not None
        assert source.attrib["AuditSourceID"] == "radloop-ward-3"
        assert event.attrib["EventActionCode"] in "CRUDE"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", event.attrib["EventDateTime"])
        participants = root.findall("ActiveParticipant")
        assert [one.attrib["UserIsRequestor"] for one in participants] == ["true", "false"]
        assert participants[0].attrib["UserID"] == row.actor
        found.append((code.attrib["csd-code"], event.attrib["EventActionCode"], event.attrib["EventOutcomeIndicator"]))
    assert found == [
        ("110100", "E", "0"), ("110103", "R", "0"), ("110110", "R", "0"), ("110103", "D", "0"),
        ("110104", "C", "0"), ("110106", "R", "4"), ("110113", "E", "0"),
    ]  # fmt: skip


def test_whom_it_was_about_stands_as_pseudonyms(catalog: Catalog) -> None:
    """If this failed, nobody could say whose data was read, or the audit log would itself name patients."""
    _fill(catalog)
    rows = catalog.ledger.rows()
    objects = ElementTree.fromstring(message(rows[1], "s")).findall("ParticipantObjectIdentification")
    ids = [one.attrib["ParticipantObjectID"] for one in objects]
    assert ids == ["P1", "P2", "radloop:ledger/2#landing"]
    assert objects[0].attrib["ParticipantObjectTypeCode"] == "1"
    code = objects[0].find("ParticipantObjectIDTypeCode")
    assert code is not None
    assert (code.attrib["csd-code"], code.attrib["codeSystemName"]) == ("2", "RFC-3881")
    study = ElementTree.fromstring(message(rows[2], "s")).findall("ParticipantObjectIdentification")[0]
    code = study.find("ParticipantObjectIDTypeCode")
    assert code is not None
    assert (study.attrib["ParticipantObjectID"], code.attrib["csd-code"]) == ("2.25.7", "110180")
    details = {
        detail.attrib["type"]: base64.b64decode(detail.attrib["value"]).decode()
        for detail in ElementTree.fromstring(message(rows[2], "s")).iter("ParticipantObjectDetail")
    }
    assert details["why"] == 'results <back> & "forth"'
    assert details["hash"] == rows[2].hash


@contextmanager
def _server(kind: str, context: ssl.SSLContext | None = None, port: int = 0) -> Iterator[tuple[int, list[bytes]]]:
    """A syslog server on loopback: its port, and the messages it has got."""
    got: list[bytes] = []
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    ended = threading.Event()

    def datagrams() -> None:
        listening.settimeout(0.1)
        while not ended.is_set():
            try:
                got.append(listening.recv(70_000))
            except TimeoutError:
                continue

    def streams() -> None:
        listening.settimeout(0.1)
        while not ended.is_set():
            try:
                peer: Any = listening.accept()[0]
            except TimeoutError:
                continue
            with context.wrap_socket(peer, server_side=True) if context else peer as talking:
                file = talking.makefile("rb")
                while length := _number(file):
                    got.append(file.read(length))
                file.close()

    if kind != "udp":
        listening.listen()
    thread = threading.Thread(target=datagrams if kind == "udp" else streams)
    thread.start()
    try:
        yield listening.getsockname()[1], got
    finally:
        ended.set()
        thread.join()
        listening.close()


def _number(file: Any) -> int:
    digits = b""
    while (byte := file.read(1)) not in (b" ", b""):
        digits += byte
    return int(digits or 0)


def _wait(got: list[bytes], number: int) -> None:
    for _ in range(3000):
        if len(got) >= number:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"{len(got)} of {number} came")


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_a_syslog_server_gets_each_message_once_and_in_order(catalog: Catalog, home: Path, kind: str) -> None:
    """If this failed, the hospital's audit repository would miss accesses, or count them twice."""
    _fill(catalog)
    with _server(kind) as (port, got):
        url = f"{kind}://127.0.0.1:{port}"
        assert drain(catalog.ledger, url, "radloop", home=home) == 7
        assert drain(catalog.ledger, url, "radloop", home=home) == 0
        record(catalog.ledger, "restore", "catalog", actor="ada")
        assert drain(catalog.ledger, url, "radloop", home=home) == 1
        _wait(got, 8)
    header = re.compile(rb"<85>1 \S+T\S+ \S+ radloop \d+ DICOM\+RFC3881 - \xef\xbb\xbf<AuditMessage>")
    assert all(header.match(one) for one in got)
    numbers = [int(found[1]) for one in got if (found := re.search(rb"radloop:ledger/(\d+)#", one))]
    assert numbers == [1, 2, 3, 4, 5, 7, 8, 9]


def test_a_dead_sink_gets_all_later(catalog: Catalog, home: Path, free_port: int) -> None:
    """If this failed, a repository that is restarted would lack what happened meanwhile, or stop the hospital's work."""
    _fill(catalog)
    url = f"tcp://127.0.0.1:{free_port}"
    with pytest.raises(OSError, match="refused"):
        drain(catalog.ledger, url, "radloop", home=home)
    assert catalog.ledger.sent(url) == 0
    with _server("tcp", port=free_port) as (_, got):
        assert drain(catalog.ledger, url, "radloop", home=home) == 7
        _wait(got, 7)


def test_tls_with_a_certificate_that_is_checked(
    catalog: Catalog, home: Path, tmp_path: Path, require_service: Callable[..., str]
) -> None:
    """If this failed, audit messages would go to whoever stands in the way."""
    require_service("openssl", "openssl")
    key, crt = tmp_path / "key.pem", tmp_path / "crt.pem"
    made = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(crt))
    name = ("-subj", "/CN=audit", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(["openssl", "req", "-x509", *made, *name], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    record(catalog.ledger, "backup", "catalog", actor="ada")
    with _server("tcp", context) as (port, got):
        assert drain(catalog.ledger, f"tls://127.0.0.1:{port}", "radloop", home=home, ca=crt) == 1
        _wait(got, 1)


def test_a_message_too_long_for_a_datagram_is_sent_without_the_list(catalog: Catalog, home: Path) -> None:
    """If this failed, one large batch would stop all later messages."""
    record(catalog.ledger, "landing read", "landing", actor="x", pseudonyms=[f"P{n:032d}" for n in range(900)])
    with _server("udp") as (port, got):
        assert drain(catalog.ledger, f"udp://127.0.0.1:{port}", "radloop", home=home) == 1
        _wait(got, 1)
    assert b'type="objects"' in got[0]


@pytest.mark.parametrize("url", ["http://a", "udp://", "tcp://a:99999", "tcp://a:b", "a:514"])
def test_addresses_that_are_none(url: str) -> None:
    """If this failed, a typo would mean that no audit message is ever sent."""
    with pytest.raises(SettingsError, match="the syslog sink is no address"):
        parse(url)
    assert parse("tls://audit.hospital.example") == ("tls", "audit.hospital.example", 6514)
    assert parse("udp://[::1]:5514") == ("udp", "::1", 5514)


def test_a_large_number_of_pseudonyms_makes_several_rows(catalog: Catalog) -> None:
    """If this failed, the audit of a large batch would leave patients out."""
    record(catalog.ledger, "landing read", "landing", actor="x", pseudonyms=[f"P{n}" for n in range(2500)])
    rows = catalog.ledger.rows()
    assert isinstance(rows[0], LedgerRow)
    assert [len(row.payload["pseudonyms"]) for row in rows] == [1000, 1000, 500]
