"""Cache keys: what a stage's result depends on.

A key is made of the stage, its parameters, the digests of its inputs and gates, what is installed in the environment, and the
code: every radloop module that the stage's module imports, found by grimp in the source, with the data files beside them.
Mending `dicom/uids.py` runs deidentify again. The process that runs the stage makes its key, so that no engine can ask for one
code and run another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from radloop.errors import DefinitionError
from radloop.stage.protocol import SPEC_VERSION, Request, encode

# Tables that modules read from beside them are as much code as the modules.
_DATA = {".csv", ".json", ".npz"}
# What stages import, found once for each state of radloop's sources: grimp takes longer than a small stage.
_MEMO = "runs/.code.json"
_here: dict[str, str] = {}  # in this process, whose code does not change


def key(request: Request, inputs: Mapping[str, str | None]) -> str:
    """The cache key of a request.

    Args:
        request: what is to run.
        inputs: content digest by input name, None where an optional input is absent; and of each gate.
    """
    parts = {
        "spec_version": SPEC_VERSION,
        "stage": request.stage,
        "params": request.params,
        "inputs": dict(inputs),
        "environment": environment_digest(),
        "code": code_digest(request.stage.split(":")[0], Path(request.home) / _MEMO),
    }
    return hashlib.sha256(encode(parts)).hexdigest()


def code_digest(module: str, memo: Path | None = None) -> str:
    """SHA-256 over the sources of a module and of all radloop modules it imports, at whatever depth.

    `memo` is a file in which the answer is kept; its entries are made of the sources' contents, so an old one is never taken.
    """
    if module not in _here:
        _here[module] = _code_digest(module, memo)
    return _here[module]


def _code_digest(module: str, memo: Path | None) -> str:
    if module.split(".")[0] != "radloop":
        return _digest({_source(module)})
    state = _digest(_all_sources())
    known = _read(memo) if memo else {}
    if known.get("state") != state:
        known = {"state": state}
    if module not in known:
        names = {module} | set(_graph().find_upstream_modules(module))
        known[module] = _digest({_source(name) for name in names})
        if memo:
            _write(memo, known)
    return known[module]


@cache
def environment_digest() -> str:
    """SHA-256 of what this environment holds: names and versions of what is installed, and the source of radloop's own
    packages in it that no stage imports at its top (radloop_tfdv).
    """
    folders = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    installed = sorted(path.name for folder in folders for path in folder.glob("*.dist-info"))
    digest = hashlib.sha256("\n".join(installed).encode())
    for source in _own_sources(folders):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _own_sources(folders: list[Path]) -> list[Path]:
    """Modules of the radloop_* packages here, editable ones through their .pth files."""
    links = [
        line for folder in folders for pth in folder.glob("*radloop*.pth") for line in pth.read_text().splitlines()
    ]
    folders = folders + [Path(line) for line in links if Path(line).is_dir()]
    return sorted({source for folder in folders for source in folder.glob("radloop_*/**/*.py")})


def _digest(sources: set[Path]) -> str:
    digest = hashlib.sha256()
    folders = {source.parent for source in sources}
    files = sources | {data for folder in folders for data in folder.iterdir() if data.suffix in _DATA}
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _graph() -> Any:
    import grimp

    return grimp.build_graph("radloop", cache_dir=None)


def _all_sources() -> set[Path]:
    import radloop

    return set(Path(radloop.__path__[0]).rglob("*.py"))


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DefinitionError(f"the source of module {module!r} cannot be found", expected="an importable module")
    return Path(spec.origin)


def _read(memo: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(memo.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}


def _write(memo: Path, known: dict[str, str]) -> None:
    from radloop.stage.launch import write_whole

    memo.parent.mkdir(parents=True, exist_ok=True)
    write_whole(memo, encode(known))
