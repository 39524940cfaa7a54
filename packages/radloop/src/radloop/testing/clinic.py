"""What stands around a hospital's imaging: a router that asks for predictions, and a mail server."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BETWEEN_STUDIES_S = 0.02
"""A busy hospital; as fast as it goes would measure this machine's cores, not the models."""


class Clinic:
    """Asks the gateway about the hospital's studies, as a DICOM router beside the PACS would.

    Args:
        url: of the gateway.
        studies: DICOM files with the site code of each, in the order of asking.

    Attributes:
        answered, failed: requests so far.
    """

    def __init__(self, url: str, studies: list[tuple[Path, str]]) -> None:
        self.url, self.studies = url, studies
        self.answered = self.failed = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Clinic:
        import httpx

        self._client = httpx.Client(timeout=30.0)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._client.close()

    def ask(self, path: Path, site: str) -> None:
        """One study."""
        from radloop.errors import ServingError
        from radloop.serving.client import predict_dicom

        try:
            predict_dicom(self.url, path.read_bytes(), site=site, client=self._client)
            self.answered += 1
        except ServingError:
            self.failed += 1

    def ask_all(self, progress: Callable[[int, int], None]) -> None:
        """Every study once."""
        for number, (path, site) in enumerate(self.studies, 1):
            self.ask(path, site)
            progress(number, len(self.studies))

    def keep_asking(self) -> None:
        """Every study again and again, in a thread, until the clinic closes."""

        def ask() -> None:
            for path, site in itertools.cycle(self.studies):
                if self._stop.wait(BETWEEN_STUDIES_S):
                    return
                self.ask(path, site)

        self._thread = threading.Thread(target=ask, name="clinic", daemon=True)
        self._thread.start()


class Sink:
    """Keeps the mails that a local SMTP server was given."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.messages: list[dict[str, str]] = []
        self.port = 0
        self._show = show

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        """Called by aiosmtpd for each mail."""
        import email
        import email.policy

        mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
        self.messages.append({"subject": str(mail["Subject"]), "to": str(mail["To"])})
        self._show(f"mail to {mail['To']}: {mail['Subject']}")
        return "250 OK"


@contextmanager
def mail_sink(show: Callable[[str], None]) -> Iterator[Sink]:
    """A local SMTP server that shows what it is given, a line a mail."""
    from aiosmtpd.controller import Controller

    sink = Sink(show)
    with socket.socket() as probe:  # aiosmtpd looks whether its port answers, so it cannot be 0
        probe.bind(("127.0.0.1", 0))
        sink.port = probe.getsockname()[1]
    controller = Controller(sink, hostname="127.0.0.1", port=sink.port)
    controller.start()
    try:
        yield sink
    finally:
        controller.stop()
