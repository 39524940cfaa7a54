"""`radloop serve` where predictors run on a cluster: makes what KServe serves equal `serving/desired.json`, and keeps it so.

It reads and writes the same files as `supervisor`, so releases, roll-backs, the judge and `radloop status` know no difference. It
serves nothing itself: when it ends, pods and routes stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from radloop.errors import ServingError
from radloop.serving import manifests
from radloop.serving.apply import Cluster, Ends, move, unready
from radloop.serving.children import REFUSED_EXIT
from radloop.serving.desired import (
    Desired,
    ModelRef,
    Models,
    Observed,
    ObservedGateway,
    ObservedModel,
    Routing,
    State,
    desired,
    desired_mtime_ns,
    folder,
    supervising,
)
from radloop.serving.gateway import replace_json
from radloop.serving.manifests import Manifest, Mesh, Place

TICK_S = 1.0
_AGAIN_S = 30.0
"""How often everything is applied anew, should somebody have changed it."""


class Controller:
    """Drives one cluster for one home.

    Args:
        home: the project's home; `serving/` in it is used, and `predictions/` is where the pods write.
        place: where predictors run.
        cluster: the API.
        url: where clients reach the Gateway.
        mesh: what routes.

    `run` blocks until `stop` is called.
    """

    def __init__(self, home: Path, place: Place, cluster: Cluster, *, url: str, mesh: Mesh = "gateway") -> None:
        self.home, self._place, self._cluster, self._url, self._mesh = home.resolve(), place, cluster, url, mesh
        self._observed = folder(self.home) / "observed.json"
        self._desired, self._seen_ns = Desired(), 0
        self._applied: tuple[Desired, float] | None = None
        self._routed: list[Manifest] = []
        self._routing, self._generation = Routing(), 0
        self._stands_in = False  # the champion, for a challenger that is not Ready
        self._told: dict[str, Manifest] = {}
        self._ends: dict[str, Ends] = {}
        self._doors: dict[str, Door] = {}
        self._error: str | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask `run` to end. Safe in a signal handler."""
        self._stopping.set()

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Follow the desired state until `stop`; what the cluster refuses is reported and tried again.

        Args:
            on_ready: called once with the first report.

        Raises:
            ServingError: another process serves this home.
        """
        with supervising(self.home):
            log = self.home / "predictions"
            log.mkdir(exist_ok=True, mode=0o700)
            if os.geteuid() == 0:
                os.chown(log, self._place.user, self._place.group)
            try:
                while not self._stopping.is_set():
                    self._tick()
                    on_ready()
                    on_ready = _nothing
                    self._stopping.wait(TICK_S)
            finally:
                for door in self._doors.values():
                    door.close()

    def _tick(self) -> None:
        try:
            self._read_desired()
            self._apply()
            self._look()
            self._roll()
            self._error = None
        except ServingError as error:
            self._error = str(error)
        self._report()

    def _read_desired(self) -> None:
        written_ns = desired_mtime_ns(self.home)
        if written_ns != self._seen_ns:
            self._seen_ns, self._applied = written_ns, None
            self._desired = desired(self.home) or Desired()

    def _wanted(self) -> list[ModelRef]:
        models = self._desired.models
        return [ref for ref in (models.champion, models.challenger) if ref is not None]

    def _predictor(self, ref: ModelRef) -> Manifest:
        return manifests.inference_service(ref, self._place)

    def _apply(self) -> None:
        """Once a change, and now and then."""
        now = time.monotonic()
        if self._applied is None or now - self._applied[1] > _AGAIN_S:
            for ref in self._wanted():
                self._cluster.apply(self._predictor(ref))
            self._applied, self._routed = (self._desired, now), []

    def _look(self) -> None:
        self._told = {ref.model_digest: self._cluster.get(self._predictor(ref)) for ref in self._wanted()}
        self._ends = {
            ref.model_digest: self._cluster.ends(self._place.namespace, manifests.service_name(ref, self._place))
            for ref in self._wanted()
            if not self._is_ready(ref)
        }

    def _roll(self) -> None:
        """Bring the routes into effect once every desired predictor is Ready; then let go of those without routes.

        A challenger that is not Ready gets no share: the champion answers all, until it is Ready (again).
        """
        models, self._stands_in = self._desired.models, False
        if not all(self._is_ready(ref) for ref in self._wanted()):
            if models.champion is not None and models.challenger is not None and self._is_ready(models.champion):
                self._route(State(models=Models(champion=models.champion)))
                self._routing, self._stands_in = Routing(), True
            return
        if self._route(State(models=models, routing=self._desired.routing)):
            self._retire()
        self._routing, self._generation = self._desired.routing, self._desired.generation

    def _route(self, state: State) -> bool:
        """Whether routes had to change."""
        routes: list[Manifest] = []
        if state.models.champion is not None:
            routes = manifests.manifests(state, self._place, self._mesh)["routes.yaml"]
        if routes == self._routed:
            return False
        for route in routes:
            move(self._cluster, route)
        self._routed = routes
        return True

    def _retire(self) -> None:
        """Delete predictors that no route leads to any more: their pods finish what they have taken."""
        wanted = {manifests.service_name(ref, self._place) for ref in self._wanted()}
        for found in self._cluster.list_services(self._place.namespace, part_of=self._place.name):
            if found["metadata"]["name"] not in wanted:
                self._cluster.delete(found)

    def _is_ready(self, ref: ModelRef) -> bool:
        return not unready(self._told.get(ref.model_digest, {}))

    def _report(self) -> None:
        models = self._desired.models
        now = Observed(
            generation=self._generation,
            desired_mtime_ns=self._seen_ns,
            models=[
                self._observed_model(name, ref)
                for name, ref in (("champion", models.champion), ("challenger", models.challenger))
                if ref is not None
            ],
            routing=self._routing,
            gateway=ObservedGateway(None, self._error is None, 0, self._error, self._url),
            pid=os.getpid(),
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            error=self._error,
        )
        replace_json(self._observed, now)

    def _observed_model(self, name: str, ref: ModelRef) -> ObservedModel:
        why, ends = unready(self._told.get(ref.model_digest, {})), self._ends.get(ref.model_digest, Ends())
        error = (ends.said or why) if why else None
        if error and name == "challenger" and self._stands_in:
            first, *more = error.splitlines()
            error = "\n".join([f"{first}; the champion answers all meanwhile", *more])
        return ObservedModel(
            name=name,
            version=ref.version,
            digest=ref.model_digest,
            port=None if why else self._door(ref).port,
            ready=not why,
            restarts=ends.restarts,
            refused=bool(why) and ends.status == REFUSED_EXIT,
            last_error=error,
        )

    def _door(self, ref: ModelRef) -> Door:
        if ref.model_digest not in self._doors:
            service, namespace = manifests.service_name(ref, self._place), self._place.namespace
            self._doors[ref.model_digest] = Door(lambda: self._cluster.connect(namespace, service, manifests.PORT))
        return self._doors[ref.model_digest]


class Door:
    """A port of 127.0.0.1 that leads to a pod, past the Gateway: for a smoke test before any traffic."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def close(self) -> None:
        """Take no more; what is under way ends with the process."""
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._carry, args=(client,), name="door", daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client:
            try:
                pod = self._connect()
            except ServingError:
                return
            back = threading.Thread(target=_copy, args=(pod, client), name="door", daemon=True)
            back.start()
            _copy(client, pod)
            back.join()
            pod.close()


def _copy(source: Any, sink: Any) -> None:
    """Until either side ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _nothing() -> None:
    pass
