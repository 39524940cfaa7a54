"""Stages that ask a pod what it is, and what it forbids. They run in the pod only."""

from __future__ import annotations

import os
from pathlib import Path

from radloop.stage import Home, Out, stage
from radloop.testing.suite_stages import Numbers

_ASKED = ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")


@stage
def look(made: Out[Numbers], *, home: Home) -> None:
    """Say who this process is, what it may do, and where it can write."""
    lines = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    places = ["/", "/etc", "/usr/local/bin", "/venv", "/var/tmp", "/dev/shm", "/tmp", str(home), str(home.parent)]
    told = {"writable": [place for place in places if _writable(Path(place))], "pid": os.getpid()}
    told["account"] = Path("/var/run/secrets/kubernetes.io/serviceaccount").exists()
    made.write_json("numbers.json", {**{name: lines[name] for name in _ASKED}, **told})


@stage
def trespass(made: Out[Numbers]) -> None:
    """Write where a stage has no business."""
    Path("/venv/lib/left-behind").write_text("x")


@stage
def swell(made: Out[Numbers]) -> None:
    """Take more and more memory, and touch it."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1 << 16) * 256))


def _writable(folder: Path) -> bool:
    probe = folder / ".probe"
    try:
        probe.write_text("x")
        probe.unlink()
    except OSError:
        return False
    return True
