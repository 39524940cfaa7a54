"""`radloop serve` with real predictors and a real Envoy on loopback: releases under load, crashes, kills."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from radloop.errors import ServingError
from radloop.serving import client, gateway, predictions, rollout
from radloop.serving.desired import (
    ModelRef,
    Models,
    Observed,
    Routing,
    State,
    desire,
    desired,
    observed,
    supervisor_pid,
)
from radloop.serving.gateway import Routes, Upstream
from radloop.serving.supervisor import Supervisor

pytestmark = pytest.mark.services

_HELPERS = Path(__file__).parents[1] / "unit" / "serving" / "packages.py"
_spec = importlib.util.spec_from_file_location("serving_packages", _HELPERS)
assert _spec is not None and _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)

RUN = """
import signal, sys
from pathlib import Path
from radloop.serving.supervisor import Supervisor
home, port, key, token = sys.argv[1:]
made = Supervisor(Path(home), gateway_port=int(port), key_file=Path(key), token_file=Path(token))
signal.signal(signal.SIGTERM, lambda *_: made.stop())
made.run(on_ready=lambda port: print(port, flush=True))
"""


def wait_until(true: Callable[[], Any], timeout_s: float = 90.0, what: str = "it") -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.05)


def processes(home: Path) -> dict[int, str]:
    """Whatever still runs with this home on its command line, zombies apart."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(home) in command:
                found[int(entry.name)] = command
    return found


