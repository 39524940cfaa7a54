"""The predictor under requests that nobody would send, made from the protocol's own description (schemathesis)."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

_spec = importlib.util.spec_from_file_location("predictors", Path(__file__).with_name("test_serving_predictor.py"))
assert _spec is not None and _spec.loader is not None
predictors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(predictors)

SHORT, LONG = 200, 5000


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = predictors.Predictor(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def operations(test_data: Path) -> list[Any]:
    """The protocol's operations; its file writes path parameters as `${NAME}`."""
    text = (test_data / "specs" / "open_inference_rest.yaml").read_text().replace("${", "{")
    schema = schemathesis.openapi.from_dict(yaml.safe_load(text))
    return [result.ok() for result in schema.get_all_operations()]


def fuzz(predictor: Any, operations: list[Any], examples: int) -> Counter[int]:
    """Send `examples` requests; how many of each status."""
    seen: Counter[int] = Counter()
    with httpx.Client(base_url=predictor.url, headers=predictors.AUTHORISED, timeout=20) as client:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            operation = data.draw(st.sampled_from(operations))
            case = data.draw(operation.as_strategy())
            if data.draw(st.integers(0, 3)):  # most of them at the model that is there
                case.path_parameters = {
                    name: {"MODEL_NAME": "default"}.get(name, "3") for name in case.path_parameters or {}
                }
            told = case.as_transport_kwargs(base_url=predictor.url)
            told = {
                name: told[name] for name in ("method", "url", "json", "data", "content") if told.get(name) is not None
            }
            answer = client.request(**told)
            seen[answer.status_code] += 1
            assert answer.status_code < 500, (told["method"], told["url"], answer.text)
            if answer.status_code >= 400 and answer.headers.get("content-type") == "application/json":
                assert answer.json()["error"]

        run()
    return seen


def test_no_request_made_from_the_protocol_is_a_server_error(predictor: Any, operations: list[Any]) -> None:
    """A 500 is a stack trace away from a predictor that is down."""
    seen = fuzz(predictor, operations, SHORT)
    assert seen[200] > 0 and seen[400] + seen[404] + seen[415] > 0
    assert httpx.get(predictor.url + "/v2/health/ready").status_code == 200


@pytest.mark.torture
def test_five_thousand_requests_are_no_server_error(predictor: Any, operations: list[Any]) -> None:
    """As above, longer."""
    fuzz(predictor, operations, LONG)
    assert httpx.get(predictor.url + "/v2/health/ready").status_code == 200


_BYTES = st.one_of(
    st.binary(max_size=400),
    st.builds(lambda a, b: b"\0" * 128 + b"DICM" + a + b, st.binary(max_size=200), st.binary(max_size=200)),
)


_KINDS = ["application/dicom", "application/octet-stream", "text/plain", ""]
_KINDS += [f"multipart/{kind}; boundary=x" for kind in ("related", "form-data")]
_HEADER_TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    body=_BYTES,
    kind=st.sampled_from(_KINDS),
    length=st.one_of(st.none(), st.integers(-5, 500).map(str), _HEADER_TEXT),
)
def test_bytes_of_any_kind_are_refused_not_fallen_over(
    predictor: Any, body: bytes, kind: str, length: str | None
) -> None:
    """What a broken sender delivers gets a 4xx with words; the next request gets its answer."""
    headers = predictors.AUTHORISED | ({"content-type": kind} if kind else {})
    if length is not None:
        headers |= {"inference-header-content-length": length}
    answer = httpx.post(predictor.infer, content=body, headers=headers, timeout=20)
    assert 400 <= answer.status_code < 500, answer.text
    assert not re.search(r"Traceback|Error\(", answer.text)
    assert "error" in answer.json()


def test_a_body_that_never_ends_and_one_that_is_too_large(predictor: Any) -> None:
    """1 GB announced is refused before it is read."""
    import socket

    with socket.create_connection(("127.0.0.1", predictor.announced["port"]), 10) as link:
        token = predictors.AUTHORISED["authorization"]
        head = f"POST /v2/models/default/infer HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\n"
        link.sendall((head + f"content-length: {1 << 30}\r\ncontent-type: application/dicom\r\n\r\n").encode())
        link.settimeout(10)
        assert link.recv(4096).startswith(b"HTTP/1.1 413")
    assert predictor.process.poll() is None
