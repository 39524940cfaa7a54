"""Open Inference Protocol v2: every wrong request gets a status and words that help; no right one is turned away."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from radloop.serving import protocol
from radloop.serving.protocol import Refusal

SIZE = 4


def ask(inputs: Any, **rest: Any) -> protocol.Question:
    return protocol.parse(json.dumps({"inputs": inputs, **rest}).encode(), "application/json", None, SIZE)


def image(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "shape": [1, 1, SIZE, SIZE], "datatype": "FP32", "data": [0.5] * SIZE**2} | changes


def files(*data: bytes, **changes: Any) -> dict[str, Any]:
    texts = [base64.b64encode(one).decode() for one in data]
    given = {"name": "dicom", "shape": [len(data)], "datatype": "BYTES", "data": texts}
    return given | {"parameters": {"content_type": "base64"}} | changes


@given(
    arrays.arrays(np.float32, (2, 1, SIZE, SIZE), elements=st.floats(-(2.0**100), 2.0**100, width=32)), st.booleans()
)
def test_a_tensor_arrives_bit_for_bit(tensor: np.ndarray, nested: bool) -> None:
    """A value changed on the way is another image than the one that was sent."""
    data = tensor.tolist() if nested else tensor.ravel().tolist()
    question = ask([image(shape=[2, 1, SIZE, SIZE], data=data)], id="42")
    assert question.images is not None
    assert question.images.tobytes() == tensor.tobytes()
    assert question.id == "42"


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=4))
def test_files_arrive_byte_for_byte(data: list[bytes]) -> None:
    """A file changed on the way is no longer what the modality made."""
    assert ask([files(*data)]).files == tuple(data)


def test_a_dicom_body_is_one_file_as_it_is() -> None:
    """`curl --data-binary` is how most people will try it first."""
    question = protocol.parse(b"\x00DICM", "application/dicom; charset=binary", "site-A", SIZE)
    assert (question.files, question.site) == ((b"\x00DICM",), "site-A")


def test_the_requests_own_site_goes_before_the_header() -> None:
    """One connection may carry several senders' images; each must get its own patient's pseudonym."""
    body = json.dumps({"inputs": [image()], "parameters": {"site": "B"}}).encode()
    assert protocol.parse(body, "application/json", "A", SIZE).site == "B"


WRONG: list[tuple[Any, str]] = [
    ([], "exactly one input"),
    ([image(), image()], "exactly one input"),
    ([image(name="x-ray of John")], "exactly one input"),
    ([image(datatype="FP64")], "wrong datatype; expected FP32"),
    ([image(shape=[1, 1, 5, 5])], r"shape \[1, 1, 5, 5\]; expected FP32 \[n, 1, 4, 4\]"),
    ([image(shape=[0, 1, SIZE, SIZE], data=[])], "shape"),
    ([image(shape=[-1, 1, SIZE, SIZE])], "shape"),
    ([image(shape=[10**9, 1, SIZE, SIZE])], "shape"),
    ([image(data=[0.5] * 15)], "15 values; its shape .* needs 16"),
    ([image(data=[1e39] * 16)], "not finite"),
    ([image(data=["0.5"] * 16)], "neither a flat list of numbers nor nested"),
    ([image(data=[[0.5] * 16])], "neither a flat list"),
    ([image(data=[[[[0.5] * 4] * 3]])], "nested as"),
    ([image(data=[[[[0.5] * 4] * 3 + [[0.5] * 3]]])], "neither a flat list"),
    ([image(data=None)], "neither a flat list"),
    ([files(b"x", datatype="FP32")], "expected BYTES"),
    ([files(b"x", data=["%%%"])], "not valid base64"),
    ([files(b"x", data=["QUJD\n"])], "not valid base64"),
    ([files(b"x", data=["QUI"])], "not valid base64"),
    ([files(b"x", data=[1])], "no flat list of strings"),
    ([files(b"x", shape=[2])], "1 files; its shape .* needs 2"),
    ([files(b"x", parameters={"content_type": "hex"})], "only content_type is base64"),
    ("no list", "no Open Inference Protocol v2 request"),
]


@pytest.mark.parametrize(("inputs", "words"), WRONG)
def test_a_wrong_request_is_told_what_is_wrong(inputs: Any, words: str) -> None:
    """Whoever integrates a PACS has nothing but this sentence to go by; a guess at the meaning could be a wrong answer."""
    with pytest.raises(Refusal, match=words) as refused:
        ask(inputs)
    assert refused.value.status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"inputs": [{"name": "image"}]}', b"null"])
def test_what_is_no_request_is_400(body: bytes) -> None:
    """A port scanner or a wrong client must not bring the predictor down."""
    with pytest.raises(Refusal) as refused:
        protocol.parse(body, "application/json", None, SIZE)
    assert refused.value.status == 400


def test_nan_is_named() -> None:
    """Python's json writes NaN, which is no JSON: say so, as "malformed" alone costs an afternoon."""
    body = json.dumps({"inputs": [image(data=[float("nan")] * 16)]}).encode()
    with pytest.raises(Refusal, match="NaN and Infinity are no JSON"):
        protocol.parse(body, "application/json", None, SIZE)


