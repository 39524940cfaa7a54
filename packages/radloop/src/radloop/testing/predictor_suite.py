"""The conformance suite of networks behind the predictor: whatever framework runs it, clients see no difference.

A framework's test is one class:

    class TestMine(PredictorSuite):
        form, platform = "torchscript", "pytorch_torchscript"

        @pytest.fixture(scope="class")
        @classmethod
        def source(cls, tmp_path_factory):
            return networks.write_torchscript(tmp_path_factory.mktemp("mine") / "vendor.pt")

The network is that of `networks.weights`. It is adopted, evaluated, packaged, registered with a real MLflow, fetched from
there and served by a predictor process; its numbers must be those that torch computes from the same weights.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from radloop.dicom.uids import Pseudonymiser
from radloop.learning import brought, evaluate, package, runtimes
from radloop.learning.package import Packaged, example_dicom
from radloop.testing import discs, networks

KEY = bytes(range(32))
TOLERANCE = 1e-5
"""Of probabilities, between frameworks."""

_SITE = {"x-radloop-site": "A"}
_BINARY = "inference-header-content-length"


@dataclass(frozen=True)
class Shelf:
    """What all classes share: the toy task, and a registry."""

    folder: Path
    toy: discs.Toy
    tracking: Any


@cache
def _shelf(folder: Path) -> Shelf:
    from radloop.learning.tracking import Tracking

    folder.mkdir()
    (folder / "key").write_text(KEY.hex())
    toy = discs.make(folder / "toy", patients=80, key_id=Pseudonymiser(KEY).key_id)
    return Shelf(folder, toy, Tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "mlflow", "disc"))


class Served:
    """A registered version, fetched and served by a process of its own."""

    def __init__(self, shelf: Shelf, form: str, source: Path) -> None:
        self.shelf, folder = shelf, shelf.folder / form
        self.version = register(shelf, source, folder)
        self.package = shelf.tracking.fetch("disc", self.version, folder / "fetched")
        self.packaged = Packaged(self.package)
        command = [sys.executable, "-m", "radloop.serving.predictor", "--package", str(self.package)]
        command += ["--key-file", str(shelf.folder / "key"), "--predictions", str(folder / "log")]
        command += ["--version", str(self.version), "--grpc-port", "0"]
        with (folder / "err").open("wb") as err:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (folder / "err").read_text()
        self.told = json.loads(line)
        self.url = f"http://127.0.0.1:{self.told['port']}"
        self.infer = f"{self.url}/v2/models/default/infer"

    def stop(self) -> int:
        """End it as a rollout does; its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(30)
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def rest(self, images: NDArray[Any], **changes: Any) -> httpx.Response:
        """Ask by REST, with a raw tensor."""
        told = {"name": "image", "shape": list(images.shape), "datatype": "FP32"} | changes
        told["parameters"] = {"binary_data_size": images.nbytes}
        text = json.dumps({"inputs": [told]}).encode()
        headers = {_BINARY: str(len(text)), "content-type": "application/octet-stream"}
        return httpx.post(self.infer, content=text + images.tobytes(), headers=headers, timeout=60)

    def grpc(self, raw: bytes, name: str = "image", **changes: Any) -> Any:
        """Ask by gRPC, with raw contents. Raises grpc.RpcError."""
        import grpc

        from radloop.serving.predictor.messages import MESSAGES, SERVICE

        request = MESSAGES["ModelInferRequest"](model_name="default")
        request.inputs.add(name=name, **changes)
        request.raw_input_contents.append(raw)
        with grpc.insecure_channel(f"127.0.0.1:{self.told['grpc_port']}") as channel:
            asked = channel.unary_unary(
                f"/{SERVICE}/ModelInfer",
                request_serializer=type(request).SerializeToString,
                response_deserializer=MESSAGES["ModelInferResponse"].FromString,
            )
            return asked(request, metadata=tuple(_SITE.items()), timeout=60)


def register(shelf: Shelf, source: Path, folder: Path) -> int:
    """Take a network through adoption, evaluation and packaging into the registry; its version."""
    toy = shelf.toy
    model, measured, packed = folder / "model", folder / "evaluation", folder / "package"
    images = toy.preprocessing.windowed(toy.tensors.gather(toy.tensors.sop_uids[:32]))
    assert brought.adopt(source, "logit", toy.preprocessing, images, model) == []
    config = evaluate.EvaluateConfig(resamples=20, minimum_patients=5, examples=2)
    evaluate.evaluate(model, toy.tensors, toy.table, toy.preprocessing, config, measured, task="disc")
    identity = package.build(
        model, measured, toy.tensors, toy.tensors.sop_uids, packed,
        task="disc", dataset_digest="d" * 64, key_id=Pseudonymiser(KEY).key_id,
        inputs=package.Inputs(modalities=["DX"], size=discs.SIZE, positive="disc", negative="no disc"),
    )  # fmt: skip
    run = shelf.tracking.log_run(identity.model_digest, name="brought", params={}, metrics={})
    return int(shelf.tracking.register(packed, name="disc", run_id=run))


def probabilities(answer: httpx.Response) -> list[float]:
    """Of an answer by REST."""
    assert answer.status_code == 200, answer.text
    return next(output["data"] for output in answer.json()["outputs"] if output["name"] == "probability")


def by_grpc(answer: Any) -> list[float]:
    """Of an answer by gRPC."""
    place = [output.name for output in answer.outputs].index("probability")
    return [float(value) for value in np.frombuffer(answer.raw_output_contents[place], "<f8")]


