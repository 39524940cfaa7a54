"""Runs one stage as a Job, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from radloop.engines.kubernetes.cluster import Cluster, Gone, NoAnswer, Object, Told
from radloop.engines.kubernetes.job import NAME, Options, image_of, job
from radloop.errors import EngineError
from radloop.pipeline import Node
from radloop.stage.execute import Emit
from radloop.stage.launch import write_whole
from radloop.stage.protocol import STATUS, Event, Request, Result, encode
from radloop.stage.store import sweep

_POLL_S = 0.4
# A cluster's control plane, or a file system, may be away for so long in the middle of a run.
_PATIENCE_S = 90.0
_TAIL_LINES = 30
# Why a container does not start that waiting will not mend.
_NO_IMAGE = {"ErrImageNeverPull", "ImageInspectError", "ImagePullBackOff", "InvalidImageName"}
_HOPELESS = _NO_IMAGE | {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


class _Ended(msgspec.Struct, frozen=True):
    """How a Job ended: `why` it says nothing, or its process's exit code."""

    why: str = ""
    exit_code: int = 0


class Jobs:
    """Runs each stage as a Job."""

    name = NAME

    def __init__(self, cluster: Cluster, home: Path, options: Options) -> None:
        self.cluster, self.home, self.options = cluster, home, options
        self._live: set[str] = set()
        self._stopped = threading.Event()

    def external(self, node: Node) -> bool:
        """Always."""
        return True

    def end(self) -> None:
        """Delete every Job that is under way; for Ctrl-C."""
        self._stopped.set()
        for name in list(self._live):
            self._drop(name)

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        """Run one try. A Job that cannot be made, does not start or leaves no result has failed; result.json says so."""
        began = time.perf_counter()
        try:
            result = self._try(node, request, folder, emit)
        except (EngineError, OSError) as error:
            result = Result(status="failed", node=node.name, message=str(error), error="EngineError")
        if result.status == "failed":
            sweep(self.home)
            if not result.seconds:
                result = msgspec.structs.replace(result, seconds=round(time.perf_counter() - began, 6))
        return result

    def _try(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        body = job(node, request, folder, self.options)
        name = body["metadata"]["name"]
        write_whole(folder / "request.json", encode(request))
        (folder / "result.json").unlink(missing_ok=True)
        _hand_over(self.home, folder, request.pipeline)
        self._live.add(name)
        try:
            output = _Output(node.name, folder / "stderr.log", emit)
            with contextlib.closing(output):
                ended = self._follow(node, self.cluster.create(body), name, output)
        finally:
            self._drop(name)
        if not ended.why and ended.exit_code in STATUS:
            return self._result(node, folder, ended, output)
        return _failed(node, ended.why or f"the stage's process was ended{output.tail()}")

    def _drop(self, name: str) -> None:
        """Delete a Job; where the API does not answer, the cluster does it when its time has come."""
        with contextlib.suppress(EngineError):
            self.cluster.delete(name)
            self._live.discard(name)

    def _result(self, node: Node, folder: Path, ended: _Ended, output: _Output) -> Result:
        """What the stage says itself. result.json is written after the closing event: with it, that event was sent."""
        until = time.monotonic() + (_PATIENCE_S if output.closed else 0)  # a network's file system may show it late
        while True:
            try:
                result = msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)
                break
            except (OSError, msgspec.MsgspecError) as error:
                if time.monotonic() < until:
                    time.sleep(_POLL_S)
                elif output.closed:
                    return _failed(node, f"the stage closed but left no readable result: {error}")
                else:
                    told = f"the stage's process exited {ended.exit_code} without its closing event"
                    return _failed(node, told + output.tail())
        if result.status != STATUS[ended.exit_code]:
            told = f"exit {ended.exit_code}, result {result.status}"
            return _failed(node, f"the stage's exit and result disagree: {told}")
        output.close_with(result)
        return result

    def _follow(self, node: Node, uid: str, name: str, output: _Output) -> _Ended:
        """Pass a Job's output on until it has ended. Raises EngineError where the API stays away."""
        began, silent_since, seen = time.monotonic(), None, False
        while True:
            if self._stopped.is_set():
                return _Ended(why="the run was interrupted")
            try:
                pod = self.cluster.pod(uid)
                ended = self._look(node, name, pod, output, seen=seen, waited=time.monotonic() - began)
                silent_since = None
                seen = seen or pod is not None
            except NoAnswer:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _PATIENCE_S:
                    raise
                ended = None
            if ended is not None:
                return ended
            time.sleep(_POLL_S)

    def _look(
        self, node: Node, name: str, pod: Object | None, output: _Output, *, seen: bool, waited: float
    ) -> _Ended | None:
        """Look at a Job once; how it ended, if it has."""
        if pod is None:
            return self._without_pod(node, name, output, seen=seen, waited=waited)
        if pod.container.running is not None or pod.over:
            with contextlib.closing(self.cluster.log(pod.metadata.name)) as log:
                output.read(log)
        if pod.over:
            return _ended(node, pod, output, image_of(node, self.options))
        if pod.container.running is None and pod.container.terminated is None:
            return self._waiting(node, name, pod, output, waited)
        return None

    def _without_pod(self, node: Node, name: str, output: _Output, *, seen: bool, waited: float) -> _Ended | None:
        try:
            failed = self.cluster.job(name).condition("Failed")
        except Gone:
            return _Ended(why=f"the Job {name} was deleted from outside while the stage ran{output.tail()}")
        if failed is not None:
            told = "its pod was deleted from outside" if seen else f"{failed.reason}: {failed.message}"
            return _Ended(why=f"the Job {name} failed: {told}{output.tail()}")
        return None if seen else self._patience(name, self.cluster.complaint(name) or "no pod yet", output, waited)

    def _waiting(self, node: Node, name: str, pod: Object, output: _Output, waited: float) -> _Ended | None:
        """A pod that has not started: why, and whether to go on waiting."""
        told = pod.container.waiting or Told()
        if told.reason in _HOPELESS:
            image = image_of(node, self.options)
            what = (
                f"the image {image} cannot be had" if told.reason in _NO_IMAGE else "the stage's container cannot start"
            )
            setting = "image" if node.environment == "core" else f"images.{node.environment}"
            step = f"push it where the nodes find it, or correct [kubernetes] {setting}"
            step = step if told.reason in _NO_IMAGE else f"kubectl -n {self.cluster.namespace} get events"
            return _Ended(why=str(EngineError(what, got=f"{told.reason}: {told.message}", next_step=step)))
        unscheduled = pod.condition("PodScheduled", "False")
        said = f"{unscheduled.reason}: {unscheduled.message}" if unscheduled else told.reason
        if not unscheduled and waited > 5:  # what keeps a volume or an image away is told in events only
            said = self.cluster.complaint(pod.metadata.name) or said
        return self._patience(name, said or "Pending", output, waited)

    def _patience(self, name: str, said: str, output: _Output, waited: float) -> _Ended | None:
        if waited > self.options.wait_s:
            error = EngineError(
                f"the stage did not start within {self.options.wait_s:g} s",
                got=said,
                next_step="free or add what is missing, ask for less (resources), or raise [kubernetes] wait_s",
            )
            return _Ended(why=str(error))
        if waited > 2:
            output.say_once(f"waits: {said}")
        return None