def test_other_content_is_415() -> None:
    """An upload form is not silently taken for an image."""
    with pytest.raises(Refusal, match="application/dicom") as refused:
        protocol.parse(b"", "image/png", None, SIZE)
    assert refused.value.status == 415


@pytest.mark.parametrize("site", ["Doe^John", "a b", "x" * 65, "é", 7])
def test_a_site_is_a_code(site: Any) -> None:
    """The site is logged: free text there could name a patient, and must not come back in the error either."""
    with pytest.raises(Refusal, match="no site code") as refused:
        protocol.checked_site(site)
    assert str(site) not in refused.value.message or site == 7


def test_unknown_outputs_are_refused() -> None:
    """An answer without what was asked for would be taken for an answer."""
    with pytest.raises(Refusal, match="output 1 has an unknown name; there are: probability"):
        ask([image()], outputs=[{"name": "decision"}, {"name": "logit"}])


def test_an_answer_has_what_was_asked() -> None:
    """Clients written against the protocol must read it: names, shapes, datatypes, and the id they sent."""
    columns = {"probability": [0.25, 0.5], "decision": [0, 1], "prediction_id": ["a", "b"]}
    question = ask([image()], id="7", outputs=[{"name": "decision"}])
    made = msgspec.json.decode(protocol.answer(question, "default", "3", {"model_digest": "d"}, columns)[0])
    assert made == {
        "model_name": "default",
        "model_version": "3",
        "id": "7",
        "parameters": {"model_digest": "d"},
        "outputs": [{"name": "decision", "shape": [2, 1], "datatype": "INT64", "data": [0, 1]}],
    }


@given(st.binary(max_size=200), st.sampled_from(["application/json", "", "text/plain"]))
def test_no_body_breaks_the_parser(body: bytes, kind: str) -> None:
    """Anything that is not a Refusal would be a 500."""
    with pytest.raises(Refusal):
        protocol.parse(body, kind, None, SIZE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), json_values))
def test_no_input_breaks_the_parser(changes: dict[str, Any]) -> None:
    """As above, for requests that are nearly right."""
    for one in (image(), files(b"x")):
        try:
            ask([one | changes])
        except Refusal as refused:
            assert refused.status in (400, 415)


def raw(inputs: list[dict[str, Any]], data: bytes, **rest: Any) -> protocol.Question:
    text = json.dumps({"inputs": inputs, **rest}).encode()
    return protocol.parse(text + data, "application/octet-stream", None, SIZE, str(len(text)))


def binary(size: int, **changes: Any) -> dict[str, Any]:
    told = {"name": "image", "shape": [1, 1, SIZE, SIZE], "datatype": "FP32"}
    return told | {"parameters": {"binary_data_size": size}} | changes


@given(arrays.arrays(np.float32, (3, 1, SIZE, SIZE), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_a_raw_tensor_arrives_bit_for_bit(tensor: np.ndarray) -> None:
    """The binary extension is what makes serving fast; it may change no value."""
    data = tensor.astype("<f4").tobytes()
    question = raw([binary(len(data), shape=[3, 1, SIZE, SIZE])], data)
    assert question.images is not None
    assert question.images.tobytes() == tensor.tobytes()


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=4))
def test_raw_files_arrive_byte_for_byte(files_: list[bytes]) -> None:
    """A file whose length lies in front of it is neither cut nor joined to the next."""
    data = b"".join(len(one).to_bytes(4, "little") + one for one in files_)
    given_ = {"name": "dicom", "shape": [len(files_)], "datatype": "BYTES"}
    assert raw([given_ | {"parameters": {"binary_data_size": len(data)}}], data).files == tuple(files_)


