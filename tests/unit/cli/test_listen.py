"""`radloop listen` as it is run in a hospital: TLS, STOW-RS beside C-STORE, metrics, and what it shows."""

from __future__ import annotations

import json
import re
import signal
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from radloop.cli.intake import landing_at
from radloop.cli.listen import _Screen
from radloop.dicom.listener.status import Tally
from radloop.dicom.tls import server_context
from radloop.errors import SettingsError
from radloop.stages.project import open_catalog

from .conftest import NAME, Command, Ran, configure, write_dicom

TOKEN = "0123456789abcdef0123"
SENDERS = '[listen.senders]\nCT1 = "site-a"\n'
STOW = "[listen]\nport = 0\nmetrics_port = 0\n[listen.stow]\nport = 0\n[listen.stow.tokens.gateway]\n"
STOW += 'token = "env:GATEWAY_TOKEN"\nsite = "site-b"\n'


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path: Path, require_service: Callable[..., str]) -> Path:
    """A server's certificate for 127.0.0.1 and a client's, both signed by themselves, and somebody else's."""
    require_service("openssl", "openssl")
    for name in ("server", "client", "stranger"):
        subject = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")
        key = ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.crt")
        _openssl(tmp_path, "req", "-x509", "-days", "2", *key, *subject)
        (tmp_path / f"{name}.key").chmod(0o600)
    return tmp_path


def _tls(certificates: Path, *, mutual: bool) -> str:
    told = f'[listen.tls]\ncertificate = "{certificates}/server.crt"\nkey = "{certificates}/server.key"\n'
    return told + (f'client_ca = "{certificates}/client.crt"\n' if mutual else "")


def _storescu(storescu: str, port: int, file: Path, *tls: str) -> int:
    command = [storescu, *tls, "-aet", "CT1", "-aec", "RADLOOP", "127.0.0.1", str(port), str(file)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def test_c_store_over_mutual_tls(
    radloop: Command, project: Path, certificates: Path, tmp_path: Path, require_service: Callable[..., str]
) -> None:
    """If this failed, images would cross a hospital's network in the clear, or be taken from whoever knows an AE title."""
    storescu = str(
        Path(require_service("dcmtk", "dcmqrscp")).with_name("storescu")
    )  # pynetdicom has one of that name too
    configure(project, SENDERS + _tls(certificates, mutual=True))
    file = write_dicom(tmp_path / "one.dcm")
    ours = ("+tls", str(certificates / "client.key"), str(certificates / "client.crt"))
    other = ("+tls", str(certificates / "stranger.key"), str(certificates / "stranger.crt"))
    ca = ("+cf", str(certificates / "server.crt"))
    with radloop.running("listen", "--port", "0", ready=tmp_path / "ready") as (process, told):
        assert _storescu(storescu, told["port"], file) != 0, "in the clear"
        assert _storescu(storescu, told["port"], file, *other, *ca) != 0, "a certificate of nobody we know"
        assert _storescu(storescu, told["port"], file, *ours, *ca) == 0
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert ", mutual TLS;" in out, err
    assert "1 received, 1 new" in out
    with open_catalog(project) as catalog:
        assert len(catalog.unreleased()) == 1


def test_stow_over_tls_with_metrics(radloop: Command, project: Path, certificates: Path, tmp_path: Path) -> None:
    """If this failed, a gateway could not send by HTTPS, or nobody would see that a hospital has stopped sending."""
    configure(project, SENDERS + STOW + _tls(certificates, mutual=False))
    file = write_dicom(tmp_path / "one.dcm").read_bytes()
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + file + b"\r\n--b--"
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}
    trust = ssl.create_default_context(cafile=str(certificates / "server.crt"))
    with (
        pytest.MonkeyPatch.context() as environment,
        httpx.Client(verify=trust, trust_env=False) as client,
    ):
        environment.setenv("GATEWAY_TOKEN", TOKEN)
        with radloop.running("listen", "--port", "0", ready=tmp_path / "ready") as (process, told):
            url = f"https://127.0.0.1:{told['stow_port']}/studies"
            assert client.post(url, content=body, headers=headers).status_code == 401
            good = {**headers, "Authorization": f"Bearer {TOKEN}"}
            assert client.post(url, content=body, headers=good).status_code == 200
            metrics = client.get(f"http://127.0.0.1:{told['metrics_port']}/metrics").text
            client.close()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"STOW-RS at https://127.0.0.1:{told['stow_port']}/studies, known: gateway (site-b)" in out
    assert "ended; C-STORE: nothing; STOW-RS: 1 received, 1 new, 1 rejected" in out
    assert _value(metrics, 'radloop_received_instances_total{outcome="new",route="stow"}') == 1
    assert _value(metrics, 'radloop_received_instances_total{outcome="new",route="cstore"}') == 0
    assert _value(metrics, 'radloop_received_bytes_total{route="stow"}') == len(file)
    assert _value(metrics, 'radloop_receive_rejected_total{reason="token",route="stow"}') == 1
    assert _value(metrics, 'radloop_store_seconds_count{route="stow"}') == 1
    assert _value(metrics, 'radloop_studies_waiting{state="arriving"}') == 1
    assert _value(metrics, 'radloop_last_arrival_timestamp_seconds{route="stow"}') > 1.7e9
    assert _value(metrics, "radloop_landing_free_bytes") > 0
    for secret in (NAME, "MRN-77", TOKEN, "1.2.3.1"):
        assert secret not in metrics + out + err


