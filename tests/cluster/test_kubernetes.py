"""The conformance suite on the `kubernetes` engine, and what only a cluster does to a stage."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml

from radloop.engines import kubernetes
from radloop.engines.kubernetes import Options
from radloop.engines.kubernetes.cluster import Cluster, Gone
from radloop.engines.kubernetes.job import job
from radloop.errors import RunLocked
from radloop.pipeline import Builder, Node, Pipeline
from radloop.pipeline.records import RunResult
from radloop.stage.protocol import Event, Request
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import SECRET, EngineSuite, only

from .conftest import OWNER, kubectl

pytestmark = pytest.mark.cluster


class TestKubernetes(EngineSuite):
    name = "kubernetes"

    @pytest.fixture
    def home(self, tmp_path: Path, home: Path) -> Path:
        return home

    @pytest.fixture
    def engine(self, options: Options) -> Callable[..., RunResult]:
        return partial(kubernetes.run, options=options)


def in_pod(name: str, **changes: Any) -> Pipeline:
    """A pipeline of one stage that only the image holds."""
    node = Node(name=name, stage=f"cluster_stages:{name}", outputs={"made": s.Numbers.name}, **changes)
    return Pipeline(name="suite", nodes=(node,))


def with_(pipeline: Pipeline, **changes: Any) -> Pipeline:
    nodes = tuple(msgspec.structs.replace(node, **changes) for node in pipeline.nodes)
    return msgspec.structs.replace(pipeline, nodes=nodes)


def test_a_stage_has_no_rights_it_does_not_need(home: Path, options: Options) -> None:
    """A stage that reads hostile DICOM must find nothing to take over: no root, capability, token or writable place."""
    result = kubernetes.run(in_pod("look"), home=home, options=options)
    assert result.status == "succeeded", result.message
    told = result.output("look.made").json("numbers.json")
    assert isinstance(told, dict)
    assert told["Uid"].split() == [str(OWNER)] * 4
    assert told["Gid"].split() == [str(OWNER)] * 4
    assert (told["CapEff"], told["CapBnd"], told["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert told["Seccomp"] == "2"  # a filter
    assert told["writable"] == ["/dev/shm", "/tmp", str(home)]
    assert not told["account"]
    assert told["pid"] != 1
    left = Path(result.outputs["look.made"])
    assert left.stat().st_uid == OWNER


def test_the_root_file_system_is_read_only(home: Path, options: Options) -> None:
    """What a stage leaves in its image's folders is gone with the pod, or worse, is run by the next."""
    result = kubernetes.run(in_pod("trespass"), home=home, options=options)
    assert result.status == "failed"
    assert "Read-only file system" in result.message
    assert "in trespass" in result.message


def test_memory_limit(home: Path, options: Options) -> None:
    """'exit code 137' does not say that the stage needs more memory."""
    pipeline = in_pod("swell", resources={"memory": "256Mi"}, timeout_s=120.0)
    result = kubernetes.run(pipeline, home=home, options=options)
    assert result.status == "failed"
    assert "OOMKilled: it used more than its memory limit of 256Mi" in result.message
    assert b"OOMKilled" in (home / "runs" / result.run_id / "swell/result.json").read_bytes()


def test_an_image_that_is_not_there(home: Path, options: Options, jobs: Callable[[], list[str]]) -> None:
    """A typo in an image's tag must not wait for ever in ImagePullBackOff."""
    began = time.monotonic()
    wrong = msgspec.structs.replace(options, image="localhost/radloop-core:typo")
    result = kubernetes.run(only(s.numbers), home=home, options=wrong)
    assert result.status == "failed"
    assert "the image localhost/radloop-core:typo cannot be had" in result.message
    assert "correct [kubernetes] image" in result.message
    assert time.monotonic() - began < 100
    assert_gone(jobs)


def test_an_image_without_radloop(home: Path, options: Options) -> None:
    """The image of something else says so at once."""
    other = msgspec.structs.replace(options, image="localhost/coredns:local")
    result = kubernetes.run(only(s.numbers), home=home, options=other)
    assert result.status == "failed"
    assert '"radloop": executable file not found' in result.message


