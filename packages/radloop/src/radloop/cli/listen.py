"""What `radloop listen` does: C-STORE, STOW-RS and metrics in one process, and what it shows meanwhile."""

from __future__ import annotations

import shutil
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radloop import logs
from radloop.cli import output
from radloop.errors import SettingsError

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.dicom.landing import Landing
    from radloop.dicom.listener import Listener
    from radloop.dicom.listener.status import Status
    from radloop.dicom.stow import Sender, Stow
    from radloop.settings import Settings

_DRAIN_S = 30.0
_SHOW_EVERY_S = 0.5
_TELL_EVERY_S, _TELL_AGAIN_S = 2.0, 60.0
_ASK_EVERY_S = 2.0
_RATE_OVER_S = 5.0
Sources = Mapping[str, "Callable[[], Status]"]


def listen_until_stopped(
    project: Path, settings: Settings, *, port: int | None, ready_file: Path | None, json: bool
) -> None:
    """Receive until a signal says stop.

    Raises:
        SettingsError: no sender is configured, or TLS or a token is not as it must be.
        EngineError: a port is busy.
    """
    from radloop.catalog.audit import record
    from radloop.cli.common import actor
    from radloop.cli.foreground import announced, ending_with
    from radloop.cli.intake import landing_at

    if not settings.listen.senders:
        raise SettingsError(
            "nobody may send to this listener",
            expected="the calling AE titles of your modalities or PACS, each with a site code",
            got="an empty [listen.senders]",
            next_step='add a line such as CT1 = "site-a" under [listen.senders] in radloop.toml',
        )
    stop, who = threading.Event(), actor()
    tls = tls_of(project, settings)
    with landing_at(project) as landing, ending_with(stop.set), ExitStack() as stack:
        catalog = landing.catalog
        listener = _listener(landing, settings, port, tls)
        bound = listener.start()
        record(catalog.ledger, "listen start", "listen", actor=who, detail={"port": bound})
        stack.callback(_tell, project, settings, catalog)
        stack.callback(record, catalog.ledger, "listen stop", "listen", actor=who)
        stack.callback(landing.seal, actor="listen")
        stack.callback(listener.stop, grace_s=_DRAIN_S)
        sources: dict[str, Callable[[], Status]] = {"cstore": listener.status}
        stow = _stow(project, landing, settings, tls)
        if stow is not None:
            stack.enter_context(stow)
            sources["stow"] = stow.status
        metrics = _metrics(project, catalog, settings, sources, stack)
        where = _where(settings, bound, stow, metrics, tls)
        more = {
            name: number for name, number in (("stow_port", stow and stow.port), ("metrics_port", metrics)) if number
        }
        if settings.audit.syslog:
            sender = threading.Thread(target=_keep_telling, args=(project, settings, catalog, stop), daemon=True)
            sender.start()
            stack.callback(sender.join)
        with announced(ready_file, settings.listen.host, bound, more):
            output.tell(where, stderr=json)
            _watch(_Screen(where, sources, catalog, project / "landing", settings.ingest.quiet_s), stop, quiet=json)
    counts = {route: ask().counts for route, ask in sources.items()}
    if json:
        told = {"ended": True, "host": settings.listen.host, "port": bound, "counts": counts["cstore"]}
        output.print_json({**told, **({"stow": counts["stow"]} if stow else {})})
    else:
        output.tell(f"radloop listen: ended; {'; '.join(_say_counts(counts))}")


def _tell(project: Path, settings: Settings, catalog: Catalog) -> str:
    """Send audit messages that wait; why not, if not."""
    from radloop.cli.audit import send_now

    return send_now(project, settings, catalog)[1]


def _keep_telling(project: Path, settings: Settings, catalog: Catalog, stop: threading.Event) -> None:
    """Send audit messages as they come; a sink that is down is tried again, and said once."""
    said, pause_s = "", _TELL_EVERY_S
    while not stop.wait(pause_s):
        why = _tell(project, settings, catalog)
        if why and why != said:
            output.say(f"audit: {settings.audit.syslog} cannot be told ({why}); messages wait in the ledger")
        said, pause_s = why, min(pause_s * 2, _TELL_AGAIN_S) if why else _TELL_EVERY_S


