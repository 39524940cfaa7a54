"""The one process behind `radloop serve`: makes what is served equal `serving/desired.json`, and keeps it so.

Well-kept supervisors were looked at and do not fit: supervisord and circus change their set of processes by commands
over a socket of their own and know "running", not "ready to answer"; honcho never restarts; none ends its children when
it is killed itself. Here the set follows a file, routes follow readiness, and the kernel ends the children.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from radloop.errors import ServingError
from radloop.serving import gateway
from radloop.serving.children import Child, Envoy, Predictor, announced_port
from radloop.serving.desired import (
    Desired,
    ModelRef,
    Observed,
    ObservedGateway,
    ObservedModel,
    Routing,
    desired,
    desired_mtime_ns,
    folder,
    supervising,
)
from radloop.serving.gateway import Routes, Upstream, replace_json
from radloop.serving.pool import Pool

LOG = logging.getLogger(__name__)
TICK_S = 0.1
ENVOY_TIMEOUT_S = 10.0
LINGER_S = 1.0
_BUSY_PORT_PATIENCE_S = 3.0  # a former gateway that was killed a moment ago may still be going


class Supervisor:
    """Runs predictors and Envoy for one home.

    Args:
        home: the project's home; `serving/` and `predictions/` in it are used.
        gateway_port: where Envoy listens on `host`; 0 lets the system choose (observed.json says which).
        key_file: the project key, for the predictors' pseudonyms.
        token_file: holds the bearer token that predictors ask for; None asks for none.
        admin_port: Envoy's admin interface, always on 127.0.0.1; 0 lets the system choose.
        host: the address Envoy binds; predictors are on 127.0.0.1 always.
        pools: MLflow's servers, run by others, that get a port of the gateway of their own.

    `run` blocks until `stop` is called (from a signal handler or another thread). The thread that runs must live as
    long as the children shall (`process`).
    """

    def __init__(
        self,
        home: Path,
        *,
        gateway_port: int,
        key_file: Path,
        token_file: Path | None = None,
        admin_port: int = 0,
        host: str = "127.0.0.1",
        model_name: str = "default",
        pools: Sequence[Pool] = (),
    ) -> None:
        self.home = home.resolve()
        self._place = folder(self.home)
        self._logs, config = self._place / "logs", self._place / "envoy"
        for path in (self._logs, config):
            path.mkdir(exist_ok=True, mode=0o700)
        self._key_file = key_file.resolve()
        self._token_file = None if token_file is None else token_file.resolve()
        self._model_name = model_name
        self._envoy = Envoy(config=config, host=host, port=gateway_port, admin_port=admin_port, pools=tuple(pools))
        self._gateway = Child("envoy", self._envoy, self._logs, logs_on_stdout=True)
        self._predictors: dict[str, Child] = {}
        self._retired: list[tuple[float, Child]] = []
        self._desired = Desired()
        self._seen_ns = 0
        self._error: str | None = None
        self._routes = Routes(model_name=model_name)
        self._routing = Routing()
        self._generation = 0
        self._revision = 0
        self._reported: tuple[Observed, float] | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask `run` to end. Safe in a signal handler."""
        self._stopping.set()

    def run(self, on_ready: Callable[[int], None] | None = None) -> None:
        """Serve until `stop`.

        Args:
            on_ready: called once with the gateway's port when it takes requests (503 while no model is released).

        Raises:
            ServingError: another supervisor is there; the port is busy; Envoy is not installed.
        """
        gateway.envoy_path()
        with supervising(self.home):
            for port in (self._envoy.port, *(pool.port for pool in self._envoy.pools)):
                _check_port(self._envoy.host, port)
            self._write_config(self._routes)
            try:
                while not self._stopping.is_set():
                    self._tick()
                    if on_ready is not None and self._gateway.ready and self._gateway.port is not None:
                        on_ready(self._gateway.port)
                        on_ready = None
                    self._stopping.wait(TICK_S)
            finally:
                self._end()

    def _tick(self) -> None:
        self._read_desired()
        self._gateway.tend()
        if self._gateway.ready and self._gateway.port:
            self._envoy.port = self._gateway.port  # should it have to be started again, clients find it where it was
        for digest, ref in self._wanted().items():
            if digest not in self._predictors:
                self._predictors[digest] = self._predictor(ref)
        for child in self._predictors.values():
            child.tend()
        self._roll()
        self._retire()
        self._report()

    def _read_desired(self) -> None:
        """Once a change. Predictors that refused, or wait before another start, are tried at once."""
        written_ns = desired_mtime_ns(self.home)
        if written_ns == self._seen_ns:
            return
        self._seen_ns = written_ns
        for child in self._predictors.values():
            child.try_again()
        try:
            self._desired = desired(self.home) or Desired()
            self._error = None
        except ServingError as error:
            self._error = str(error)

    def _wanted(self) -> dict[str, ModelRef]:
        models = self._desired.models
        return {ref.model_digest: ref for ref in (models.champion, models.challenger) if ref is not None}

    def _predictor(self, ref: ModelRef) -> Child:
        program = Predictor(
            package=self.home / ref.package,
            version=ref.version,
            model_digest=ref.model_digest,
            model_name=self._model_name,
            predictions=self.home / "predictions",
            key_file=self._key_file,
            token_file=self._token_file,
        )
        return Child(f"predictor-{ref.model_digest[:16]}", program, self._logs)

    def _roll(self) -> None:
        """Bring the routes into effect once every desired predictor is ready; until then the present ones stay.

        Clusters come before the routes that use them, and go after.
        """
        wanted = self._wanted()
        if not self._gateway.ready or not all(self._predictors[digest].ready for digest in wanted):
            return
        routes = self._target()
        if routes != self._routes:
            both = self._apply_clusters(self._routes, routes)
            if not (both and self._apply_routes(routes) and self._apply_clusters(routes)):
                return
            self._routes = routes
            LOG.info(
                "%s %d %%: champion %s, challenger %s", routes.strategy, routes.percent, *map(_named, _both(routes))
            )
        self._routing, self._generation = self._desired.routing, self._desired.generation
        for digest in [digest for digest in self._predictors if digest not in wanted]:
            self._retired.append((time.monotonic() + LINGER_S, self._predictors.pop(digest)))

    def _target(self) -> Routes:
        models, routing = self._desired.models, self._desired.routing
        return Routes(
            champion=self._upstream(models.champion),
            challenger=self._upstream(models.challenger),
            strategy=routing.strategy,
            percent=routing.percent,
            model_name=self._model_name,
        )

    def _upstream(self, ref: ModelRef | None) -> Upstream | None:
        port = None if ref is None else self._predictors[ref.model_digest].port
        if ref is None or port is None:
            return None
        grpc_port = announced_port(self._predictors[ref.model_digest].output, "grpc_port")
        return Upstream(model_digest=ref.model_digest, version=ref.version, port=port, grpc_port=grpc_port)

    def _apply_clusters(self, *several: Routes) -> bool:
        version = self._next_version()
        gateway.write_clusters(self._envoy.config, version, *several)
        last = {up.cluster for up in (several[-1].champion, several[-1].challenger) if up is not None}
        return self._await(lambda: self._envoy.in_effect()[0] == version and last <= self._envoy.healthy(), "clusters")

    def _apply_routes(self, routes: Routes) -> bool:
        version = self._next_version()
        gateway.write_routes(self._envoy.config, version, routes)
        return self._await(lambda: self._envoy.in_effect()[1] == version, "routes")

    def _await(self, reached: Callable[[], bool], what: str) -> bool:
        until = time.monotonic() + ENVOY_TIMEOUT_S
        while time.monotonic() < until and not self._stopping.is_set():
            if reached():
                self._error = None
                return True
            if self._gateway.exited():
                break
            time.sleep(0.02)
        self._error = f"Envoy did not take the new {what}; see serving/logs/envoy.err"
        return False

    def _next_version(self) -> str:
        self._revision += 1
        return f"{self._desired.generation}.{self._revision}"

    def _write_config(self, routes: Routes) -> None:
        gateway.write_clusters(self._envoy.config, self._next_version(), routes)
        gateway.write_routes(self._envoy.config, self._next_version(), routes)

    def _retire(self) -> None:
        """Predictors without routes end after a moment, in which requests under way come to their end."""
        now = time.monotonic()
        for at, child in self._retired:
            if now >= at:
                child.terminate()
        self._retired = [(at, child) for at, child in self._retired if now < at or not child.gone()]

    def _report(self) -> None:
        """Write observed.json when something changed, and once a second as a sign of life."""
        models, made = self._desired.models, []
        for name, ref in (("champion", models.champion), ("challenger", models.challenger)):
            if ref is not None:
                made.append(_observed_model(name, ref, self._predictors[ref.model_digest]))
        child = self._gateway
        now = Observed(
            generation=self._generation,
            desired_mtime_ns=self._seen_ns,
            models=made,
            routing=self._routing,
            gateway=ObservedGateway(child.port, child.ready, child.restarts, child.last_error),
            pid=os.getpid(),
            at="",
            error=self._error,
        )
        if self._reported is None or self._reported[0] != now or time.monotonic() - self._reported[1] >= 1:
            stamped = msgspec.structs.replace(now, at=datetime.now(UTC).isoformat(timespec="milliseconds"))
            replace_json(self._place / "observed.json", stamped)
            self._reported = (now, time.monotonic())

    def _end(self) -> None:
        """Close the gateway to new requests, let those under way finish, then end every child."""
        if self._gateway.ready:
            self._envoy.drain(timeout_s=5.0)
        children = [self._gateway, *self._predictors.values(), *(child for _at, child in self._retired)]
        for child in children:
            child.terminate()
        while children := [child for child in children if not child.gone()]:
            time.sleep(0.02)
        self._report()


def _both(routes: Routes) -> tuple[Upstream | None, Upstream | None]:
    return routes.champion, routes.challenger


def _named(upstream: Upstream | None) -> str:
    return "none" if upstream is None else f"version {upstream.version} ({upstream.model_digest[:16]})"


def _observed_model(name: str, ref: ModelRef, child: Child) -> ObservedModel:
    return ObservedModel(
        name=name,
        version=ref.version,
        digest=ref.model_digest,
        port=child.port if child.ready else None,
        ready=child.ready,
        restarts=child.restarts,
        refused=child.refused,
        last_error=child.last_error,
    )


def _check_port(host: str, port: int) -> None:
    """Fail early and clearly on a busy port; Envoy's own words would be in a log."""
    until = time.monotonic() + _BUSY_PORT_PATIENCE_S
    while port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise ServingError(
                        "the gateway's port cannot be bound",
                        expected=f"{host}:{port} to be free",
                        got=error.strerror,
                        next_step="end what listens there, or choose another gateway port (0: any free one)",
                    ) from None
        time.sleep(0.1)
