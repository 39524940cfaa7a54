"""Artifacts: directories that are whole or not there, named by the digest of what they hold.

An artifact is a directory of member files and one description, `artifact.json`. A stage writes members into a
temporary directory; `commit` hashes them, writes the description, flushes both to disk and makes the directory visible by
one rename. Run ids, times, hosts and paths never enter a digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import msgspec

from radloop.errors import ArtifactError

DESCRIPTION = "artifact.json"
_CHUNK = 1 << 20


class Kind:
    """A kind of artifact. Subclass it in `stages/kinds.py`; the class is only a name, never instantiated.

    Attributes:
        name: the kind's name in specs and descriptions.
        schema_version: raised when the members' format changes; another version is refused on opening.
        digested: glob patterns of the members that make the content digest. Others (plots, timings) ride along.
    """

    name: ClassVar[str] = ""
    schema_version: ClassVar[int] = 1
    digested: ClassVar[tuple[str, ...]] = ("*",)


class Verdict(Kind):
    """What a gate decided: `verdict.json` with `verdict` (pass, stop, wait), a message and the gates' figures."""

    name = "verdict"


K = TypeVar("K", bound=Kind)


class Each(Kind, Generic[K]):
    """What the runs of a mapped stage leave: one artifact of kind K for each item, in the listed order."""

    name = "each"


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON beside an artifact's members.

    Attributes:
        digest: SHA-256 over the sorted `sha256  path` lines of the digested members.
        members: SHA-256 of every member, by POSIX path.
        counts: what a reader wants to know without opening it, such as `{"instances": 120}`.
    """

    kind: str
    schema_version: int
    digest: str
    members: dict[str, str] = {}
    counts: dict[str, int] = {}


class Artifact(Generic[K]):
    """A committed artifact, opened for reading."""

    def __init__(self, path: Path, description: Description, items: Sequence[Artifact[Kind]] = ()) -> None:
        self.path, self.description, self._items = path, description, list(items)

    @property
    def digest(self) -> str:
        """Content digest, SHA-256 hex."""
        return self.description.digest

    @property
    def counts(self) -> dict[str, int]:
        """Counts the writer left."""
        return self.description.counts

    def file(self, name: str) -> Path:
        """Path of a member. Raises ArtifactError if there is none of that name."""
        if name not in self.description.members:
            raise ArtifactError(
                f"the {self.description.kind} artifact has no member {name!r}",
                expected=", ".join(sorted(self.description.members)[:10]) or "no members at all",
                got=name,
            )
        return self.path / name

    def json(self, name: str) -> object:
        """A JSON member, decoded."""
        return msgspec.json.decode(self.file(name).read_bytes())

    def items(self) -> list[Artifact[Kind]]:
        """The artifacts of an `Each`, in the order of the items they were made for."""
        return list(self._items)


class Output(Generic[K]):
    """Where a stage writes one artifact: a directory, and the counts to be put in its description."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, int] = {}

    def file(self, name: str) -> Path:
        """Path for a new member; its folder is made."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON member with sorted keys, so that equal values give equal bytes."""
        self.file(name).write_bytes(
            msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"
        )

    def verdict(self, verdict: str, message: str, gates: object = ()) -> None:
        """Write the member of a `Verdict`. `verdict` is pass, stop, or wait (a person must approve)."""
        if verdict not in ("pass", "stop", "wait"):
            raise ArtifactError("a verdict is unknown", expected="pass, stop or wait", got=verdict)
        self.write_json("verdict.json", {"verdict": verdict, "message": message, "gates": gates})


def file_digest(path: Path) -> str:
    """SHA-256 hex of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(members: Mapping[str, str]) -> str:
    """Content digest over member digests, whatever their order."""
    lines = "".join(f"{members[name]}  {name}\n" for name in sorted(members))
    return hashlib.sha256(lines.encode()).hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    for root, dirs, files in os.walk(folder):
        dirs.sort()
        for name in sorted(files):
            yield Path(root, name)


def describe(folder: Path, kind: type[Kind], counts: Mapping[str, int]) -> Description:
    """Hash the members of a directory that is about to become an artifact."""
    members = {
        path.relative_to(folder).as_posix(): file_digest(path) for path in _walk(folder) if path != folder / DESCRIPTION
    }
    digested = {n: d for n, d in members.items() if any(fnmatchcase(n, pattern) for pattern in kind.digested)}
    return Description(
        kind=kind.name,
        schema_version=kind.schema_version,
        digest=digest_of(digested),
        members=members,
        counts=dict(counts),
    )


def sync(path: Path) -> None:
    """Flush a file or a directory entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def commit(written: Path, final: Path, kind: type[Kind], counts: Mapping[str, int]) -> Artifact[Kind]:
    """Make a written directory visible as an artifact at `final`, whole.

    An artifact of the same digest already at `final` is kept and the new copy dropped; one of another digest is an
    ArtifactError, for committed artifacts never change.
    """
    description = describe(written, kind, counts)
    (written / DESCRIPTION).write_bytes(msgspec.json.encode(description, order="deterministic"))
    for path in _walk(written):
        sync(path)
    if final.exists():
        present = open_artifact(final)
        if present.digest != description.digest:
            raise ArtifactError(
                f"{final.name} is already committed with other content",
                expected=present.digest,
                got=description.digest,
                next_step="a stage must be deterministic: look for times, hosts or unsorted rows in its output",
            )
        shutil.rmtree(written)
        return present
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(written, final)
    return Artifact(final, description)


def open_artifact(path: Path, kind: type[Kind] | None = None, *, verify: bool = False) -> Artifact[Kind]:
    """Open a committed artifact.

    Args:
        path: its directory.
        kind: the kind it must be of; None takes any.
        verify: hash every member again and refuse one that changed since it was committed.

    Raises:
        ArtifactError: nothing there, half-written, of another kind or schema version, or changed.
    """
    try:
        description = msgspec.json.decode((path / DESCRIPTION).read_bytes(), type=Description)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError("no artifact is there", expected=f"a directory with {DESCRIPTION}", got=str(path)) from None
    except msgspec.DecodeError as error:
        raise ArtifactError(
            "an artifact's description cannot be read", expected="JSON of a Description", got=str(error)
        ) from None
    if kind is not None and (description.kind, description.schema_version) != (kind.name, kind.schema_version):
        raise ArtifactError(
            f"{path.name} is an artifact of another kind",
            expected=f"{kind.name} version {kind.schema_version}",
            got=f"{description.kind} version {description.schema_version}",
        )
    if verify:
        _verify(path, description)
    return Artifact(path, description)


def each(paths: Iterable[Path], kind: type[Kind] | None = None) -> Artifact[Each[Kind]]:
    """Open several artifacts as one `Each`; its digest is that of their digests, in order. Raises as `open_artifact`."""
    items = [open_artifact(path, kind) for path in paths]
    lines = {f"{index:06d}": item.digest for index, item in enumerate(items)}
    described = Description(
        kind=Each.name, schema_version=Each.schema_version, digest=digest_of(lines), counts={"items": len(items)}
    )
    return Artifact(Path(), described, items)


def _verify(path: Path, description: Description) -> None:
    for name, digest in description.members.items():
        member = path / name
        if not member.is_file() or (got := file_digest(member)) != digest:
            raise ArtifactError(
                f"member {name!r} of {path.name} changed after it was committed",
                expected=digest,
                got=got if member.is_file() else "no file",
                next_step="remove this artifact's folder and run the pipeline again: it is made anew",
            )
