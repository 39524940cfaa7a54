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
        protocol.parse(b"", "multipart/form-data; boundary=x", None, SIZE)
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
    made = msgspec.json.decode(protocol.answer(question, "default", "3", {"model_digest": "d"}, columns))
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
