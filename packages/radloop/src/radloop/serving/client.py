"""Ask a predictor or the gateway about one DICOM instance.

An inference changes nothing but the log, so a 503 (a replica that ends or was killed, behind a gateway without retries of its
own) is asked again for two seconds.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import msgspec

from radloop.dicom.header import read_header
from radloop.dicom.uids import normalise
from radloop.errors import DicomError, ServingError
from radloop.serving.gateway import SUBJECT_HEADER, SUBJECTS

_PAUSES_S = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5)


class Prediction(msgspec.Struct, frozen=True):
    """An answer. `id` is what `radloop trace` takes; `probability` is calibrated; `decision` is 0 or 1."""

    id: str
    probability: float
    decision: int
    version: str
    model_digest: str


def predict_dicom(
    url: str,
    data: bytes,
    *,
    site: str = "",
    token: str | None = None,
    model: str = "default",
    timeout_s: float = 60.0,
    client: Any = None,
) -> Prediction:
    """Send one DICOM Part 10 file and return the answer.

    Args:
        url: of the gateway or of a predictor, such as http://127.0.0.1:8080.
        data: the file as it is; it is pseudonymised by the predictor, in memory.
        site: the sender's site code, needed where the file has no IssuerOfPatientID.
        token: bearer token.
        client: an `httpx.Client` to use again for many requests; one is made for this request if None.

    Raises:
        ServingError: nobody answers there, or the request is refused; the message is the server's.
    """
    headers = {"content-type": "application/dicom"}
    if site:
        headers["x-radloop-site"] = site
    if (number := subject(data, site)) is not None:
        headers[SUBJECT_HEADER] = str(number)
    body = _post(f"{url.rstrip('/')}/v2/models/{model}/infer", data, headers, token, timeout_s, client)
    columns = {output["name"]: output["data"] for output in body["outputs"]}
    return Prediction(
        id=str(columns["prediction_id"][0]),
        probability=float(columns["probability"][0]),
        decision=int(columns["decision"][0]),
        version=str(body["model_version"]),
        model_digest=str(body["parameters"]["model_digest"]),
    )


def subject(data: bytes, site: str) -> int | None:
    """The patient's place in an A/B test, 0 to 9999: a digest of PatientID and issuer, far too short to tell who it is.

    None for bytes without a usable PatientID; such a request goes to either model by chance.
    """
    try:
        header = read_header(data)
    except DicomError:
        return None
    identity = f"{normalise(header.issuer or site)}\0{normalise(header.patient_id)}"
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % SUBJECTS


def predict_tensor(
    url: str, images: Any, *, token: str | None = None, model: str = "default", timeout_s: float = 60.0
) -> list[float]:
    """Probabilities of preprocessed images, float32 (n, 1, size, size). Raises as `predict_dicom`."""
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    content = msgspec.json.encode({"inputs": [tensor]})
    headers = {"content-type": "application/json"}
    body = _post(f"{url.rstrip('/')}/v2/models/{model}/infer", content, headers, token, timeout_s, None)
    return [float(p) for output in body["outputs"] if output["name"] == "probability" for p in output["data"]]


def _post(
    url: str, content: bytes, headers: dict[str, str], token: str | None, timeout_s: float, client: Any
) -> dict[str, Any]:
    import httpx

    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    send = httpx.post if client is None else client.post
    try:
        for pause_s in _PAUSES_S:
            time.sleep(pause_s)
            answer = send(url, content=content, headers=headers, timeout=timeout_s)
            if answer.status_code != 503:
                break
    except httpx.HTTPError as error:
        raise ServingError(
            "no answer from the predictor",
            expected=f"a predictor or the gateway at {url}",
            got=type(error).__name__,
            next_step="start it with `radloop serve`, and look at `radloop status`",
        ) from None
    if answer.status_code != 200:
        raise ServingError("the request was refused", got=f"{answer.status_code}: {_said(answer)}")
    return dict(msgspec.json.decode(answer.content))


def _said(answer: Any) -> str:
    try:
        return str(msgspec.json.decode(answer.content)["error"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return "no reason given"
