"""What became of each source, kept in the target: a run that was killed goes on, and its report is that of the whole.

Lines of JSON, appended. Sources are named by keyed hashes, outputs by their pseudonymous paths: nothing in it identifies
anyone without the key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import msgspec

from radloop.errors import DataError

Tally = tuple[tuple[str, str, int], ...]
"""(attribute's path without item numbers, action, how often) of one file."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="file", tag_field="line"):
    """What became of one source."""

    source: str
    """Keyed hash of its path, size and times."""
    outcome: str
    """cleaned, same (a copy of one that was cleaned) or refused"""
    file: str = ""
    """Where the output is, relative to the target."""
    sha256: str = ""
    tally: str = ""
    """`Pattern.name`"""
    pixels: str = ""
    reason: str = ""
    what: str = ""


class Pattern(msgspec.Struct, frozen=True, kw_only=True, tag="pattern", tag_field="line"):
    """What was done to the attributes of a file; most files of a series share one."""

    name: str
    rows: Tally


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun", tag_field="line"):
    """The first line: by which recipe all is made."""

    recipe: str


class Journal:
    """The journal of one target, or, without a path, one that nobody keeps.

    Args:
        path: of the file; None in a dry run.
        recipe: digest of key, profile, options, site and code.

    Raises:
        DataError: the target was made by another recipe.
    """

    def __init__(self, path: Path | None, recipe: str) -> None:
        self.entries: dict[str, Entry] = {}
        self.patterns: dict[str, Tally] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1  # what follows was cut by a kill: that file is done again
        decode = msgspec.json.Decoder(Entry | Pattern | Begun).decode
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self._known(decode(line), recipe)
            except msgspec.DecodeError:
                raise DataError(
                    "the target's journal is damaged", got=f"line {number}", next_step="choose an empty folder"
                ) from None
        self._file = path.open("ab")
        self._file.truncate(whole)
        if not whole:
            self._write(Begun(recipe=recipe))

    def _known(self, line: Entry | Pattern | Begun, recipe: str) -> None:
        if isinstance(line, Entry):
            self.entries[line.source] = line
        elif isinstance(line, Pattern):
            self.patterns[line.name] = line.rows
        elif line.recipe != recipe:
            raise DataError(
                "the target was made with another key, profile, option, site or version of radloop",
                expected="the same, or an empty folder",
                next_step="choose an empty folder: one data set must not mix two ways of de-identification",
            )

    def pattern(self, rows: Tally) -> str:
        """The name of a tally, which is noted if it is new."""
        name = hashlib.sha256(msgspec.json.encode(rows)).hexdigest()[:16]
        if name not in self.patterns:
            self.patterns[name] = rows
            self._write(Pattern(name=name, rows=rows))
        return name

    def note(self, entry: Entry) -> None:
        """Remember what became of a source."""
        if entry.source and self.entries.get(entry.source) != entry:
            self._write(entry)

    def flush(self) -> None:
        """Hand what was noted to the system: it survives the end of this process."""
        if self._file is not None:
            self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        """Close; on a full disk that fails, with what was not yet flushed lost."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: Entry | Pattern | Begun) -> None:
        if self._file is not None:
            self._file.write(msgspec.json.encode(line) + b"\n")