class Served:
    """A home, its packages, and `radloop serve` as a process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(mode=0o700)
        self.key, self.token = packages.keys(folder)
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    def model(self, version: int, **options: Any) -> ModelRef:
        package = self.home / "models" / str(version)
        digest = packages.build(package, weight=float(version), **options)
        return ModelRef(package=f"models/{version}", version=str(version), model_digest=digest)

    def start(self) -> None:
        command = [sys.executable, "-c", RUN, str(self.home), str(self.port), str(self.key), str(self.token)]
        with (self.folder / "serve.err").open("ab") as err:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "serve.err").read_text()
        self.port = int(line)

    def end(self, signal_number: int = signal.SIGTERM) -> None:
        assert self.process is not None and self.process.stdout is not None
        self.process.send_signal(signal_number)
        self.process.wait(30)
        self.process.stdout.close()
        self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, number: int = 0) -> client.Prediction:
        return client.predict_dicom(self.url, packages.dicom(number), site="A", token=packages.TOKEN)

    def deploy(self, state: State) -> Observed:
        return rollout.deploy(self.home, state, timeout_s=90)

    def rows(self) -> list[predictions.PredictionRow]:
        time.sleep(3 * predictions.FLUSH_INTERVAL_S)
        return list(predictions.read(self.home / "predictions", status="ok"))


@pytest.fixture
def served(tmp_path: Path, require_service: Callable[..., str]) -> Iterator[Served]:
    require_service("Envoy", "envoy")
    made = Served(tmp_path)
    made.start()
    yield made
    if made.process is not None:
        made.end()
    wait_until(lambda: not processes(made.home), what="the end of all children")


class Load:
    """Four clients that ask without pause; `answers` counts what they got."""

    def __init__(self, served: Served, clients: int = 4) -> None:
        self.answers: Counter[str] = Counter()
        self._asked: list[tuple[float, str]] = []
        self.failures: list[str] = []
        self._served, self._stop = served, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        headers = {"content-type": "application/dicom", "x-radloop-site": "A"}
        headers["authorization"] = f"Bearer {packages.TOKEN}"
        data = [packages.dicom(10 * number + n, patient=f"patient {number}-{n}") for n in range(10)]
        with httpx.Client(headers=headers, timeout=30) as session:
            turn = 0
            while not self._stop.is_set():
                asked = time.monotonic()
                try:
                    answer = session.post(f"{self._served.url}/v2/models/default/infer", content=data[turn % 10])
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                turn += 1
                if answer.status_code == 200:
                    version = answer.json()["model_version"]
                    self._asked.append((asked, version))
                    self.answers[version] += 1
                else:
                    self.failures.append(f"{answer.status_code} {answer.text}")

    def more(self, n: int = 60) -> Counter[str]:
        """Answers to at least `n` requests that begin from now on: one under way may still be answered as before."""
        now = time.monotonic()

        def since() -> list[str]:
            return [version for asked, version in list(self._asked) if asked >= now]

        wait_until(lambda: len(since()) >= n, what=f"{n} more answers")
        return Counter(since())


@pytest.mark.parametrize("strategy", ["none", "single", "smoke", "shadow", "canary"])
def test_envoy_accepts_every_configuration(strategy: str, tmp_path: Path, require_service: Callable[..., str]) -> None:
    """A configuration that Envoy refuses leaves the old routes in place, and a release hangs."""
    require_service("Envoy", "envoy")
    champion, challenger = Upstream("a" * 64, "1", 1001, 1003), Upstream("b" * 64, "2", 1002, 1004)
    routes = {
        "none": Routes(),
        "single": Routes(champion=champion),
        "smoke": Routes(champion=champion, challenger=challenger),
        "shadow": Routes(champion=champion, challenger=challenger, strategy="shadow"),
        "canary": Routes(champion=champion, challenger=challenger, strategy="canary", percent=25),
    }[strategy]
    gateway.validate(routes, tmp_path)


def test_envoys_own_words_are_told(tmp_path: Path, require_service: Callable[..., str]) -> None:
    """`validate` must be able to fail, or the test above says nothing."""
    require_service("Envoy", "envoy")
    with pytest.raises(ServingError, match="Envoy refuses the configuration"):
        gateway.validate(Routes(champion=Upstream("a" * 64, "1", 99999)), tmp_path)


def test_before_the_first_release(served: Served) -> None:
    """An empty project answers, and says why it has no answer."""
    answer = httpx.get(served.url + "/v2/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"error": "gateway: no model is served yet"})
    with pytest.raises(ServingError, match="503: gateway: no model is served yet"):
        served.ask()
    with pytest.raises(ServingError, match="shadow needs a champion"):
        rollout.shadow(served.home, served.model(1))
    with pytest.raises(ServingError, match="nothing to roll back to"):
        rollout.rolled_back(served.home)


@pytest.mark.slow
def test_a_whole_release_under_load_loses_no_request(served: Served) -> None:
    """Single, shadow, canary step by step, promotion, roll-back: each request is answered, by whom it should be."""
    one, two = served.model(1), served.model(2)
    now = served.deploy(rollout.single(served.home, one))
    rollout.smoke(served.home / one.package, rollout.predictor_url(now, one.model_digest), token=packages.TOKEN)
    with Load(served) as load:
        assert set(load.more()) == {"1"}
        now = served.deploy(rollout.shadow(served.home, two))
        rollout.smoke(served.home / two.package, rollout.predictor_url(now, two.model_digest), token=packages.TOKEN)
        assert set(load.more(200)) == {"1"}, "an answer of the shadow got out"
        share = {}
        for percent in rollout.steps_left(served.home, two):
            served.deploy(rollout.canary(served.home, two, percent))
            assert rollout.steps_left(served.home, two) == tuple(s for s in rollout.STEPS if s > percent)
            got = load.more(400 if percent == 25 else 100)
            share[percent] = got["2"] / sum(got.values())
        served.deploy(rollout.promoted(served.home))
        assert set(load.more()) == {"2"}
        served.deploy(rollout.rolled_back(served.home))
        assert set(load.more()) == {"1"}
    assert load.failures == []
    assert share[100] == 1.0 and 0.15 < share[25] < 0.36 and share[5] < share[50]
    _check_log(served, one, two)
    wait_until(lambda: sum("radloop.serving.predictor" in c for c in processes(served.home).values()) == 1)


def test_a_patient_always_meets_the_same_model(served: Served) -> None:
    """An A/B test in which one patient's images are read by two models compares nothing, and confuses who reads them."""
    one, two = served.model(1), served.model(2)
    served.deploy(rollout.single(served.home, one))
    seen: dict[int, set[str]] = {}
    for percent in (25, 50):
        served.deploy(rollout.canary(served.home, two, percent))
        found: dict[int, set[str]] = {}
        for number in [*range(40)] * 2:
            data = packages.dicom(number, patient=f"patient {number}")
            answer = client.predict_dicom(served.url, data, site="A", token=packages.TOKEN)
            found.setdefault(number, set()).add(answer.version)
        assert all(len(versions) == 1 for versions in found.values())
        share = sum(versions == {"2"} for versions in found.values()) / len(found)
        assert abs(share - percent / 100) < 0.2
        assert all(found[number] == {"2"} for number, versions in seen.items() if versions == {"2"}), (
            "a patient went back"
        )
        seen = found
    headers = {"content-type": "application/dicom", "authorization": f"Bearer {packages.TOKEN}", "x-radloop-site": "A"}
    for wanted, version in (("champion", "1"), ("challenger", "2")):
        asked = httpx.post(
            f"{served.url}/v2/models/default/infer",
            content=packages.dicom(1),
            headers=headers | {"x-radloop-model": wanted},
        )
        assert asked.json()["model_version"] == version


