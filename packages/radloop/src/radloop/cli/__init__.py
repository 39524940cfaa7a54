"""The command line. Each command imports what it needs when it runs, so that `radloop --help` is quick."""

from __future__ import annotations

import os
import sys

# Several threads that multiply 96 x 96 matrices spend their time waiting for each other: 24 ms an image against 0.4 ms.
# It must stand before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Entry point of `radloop`. A RadloopError is printed as it reads, without a traceback; exit 1, or 2 for usage."""
    if len(sys.argv) > 1 and sys.argv[1] == "stage":  # on every engine's path: no typer, no rich
        from radloop.cli.stage import run_stage

        sys.exit(run_stage(sys.argv[2:]))
    from radloop.cli.app import run_app

    sys.exit(run_app())
