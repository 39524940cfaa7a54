"""A command of the hospital's own that removes faces: how it is named, started and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import msgspec

from radloop.errors import SettingsError

TIMEOUT_S = 3600.0
# Ends the command's group when this process ends, however it ends: its end of the pipe closes then.
_WATCH = "import os, sys; sys.stdin.buffer.read(); os.killpg(int(sys.argv[1]), 9)"


class Failed(Exception):
    """What went wrong with the command or what it left, without a value of any header."""


class FaceCleaner(msgspec.Struct, frozen=True):
    """A command that removes faces from a series, and how long it may take.

    It is run without a shell, `{input}` and `{output}` replaced by two folders. In the first lies each instance of the
    series as a DICOM file; it leaves each in the second, under its SOPInstanceUID and otherwise any name.

    Raises:
        SettingsError: no command, or one without both folders.
    """

    command: tuple[str, ...]
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        """Check the command."""
        if not all(any(folder in word for word in self.command[1:]) for folder in ("{input}", "{output}")):
            raise SettingsError(
                "the face cleaner is no command with two folders",
                expected='face_cleaner = ["deface", "{input}", "{output}"]',
                got=f"{len(self.command)} words",
            )
        if not self.timeout_s > 0:
            raise SettingsError("a face cleaner takes its time", expected="seconds above 0", got=f"{self.timeout_s}")

    def executable(self) -> str:
        """The command's file. Raises SettingsError: it is not there."""
        found = shutil.which(self.command[0])
        if found is None:
            raise SettingsError(
                "the face cleaner is not there, or may not be executed",
                expected="a command on the PATH, or an absolute path",
                got=self.command[0],
            )
        return str(Path(found).absolute())

    def run(self, given: Path, left: Path, scratch: Path) -> None:
        """Run it in `scratch`, from one folder to the other; whatever it started is ended with it.

        What it says may identify somebody: it is counted, and read by nobody. The variables RADLOOP*, which may hold keys, are
        not in its environment; TMPDIR is `scratch`.

        Raises:
            Failed: it ended with an error, or not in time. SettingsError: it cannot be started.
        """
        places = {"{input}": f"{given.absolute()}", "{output}": f"{left.absolute()}"}
        words = [self.executable()]
        for word in self.command[1:]:
            for name, place in places.items():
                word = word.replace(name, place)
            words.append(word)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RADLOOP")}
        said = scratch / ".said"
        code = self._wait(words, scratch, environment | {"TMPDIR": f"{scratch.absolute()}"}, said)
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            size = said.stat().st_size if said.exists() else 0
            raise Failed(f"the face cleaner ended with {how}; it said {size} bytes, which were not read")

    def _wait(self, words: list[str], scratch: Path, environment: Mapping[str, str], said: Path) -> int:
        try:
            with said.open("wb") as output:
                command = subprocess.Popen(
                    words,
                    stdin=DEVNULL,
                    stdout=output,
                    stderr=STDOUT,
                    cwd=scratch,
                    env=environment,
                    umask=0o077,
                    start_new_session=True,
                )
        except OSError as error:
            raise SettingsError("the face cleaner cannot be started", got=error.strerror) from None
        try:
            watch = [sys.executable, "-I", "-S", "-c", _WATCH, f"{command.pid}"]
            with subprocess.Popen(watch, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True) as watcher:
                try:
                    return command.wait(self.timeout_s)
                except subprocess.TimeoutExpired:
                    raise Failed(f"the face cleaner had not ended after {self.timeout_s:g} s") from None
                finally:
                    watcher.kill()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
            command.wait()