def tls_of(project: Path, settings: Settings) -> ssl.SSLContext | None:
    """The TLS context of [listen.tls]; None where it is not used. Raises SettingsError."""
    from radloop.dicom.tls import server_context

    told = settings.listen.tls
    if not (told.certificate or told.key or told.client_ca):
        return None
    if not (told.certificate and told.key):
        raise SettingsError(
            "TLS needs a certificate and its key",
            expected="certificate and key under [listen.tls]",
            next_step="openssl req -x509 -newkey rsa:3072 -nodes -days 365 -keyout listen-tls.key -out listen.crt",
        )
    ca = project / told.client_ca if told.client_ca else None
    return server_context(project / told.certificate, project / told.key, ca)


def stow_senders(project: Path, settings: Settings) -> dict[str, Sender]:
    """Who may send by STOW-RS. Raises SettingsError: a token's secret is missing, or can be guessed."""
    from radloop.cli.common import check_code
    from radloop.dicom.stow import Sender
    from radloop.settings import secret

    found = {}
    for name, told in settings.listen.stow.tokens.items():
        check_code(name, f"[listen.stow.tokens] {name}")
        check_code(told.site, f"the site of [listen.stow.tokens.{name}]")
        token = secret(told.token, project)
        if len(token) < 16:
            raise SettingsError(
                f"the token of {name} is too short",
                expected="at least 16 random characters",
                got=f"{len(token)}",
                next_step="openssl rand -hex 32",
            )
        found[name] = Sender(token, told.site)
    return found


def _listener(landing: Landing, settings: Settings, port: int | None, tls: ssl.SSLContext | None) -> Listener:
    from radloop.dicom.listener import Listener

    told = settings.listen
    return Listener(
        landing,
        ae_title=told.ae_title,
        sites=told.senders,
        host=told.host,
        port=told.port if port is None else port,
        max_associations=told.max_associations,
        tls=tls,
    )


def _stow(project: Path, landing: Landing, settings: Settings, tls: ssl.SSLContext | None) -> Stow | None:
    from radloop.dicom.stow import Stow

    told = settings.listen
    if told.stow.port is None:
        return None
    senders = stow_senders(project, settings)
    return Stow(
        landing, senders=senders, host=told.host, port=told.stow.port, tls=tls, max_requests=told.max_associations
    )


def _metrics(project: Path, catalog: Catalog, settings: Settings, sources: Sources, stack: ExitStack) -> int | None:
    if settings.listen.metrics_port is None:
        return None
    from radloop.dicom.metrics import Metrics

    told, quiet_s = settings.listen, settings.ingest.quiet_s
    served = Metrics(
        sources, catalog, project / "landing", quiet_s=quiet_s, host=told.host, port=settings.listen.metrics_port
    )
    stack.enter_context(served)
    return served.port


def _where(settings: Settings, port: int, stow: Stow | None, metrics: int | None, tls: ssl.SSLContext | None) -> str:
    told = settings.listen
    known = ", ".join(f"{title} ({site})" for title, site in told.senders.items())
    also = []
    if stow is not None:
        names = ", ".join(f"{name} ({token.site})" for name, token in told.stow.tokens.items())
        also.append(f"STOW-RS at {'https' if tls else 'http'}://{told.host}:{stow.port}/studies, known: {names}")
    if metrics is not None:
        also.append(f"metrics at http://{told.host}:{metrics}/metrics")
    secure = "" if tls is None else ", mutual TLS" if tls.verify_mode == ssl.CERT_REQUIRED else ", TLS"
    lines = [f"radloop listen: {told.ae_title} at {told.host}:{port}{secure}; known senders: {known}; Ctrl-C ends it"]
    return "\n".join([*lines, *(f"  {line}" for line in also)])


