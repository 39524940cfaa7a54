"""Stages of `prepare`: from what has arrived to a dataset version."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from radloop.errors import DataError, DicomError, NotYet
from radloop.stage import Home, In, Out, Secret, stage
from radloop.stage.execute import log, progress, track
from radloop.stages.kinds import TABLE, Dataset, Instances, Labels, Schema, Tensors, Validation, Verdict

if TYPE_CHECKING:
    from radloop.catalog.schema import Archived, Instance, Refused
    from radloop.catalog.store import Catalog
    from radloop.dicom.deidentify import Deidentifier
    from radloop.dicom.deidentify.faces import Faceless
    from radloop.dicom.landing import Landing

T = TypeVar("T")
R = TypeVar("R")
_BATCH = 64
CLASSES = {"1": 1, "0": 0}
"""Label values as `radloop labels import` stores them, whatever words the file used."""


@stage(cache=False)
def ingest(
    received: Out[Instances],
    labels: Out[Labels],
    reviewed: Out[Schema],
    *,
    home: Home,
    folders: list[dict[str, str]] = [],  # noqa: B006 - stages never change their parameters
    pacs: list[dict[str, Any]] = [],  # noqa: B006
    task: str = "finding",
    given_split: str = "",
) -> None:
    """Take in folders of DICOM and what is new at PACS, then list every instance of a complete study, every label, and the
    schema a person reviewed.

    Args:
        folders: `{"path", "site"}`, complete once they are read; what the listener received is in the catalog already.
        pacs: blocks of [[ingest.pacs]], the name of a PACS and which studies of it.
        task: the label task.
        given_split: the label task that holds a split the user brought; empty: radloop splits.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from radloop.dicom.rejections import take_notes
    from radloop.stages.completeness import release_complete
    from radloop.stages.project import open_catalog, open_landing

    with open_catalog(home) as catalog:
        landing = open_landing(home, catalog)
        landing.recover()
        for folder in folders:
            landing.receive_folder(home / folder["path"], site=folder["site"], progress=progress)
        for source in pacs:
            _fetch(home, landing, catalog, source)
        if (batch := catalog.seal_ingest(actor="ingest")) is not None:
            log(f"new since the last run: {batch}")
        waits = release_complete(home, landing, catalog)
        if withdrawn := take_notes(landing, catalog, actor="ingest"):
            log(f"{withdrawn} instances were withdrawn by rejection notes; see `radloop quarantine list`")
        current = [*catalog.ready(), *catalog.archived()]
        if not current:
            _nothing_yet(waits)
        if waits:
            log(waits)
        persons = catalog.persons()
        retried = _retried(catalog)
        resolved = catalog.resolve_labels(task)
        split = catalog.resolve_labels(given_split).values if given_split else {}
    rows = sorted((row.sop_uid, row.revision, row.source_sha256, row.site) for row in current)
    columns = [list(column) for column in zip(*rows, strict=True)]
    names = ["sop_uid", "revision", "source_sha256", "site"]
    if any(row[:2] in retried for row in rows):
        # Without it nothing would have changed, and no stage would look again. Only where there are any:
        # else the artifact, and all that was made of it, stays what it was.
        columns, names = [*columns, [retried[row[:2]] for row in rows]], [*names, "retried"]
    pq.write_table(pa.table([pa.array(c) for c in columns], names=names), received.file(TABLE))
    if (schema := home / "schema.pbtxt").exists():
        reviewed.file("schema.pbtxt").write_bytes(schema.read_bytes())
    known = {uid for uid, *_ in rows}
    values = {uid: list(value) for uid, value in resolved.values.items() if uid in known}
    contradicting = [uid for uid in resolved.contradicting if uid in known]
    if contradicting:
        log(f"{len(contradicting)} images have labels that contradict each other and stay without one")
    labels.write_json(
        "labels.json",
        {
            "task": task,
            "values": values,
            "contradicting": sorted(contradicting),
            "given_split": {uid: value for uid, (value, _) in split.items() if uid in known},
            # Only where there are any: without them the artifact, and all that was made of it, stays what it was.
            **({"persons": persons} if persons else {}),
        },
    )
    received.counts["instances"] = len(rows)
    labels.counts.update(labelled=len(values), contradicting=len(contradicting))


