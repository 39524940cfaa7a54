"""Find and fetch where a real PACS cannot be made to misbehave: servers on loopback that do.

What every PACS must pass is `radloop.testing.pacs_suite`, run by tests/services/test_pacs.py.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    Verification,
)

from radloop.dicom.pacs import InstanceFound, PacsError, PacsUnavailable, Patience, Query, StudyFound
from radloop.dicom.pacs.dimse import Address, Dimse
from radloop.dicom.pacs.fetch import fetch
from radloop.dicom.pacs.pace import Hours, Rate, again
from radloop.dicom.pacs.search import _halves, fits, read_query
from radloop.dicom.pacs.web import DicomWeb
from radloop.errors import SettingsError
from radloop.testing.pacs_suite import instance, open_target

CANARY = "ZORBAXX^QUENTIN"
QUICK = Patience(tries=3, first_s=0.01)

# A PACS by DIMSE, as one is told to be


def study(uid: str, day: str = "20260101", **more: Any) -> Dataset:
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.QueryRetrieveLevel, ds.StudyInstanceUID, ds.StudyDate = "STUDY", uid, day
    ds.StudyTime, ds.AccessionNumber, ds.PatientName = "120000", f"A{uid}", CANARY
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    return ds


Handler = Callable[[evt.Event], Iterator[Any]]


@contextmanager
def scp(find: Handler, get: Handler | None = None) -> Iterator[Dimse]:
    """Yield an adapter to a C-FIND SCP that answers so."""
    ae = AE(ae_title="PACS")
    ae.add_supported_context(Verification)
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    handlers: list[Any] = [(evt.EVT_C_FIND, find)]
    if get is not None:
        ae.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
        ae.add_supported_context(CTImageStorage, scu_role=True, scp_role=True)
        handlers.append((evt.EVT_C_GET, get))
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        address = Address(host="127.0.0.1", port=server.server_address[1], called="PACS")
        with Dimse("main", address, timeout_s=5.0, patience=QUICK) as pacs:
            yield pacs
    finally:
        server.shutdown()


def test_a_pacs_that_ignores_every_key() -> None:
    """The standard lets it: all its studies would be fetched, and patients who never agreed with them."""
    kept = [study("1.1"), study("1.2", "20260105"), study("1.3", "20260109", ModalitiesInStudy=["CT", "SR"])]

    def everything(event: evt.Event) -> Iterator[Any]:
        level = event.identifier.QueryRetrieveLevel
        if level == "SERIES":
            answer = Dataset()
            answer.QueryRetrieveLevel, answer.SeriesInstanceUID, answer.Modality = "SERIES", "1.9", "MR"
            yield 0xFF00, answer
            return
        for ds in kept:
            yield 0xFF01, ds  # pending, and optional keys are not supported

    with scp(everything) as pacs:
        assert [one.study_uid for one in pacs.find(Query(accessions=("A1.2",)))] == ["1.2"]
        assert [one.study_uid for one in pacs.find(Query(begin=date(2026, 1, 2), end=date(2026, 1, 8)))] == ["1.2"]
        assert [one.study_uid for one in pacs.find(Query(modalities=("CT",)))] == ["1.3"]
        assert len(list(pacs.find(Query(modalities=("MR",))))) == 2  # known from their series


@pytest.mark.parametrize("status", [0xFE00, 0xA700])
def test_a_pacs_that_stops_its_list(status: int) -> None:
    """Too many answers: PACS say so by Cancel or Out of Resources, and the rest is missing."""
    kept = [study(f"1.{n}", f"202601{1 + n // 4:02}") for n in range(32)]
    kept += [study(f"2.{n}", "20260120", StudyTime=f"{n:02}3000") for n in range(12)]

    def cut(event: evt.Event) -> Iterator[Any]:
        asked = event.identifier
        begin, _, end = (str(asked.StudyDate) or "-").partition("-")
        first, _, last = (str(asked.get("StudyTime", "")) or "-").partition("-")
        found = [
            ds
            for ds in kept
            if (begin or "0") <= ds.StudyDate <= (end or begin or "9")
            and (first or "0") <= ds.StudyTime <= (last or "9")
        ]
        for ds in found[:7]:
            yield 0xFF00, ds
        if len(found) > 7:
            yield status, None

    with scp(cut) as pacs:
        found = [one.study_uid for one in pacs.find(Query(begin=date(2026, 1, 1), end=date(2026, 1, 31)))]
        assert sorted(found) == sorted(str(ds.StudyInstanceUID) for ds in kept)
        assert len({*pacs.find(Query())}) == 44


def test_a_minute_with_too_many_studies_is_an_error() -> None:
    """What cannot be listed must not be passed over in silence."""

    def always_cut(event: evt.Event) -> Iterator[Any]:
        yield 0xFF00, study("1.1")
        yield 0xFE00, None

    with scp(always_cut) as pacs, pytest.raises(PacsError, match="even of one minute"):
        list(pacs.find(Query(begin=date(2026, 1, 1), end=date(2026, 1, 1))))


def test_values_that_break_the_rules_come_through_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """pydicom's warnings repeat the value, and a warning ends in a log."""
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(action="ignore"):
        more = {"StudyDescription": "x" * 80, "PatientID": "MRN " * 30, "NumberOfStudyRelatedInstances": "12"}
        strange = study("1.1", "2026.01.01", AccessionNumber="A1.1", **more)
    caplog.clear()

    def answer(_: evt.Event) -> Iterator[Any]:
        yield 0xFF00, strange

    with scp(answer) as pacs, warnings.catch_warnings(action="error"):
        (found,) = pacs.find(Query(accessions=("A1.1",)))
    assert (found.study_date, found.instances, found.patient_name) == ("20260101", 12, CANARY)
    assert "ZORBAXX" not in caplog.text
    assert "A1.1" not in caplog.text
    assert "MRN" not in caplog.text


