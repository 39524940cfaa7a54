"""The conformance suite of find and fetch on real PACS: Orthanc by DIMSE and by DICOMweb, dcmtk's dcmqrscp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from radloop.dicom.pacs import PacsError, Query
from radloop.dicom.pacs.fetch import fetch
from radloop.testing.pacs_peers import Dcmqrscp, Orthanc, OrthancWeb, free_port, has_dicomweb
from radloop.testing.pacs_suite import QUICK, Archive, PacsSuite, Peer, landed, open_target

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="session")
def orthanc(require_service: Callable[..., str]) -> None:
    """Skip where Orthanc or its plugin is not installed."""
    require_service("Orthanc", "Orthanc")
    if not has_dicomweb():
        require_service("Orthanc's DICOMweb plugin", "no-such-program-without-orthanc-dicomweb")


class TestOrthancByGet(PacsSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def peer(cls, orthanc: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
        with Orthanc(tmp_path_factory.mktemp("orthanc")) as running:
            yield running


class TestOrthancByMove(PacsSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def peer(cls, orthanc: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
        with Orthanc(tmp_path_factory.mktemp("orthanc"), moves=True) as running:
            yield running


class TestOrthancByDicomWeb(PacsSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def peer(cls, orthanc: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
        with OrthancWeb(tmp_path_factory.mktemp("orthanc")) as running:
            yield running


class TestDcmqrscpByGet(PacsSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def peer(cls, require_service: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
        require_service("dcmtk's dcmqrscp", "dcmqrscp")
        with Dcmqrscp(tmp_path_factory.mktemp("dcmqrscp")) as running:
            yield running


class TestDcmqrscpByMove(PacsSuite):
    compresses = False

    @pytest.fixture(scope="class")
    @classmethod
    def peer(cls, require_service: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
        require_service("dcmtk's dcmqrscp", "dcmqrscp")
        with Dcmqrscp(tmp_path_factory.mktemp("dcmqrscp"), moves=True, compresses=False) as running:
            yield running


def test_a_pacs_that_offers_one_syntax_for_all(require_service: Callable[..., str], tmp_path: Path) -> None:
    """dcmtk's, told to offer JPEG 2000, fails where it would have to compress: such images come at a second attempt."""
    require_service("dcmtk's dcmqrscp", "dcmqrscp")
    with Dcmqrscp(tmp_path / "dcmqrscp", moves=True) as peer, peer.pacs() as pacs:
        (tmp_path / "given").mkdir()
        archive = Archive(peer, tmp_path / "given")
        for study in ("1", "2"):
            archive.add(study, 5)
            archive.add(study, 1, first=6, compressed=True)
        target = open_target(tmp_path / "home")
        report = fetch(pacs, Query(), target, actor="test")
        assert (report.fetched, report.received, report.missing) == (2, 12, 0)
        archive.check(landed(target), list(archive.files))


def test_a_pacs_that_cannot_reach_us(orthanc: None, tmp_path: Path) -> None:
    """By C-MOVE a wrong port at the PACS looks like success of nothing: it must be told, with what to look at."""
    with Orthanc(tmp_path / "orthanc", moves=True) as peer:
        (tmp_path / "given").mkdir()
        Archive(peer, tmp_path / "given").add("1", 2)
        peer.move_port = free_port()
        with (
            peer.pacs(patience=QUICK) as pacs,
            pytest.raises(PacsError, match="host and move_port"),
        ):
            fetch(pacs, Query(), open_target(tmp_path / "home"), actor="test")


def test_without_c_get_it_falls_back_to_c_move(
    require_service: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Most PACS offer no C-GET: what then happens must work, and be said."""
    require_service("dcmtk's dcmqrscp", "dcmqrscp")
    with Dcmqrscp(tmp_path / "dcmqrscp", more=("--disable-get",)) as peer:
        (tmp_path / "given").mkdir()
        archive = Archive(peer, tmp_path / "given")
        archive.add("1", 3)
        target = open_target(tmp_path / "home")
        with peer.pacs() as pacs:
            report = fetch(pacs, Query(), target, actor="test")
        assert report.ways == {"C-MOVE": 3}
        assert "offers no C-GET" in caplog.text
        peer.move_port = None
        with peer.pacs(patience=QUICK) as pacs, pytest.raises(PacsError, match="offers no C-GET"):
            fetch(pacs, Query(), open_target(tmp_path / "other"), actor="test")
