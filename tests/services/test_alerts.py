"""Alerts through a real SMTP server on loopback."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP

from radloop.errors import DataError, EngineError
from radloop.monitoring import alerts, drift, performance
from radloop.monitoring.alerts import Alert, Mail

ALERT = Alert(
    "drift", "[radloop] chest: drift, verdict drifted", {"patients": "40", "site B": "9 of 14"}, "radloop report"
)


class Box:
    """Keeps what arrives; refuses recipients that start with 'no'."""

    def __init__(self) -> None:
        self.mails: list[Message] = []
        self.secured: list[bool] = []

    async def handle_RCPT(self, server: SMTP, session: Any, envelope: Any, address: str, options: Any) -> str:  # noqa: N802
        """Answer RCPT TO."""
        if address.startswith("no"):
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Any) -> str:  # noqa: N802
        """Keep the mail."""
        self.mails.append(message_from_bytes(envelope.content))
        self.secured.append(session.ssl is not None)
        return "250 OK"


class Listening(Controller):
    """A controller on a port of the system's choice."""

    def __init__(self, box: Box, **options: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        super().__init__(box, hostname="127.0.0.1", port=port, **options)


@pytest.fixture
def box() -> Box:
    """Where mail arrives."""
    return Box()


@pytest.fixture
def server(box: Box) -> Iterator[Listening]:
    """A running server without TLS."""
    controller = Listening(box)
    controller.start()
    yield controller
    controller.stop()


def mail(server: Controller, **changes: Any) -> Mail:
    """Settings for the server."""
    base = {"host": "127.0.0.1", "port": server.port, "sender": "radloop@example.org", "recipients": ("a@example.org",)}
    return Mail(**{**base, **changes})


def test_an_alert_arrives_with_figures_and_the_next_command(server: Listening, box: Box) -> None:
    """A mail that says 'drift' and not what to do is ignored."""
    done = alerts.send(ALERT, mail(server, recipients=("a@example.org", "b@example.org")))
    assert (done.sent, done.already, done.refused) == (True, False, 0)
    (got,) = box.mails
    text = got.get_payload()
    assert got["Subject"] == ALERT.subject
    assert got["Message-ID"] == f"<{ALERT.id}@radloop.invalid>"
    assert got["Auto-Submitted"] == "auto-generated"
    for wanted in ("patients: 40", "site B: 9 of 14", "radloop report", "not a medical device"):
        assert wanted in str(text)


def test_the_same_alert_is_sent_once(server: Listening, box: Box) -> None:
    """A resumed run must not send last night's alert again."""
    sent: set[str] = set()
    for _ in range(3):
        done = alerts.send(ALERT, mail(server), already_sent=sent.__contains__)
        sent.add(done.alert_id)
    assert len(box.mails) == 1
    assert done.already
    assert Alert("drift", ALERT.subject, {"patients": "41"}, "x").id != ALERT.id


def test_a_dead_server_says_so_and_the_retry_delivers(box: Box) -> None:
    """An alert lost because the mail server was down for a minute is a drift nobody hears of."""
    controller = Listening(box)
    settings = mail(controller)
    with pytest.raises(EngineError, match=r"could not be sent(.|\n)*127\.0\.0\.1(.|\n)*radloop run watch"):
        alerts.send(ALERT, settings)
    controller.start()
    try:
        assert alerts.send(ALERT, settings).sent
    finally:
        controller.stop()
    assert len(box.mails) == 1


def test_a_silent_server_is_given_up_after_the_timeout() -> None:
    """A firewall that swallows packets must not hang the nightly run."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        settings = Mail(
            host="127.0.0.1",
            port=silent.getsockname()[1],
            sender="r@example.org",
            recipients=("a@example.org",),
            timeout_s=0.3,
        )
        with pytest.raises(EngineError, match=r"timed out|Timeout|unexpectedly"):
            alerts.send(ALERT, settings)


def test_refused_recipients_are_counted_and_all_refused_is_an_error(server: Listening, box: Box) -> None:
    """One colleague who left must not keep the alert from the others; and addresses stay out of the error."""
    assert alerts.send(ALERT, mail(server, recipients=("a@example.org", "nobody@example.org"))).refused == 1
    with pytest.raises(EngineError, match="all 1 recipients refused") as caught:
        alerts.send(ALERT, mail(server, recipients=("nobody@example.org",)))
    assert "nobody" not in str(caught.value)
    assert len(box.mails) == 1


def test_starttls_is_used_when_asked_and_refused_where_absent(box: Box, server: Listening, tmp_path: Path) -> None:
    """Falling back to clear text silently would publish the hospital's figures."""
    with pytest.raises(EngineError, match="STARTTLS"):
        alerts.send(ALERT, mail(server, tls="starttls"))
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    controller = Listening(box, tls_context=context, require_starttls=True)
    controller.start()
    try:
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"):
            alerts.send(ALERT, mail(controller, tls="starttls"))
        assert alerts.send(ALERT, mail(controller, tls="starttls", ca_file=str(certificate))).sent
    finally:
        controller.stop()
    assert box.secured == [True]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate, key = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, key


def test_a_mail_from_a_drift_report_names_features_and_counts_but_no_patient(server: Listening, box: Box) -> None:
    """Mail leaves the hospital: a pseudonym, a UID or a tag value must not leave with it."""
    rng = np.random.default_rng(0)

    def rows(n: int, site: str, shift: float) -> list[dict[str, Any]]:
        return [
            {
                "patient": f"PCANARY{site}{k}", "sop_uid": f"2.25.77{site}{k}", "site": site,
                "probability": rng.random(),
                "f_mean": rng.normal() + shift, "tags": {"manufacturer": "CANARYMAKER" if shift else "GE"},
            }
            for k in range(n)
        ]  # fmt: skip

    report = drift.compare(drift.population(rows(60, "A", 0)), drift.population(rows(40, "B", 3.0)))
    found = performance.assess(rows(30, "B", 0), {f"2.25.77B{k}": k % 2 for k in range(30)}, threshold=0.5)
    for alert in (
        alerts.drift_alert(report, project="chest", model="3", next_command="radloop labels import FILE"),
        alerts.performance_alert(found, project="chest", model="3"),
    ):
        alerts.send(alert, mail(server))
    first, second = (m.as_string() for m in box.mails)
    assert "CANARY" not in first + second
    assert "2.25.77" not in first + second
    assert "f_mean (effect" in first
    assert "40 patients against 60" in first
    assert "radloop labels import FILE" in first
    assert "30 images labelled" in second


def test_headers_cannot_be_injected_and_addresses_are_checked(server: Listening, box: Box) -> None:
    """A project name with a line break could add a recipient."""
    with pytest.raises(DataError, match="headers"):
        alerts.send(Alert("x", "hello\nBcc: evil@example.org", {}, "y"), mail(server))
    with pytest.raises(DataError, match="no usable address"):
        mail(server, recipients=("a@example.org, b@example.org",))
    with pytest.raises(DataError, match="no usable address"):
        mail(server, recipients=())
    with pytest.raises(DataError, match="in clear"):
        mail(server, user="u", password="p")
    assert "p" * 8 not in repr(mail(server, user="u", password="p" * 8, tls="tls"))
    assert box.mails == []
