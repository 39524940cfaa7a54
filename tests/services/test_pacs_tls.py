"""Find and fetch over TLS: DIMSE with Orthanc, both sides with certificates; HTTPS with a server of Python's.

Orthanc 1.10 as Debian has it resets every HTTPS connection after the handshake, curl's too.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from radloop.dicom.landed import Buffer
from radloop.dicom.pacs import PacsError, PacsUnavailable, Query
from radloop.dicom.pacs.dimse import Address, Dimse
from radloop.dicom.pacs.tls import tls_context
from radloop.dicom.pacs.web import DicomWeb
from radloop.dicom.tls import server_context
from radloop.errors import SettingsError
from radloop.stages.project import open_pacs
from radloop.testing.pacs_peers import Orthanc
from radloop.testing.pacs_suite import QUICK, ROOT, Archive

pytestmark = pytest.mark.services
PEM = serialization.Encoding.PEM


def _made(name: str, issuer_key: Any, issuer: Any) -> tuple[Any, Any]:
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: Sequence[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key or key, hashes.SHA256())
    )
    return key, made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ca.pem, other.pem (another authority), and key and certificate of `pacs` and `us`."""
    folder = tmp_path_factory.mktemp("tls")
    root_key, root = _made("test authority", None, None)
    (folder / "ca.pem").write_bytes(root.public_bytes(PEM))
    (folder / "other.pem").write_bytes(_made("another", None, None)[1].public_bytes(PEM))
    for name in ("pacs", "us"):
        key, certificate = _made(name, root_key, root)
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(PEM))
        (folder / f"{name}.key").touch(0o600)
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
    return folder


@pytest.fixture(scope="module")
def peer(
    require_service: Callable[..., str], files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Orthanc]:
    require_service("Orthanc", "Orthanc")
    peer = Orthanc(
        tmp_path_factory.mktemp("orthanc"),
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(files / "pacs.pem"),
        DicomTlsPrivateKey=str(files / "pacs.key"),
        DicomTlsTrustedCertificates=str(files / "ca.pem"),
        DicomTlsRemoteCertificateRequired=True,
        tls=True,
    )
    with peer:
        yield peer


@pytest.fixture(scope="module")
def archive(peer: Orthanc, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    archive = Archive(peer, tmp_path_factory.mktemp("given"))

    def store(paths: Sequence[Path]) -> None:
        with dimse(peer, files) as pacs:
            assert all(sent.stored for sent in pacs.send(paths))

    peer.store = store  # type: ignore[method-assign, assignment]
    archive.add("1", 3, side=300)
    return archive


def dimse(peer: Orthanc, files: Path, *, ca: str = "ca.pem", us: bool = True, **more: Any) -> Dimse:
    ours = (files / "us.pem", files / "us.key") if us else (None, None)
    address = Address(host="127.0.0.1", port=peer.port, called=peer.title)
    return Dimse("main", address, tls=tls_context(files / ca, *ours), timeout_s=10.0, patience=QUICK, **more)


def test_dimse(peer: Orthanc, archive: Archive, files: Path) -> None:
    """What a hospital's network asks of an AE that leaves its own segment."""
    came: list[Buffer] = []
    with dimse(peer, files) as pacs:
        pacs.echo()
        assert pacs.count(f"{ROOT}.1") == 3
        pacs.fetch(f"{ROOT}.1", came.append)
    archive.check(came, list(archive.files))


def test_c_move_comes_by_tls_too(peer: Orthanc, archive: Archive, files: Path) -> None:
    """What is asked for under TLS must not come in the clear."""
    came: list[Buffer] = []
    ours = server_context(files / "us.pem", files / "us.key", files / "ca.pem")
    with dimse(peer, files, move_port=peer.move_port, move_first=True, move_tls=ours) as pacs:
        assert pacs.fetch(f"{ROOT}.1", came.append).way == "C-MOVE"
    archive.check(came, list(archive.files))


@pytest.mark.parametrize("wrong", [{"us": False}, {"ca": "other.pem"}])
def test_dimse_with_wrong_certificates(peer: Orthanc, archive: Archive, files: Path, wrong: dict[str, Any]) -> None:
    """Neither a PACS that does not know us nor one that is somebody else may be spoken to."""
    with dimse(peer, files, **wrong) as pacs, pytest.raises(PacsUnavailable, match="main"):
        pacs.echo()


@pytest.fixture
def https(files: Path) -> Iterator[str]:
    """Yield the address of a DICOMweb server that has no studies."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "pacs.pem", files / "pacs.key")
    context.load_verify_locations(files / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # strangers are refused here
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}/dicom-web"
    server.shutdown()
    thread.join()
    server.server_close()


def test_https(https: str, files: Path) -> None:
    """A hospital's own authority is trusted where it is named, and nowhere else; our certificate is shown."""
    ours = (files / "us.pem", files / "us.key")
    with DicomWeb("main", https, tls=tls_context(files / "ca.pem", *ours), patience=QUICK) as pacs:
        pacs.echo()
    stranger = DicomWeb("main", https, tls=tls_context(files / "other.pem", *ours), patience=QUICK)
    with stranger, pytest.raises(PacsError, match="TLS with main fails") as told:
        list(stranger.find(Query()))
    assert not isinstance(told.value, PacsUnavailable)
    assert "certificate verify failed" in str(told.value)
    with DicomWeb("main", https, tls=tls_context(files / "ca.pem"), patience=QUICK) as nobody, pytest.raises(PacsError):
        nobody.echo()


def test_settings(peer: Orthanc, archive: Archive, files: Path, tmp_path: Path) -> None:
    """The settings file reaches the same: with C-MOVE, only where what comes is encrypted as well."""
    text = (
        f'[pacs.main]\nkind = "dimse"\nsite = "a"\nhost = "127.0.0.1"\nport = {peer.port}\ncalled = "{peer.title}"\n'
        f'ca = "{files}/ca.pem"\nmove_port = {peer.move_port}\nmove_first = true\n'
    )
    (tmp_path / "radloop.toml").write_text(text)
    with pytest.raises(SettingsError, match="images would come without TLS"):
        open_pacs(tmp_path, "main")
    (tmp_path / "radloop.toml").write_text(f'{text}certificate = "{files}/us.pem"\nkey = "{files}/us.key"\n')
    came: list[Buffer] = []
    with open_pacs(tmp_path, "main") as pacs:
        pacs.fetch(f"{ROOT}.1", came.append)
    archive.check(came, list(archive.files))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """A path with a typo must not become a connection without a certificate."""
    (tmp_path / "empty.pem").touch()
    for wrong in (tmp_path / "none.pem", tmp_path / "empty.pem"):
        with pytest.raises(SettingsError, match="TLS files of a PACS"):
            tls_context(wrong)
