"""`radloop answer`: studies in, results out, where radiologists look."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from radloop import logs
from radloop.cli import output
from radloop.cli.common import FAILED, HERE, Json, Project, catalog_at, command, settings_at
from radloop.errors import DataError, RadloopError, ServingError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from radloop.catalog.schema import LedgerRow, StudyState
    from radloop.catalog.store import Catalog
    from radloop.dicom.pacs import Pacs
    from radloop.learning.package import Packaged
    from radloop.serving.reading import Heat, Reading, Served
    from radloop.settings import Settings

DEADLINE_S = 300.0
_LOOK_EVERY_S = 2.0
_AGAIN_S = 30.0
_ACTOR = "answer"
_PAYLOAD = "result.json"


def register(app: typer.Typer) -> None:
    """Add `answer`."""

    @command(
        app,
        "answer",
        examples=(
            "radloop answer --to reading-pacs",
            "radloop answer --to reading-pacs --follow",
            "radloop answer --from archive --accession A1234 --to reading-pacs",
            'radloop answer --withdraw "patient safety" --from reading-pacs --study 1.2.3 --to reading-pacs',
        ),
        after="`radloop ledger --kind result` lists what was sent; `radloop trace PREDICTION` leads back to the training images.",
    )
    def answer(
        to: Annotated[str, typer.Option("--to", metavar="PACS", help="Where results go: a name under [pacs].")],
        source: Annotated[
            str | None,
            typer.Option("--from", metavar="PACS", help="Fetch the studies there instead of taking what was received."),
        ] = None,
        accession: Annotated[
            list[str] | None, typer.Option("--accession", help="With --from: which studies. May be repeated.")
        ] = None,
        study: Annotated[
            list[str] | None,
            typer.Option("--study", metavar="UID", help="With --from: StudyInstanceUID. May be repeated."),
        ] = None,
        since_hours: Annotated[
            float, typer.Option("--since-hours", help="Received studies older than this are left alone.")
        ] = 24.0,
        follow: Annotated[
            bool, typer.Option("--follow", help="Go on with what comes, until Ctrl-C or SIGTERM.")
        ] = False,
        deadline_s: Annotated[
            float, typer.Option("--deadline-s", help="What has no answer by then is reported as not analysed.")
        ] = DEADLINE_S,
        withdraw: Annotated[
            Literal["quality", "patient safety"] | None,
            typer.Option("--withdraw", help="With --from: send a rejection note for our results there instead."),
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Ask the served model about studies and send the results to a PACS.

        For each study one structured report (TID 1500, unverified, preliminary, series "AI - investigational") and one
        picture marked as not for diagnosis. What was not analysed says so, with the reason. Received studies are taken
        once they are complete ([ingest] quiet_s); a study that grew gets a new report, which cites the former. One result
        for each state of a study and model version: run it as often as you like.
        """
        settings = settings_at(project)
        if withdraw and not source:
            raise DataError(
                "whose results are withdrawn?",
                expected="--from with --accession or --study, where they are now",
                next_step="radloop answer --help",
            )
        if bool(accession or study) != bool(source):
            raise DataError(
                "which studies?",
                expected="--from with --accession or --study, or none of them: then what the listener received",
                next_step="radloop answer --help",
            )
        told = run(
            project, settings, to=to, source=source, accessions=accession or [], studies=study or [],
            since_hours=since_hours, follow=follow, deadline_s=deadline_s, withdraw=withdraw, quiet=json,
        )  # fmt: skip
        if json:
            output.print_json({"studies": told})
        if any("error" in one for one in told):
            raise typer.Exit(FAILED)


