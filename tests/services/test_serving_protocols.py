"""Clients that others wrote (Triton's) and the protocol's own files, against a real predictor, by REST and by gRPC."""

from __future__ import annotations

import importlib.util
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from google.protobuf import descriptor_pb2

from radloop.learning.package import Packaged
from radloop.serving.predictor.messages import _MESSAGES, MESSAGES, SERVICE

_spec = importlib.util.spec_from_file_location("predictors", Path(__file__).with_name("test_serving_predictor.py"))
assert _spec is not None and _spec.loader is not None
predictors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(predictors)
SIZE, AUTHORISED = predictors.SIZE, predictors.AUTHORISED
METADATA = tuple(AUTHORISED.items())


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = predictors.Predictor(tmp_path_factory.mktemp("protocols"), "--grpc-port", "0")
    yield made
    made.stop()


def images(count: int) -> np.ndarray:
    random = np.random.default_rng(3)
    return random.random((count, 1, SIZE, SIZE), np.float32)


def expected(predictor: Any, tensor: np.ndarray) -> list[float]:
    return [float(p) for p in Packaged(predictor.package).predict_tensor(tensor)[0]]


def call(predictor: Any, method: str, request: Any, **options: Any) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{predictor.announced['grpc_port']}") as channel:
        asked = channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=MESSAGES[f"{method}Response"].FromString,
        )
        return asked(request, metadata=METADATA, timeout=20, **options)


def test_tritons_http_client_gets_the_models_numbers_by_raw_tensors(predictor: Any) -> None:
    """Whoever serves by Triton or KServe today points the same client at us."""
    tensor = images(3)
    with triton_http.InferenceServerClient(predictor.url.removeprefix("http://")) as client:
        asked = triton_http.InferInput("image", list(tensor.shape), "FP32")
        asked.set_data_from_numpy(tensor, binary_data=True)
        outputs = [
            triton_http.InferRequestedOutput(name, binary_data=True) for name in ("probability", "prediction_id")
        ]
        answer = client.infer("default", [asked], outputs=outputs, headers=dict(AUTHORISED))
        assert client.is_server_live() and client.is_server_ready()
        assert client.get_model_metadata("default", headers=dict(AUTHORISED))["platform"] == "onnx_onnxruntime"
    assert answer.as_numpy("probability").ravel() == pytest.approx(expected(predictor, tensor), abs=1e-6)
    assert len({bytes(value) for value in answer.as_numpy("prediction_id").ravel()}) == 3


def test_tritons_grpc_client_gets_the_models_numbers(predictor: Any) -> None:
    """gRPC is the other half of the protocol, and what most platforms use inside."""
    tensor = images(2)
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{predictor.announced['grpc_port']}") as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("default", headers=dict(AUTHORISED))
        metadata = client.get_model_metadata("default", headers=dict(AUTHORISED))
        assert {one.name: list(one.shape) for one in metadata.inputs}["image"] == [-1, 1, SIZE, SIZE]
        asked = triton_grpc.InferInput("image", list(tensor.shape), "FP32")
        asked.set_data_from_numpy(tensor)
        answer = client.infer("default", [asked], headers=dict(AUTHORISED))
    assert answer.as_numpy("probability").ravel() == pytest.approx(expected(predictor, tensor), abs=1e-6)
    assert answer.get_response().parameters["model_digest"].string_param == predictor.announced["model_digest"]


def test_dicom_by_grpc_is_the_same_prediction_as_by_rest(predictor: Any) -> None:
    """One study, one answer, whichever way it came; and the log says by which patient, under a pseudonym."""
    data = predictors.packages.dicom(4)
    by_rest = predictors.post(predictor, data, **{"x-radloop-site": "A"})
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{predictor.announced['grpc_port']}") as client:
        asked = triton_grpc.InferInput("dicom", [1], "BYTES")
        asked.set_data_from_numpy(np.array([data], object))
        answer = client.infer("default", [asked], headers=AUTHORISED | {"x-radloop-site": "A"})
    assert answer.as_numpy("probability").ravel()[0] == predictors.column(by_rest, "probability")[0]
    found = answer.as_numpy("prediction_id").ravel()[0].decode()
    rows = {row["prediction_id"]: row for row in predictor.rows()}
    twin = rows[predictors.column(by_rest, "prediction_id")[0]]
    assert (rows[found]["patient"], rows[found]["input_digest"]) == (twin["patient"], twin["input_digest"])


