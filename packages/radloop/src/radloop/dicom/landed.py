"""The files of landing and quarantine: what they are named by, how they are written for good, whence one came.

A file's name is the identity of what is in it. Two senders, or one sender by two routes, write another preamble and another
group 0002 around one instance; the identity of a Part 10 file is therefore the SHA-256 of its transfer syntax UID, a zero byte
and the data set. What is no Part 10 file is named by the SHA-256 of all its bytes.

Where radloop itself writes the header (C-STORE brings none, PS3.7 section 9.1.1), it puts in whence the instance came: the
calling AE title (0002,0016), and as private information (0002,0102) site and sender under a seal, an HMAC by the project key over
identity, site and sender. A power cut may then take the last commits of catalog and crosswalk: the file, which was fsynced
before Success was answered, holds all that they need.
"""

from __future__ import annotations

import hashlib
import hmac
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from radloop.catalog.database import storage_errors
from radloop.dicom.spool import Spool, write_all

if TYPE_CHECKING:
    from hashlib import _Hash

Buffer = bytes | bytearray | memoryview
"""The bytes of a file, in memory or mapped."""

IMPLEMENTATION_CLASS_UID = "2.25.247998033190070116307791040783720953382"
"""Of what radloop receives; also the creator of its private information (0002,0100)."""
_VERSION_NAME = "RADLOOP"
_SEAL_BYTES = 32
_WHERE = "landing"
_SYNC_TOGETHER = 8
_READ_BYTES = 64 << 20
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT_ELEMENT, _LONG_ELEMENT = struct.Struct("<HH2sH"), struct.Struct("<HH2sHI")

Seal = Callable[[str, str, str], bytes]
"""Identity, site, sender -> 32 bytes that only the project key can make: `Pseudonymiser.seal`."""


class Came(msgspec.Struct, frozen=True, kw_only=True):
    """What a file's own header says of its arrival: site, calling AE title, and the command's UIDs (PS3.7 section 9.3.1)."""

    site: str
    sender: str
    sop_class_uid: str
    sop_uid: str


# Identity


def identity(data: Buffer) -> str:
    """What a file is named by, 64 hex digits: see this module's docstring."""
    meta = _meta(data)
    syntax = meta.text(0x0010) if meta is not None else ""
    if meta is None or not syntax:
        return hashlib.sha256(data).hexdigest()
    digest = begin(syntax)
    with memoryview(data) as view:
        digest.update(view[meta.end :])
    return digest.hexdigest()


def begin(transfer_syntax_uid: str) -> _Hash:
    """A digest to which the bytes of a data set are to be added: `identity` of the instance when all are."""
    return hashlib.sha256(transfer_syntax_uid.encode("ascii", "replace") + b"\0")


class _Meta(msgspec.Struct):
    """Group 0002 of a Part 10 file: element number -> value, and where the data set begins."""

    values: dict[int, bytes]
    end: int

    def text(self, element: int) -> str:
        return self.values.get(element, b"").rstrip(b"\0 ").decode("ascii", "replace")


def _meta(data: Buffer) -> _Meta | None:
    """Group 0002, explicit VR little endian (PS3.10 section 7.1); None where there is none, or it is broken."""
    if bytes(data[128:132]) != b"DICM":
        return None
    meta, end = _Meta({}, 132), len(data)
    while meta.end + 8 <= end:
        group, element, vr, length = _SHORT_ELEMENT.unpack_from(data, meta.end)
        if group != 2:
            break
        value = meta.end + 8
        if vr in _LONG_VRS:
            if value + 4 > end:
                return None
            length, value = _LONG_ELEMENT.unpack_from(data, meta.end)[4], value + 4
        if value + length > end or not vr.isalpha():
            return None
        meta.values[element] = bytes(data[value : value + length])
        meta.end = value + length
    return meta if meta.values else None


# The header that radloop writes


def header(*, sop_class_uid: str, sop_uid: str, transfer_syntax_uid: str, sender: str, site: str) -> bytes:
    """Preamble and group 0002 (PS3.10 section 7.1) of an instance that is arriving, its seal still open (zeros)."""
    elements = (
        _of_class(sop_class_uid) + _short(0x0003, b"UI", sop_uid, b"\0") + _of_sender(transfer_syntax_uid, sender, site)
    )
    return bytes(128) + b"DICM" + _SHORT_ELEMENT.pack(2, 0, b"UL", 4) + struct.pack("<I", len(elements)) + elements


@lru_cache(256)
def _of_class(sop_class_uid: str) -> bytes:
    return _LONG_ELEMENT.pack(2, 0x0001, b"OB", 0, 2) + b"\0\1" + _short(0x0002, b"UI", sop_class_uid, b"\0")