def run(
    project: Path,
    settings: Settings,
    *,
    to: str,
    source: str | None,
    accessions: list[str],
    studies: list[str],
    since_hours: float,
    follow: bool,
    deadline_s: float,
    withdraw: str | None,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Answer what there is, or go on until a signal says stop; for each study what became of it."""
    from radloop.cli.foreground import ending_with
    from radloop.stages.project import open_pacs

    told: list[dict[str, Any]] = []
    stop = threading.Event()
    with catalog_at(project) as catalog, open_pacs(project, to) as pacs, ending_with(stop.set):
        desk = Desk(project, settings, catalog, pacs, deadline_s)
        since = datetime.now(UTC) - timedelta(hours=since_hours)
        while not stop.is_set():
            if source is not None and withdraw is not None:
                found = desk.withdraw(source, accessions, studies, withdraw)
            elif source is not None:
                found = desk.answer_fetched(source, accessions, studies)
            else:
                found = desk.answer_received(since.isoformat())
            told += found
            if not quiet or logs.wanted():
                for one in found:
                    output.tell(one.get("error") or one["message"])
            if not follow or source is not None:
                break
            stop.wait(_LOOK_EVERY_S)
    if not told and not quiet:
        print("no study waits for a result")
    return told


class Desk:
    """Where one project's studies are answered, and their results sent."""

    def __init__(self, project: Path, settings: Settings, catalog: Catalog, pacs: Pacs, deadline_s: float) -> None:
        self._project, self._settings, self._catalog = project, settings, catalog
        self._pacs, self._deadline_s = pacs, deadline_s
        self._again: dict[tuple[str, int], float] = {}
        self._opened: dict[str, Packaged] = {}

    def answer_received(self, since: str) -> list[dict[str, Any]]:
        """Complete studies of the listener that have no result yet, from landing: identity never leaves the hospital."""
        from radloop.catalog.studies import complete

        states = complete(self._catalog.received_since(since), self._settings.ingest.quiet_s)
        digest = self._champion()
        told = []
        for state in states:
            key = (state.study_uid, state.through)
            if self._again.get(key, 0.0) > time.monotonic() or self._is_done(
                state.study_uid, digest, through=state.through
            ):
                continue
            try:
                one = self._answer(state.study_uid, self._landed(state), digest, through=state.through)
            except RadloopError as error:
                self._again[key] = time.monotonic() + _AGAIN_S
                one = {"study": state.study_uid, "error": f"{state.study_uid[-12:]}: {error.what}"}
            if one is None:
                self._again[key] = float("inf")
            else:
                told.append(one)
        return told

    def answer_fetched(self, source: str, accessions: list[str], studies: list[str]) -> list[dict[str, Any]]:
        """Studies fetched from a PACS into memory; nothing of them is kept."""
        digest, told = self._champion(), []
        for study, files in self._fetched(source, accessions, studies):
            one = self._answer(study, files, digest, site=self._settings.pacs[source].site)
            told.append(one or {"study": study, "message": f"{study[-12:]}: nothing new to analyse"})
        return told

    def withdraw(self, source: str, accessions: list[str], studies: list[str], why: str) -> list[dict[str, Any]]:
        """Send rejection notes for all of our results in studies at a PACS that no note names yet."""
        return [self._withdraw(study, files, why) for study, files in self._fetched(source, accessions, studies)]

    def _fetched(self, source: str, accessions: list[str], studies: list[str]) -> Iterator[tuple[str, list[bytes]]]:
        """Pseudonym and files of each study, as it is fetched."""
        from radloop.dicom.pacs import Query
        from radloop.stages.project import open_pacs, pseudonymiser

        names = pseudonymiser(self._project, self._settings.deidentify.key)
        with open_pacs(self._project, source) as archive:
            queries = [Query(accessions=(one,)) for one in accessions] + [Query(study_uids=(one,)) for one in studies]
            uids = list(dict.fromkeys(found.study_uid for query in queries for found in archive.find(query)))
            self._audit("pacs fetch", source, [names.uid(uid) for uid in uids])
            for uid in uids:
                files: list[bytes] = []
                archive.fetch(uid, lambda data, files=files: files.append(bytes(data)))  # type: ignore[misc]
                yield names.uid(uid), files
        if not uids:
            raise DataError(
                "no such study at the PACS", expected="a study that it lists", got="none", next_step="radloop pacs find"
            )

    def _withdraw(self, study: str, files: Sequence[bytes], why: str) -> dict[str, Any]:
        from radloop.dicom import results
        from radloop.dicom.rejections import read_note, rejected
        from radloop.serving.model import read_dicom

        there = [read_dicom(data) for data in files]
        gone = rejected(there)
        ours = [
            ds for ds in there if results.is_result(ds) and read_note(ds) is None and str(ds.SOPInstanceUID) not in gone
        ]
        if not ours:
            return {"study": study, "withdrawn": 0, "message": f"{study[-12:]}: no result of ours to withdraw"}
        note = results.rejection(ours, why, at=datetime.now().astimezone())
        folder = self._project / "landing" / ".results"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as outbox:
            path = Path(outbox) / "note.dcm"
            note.save_as(path, enforce_file_format=True)
            self._sent([path], study)
        payload = {"why": why, "instances": len(ours), "to": self._pacs.name}
        self._catalog.ledger.append("withdrawal", study, payload, actor=_ACTOR)
        message = f"{study[-12:]}: {len(ours)} results withdrawn at {self._pacs.name} ({why})"
        return {"study": study, "withdrawn": len(ours), "message": message}

    def _answer(
        self, study: str, files: Sequence[bytes], digest: str, *, through: int = 0, site: str | None = None
    ) -> dict[str, Any] | None:
        """Read one study and send what is said of it; None if there is nothing to say, or it was said."""
        import msgspec

        from radloop.serving import reading

        images = reading.images_of(files)
        state = reading.state_of(images)
        if not images or self._is_done(study, digest, state=state):
            return None
        key = f"result:{study}:{state}:{digest}:{self._pacs.name}"
        outbox = self._project / "landing" / ".results" / hashlib.sha256(key.encode()).hexdigest()[:32]
        if not (outbox / _PAYLOAD).exists():
            former = self._former(study)
            made = reading.read(
                images,
                self._asker(site or self._site(study)),
                self._served,
                digest,
                at=datetime.now().astimezone(),
                deadline_s=self._deadline_s,
                previous=None if former is None else self._cited(former, str(images[0].ds.StudyInstanceUID)),
            )
            facts = {"state": state, "through": through, "asked": digest, "to": self._pacs.name}
            _keep(outbox, made, facts)
        payload = msgspec.json.decode((outbox / _PAYLOAD).read_bytes(), type=dict[str, Any])
        self._sent(sorted(outbox.glob("*.dcm")), study)
        self._catalog.ledger.append("result", study, payload, actor=_ACTOR, key=key)
        shutil.rmtree(outbox)
        words = f"{payload['analysed']} of {len(payload['said'])} images analysed by version {payload['version']}"
        return {"study": study, **payload, "message": f"{study[-12:]}: {words}; sent to {self._pacs.name}"}

    def _sent(self, paths: list[Path], study: str) -> None:
        """Send them; returns when the PACS has them all."""
        from radloop.catalog.audit import record

        refused = [sent for sent in self._pacs.send(paths) if not sent.stored]
        detail = {"instances": len(paths), "to": self._pacs.name}
        record(
            self._catalog.ledger, "results sent", self._pacs.name,
            actor=_ACTOR, pseudonyms=[study], detail=detail, failed=bool(refused),
        )  # fmt: skip
        if refused:
            raise ServingError(
                f"{self._pacs.name} did not store {len(refused)} of {len(paths)} results",
                expected="status 0000 (Success)",
                got=f"{refused[0].status:04X}",
                next_step="see the PACS's log; the results are sent again by the next `radloop answer`",
            )

    def _asker(self, site: str) -> Callable[[bytes, float], Any]:
        from radloop.serving.client import predict_dicom
        from radloop.serving.rollout import gateway_url
        from radloop.settings import secret

        url, told = gateway_url(self._project), self._settings.serve.token
        token = secret(told, self._project).decode() if told else None
        return lambda data, left: predict_dicom(url, data, site=site, token=token, timeout_s=min(left, 60.0))

    def _champion(self) -> str:
        from radloop.serving.desired import Desired, desired

        champion = (desired(self._project) or Desired()).models.champion
        if champion is None:
            raise ServingError(
                "no model is served", expected="a champion", next_step="radloop serve, radloop run release"
            )
        return champion.model_digest

    def _served(self, digest: str) -> Served:
        import msgspec

        from radloop.dicom.results import Algorithm
        from radloop.learning.decision import Decision
        from radloop.learning.package import Identity, Inputs
        from radloop.serving.desired import Desired, desired
        from radloop.serving.reading import Served

        models = (desired(self._project) or Desired()).models
        known = [
            ref for ref in (models.champion, models.challenger, models.previous) if ref and ref.model_digest == digest
        ]
        if not known:
            raise ServingError("a model answered that is not served any more", got=digest[:12], next_step="try again")
        folder = self._project / known[0].package
        identity = msgspec.json.decode((folder / "identity.json").read_bytes(), type=Identity)
        inputs = msgspec.json.decode((folder / "inputs.json").read_bytes(), type=Inputs)
        decision = msgspec.json.decode((folder / "decision.json").read_bytes(), type=Decision)
        algorithm = Algorithm(name=identity.task, version=known[0].version, digest=digest)
        heat = self._heat(digest, folder)
        return Served(algorithm=algorithm, finding=inputs.positive, threshold=decision.threshold, heat=heat)

    def _heat(self, digest: str, folder: Path) -> Heat:
        def heat(image: Dataset) -> Any:
            from radloop.learning.package import Packaged
            from radloop.serving import reading

            if digest not in self._opened:
                self._opened = {digest: Packaged(folder)}
            return reading.heat(self._opened[digest], image)

        return heat

    def _landed(self, state: StudyState) -> list[bytes]:
        from radloop.stages.project import open_landing

        landing = open_landing(self._project, self._catalog)
        paths = [landing.landed(row.source_sha256) for row in self._catalog.of_study(state.study_uid)]
        there = [path for path in paths if path.exists()]
        self._audit("landing read", "landing", [state.study_uid])
        if len(there) < len(paths):
            raise DataError(
                f"{len(paths) - len(there)} of {len(paths)} originals of a study are gone from landing",
                expected="originals, for their patient and study attributes",
                next_step="radloop answer --from PACS --study UID fetches them again",
            )
        return [path.read_bytes() for path in there]

    def _site(self, study: str) -> str:
        rows = self._catalog.of_study(study)
        return rows[0].site if rows else ""

    def _audit(self, action: str, subject: str, studies: list[str]) -> None:
        from radloop.catalog.audit import record

        detail = {"kind": "study"}
        why = "results for the PACS"
        record(self._catalog.ledger, action, subject, actor=_ACTOR, why=why, pseudonyms=studies, detail=detail)

    def _is_done(self, study: str, digest: str, **told: Any) -> bool:
        """Whether this state of the study has a result of this model, or one that another gave while this was champion."""
        wanted = {"to": self._pacs.name, **told}
        rows = [row.payload for row in self._catalog.ledger.rows(kind="result", subject=study)]
        return any(
            digest in (row["model_digest"], row["asked"]) and all(row[name] == value for name, value in wanted.items())
            for row in rows
        )

    def _former(self, study: str) -> LedgerRow | None:
        rows = self._catalog.ledger.rows(kind="result", subject=study)
        sent = [row for row in rows if row.payload["to"] == self._pacs.name]
        taken_back = [row.seq for row in self._catalog.ledger.rows(kind="withdrawal", subject=study)]
        return sent[-1] if sent and sent[-1].seq > max(taken_back, default=0) else None

    def _cited(self, former: LedgerRow, study_uid: str) -> Dataset:
        """The former report of this study, as the new one cites it."""
        from radloop.dicom import results

        told = former.payload
        algorithm = results.Algorithm(name="", version=str(told["version"]), digest=str(told["model_digest"]))
        return results.former(study_uid, [str(one) for one in told["said"]], algorithm)


def _keep(outbox: Path, made: Reading, facts: dict[str, Any]) -> None:
    """Write what is to be sent, for good, before it is: a kill after the sending then sends the same again, not another."""
    import msgspec

    from radloop.dicom.landed import write_durably

    outbox.mkdir(mode=0o700, parents=True, exist_ok=True)
    files: dict[Path, bytes] = {}
    for number, ds in enumerate(made.instances):
        stream = io.BytesIO()
        ds.save_as(stream, enforce_file_format=True)
        files[outbox / f"{number}.dcm"] = stream.getvalue()
    payload = facts | {
        "model_digest": made.algorithm.digest, "version": made.algorithm.version,
        "said": made.said, "analysed": made.analysed, "instances": len(files),
    }  # fmt: skip
    write_durably(files)
    write_durably({outbox / _PAYLOAD: msgspec.json.encode(payload)})