class PredictorSuite:
    """What every framework must do alike."""

    form: ClassVar[str] = ""
    platform: ClassVar[str] = ""

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        raise NotImplementedError("give the path of the network, in the framework's form")

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
        served = Served(_shelf(tmp_path_factory.getbasetemp() / "shelf"), cls.form, source)
        yield served
        assert served.stop() == 0

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, served: Served) -> Callable[[NDArray[np.float32]], list[float]]:
        """The probabilities by torch, from the same weights, under the rule that was packaged."""
        import torch

        module = networks.torch_module()

        def compute(images: NDArray[np.float32]) -> list[float]:
            with torch.inference_mode():
                logits = module(torch.from_numpy(images)).double().numpy().reshape(-1)
            return [float(value) for value in served.packaged.decision.probability(logits)]

        return compute

    @pytest.fixture
    def images(self, served: Served) -> NDArray[np.float32]:
        toy = served.shelf.toy
        return toy.preprocessing.windowed(toy.tensors.gather(toy.tensors.sop_uids[40:80]))

    def test_it_says_what_it_is(self, served: Served) -> None:
        """A client plans by the metadata; an operator sees which framework answers."""
        told = httpx.get(f"{served.url}/v2/models/default").json()
        assert told["platform"] == self.platform and told["versions"] == [str(served.version)]
        assert {"name": "image", "datatype": "FP32", "shape": [-1, 1, discs.SIZE, discs.SIZE]} in told["inputs"]
        assert told["properties"]["model_digest"] == served.packaged.identity.model_digest

    def test_same_inputs_same_outputs(self, served: Served, images: Any, expected: Any) -> None:
        """The framework is the vendor's choice; the patient's number must not hang on it, nor on the protocol."""
        wanted = expected(images)
        assert max(wanted) - min(wanted) > 0.3, "these images could not tell one network from another"
        assert probabilities(served.rest(images)) == pytest.approx(wanted, abs=TOLERANCE)
        answer = served.grpc(images.tobytes(), datatype="FP32", shape=list(images.shape))
        assert by_grpc(answer) == pytest.approx(wanted, abs=TOLERANCE)

    def test_a_dicom_instance(self, served: Served, expected: Any) -> None:
        """A study goes through the model's own preprocessing, whichever framework comes after it."""
        data = example_dicom(served.packaged.inputs)
        with pydicom.dcmread(io.BytesIO(data)) as ds:
            wanted = expected(served.packaged.preprocessing.from_dataset(ds)[np.newaxis])
        headers = {"content-type": "application/dicom", **_SITE}
        assert probabilities(httpx.post(served.infer, content=data, headers=headers, timeout=60)) == pytest.approx(
            wanted, abs=TOLERANCE
        )
        raw = len(data).to_bytes(4, "little") + data
        answer = served.grpc(raw, "dicom", datatype="BYTES", shape=[1])
        assert by_grpc(answer) == pytest.approx(wanted, abs=TOLERANCE)

    def test_mlflows_own_way_gives_the_same(self, served: Served) -> None:
        """Who loads the registered version with MLflow must get the numbers that were released, and know what to install."""
        import pandas as pd

        data = example_dicom(served.packaged.inputs)
        answer = served.shelf.tracking.load("disc", served.version).predict(pd.DataFrame({"dicom": [data] * 2}))
        wanted = served.packaged.predict_dicom(data)
        assert answer["probability"].tolist() == pytest.approx([wanted.probability] * 2, abs=TOLERANCE)
        assert answer["decision"].tolist() == [wanted.decision] * 2
        place = Path(served.shelf.tracking.location("disc", served.version).removeprefix("file://"))
        needed = {line.split("==")[0] for line in (place / "requirements.txt").read_text().splitlines()}
        assert set(runtimes.FRAMEWORKS.values()) & needed == {runtimes.FRAMEWORKS[self.form]}

    @pytest.mark.parametrize(
        ("change", "value", "match"),
        [
            ({"shape": [2, 1, 8, 8]}, None, r"has the shape \[2, 1, 8, 8\]; expected FP32 \[n, 1, 32, 32\]"),
            ({"shape": [2, 32, 32, 1]}, None, r"has the shape \[2, 32, 32, 1\]"),
            ({"datatype": "FP64"}, None, "wrong datatype; expected FP32"),
            ({}, np.nan, "values that are not finite"),
            ({}, 255.0, "not preprocessed as the model's images were"),
        ],
    )
    def test_bad_input_is_told_alike(self, served: Served, change: dict[str, Any], value: Any, match: str) -> None:
        """A framework's own words would help nobody, and some frameworks would answer."""
        import grpc

        images = np.full((2, 1, discs.SIZE, discs.SIZE), 0.5, np.float32)
        if value is not None:
            images[1, 0, 3, 4] = value
        refused = served.rest(images, **change)
        assert refused.status_code == 400
        with pytest.raises(grpc.RpcError, match=match) as by_rpc:
            served.grpc(images.tobytes(), **{"datatype": "FP32", "shape": list(images.shape)} | change)
        assert by_rpc.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert by_rpc.value.details() == refused.json()["error"]

    def test_what_waits_together_is_answered_apart(self, served: Served, images: Any, expected: Any) -> None:
        """Batches are made of several patients: each must get the answer it would have got alone."""
        wanted = expected(images)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda one: probabilities(served.rest(one[np.newaxis]))[0], images))
        assert found == pytest.approx(wanted, abs=TOLERANCE)

    def test_the_smoke_test_of_a_release_passes(self, served: Served) -> None:
        """A model that cannot be released was brought for nothing."""
        from radloop.serving import rollout

        assert rollout.smoke(served.package, served.url).max_absolute_difference < TOLERANCE
