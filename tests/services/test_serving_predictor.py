"""A real predictor process on loopback: what it answers, what it refuses, what it writes down, how it ends."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from radloop.dicom.uids import Pseudonymiser
from radloop.errors import ServingError
from radloop.learning.package import Packaged, reference_images
from radloop.serving import client, predictions, rollout
from radloop.serving.predictor import main

_HELPERS = Path(__file__).parents[1] / "unit" / "serving" / "packages.py"
_spec = importlib.util.spec_from_file_location("serving_packages", _HELPERS)
assert _spec is not None and _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)

SIZE = packages.SIZE
AUTHORISED = {"authorization": f"Bearer {packages.TOKEN}"}


class Predictor:
    """One predictor process with its folder, package and log."""

    def __init__(self, folder: Path, *options: str, token: bool = True) -> None:
        self.folder, self.log, self.package = folder, folder / "predictions", folder / "package"
        if not self.package.exists():
            packages.build(self.package)
        key, token_file = packages.keys(folder)
        self.command = [sys.executable, "-m", "radloop.serving.predictor", "--package", str(self.package)]
        self.command += ["--key-file", str(key), "--predictions", str(self.log), "--version", "3"]
        self.command += ["--token-file", str(token_file)] if token else []
        with (folder / "err").open("wb") as err:
            self.process = subprocess.Popen([*self.command, *options], stdout=subprocess.PIPE, stderr=err)
        assert self.process.stdout is not None
        self.announced = json.loads(self.process.stdout.readline() or b"{}")
        self.url = f"http://127.0.0.1:{self.announced.get('port')}"
        self.infer = f"{self.url}/v2/models/default/infer"

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def rows(self) -> list[predictions.PredictionRow]:
        time.sleep(2 * predictions.FLUSH_INTERVAL_S)
        return list(predictions.read(self.log))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictor]:
    made = Predictor(tmp_path_factory.mktemp("predictor"))
    yield made
    made.stop()


def post(predictor: Predictor, content: Any, kind: str = "application/dicom", **headers: str) -> httpx.Response:
    if not isinstance(content, bytes):
        content, kind = json.dumps(content).encode(), "application/json"
    return httpx.post(predictor.infer, content=content, headers={"content-type": kind} | AUTHORISED | headers)


def column(answer: httpx.Response, name: str) -> list[Any]:
    return next(output["data"] for output in answer.json()["outputs"] if output["name"] == name)


def test_metadata_speaks_the_protocol(predictor: Predictor) -> None:
    """KServe's and Triton's clients ask these paths before they ask for an inference."""
    assert httpx.get(predictor.url + "/v2/health/live").status_code == 200
    assert httpx.get(predictor.url + "/v2/health/ready").status_code == 200
    about = httpx.get(predictor.url + "/v2", headers=AUTHORISED).json()
    assert about["name"] == "radloop" and about["extensions"] == ["binary_tensor_data"]
    assert httpx.get(predictor.url + "/v2/", headers=AUTHORISED).json() == about
    for path in ("/v2/models/default", "/v2/models/default/versions/3"):
        model = httpx.get(predictor.url + path, headers=AUTHORISED).json()
        assert (model["name"], model["versions"], model["platform"]) == ("default", ["3"], "onnx_onnxruntime")
        assert {"name": "image", "datatype": "FP32", "shape": [-1, 1, SIZE, SIZE]} in model["inputs"]
        assert httpx.get(predictor.url + path + "/ready", headers=AUTHORISED).status_code == 200


def test_served_answers_are_the_packages(predictor: Predictor) -> None:
    """Training-serving skew: the number a clinician sees must be the number that was evaluated."""
    packaged, data = Packaged(predictor.package), packages.dicom(7)
    expected = packaged.predict_dicom(data)
    raw = post(predictor, data, **{"x-radloop-site": "A"})
    text = base64.b64encode(data).decode()
    given = {"name": "dicom", "shape": [1], "datatype": "BYTES", "data": [text]}
    wrapped = post(predictor, {"id": "mine", "inputs": [given], "parameters": {"site": "A"}})
    assert column(raw, "probability") == column(wrapped, "probability") == [expected.probability]
    assert column(raw, "decision") == [expected.decision]
    assert wrapped.json()["id"] == "mine" and "id" not in raw.json()
    assert raw.json()["model_version"] == "3"
    assert raw.json()["parameters"]["model_digest"] == packaged.identity.model_digest
    tensor = packaged.preprocessing.windowed(reference_images(SIZE))
    got = client.predict_tensor(predictor.url, tensor, token=packages.TOKEN)
    np.testing.assert_allclose(got, packaged.predict_tensor(tensor)[0], atol=1e-6)


def test_the_client_and_the_smoke_test(predictor: Predictor) -> None:
    """What the CLI, the demo and a release use; a smoke test that cannot fail would release anything."""
    made = client.predict_dicom(predictor.url, packages.dicom(8), site="A", token=packages.TOKEN)
    assert made.version == "3" and 0 < made.probability < 1 and made.decision in (0, 1)
    found = rollout.smoke(predictor.package, predictor.url, token=packages.TOKEN)
    assert found.n == 8 and found.max_absolute_difference < 1e-6
    other = predictor.folder / "other"
    packages.build(other, weight=9.0)
    with pytest.raises(ServingError, match="does not answer as the packaged one"):
        rollout.smoke(other, predictor.url, token=packages.TOKEN)
    with pytest.raises(ServingError, match="401: a token is needed"):
        client.predict_dicom(predictor.url, packages.dicom(8), site="A")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServingError, match="radloop serve"):
            client.predict_dicom(f"http://127.0.0.1:{unused.getsockname()[1]}", b"", site="A")


def test_a_prediction_is_traceable(predictor: Predictor) -> None:
    """`radloop trace ID` starts from this row; its pseudonyms must be those of the archive."""
    data = packages.dicom(11, issuer="HOSPITAL")
    request_id = "0189f7a0-1c1c-7000-8000-00000000abcd"
    answer = post(predictor, data, **{"x-request-id": request_id})
    predictor.rows()
    row = predictions.find(predictor.log, answer.json()["parameters"]["prediction_id"])
    assert row is not None
    pseudonymiser = Pseudonymiser(packages.KEY)
    assert row["sop_uid"] == pseudonymiser.uid("1.2.826.0.1.3680043.2.1.12")
    assert row["study_uid"] == pseudonymiser.uid("1.2.826.0.1.3680043.2.2.12")
    assert row["patient"] == pseudonymiser.patient(packages.CANARY_ID, "HOSPITAL")
    assert (row["request_id"], row["role"], row["served"], row["status"]) == (request_id, "champion", True, "ok")
    assert row["probability"] == column(answer, "probability")[0]
    assert row["tags"] == {
        "modality": "DX",
        "manufacturer": "Acme",
        "view_position": "PA",
        "sex": "F",
        "age_years": 90.0,
        "rows": 40,
        "columns": 40,
    }
    assert row["features"]["f_mean"] > 0 and row["latency_ms"] > 0


REFUSED: list[tuple[bytes, dict[str, str], str]] = [
    (packages.dicom(1, modality="CT"), {}, "not for this modality; expected: DX or CR; got: CT; next: send images of"),
    (packages.dicom(1, modality=packages.CANARY_NAME), {}, "got: a value that is no code"),
    (packages.dicom(1)[:1500], {}, "cannot be decoded|ends early"),
    (packages.dicom(1)[:200], {}, "ends early|damaged|not for this modality"),
    (b"\xff" * 5000, {}, "no DICOM file"),
    (b"", {}, "no DICOM file"),
    (packages.dicom(1, patient="unknown"), {}, "cannot be told from others"),
    (packages.dicom(1), {"x-radloop-site": ""}, "send the header x-radloop-site"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_the_model_is_not_for_is_422(predictor: Predictor, number: int) -> None:
    """An answer about the wrong kind of image, or about nobody in particular, is worse than none."""
    data, headers, words = REFUSED[number]
    answer = post(predictor, data, **({"x-radloop-site": "A"} | headers))
    assert answer.status_code == 422
    assert re.search(words, answer.json()["error"])


def test_wrong_requests_get_their_status(predictor: Predictor) -> None:
    """Each fault its own status, so that a router retries what can be retried and a person mends the rest."""
    image = {"name": "image", "shape": [1, 1, SIZE, SIZE], "datatype": "FP32", "data": [0.5] * SIZE**2}
    assert post(predictor, {"inputs": [image | {"shape": [1, 1, 2, 2]}]}).status_code == 400
    outside = post(predictor, {"inputs": [image | {"data": [-7.0] * SIZE**2}]})
    assert outside.status_code == 400 and "not preprocessed" in outside.json()["error"]
    assert post(predictor, b"{", "application/json").status_code == 400
    assert post(predictor, b"x", "text/html").status_code == 415
    assert post(predictor, b"x", **{"content-encoding": "gzip"}).status_code == 415
    assert post(predictor, packages.dicom(), **{"x-radloop-site": "Doe^John"}).status_code == 400
    for path in ("/v2/models/other/infer", "/v2/models/default/versions/4/infer"):
        answer = httpx.post(predictor.url + path, content=b"", headers=AUTHORISED)
        assert answer.status_code == 404 and "served is" in answer.json()["error"]
    assert "error" in httpx.get(predictor.url + "/nowhere", headers=AUTHORISED).json()
    assert httpx.get(predictor.infer, headers=AUTHORISED).status_code == 405
    assert httpx.get(predictor.url + "/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {packages.TOKEN}"}]
)
def test_without_the_token_nothing_is_told(predictor: Predictor, headers: dict[str, str]) -> None:
    """Anybody on the machine could otherwise ask, or read off how many patients were seen."""
    for path in ("/v2", "/v2/models/default", "/metrics"):
        assert httpx.get(predictor.url + path, headers=headers).status_code == 401
    answer = httpx.post(predictor.infer, content=packages.dicom(), headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_a_body_too_large_is_413_before_it_is_read(tmp_path: Path) -> None:
    """A gigabyte by mistake must not take the memory that other patients' images need."""
    made = Predictor(tmp_path, "--max-body-bytes", "100000")
    try:
        assert post(made, b"x" * 100_001).status_code == 413

        def endless() -> Iterator[bytes]:
            while True:
                yield b"x" * 65536

        # It either gets its 413 through or breaks the connection; it does not read on.
        try:
            assert httpx.post(made.infer, content=endless(), headers=AUTHORISED, timeout=30).status_code == 413
        except httpx.TransportError as error:
            assert not isinstance(error, httpx.TimeoutException)
        assert post(made, packages.dicom(2), **{"x-radloop-site": "A"}).status_code == 200
    finally:
        assert made.stop() == 0