def test_no_node_has_what_a_stage_asks_for(home: Path, options: Options) -> None:
    """A stage that asks for a GPU where there is none waits for ever in Pending, and nobody knows why."""
    events: list[Event] = []
    pipeline = with_(only(s.numbers), resources={"cpu": "64"})
    impatient = msgspec.structs.replace(options, wait_s=6.0)
    result = kubernetes.run(pipeline, home=home, options=impatient, emit=events.append)
    assert result.status == "failed"
    assert "did not start within 6 s" in result.message
    assert "Insufficient cpu" in result.message
    assert sum("Insufficient cpu" in event.message for event in events if event.event == "log") == 1


def test_a_folder_that_the_node_does_not_have(home: Path, options: Options) -> None:
    """On a node without the project's share, the pod never leaves ContainerCreating."""
    astray = msgspec.structs.replace(options, host_path="/nowhere/project", wait_s=20.0)
    result = kubernetes.run(only(s.numbers), home=home, options=astray)
    assert result.status == "failed"
    assert "/nowhere/project is not a directory" in result.message


def test_a_secret_is_nowhere_but_in_the_secret(home: Path, options: Options) -> None:
    """A value in a Job's specification can be read by everyone who may list Jobs."""
    seen: list[str] = []

    def look(event: Event) -> None:
        if event.event == "log" and "characters" in event.message:
            seen.append(kubectl("-n", options.namespace, "get", "jobs,pods,events", "-o", "yaml"))
            pod = kubectl(
                "-n", options.namespace, "get", "pods", "-l", "radloop.dev/stage=whisper", "-o", "name"
            ).strip()
            seen.append(kubectl("-n", options.namespace, "logs", pod))

    result = kubernetes.run(only(s.whisper), home=home, options=options, emit=look)
    assert result.status == "succeeded", result.message
    assert "secretKeyRef" in seen[0]
    assert f"the secret has {len(SECRET)} characters" in seen[1]
    assert SECRET not in "".join(seen)


def test_a_secret_without_the_key(home: Path, options: Options) -> None:
    """A key forgotten in the Secret is named, not searched for in events."""
    result = kubernetes.run(only(s.whisper, key="env:FORGOTTEN"), home=home, options=options)
    assert result.status == "failed"
    assert "couldn't find key FORGOTTEN in Secret" in result.message
    assert SECRET not in result.message


@pytest.mark.parametrize("what", ["job", "pod"])
def test_deleted_from_outside(home: Path, options: Options, what: str) -> None:
    """Someone tidies the namespace, a node is drained: the run must end, not hang."""

    def tidy(event: Event) -> None:
        if event.event == "started":
            kubectl("-n", options.namespace, "delete", what, "-l", "radloop.dev/stage=linger", "--wait=false")

    began = time.monotonic()
    result = kubernetes.run(only(s.linger, seconds=120), home=home, options=options, emit=tidy)
    assert result.status == "failed"
    assert "deleted from outside" in result.message
    assert time.monotonic() - began < 100


def test_interrupt_deletes_the_jobs(home: Path, options: Options, jobs: Callable[[], list[str]]) -> None:
    """After Ctrl-C a training of eight hours must not go on where nobody looks."""
    b = Builder("suite")
    b.add(s.linger, seconds=120)
    b.add(s.numbers)

    def interrupt(event: Event) -> None:
        if event.node == "numbers" and event.event == "closed":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        kubernetes.run(b.build(), home=home, options=options, emit=interrupt)
    assert time.monotonic() - began < 100
    assert_gone(jobs)


def test_nothing_is_left_behind(home: Path, options: Options, jobs: Callable[[], list[str]]) -> None:
    """Thousands of finished Jobs slow a cluster down, and hold its users' quota."""
    assert kubernetes.run(only(s.numbers), home=home, options=options).status == "succeeded"
    assert kubernetes.run(only(s.refuse), home=home, options=options).status == "failed"
    assert_gone(jobs)


def test_the_same_try_again_takes_the_first_ones_place(home: Path, options: Options) -> None:
    """A worker that is killed and started again must not run a stage beside itself."""
    with closing(Cluster(options)) as cluster:
        take_place(cluster, home, options)


