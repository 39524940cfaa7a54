"""A wheel of the very radloop that runs, made from its files: offline, without a build backend, from any installation.

A packaged model carries it, so that it loads years later with the code that made it. Equal code gives equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import radloop
from radloop.errors import DefinitionError

_DATE = (1980, 1, 1, 0, 0, 0)


def _members() -> dict[str, bytes]:
    """Every file of the package by its path in a wheel."""
    root = Path(radloop.__file__).parent
    files = (p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc")
    return {f"radloop/{p.relative_to(root).as_posix()}": p.read_bytes() for p in sorted(files)}


def code_digest(members: dict[str, bytes] | None = None) -> str:
    """SHA-256 (hex) over names and contents of radloop's files."""
    seen = hashlib.sha256()
    for name, data in sorted((members or _members()).items()):
        seen.update(f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode())
    return seen.hexdigest()


def build(out: Path) -> Path:
    """Write the wheel into `out` and return its path.

    Its version is radloop's with the code's digest as local part (PEP 440), such as `0.1.0+code.1f2e3d4c5b6a`: pip then
    never takes another build of the same version for it.
    """
    members = _members()
    distribution = metadata.distribution("radloop")
    version = f"{distribution.version.partition('+')[0]}+code.{code_digest(members)[:12]}"
    info = f"radloop-{version}.dist-info"
    described = (distribution.read_text("METADATA") or "").split("\n")
    described = [f"Version: {version}" if line.startswith("Version: ") else line for line in described]
    members[f"{info}/METADATA"] = "\n".join(described).encode()
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: radloop\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    if entry_points := distribution.read_text("entry_points.txt"):
        members[f"{info}/entry_points.txt"] = entry_points.encode()
    members[f"{info}/RECORD"] = _record(members, f"{info}/RECORD")
    path = out / f"radloop-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return path


def requirements(extras: Sequence[str] = ()) -> list[str]:
    """What the wheel needs, with these extras, and MLflow's client: pinned to the versions installed here, where they are.

    Raises:
        DefinitionError: radloop has no such extra.
    """
    known = metadata.metadata("radloop").get_all("Provides-Extra") or []
    if unknown := sorted(set(extras) - set(known)):
        raise DefinitionError(f"radloop has no extra {unknown[0]!r}", expected=", ".join(known), got=unknown[0])
    found = {"mlflow-skinny": "mlflow-skinny>=3.17"}
    for line in metadata.requires("radloop") or []:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", marker)
        if extra is None or extra[1] in extras:
            found[re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]] = requirement
    return [_pinned(name, found[name]) for name in sorted(found)]


def _pinned(name: str, requirement: str) -> str:
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return requirement


def _record(members: dict[str, bytes], own: str) -> bytes:
    """The RECORD file (binary distribution format, PyPA): name, digest and size of each member."""
    lines = []
    for name, data in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    return "\n".join([*lines, f"{own},,", ""]).encode()