def test_a_search_that_fails_is_tried_again() -> None:
    """A PACS that is busy for a moment must not end the night's run; one that refuses must not be asked for ever."""
    asked: list[int] = []

    def busy_twice(_: evt.Event) -> Iterator[Any]:
        asked.append(1)
        if len(asked) < 3:
            yield 0xA700, None
        else:
            yield 0xFF00, study("1.1")

    with scp(busy_twice) as pacs:
        assert len(list(pacs.find(Query()))) == 1

    def refuses(_: evt.Event) -> Iterator[Any]:
        asked.append(1)
        yield 0xC001, None

    asked.clear()
    with scp(refuses) as pacs, pytest.raises(PacsError, match="status C001"):
        list(pacs.find(Query()))
    assert len(asked) == 1


def test_instances_that_a_pacs_cannot_send_are_missing_and_said(tmp_path: Path) -> None:
    """A gap in a study is a fact for the report, not a reason to stop nor to keep quiet; nor is it forgotten."""
    images = [instance("1", 1, n) for n in range(1, 5)]
    lost = str(images[2].SOPInstanceUID)
    found = Dataset()
    found.QueryRetrieveLevel, found.StudyInstanceUID, found.StudyDate = "STUDY", images[0].StudyInstanceUID, "20260101"
    whole = threading.Event()

    def find(event: evt.Event) -> Iterator[Any]:
        level = event.identifier.QueryRetrieveLevel
        for ds in images[:1] if level == "SERIES" else images if level == "IMAGE" else [found]:
            answer = Dataset()
            answer.QueryRetrieveLevel = level
            for element in event.identifier:
                if element.keyword in ds:
                    answer.add(ds[element.keyword])
            yield 0xFF00, answer

    def get(event: evt.Event) -> Iterator[Any]:
        asked = event.identifier.get("SOPInstanceUID", "")
        wanted = [ds for ds in images if not asked or ds.SOPInstanceUID in asked]
        yield len(wanted)
        for ds in wanted:
            if ds.SOPInstanceUID == lost and not whole.is_set():
                yield 0xC000, None  # as a PACS that has lost the file
                return
            yield 0xFF00, ds

    target = open_target(tmp_path / "home")
    with scp(find, get) as pacs:
        report = fetch(pacs, Query(), target, actor="test")
        assert (report.received, report.missing, report.incomplete) == (3, 1, 1) or report.missing == 2
        assert not report.whole
        whole.set()
        again = fetch(pacs, Query(), target, actor="test")
        assert again.missing == 0
        assert report.received + again.received == 4


