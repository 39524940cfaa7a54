"""A PACS by DICOMweb: QIDO-RS, WADO-RS and STOW-RS (PS3.18 section 10).

By httpx, which is here already and streams both ways; dicomweb-client reads a whole answer into memory before it splits it.
"""

from __future__ import annotations

import logging
import secrets
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
from pydicom.datadict import keyword_for_tag

from radloop.dicom.multipart import Multipart, MultipartError, boundary_of
from radloop.dicom.pacs import Fetched, InstanceFound, Pacs, Sent, SeriesFound, Sink
from radloop.dicom.pacs.pace import Patience
from radloop.dicom.pacs.search import STUDY_KEYS, Answer, number
from radloop.errors import PacsError, PacsUnavailable

# PHI: both write each request's address to their log, and with it what is searched for.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_PAGE = 200
_MAX_INSTANCE_BYTES = 4 << 30
_CHUNK = 1 << 20
_SEND_FILES, _SEND_BYTES = 100, 64 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_WADO = 'multipart/related; type="application/dicom"'
_QIDO = {"Accept": "application/dicom+json"}


class DicomWeb(Pacs):
    """A PACS that speaks DICOMweb.

    Args:
        name: see `Pacs`; as are `patience` and `cut_at`.
        url: where its services begin, such as `https://pacs.example/dicom-web`.
        token: a bearer token, or
        user, password: of HTTP Basic authentication.
        timeout_s: longest wait for a connection, and for each next piece of an answer.
        tls: see `radloop.dicom.pacs.tls`.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        token: str = "",
        user: str = "",
        password: str = "",
        timeout_s: float = 60.0,
        tls: ssl.SSLContext | None = None,
        patience: Patience | None = None,
        cut_at: int = 0,
    ) -> None:
        super().__init__(name, patience=patience, cut_at=cut_at)
        self.url = url.rstrip("/")
        self._client: httpx.Client | None = None
        self._make: Callable[[], httpx.Client] = lambda: httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            auth=httpx.BasicAuth(user, password) if user else None,
            timeout=timeout_s,
            verify=tls if tls is not None else True,
            # A proxy named in the environment must not see what leaves a hospital's PACS.
            trust_env=False,
        )

    def echo(self) -> None:
        """A search for one study: DICOMweb has no echo."""
        self._json("/studies", {"limit": "1"})

    # QIDO-RS

    def search(self, keys: dict[str, str]) -> tuple[list[Answer], bool]:
        """Search studies (PS3.18 section 10.6), page by page."""
        return list(self._pages("/studies", keys, STUDY_KEYS)), True

    def series(self, study_uid: str) -> list[SeriesFound]:
        """Search the series of a study."""
        wanted = ("SeriesInstanceUID", "Modality", "SeriesDescription", "NumberOfSeriesRelatedInstances")
        return [
            SeriesFound(
                series_uid=_text(answer, "SeriesInstanceUID"),
                modality=_text(answer, "Modality"),
                description=_text(answer, "SeriesDescription"),
                instances=number(answer, "NumberOfSeriesRelatedInstances"),
            )
            for answer in self._pages(f"/studies/{study_uid}/series", {}, wanted)
        ]

    def instances(self, study_uid: str, series_uid: str | None = None) -> list[InstanceFound]:
        """Search the instances of a study, or of a series."""
        where = f"/studies/{study_uid}" + (f"/series/{series_uid}" if series_uid else "") + "/instances"
        wanted = ("SOPInstanceUID", "SeriesInstanceUID", "SOPClassUID")
        found = {}
        for answer in self._pages(where, {}, wanted):
            uid = _text(answer, "SOPInstanceUID")
            series = _text(answer, "SeriesInstanceUID") or series_uid or ""
            found[uid] = InstanceFound(sop_uid=uid, series_uid=series, sop_class_uid=_text(answer, "SOPClassUID"))
        found.pop("", None)
        return list(found.values())

    def _pages(self, where: str, keys: Mapping[str, str], wanted: Sequence[str]) -> Iterator[Answer]:
        """All pages of a search. A page may be shorter than asked for (a PACS has a limit of its own): the last is empty."""
        seen: set[tuple[tuple[str, ...], ...]] = set()
        offset = 0
        while True:
            include = [("includefield", keyword) for keyword in wanted if keyword not in keys]
            page = self._json(where, [*keys.items(), *include, ("limit", str(_PAGE)), ("offset", str(offset))])
            answers = [_answer(one) for one in page]
            uids = [
                tuple(a.get(k, ()) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
                for a in answers
            ]
            fresh = [answer for answer, uid in zip(answers, uids, strict=True) if uid not in seen]
            if not fresh:  # the end, or a server that knows no offset
                return
            seen |= set(uids)
            yield from fresh
            offset += len(page)

    def _json(self, where: str, parameters: Any) -> list[dict[str, Any]]:
        with self._answer("GET", where, params=parameters, headers=_QIDO) as response:
            if response.status_code == 204:
                return []
            try:
                return msgspec.json.decode(response.read() or b"[]", type=list[dict[str, Any]])
            except msgspec.MsgspecError:
                raise PacsError(
                    f"{self.name} answers a search with something else",
                    expected="application/dicom+json",
                    got=response.headers.get("content-type", "no Content-Type"),
                    next_step="check the url of this PACS: it ends where /studies begins",
                ) from None

    # WADO-RS

    def fetch(
        self,
        study_uid: str,
        sink: Sink,
        *,
        series_uid: str | None = None,
        instances: Sequence[InstanceFound] | None = None,
        attempt: int = 0,
    ) -> Fetched:
        """Retrieve (PS3.18 section 10.4), as stored: no transfer syntax is excluded.

        A third attempt leaves the choice of a transfer syntax to the PACS: some know no `*`.
        """
        study = f"/studies/{study_uid}"
        if instances is None:
            where = [study + (f"/series/{series_uid}" if series_uid else "")]
        else:
            where = [f"{study}/series/{one.series_uid}/instances/{one.sop_uid}" for one in instances]
        received = failed = 0
        for one in where:
            try:
                received += self._parts(one, sink, any_syntax=attempt < 2)
            except _NotThere:
                failed += 1
        return Fetched(received=received, failed=failed, way="WADO-RS")

    def _parts(self, where: str, sink: Sink, *, any_syntax: bool) -> int:
        received = 0
        headers = {"Accept": _WADO + ("; transfer-syntax=*" if any_syntax else ""), "Accept-Encoding": "identity"}
        with self._answer("GET", where, headers=headers, allow=(406,) if any_syntax else ()) as response:
            if response.status_code == 406:
                return self._parts(where, sink, any_syntax=False)
            kind = response.headers.get("content-type", "")
            try:
                parser = Multipart(boundary_of(kind), max_part_bytes=_MAX_INSTANCE_BYTES)
                for chunk in response.iter_bytes(_CHUNK):
                    for part in parser.feed(chunk):
                        sink(part.body)
                        received += 1
                parser.end()
            except MultipartError as error:
                if received or "multipart" in kind:
                    raise PacsUnavailable(f"{self.name} broke off an answer", got=str(error)) from None
                raise PacsError(
                    f"{self.name} answers a retrieval with something else",
                    expected="multipart/related of application/dicom",
                    got=kind.partition(";")[0] or "no Content-Type",
                ) from None
        return received

    # STOW-RS

    def send(self, files: Iterable[Path]) -> list[Sent]:
        """Store (PS3.18 section 10.5), some files in one request; each file's own failure is in the answer."""
        sent: list[Sent] = []
        for batch in _batches(files):
            sent += self._stow(batch)
        return sent

    def _stow(self, files: Sequence[Path]) -> list[Sent]:
        from pydicom import dcmread

        boundary = secrets.token_hex(16)
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        uids = [
            str(dcmread(path, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID)
            for path in files
        ]
        content, length = _stowed(files, boundary)
        headers["Content-Length"] = str(length)
        with self._answer("POST", "/studies", content=content, headers=headers, allow=(409,)) as response:
            try:
                answer = msgspec.json.decode(response.read() or b"{}", type=dict[str, Any] | list[dict[str, Any]])
            except msgspec.MsgspecError:
                raise PacsError(
                    f"{self.name} answers a STOW-RS with something else", got=response.status_code
                ) from None
        told = answer[0] if isinstance(answer, list) and answer else answer if isinstance(answer, dict) else {}
        stored = dict.fromkeys(_referenced(told, "00081199"), 0)
        failed = _referenced(told, "00081198")
        return [
            Sent(path=path, status=failed.get(uid, stored.get(uid, 0x0110)))
            for path, uid in zip(files, uids, strict=True)
        ]

    # HTTP

    @contextmanager
    def _answer(self, method: str, where: str, *, allow: tuple[int, ...] = (), **more: Any) -> Iterator[httpx.Response]:
        """A response whose status is a success; its body is read by the caller.

        Raises:
            PacsUnavailable: no connection, a time-out, a connection that broke, or a status that asks to come back.
            PacsError: every other status.
        """
        if self._client is None:
            self._client = self._make()
        try:
            with self._client.stream(method, self.url + where, **more) as response:
                if not response.is_success and response.status_code not in allow:
                    raise self._refused(response)
                yield response
        except httpx.HTTPError as error:  # its message may hold the address, and so what was searched for
            if (why := _tls_error(error)) is not None:
                raise PacsError(
                    f"TLS with {self.name} fails",
                    expected=f"a certificate that we trust, at {self.url}, and ours if it asks for one",
                    got=why,
                    next_step="check ca, certificate and key of this PACS in radloop.toml",
                ) from None
            raise PacsUnavailable(
                f"{self.name} cannot be reached or broke off",
                expected=f"DICOMweb at {self.url}",
                got=type(error).__name__,
                next_step=f"check url and firewall; radloop pacs echo {self.name}",
            ) from None
        except httpx.InvalidURL:
            raise PacsError(f"the url of {self.name} is none", next_step="correct it in radloop.toml") from None

    def _refused(self, response: httpx.Response) -> PacsError:
        status = response.status_code
        if status in _BUSY:
            after = _retry_after_s(response.headers.get("retry-after", ""))
            return PacsUnavailable(f"{self.name} is busy or failing", got=f"HTTP {status}", retry_after_s=after)
        if status == 404:
            return _NotThere(
                f"{self.name} has no such resource",
                got="HTTP 404",
                next_step="check the url of this PACS: it ends where /studies begins",
            )
        wrong_key = status in (401, 403)
        return PacsError(
            f"{self.name} refuses us",
            expected="HTTP 200",
            got=f"HTTP {status}",
            next_step="check token, or user and password, of this PACS in radloop.toml" if wrong_key else None,
        )

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None


def _tls_error(error: BaseException | None) -> str | None:
    """What TLS says of a certificate; None where something else went wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return (error.reason or type(error).__name__).lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return None


class _NotThere(PacsError):
    """HTTP 404."""


def _answer(item: Mapping[str, Any]) -> Answer:
    """One object of the DICOM JSON model (PS3.18 Annex F) as text by keyword."""
    found = {}
    for tag, element in item.items():
        keyword = keyword_for_tag(int(tag, 16)) if len(tag) == 8 else ""
        values = element.get("Value") if isinstance(element, dict) else None
        if keyword and isinstance(values, list):
            told = tuple(text for value in values if (text := _plain(value)))
            if told:
                found[keyword] = told
    return found


def _plain(value: object) -> str:
    if isinstance(value, dict):  # a person's name, by component group
        groups = [str(value.get(name, "")) for name in ("Alphabetic", "Ideographic", "Phonetic")]
        return "=".join(groups).rstrip("=")
    return "" if value is None else str(value).strip()


def _text(answer: Answer, keyword: str) -> str:
    return "\\".join(answer.get(keyword, ()))


def _batches(files: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in files:
        batch.append(path)
        size += path.stat().st_size
        if len(batch) >= _SEND_FILES or size >= _SEND_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stowed(files: Sequence[Path], boundary: str) -> tuple[Iterator[bytes], int]:
    """A multipart/related body of files as they lie there, and its length: not every server takes a chunked one."""
    sizes = [path.stat().st_size for path in files]
    heads = [
        f"--{boundary}\r\nContent-Type: application/dicom\r\nContent-Length: {size}\r\n\r\n".encode() for size in sizes
    ]
    end = f"--{boundary}--\r\n".encode()

    def body() -> Iterator[bytes]:
        for path, head in zip(files, heads, strict=True):
            yield head
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
            yield b"\r\n"
        yield end

    return body(), sum(sizes) + sum(len(head) + 2 for head in heads) + len(end)


def _referenced(answer: Mapping[str, Any], tag: str) -> dict[str, int]:
    """SOPInstanceUID -> FailureReason (0 where there is none) of a sequence in a STOW-RS answer (PS3.18 table I.2-1)."""
    items = answer.get(tag, {}).get("Value") or []

    def first(item: Any, key: str) -> Any:
        return (item.get(key, {}).get("Value") or [None])[0]

    return {str(first(item, "00081155")): int(first(item, "00081197") or 0) for item in items}


def _retry_after_s(value: str) -> float | None:
    """Seconds, given as such or as a date (RFC 9110 section 10.2.3)."""
    if value.isdecimal():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None
