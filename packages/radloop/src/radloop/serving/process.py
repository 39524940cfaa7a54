"""Children that end when their parent ends, however it ends.

Linux alone keeps this promise through SIGKILL of the parent (prctl PR_SET_PDEATHSIG, which survives execve). The signal
follows the *thread* that started the child, so children are to be started from a thread that lives as long as they
shall.

Run as a script this file is a launcher for programs that know nothing of it:
`python -I -S process.py PARENT_PID PROGRAM ARGUMENTS...`. It imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process `signal_number` when its parent dies.

    Args:
        parent: pid of the process that started this one. If it is gone already (it died between fork and this call),
            this process exits at once.
        signal_number: SIGTERM for programs that drain, SIGKILL for the rest.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != parent:
        sys.stderr.write("the parent is gone; not starting\n")
        os._exit(1)


def main() -> None:
    """Become the program named on the command line, tied to the parent."""
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - the supervisor's own command, no shell wanted


if __name__ == "__main__":
    main()