def take_place(cluster: Cluster, home: Path, options: Options) -> None:
    node = only(s.linger).nodes[0]
    request = Request(stage=node.stage, node=node.name, pipeline="suite", run_id="resumed", home=str(home))
    body = job(node, request, home / "runs/resumed/linger", options)
    first = cluster.create(body)
    second = cluster.create(body)
    try:
        assert first != second
        assert cluster.job(body["metadata"]["name"]).metadata.uid == second
    finally:
        cluster.delete(body["metadata"]["name"])
    cluster.delete(body["metadata"]["name"])  # and what is gone need not be deleted
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            cluster.job(body["metadata"]["name"])
            time.sleep(0.2)
        except Gone:
            return
    pytest.fail("the Job is still there")


def test_a_client_that_is_killed(home: Path, options: Options) -> None:
    """A laptop's battery dies in the middle of a training. The Job goes on, nobody starts a second one beside it, and what
    it makes is not made again.
    """
    script = (
        "import sys, msgspec; from pathlib import Path; from radloop.engines import kubernetes\n"
        "from radloop.testing import suite_stages as s; from radloop.testing.engine_suite import only\n"
        "options = msgspec.json.decode(sys.argv[2], type=kubernetes.Options)\n"
        "kubernetes.run(only(s.linger), home=Path(sys.argv[1]), options=options, emit=lambda e: print(e.event, flush=True))"
    )
    command = [sys.executable, "-c", script, str(home), msgspec.json.encode(options).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        while client.stdout.readline() != b"started\n":
            assert client.poll() is None
        client.kill()
    (run,) = (home / "runs").glob("*-*")
    with pytest.raises(RunLocked, match=f"run {run.name}, process"):
        kubernetes.run(only(s.linger), home=home, options=options)
    until = time.monotonic() + 60
    while not (run / "linger/result.json").exists() and time.monotonic() < until:
        time.sleep(0.5)
    time.sleep(1)
    again = kubernetes.run(only(s.linger), home=home, options=options)
    assert again.status == "succeeded", again.message
    assert again.results["linger"].cached


class Proxy:
    """Forwards to the API, and can be cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.cut, self._pairs = target, False, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if self.cut:
                near.close()
                continue
            far = socket.create_connection(self.target)
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            hang_up(end)

    def drop(self) -> None:
        """Cut every connection, and refuse new ones."""
        self.cut = True
        for end in self._pairs:
            hang_up(end)

    def close(self) -> None:
        self.drop()
        self._server.close()


def hang_up(end: socket.socket) -> None:
    """End a connection, whoever waits on it."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[tuple[Proxy, str]]:
    """Return a way to the API that can be cut, and the kubeconfig that takes it."""
    config = yaml.safe_load(kubectl("config", "view", "--raw", "--flatten"))
    address = urlsplit(config["clusters"][0]["cluster"]["server"])
    proxy = Proxy((str(address.hostname), address.port or 443))
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{proxy.port}"
    config["clusters"][0]["cluster"]["tls-server-name"] = address.hostname
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield proxy, str(path)
    proxy.close()


def test_an_api_that_is_away_for_a_moment(home: Path, options: Options, proxy: tuple[Proxy, str]) -> None:
    """A control plane is upgraded in the middle of a training: the training goes on, and so does the run."""
    way, kubeconfig = proxy
    events: list[Event] = []

    def cut(event: Event) -> None:
        events.append(event)
        if event.event == "started" and not way.cut:
            way.drop()
            threading.Timer(8, setattr, (way, "cut", False)).start()

    pipeline = with_(only(s.linger), timeout_s=120.0)
    result = kubernetes.run(
        pipeline, home=home, options=msgspec.structs.replace(options, kubeconfig=kubeconfig), emit=cut
    )
    assert result.status == "succeeded", result.message
    assert [event.event for event in events if event.event != "log"] == ["started", "closed"]


def assert_gone(jobs: Callable[[], list[str]]) -> None:
    """Nothing that we made is left on the cluster, at most seconds later."""
    until = time.monotonic() + 60
    while (left := jobs()) and time.monotonic() < until:
        time.sleep(0.5)
    assert left == []