def _retried(catalog: Catalog) -> Counter[tuple[str, int]]:
    """How often a person had an instance (UID, revision) looked at again, as after mending a face cleaner."""
    rows = catalog.quarantined(state="retried")
    return Counter((row.sop_uid, row.revision) for row in rows if row.sop_uid and row.revision is not None)


def _fetch(home: Path, landing: Landing, catalog: Catalog, source: dict[str, Any]) -> None:
    """What is new at one PACS. What came before an error is kept, and the next run goes on from there."""
    from radloop.dicom.pacs.fetch import fetch_new
    from radloop.dicom.pacs.search import read_query
    from radloop.settings import FromPacs
    from radloop.stages.project import fetch_target, open_pacs

    told = msgspec.convert(source, FromPacs)
    accessions = str(home / told.accessions) if told.accessions else ""
    query = read_query(
        modalities=told.modalities, begin=told.since, description=told.description, accessions=accessions
    )
    with open_pacs(home, told.name) as pacs:
        target = fetch_target(home, told.name, landing, catalog)
        report = fetch_new(pacs, query, target, overlap_days=told.overlap_days, actor="ingest", progress=progress)
    log(f"{told.name}: {report.summary}")


def _nothing_yet(waits: str) -> NoReturn:
    if waits:
        raise NotYet(
            f"nothing to do yet: {waits}",
            next_step="run it again then; an image that comes later makes a new revision of its study",
        )
    raise DataError(
        "nothing has been received",
        expected="instances in the catalog",
        got="none",
        next_step="radloop listen, radloop ingest FOLDER, or [[ingest.folders]] in radloop.toml",
    )


@stage
def deidentify(
    received: In[Instances],
    clean: Out[Instances],
    *,
    home: Home,
    profile: str = "research",
    options: list[str] = [],  # noqa: B006 - stages never change their parameters
    pixels: str = "clean",
    pixel_rules: list[dict[str, Any]] = [],  # noqa: B006
    face_cleaner: list[str] = [],  # noqa: B006
    face_timeout_s: float = 3600.0,
    key: Secret = "file:radloop.key",
    workers: int = 0,
) -> None:
    """Write each instance's de-identified twin to the archive; what cannot be cleaned is quarantined with its reason.

    Args:
        pixels, pixel_rules: what is done about text in the pixels, as `radloop.dicom.burned_in.Pixels` has them.
        face_cleaner, face_timeout_s: a command of your own for the option clean-visual-features, and how long it may take for
            a series: `radloop.dicom.deidentify.face_cleaner.FaceCleaner`.
        workers: threads (most of the time goes into networks that look for text, which let go of Python); 0: one a core.
    """
    from radloop.catalog.audit import record
    from radloop.catalog.schema import Archived
    from radloop.dicom.burned_in import Pixels
    from radloop.dicom.deidentify import Deidentifier
    from radloop.stages import faces
    from radloop.stages.project import face_cleaner_of, loop_profile, open_catalog, pseudonymiser

    names = pseudonymiser(home, key)
    looking = Pixels(pixels, pixel_rules, draw=names.fraction)  # type: ignore[arg-type] # it says so itself
    tool = face_cleaner_of(face_cleaner, face_timeout_s)
    cleaner = Deidentifier(names, profile=loop_profile(profile, options), pixels=looking, face_cleaner=tool)
    with open_catalog(home) as catalog:
        wanted = {(row["sop_uid"], row["revision"]) for row in read_table(received.file(TABLE))}
        todo = [row for row in catalog.pending(deid_digest=cleaner.digest) if (row.sop_uid, row.revision) in wanted]
        alone, whole = faces.apart(catalog, home, todo, wanted) if tool else (todo, [])
        todo = [*alone, *(row for rows in whole for row in rows)]
        if todo:
            detail = {"instances": len(todo), "studies": len({row.study_uid for row in todo})}
            patients = {row.patient for row in todo}
            record(catalog.ledger, "landing read", "landing", actor="deidentify", pseudonyms=patients, detail=detail)
        done: list[Archived] = []
        refused: list[Refused] = []
        # Where a batch ends: a series without faces is recorded at once, so that a kill leaves no part of it to be done.
        ends = {*range(_BATCH, len(alone), _BATCH), *itertools.accumulate(map(len, [alone, *whole]))}

        def results() -> Iterator[Archived | Refused]:
            yield from in_order(functools.partial(_clean, cleaner, home, {}), alone, workers)
            for rows, faceless in faces.without(catalog, cleaner, home, whole):
                yield from in_order(functools.partial(_clean, cleaner, home, faceless), rows, workers)

        for number, result in enumerate(track(results(), len(todo), message="de-identify"), 1):
            done.append(result) if isinstance(result, Archived) else refused.append(result)
            if number in ends:
                catalog.mark_archived(done)
                catalog.refuse(refused, stage="deidentify")
                done, refused = [], []
        archived = [row for row in catalog.archived() if (row.sop_uid, row.revision) in wanted]
        _say(catalog, "deidentification", cleaner.digest, len(archived), profile)
    write_instances(archived, clean.file(TABLE))
    clean.counts["instances"] = len(archived)