def test_typed_contents_do_as_well_as_raw_ones(predictor: Any) -> None:
    """The protocol has two forms of a tensor; a client written by hand uses this one."""
    tensor = images(1)
    request = MESSAGES["ModelInferRequest"](model_name="default", id="seven")
    given = request.inputs.add(name="image", datatype="FP32", shape=list(tensor.shape))
    given.contents.fp32_contents.extend(tensor.ravel().tolist())
    answer = call(predictor, "ModelInfer", request)
    values = {output.name: output.contents for output in answer.outputs}
    assert answer.id == "seven" and not answer.raw_output_contents
    assert list(values["probability"].fp64_contents) == pytest.approx(expected(predictor, tensor), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        ({"model_name": "other"}, grpc.StatusCode.NOT_FOUND, "no such model here"),
        ({"model_version": "9"}, grpc.StatusCode.NOT_FOUND, "no such version"),
        ({"shape": [1, 1, 3, 3]}, grpc.StatusCode.INVALID_ARGUMENT, "has the shape"),
        ({"datatype": "FP16"}, grpc.StatusCode.INVALID_ARGUMENT, "wrong datatype"),
        ({"raw": b"1234"}, grpc.StatusCode.INVALID_ARGUMENT, "has 4 bytes"),
        (
            {"raw": np.full((1, 1, SIZE, SIZE), 7, "<f4").tobytes()},
            grpc.StatusCode.INVALID_ARGUMENT,
            "not preprocessed",
        ),
        (
            {"raw": np.full((1, 1, SIZE, SIZE), np.nan, "<f4").tobytes()},
            grpc.StatusCode.INVALID_ARGUMENT,
            "not finite",
        ),
        (
            {"raw": np.full((1, 1, SIZE, SIZE), -np.inf, "<f4").tobytes()},
            grpc.StatusCode.INVALID_ARGUMENT,
            "not finite",
        ),
        ({"name": "x"}, grpc.StatusCode.INVALID_ARGUMENT, "exactly one input"),
        ({"output": "x"}, grpc.StatusCode.INVALID_ARGUMENT, "unknown name"),
    ],
)
def test_a_wrong_grpc_request_is_told_so(predictor: Any, change: dict[str, Any], code: Any, match: str) -> None:
    """The same words as by REST, with gRPC's own status."""
    request = MESSAGES["ModelInferRequest"](
        model_name=change.get("model_name", "default"), model_version=change.get("model_version", "")
    )
    request.inputs.add(
        name=change.get("name", "image"), datatype=change.get("datatype", "FP32"),
        shape=change.get("shape", [1, 1, SIZE, SIZE]),
    )  # fmt: skip
    request.raw_input_contents.append(change.get("raw", images(1).tobytes()))
    if "output" in change:
        request.outputs.add(name=change["output"])
    with pytest.raises(grpc.RpcError, match=match) as refused:
        call(predictor, "ModelInfer", request)
    assert refused.value.code() is code


def test_grpc_wants_the_token(predictor: Any) -> None:
    """A second door without a lock would make the first one's useless."""
    with grpc.insecure_channel(f"127.0.0.1:{predictor.announced['grpc_port']}") as channel:
        asked = channel.unary_unary(f"/{SERVICE}/ModelMetadata")
        with pytest.raises(grpc.RpcError, match="a token is needed") as refused:
            asked(b"", timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_our_messages_are_the_protocols(tmp_path: Path, test_data: Path) -> None:
    """One wrong field number and every client of the real protocol reads nonsense."""
    source, compiled = test_data / "specs" / "open_inference_grpc.proto", tmp_path / "set"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source.parent}", f"--descriptor_set_out={compiled}"]
    subprocess.run([*command, source.name], check=True)
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    ours = descriptor_pb2.FileDescriptorProto()
    MESSAGES["ServerLiveRequest"].DESCRIPTOR.file.CopyToProto(ours)

    def facts(messages: Any, outer: str = "") -> dict[str, set[tuple[Any, ...]]]:
        found = {}
        for message in messages:
            name = f"{outer}{message.name}"
            found[name] = {
                (f.name, f.number, f.type, f.label, f.type_name, f.HasField("oneof_index")) for f in message.field
            }
            found |= facts(message.nested_type, name + ".")
        return found

    assert facts(ours.message_type) == facts(file.message_type)
    assert set(_MESSAGES) <= set(facts(file.message_type))
    assert [m.name for m in file.service[0].method] == [
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
    ]  # fmt: skip


