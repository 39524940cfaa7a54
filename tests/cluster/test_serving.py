"""A release on KServe, through the cluster's own Gateway, as a user who has one role, in a namespace that is restricted.

Needs the cluster's KServe and Contour (`addon kserve`) and RADLOOP_TEST_SERVING_IMAGE: deploy/images/core with
EXTRAS="pixels serve" or more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from radloop.cli.init import make_project
from radloop.errors import ServingError
from radloop.learning.package import Packaged
from radloop.serving import apply, client, judge, manifests, predictions, rollout
from radloop.serving.desired import ModelRef, Models, Routing, State, desire
from radloop.serving.gateway import CHALLENGER_HEADER, MODEL_HEADER, SUBJECT_HEADER
from radloop.serving.manifests import Place

from .conftest import OWNER, allow, kubectl, restricted_namespace

IMAGE = os.environ.get("RADLOOP_TEST_SERVING_IMAGE", "")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not IMAGE, reason="RADLOOP_TEST_SERVING_IMAGE names no image with radloop's serving parts"),
]
HOST = "radloop.example"
INFER = "/v2/models/default/infer"
RESOURCES = {"requests": {"cpu": "100m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
TOML = """
[release]
clinical_canary = true
[serve]
token = "file:serve.token"
[serve.kserve]
gateway = "projectcontour/contour"
url = "http://{host}"
resources = {{requests = {{cpu = "100m", memory = "200Mi"}}, limits = {{cpu = "1", memory = "1Gi"}}}}
[kubernetes]
image = "{image}"
secret = "radloop"
claim = "project"
namespace = "{namespace}"
kubeconfig = "{kubeconfig}"
"""

_spec = importlib.util.spec_from_file_location(
    "serving_packages", Path(__file__).parents[1] / "unit/serving/packages.py"
)
assert _spec is not None
assert _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)
HEADERS = {"Host": HOST, "Authorization": f"Bearer {packages.TOKEN}"}


class Served:
    """A project, its models (2 contradicts 1, 3 agrees with it), and the cluster that serves them."""

    def __init__(self, home: Path, namespace: str, kubeconfig: Path) -> None:
        self.home, self.namespace, self.kubeconfig = home, namespace, kubeconfig
        made = []
        for version, weight in (("1", 4.0), ("2", -4.0), ("3", 4.1)):
            package = f"artifacts/{version}/package"
            key = bytes.fromhex((home / "radloop.key").read_text())
            made.append(ModelRef(package, version, packages.build(home / package, weight=weight, key=key)))
        self.champion, self.challenger, self.better = made
        self.both = Models(champion=self.champion, challenger=self.challenger)
        self.single = State(models=Models(champion=self.champion))
        address = kubectl("-n", "projectcontour", "get", "service", "envoy", "-o", "jsonpath={.spec.clusterIP}")
        self.address, self.url = address, f"http://{address}"
        self.place = Place(
            image=IMAGE, secret="radloop", token="serve.token", gateway="projectcontour/contour", hosts=(HOST,),
            claim="project", namespace=namespace, user=OWNER, group=OWNER, resources=RESOURCES,
        )  # fmt: skip

    def configure(self, host: str) -> None:
        """Write radloop.toml, with the name or the address that clients have of the Gateway."""
        told = TOML.format(host=host, image=IMAGE, namespace=self.namespace, kubeconfig=self.kubeconfig)
        (self.home / "radloop.toml").write_text(told)

    def route(self, state: State, **changed: Any) -> None:
        """Bring a state onto the cluster, and wait until the Gateway has heard of it."""
        files = manifests.manifests(state, msgspec.structs.replace(self.place, **changed))
        apply.release(apply.Cluster(str(self.kubeconfig)), *files.values(), timeout_s=120)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=HEADERS, timeout=30)

    def ask(self, n: int, **headers: str) -> Counter[str]:
        """Versions that answered `n` requests, and statuses of what was no answer."""
        with self.client() as session:
            return Counter(version_of(session.post(INFER, content=QUESTION, headers=headers)) for _ in range(n))

    def logged(self) -> int:
        """Rows of the prediction log, once all are written."""
        time.sleep(1)
        return sum(1 for _ in predictions.read(self.home / "predictions", status="ok"))

    def pods(self, version: str) -> list[str]:
        service = manifests.service_name(self.both.champion if version == "1" else self.both.challenger, self.place)  # type: ignore[arg-type]
        told = kubectl(
            *("-n", self.namespace, "get", "pods", "-l", f"serving.kserve.io/inferenceservice={service}"),
            *("-o", "jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}\n{end}"),
        )
        return told.split("\n")[:-1]


def tensor(n: int = 1) -> np.ndarray:
    return np.random.default_rng(n).random((n, 1, packages.SIZE, packages.SIZE), np.float32)


def question(images: np.ndarray) -> bytes:
    one = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [one]}).encode()


QUESTION = question(tensor())


def version_of(answer: httpx.Response) -> str:
    return str(answer.json()["model_version"]) if answer.status_code == 200 else str(answer.status_code)


class Load:
    """Four clients that ask without pause; `told` counts versions, statuses and broken connections."""

    def __init__(self, served: Served, questions: Sequence[tuple[bytes, dict[str, str]]] = ((QUESTION, {}),)) -> None:
        self.told: Counter[str] = Counter()
        self._served, self._stop, self._questions = served, threading.Event(), questions
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with self._served.client() as session:
            for content, headers in itertools.cycle(self._questions):
                if self._stop.wait(0.02):
                    break
                try:
                    self.told[version_of(session.post(INFER, content=content, headers=headers))] += 1
                except httpx.HTTPError as error:
                    self.told[type(error).__name__] += 1

    def more(self, n: int = 100) -> None:
        """Wait for `n` more answers."""
        until, wanted = time.monotonic() + 60, self.told.total() + n
        while self.told.total() < wanted:
            assert time.monotonic() < until, self.told
            time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return the project, with its Secret and its claim on the cluster and the role that we publish for this."""
    from radloop.stages.project import open_catalog

    folder = tmp_path_factory.mktemp("cluster-serving")
    home = folder / "home"
    make_project(home)
    (home / "serve.token").write_text(packages.TOKEN + "\n")
    (home / "predictions").mkdir(exist_ok=True, mode=0o700)
    with restricted_namespace(home, folder) as (namespace, kubeconfig):
        kubectl(
            *("-n", namespace, "create", "secret", "generic", "radloop"),
            *(f"--from-file={home}/radloop.key", f"--from-file={home}/serve.token"),
        )
        made = Served(home, namespace, kubeconfig)
        with pytest.raises(ServingError, match="cannot patch resource"):
            made.route(made.single)
        allow(namespace, "radloop-release")
        made.configure(HOST)
        with open_catalog(home) as catalog:
            catalog.add_dataset("d" * 64, path="datasets/d.parquet", members=[], actor="publish")
            for model in (made.champion, made.challenger):
                info = {"package": model.package, "package_digest": model.version * 64}
                catalog.add_model(
                    model.model_digest, dataset_digest="d" * 64, preprocessing_digest="p" * 64, version=model.version, info=info
                )  # fmt: skip
            catalog.ledger.append("release", made.champion.model_digest, {"step": "promoted"}, actor="release")
            catalog.ledger.append("approval", "2" * 64, {"role": "clinical", "why": "reviewed"}, actor="anna")
        for path in (home, *home.rglob("*")):
            os.chown(path, OWNER, OWNER)
        yield made


