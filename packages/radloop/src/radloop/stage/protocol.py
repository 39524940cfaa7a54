"""What passes between an engine and a stage: request, result and events, as JSON.

Version 1. `radloop schema` prints the JSON schemas; `docs/schemas/` holds them. An engine's environment needs this
module only, never the stage's own imports.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from radloop.artifact import Description

SPEC_VERSION = 1

Status = Literal["succeeded", "stopped", "waiting", "failed"]
STATUS: dict[int, Status] = {0: "succeeded", 1: "failed", 3: "stopped", 4: "waiting"}
EXIT: dict[str, int] = {status: code for code, status in STATUS.items()}


class Approval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage that runs only when a person approved the artifact bound to its input `of`.

    Attributes:
        of: the name of the input whose digest is approved.
        role: the role the approver must hold.
    """

    of: str
    role: str = "clinical"


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage to run once.

    Paths may be relative to `home`, so that a request means the same wherever the project is mounted.

    Attributes:
        stage: `module:function`.
        node: the stage's name in its pipeline.
        pipeline, run_id: the run it belongs to; no other run of that pipeline may work at the same time. Empty: none.
        params: JSON values; secrets are references (`env:NAME`, `file:PATH`).
        inputs: artifact directory by input name; a list of them for an `Each`, None where an optional input is absent.
        gates: verdict artifacts that must let this stage pass.
        home: the project's home directory; the stage's outputs are committed to `artifacts/` in it.
        attempt: 1 for the first try.
    """

    stage: str
    node: str
    spec_version: int = SPEC_VERSION
    pipeline: str = ""
    run_id: str = ""
    params: dict[str, Any] = {}
    inputs: dict[str, str | list[str] | None] = {}
    gates: tuple[str, ...] = ()
    approval: Approval | None = None
    home: str = "."
    attempt: int = 1


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a stage ended.

    Attributes:
        outputs: description of each committed output by name.
        place: the directory that holds the outputs, one sub-directory each, relative to the project's home.
        message: for a person: the error's text, the verdict's, or what is waited for.
        error: the exception's class, where there was one.
        cached: whether an earlier run's outputs were taken.
    """

    status: Status
    node: str
    spec_version: int = SPEC_VERSION
    outputs: dict[str, Description] = {}
    place: str = ""
    message: str = ""
    error: str = ""
    seconds: float = 0.0
    cached: bool = False


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a stage's event stream. The last is `closed`; a stream without it is a failed run."""

    event: Literal["started", "progress", "log", "closed"]
    node: str = ""
    at: float = 0.0
    message: str = ""
    done: int = 0
    total: int = 0
    status: str = ""


def encode(value: object) -> bytes:
    """JSON with sorted keys, so that equal values give equal bytes."""
    return msgspec.json.encode(value, order="deterministic")