# A PACS by DICOMweb


class Web:
    """An HTTP server that answers from a list, then with its last answer; and the requests it had."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []

    def add(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.answers.append((status, {name.replace("_", "-"): value for name, value in headers.items()}, body))

    @contextmanager
    def pacs(self, **changes: Any) -> Iterator[DicomWeb]:
        web = self

        class One(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests.append((self.path, dict(self.headers)))
                status, headers, body = web.answers.pop(0) if len(web.answers) > 1 else web.answers[0]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), One)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/dicom-web/"
            with DicomWeb("main", url, patience=QUICK, timeout_s=5.0, **changes) as found:
                yield found
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def web() -> Web:
    return Web()


def page(*uids: str) -> bytes:
    rows = [
        {
            "0020000D": {"vr": "UI", "Value": [uid]},
            "00080050": {"vr": "SH", "Value": [f"A{uid}"]},
            "00100010": {"vr": "PN", "Value": [{"Alphabetic": CANARY}]},
            "00201208": {"vr": "IS", "Value": [3]},
            "00081030": {"vr": "LO"},
        }
        for uid in uids
    ]
    return json.dumps(rows).encode()


def test_pages_of_whatever_length(web: Web) -> None:
    """A PACS may cut pages below what was asked for: the studies on the others must not be forgotten."""
    for body in (page("1.1", "1.2"), page("1.3"), page("1.4", "1.5", "1.6"), page()):
        web.add(200, body)
    with web.pacs() as pacs:
        assert [one.study_uid for one in pacs.find(Query())] == [f"1.{n}" for n in range(1, 7)]
    assert [dict(part.split("=") for part in path.split("?")[1].split("&"))["offset"] for path, _ in web.requests] == [
        "0",
        "2",
        "3",
        "6",
    ]


def test_a_server_without_paging_does_not_loop(web: Web) -> None:
    """One that ignores offset gives the same page for ever."""
    web.add(200, page("1.1", "1.2"))
    with web.pacs() as pacs:
        assert len(list(pacs.find(Query()))) == 2
    assert len(web.requests) == 2


def test_no_content_is_an_empty_list(web: Web) -> None:
    """PS3.18 lets a server answer 204."""
    web.add(204)
    with web.pacs() as pacs:
        assert list(pacs.find(Query())) == []


@pytest.mark.parametrize("status", [429, 503])
def test_it_waits_as_long_as_it_is_asked_to(web: Web, status: int) -> None:
    """A PACS that defends itself and is asked again at once blocks us, rightly."""
    web.add(status, Retry_After="1")
    web.add(200, page("1.1"))
    web.add(200, page())
    begun = time.monotonic()
    with web.pacs() as pacs:
        assert len(list(pacs.find(Query()))) == 1
    assert time.monotonic() - begun >= 1.0


@pytest.mark.parametrize(("status", "said"), [(401, "token"), (403, "token"), (404, "/studies"), (400, "HTTP 400")])
def test_a_refusal_is_not_tried_again(web: Web, status: int, said: str) -> None:
    """A wrong password that is tried five times locks the account."""
    web.add(status)
    with web.pacs(token="secret-of-ours") as pacs, pytest.raises(PacsError, match=said) as told:
        list(pacs.find(Query(accessions=("A77",))))
    assert len(web.requests) == 1
    assert web.requests[0][1]["Authorization"] == "Bearer secret-of-ours"
    assert "secret" not in str(told.value)
    assert "A77" not in str(told.value)


def test_a_web_page_is_no_answer(web: Web) -> None:
    """The url of a viewer, or a gateway's login page."""
    web.add(200, b"<html>log in</html>", Content_Type="text/html")
    with web.pacs() as pacs:
        with pytest.raises(PacsError, match=r"expected: application/dicom\+json\n  got: text/html"):
            list(pacs.find(Query()))
        with pytest.raises(PacsError, match="expected: multipart/related"):
            pacs.fetch("1.1", lambda _: None)


