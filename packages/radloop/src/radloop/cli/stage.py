"""`radloop stage NAME --request R --result S`: the one way every engine runs a stage."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from radloop.errors import RadloopError
from radloop.stage.execute import Approved
from radloop.stage.launch import read_request, serve_request


def run_stage(arguments: list[str]) -> int:
    """Run one stage from its request; see `--help`. Returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="radloop stage",
        description="Run one stage. Every engine calls this; `radloop run PIPELINE` is for people.",
        epilog="Exit: 0 succeeded, 1 failed, 3 stopped by a gate, 4 waiting for an approval, 2 wrong usage.",
    )
    parser.add_argument("name", help="the stage, as module:function (it must be the one the request names)")
    parser.add_argument("--request", required=True, type=Path, help="JSON request (docs/schemas/request.json)")
    parser.add_argument("--result", required=True, type=Path, help="where the JSON result is written, whole")
    options = parser.parse_args(arguments)
    try:
        request = read_request(options.request)
        if options.name not in (request.stage, request.node):
            parser.error(f"the request is for {request.stage}, not for {options.name}")
        return serve_request(options.request, options.result, approvals(Path(request.home)))
    except RadloopError as error:
        print(f"radloop stage: {error}", file=sys.stderr)
        return 1


def approvals(home: Path) -> Approved:
    """Whether the project's ledger holds an approval of a digest by someone who held the role."""

    def approved(digest: str, role: str) -> bool:
        from radloop.stages.project import open_catalog

        with open_catalog(home) as catalog:
            rows = catalog.ledger.rows(kind="approval", subject=digest)
            return any(row.payload.get("role") == role for row in rows)

    return approved