def test_no_phi_is_left_behind(tmp_path: Path) -> None:
    """A planted name and number must be in no log, metric, message or output, whatever went wrong with the request."""
    made = Predictor(tmp_path)
    told = []
    name, number = packages.CANARY_NAME, packages.CANARY_ID
    spoilt = packages.dicom(3).replace(b"Acme", b"Quok").replace(b"ISO_IR 100", b"ISO_IR 999")
    for data in (packages.dicom(3), packages.dicom(3, modality=name[:16]), spoilt, packages.dicom(3)[:-300]):
        for site in ("A", name, ""):
            told.append(post(made, data, **{"x-radloop-site": site, "x-request-id": number}).text)
    inputs = [{"name": name, "shape": [1], "datatype": number, "data": [name]}]
    told.append(post(made, {"id": name, "inputs": inputs}).text)
    told.append(post(made, {"inputs": name}).text)
    told.append(httpx.get(f"{made.url}/v2/models/{name}", headers=AUTHORISED).text)
    told.append(httpx.get(made.url + "/metrics", headers=AUTHORISED).text)
    assert made.stop() == 0
    told += [path.read_text() for path in (*made.log.iterdir(), tmp_path / "err")]
    for text in told:
        for token in ("quokk", "zebulon", number.lower(), "acc5550123", "3680043.2.1.4"):
            assert token not in text.lower()
    assert any('"status":"ok"' in text for text in told), "nothing was logged at all"