def test_nothing_of_a_query_is_logged(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """Accession numbers stand in addresses, and HTTP clients log addresses."""
    caplog.set_level(logging.DEBUG)
    web.add(200, page("1.1"))
    with web.pacs() as pacs:
        list(pacs.find(Query(accessions=("A-CANARY-77",))))
    assert "A-CANARY-77" in web.requests[0][0]
    assert "A-CANARY-77" not in caplog.text


def wado(*bodies: bytes, last: bytes = b"\r\n--x--\r\n") -> bytes:
    return b"".join(b"\r\n--x\r\nContent-Type: application/dicom\r\n\r\n" + body for body in bodies) + last


def test_what_came_before_the_connection_broke_is_kept(web: Web) -> None:
    """A study of thousands over a bad line must not begin anew each time."""
    web.add(200, wado(b"one", b"two", b"thr", last=b""), Content_Type="multipart/related; boundary=x")
    came: list[Any] = []
    with web.pacs() as pacs, pytest.raises(PacsUnavailable, match="broke off an answer"):
        pacs.fetch("1.1", came.append)
    assert came == [b"one", b"two"]


def test_a_server_that_knows_no_wildcard_for_syntaxes(web: Web) -> None:
    """`transfer-syntax=*` means "as you keep it"; those that answer 406 are asked without."""
    web.add(406)
    web.add(200, wado(b"one"), Content_Type="multipart/related; boundary=x")
    came: list[Any] = []
    with web.pacs() as pacs:
        assert pacs.fetch("1.1", came.append).received == 1
    assert [headers["Accept"].count("*") for _, headers in web.requests] == [1, 0]


def test_an_instance_that_is_not_there_is_counted(web: Web) -> None:
    """Deleted between the list and the retrieval: the others still come."""
    web.add(404)
    web.add(200, wado(b"two"), Content_Type="multipart/related; boundary=x")
    came: list[Any] = []
    wanted = [InstanceFound(sop_uid=f"1.1.1.{n}", series_uid="1.1.1") for n in (1, 2)]
    with web.pacs() as pacs:
        done = pacs.fetch("1.1", came.append, instances=wanted)
    assert (done.received, done.failed, came) == (1, 1, [b"two"])
    assert web.requests[1][0] == "/dicom-web/studies/1.1/series/1.1.1/instances/1.1.1.2"


# Searching


@given(st.dates(date(1990, 1, 1), date(2030, 1, 1)), st.integers(0, 4000))
def test_halves_cover_each_day_and_second_once(begin: date, days: int) -> None:
    """A day in no half is a day whose studies are never found; one in both is listed twice."""
    end = begin + timedelta(days=days)
    first, second = _halves({"StudyDate": f"{begin:%Y%m%d}-{end:%Y%m%d}"}, "main")
    if days == 0:
        assert first == {"StudyDate": f"{begin:%Y%m%d}", "StudyTime": "000000-115959"}
        assert second == {"StudyDate": f"{begin:%Y%m%d}", "StudyTime": "120000-235959"}
        third, fourth = _halves(second, "main")
        assert (third["StudyTime"], fourth["StudyTime"]) == ("120000-175959", "180000-235959")
        return
    (a, b), (c, d) = (half["StudyDate"].split("-") for half in (first, second))
    assert (a, d) == (f"{begin:%Y%m%d}", f"{end:%Y%m%d}")
    assert date.fromisoformat(c) - date.fromisoformat(b) == timedelta(days=1)
    assert a <= b < c <= d


@pytest.mark.parametrize(
    ("wildcard", "text", "fit"),
    [
        ("*thorax*", "CT THORAX nativ", True),
        ("ct?thorax", "CT Thorax", True),
        ("ct?thorax", "CT  Thorax", False),
        ("[ct]", "[CT]", True),
        ("[ct]", "c", False),
        ("a.c", "abc", False),
        ("*Füße", "RÖNTGEN FÜSSE", False),
        ("*füße", "Röntgen Füße", True),
        ("*", "", True),
    ],
)
def test_wildcards(wildcard: str, text: str, fit: bool) -> None:
    """DICOM's wildcards, not those of a shell: brackets mean themselves."""
    assert fits(StudyFound(study_uid="1", description=text), Query(description=wildcard)) is fit


def test_a_query_as_people_write_it(tmp_path: Path) -> None:
    """The list a study nurse exported: with a byte order mark, blank lines, the same twice."""
    (tmp_path / "list.txt").write_text("\ufeffA1\n\n A2 \nA1\n")
    query = read_query(modalities=["ct", "MR "], begin="30d", end="2026-01-31", accessions=str(tmp_path / "list.txt"))
    assert query.modalities == ("CT", "MR")
    assert query.begin == date.today() - timedelta(days=30)  # noqa: DTZ011
    assert query.accessions == ("A1", "A2")
    assert read_query(accessions="A1, A2").accessions == ("A1", "A2")
    assert query.keys == ["modalities", "begin", "end", "accessions"]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"begin": "01.02.2026"}, "a date cannot be read"),
        ({"begin": "99999999d"}, "a date cannot be read"),
        ({"accessions": "lists/none.txt"}, "is no file"),
        ({"accessions": " , "}, "is empty"),
    ],
)
def test_a_query_that_cannot_be_read(given_: dict[str, str], said: str) -> None:
    """An empty list that meant "everything" would fetch the whole PACS."""
    with pytest.raises(SettingsError, match=said):
        read_query(**given_)  # type: ignore[arg-type]