def exported(served: Served, *options: str) -> dict[str, Any]:
    """What `radloop export kserve --apply` says."""
    command = [sys.executable, "-m", "radloop.cli", "export", "kserve", str(served.home / "k8s"), *options]
    done = subprocess.run(
        [*command, "--apply", "--json", "--project", str(served.home)],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_shadow_canary_promotion_and_roll_back_by_the_command(served: Served) -> None:
    """Each patient meets the model that was approved for them, and the log says who answered and who was asked too."""
    champion, challenger = served.champion, served.challenger
    told = exported(served, "--champion", "1", "--challenger", "2")
    assert (told["strategy"], told["applied"]) == ("shadow", True)
    assert served.ask(50, **{MODEL_HEADER: "challenger", CHALLENGER_HEADER: "0" * 64}) == {"1": 50}
    time.sleep(2.5)
    pairs = predictions.pairs(served.home / "predictions", champion.model_digest, challenger.model_digest)
    assert len(pairs) == 50
    assert {(p.champion["served"], p.challenger and p.challenger["served"]) for p in pairs} == {(True, False)}

    exported(served, "--champion", "1", "--challenger", "2", "--strategy", "canary", "--percent", "25")
    assert served.ask(20, **{SUBJECT_HEADER: "2499"}) == {"2": 20}
    assert served.ask(20, **{SUBJECT_HEADER: "2500"}) == {"1": 20}
    assert served.ask(20, **{MODEL_HEADER: "challenger", SUBJECT_HEADER: "9999"}) == {"2": 20}
    by_patient = Counter[str]()
    for subject in range(0, 10_000, 50):
        by_patient += served.ask(1, **{SUBJECT_HEADER: str(subject)})
    assert by_patient == {"1": 150, "2": 50}
    by_chance = served.ask(400)
    assert set(by_chance) == {"1", "2"}
    assert 60 <= by_chance["2"] <= 140  # 100 expected; beyond 4.6 standard deviations

    exported(served, "--champion", "2", "--strategy", "single")
    assert served.ask(50) == {"2": 50}
    exported(served, "--champion", "1", "--strategy", "single")
    assert served.ask(50) == {"1": 50}


def test_the_numbers_are_the_local_predictors(served: Served) -> None:
    """A model that was validated here must be the one that answers there, by REST, by gRPC, and about a DICOM file."""
    served.route(served.single)
    images, package = tensor(3), Packaged(served.home / served.champion.package)
    here = [float(p) for p in package.predict_tensor(images)[0]]
    with served.client() as session:
        answer = session.post(INFER, content=question(images)).json()
        assert session.post(INFER, content=question(images), headers={"Authorization": ""}).status_code == 401
        assert session.get("/v2/health/ready", headers={"Host": "another.example"}).status_code == 404
    by_rest = {output["name"]: output["data"] for output in answer["outputs"]}["probability"]
    assert by_rest == pytest.approx(here, abs=1e-6)
    channel = [("grpc.default_authority", HOST)]
    with triton_grpc.InferenceServerClient(f"{served.address}:80", channel_args=channel) as grpc:
        asked = triton_grpc.InferInput("image", list(images.shape), "FP32")
        asked.set_data_from_numpy(images)
        told = grpc.infer("default", [asked], headers={"authorization": HEADERS["Authorization"]})
    assert told.as_numpy("probability").ravel() == pytest.approx(here, abs=1e-6)
    with httpx.Client(headers={"Host": HOST}) as session:
        said = client.predict_dicom(served.url, packages.dicom(4), site="A", token=packages.TOKEN, client=session)
    until = time.monotonic() + 60
    while (row := predictions.find(served.home / "predictions", said.id)) is None:
        assert time.monotonic() < until, "the prediction is not in the log"
        time.sleep(0.2)
    assert row["patient"] is not None and packages.CANARY_ID not in str(row)


def test_routes_change_under_load_without_a_failure(served: Served) -> None:
    """A release, and above all a roll-back, happens while studies come in."""
    served.route(served.single)
    with Load(served) as load:
        for state in (
            State(models=served.both, routing=Routing("shadow")),
            State(models=served.both, routing=Routing("canary", 50)),
            served.single,
            State(models=Models(champion=served.challenger, previous=served.champion)),
            served.single,
        ):
            served.route(state)
            load.more()
    print(f"changes of route: {dict(load.told)}")
    assert set(load.told) == {"1", "2"}


def test_a_pod_that_is_taken_away_is_not_felt(served: Served) -> None:
    """A node that is drained for an update ends its pods in order: they finish, others have taken over."""
    served.route(served.single, replicas=2)
    logged = served.logged()
    with Load(served) as load:
        victim = served.pods("1")[0].split()[0]
        kubectl("-n", served.namespace, "delete", "pod", victim)
        load.more(300)
    print(f"a pod deleted: {dict(load.told)}")
    assert set(load.told) == {"1"}
    assert served.logged() - logged == load.told.total(), "the pod's last predictions are not in the log"


def test_a_replica_that_is_killed_is_left_out(served: Served) -> None:
    """An HTTPRoute has no retries: what meets the dead replica is 503 until the cluster sees it. Our own client asks again."""
    served.route(served.single, replicas=2)
    file = packages.dicom()

    def ask_on(until: float) -> int:
        answered = 0
        with httpx.Client(headers={"Host": HOST}) as session:
            while time.monotonic() < until:
                client.predict_dicom(served.url, file, site="A", token=packages.TOKEN, client=session)
                answered += 1
        return answered

    with Load(served) as load, ThreadPoolExecutor(1) as ours:
        answered = ours.submit(ask_on, time.monotonic() + 8)
        kill_predictor_in(served.pods("1")[0].split()[1])
        load.more(500)
        during, load.told = load.told, Counter()
        load.more()
        assert answered.result() > 20
    print(f"a replica killed: {dict(during)}, then {dict(load.told)}; by our own client {answered.result()} of all")
    assert set(during) <= {"1", "503", "RemoteProtocolError"}
    assert during["1"] > during.total() / 2
    assert set(load.told) == {"1"}


def kill_predictor_in(pod_uid: str) -> None:
    """SIGKILL, from the node, as the kernel does to what takes too much memory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                groups, command = (entry / "cgroup").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if pod_uid in groups.replace("_", "-") and b"radloop.serving.predictor" in command:
                found.append(int(entry.name))
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)


class Following:
    """`radloop serve`, which follows the project's releases onto the cluster."""

    def __init__(self, served: Served, folder: Path) -> None:
        self._served, self._ready, self._said = served, folder / "ready.json", folder / "serve.err"
        self.start()

    def start(self) -> None:
        self._ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "radloop.cli", "serve", "--ready-file", str(self._ready)]
        with self._said.open("ab") as said:
            self._process = subprocess.Popen([*command, "--project", str(self._served.home)], stdout=said, stderr=said)
        wait_until(lambda: self._ready.exists() or self._process.poll() is not None)
        assert self._ready.exists(), self._said.read_text()

    def end(self, number: int) -> None:
        self._process.send_signal(number)
        assert self._process.wait(20) == (0 if number == signal.SIGTERM else -number), self._said.read_text()


