"""Alerts by e-mail.

An alert is counts, figures and the next command: no identifier, not even a pseudonym, and no tag value. Its id is a
digest of its content and stands in Message-ID, so that a retry after a lost answer can be told from a second alert.
Nothing is kept here: the caller writes the alert to the ledger before it is sent, and marks it sent after.
"""

from __future__ import annotations

import hashlib
import re
import smtplib
import ssl
from collections.abc import Callable, Mapping
from email.message import EmailMessage
from email.utils import formatdate
from typing import Literal

import msgspec

from radloop.errors import DataError, EngineError
from radloop.learning.statistics import Interval
from radloop.monitoring.drift import DRIFTED, DriftReport
from radloop.monitoring.performance import POOLED, Performance

_ADDRESS = re.compile(r"[^\s@<>,;\"]+@[^\s@<>,;\"]+")


class Mail(msgspec.Struct, frozen=True, kw_only=True):
    """How mail leaves: an SMTP server and who writes to whom.

    tls: "none", "starttls" (the connection is upgraded, and refused where it cannot be) or "tls" (from the first byte).
    ca_file: certificates to trust instead of the system's.
    """

    host: str
    port: int
    sender: str
    recipients: tuple[str, ...]
    tls: Literal["none", "starttls", "tls"] = "none"
    ca_file: str | None = None
    user: str | None = None
    password: str | None = None
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        wrong = [a for a in (self.sender, *self.recipients) if not _ADDRESS.fullmatch(a)]
        if wrong or not self.recipients:
            raise DataError(
                "alerts have no usable address",
                expected="sender and recipients as name@host",
                got=wrong or "no recipient",
            )
        if self.user is not None and self.tls == "none":
            raise DataError(
                "a mail password would cross the network in clear", expected="tls = starttls or tls", got="none"
            )

    def __repr__(self) -> str:
        return f"Mail({self.host}:{self.port}, {len(self.recipients)} recipients, tls={self.tls})"


class Alert(msgspec.Struct, frozen=True):
    """One thing to tell. `figures` in the order in which they are to be read."""

    kind: str
    subject: str
    figures: dict[str, str]
    next_command: str

    @property
    def id(self) -> str:
        """Digest of the content: the same finding is the same alert."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]


class Delivery(msgspec.Struct, frozen=True):
    """What became of an alert. `refused` counts recipients the server would not take while it took others."""

    alert_id: str
    sent: bool
    already: bool
    refused: int = 0


def drift_alert(report: DriftReport, *, project: str, model: str, next_command: str = "radloop report") -> Alert:
    """The alert of a drift report: which sites, how many features and patients, the largest effect."""
    figures = {
        "model": model,
        "verdict": report.verdict,
        "patients in the window": str(report.window_patients),
        "images in the window": str(report.window_images),
    }
    for one in report.scopes:
        if one.decides and one.verdict == DRIFTED:
            name = "all sites" if one.scope == POOLED else f"site {one.scope}"
            moved = [f"{f.feature} (effect {f.effect:.2f})" for f in one.features if f.drifted][:5]
            share = f"{one.share_drifted or 0:.0%} of {len(one.features)} features drifted"
            figures[name] = (
                f"{share}, {one.window_patients} patients against {one.reference_patients}: {', '.join(moved)}"
            )
    return Alert("drift", f"[radloop] {project}: drift, verdict {report.verdict}", figures, next_command)


def performance_alert(found: Performance, *, project: str, model: str, next_command: str = "radloop report") -> Alert:
    """The alert of a performance report."""
    figures = {"model": model, "verdict": found.verdict, "summary": found.summary}
    for one in found.scopes:
        name = "all sites" if one.scope == POOLED else f"site {one.scope}"
        figures[name] = f"AUC {_words(one.auc)}, {one.labelled} images labelled, {one.unlabelled} not"
    return Alert("performance", f"[radloop] {project}: performance, verdict {found.verdict}", figures, next_command)


def run_alert(pipeline: str, status: str, stage: str, why: str, *, project: str, run_id: str, engine: str) -> Alert:
    """The alert of a run that did not succeed. `why` is a gate's own words or an error's class, never an error's text."""
    figures = {"run": run_id, "engine": engine, "stage": stage, "why": why}
    return Alert("run", f"[radloop] {project}: {pipeline} {status}", figures, "radloop status")


def message(alert: Alert, mail: Mail) -> EmailMessage:
    """The e-mail as it is sent, plain text.

    Raises:
        DataError: a line break or control character in the subject.
    """
    if re.search(r"[\x00-\x1f\x7f]", alert.subject):
        raise DataError("an alert's subject would change the mail's headers", expected="one line of text")
    built = EmailMessage()
    built["Subject"] = alert.subject
    built["From"] = mail.sender
    built["To"] = ", ".join(mail.recipients)
    built["Date"] = formatdate()
    built["Message-ID"] = f"<{alert.id}@radloop.invalid>"
    built["Auto-Submitted"] = "auto-generated"  # RFC 3834: no holiday notices in answer
    lines = [f"{name}: {value}" for name, value in alert.figures.items()]
    built.set_content(
        "\n".join(
            [
                *lines,
                "",
                "Next:",
                f"  {alert.next_command}",
                "",
                f"alert {alert.id}",
                "radloop is not a medical device.",
                "",
            ]
        )
    )
    return built


def send(alert: Alert, mail: Mail, *, already_sent: Callable[[str], bool] = lambda alert_id: False) -> Delivery:
    """Send one alert, once.

    Args:
        alert: what to tell.
        mail: through which server.
        already_sent: asked with the alert's id; True and nothing is sent.

    Raises:
        EngineError: the server cannot be reached or refuses. Nothing was sent; call again later with the same alert.
        DataError: a subject that is no single line.
    """
    if already_sent(alert.id):
        return Delivery(alert.id, sent=False, already=True)
    built = message(alert, mail)
    try:
        refused = _deliver(built, mail)
    except (OSError, smtplib.SMTPException) as error:
        raise EngineError(
            "an alert could not be sent",
            expected=f"an SMTP server at {mail.host}:{mail.port} (tls {mail.tls}) that takes mail from {mail.sender}",
            got=_reason(error),
            next_step="start the server, or name another in radloop.toml, [alerts]; then `radloop run watch` sends it",
        ) from error
    return Delivery(alert.id, sent=True, already=False, refused=len(refused))


def _deliver(built: EmailMessage, mail: Mail) -> Mapping[str, object]:
    trust = ssl.create_default_context(cafile=mail.ca_file) if mail.tls != "none" else None
    server: smtplib.SMTP
    if mail.tls == "tls":
        server = smtplib.SMTP_SSL(mail.host, mail.port, timeout=mail.timeout_s, context=trust)
    else:
        server = smtplib.SMTP(mail.host, mail.port, timeout=mail.timeout_s)
    with server:
        if mail.tls == "starttls":
            server.starttls(context=trust)
        if mail.user is not None:
            server.login(mail.user, mail.password or "")
        return server.send_message(built)


def _reason(error: Exception) -> str:
    """The server's words without addresses: SMTPRecipientsRefused would list them all."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = sorted({str(answer[0]) for answer in error.recipients.values()})
        return f"all {len(error.recipients)} recipients refused ({', '.join(codes)})"
    return f"{type(error).__name__}: {error}"


def _words(figure: Interval | None) -> str:
    return (
        "insufficient evidence" if figure is None else f"{figure.value:.3f} ({figure.lower:.3f} to {figure.upper:.3f})"
    )
