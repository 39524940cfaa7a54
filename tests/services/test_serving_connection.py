"""Connections of the predictor: what is answered without uvicorn, what goes to it, and that nobody can tell which it was."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from radloop.dicom.uids import Pseudonymiser
from radloop.learning.package import Packaged
from radloop.serving.model import ServedModel
from radloop.serving.predictions import PredictionLog
from radloop.serving.predictor import connection
from radloop.serving.predictor.core import Core
from radloop.serving.predictor.rest import Infer

_spec = importlib.util.spec_from_file_location("predictors", Path(__file__).with_name("test_serving_predictor.py"))
assert _spec is not None and _spec.loader is not None
predictors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(predictors)
SIZE, AUTHORISED = predictors.SIZE, predictors.AUTHORISED
INFER = "/v2/models/default/infer"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = predictors.Predictor(tmp_path_factory.mktemp("connections"))
    yield made
    made.stop()


def tensor(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 1, SIZE, SIZE), np.float32)


def request(images: np.ndarray, *, path: str = INFER, chunked: bool = False, **headers: str) -> bytes:
    """An inference by binary tensor, as bytes on the wire."""
    told = {"name": "image", "shape": list(images.shape), "datatype": "FP32"}
    text = json.dumps({"inputs": [told | {"parameters": {"binary_data_size": images.nbytes}}]}).encode()
    body = text + images.tobytes()
    length = {"content-length": str(len(body))}
    if chunked:
        length, body = {"transfer-encoding": "chunked"}, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    told_too = {"host": "x", "inference-header-content-length": str(len(text)), **length, **AUTHORISED, **headers}
    return "\r\n".join([f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in told_too.items()), "", ""]).encode() + body


def connect(predictor: Any) -> socket.socket:
    host, port = predictor.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answers(link: socket.socket, count: int) -> list[tuple[int, Any]]:
    """Status and JSON of the next `count` answers."""
    data, found = b"", []
    while len(found) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if head.startswith(b"HTTP/1.1 100 ") and end:
            data = rest
        elif length is not None and end and len(rest) >= int(length[1]):
            found.append((int(head.split()[1]), json.loads(rest[: int(length[1])])))
            data = rest[int(length[1]) :]
        else:
            more = link.recv(65536)
            assert more, f"the connection was closed after {len(found)} of {count} answers"
            data += more
    assert not data
    return found


def probability(answer: tuple[int, Any]) -> float:
    assert answer[0] == 200, answer
    return float(answer[1]["outputs"][0]["data"][0])


def expected(predictor: Any, images: np.ndarray) -> Any:
    return pytest.approx(float(Packaged(predictor.package).predict_tensor(images)[0][0]), abs=1e-6)


@pytest.mark.parametrize("step", [1, 7, 100, 1000])
def test_bytes_may_come_in_any_pieces(predictor: Any, step: int) -> None:
    """A network cuts a request wherever it likes: a tensor shifted by a byte would be another image."""
    images = tensor()
    data = request(images)
    with connect(predictor) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cut = data.index(b"\r\n\r\n") + 40
        for start in range(0, cut, step):
            link.sendall(data[start : min(start + step, cut)])
            time.sleep(0.0005)
        link.sendall(data[cut:])
        assert probability(answers(link, 1)[0]) == expected(predictor, images)


def test_the_log_names_each_image_by_its_digest(predictor: Any) -> None:
    """Digests are found after the answer: of another image, or none, champion's and challenger's rows would not pair."""
    several = np.concatenate([tensor(seed) for seed in (5, 6, 7)])
    with connect(predictor) as link:
        link.sendall(request(several) + request(tensor(8)))
        got = answers(link, 2)
    named = [name for _, answer in got for name in answer["outputs"][2]["data"]]
    rows = {row["prediction_id"]: row["input_digest"] for row in predictor.rows()}
    images = [*several, tensor(8)[0]]
    assert [rows[name] for name in named] == [hashlib.sha256(one.tobytes()).hexdigest() for one in images]


def test_requests_sent_at_once_are_answered_in_order(predictor: Any) -> None:
    """A client that pipelines gets each answer for its own image, also when another kind of request stands in between."""
    one, two = tensor(1), tensor(2)
    with connect(predictor) as link:
        link.sendall(request(one) + request(two) + LIVE + request(one) + LIVE + request(two))
        got = answers(link, 6)
    assert [probability(got[n]) for n in (0, 1, 3, 5)] == [expected(predictor, images) for images in (one, two) * 2]
    assert got[2] == got[4] == (200, {"live": True})


@pytest.mark.parametrize(
    ("chunked", "headers"),
    [
        (False, {}),
        (True, {}),
        (False, {"expect": "100-continue"}),
        (False, {"connection": "keep-alive"}),
        (False, {"connection": "close"}),
    ],
)
def test_whatever_a_client_negotiates_the_answer_is_the_same(
    predictor: Any, chunked: bool, headers: dict[str, str]
) -> None:
    """A client is not to know that most requests are answered by a shorter way."""
    images = tensor()
    with connect(predictor) as link:
        link.sendall(request(images, chunked=chunked, **headers))
        assert probability(answers(link, 1)[0]) == expected(predictor, images)
        if headers.get("connection") == "close":
            assert link.recv(1) == b""


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda data: data.replace(b"authorization: Bearer ", b"authorization: Bearer x"), 401),
        (lambda data: data.replace(b"/default/", b"/other/"), 404),
        (lambda data: data.replace(b"host: x", b"host: x\r\ncontent-encoding: gzip"), 415),
        (lambda data: data.replace(b"\r\ncontent-length: ", b"\r\ncontent-length: 99999999"), 413),
        (lambda data: data.replace(b"host: x", b"host: x\r\ncontent-length: 5"), 400),
        (lambda data: data.replace(b"host: x", b"host: x\r\ntransfer-encoding: chunked"), 400),
        (lambda data: data.replace(b"host: x", b"host x"), 400),
        (lambda data: data.replace(b'"FP32"', b'"FP16"'), 400),
    ],
)
def test_a_wrong_request_gets_its_status(predictor: Any, change: Any, status: int) -> None:
    """The short way lets nobody in who would not come in by the long one: no token, two lengths (request smuggling)."""
    with connect(predictor) as link:
        link.sendall(change(request(tensor())))
        assert link.recv(4096).split()[1] == str(status).encode()
    with connect(predictor) as link:  # and the next one is served
        link.sendall(LIVE)
        assert answers(link, 1)[0][0] == 200


def test_a_client_that_goes_away_leaves_nothing_behind(predictor: Any) -> None:
    """Half-sent requests that count as under way for ever would one day fill the queue."""
    data = request(tensor())
    for cut in (10, data.index(b"\r\n\r\n") + 4, len(data) - 1):
        with connect(predictor) as link:
            link.sendall(data[:cut])
            time.sleep(0.05)
    deadline = time.monotonic() + 60
    page = ""
    while time.monotonic() < deadline and "radloop_requests_under_way 0.0" not in page:
        page = httpx.get(predictor.url + "/metrics", headers=AUTHORISED).text
    assert "radloop_requests_under_way 0.0" in page
    assert 'radloop_requests_total{protocol="rest",reason="client_gone",role="champion",status="499"} 2.0' in page


def test_silent_clients_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand clients that send half a body and wait would hold a thousand connections."""
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "_LOOK_S", 0.1)
    predictors.packages.build(tmp_path / "package")
    model = ServedModel(tmp_path / "package", Pseudonymiser(predictors.packages.KEY))
    core = Core(model, PredictionLog(tmp_path / "log", "1"), name="default", version="1")
    state, config = SimpleNamespace(connections=set()), SimpleNamespace(timeout_keep_alive=1.0)

    def make() -> connection.Connection:
        return connection.Connection(Infer(core), config=config, server_state=state, app_state={})  # type: ignore[arg-type]

    async def talk() -> tuple[bytes, bytes]:
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(tensor())[:-1])
        idle, nothing = await asyncio.open_connection("127.0.0.1", port)
        slow, silent = await asyncio.wait_for(reader.read(), 60), await asyncio.wait_for(idle.read(), 60)
        for one in (writer, nothing):
            one.close()
        server.close()
        return slow, silent

    slow, silent = asyncio.run(talk())
    core.close()
    assert slow.startswith(b"HTTP/1.1 408 ") and b"did not arrive within" in slow
    assert silent == b""
    assert not state.connections