@stage
def quality(
    clean: In[Instances],
    checked: Out[Instances],
    *,
    home: Home,
    modalities: list[str] = ["CR", "DX"],  # noqa: B006
    sop_classes: list[str] = [],  # noqa: B006
    workers: int = 1,
) -> None:
    """Look at every image: readable, as declared, sane, not twice. Refused ones are quarantined with their reason."""
    import pyarrow.parquet as pq

    from radloop.catalog.schema import Refused
    from radloop.datasets import quality as checks
    from radloop.stages.project import open_catalog

    rows = read_table(clean.file(TABLE))
    revisions = {row["sop_uid"]: row["revision"] for row in rows}
    released: dict[str, set[str]] = {}
    with open_catalog(home) as catalog:
        for held in catalog.quarantined(state="released"):
            released.setdefault(str(held.sop_uid), set()).add(str(held.reason))
        passed, refused = checks.check(
            rows,
            home / "archive",
            expected_modalities=modalities,
            expected_sop_classes=sop_classes,
            released=released,
            progress=progress,
            workers=workers,
        )
        catalog.refuse(
            [
                Refused(sop_uid=uid, revision=revisions[uid], reason=_reason(reason), detail=detail)
                for uid, reason, detail in refused
            ],
            stage="quality",
        )
        kept = passed.select(["sop_uid", "pixel_sha256"]).to_pylist()
        catalog.set_pixel_digests((row["sop_uid"], revisions[row["sop_uid"]], row["pixel_sha256"]) for row in kept)
    if len(passed) == 0:
        raise DataError(
            "no image passed the quality checks",
            expected=f"modality {', '.join(modalities)}",
            got=f"{len(refused)} refused",
            next_step="radloop quarantine list",
        )
    pq.write_table(passed, checked.file(TABLE))
    checked.counts.update(instances=len(passed), refused=len(refused))