def _ended(node: Node, pod: Object, output: _Output, image: str) -> _Ended:
    """How a pod that is over has ended."""
    told = pod.container.terminated or Told()
    memory = node.resources.get("memory")
    if pod.status.reason == "DeadlineExceeded":
        return _Ended(why=f"the stage was ended after its limit of {node.timeout_s or 0:g} s")
    if pod.status.reason:
        return _Ended(why=f"the pod was ended by the cluster: {pod.status.reason}: {pod.status.message}")
    if told.reason == "OOMKilled":
        limit = f"its memory limit of {memory}" if memory else "what its node has"
        return _Ended(why=f"the stage was OOMKilled: it used more than {limit}; raise the stage's resources")
    if disrupted := pod.condition("DisruptionTarget"):
        return _Ended(why=f"the pod was ended by the cluster: {disrupted.reason}: {disrupted.message}")
    if pod.metadata.deletion_timestamp and told.exit_code not in STATUS:
        return _Ended(why=f"the pod was deleted from outside while the stage ran{output.tail()}")
    if pod.container.terminated is None:
        return _Ended(why="the pod was ended before its container started")
    if told.exit_code in STATUS:
        return _Ended(exit_code=told.exit_code)
    if told.reason == "StartError":
        return _Ended(why=f"the image {image} does not start the stage: {told.message}")
    if 0 < (number := told.exit_code - 128) < signal.NSIG:
        return _Ended(why=f"the stage's process was killed by {_signal(number)}{output.tail()}")
    return _Ended(why=f"the stage's process exited {told.exit_code} without its closing event{output.tail()}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failed(node: Node, message: str) -> Result:
    return Result(status="failed", node=node.name, message=message, error="EngineError")


class _Output:
    """What a stage's pod says: events passed on, all else shown as log lines and kept.

    Kubernetes mixes what goes to stdout with what goes to stderr; an event is known by its form and its stage's name.
    """

    def __init__(self, node: str, kept: Path, emit: Emit) -> None:
        self.node, self.emit, self.closed = node, emit, False
        self._file = kept.open("wb", buffering=0)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._lines, self._said = 0, ""

    def close(self) -> None:
        """Close the file of what is no event."""
        self._file.close()

    def read(self, log: Iterator[bytes]) -> None:
        """Read a log from its beginning, and pass on what is new in it."""
        for number, line in enumerate(log):
            if number >= self._lines:
                self._lines = number + 1
                self._pass(line)

    def _pass(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=Event)
        except msgspec.MsgspecError:
            event = None
        if event is not None and event.node == self.node:
            self.closed = self.closed or event.event == "closed"
            self.emit(event)
            return
        self._file.write(line + b"\n")
        text = line.decode(errors="replace").rstrip()
        self._tail.append(text)
        if text:
            self.emit(Event(event="log", node=self.node, at=time.time(), message=text[:500]))

    def say_once(self, message: str) -> None:
        """Tell who watches, unless that was the last thing told."""
        if message != self._said:
            self._said = message
            self.emit(Event(event="log", node=self.node, at=time.time(), message=message))

    def close_with(self, result: Result) -> None:
        """Pass on the closing event that was lost with the end of a log."""
        if not self.closed:
            told = "unchanged" if result.cached else result.message
            self.emit(Event(event="closed", node=self.node, at=time.time(), status=result.status, message=told))

    def tail(self) -> str:
        """The end of what was no event, for an error."""
        told = "\n".join(self._tail).strip()
        return f"; the end of its output:\n{told}" if told else ""


def _hand_over(home: Path, folder: Path, pipeline: str) -> None:
    """Give what root has made for a run to the project's owner, as whom the pods run."""
    if os.geteuid() != 0:
        return
    runs, owner = home / "runs", home.stat()
    (home / "artifacts").mkdir(exist_ok=True)
    between = [place for place in folder.parents if place.is_relative_to(runs)]
    for place in [home / "artifacts", runs / f".{pipeline}.lock", *between, folder, *folder.iterdir()]:
        if place.exists() and place.stat().st_uid == 0:
            os.chown(place, owner.st_uid, owner.st_gid)