def test_an_empty_file_of_identifiers_is_not_everything(tmp_path: Path) -> None:
    """The export that failed tonight."""
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(SettingsError, match="is empty"):
        read_query(patient_ids=str(tmp_path / "list.txt"))


# Pace


def test_pauses_grow_and_are_bounded() -> None:
    """Asking a sick PACS more often does not heal it."""
    patience = Patience(tries=9, first_s=1.0, longest_s=8.0)
    for failures, most in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 8.0)):
        assert all(most / 2 <= patience.pause_s(failures) <= most for _ in range(20))
    assert len({patience.pause_s(3) for _ in range(5)}) > 1
    assert patience.pause_s(1, 3.0) == 3.0
    assert patience.pause_s(1, 3600.0) == 8.0


def test_again_gives_up_with_the_last_error() -> None:
    """The message of the last try says what is wrong now."""
    tried: list[int] = []

    def work() -> None:
        tried.append(1)
        raise PacsUnavailable(f"try {len(tried)}")

    with pytest.raises(PacsUnavailable, match="try 3"):
        again(work, QUICK)


def test_a_rate_has_no_burst_after_a_pause() -> None:
    """What was not fetched while the disk was slow must not come all at once."""
    rate = Rate(50)
    rate.wait()
    time.sleep(0.2)
    begun = time.monotonic()
    for _ in range(6):
        rate.wait()
    assert time.monotonic() - begun >= 0.08


@pytest.mark.parametrize(
    ("hours", "at", "is_open"),
    [
        ("19:00-06:00", "23:10", True),
        ("19:00-06:00", "05:59", True),
        ("19:00-06:00", "06:00", False),
        ("19:00-06:00", "12:00", False),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
        ("", "12:00", True),
    ],
)
def test_hours(hours: str, at: str, is_open: bool) -> None:
    """Over midnight, too."""
    assert Hours(hours).open(datetime.fromisoformat(f"2026-01-05T{at}")) is is_open


@pytest.mark.parametrize("wrong", ["19-6", "25:00-06:00", "19:00 - 06:00"])
def test_hours_that_cannot_be_read(wrong: str) -> None:
    """Hours that are misread fetch at noon."""
    with pytest.raises(SettingsError, match="HH:MM-HH:MM"):
        Hours(wrong)
