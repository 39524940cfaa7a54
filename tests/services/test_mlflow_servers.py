"""MLflow's own servers, real ones: behind the gateway two of each, on one PostgreSQL; one of them killed under load."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from radloop.cli.app import run_app
from radloop.cli.init import make_project
from radloop.errors import ServingError
from radloop.learning import wheel
from radloop.learning.package import Packaged
from radloop.learning.tracking import Tracking
from radloop.serving import gateway
from radloop.serving.pool import Pool
from radloop.testing.postgresql import PostgreSQL

pytestmark = pytest.mark.services

_HELPERS = Path(__file__).parents[1] / "unit" / "serving" / "packages.py"
_spec = importlib.util.spec_from_file_location("serving_packages", _HELPERS)
assert _spec is not None and _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)

MLFLOW = [sys.executable, "-m", "mlflow"]
# MLflow's commands start their server as a child: it is ended with its group, and when these tests are killed. Its access log
# goes to the file as well: into a pipe that nobody reads it would go for 64 KB, and then the server would stand still.
GUARD = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(sys.argv[2:], start_new_session=True, stdout=sys.stderr)
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
print(child.pid, flush=True)
while child.poll() is None and os.getppid() == int(sys.argv[1]):
    time.sleep(0.1)
try:
    os.killpg(child.pid, signal.SIGKILL)
except ProcessLookupError:
    pass
sys.exit(child.poll())
"""
TOKEN = "a-token-for-the-pool"