@lru_cache(256)
def _of_sender(transfer_syntax_uid: str, sender: str, site: str) -> bytes:
    whence = f"{site}\n{sender}".encode()
    private = whence + b"\0" * (len(whence) % 2) + bytes(_SEAL_BYTES)
    return b"".join(
        (
            _short(0x0010, b"UI", transfer_syntax_uid, b"\0"),
            _short(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0"),
            _short(0x0013, b"SH", _VERSION_NAME, b" "),
            _short(0x0016, b"AE", sender[:16], b" "),
            _short(0x0100, b"UI", IMPLEMENTATION_CLASS_UID, b"\0"),
            _LONG_ELEMENT.pack(2, 0x0102, b"OB", 0, len(private)) + private,
        )
    )


def seal_at(head: bytes) -> slice:
    """Where in what `header` made the seal is to be written."""
    return slice(len(head) - _SEAL_BYTES, len(head))


def came(data: Buffer, sha256: str, seal: Seal) -> Came | None:
    """Whence a file came by its own header; None when radloop did not write it, or it was changed."""
    meta = _meta(data)
    if meta is None or meta.text(0x0100) != IMPLEMENTATION_CLASS_UID:
        return None
    private = meta.values.get(0x0102, b"")
    site, _, sender = private[:-_SEAL_BYTES].rstrip(b"\0").decode(errors="replace").partition("\n")
    if not site or not hmac.compare_digest(private[-_SEAL_BYTES:], seal(sha256, site, sender)):
        return None
    return Came(site=site, sender=sender, sop_class_uid=meta.text(0x0002), sop_uid=meta.text(0x0003))


def _short(element: int, vr: bytes, text: str, padding: bytes) -> bytes:
    value = text.encode("ascii", "replace")
    value += padding * (len(value) % 2)
    return _SHORT_ELEMENT.pack(2, element, vr, len(value)) + value


# Writing for good


def place(target: Path, data: Buffer, spool: Spool | None = None) -> None:
    """Write a file whole and for good.

    It has its name before it is flushed, so that the file system commits once. After a power cut within, a torn file may stand
    under the name, which its identity betrays (`radloop.dicom.recovery`).

    Args:
        target: `landing/XX/IDENTITY.dcm`.
        data: what to write.
        spool: holds these bytes already, on the same file system: it is named instead.

    Raises:
        StorageFull: no space left; nothing is under the name.
    """
    with storage_errors(_WHERE):
        if spool is not None:
            _place(target, data, spool)
            return
        with closing(Spool(target.parent.parent)) as made:
            made.fill(data)
            _place(target, data, made)


def _place(target: Path, data: Buffer, spool: Spool) -> None:
    ours = _name(spool, target, data)
    try:
        if ours is _Named.SPOOL:
            os.fsync(spool.handle)
        else:  # there already, perhaps not flushed yet; or written anew
            _flush(target)
        _flush(target.parent)
    except BaseException:
        if ours is not _Named.BEFORE:
            target.unlink(missing_ok=True)
        raise


def make_folders(parent: Path) -> None:
    """Make the 256 folders of identities that are not there yet, for good."""
    missing = [folder for number in range(256) if not (folder := parent / f"{number:02x}").is_dir()]
    for folder in missing:
        folder.mkdir(mode=0o700, exist_ok=True)
    if missing:
        _flush(parent)


def _create(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _flush(path.parent.parent)
        return os.open(path, flags, 0o600)


class _Named(Enum):
    """What stands under a name."""

    SPOOL = 1
    COPY = 2
    BEFORE = 3


def _name(spool: Spool, target: Path, data: Buffer) -> _Named:
    """Name a nameless file, unless the same bytes are under the name already."""
    try:
        _link(spool, target)
    except FileExistsError:
        if _whole(target):
            return _Named.BEFORE
    except OSError:  # not every file system can
        pass
    else:
        return _Named.SPOOL
    _write_named(target, data)
    return _Named.COPY


def _link(spool: Spool, target: Path) -> None:
    source = f"/proc/self/fd/{spool.handle}"
    for again in (False, True):
        try:
            # A folder handle makes Python call linkat, which follows /proc's link; link() would link the link.
            os.link(source, target, src_dir_fd=spool.handle, follow_symlinks=True)
        except FileNotFoundError:
            if again:
                raise
            target.parent.mkdir(mode=0o700, exist_ok=True)
            _flush(target.parent.parent)
        else:
            return


def _write_named(target: Path, data: Buffer) -> None:
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp")
    handle = _create(temporary)
    try:
        write_all(handle, data)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _whole(path: Path) -> bool:
    with mapped(path) as data:
        return identity(data) == path.stem


@contextmanager
def mapped(path: Path) -> Iterator[Buffer]:
    """The bytes of a file; a large one is mapped, not read."""
    if path.stat().st_size <= _READ_BYTES:
        yield path.read_bytes()
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        memoryview(pages) as view,
    ):
        yield view


def write_durably(files: Mapping[Path, Buffer]) -> None:
    """Write files whole and for good: temporary name, fsync, rename, then fsync of every folder that changed.

    Folders are made 0700, files 0600. A file that is there already is left: its name says what is in it.

    Raises:
        StorageFull: no space left; no temporary file is left behind.
    """
    folders = {target.parent for target in files}
    temporary: dict[Path, Path] = {}
    with storage_errors(_WHERE):
        for folder in sorted(folders):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                folders |= {folder.parent}
        try:
            for target, data in files.items():
                if not (target.exists() and _whole(target)):
                    temporary[target] = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp")
                    handle = _create(temporary[target])
                    try:
                        write_all(handle, data)
                    finally:
                        os.close(handle)
            _fsync([*temporary.values(), *(target for target in files if target not in temporary)])
            for target, written in temporary.items():
                written.rename(target)
            _fsync(folders)
        except BaseException:
            for written in temporary.values():
                written.unlink(missing_ok=True)
            raise


def move_durably(source: Path, target: Path) -> None:
    """Move a file from landing to quarantine, for good."""
    with storage_errors(_WHERE):
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.replace(source, target)
        _fsync({target.parent, target.parent.parent, source.parent})


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync(paths: Collection[Path]) -> None:
    """Flush files and folders; many at once, since the file system then commits them together."""
    if len(paths) < _SYNC_TOGETHER:
        for path in paths:
            _flush(path)
        return
    with ThreadPoolExecutor(_SYNC_TOGETHER) as pool:
        list(pool.map(_flush, paths))