@stage(environment="tfdv")
def validate(
    checked: In[Instances],
    reviewed: In[Schema],
    baseline: In[Validation] | None,
    validation: Out[Validation],
    verdict: Out[Verdict],
) -> None:
    """TFDV: statistics, schema, anomalies, and drift and skew against the baseline's version.

    The schema a person reviewed comes first, then the baseline's; the first version's is inferred.
    """
    from radloop_tfdv.validate import validate as run_tfdv

    schema = reviewed.path / "schema.pbtxt"
    told = run_tfdv(
        checked.file(TABLE),
        validation.path,
        baseline=baseline.path if baseline else None,
        reviewed_schema=schema if schema.exists() else None,
    )
    message = f"schema {told['schema']}: {told['anomalies']} anomalies, {told['stops']} of them break it"
    if told["verdict"] != "pass":
        message += (
            "\n  next: `radloop report` shows them; if the data is right and the schema is not, save the validation's"
            " schema.proposed.pbtxt as schema.pbtxt in the project folder and run prepare again"
        )
    detail = {"gate": "schema", "verdict": "pass" if told["verdict"] == "pass" else "fail", "detail": message}
    verdict.verdict(str(told["verdict"]), message, [{**detail, "figure": told["stops"], "bound": 0}])


@stage
def preprocess(
    checked: In[Instances],
    tensors: Out[Tensors],
    *,
    home: Home,
    preprocessing: dict[str, Any] = {},  # noqa: B006
    workers: int = 1,
) -> None:
    """Decode and resize every image once, in its native integer type, for the loader to map into memory."""
    from radloop.datasets import tensors as shards
    from radloop.imaging.transforms import Preprocessing

    chosen = msgspec.convert(preprocessing, Preprocessing)
    written = shards.write(
        read_table(checked.file(TABLE)), home / "archive", chosen, tensors.path, workers=workers, progress=progress
    )
    tensors.write_json("preprocessing.json", {"digest": chosen.digest, "parameters": msgspec.to_builtins(chosen)})
    tensors.write_json("refused.json", msgspec.to_builtins(written.refused))
    tensors.counts.update(images=written.images, refused=len(written.refused))


@stage
def publish(
    checked: In[Instances],
    labels: In[Labels],
    tensors: In[Tensors],
    validation: In[Validation],
    dataset: Out[Dataset],
    *,
    home: Home,
    key: Secret = "file:radloop.key",
    fractions: list[float] = [0.6, 0.15, 0.25],  # noqa: B006
) -> None:
    """Join images, labels and parts into an immutable dataset version, and record it.

    A patient's part is decided once, by a keyed hash of the pseudonym, and kept in every later version. Patients who were
    linked are one person and have one part.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from radloop.catalog.schema import Member, Refused
    from radloop.datasets import manifest, split
    from radloop.stages.project import open_catalog, pseudonymiser

    told = msgspec.json.decode(labels.file("labels.json").read_bytes(), type=dict[str, Any])
    table = pq.read_table(checked.file(TABLE))
    failed = tensors.json("refused.json")
    assert isinstance(failed, list)
    lost = {row["sop_uid"] for row in failed}
    revisions = {row["sop_uid"]: row["revision"] for row in table.select(["sop_uid", "revision"]).to_pylist()}
    table = table.filter(pc.invert(pc.is_in(table["sop_uid"], pa.array(sorted(lost), pa.string()))))
    fraction, persons = pseudonymiser(home, key).fraction, told.get("persons", {})
    with open_catalog(home) as catalog:
        catalog.refuse(
            [
                Refused(
                    sop_uid=r["sop_uid"],
                    revision=revisions[r["sop_uid"]],
                    reason=_reason(r["reason"]),
                    detail=r["detail"],
                )
                for r in failed
            ],
            stage="preprocess",
        )
        parts: dict[str, str]
        if told["given_split"]:
            parts, by = split.given(told["given_split"]), "sop_uid"
        else:
            patients = sorted({str(patient) for patient in table["patient"].to_pylist()})
            decided = split.parts(
                patients, lambda one: fraction(persons.get(one, one)), fractions, decided=catalog.parts()
            )
            parts = catalog.assign_parts(decided, key_id=str(table["key_id"][0].as_py()))
            by = "patient"
        built = manifest.build(table, _label_rows(told), parts, classes=CLASSES, parts_by=by)  # type: ignore[arg-type]
        digest = manifest.write(built, dataset.file("manifest.parquet"))
        dataset.counts.update(manifest.counts(built))
        kept = f"datasets/{digest}.parquet"
        manifest.write(built, home / kept)
        columns = (built[name].to_pylist() for name in ("sop_uid", "revision", "patient", "part"))
        earlier = [version for version in catalog.datasets() if version.digest != digest]
        catalog.add_dataset(
            digest,
            path=kept,
            members=[
                Member(sop_uid=uid, revision=revision, patient=patient, part=part)
                for uid, revision, patient, part in zip(*columns, strict=True)
            ],
            parent=earlier[-1].digest if earlier else None,
            counts={**dataset.counts, "tensors": tensors.digest, "validation": validation.digest},
            actor="publish",
        )
        dataset.write_json(
            "dataset.json",
            {
                "manifest": digest,
                "tensors": tensors.digest,
                "validation": validation.digest,
                "task": told["task"],
                "contradicting": len(told["contradicting"]),
                "given_split": bool(told["given_split"]),
                **({"persons": persons} if persons else {}),
            },
        )


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet table."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def write_instances(rows: list[Instance], path: Path) -> None:
    """The instance table: the catalog's columns and the tags, sorted by sop_uid."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = []
    for row in sorted(rows, key=lambda r: r.sop_uid):
        columns = {
            name: getattr(row, name)
            for name in (
                *("sop_uid", "revision", "study_uid", "series_uid", "patient", "key_id", "accession_key", "file_key"),
                *("site", "sop_class_uid", "modality", "file_sha256", "pixel_sha256", "source_bytes"),
            )
        }
        flat.append({**row.tags, **columns, "path": row.archive_path})
    if not flat:
        raise DataError(
            "no instance could be de-identified",
            expected="at least one",
            got="none",
            next_step="radloop quarantine list",
        )
    names = sorted({name for row in flat for name in row})
    pq.write_table(pa.table({name: [row.get(name) for row in flat] for name in names}), path)


