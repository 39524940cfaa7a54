"""`radloop stage` in a fork of this process: what is imported here already need not be imported again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, NoReturn

_LOOK_EVERY_S = 0.002


class Forked:
    """What `radloop.stage.launch` uses of a Popen, for a fork. This process must have no other thread, and a young one is best.

    Args:
        arguments: of `radloop`.
        errors: receives what the stage prints.
        env: variables added to this process's environment.
    """

    def __init__(self, arguments: Sequence[str], errors: IO[bytes], env: Mapping[str, str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        read, write = os.pipe()
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _become(arguments, write, errors.fileno(), env)
        os.close(write)
        self.stdout: IO[bytes] | None = os.fdopen(read, "rb")

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with self._lock:
            if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
                self.returncode = os.waitstatus_to_exitcode(ended[1])
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended. Raises TimeoutExpired as a Popen does."""
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired("radloop stage", timeout)
            time.sleep(_LOOK_EVERY_S)
        return code


def _become(arguments: Sequence[str], events: int, errors: int, env: Mapping[str, str]) -> NoReturn:
    """In the fork: be `python -m radloop.cli ARGUMENTS`, with the streams of one, and leave."""
    import logging
    import runpy
    import traceback

    code = 1
    try:
        os.setsid()
        os.dup2(events, 1)
        os.dup2(errors, 2)
        os.environ.update(env)
        logging.root.handlers.clear()  # those of the host, which logs more than a stage does
        logging.root.setLevel(logging.WARNING)
        sys.argv = ["radloop", *arguments]
        runpy.run_module("radloop.cli", run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - a fork must never return into its host's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