@pytest.mark.parametrize(
    ("inputs", "data", "match"),
    [
        ([binary(63)], b"\0" * 64, "binary_data_size is not the number of bytes"),
        ([binary(60)], b"\0" * 60, "has 60 bytes; its shape .* needs 64"),
        ([binary(64, data=[0.5] * 16)], b"\0" * 64, "data in the JSON and after it"),
        ([image()], b"\0" * 64, "has no parameter binary_data_size"),
        ([binary(True)], b"\0", "binary_data_size is not"),
        ([binary(8, name="dicom", shape=[1], datatype="BYTES")], b"\xff\xff\xff\xff1234", "longer than the data"),
        ([binary(5, name="dicom", shape=[1], datatype="BYTES")], b"\0\0\0\0x", "1 bytes follow the last"),
        ([binary(3, name="dicom", shape=[1], datatype="BYTES")], b"\0\0\0", "longer than the data"),
        ([binary(4, name="dicom", shape=[-1, -1], datatype="BYTES")], b"\0\0\0\0", "has the shape"),
    ],
)
def test_raw_data_that_lies_about_itself_is_refused(inputs: list[dict[str, Any]], data: bytes, match: str) -> None:
    """Bytes taken for a tensor of another shape would be predicted as an image that nobody sent."""
    with pytest.raises(Refusal, match=match) as refused:
        raw(inputs, data)
    assert refused.value.status == 400


@pytest.mark.parametrize("length", ["", "x", "0", "-1", "999", "1.0", "\u0661"])
def test_a_header_length_that_is_none_is_refused(length: str) -> None:
    """The header comes from outside, too."""
    with pytest.raises(Refusal, match="Inference-Header-Content-Length"):
        protocol.parse(b"{}", "application/octet-stream", None, SIZE, length)


def test_outputs_come_raw_where_they_are_asked_for_so() -> None:
    """A client that asks for raw outputs reads them by their sizes; one byte off and every value is another."""
    question = ask(
        [image()], outputs=[{"name": "decision"}, {"name": "probability", "parameters": {"binary_data": True}}]
    )
    columns = {"probability": [0.25, 0.5], "decision": [0, 1], "prediction_id": ["a", "b"]}
    body, length = protocol.answer(question, "m", "1", {}, columns)
    assert length is not None
    told = json.loads(body[:length])["outputs"]
    assert told[0]["data"] == [0, 1]
    assert told[1] == {
        "name": "probability", "shape": [2, 1], "datatype": "FP64", "parameters": {"binary_data_size": 16},
    }  # fmt: skip
    assert np.frombuffer(body[length:], "<f8").tolist() == [0.25, 0.5]
    every = ask([image()], parameters={"binary_data_output": True})
    assert every.binary == {"probability", "decision", "prediction_id"}
    assert protocol.raw_output("prediction_id", ["ab"]) == b"\2\0\0\0ab"


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_a_multipart_body_is_its_parts(files_: list[bytes]) -> None:
    """DICOMweb senders speak multipart/related; what they send arrives as it was."""
    body = b"".join(b"--X\r\nContent-Type: application/dicom\r\n\r\n" + one + b"\r\n" for one in files_) + b"--X--\r\n"
    if b"\r\n--X" in b"".join(files_):
        return
    kind = 'multipart/related; type="application/dicom"; boundary="X"'
    assert protocol.parse(body, kind, None, SIZE).files == tuple(files_)


@pytest.mark.parametrize(
    ("body", "kind", "match"),
    [
        (b"", "multipart/related", "boundary"),
        (b"--X\r\n\r\nabc", "multipart/related; boundary=X", "closing boundary"),
        (b"--X\r\nabc\r\n--X--", "multipart/related; boundary=X", "empty line"),
        (b"--X--", "multipart/related; boundary=X", "no part"),
    ],
)
def test_a_multipart_body_that_is_none_is_refused(body: bytes, kind: str, match: str) -> None:
    """A cut upload is told so, and is not predicted as a shorter one."""
    with pytest.raises(Refusal, match=match):
        protocol.parse(body, kind, None, SIZE)
