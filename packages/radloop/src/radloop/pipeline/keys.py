"""Cache keys: what a stage's result depends on.

A key is made of the stage, its parameters, the digests of its inputs, the environment's lock and the code: every radloop
module that the stage's module imports, found by grimp in the source, with the data files beside them. Mending
`dicom/uids.py` runs deidentify again.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from radloop.errors import DefinitionError
from radloop.pipeline import Node
from radloop.stage.protocol import SPEC_VERSION, encode

# Tables that modules read from beside them are as much code as the modules.
_DATA = {".csv", ".json", ".npz"}


@cache
def code_digest(module: str) -> str:
    """SHA-256 over the sources of a module and of all radloop modules it imports, at whatever depth."""
    names = {module}
    if module.split(".")[0] == "radloop":
        names |= set(_graph().find_upstream_modules(module))
    digest = hashlib.sha256()
    files = {_source(name) for name in names}
    files |= {data for source in files for data in source.parent.iterdir() if data.suffix in _DATA}
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _graph():  # type: ignore[no-untyped-def]
    import grimp

    return grimp.build_graph("radloop", cache_dir=None)


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DefinitionError(f"the source of module {module!r} cannot be found", expected="an importable module")
    return Path(spec.origin)


def key(node: Node, inputs: Mapping[str, str | None], environment_digest: str, item: str | None = None) -> str:
    """The cache key of a node.

    Args:
        node: the node.
        inputs: content digest by input name; None where an optional input is absent.
        environment_digest: digest of the lock of the node's environment.
        item: the item of a mapped node's run.
    """
    parts = {
        "spec_version": SPEC_VERSION,
        "stage": node.stage,
        "params": node.params,
        "inputs": dict(inputs),
        "environment": environment_digest,
        "code": code_digest(node.stage.split(":")[0]),
        "item": item,
    }
    return hashlib.sha256(encode(parts)).hexdigest()