def _value(metrics: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    assert found is not None, f"{name} is not in\n{metrics}"
    return float(found[1])


def test_tls_files_that_cannot_be_used_are_named(certificates: Path) -> None:
    """If this failed, an expired or mistyped file would show as a stack trace of OpenSSL, or a key lie open."""
    crt, key = certificates / "server.crt", certificates / "server.key"
    assert server_context(crt, key).verify_mode is ssl.CERT_NONE
    with pytest.raises(SettingsError, match=r"missing\n.*nothing\.crt"):
        server_context(certificates / "nothing.crt", key)
    with pytest.raises(SettingsError, match="key values mismatch"):
        server_context(crt, certificates / "client.key")
    with pytest.raises(SettingsError, match="certificate and key cannot be used"):
        server_context(key, key)
    with pytest.raises(SettingsError, match="authorities of clients cannot be used"):
        server_context(crt, key, key)
    _openssl(certificates, "rsa", "-in", "server.key", "-aes128", "-passout", "pass:abcd", "-out", "locked.key")
    (certificates / "locked.key").chmod(0o600)
    with pytest.raises(SettingsError, match="needs a password"):
        server_context(crt, certificates / "locked.key")
    key.chmod(0o644)
    with pytest.raises(SettingsError, match=r"can be read by others\n.*600\n.*644"):
        server_context(crt, key)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('[listen.tls]\ncertificate = "a.crt"\n', "TLS needs a certificate and its key"),
        ('[listen.tls]\ncertificate = "a.crt"\nkey = "a.key"\n', "a TLS file is missing"),
        ("[listen.stow]\nport = 0\n", "nobody may send to the STOW-RS receiver"),
        (STOW.replace("env:GATEWAY_TOKEN", "file:short.token"), "the token of gateway is too short"),
        (STOW.replace("env:GATEWAY_TOKEN", TOKEN), "a secret is no reference"),
        (STOW.replace("site-b", "Klinikum Nord"), "is no site code"),
    ],
)
def test_settings_that_cannot_work(inside: Callable[..., Ran], project: Path, toml: str, said: str) -> None:
    """If this failed, `radloop listen` would start without what was asked for, and look well."""
    (project / "short.token").touch(mode=0o600)
    (project / "short.token").write_text("abc")
    configure(project, SENDERS + toml)
    ran = inside("listen", "--port", "0")
    assert ran.code == 1
    assert said in ran.err
    assert TOKEN not in ran.err
    assert said in json.dumps(inside("doctor", "--json").json)


def test_the_screen(project: Path, tmp_path: Path) -> None:
    """If this failed, whoever stands before a modality that does not send would not see why."""
    tally = Tally()
    with landing_at(project) as landing, open_catalog(project) as catalog:
        screen = _Screen("radloop listen: here", {"cstore": tally.status}, catalog, project / "landing", 60.0)
        shown = dict(screen.rows())
        assert (shown["open"], shown["last error"]) == ("nobody is sending", "none")
        peer = tally.opened("CT1")
        outcome = landing.receive(write_dicom(tmp_path / "1.dcm"), site="site-a", sender="CT1")
        tally.stored(peer, outcome.kind, 520_000, 0.01)
        tally.rejected("calling AE")
        tally.failed("CT1", "no space left")
        screen._asked_at = float("-inf")
        shown = dict(screen.rows())
    assert re.fullmatch(r"CT1 since \d\d:\d\d:\d\d UTC, 1 images, 520\.0 kB", shown["open"])
    assert float(shown["rate"].split()[0].replace(",", "")) > 0
    assert shown["received"] == "1 received, 1 new"
    assert shown["refused"] == "1 calling AE"
    assert shown["studies"].startswith("1 arriving, the last complete in ")
    assert shown["last error"].endswith("CT1: no space left")


def test_the_screen_lives_on_a_terminal(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the living screen would end the listener with a stack trace."""
    import sys

    from rich.console import Console

    from radloop.cli import listen, output

    with open_catalog(project) as catalog, (project / "shown").open("w") as file:
        (project / "landing").mkdir()
        console = Console(file=file, force_terminal=True, width=100)
        monkeypatch.setattr(output, "console", lambda: console)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(listen, "_SHOW_EVERY_S", 0.02)
        stop = threading.Event()
        threading.Timer(0.2, stop.set).start()
        screen = _Screen("radloop listen: here", {"cstore": Tally().status}, catalog, project / "landing", 60.0)
        listen._watch(screen, stop, quiet=False)
    assert "nobody is sending" in (project / "shown").read_text()