def test_grpc_goes_through_the_same_gateway(served: Served) -> None:
    """A client that speaks gRPC must be under the same release, and the judge must see its requests."""
    import tritonclient.grpc as triton

    one, two = served.model(1), served.model(2)
    served.deploy(rollout.single(served.home, one))

    def versions(count: int, metadata: dict[str, str]) -> Counter[str]:
        found: Counter[str] = Counter()
        told = {"authorization": f"Bearer {packages.TOKEN}", "x-radloop-site": "A", **metadata}
        with triton.InferenceServerClient(f"127.0.0.1:{served.port}") as asked:
            for number in range(count):
                tensor = triton.InferInput("dicom", [1], "BYTES")
                tensor.set_data_from_numpy(np.array([packages.dicom(number)], object))
                answer = asked.infer("default", [tensor], headers=told)
                found[answer.get_response().model_version] += 1
        return found

    assert versions(5, {}) == {"1": 5}
    served.deploy(rollout.shadow(served.home, two))
    assert versions(20, {}) == {"1": 20}
    served.deploy(rollout.canary(served.home, two, 50))
    assert set(versions(40, {})) == {"1", "2"}
    assert versions(5, {"x-radloop-subject": "0"}) == {"2": 5}
    assert versions(5, {"x-radloop-subject": "9999"}) == {"1": 5}
    pairs = predictions.join(served.rows(), one.model_digest, two.model_digest)
    assert sum(pair.challenger is not None for pair in pairs) >= 60


def _check_log(served: Served, one: ModelRef, two: ModelRef) -> None:
    """Pairs all the way through shadow and canary, each with one answer that left."""
    rows = served.rows()
    pairs = predictions.join(rows, one.model_digest, two.model_digest)
    answered = [pair for pair in pairs if pair.challenger is not None]
    assert len(answered) > 500 and len(pairs) - len(answered) <= 0.02 * len(pairs)
    for pair in answered:
        assert pair.challenger is not None
        assert pair.champion["sop_uid"] == pair.challenger["sop_uid"]
    both = [
        p for p in answered if p.champion["compared_with"] == two.model_digest and p.challenger["role"] == "challenger"
    ]  # type: ignore[index]
    assert both and all(p.champion["role"] == "champion" for p in both)
    assert sum(p.champion["served"] != p.challenger["served"] for p in both) >= 0.99 * len(both)  # type: ignore[index]
    late = [row for row in rows if row["model_digest"] == two.model_digest and row["role"] == "champion"]
    assert late and all(row["served"] for row in late), "after promotion the new model is the champion"


def test_a_killed_challenger_is_not_felt(served: Served) -> None:
    """Half the answers come from a model that dies three times: no 5xx, and it comes back."""
    one, two = served.model(1), served.model(2)
    served.deploy(rollout.single(served.home, one))
    served.deploy(rollout.canary(served.home, two, 50))
    with Load(served) as load:
        for _ in range(3):
            assert load.more(100)["2"] > 0
            [pid] = [p for p, c in processes(served.home).items() if two.model_digest in c]
            os.kill(pid, signal.SIGKILL)
            assert load.more(100)["1"] > 0
            wait_until(lambda pid=pid: _is_back(served, two, pid), what="the challenger's return")
    # An answer that the killed process had begun cannot be asked for again: one a kill at most, seen once in 8,400 requests.
    begun = [failure for failure in load.failures if "without sending complete message body" in failure]
    assert load.failures == begun and len(begun) <= 3
    now = observed(served.home)
    assert now is not None and [m.restarts for m in now.models] == [0, 3]
    assert now.models[1].last_error is not None and "SIGKILL" in now.models[1].last_error


def _is_back(served: Served, model: ModelRef, former: int) -> bool:
    now = observed(served.home)
    running = [p for p, c in processes(served.home).items() if model.model_digest in c]
    return now is not None and all(m.ready for m in now.models) and running != [former] and len(running) == 1


def test_a_killed_gateway_and_champion_come_back(served: Served) -> None:
    """There is no second gateway on one machine: it must be back within seconds, at the same address."""
    one = served.model(1)
    served.deploy(rollout.single(served.home, one))
    for word in ("--admin-address-path", one.model_digest):
        [pid] = [p for p, c in processes(served.home).items() if word in c]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: _answers(served), what=f"an answer after {word} was killed")
    assert served.ask().version == "1"


def _answers(served: Served) -> bool:
    try:
        return served.ask().version == "1"
    except ServingError:
        return False


def test_killing_the_supervisor_leaves_nothing_and_loses_nothing(served: Served) -> None:
    """After SIGKILL no orphan holds the port, and the next `serve` goes on with the release where it was."""
    one, two = served.model(1), served.model(2)
    served.deploy(rollout.single(served.home, one))
    served.deploy(rollout.canary(served.home, two, 25))
    generation = desired(served.home).generation  # type: ignore[union-attr]
    assert len(processes(served.home)) >= 4
    served.end(signal.SIGKILL)
    wait_until(lambda: not processes(served.home), what="the end of all children")
    with pytest.raises(ServingError, match="nothing serves this home") as caught:
        rollout.wait_for(served.home, generation, timeout_s=5)
    assert "radloop serve" in str(caught.value)
    served.start()
    now = served.deploy(rollout.canary(served.home, two, 25))
    assert (now.generation, now.routing) == (generation, Routing("canary", 25)), "the same state became another one"
    assert rollout.steps_left(served.home, two) == (50, 100)
    assert served.ask().version in ("1", "2")