@pytest.fixture(scope="module")
def allowed(served: Served) -> None:
    """Give the role that we publish for `radloop serve`."""
    allow(served.namespace, "radloop-serve")


@pytest.fixture
def following(served: Served, allowed: None, tmp_path: Path) -> Iterator[Following]:
    """Return the process that follows, with its role."""
    del allowed
    served.configure(served.address)
    made = Following(served, tmp_path)
    yield made
    made.end(signal.SIGTERM)


def wait_until(true: Callable[[], Any], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"it did not happen in {timeout_s} s"
        time.sleep(0.1)


def test_a_release_is_driven_as_on_one_machine(served: Served, following: Following) -> None:
    """The stages of `radloop run release` on a cluster: smoke, shadow, judge, canary, promotion; harm is taken out."""
    home, began, times = served.home, time.monotonic(), list[tuple[str, float]]()
    files = [packages.dicom(n, patient=f"patient {n}") for n in range(60)]
    subjects = [str(client.subject(file, "A")) for file in files]
    kind = {"content-type": "application/dicom", "x-radloop-site": "A"}
    questions = [(file, {**kind, SUBJECT_HEADER: n}) for file, n in zip(files, subjects, strict=True)]
    margins = judge.Margins(latency_floor_ms=1000)

    def noted(what: str) -> None:
        times.append((what, round(time.monotonic() - began, 1)))

    def deploy(state: State) -> None:
        rollout.deploy(home, state, timeout_s=120)
        noted(f"{state.routing.strategy} {state.routing.percent}")

    def verdict(challenger: ModelRef) -> str:
        pairs = predictions.pairs(home / "predictions", str(champion.model_digest), challenger.model_digest)
        return judge.judge(pairs, margins).verdict

    champion, better, worse = served.champion, served.better, served.challenger
    deploy(rollout.single(home, champion))
    seen = rollout.deploy(home, State(models=Models(champion=champion, challenger=better)), timeout_s=120)
    door = rollout.predictor_url(seen, better.model_digest)
    noted("smoke")
    assert rollout.smoke(home / better.package, door, token=packages.TOKEN).max_absolute_difference < 1e-6
    with Load(served, questions) as load:
        deploy(rollout.shadow(home, better))
        wait_until(lambda: verdict(better) != "undetermined")
        noted("judged")
        assert verdict(better) == "operationally_safe"
        assert set(load.told) == {"1"}
        for percent in rollout.steps_left(home, better):
            if percent == 50:  # a crash goes on where it was
                following.end(signal.SIGKILL)
                following.start()
            deploy(rollout.canary(home, better, percent))
            share = Counter(
                served.ask(1, **{SUBJECT_HEADER: str(n)}).most_common()[0][0] for n in range(0, 10_000, 250)
            )
            assert share["3"] == percent * 40 // 100
        deploy(rollout.promoted(home))
        champion = better
        deploy(rollout.shadow(home, worse))
        wait_until(lambda: verdict(worse) != "undetermined")
        noted("judged")
        assert verdict(worse) == "harm"
        deploy(rollout.rolled_back(home))
        load.more()
    print(f"a release: {dict(load.told)}, seconds: {times}")
    assert set(load.told) == {"1", "3"}
    assert client.predict_dicom(rollout.gateway_url(home), files[0], site="A", token=packages.TOKEN).version == "3"
    left = kubectl("-n", served.namespace, "get", "inferenceservices", "-o", "name").split()
    assert [name.rpartition("/")[2] for name in left] == [manifests.service_name(better, served.place)]

    mixed_up = msgspec.structs.replace(worse, model_digest="0" * 64)
    with pytest.raises(ServingError, match="refuses to start") as refused:
        rollout.deploy(home, rollout.shadow(home, mixed_up), timeout_s=60)
    assert "0" * 64 in str(refused.value), "the predictor's own words are not told"
    assert served.ask(20) == {"3": 20}
    desire(home, rollout.rolled_back(home))


def test_a_challenger_that_keeps_dying_loses_its_share(served: Served, following: Following) -> None:
    """Half of the patients would get no answer until a person looks; the champion answers them while the pod is in a loop."""
    both, canary = served.both, Routing("canary", 50)
    rollout.deploy(served.home, served.single, timeout_s=120)
    rollout.deploy(served.home, State(models=both, routing=canary), timeout_s=120)
    assert served.ask(20, **{SUBJECT_HEADER: "0"}) == {"2": 20}
    pod = served.pods("2")[0].split()[1]

    def keep_dead(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(AssertionError):  # it waits before it starts again
                kill_predictor_in(pod)
            time.sleep(0.2)

    with Load(served) as load:
        keep_dead(5)
        at_first, load.told = load.told, Counter()
        keep_dead(10)
        then = load.told.copy()
    print(f"a challenger that dies: for 5 s {dict(at_first)}, then {dict(then)}")
    assert set(at_first) <= {"1", "2", "503", "RemoteProtocolError"}
    assert set(then) == {"1"} and then.total() > 50
    command = [sys.executable, "-m", "radloop.cli", "status", "--project", str(served.home)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "the champion answers all meanwhile" in told, told
    wait_until(lambda: served.ask(1, **{SUBJECT_HEADER: "0"}) == {"2": 1}, 90)
    desire(served.home, served.single)


def test_what_is_not_ready_gets_no_traffic(served: Served) -> None:
    """A challenger that cannot start leaves the champion's route as it was."""
    served.route(served.single)
    broken = msgspec.structs.replace(served.challenger, package="not-there", model_digest="0" * 64)
    state = State(models=Models(champion=served.champion, challenger=broken), routing=Routing("canary", 50))
    files = manifests.manifests(state, served.place)
    with pytest.raises(ServingError, match="no traffic was moved"):
        apply.release(apply.Cluster(str(served.kubeconfig)), *files.values(), timeout_s=10)
    assert served.ask(50) == {"1": 50}