class Server:
    """A command that serves HTTP on a port of 127.0.0.1."""

    def __init__(self, name: str, command: list[str], port: int, health: str, folder: Path, **more: str) -> None:
        self.port, self._health = port, health
        self.log = folder / f"{name}-{port}.log"
        self.url = f"http://127.0.0.1:{port}"
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        # As in an activated environment: `mlflow models serve` looks for uvicorn.
        quiet["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        with self.log.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-c", GUARD, str(os.getpid()), *command],
                stdout=subprocess.PIPE, stderr=log, cwd=folder, env=os.environ | quiet | more, text=True,
            )  # fmt: skip
        assert self._guard.stdout is not None
        self._group = int(self._guard.stdout.readline())

    def wait(self, timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                answered = httpx.get(self.url + self._health, timeout=2).status_code
                if answered in (200, 503):  # 503: a gateway whose pool has no servers yet
                    return
            except httpx.HTTPError:
                assert self._guard.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.1)
        raise AssertionError(f"not ready:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)

    def end(self) -> int:
        """By SIGTERM; the exit status."""
        self._guard.terminate()
        try:
            return self._guard.wait(30)
        finally:
            self._guard.kill()
            self.kill()
            assert self._guard.stdout is not None
            self._guard.stdout.close()
            self._guard.wait()


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Place:
    """A project with its gateway, two tracking servers on one PostgreSQL, two `mlflow models serve` of one version."""

    def __init__(self, folder: Path, stack: ExitStack, postgresql: PostgreSQL) -> None:
        self.folder, self._stack = folder, stack
        self.store = postgresql.with_password(postgresql.database())
        self.project = folder / "project"
        make_project(self.project)
        ports = [_port() for _ in range(6)]
        self.tracking_url, self.models_url = (f"http://127.0.0.1:{port}" for port in ports[:2])
        (self.project / "pool.token").touch(mode=0o600)
        (self.project / "pool.token").write_text(TOKEN)
        pools = (
            ("tracking", "mlflow-server", ports[2:4], ""),
            ("models", "mlflow-models", ports[4:], "file:pool.token"),
        )
        (self.project / "radloop.toml").write_text(
            "".join(
                f'[serve.pools.{name}]\nkind = "{kind}"\nport = {port}\ntoken = "{token}"\n'
                f"servers = {json.dumps([f'127.0.0.1:{one}' for one in servers])}\n"
                for port, (name, kind, servers, token) in zip(ports, pools, strict=False)
            )
        )
        command = [sys.executable, "-m", "radloop.cli", "serve", "--port", str(_port()), "--project", str(self.project)]
        self.serve = self._start("serve", command, ports[0], "/")
        self.serve.wait()
        first = self._tracking_server(ports[2])
        first.wait()  # it alone makes the tables
        self.tracking = [first, self._tracking_server(ports[3])]
        self.package = folder / "package"
        packages.build(self.package)
        wheel.build(self.package)
        known = Tracking(self.tracking_url, None, "finding")
        run_id = known.log_run("key", name="run", params={}, metrics={"auc": 0.9})
        known.set_alias("finding", "champion", known.register(self.package, name="finding", run_id=run_id))
        command = [*MLFLOW, "models", "serve", "-m", "models:/finding@champion", "--env-manager", "local", "-w", "1"]
        self.models = [
            self._start("models", [*command, "-p", str(port)], port, "/ping", MLFLOW_TRACKING_URI=self.tracking_url)
            for port in ports[4:]
        ]
        for server in (*self.tracking, *self.models):
            server.wait()
        self._open_stores()

    def _open_stores(self) -> None:
        """MLflow opens its store at the first request: a load begins with both open."""
        for server in self.tracking:
            told = httpx.post(f"{server.url}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, timeout=30)
            assert told.status_code == 200, told.text

    def _tracking_server(self, port: int) -> Server:
        command = [
            *MLFLOW,
            "server",
            "-p",
            str(port),
            "-w",
            "1",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        return self._start("server", command, port, "/health", MLFLOW_BACKEND_STORE_URI=self.store)

    def _start(self, *arguments: Any, **more: str) -> Server:
        server = Server(*arguments, self.folder, **more)
        self._stack.callback(server.end)
        return server

    def asked(self, pool: str) -> dict[int, int]:
        """How often each server of a pool was asked, by its port, as Envoy counts."""
        admin = (self.project / "serving/envoy/admin/address.txt").read_text()
        told = httpx.get(f"http://{admin}/clusters?format=json").json()
        [hosts] = [one["host_statuses"] for one in told["cluster_statuses"] if one["name"] == f"pool-{pool}"]
        return {
            host["address"]["socket_address"]["port_value"]: int(stat.get("value", 0))
            for host in hosts
            for stat in host["stats"]
            if stat["name"] == "rq_total"
        }


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, require_service: Callable[..., str], postgresql: PostgreSQL
) -> Iterator[Place]:
    require_service("Envoy", "envoy")
    with ExitStack() as stack:
        yield Place(tmp_path_factory.mktemp("mlflow"), stack, postgresql)


def _load(work: Callable[[httpx.Client, int, int], None], meanwhile: Callable[[], None], clients: int = 4) -> None:
    """Clients that ask without pause (`work`: session, client, turn) from two seconds before `meanwhile` to two after.

    An answer that the killed server had begun cannot be asked for again: one a client at most.
    """
    stop, failed, begun = threading.Event(), [], []

    def run(number: int) -> None:
        with httpx.Client(timeout=30) as session:
            turn = 0
            while not stop.is_set():
                try:
                    work(session, number, turn)
                except httpx.RemoteProtocolError as error:
                    (begun if "without sending complete message body" in str(error) else failed).append(error)
                except Exception as error:
                    failed.append(error)
                    return
                turn += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    meanwhile()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(begun) <= clients
    print("answers that broke off:", len(begun))
    assert not failed, [str(error)[:400] for error in failed]


def _invocation(*files: bytes) -> dict[str, Any]:
    return {"dataframe_split": {"columns": ["dicom"], "data": [[base64.b64encode(one).decode()] for one in files]}}


def test_mlflow_serves_the_numbers_that_radloop_serves(place: Place) -> None:
    """If this failed, who serves by MLflow's own way would treat patients by other figures than those that were evaluated."""
    files = [packages.dicom(number) for number in range(5)]
    expected = [Packaged(place.package).predict_dicom(one) for one in files]
    answer = httpx.post(f"{place.models[0].url}/invocations", json=_invocation(*files), timeout=60)
    assert answer.status_code == 200, answer.text
    got = answer.json()["predictions"]
    assert [row["decision"] for row in got] == [one.decision for one in expected]
    assert [row["probability"] for row in got] == pytest.approx([one.probability for one in expected], abs=1e-9)


def test_what_mlflow_builds_an_image_from_is_whole(place: Place, tmp_path: Path) -> None:
    """If this failed, `mlflow models build-docker` would make an image that does not install, or not this model."""
    out = tmp_path / "image"
    command = [*MLFLOW, "models", "generate-dockerfile", "-m", "models:/finding@champion", "-d", str(out)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": place.tracking_url}
    done = subprocess.run(
        [*command, "--env-manager", "local"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "COPY model_dir /opt/ml/model\n" in (out / "Dockerfile").read_text()
    model = out / "model_dir"
    wanted = (model / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in wanted[1:]) and any(line.startswith("mlflow==") for line in wanted), wanted
    [held] = (model / "data/package").glob("radloop-*.whl")
    with zipfile.ZipFile(held) as found:
        assert "radloop/learning/pyfunc.py" in found.namelist()
    # As the Dockerfile's pip does: from another folder. The rest comes from an index, radloop from the model alone.
    (model / "ours.txt").write_text("\n".join(wanted[:2]))
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, "-r", str(model / "ours.txt")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert f"Would install {'-'.join(held.name.split('-')[:2])}" in done.stdout, done.stdout + done.stderr
    code = (
        "import sys, mlflow.pyfunc, pandas\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "print(float(model.predict(pandas.DataFrame({'dicom': [open(sys.argv[2], 'rb').read()]})).probability[0]))\n"
    )
    (tmp_path / "image.dcm").write_bytes(packages.dicom(7))
    run = [sys.executable, "-W", "ignore", "-c", code, str(model), str(tmp_path / "image.dcm")]
    loaded = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(loaded.stdout) == pytest.approx(Packaged(place.package).predict_dicom(packages.dicom(7)).probability)


def test_doctor_says_which_servers_answer(place: Place, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """If this failed, the first sign that half a pool is down would be its other half's end."""
    run_app(["doctor", "--json", "--project", str(place.project)])
    checks = {check["name"]: check for check in json.loads(capsysbinary.readouterr().out)}
    assert (checks["pool tracking"]["found"], checks["pool models"]["found"]) == ("2 of 2 answer", "2 of 2 answer")


def _api(place: Place, session: httpx.Client, method: str, path: str, **body: Any) -> httpx.Response:
    sent = {"params": body} if method == "GET" else {"json": body}
    return session.request(method, f"{place.tracking_url}/api/2.0/mlflow/{path}", **sent)


def _new_run(place: Place, session: httpx.Client, name: str) -> httpx.Response:
    return _api(place, session, "POST", "runs/create", experiment_id="0", run_name=name, start_time=1)


def test_what_the_gateway_may_ask_twice_changes_nothing_the_second_time(place: Place) -> None:
    """If this failed, a killed tracking server would double what was logged: the table in serving/pool.py would be wrong."""
    known = Tracking(place.tracking_url, None, "finding")
    [logged] = known._client.search_logged_models([known.experiment_id])
    model_id = logged.model_id
    with httpx.Client(timeout=30) as session:
        run = _new_run(place, session, "twice").json()["run"]["info"]["run_id"]
        metric = {"key": "auc", "value": 0.5, "timestamp": 1, "step": 0}
        source = {"source": {"name": "d", "digest": "1", "source_type": "local", "source": "{}"}, "tags": []}
        dataset = {"dataset": source["source"], "tags": [{"key": "mlflow.data.context", "value": "train"}]}
        tag = {"key": "k", "value": "v"}
        for method, path, body in (
            ("POST", "experiments/search", {"max_results": 10}),
            ("POST", "experiments/set-experiment-tag", {"experiment_id": "0", **tag}),
            ("POST", "runs/search", {"experiment_ids": ["0"]}),
            ("POST", "runs/log-metric", {"run_id": run, **metric}),
            ("POST", "runs/log-parameter", {"run_id": run, **tag}),
            ("POST", "runs/log-batch", {"run_id": run, "metrics": [metric], "params": [tag], "tags": [tag]}),
            ("POST", "runs/set-tag", {"run_id": run, **tag}),
            ("POST", "runs/log-inputs", {"run_id": run, "datasets": [dataset]}),
            ("POST", "logged-models/search", {"experiment_ids": ["0"]}),
            ("PATCH", f"logged-models/{model_id}", {"model_id": model_id, "status": "LOGGED_MODEL_READY"}),
            ("PATCH", f"logged-models/{model_id}/tags", {"model_id": model_id, "tags": [tag]}),
            ("POST", "registered-models/set-tag", {"name": "finding", **tag}),
            ("POST", "registered-models/alias", {"name": "finding", "alias": "twice", "version": "1"}),
            ("POST", "registered-models/get-latest-versions", {"name": "finding"}),
            ("PATCH", "registered-models/update", {"name": "finding", "description": "d"}),
            ("POST", "model-versions/set-tag", {"name": "finding", "version": "1", **tag}),
            ("PATCH", "model-versions/update", {"name": "finding", "version": "1", "description": "d"}),
            ("POST", "runs/update", {"run_id": run, "status": "FINISHED", "end_time": 2}),
        ):
            once, again = (_api(place, session, method, path, **body) for _ in range(2))
            assert (once.status_code, again.status_code) == (200, 200), (path, once.text, again.text)
        found = _api(place, session, "GET", "runs/get", run_id=run).json()["run"]
        history = _api(place, session, "GET", "metrics/get-history", run_id=run, metric_key="auc").json()
    assert len(history["metrics"]) == len(found["data"]["metrics"]) == len(found["data"]["params"]) == 1
    assert len(found["inputs"]["dataset_inputs"]) == 1


def test_a_killed_tracking_server_is_not_felt_and_doubles_nothing(place: Place) -> None:
    """If this failed, one dead machine would end trainings that are running elsewhere, or register their models twice."""
    answers: Counter[tuple[str, int]] = Counter()
    made: Counter[str] = Counter()
    with httpx.Client(timeout=30) as session:
        run = _new_run(place, session, "load").json()["run"]["info"]["run_id"]
    before = place.asked("tracking")

    def work(session: httpx.Client, number: int, turn: int) -> None:
        name = f"made-{number}-{turn}"
        metric = {"run_id": run, "key": f"m{number}", "value": turn, "timestamp": turn, "step": turn}
        for what, ask in (
            ("read", lambda: _api(place, session, "GET", "runs/get", run_id=run)),
            ("search", lambda: _api(place, session, "POST", "runs/search", experiment_ids=["0"], max_results=1)),
            ("write", lambda: _api(place, session, "POST", "runs/log-metric", **metric)),
            ("create", lambda: _new_run(place, session, name)),
        ):
            answer = ask()
            answers[what, answer.status_code] += 1
            if what == "create" and answer.status_code == 200:
                made[name] += 1
            elif answer.status_code != 200:
                told = f"{what} {answer.status_code} {answer.text}"
                assert what == "create" and answer.json()["error_code"] == "ABORTED", told

    _load(work, place.tracking[1].kill)
    assert {status for _what, status in answers} <= {200, 409}, answers
    assert sum(count for (_what, status), count in answers.items() if status == 409) <= 4, (
        answers
    )  # one a client at most
    after = place.asked("tracking")
    shares = [after[server.port] - before[server.port] for server in place.tracking]
    assert min(shares) > 10, f"the load was not shared: {shares}"
    known = Tracking(place.tracking_url, None, "finding")._client
    kept: Counter[str] = Counter()
    token: str | None = ""
    while token is not None:
        page = known.search_runs(["0"], "attributes.run_name LIKE 'made-%'", max_results=1000, page_token=token or None)
        kept.update(found.info.run_name for found in page)
        token = page.token or None
    assert set(kept.values()) == {1}, "a run was made twice"
    assert not set(made) - set(kept), "a run that was acknowledged is lost"
    print(dict(answers), shares, "runs made", len(kept), "acknowledged", len(made))


def test_a_killed_model_server_is_not_felt(place: Place) -> None:
    """If this failed, one dead replica would answer radiologists with errors."""
    files = [packages.dicom(number) for number in range(8)]
    expected = [Packaged(place.package).predict_dicom(one).probability for one in files]
    bodies = [json.dumps(_invocation(one)) for one in files]
    answers: Counter[int] = Counter()
    before = place.asked("models")
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}

    def work(session: httpx.Client, number: int, turn: int) -> None:
        which = (number + turn) % len(files)
        answer = session.post(f"{place.models_url}/invocations", content=bodies[which], headers=headers)
        answers[answer.status_code] += 1
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["probability"] == pytest.approx(expected[which], abs=1e-9)

    _load(work, place.models[1].kill)
    after = place.asked("models")
    shares = [after[server.port] - before[server.port] for server in place.models]
    assert min(shares) > 10, f"the load was not shared: {shares}"
    print(dict(answers), shares)


def test_a_pool_asks_for_its_token(place: Place) -> None:
    """If this failed, anybody on the network could ask the model, which MLflow itself leaves open."""
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
        refused = httpx.post(f"{place.models_url}/invocations", json=_invocation(packages.dicom()), headers=headers)
        assert refused.status_code == 401 and "Authorization: Bearer" in refused.text
        assert refused.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in place.serve.log.read_text()
    config = place.project / "serving/envoy/bootstrap.json"
    assert config.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [({"servers": ()}, "has no servers"), ({"servers": ("host",)}, "no address"), ({"name": "a b"}, "name")],
)
def test_a_pool_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    """If this failed, a typing error would be a gateway that does not start, with the reason in a log."""
    right: dict[str, Any] = {"name": "a", "kind": "mlflow-models", "port": 1, "servers": ("h:1",), "token": "hunter2"}
    assert "hunter2" not in repr(Pool(**right))
    with pytest.raises(ServingError, match=said):
        Pool(**right | change)


@pytest.mark.parametrize("kind", ["mlflow-server", "mlflow-models"])
def test_envoy_takes_what_is_written(kind: Any, tmp_path: Path, require_service: Callable[..., str]) -> None:
    """If this failed, a new Envoy would refuse the whole gateway because of a pool."""
    envoy = require_service("Envoy", "envoy")
    pool = Pool(name="a", kind=kind, port=5000, servers=("127.0.0.1:1", "[::1]:2"), token="t")
    made = gateway.bootstrap(tmp_path, host="127.0.0.1", port=0, admin_port=0, pools=[pool])
    gateway.replace_json(tmp_path / "bootstrap.json", made)
    for name in ("cds", "rds"):
        (tmp_path / f"{name}.json").write_text('{"resources": []}')
    command = [envoy, "--mode", "validate", "-l", "warn", "-c", str(tmp_path / "bootstrap.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "deprecated" not in done.stderr, done.stderr