def _clean(cleaner: Deidentifier, home: Path, faceless: Faceless, row: Instance) -> Archived | Refused:
    from radloop.catalog.schema import Archived, Refused
    from radloop.stages.faces import landed

    relative = f"{row.study_uid}/{row.series_uid}/{row.sop_uid}.dcm"
    source = landed(home, row)
    pixels = faceless.get(source)
    try:
        if isinstance(pixels, DicomError):
            raise pixels
        cleaned = cleaner.clean_file(source, home / "archive" / relative, site=row.site, faceless=pixels)
    except DicomError as error:
        return Refused(sop_uid=row.sop_uid, revision=row.revision, reason=_reason(error.reason), detail=error.what)
    if cleaned.patient != row.patient:
        raise DataError(
            "an instance's patient is another one in the catalog than in its header",
            expected=row.patient,
            got=cleaned.patient,
            next_step="the project key was changed: restore the one the archive was made with",
        )
    return Archived(
        sop_uid=row.sop_uid,
        revision=row.revision,
        archive_path=relative,
        file_sha256=cleaned.file_sha256,
        deid_digest=cleaner.digest,
        tags=cleaned.tags,
    )


def in_order(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """Results in the items' order, from so many threads (0: one a core, at most eight); what one raises is raised."""
    threads = threads or min(len(os.sched_getaffinity(0)), 8)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="radloop")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reason(value: str) -> Any:
    from radloop.catalog.reason import Reason

    return Reason(value)


def _label_rows(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key_kind": "instance", "key": uid, "value": value, "source": source, "row_revision": 1}
        for uid, (value, source) in told["values"].items()
    ]


def _say(catalog: Any, kind: str, subject: str, instances: int, profile: str) -> None:
    payload = {"profile": profile, "instances": instances}
    catalog.ledger.append(kind, subject, payload, actor="deidentify", key=f"{kind}:{subject}:{instances}")