def test_sigterm_ends_all_in_order(served: Served) -> None:
    """Ctrl-C or a service manager's stop: the request under way is answered, and nothing is left."""
    served.deploy(rollout.single(served.home, served.model(1)))
    with Load(served, clients=2) as load:
        load.more(30)
        served.end()
    broken = [failure for failure in load.failures if "ConnectError" not in failure]
    assert len(broken) <= 2, broken  # at most one a client: its idle connection was closed as it wrote
    assert not processes(served.home)
    assert supervisor_pid(served.home) is None


def test_a_model_that_refuses_to_start_changes_nothing(served: Served) -> None:
    """The release ends with the predictor's own words while the champion goes on answering."""
    one, other = served.model(1), served.model(2, key=bytes(32))
    served.deploy(rollout.single(served.home, one))
    with pytest.raises(ServingError, match="version 2 refuses to start") as caught:
        served.deploy(rollout.shadow(served.home, other))
    assert "project key is not the one" in str(caught.value)
    assert served.ask().version == "1"
    now = served.deploy(rollout.rolled_back(served.home))
    assert now.routing == Routing("single") and [m.version for m in now.models] == ["1"]


def test_a_promotion_to_a_broken_model_is_never_in_effect(served: Served) -> None:
    """Routes move only to predictors that are ready: a bad champion in desired.json leaves the good one answering."""
    one = served.model(1)
    served.deploy(rollout.single(served.home, one))
    missing = ModelRef(package="models/none", version="9", model_digest="9" * 64)
    with pytest.raises(ServingError, match="version 9 refuses to start"):
        served.deploy(State(models=Models(champion=missing, previous=one)))
    assert served.ask().version == "1"
    served.deploy(rollout.rolled_back(served.home))
    assert served.ask().version == "1"


def test_time_up_is_told_in_the_supervisors_words(served: Served) -> None:
    """A release that hangs must say on what."""
    generation = desire(served.home, State(models=Models(champion=served.model(1))))
    with pytest.raises(ServingError, match="not in effect within 0 s") as caught:
        rollout.wait_for(served.home, generation + 1, timeout_s=0)
    assert f"generation {generation + 1}" in str(caught.value)


def test_a_desired_state_that_makes_no_sense_is_reported(served: Served) -> None:
    """Somebody edits desired.json by hand: what is served stays, and the mistake is named."""
    one = served.model(1)
    served.deploy(rollout.single(served.home, one))
    path = served.home / "serving" / "desired.json"
    broken = json.loads(path.read_text())
    broken["routing"]["strategy"] = "shaddow"
    path.write_text(json.dumps(broken))
    wait_until(lambda: (observed(served.home) or 0) and "shaddow" in (observed(served.home).error or ""))  # type: ignore[union-attr]
    assert served.ask().version == "1"


def test_two_supervisors_and_a_busy_port(served: Served, tmp_path: Path) -> None:
    """A second `radloop serve` must not fight the first one, and a port in use must not look like a hang."""
    second = Supervisor(served.home, gateway_port=0, key_file=served.key)
    assert served.process is not None
    with pytest.raises(ServingError, match="another `radloop serve`") as caught:
        second.run()
    assert f"process {served.process.pid}" in str(caught.value)
    other = tmp_path / "other"
    other.mkdir()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ServingError, match="port cannot be bound") as caught:
            Supervisor(other, gateway_port=port, key_file=served.key).run()
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert supervisor_pid(other) is None


def test_a_large_image_reaches_both(served: Served) -> None:
    """A mammogram has tens of megabytes: the copy for the shadow must not be dropped for its size."""
    one, two = served.model(1), served.model(2)
    served.deploy(rollout.single(served.home, one))
    served.deploy(rollout.shadow(served.home, two))
    data = packages.dicom(3, side=2400)
    assert len(data) > 10_000_000
    assert client.predict_dicom(served.url, data, site="A", token=packages.TOKEN).version == "1"
    wait_until(lambda: len(served.rows()) == 2, what="both answers")
    [pair] = predictions.join(served.rows(), one.model_digest, two.model_digest)
    assert pair.champion["tags"]["rows"] == 2400 and pair.challenger is not None
    assert (pair.champion["served"], pair.challenger["served"]) == (True, False)
