"""`radloop stage NAME`: the one way every engine runs a stage (`--request R --result S`), and one stage for a person."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from radloop.errors import DefinitionError, RadloopError
from radloop.stage.execute import Approved
from radloop.stage.launch import read_request, serve_request
from radloop.stage.protocol import EXIT


def run_stage(arguments: list[str]) -> int:
    """Run one stage from its request; see `--help`. Returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="radloop stage",
        description="Run one stage: of a request, as every engine does; or, without one, of this project's pipelines, "
        "after whatever it needs that has not run yet or has changed.",
        epilog="Example: radloop stage quality. Exit: 0 succeeded, 1 failed, 3 stopped by a gate, 4 waiting for an "
        "approval, 2 wrong usage.",
    )
    parser.add_argument("name", help="the stage: its name, or with a request module:function")
    parser.add_argument("--request", type=Path, help="JSON request (docs/schemas/request.json)")
    parser.add_argument("--result", type=Path, help="where the JSON result is written, whole")
    parser.add_argument("--project", type=Path, default=Path(os.environ.get("RADLOOP_PROJECT") or "."), metavar="DIR")
    options = parser.parse_args(arguments)
    if (options.request is None) != (options.result is None):
        parser.error("--request and --result go together")
    try:
        if options.request is None:
            return _run_for_a_person(options.name, options.project)
        request = read_request(options.request)
        if options.name not in (request.stage, request.node):
            parser.error(f"the request is for {request.stage}, not for {options.name}")
        return serve_request(options.request, options.result, approvals(Path(request.home)))
    except RadloopError as error:
        print(f"radloop stage: {error}", file=sys.stderr)
        return 1


def _run_for_a_person(name: str, project: Path) -> int:
    from radloop.cli.run import run_one, summarise
    from radloop.loop import PIPELINES
    from radloop.settings import load
    from radloop.stages.project import check

    settings = load(project)
    check(settings)
    found = {pipeline: [node.name for node in build(settings).nodes] for pipeline, build in PIPELINES.items()}
    pipeline = next((pipeline for pipeline, names in found.items() if name in names), None)
    if pipeline is None:
        stages = ", ".join(stage for names in found.values() for stage in names)
        raise DefinitionError(f"there is no stage {name!r}", expected=stages, got=name)
    result = run_one(project, settings, pipeline, upto=name)
    summarise(result)
    return EXIT[result.status]


def approvals(home: Path) -> Approved:
    """Whether the project's ledger holds an approval of a digest, in a role, that counts."""

    def approved(digest: str, role: str) -> bool:
        from radloop.stages import approvals
        from radloop.stages.project import open_catalog

        with open_catalog(home) as catalog:
            return approvals.approved(home, catalog, digest, role)

    return approved