def test_metrics_count(tmp_path: Path) -> None:
    """An alert on errors or latency needs these figures to be right."""
    made = Predictor(tmp_path)
    for n in range(5):
        post(made, packages.dicom(n), **{"x-radloop-site": "A"})
    post(made, packages.dicom(1, modality="CT"), **{"x-radloop-site": "A"})
    page = httpx.get(made.url + "/metrics", headers=AUTHORISED).text
    assert 'radloop_requests_total{protocol="rest",reason="ok",role="champion",status="200"} 5.0' in page
    assert (
        'radloop_requests_total{protocol="rest",reason="UNEXPECTED_MODALITY",role="champion",status="422"} 1.0' in page
    )
    assert 'radloop_request_seconds_count{status="200"} 5.0' in page
    assert "radloop_requests_under_way 0.0" in page
    assert made.stop() == 0


def test_an_answer_does_not_wait_for_an_acknowledgement(predictor: Predictor) -> None:
    """With Nagle's algorithm on, each answer is 40 ms late: ten times what a prediction takes."""
    took = []
    with httpx.Client(headers=AUTHORISED) as session:
        for _ in range(20):
            started = time.perf_counter()
            session.get(predictor.url + "/v2")
            took.append(time.perf_counter() - started)
    assert min(took) < 0.03


