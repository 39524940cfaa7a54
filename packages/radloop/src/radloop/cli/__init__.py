"""The command line. Each command imports what it needs when it runs, so that `radloop --help` is quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `radloop`. A RadloopError is printed as it reads, without a traceback; exit 1, or 2 for usage."""
    if len(sys.argv) > 1 and sys.argv[1] == "stage":  # on every engine's path: no typer, no rich
        from radloop.cli.stage import run_stage

        sys.exit(run_stage(sys.argv[2:]))
    from radloop.cli.app import run_app

    sys.exit(run_app())