def test_requests_that_wait_are_computed_together_and_each_gets_its_own(predictor: Any) -> None:
    """Under load, an answer given to the wrong request would be another patient's."""
    tensors = [images(1) * np.float32(n / 40) for n in range(40)]
    wanted = [expected(predictor, tensor)[0] for tensor in tensors]

    def ask(tensor: np.ndarray) -> float:
        told = {"name": "image", "shape": list(tensor.shape), "datatype": "FP32"}
        text = json.dumps({"inputs": [told | {"parameters": {"binary_data_size": tensor.nbytes}}]}).encode()
        headers = AUTHORISED | {"inference-header-content-length": str(len(text))}
        answer = httpx.post(predictor.infer, content=text + tensor.tobytes(), headers=headers)
        return float(predictors.column(answer, "probability")[0])

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, tensors))
    assert found == pytest.approx(wanted, abs=1e-6)


def test_what_is_not_answered_in_time_is_told_so(tmp_path: Path) -> None:
    """A radiologist's workstation must not wait for ever."""
    made = predictors.Predictor(tmp_path, "--deadline-s", "0.0001", "--grpc-port", "0")
    try:
        answer = predictors.post(made, predictors.packages.dicom(1), **{"x-radloop-site": "A"})
        assert answer.status_code == 504 and "no answer within" in answer.json()["error"]
        request = MESSAGES["ModelInferRequest"](model_name="default")
        request.inputs.add(name="image", datatype="FP32", shape=[1, 1, SIZE, SIZE])
        request.raw_input_contents.append(images(1).tobytes())
        with pytest.raises(grpc.RpcError) as refused:
            call(made, "ModelInfer", request)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert [row["status"] for row in made.rows()] == ["deadline", "deadline"]
    finally:
        made.stop()


def test_both_protocols_speak_tls(tmp_path: Path) -> None:
    """Between machines of a hospital nothing goes in the clear."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    made = predictors.Predictor(
        tmp_path, "--grpc-port", "0", "--tls-certificate", str(certificate), "--tls-key", str(key)
    )
    try:
        url = made.url.replace("http:", "https:") + "/v2/health/ready"
        assert httpx.get(url, verify=ssl.create_default_context(cafile=str(certificate))).status_code == 200
        secure = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(f"localhost:{made.announced['grpc_port']}", secure) as channel:
            asked = channel.unary_unary(
                f"/{SERVICE}/ServerReady",
                request_serializer=MESSAGES["ServerReadyRequest"].SerializeToString,
                response_deserializer=MESSAGES["ServerReadyResponse"].FromString,
            )
            assert asked(MESSAGES["ServerReadyRequest"](), timeout=20).ready
    finally:
        made.stop()


def test_a_predictor_that_ends_finishes_what_grpc_asked(predictor: Any, tmp_path: Path) -> None:
    """A rollout must lose no request, whichever protocol carried it."""
    made = predictors.Predictor(tmp_path, "--grpc-port", "0")
    tensor = images(64)
    request = MESSAGES["ModelInferRequest"](model_name="default")
    request.inputs.add(name="image", datatype="FP32", shape=list(tensor.shape))
    request.raw_input_contents.append(tensor.tobytes())
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(call, made, "ModelInfer", request) for _ in range(4)]
        time.sleep(0.05)
        assert made.stop() == 0
        told = [one.exception() for one in asked]
    # Either answered, or refused before it was taken; never lost under way.
    assert all(e is None or e.code() is grpc.StatusCode.UNAVAILABLE for e in told)
    assert len(made.rows()) == 64 * told.count(None)
