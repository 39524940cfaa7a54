"""The processes under the supervisor: predictors and Envoy, started, probed, restarted and ended."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec

from radloop import logs
from radloop.serving import gateway, process
from radloop.serving.pool import Pool

LOG = logging.getLogger(__name__)
REFUSED_EXIT = 78
"""Exit status (sysexits.h EX_CONFIG) of a predictor that will not start however often it is tried."""

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
STEADY_AFTER_S = 10.0
PROBE_EVERY_S = 1.0
"""Whether a ready child still is; one that is not yet is asked at every tick."""

KILL_AFTER_S = 15.0
_PROBE_TIMEOUT_S = 1.0


class Program(Protocol):
    """What a `Child` runs and how it is seen that it is ready."""

    def command(self) -> list[str]:
        """Program and arguments, asked for at each start."""
        ...

    def probe(self, output: Path) -> int | None:
        """The port at which it is ready now, None if it is not (yet)."""
        ...


class Child:
    """One process kept running: restarted with doubling back-off, from 0.2 s up to 10 s.

    Args:
        name: for file names.
        program: its command and its probe.
        folder: for `{name}.out` and `{name}.err`, written anew at each start.
        logs_on_stdout: it writes the log's lines there, not through `radloop.logs`.
    """

    def __init__(self, name: str, program: Program, folder: Path, *, logs_on_stdout: bool = False) -> None:
        self.name, self.program = name, program
        self.output, self.errors = folder / f"{name}.out", folder / f"{name}.err"
        self._logs_on_stdout = logs_on_stdout
        self.port: int | None = None
        self.ready = False
        self.refused = False
        self.restarts = 0
        self.last_error: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._not_before = 0.0
        self._started = self._probed = 0.0
        self._kill_at: float | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process, else None."""
        return None if self._process is None else self._process.pid

    def tend(self) -> None:
        """Start it if it is down and may be started; else look how it is."""
        if self._process is None:
            if not self.refused and time.monotonic() >= self._not_before:
                self._start()
            return
        status = self._process.poll()
        if status is not None:
            self._ended(status)
            return
        if self.ready and time.monotonic() - self._probed < PROBE_EVERY_S:
            return
        self._probed = time.monotonic()
        port = self.program.probe(self.output)
        if self.ready != (port is not None):
            LOG.info("%s is %s", self.name, "not ready" if port is None else "ready")
        self.ready, self.port = port is not None, port if port is not None else self.port
        if self.ready and time.monotonic() - self._started > STEADY_AFTER_S:
            self._backoff_s = FIRST_BACKOFF_S

    def try_again(self) -> None:
        """Forget a refusal and the back-off."""
        self.refused, self._backoff_s, self._not_before = False, FIRST_BACKOFF_S, 0.0

    def exited(self) -> bool:
        """Whether it is not running at this moment."""
        return self._process is None or self._process.poll() is not None

    def terminate(self) -> None:
        """SIGTERM once; SIGKILL for whoever has not ended 15 s later (`gone` looks)."""
        self.ready = False
        if self._process is not None and self._kill_at is None:
            self._kill_at = time.monotonic() + KILL_AFTER_S
            self._process.terminate()

    def gone(self) -> bool:
        """Whether it has ended, after `terminate`."""
        if self._process is None or self.exited():
            return True
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._process.kill()
        return False

    def _start(self) -> None:
        # A session of its own: Ctrl-C at the terminal reaches the supervisor, which ends its children in order.
        shared = logs.inherited()
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self._process = subprocess.Popen(
                self.program.command(),
                stdin=subprocess.DEVNULL,
                stdout=shared[0] if shared and self._logs_on_stdout else out,
                stderr=err,
                start_new_session=True,
                pass_fds=shared,
            )
        self._started = time.monotonic()

    def _ended(self, status: int) -> None:
        said = self.errors.read_text(errors="replace").strip()[-800:]
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self.last_error = f"{how}: {said}" if said else how
        # What a predictor that refuses says first is radloop's own words; anything else may be anybody's.
        why = said.splitlines()[0] if status == REFUSED_EXIT and said else how
        LOG.warning("%s ended: %s", self.name, why)
        self.refused = status == REFUSED_EXIT
        self._process, self.ready, self.restarts = None, False, self.restarts + 1
        self._not_before = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)


