"""`radloop labels`: what people said about the images, keyed by what they know the images by."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.artifact import file_digest
from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, actor, catalog_at, check_code, command, group, settings_at
from radloop.errors import DataError, DicomError

if TYPE_CHECKING:
    from radloop.catalog.schema import LabelRow
    from radloop.catalog.store import Catalog
    from radloop.dicom.uids import Pseudonymiser
    from radloop.settings import Settings

POSITIVE, NEGATIVE = "1", "0"
"""How the values of the project's own task are stored, whatever the file's words for them are."""

_LONGEST = 64  # characters of a value
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_NAMED = 5  # lines named in one error
Row = tuple[int, str, str]  # line of the file, key, value


class Key(StrEnum):
    """What a label file names images by."""

    ACCESSION = "accession"
    STUDY = "study"
    INSTANCE = "instance"
    FILE = "file"


def register(app: typer.Typer) -> None:
    """Add `labels import` and `labels status`."""
    labels = group(app, "labels", "Import labels, and see which of them have found their images.")

    @command(
        labels,
        "import",
        examples=(
            "radloop labels import reads.csv --key accession --key-column AccessionNumber --value-column finding",
            "radloop labels import reads.parquet --key file --key-column path --value-column label",
            "radloop labels import parts.csv --key file --key-column path --value-column part --task split",
        ),
        after="`radloop labels status`, then `radloop run prepare`: changed labels make a new dataset version.",
    )
    def import_(
        file: Annotated[
            Path, typer.Argument(help="CSV (comma, semicolon or tab; UTF-8) or Parquet.", exists=True, dir_okay=False)
        ],
        key: Annotated[
            Key, typer.Option("--key", help="What the key column holds; identifiers of the original images.")
        ],
        key_column: Annotated[str, typer.Option("--key-column", metavar="NAME", help="The column with the keys.")],
        value_column: Annotated[
            str, typer.Option("--value-column", metavar="NAME", help="The column with the values.")
        ],
        task: Annotated[
            str | None,
            typer.Option("--task", help="Another task, whose values are kept as they are.", show_default="[task] name"),
        ] = None,
        site: Annotated[
            str | None, typer.Option("--site", metavar="CODE", help="For accession numbers: the site that gave them.")
        ] = None,
        by: Annotated[
            str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Import labels from a file, before or after the images come.

        The keys are those of the original images; they are turned into pseudonyms at once and never stored. A value
        that differs from an earlier import corrects it. One key with two values in one file, or a value that
        radloop.toml does not name, imports nothing.
        """
        settings = settings_at(project)
        with catalog_at(project) as catalog:
            told = import_file(
                project, settings, catalog, file, key=key, key_column=key_column, value_column=value_column,
                task=task or settings.task.name, site=_site(site, key), by=actor(by),
            )  # fmt: skip
        if json:
            output.print_json(told)
            return
        counts = {name: told[name] for name in ("new", "corrected", "unchanged")}
        print(f"{output.plural(told['keys'], 'label')} of task {told['task']}: {output.counts_line(counts)}")
        if told["without_value"]:
            print(f"{output.plural(told['without_value'], 'row')} without a value passed over")
        if told["unmatched"]:
            print(_say_unmatched(told["unmatched"], key))
        print("Next: radloop run prepare")

    @command(
        labels,
        "status",
        examples=("radloop labels status",),
        after="`radloop labels import FILE ...` brings more.",
    )
    def status(
        task: Annotated[str | None, typer.Option("--task", help="Another task.", show_default="[task] name")] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Show how many labels there are, what they say, and how many have found an image."""
        settings = settings_at(project)
        with catalog_at(project) as catalog:
            told = state_of(catalog, task or settings.task.name)
        if json:
            output.print_json(told)
            return
        values = ", ".join(f"{count:,} x {value}" for value, count in told["values"].items())
        asked = told["requests"]
        output.print_pairs(
            f"Labels of task {told['task']}",
            [
                ("imported", f"{told['labels']:,}" + (f" ({values})" if values else "")),
                ("images with a label", f"{told['images_labelled']:,} of {told['images']:,}"),
                ("match no image yet", told["unmatched"]),
                ("contradict each other", told["contradicting"] or None),
                ("asked for", f"{asked[0]['images']} images ({asked[0]['id'][:12]})" if asked else None),
            ],
        )


def import_file(
    project: Path,
    settings: Settings,
    catalog: Catalog,
    file: Path,
    *,
    key: Key,
    key_column: str,
    value_column: str,
    task: str,
    site: str | None,
    by: str,
) -> dict[str, Any]:
    """Read, check, pseudonymise and import one file.

    Args:
        site: that gave the accession numbers; None finds the one that knows each.

    Raises:
        DataError: the file cannot be read, a column is missing, a value is unknown, a key has two values or none, or an
            accession number fits several sites. Nothing is imported then.
    """
    from radloop.catalog.audit import record
    from radloop.catalog.schema import KeyKind, LabelRow
    from radloop.stages.project import pseudonymiser

    rows = list(read_rows(file, key_column, value_column))
    valued = [row for row in rows if row[2]]
    if key in (Key.STUDY, Key.INSTANCE):
        _check_uids(valued, key_column)
    values = _values(valued, value_column, settings if task == settings.task.name else None)
    key_of = _key_function(pseudonymiser(project, settings.deidentify.key), key)
    if key is Key.ACCESSION and site is None:
        keys = _accession_keys(catalog, settings, valued, pseudonymiser(project, settings.deidentify.key), key_column)
    else:
        keys = _keys(valued, lambda text: key_of(text, site or ""), key_column)
    made: list[LabelRow] = [
        LabelRow(key_kind=KeyKind(key.value), key=pseudonym, value=value, row=row[0])
        for pseudonym, value, row in zip(keys, values, valued, strict=True)
    ]
    source = f"{file.suffix.lstrip('.').lower() or 'file'}:{file_digest(file)[:12]}"
    record(
        catalog.ledger,
        "labels import",
        "labels",
        actor=by,
        detail={"keyed_by": key.value, "rows": len(made), "source": source},
    )
    done = catalog.import_labels(task, made, source=source, actor=by)
    return {
        "task": task,
        "rows": len(rows),
        "keys": done.new + done.corrected + done.unchanged,
        "new": done.new,
        "corrected": done.corrected,
        "unchanged": done.unchanged,
        "unmatched": done.unmatched,
        "without_value": len(rows) - len(valued),
        "source": source,
    }


def state_of(catalog: Catalog, task: str) -> dict[str, Any]:
    """Counts of one task's labels and of the images they belong to."""
    from radloop.catalog.schema import Status

    labels, resolved = catalog.labels(task), catalog.resolve_labels(task)
    images = len(catalog.pending(Status.RECEIVED)) + len(catalog.archived())
    return {
        "task": task,
        "labels": len(labels),
        "values": dict(sorted(Counter(label.value for label in labels).items())[:_NAMED]),
        "images": images,
        "images_labelled": len(resolved.values),
        "unmatched": len(catalog.unmatched_labels(task)),
        "contradicting": len(resolved.contradicting),
        "requests": [
            {"id": asked.id, "opened_at": asked.opened_at, "images": len(asked.sop_uids), "why": asked.why}
            for asked in catalog.label_requests("open")
        ],
    }


def read_rows(file: Path, key_column: str, value_column: str) -> Iterator[Row]:
    """Line (1 is the header of a CSV, the first row of a Parquet), key and value as trimmed text.

    Text is never taken for a number: AccessionNumber 00123 keeps its noughts.
    """
    if key_column == value_column:
        raise DataError("keys and values are the same column", expected="two columns", got=key_column)
    parquet = file.suffix.lower() in (".parquet", ".pq")
    empty = True
    for row in (_parquet_rows if parquet else _csv_rows)(file, [key_column, value_column]):
        empty = False
        yield row
    if empty:
        raise DataError("the label file has no rows", expected="at least one", got="none")


def _csv_rows(file: Path, columns: list[str]) -> Iterator[Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            first = handle.readline()
            handle.seek(0)
            reader = csv.reader(handle, delimiter=max(",;\t", key=first.count), strict=True)
            header = [name.strip() for name in next(reader, [])]
            key_at, value_at = _places(header, columns)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"line {reader.line_num} of the label file has another number of columns",
                        expected=len(header),
                        got=len(row),
                        next_step="put values that hold the separator in double quotes",
                    )
                yield reader.line_num, row[key_at].strip(), row[value_at].strip()
    except UnicodeDecodeError:
        raise DataError("the label file is no UTF-8 text", next_step="save it as CSV UTF-8") from None
    except csv.Error as error:
        raise DataError(
            "the label file is no CSV", expected="CSV (RFC 4180) or Parquet", got=f"line {reader.line_num}: {error}"
        ) from None


def _parquet_rows(file: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _places(pq.read_schema(file).names, columns)
        table = pq.read_table(file, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError("the label file is no Parquet", expected="CSV or Parquet", got=type(error).__name__) from None
    pairs = zip(table[columns[0]].to_pylist(), table[columns[1]].to_pylist(), strict=True)
    for number, (key, value) in enumerate(pairs, 1):
        yield number, _text(key, columns[0]), _text(value, columns[1])


def _text(value: Any, column: str) -> str:
    """A cell as the CSV of it would read: 1.0 is 1, True is true, null is nothing."""
    if value is None or value != value:  # null, not a number
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int)):
        return str(value).strip()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise DataError(f"column {column!r} holds neither text nor whole numbers", got=type(value).__name__)


def _places(header: list[str], columns: list[str]) -> list[int]:
    for column in columns:
        if header.count(column) != 1:
            times = f"{header.count(column)} times in" if column in header else "not in"
            raise DataError(
                f"column {column!r} is {times} the label file",
                expected=f"one of: {', '.join(header)}" if header else "a header line",
                got=column,
            )
    return [header.index(column) for column in columns]


def _values(rows: list[Row], column: str, settings: Settings | None) -> list[str]:
    """Values as they are stored: of the project's own task 1 and 0, of another (`settings` None) as they are."""
    if settings is None:
        if too_long := [line for line, _, value in rows if len(value) > _LONGEST]:
            raise DataError(
                f"column {column!r} holds no labels",
                expected=f"values of at most {_LONGEST} characters",
                got=f"longer ones on {_lines(too_long)}",
            )
        return [value for _, _, value in rows]
    known = {**dict.fromkeys(map(_fold, settings.task.negative), NEGATIVE)}
    both = known.keys() & set(map(_fold, settings.task.positive))
    if both:
        raise DataError("[task] positive and negative share a word", expected="different words", got=sorted(both))
    known |= dict.fromkeys(map(_fold, settings.task.positive), POSITIVE)
    unknown: dict[str, list[int]] = {}
    for line, _, value in rows:
        if _fold(value) not in known:
            unknown.setdefault(value, []).append(line)
    if unknown:
        # The values are not shown: a wrongly chosen column may hold names.
        lines = sorted(line for seen in unknown.values() for line in seen)
        raise DataError(
            f"column {column!r} holds {output.plural(len(unknown), 'value')} that [task] does not name",
            expected=f"one of {', '.join([*settings.task.positive, *settings.task.negative])}",
            got=f"{output.plural(len(unknown), 'other value')} on {_lines(lines)}",
            next_step="add the words to positive or negative in radloop.toml, or choose the right column; nothing was imported",
        )
    return [known[_fold(value)] for _, _, value in rows]


def _key_function(pseudonyms: Pseudonymiser, key: Key) -> Callable[[str, str], str]:
    """(original key, site) -> pseudonym: the functions by which landing names images."""
    if key is Key.ACCESSION:
        return pseudonyms.accession
    if key is Key.FILE:
        return lambda text, _site: pseudonyms.file(text)
    return lambda text, _site: pseudonyms.uid(text)


def _keys(rows: Iterable[Row], key_of: Callable[[str], str], column: str) -> list[str]:
    keys: list[str] = []
    blank: list[int] = []
    for line, text, _ in rows:
        try:
            keys.append(key_of(text))
        except (DataError, DicomError):
            blank.append(line)
    if blank:
        raise DataError(
            f"column {column!r} has no key in {output.plural(len(blank), 'row')}",
            expected="a key in every row that has a value",
            got=f"nothing on {_lines(blank)}",
            next_step="complete or remove these rows; nothing was imported",
        )
    return keys


def _check_uids(rows: list[Row], column: str) -> None:
    """Refuse a column that holds something else: as pseudonyms nobody could tell any more. Values are not shown."""
    wrong = [line for line, text, _ in rows if text and not _UID.fullmatch(text)]
    if wrong:
        raise DataError(
            f"column {column!r} holds no UIDs",
            expected="UIDs of the original images (PS3.5 section 9): digits and dots, at most 64 characters",
            got=f"something else on {_lines(wrong)}",
            next_step="choose the column with the UIDs, or another --key; nothing was imported",
        )


def _accession_keys(
    catalog: Catalog, settings: Settings, rows: list[Row], pseudonyms: Pseudonymiser, column: str
) -> list[str]:
    """Keys of accession numbers whose site was not said: that of the one site where the number is known.

    An accession number is unique within its site only. One that two sites know, or that none knows yet while there are
    several sites, cannot be told apart: a label on the wrong patient's study would be worse than none.
    """
    sites = _sites(catalog, settings)
    if len(sites) == 1:
        return _keys(rows, lambda text: pseudonyms.accession(text, sites[0]), column)
    if not sites:
        raise DataError(
            "whose accession numbers these are cannot be told: no site is known yet",
            next_step="say which site gave them: --site CODE",
        )
    _keys(rows, lambda text: pseudonyms.accession(text, ""), column)
    present = _accessions(catalog)
    chosen, unclear = [], {"none": 0, "several": 0}
    for _, text, _ in rows:
        candidates = [pseudonyms.accession(text, site) for site in sites]
        matching = [key for key in candidates if key in present]
        if len(matching) == 1:
            chosen.append(matching[0])
        else:
            unclear["several" if matching else "none"] += 1
    if any(unclear.values()):
        raise DataError(
            f"the site of {output.plural(sum(unclear.values()), 'accession number')} cannot be told",
            expected="accession numbers that exactly one site knows",
            got=f"{unclear['several']} known to several sites, {unclear['none']} to none yet",
            next_step=f"say which site gave them: --site {sites[0]} (one file a site); nothing was imported",
        )
    return chosen


def _sites(catalog: Catalog, settings: Settings) -> list[str]:
    """Sites that images have come from or may come from."""
    configured = {*settings.listen.senders.values(), *(folder.site for folder in settings.ingest.folders)}
    return sorted(configured | catalog.counts().keys())


def _accessions(catalog: Catalog) -> Collection[str]:
    from radloop.catalog.schema import Status

    return {row.accession_key for status in Status for row in catalog.pending(status) if row.accession_key}


def _site(site: str | None, key: Key) -> str | None:
    if site is not None and key is not Key.ACCESSION:
        raise DataError(f"--site belongs to accession numbers, not to --key {key}")
    return site if site is None else check_code(site, "--site")


def _say_unmatched(number: int, key: Key) -> str:
    said = f"{number:,} match no image yet; they are kept and join when the images come"
    return said + (" (paths count from the folder that was ingested)" if key is Key.FILE else "")


def _fold(value: str) -> str:
    return value.strip().casefold()


def _lines(lines: list[int]) -> str:
    named = ", ".join(map(str, lines[:_NAMED]))
    rest = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return f"line{'s' if len(lines) > 1 else ''} {named}{rest}"