def _say_counts(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One text a route; the route is named where there are several."""
    names = {"cstore": "C-STORE", "stow": "STOW-RS"}
    several = len(counts) > 1
    return [(f"{names[route]}: " if several else "") + output.counts_line(dict(told)) for route, told in counts.items()]


class _Screen:
    """What the terminal shows, made anew twice a second."""

    def __init__(self, where: str, sources: Sources, catalog: Catalog, landing: Path, quiet_s: float) -> None:
        self.sources = sources
        self._where, self._catalog, self._landing, self._quiet_s = where, catalog, landing, quiet_s
        self._seen: list[tuple[float, int, int]] = []
        self._asked_at, self._studies = float("-inf"), ""

    def rows(self) -> list[tuple[str, str]]:
        """Name and text of each line."""
        told = {route: ask() for route, ask in self.sources.items()}
        open_ones = [one for status in told.values() for one in status.associations]
        refused: dict[str, int] = {}
        for status in told.values():
            for reason, number in status.rejected.items():
                refused[reason] = refused.get(reason, 0) + number
        errors = [status.last_error for status in told.values() if status.last_error is not None]
        last = max(errors, key=lambda error: error.at, default=None)
        received = _say_counts({route: _without_rejected(status.counts) for route, status in told.items()})
        return [
            ("open", "; ".join(_say_open(one) for one in open_ones) or "nobody is sending"),
            ("rate", self._rate(list(told.values()))),
            ("received", "; ".join(received)),
            ("refused", output.counts_line(refused)),
            ("studies", self._ask_studies()),
            ("disk", f"{_size(shutil.disk_usage(self._landing).free)} free"),
            ("last error", f"{last.at[11:19]} {last.calling_ae}: {last.what}" if last else "none"),
        ]

    def render(self) -> Any:
        """The screen for rich."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, said in self.rows():
            table.add_row(
                Text(name, style="bold"), Text(said, style="red" if name == "last error" and said != "none" else "")
            )
        return Group(Text(self._where), table)

    def _rate(self, told: list[Status]) -> str:
        now = time.monotonic()
        self._seen.append((now, sum(s.instances for s in told), sum(s.bytes for s in told)))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _RATE_OVER_S:
            self._seen.pop(0)
        (since, instances, size), (_, now_instances, now_size) = self._seen[0], self._seen[-1]
        seconds = max(now - since, 1e-9)
        return f"{(now_instances - instances) / seconds:,.1f} images/s, {(now_size - size) / seconds / 1e6:,.1f} MB/s"

    def _ask_studies(self) -> str:
        from radloop.catalog.studies import complete, seconds_left

        if time.monotonic() - self._asked_at >= _ASK_EVERY_S:
            found = self._catalog.unreleased()
            done = complete(found, self._quiet_s)
            arriving = [study for study in found if study not in done]
            left = seconds_left(arriving, self._quiet_s)
            some = f"{len(arriving)} arriving" + (f", the last complete in {left:.0f} s" if arriving else "")
            self._studies = f"{some}; {len(done)} complete, waiting for `radloop run prepare`"
            self._asked_at = time.monotonic()
        return self._studies


def _without_rejected(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if name != "rejected"}


def _say_open(one: Any) -> str:
    return f"{one.calling_ae} since {one.since[11:19]} UTC, {one.instances:,} images, {_size(one.bytes)}"


def _size(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _watch(screen: _Screen, stop: threading.Event, *, quiet: bool) -> None:
    """A living screen on a terminal, else a line whenever the counts have changed for a while."""
    if quiet:
        stop.wait()
        return
    if sys.stdout.isatty() and not logs.wanted():
        from rich.live import Live

        with Live(screen.render(), console=output.console(), auto_refresh=False, screen=False) as live:
            while not stop.wait(_SHOW_EVERY_S):
                live.update(screen.render(), refresh=True)
        return
    said = before = _say_counts(_counts(screen))
    while not stop.wait(1.0):
        now = _say_counts(_counts(screen))
        if now == before and now != said:  # a lull after something came
            output.tell("; ".join(now))
            said = now
        before = now


def _counts(screen: _Screen) -> dict[str, dict[str, int]]:
    return {route: ask().counts for route, ask in screen.sources.items()}