class Predictor(msgspec.Struct, frozen=True):
    """`python -m radloop.serving.predictor` for one model package."""

    package: Path
    version: str
    model_digest: str
    model_name: str
    predictions: Path
    key_file: Path
    token_file: Path | None

    def command(self) -> list[str]:
        """See `Program`."""
        command = [sys.executable, "-m", "radloop.serving.predictor", "--parent", str(os.getpid())]
        command += ["--package", str(self.package), "--version", self.version, "--expect-digest", self.model_digest]
        command += ["--name", self.model_name, "--predictions", str(self.predictions), "--key-file", str(self.key_file)]
        command += ["--grpc-port", "0"]
        return command if self.token_file is None else [*command, "--token-file", str(self.token_file)]

    def probe(self, output: Path) -> int | None:
        """See `Program`."""
        port = announced_port(output)
        return port if port is not None and get(port, "/v2/health/ready")[0] == 200 else None


class Envoy(msgspec.Struct):
    """Envoy with its configuration folder; ends by SIGKILL with its parent."""

    config: Path
    host: str
    port: int
    admin_port: int
    pools: tuple[Pool, ...] = ()

    def command(self) -> list[str]:
        """See `Program`."""
        self.admin_address.parent.mkdir(exist_ok=True, mode=0o700)
        self.admin_address.unlink(missing_ok=True)
        made = gateway.bootstrap(
            self.config,
            host=self.host,
            port=self.port,
            admin_port=self.admin_port,
            pools=self.pools,
            log=logs.wanted(),
        )
        gateway.replace_json(self.config / "bootstrap.json", made)
        launcher = [sys.executable, "-I", "-S", process.__file__, str(os.getpid()), str(gateway.envoy_path())]
        options = ["--admin-address-path", str(self.admin_address), "--disable-hot-restart", "-l", "warn"]
        workers = str(min(2, os.cpu_count() or 1))
        return [*launcher, "-c", str(self.config / "bootstrap.json"), "--concurrency", workers, *options]

    @property
    def admin_address(self) -> Path:
        """Where Envoy writes the address of its admin interface."""
        return self.config / "admin" / "address.txt"

    def admin(self) -> int | None:
        """The admin interface's port, None while Envoy is not up."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.admin_address.read_text().rpartition(":")[2])
        return None

    def probe(self, output: Path) -> int | None:
        """See `Program`."""
        del output
        admin = self.admin()
        if admin is None or get(admin, "/ready")[0] != 200:
            return None
        with contextlib.suppress(ValueError, LookupError):
            for one in msgspec.json.decode(get(admin, "/listeners?format=json")[1])["listener_statuses"]:
                if one["name"] == gateway.LISTENER:
                    return int(one["local_address"]["socket_address"]["port_value"])
        return None

    def in_effect(self) -> tuple[str, str]:
        """Versions of the clusters ("" while any is warming) and of the routes that Envoy works by.

        From its statistics: the configuration dump keeps the former version when the new one changes nothing.
        """
        admin = self.admin()
        body = b"" if admin is None else get(admin, "/stats?filter=version_text|warming_clusters")[1]
        stats = dict(line.split(": ", 1) for line in body.decode().splitlines() if ": " in line)
        warming = stats.get("cluster_manager.warming_clusters", "1") != "0"
        clusters = "" if warming else stats.get("cluster_manager.cds.version_text", "")
        routes = stats.get(f"http.gateway.rds.{gateway.ROUTE_CONFIG}.version_text", "")
        return clusters.strip('"'), routes.strip('"')

    def healthy(self) -> set[str]:
        """Names of the clusters all of whose hosts pass the health check."""
        names = set()
        for cluster in self._get("/clusters?format=json").get("cluster_statuses", ()):
            hosts = cluster.get("host_statuses", ())
            if hosts and not any(h.get("health_status", {}).get("failed_active_health_check") for h in hosts):
                names.add(cluster["name"])
        return names

    def drain(self, timeout_s: float) -> None:
        """Close the listeners and wait until no request is under way."""
        admin = self.admin()
        if admin is None:
            return
        get(admin, "/drain_listeners", method="POST")
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            answer = get(admin, r"/stats?filter=^http\.(gateway|pool-.*)\.downstream_rq_active$")[1]
            if all(line.endswith(b" 0") for line in answer.splitlines()):
                return
            time.sleep(0.02)

    def _get(self, path: str) -> dict[str, Any]:
        admin = self.admin()
        status, body = (0, b"") if admin is None else get(admin, path)
        return dict(msgspec.json.decode(body)) if status == 200 else {}


def get(port: int, path: str, *, method: str = "GET") -> tuple[int, bytes]:
    """One HTTP request to 127.0.0.1: status and body; status 0 if there was no answer within a second."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_TIMEOUT_S)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def announced_port(output: Path, name: str = "port") -> int | None:
    """The port (`grpc_port`: gRPC's) in the JSON line that a predictor prints once it listens."""
    with contextlib.suppress(OSError, msgspec.DecodeError, KeyError, TypeError):
        first, newline, _rest = output.read_bytes().partition(b"\n")
        if newline:
            return int(msgspec.json.decode(first)[name])
    return None
