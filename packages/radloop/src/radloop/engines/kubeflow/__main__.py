"""The process that kfp.local runs in: it patches `print`, the root logger and globals of its own, and so gets its own.

It imports kfp once (seconds), then reads runs from stdin, a JSON line each, and runs each in a fork of itself; the answer on
stdout is the fork's exit code. When stdin ends, the engine is gone: whatever runs is ended, and so is this process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    """Serve the engine until it is gone."""
    from kfp import compiler, components, local  # noqa: F401 - before the fork, so that they are imported once

    while line := sys.stdin.buffer.readline():
        pid = os.fork()
        if pid == 0:
            os._exit(_run(**json.loads(line)))
        ended = os.pidfd_open(pid)
        if ended not in select.select([ended, sys.stdin], [], [])[0]:
            os.killpg(0, signal.SIGKILL)  # tasks are in this group; a stage goes with the task that started it
        os.close(ended)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


def _run(home: str, run_id: str, pythons: dict[str, str], cwd: str, env: dict[str, str]) -> int:
    """Compile the run's pipeline and run it, to whatever end: the run's record tells. 1 if kfp itself failed.

    Args:
        home: the project.
        run_id: a run that is open; what is printed goes to kfp.log in its record.
        pythons: interpreter by environment.
        cwd, env: the engine's working directory and environment variables, with the secrets that stages read there.
    """
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    from kfp import local

    from radloop.engines.kubeflow.compiler import Compiler
    from radloop.pipeline.records import Record

    folder = Path(home, "runs", run_id)
    log = os.open(folder / "kfp.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        warnings.simplefilter("ignore")  # kfp.local warns of what means nothing here: display names, a workspace
        graph = Compiler(Record.load(Path(home), run_id).pipeline, pythons=pythons).graph()
        with tempfile.TemporaryDirectory(prefix="radloop-kfp-") as workspace:
            local.init(local.SubprocessRunner(use_venv=False), str(folder / "kfp"), workspace, raise_on_error=False)
            graph(project=home, run_id=run_id, alert=False)
    except Exception:  # noqa: BLE001 - whatever kfp raises stands in its log, for the engine to tell
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
