"""The process that kfp.local runs in: it patches `print`, the root logger and globals of its own, and so gets its own.

python -m radloop.engines.kubeflow HOME RUN_ID PYTHONS     (PYTHONS: JSON, interpreter by environment)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from types import FrameType

from radloop.engines.kubeflow.compiler import Compiler
from radloop.pipeline.records import Record
from radloop.stage.launch import die_with_parent


def main(home: Path, run_id: str, pythons: dict[str, str]) -> None:
    """Compile the run's pipeline and run it, to whatever end: the run's record tells."""
    signal.signal(signal.SIGTERM, _end)
    die_with_parent()
    warnings.simplefilter("ignore")  # kfp.local warns of what means nothing here: display names, a workspace
    from kfp import local

    graph = Compiler(Record.load(home, run_id).pipeline, pythons=pythons).graph()
    with tempfile.TemporaryDirectory(prefix="radloop-kfp-") as workspace:
        root = home / "runs" / run_id / "kfp"
        local.init(local.SubprocessRunner(use_venv=False), str(root), workspace, raise_on_error=False)
        graph(project=str(home), run_id=run_id, alert=False)


def _end(number: int, frame: FrameType | None) -> None:
    """End every task with this process: they are in its group; a stage goes with the task that started it."""
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