def test_sigterm_finishes_what_was_begun(tmp_path: Path) -> None:
    """A roll-out ends predictors all the time; the patient whose image is under way must get the answer."""
    made = Predictor(tmp_path)
    data = packages.dicom(5)
    head = f"POST /v2/models/default/infer HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {packages.TOKEN}\r\n"
    head += f"content-type: application/dicom\r\nx-radloop-site: A\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", made.announced["port"])) as connection:
        connection.sendall(head.encode() + data[:1000])
        time.sleep(0.3)
        made.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.HTTPError):
            httpx.get(made.url + "/v2/health/ready")
        connection.sendall(data[1000:])
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200")
    assert made.process.wait(60) == 0
    assert [row["status"] for row in predictions.read(made.log)] == ["ok"]
    made.stop()


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `main` says when it will not serve; in this process, as nothing is started."""
    if not (folder / "package").exists():
        packages.build(folder / "package")
    key, _token = packages.keys(folder)
    given = ["--package", str(folder / "package"), "--key-file", str(key), "--predictions", str(folder / "log")]
    assert main([*given, *options]) == 78
    assert not (folder / "log").exists()
    return capsys.readouterr().err


def test_it_refuses_what_it_cannot_serve_rightly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another preprocessing gives other numbers, another key other patients: better no answer than such an answer."""
    for name, words in (
        ("preprocessing", "preprocesses images differently"),
        ("key", "project key is not the one"),
        ("reference", "answers otherwise than when it was packaged"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        packages.build(folder / "package", key=bytes(32) if name == "key" else packages.KEY)
        if name == "preprocessing":
            identity = folder / "package" / "identity.json"
            changed = msgspec.json.decode(identity.read_bytes()) | {"preprocessing_digest": "0" * 64}
            identity.write_bytes(msgspec.json.encode(changed))
        if name == "reference":
            (folder / "package" / "model.onnx").write_bytes(packages.network(9.0))
        assert words in refusal(folder, capsys)
    asked = tmp_path / "asked"
    asked.mkdir()
    assert "another model" in refusal(asked, capsys, "--expect-digest", "f" * 64)
    (asked / "short").write_text("abc")
    assert "token is too short" in refusal(asked, capsys, "--token-file", str(asked / "short"))
    assert "key cannot be read" in refusal(asked, capsys, "--key-file", str(asked / "none"))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert "port cannot be bound" in refusal(asked, capsys, "--port", str(busy.getsockname()[1]))
    empty = tmp_path / "empty"
    (empty / "package").mkdir(parents=True)
    assert "cannot be read" in refusal(empty, capsys)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """A predictor left over keeps the port's memory, and answers from a model that nobody supervises."""
    packages.build(tmp_path / "package")
    key, _token = packages.keys(tmp_path)
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'radloop.serving.predictor', '--parent', str(os.getpid()), "
        f"'--package', {str(tmp_path / 'package')!r}, '--key-file', {str(key)!r}, "
        f"'--predictions', {str(tmp_path / 'log')!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2:3]:
        assert time.monotonic() < until, "the predictor outlived its parent"
        time.sleep(0.05)
