"""A real PostgreSQL on loopback, in a folder of its own, ended with the process that started it."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from radloop.errors import RadloopError
from radloop.testing.pacs_peers import free_port

_READY_S = 120.0
_BINARIES = "/usr/lib/postgresql"
"""Debian keeps `initdb` and `postgres` there, one folder a version, and out of PATH."""


def binaries() -> Path | None:
    """The newest PostgreSQL's folder of programs, None where there is none."""
    found = [path.parent for path in Path(_BINARIES).glob("*/bin/postgres")]
    if on_path := shutil.which("postgres"):
        found.append(Path(on_path).resolve().parent)
    return max(found, key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0, default=None)


class PostgreSQL:
    """A cluster on a free port of 127.0.0.1 that asks for a password (SCRAM). A context manager; its folder goes with it.

    `initdb` refuses root: as root all of it runs as the user `postgres` or `nobody`. Nothing is flushed to the disk (fsync is
    off): it is fast, and is lost in a power cut.

    Raises:
        RadloopError: it is not installed, or does not start; with its log.
    """

    user = "radloop"

    def __init__(self) -> None:
        programs = binaries()
        if programs is None:
            raise RadloopError("PostgreSQL is not installed", next_step="apt-get install postgresql")
        self.programs = programs
        self.password = secrets.token_urlsafe(16)
        self.port = free_port()
        self._databases = 0
        self.folder = Path(tempfile.mkdtemp(prefix="radloop-pg-"))
        self._as_user: list[str] = []
        if os.geteuid() == 0:
            owner = _unprivileged()
            self._as_user = [f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self._initialise()
        self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it at once, and remove its folder."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def database(self, template: str = "template1") -> str:
        """Make a database, empty or as a `template` that nobody is connected to; its URL, without the password."""
        self._databases += 1
        name = f"test_{os.getpid()}_{self._databases}"
        self.sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return f"postgresql+psycopg2://{self.user}@127.0.0.1:{self.port}/{name}"

    def with_password(self, url: str) -> str:
        """A URL of `database` with the password in it."""
        return url.replace(f"{self.user}@", f"{self.user}:{self.password}@")

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql says to a statement, rows one a line, columns apart by `|`."""
        command = [str(self.programs / "psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", self.user]
        command += ["-d", database, "-qAt", "-v", "ON_ERROR_STOP=1", "-c", statement]
        done = subprocess.run(
            command, env=os.environ | {"PGPASSWORD": self.password}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RadloopError("psql failed", got=done.stderr.strip())
        return done.stdout.strip()

    def _initialise(self) -> None:
        word = self.folder / "password"
        word.write_text(self.password)
        word.chmod(0o644)  # for another user, within a folder that is only his
        command = [str(self.programs / "initdb"), "-D", str(self.folder / "data"), "-U", self.user, "-E", "UTF8"]
        command += ["--locale=C", "--auth=scram-sha-256", f"--pwfile={word}", "--no-sync"]
        done = subprocess.run([*self._become(), *command], cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RadloopError("initdb failed", got=done.stderr.strip())

    def _start(self) -> subprocess.Popen[bytes]:
        options = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder, "fsync": "off",
            "synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "32MB", "max_connections": 100,
        }  # fmt: skip
        command = [str(self.programs / "postgres"), "-D", str(self.folder / "data")]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen([*self._become(), *command], cwd=self.folder, stdout=log, stderr=log)
        until = time.monotonic() + _READY_S
        ready = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                raise RadloopError("PostgreSQL does not start", got=(self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)
        return process

    def _become(self) -> list[str]:
        # The kernel ends it (SIGINT: at once, in order) with the thread that started it: a killed test leaves none behind.
        return ["setpriv", "--pdeathsig=INT", *self._as_user]


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
