"""The packaged model: a network with everything that turns a DICOM instance into a probability and a decision.

A package folder holds `model.onnx`, `preprocessing.json`, `decision.json`, `inputs.json`, `identity.json`,
`reference.npz`, `MODEL_CARD.md`, `model_card.json` and radloop's wheel. `Packaged` runs it with onnxruntime alone: no
torch, no MLflow. A network that was trained elsewhere stays in its own form (`runtimes.FORMS`), with `runtime.json`, and is
run by its own framework. Nothing in a package comes from a patient: the reference images are drawn.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.errors import ArtifactError, DataError, DicomError
from radloop.imaging.pixels import Pixels
from radloop.imaging.transforms import Preprocessing
from radloop.learning import runtimes
from radloop.learning.decision import Decision

if TYPE_CHECKING:
    from torch import nn

    from radloop.datasets.tensors import TensorSet

INPUT, OUTPUT = "image", "logit"
TOLERANCE = 1e-4
"""Largest absolute difference in logits between two runtimes, or two machines, that is taken for rounding.

Of a network that gives probabilities: in those.
"""

_OPSET = 17
_COMPARED = 256
_REFERENCES = 8
_ONE = np.float32(1).view(np.uint32)
S = TypeVar("S", bound=msgspec.Struct)


class Inputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model may be asked.

    Attributes:
        modalities: values of Modality (0008,0060) it was trained on; another is refused. Empty takes any.
        size: side of the input tensor `image`, float32 `(n, 1, size, size)`, 0 to 1.
        positive, negative: what label 1 and label 0 mean.
    """

    modalities: list[str]
    size: int
    positive: str
    negative: str


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model this is. `model_digest` covers weights, preprocessing and signature (decision and inputs)."""

    task: str
    model_digest: str
    dataset_digest: str
    preprocessing_digest: str
    key_id: str
    radloop: str


class Prediction(msgspec.Struct, frozen=True):
    """The answer for one instance: calibrated probability of the finding, and decision 0 or 1."""

    probability: float
    decision: int
    logit: float


def build(
    model: Path,
    evaluation: Path,
    tensors: TensorSet,
    sop_uids: list[str],
    out: Path,
    *,
    task: str,
    dataset_digest: str,
    key_id: str,
    inputs: Inputs,
) -> Identity:
    """Package a model folder and the decision rule of its evaluation into the folder `out`.

    Args:
        model: from `train.fit`.
        evaluation: from `evaluate.evaluate`.
        tensors, sop_uids: real images on which the ONNX network is compared with its source; the first 256 are used.
        out: a new folder. The model card is written by `card.write`.
        task, dataset_digest, key_id: what the identity says.
        inputs: what the model may be asked.

    Raises:
        ArtifactError: the packaged network's logits are further than 1e-4 from those of its source.
    """
    from radloop.learning import network, wheel

    out.mkdir(parents=True, exist_ok=True)
    brought, preprocessing = runtimes.origin(model) is not None, network.preprocessing_of(model)
    if inputs.size != preprocessing.size:
        raise ArtifactError(
            "inputs and preprocessing disagree on the size", expected=preprocessing.size, got=inputs.size
        )
    decision = _read(evaluation / "decision.json", Decision)
    if brought:
        _copy(model, out)
    else:
        export(network.load(model), preprocessing.size, out / "model.onnx")
    for name, value in (("preprocessing", preprocessing), ("decision", decision), ("inputs", inputs)):
        (out / f"{name}.json").write_bytes(msgspec.json.encode(value, order="deterministic"))
    identity = Identity(
        task=task,
        model_digest=_model_digest(
            runtimes.digest(out) if brought else network.weights_digest(model), preprocessing, decision, inputs
        ),
        dataset_digest=dataset_digest,
        preprocessing_digest=preprocessing.digest,
        key_id=key_id,
        radloop=wheel.build(out).name,
    )
    (out / "identity.json").write_bytes(msgspec.json.encode(identity, order="deterministic"))
    packaged = Packaged(out)
    _compare(network.open_model(model), packaged, tensors, sop_uids[:_COMPARED])
    _write_reference(packaged, out / "reference.npz")
    return identity


def _model_digest(weights: str, preprocessing: Preprocessing, decision: Decision, inputs: Inputs) -> str:
    parts = [weights.encode(), preprocessing.digest.encode()]
    parts += [msgspec.json.encode(part, order="deterministic") for part in (decision, inputs)]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def export(net: nn.Module, size: int, path: Path) -> None:
    """Write the network as ONNX, batch dimension free.

    By torch's TorchScript exporter: 0.6 s against 9 s of the torch.export-based one for the same file and figures
    (torch 2.15); it is deprecated, hence the two filters.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        torch.onnx.export(
            net.cpu().eval(),
            (torch.zeros(2, 1, size, size),),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "n"}, OUTPUT: {0: "n"}},
            opset_version=_OPSET,
            dynamo=False,
        )


def _copy(model: Path, out: Path) -> None:
    for source in runtimes.files(model):
        target = out / source.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _compare(net: nn.Module | runtimes.Network, packaged: Packaged, tensors: TensorSet, sop_uids: list[str]) -> None:
    from radloop.learning import network

    source = network.logits(net, tensors, packaged.preprocessing, sop_uids)
    images = packaged.preprocessing.windowed(tensors.gather(sop_uids))
    difference = packaged.network.difference(source, packaged.logits(images))
    if not difference <= TOLERANCE:
        raise ArtifactError(
            "the packaged network does not compute what the evaluated one does",
            expected=f"logits within {TOLERANCE:g} on {len(sop_uids)} images",
            got=f"a difference of {difference:.3g}",
            next_step="report this with the versions of torch and onnxruntime; the model was not packaged",
        )


def reference_images(size: int) -> NDArray[np.uint16]:
    """Drawn images `(8, size, size)`: smooth blobs and noise, always the same; no patient's."""
    random = np.random.default_rng(20240229)
    y, x = np.mgrid[0:size, 0:size] / size
    images = np.zeros((_REFERENCES, size, size))
    for image in images:
        for cy, cx, width, height in random.uniform((0, 0, 0.05, 300), (1, 1, 0.3, 2000), size=(6, 4)):
            image += height * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))
        image += random.normal(0, 20, image.shape)
    return np.clip(images, 0, 4095).astype(np.uint16)


def _write_reference(packaged: Packaged, path: Path) -> None:
    native = reference_images(packaged.inputs.size)
    logits = packaged.logits(packaged.preprocessing.windowed(native))
    probabilities = packaged.decision.probability(logits)
    np.savez(
        path,
        allow_pickle=False,
        native=native,
        logits=logits,
        probabilities=probabilities,
        decisions=packaged.decision.decide(probabilities),
    )


def example_dicom(inputs: Inputs) -> bytes:
    """A drawn image as DICOM Part 10 bytes that the model accepts: the example of a signature, a smoke test's input."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID("2.25.1")
    ds: Dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "2.25.2", "2.25.3"
    ds.PatientID, ds.PatientName, ds.Modality = "RADLOOP-EXAMPLE", "", (inputs.modalities or ["OT"])[0]
    ds.ConversionType, ds.RescaleSlope, ds.RescaleIntercept = "SYN", 1, -1024
    ds.Rows = ds.Columns = inputs.size
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelData = reference_images(inputs.size)[0].tobytes()
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _read(path: Path, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError("a package cannot be read", expected=path.name, got=str(error)) from None


class Packaged:
    """A package, opened. Answers are the same as in evaluation: one preprocessing, one rule.

    Args:
        folder: from `build`.
        threads: as `runtimes.open_network`.

    Attributes:
        network: the loaded network, and `platform` its framework as the Open Inference Protocol names it.

    Raises:
        ArtifactError: a file is missing or unreadable, the network's framework is not installed, or this radloop's
            preprocessing code is not the model's.
    """

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        self.identity = _read(folder / "identity.json", Identity)
        self.preprocessing = _read(folder / "preprocessing.json", Preprocessing)
        self.decision = _read(folder / "decision.json", Decision)
        self.inputs = _read(folder / "inputs.json", Inputs)
        self.folder = folder
        if self.preprocessing.digest != self.identity.preprocessing_digest:
            raise ArtifactError(
                "this radloop preprocesses images differently from the one that made the model",
                expected=self.identity.preprocessing_digest,
                got=self.preprocessing.digest,
                next_step=f"install the package's wheel ({self.identity.radloop}), or train again with this radloop",
            )
        self.network = runtimes.open_network(folder, self.inputs.size, threads=threads)
        self.platform = self.network.platform

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Raw logits `(n,)` of windowed images `(n, 1, size, size)`."""
        return self.network.logits(images)

    def predict_tensor(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Probabilities and decisions, each `(n,)`, of windowed images, float32 `(n, 1, size, size)`, 0 to 1.

        Raises:
            DataError: another shape or type, a value that is no number, or values outside 0 to 1: an image that did not
                go through `Preprocessing`.
        """
        self.check_tensor(images)
        return self.compute(images)

    def check_tensor(self, images: NDArray[np.float32]) -> None:
        """Raises DataError as `predict_tensor`."""
        side = self.inputs.size
        if images.ndim != 4 or images.shape[1:] != (1, side, side) or images.dtype != np.float32:
            got = f"{images.dtype} {images.shape}"
            raise DataError("the tensor has another shape or type", expected=f"float32 (n, 1, {side}, {side})", got=got)
        # Of 0 to 1 the bits, read as integers, are 0 to those of 1; only -0 is left for a second look.
        if len(images) and images.view(np.uint32).max() > _ONE and not (images.min() >= 0 and images.max() <= 1):
            raise DataError(
                "the tensor was not preprocessed as the model's images were",
                expected="values from 0 to 1",
                got="other values",
                next_step="send the DICOM instance, or apply the package's preprocessing",
            )

    def compute(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As `predict_tensor`, of images that were checked."""
        probabilities = self.decision.probability(self.logits(images))
        return probabilities, self.decision.decide(probabilities)

    def predict_native(self, native: Pixels) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As `predict_tensor`, of images from `Preprocessing.native`, integers `(n, size, size)`."""
        return self.predict_tensor(self.preprocessing.windowed(native))

    def predict_dataset(self, ds: Any) -> Prediction:
        """The answer for one data set. Raises DicomError: no usable image, or not of a declared modality."""
        modality = str(ds.get("Modality") or "")
        if self.inputs.modalities and modality not in self.inputs.modalities:
            raise DicomError(
                "the model was not trained for this modality",
                reason="UNEXPECTED_MODALITY",
                expected=" or ".join(self.inputs.modalities),
                got=modality if len(modality) <= 16 and modality.isalnum() else "something else",
            )
        logits = self.logits(self.preprocessing.from_dataset(ds)[np.newaxis])
        probabilities = self.decision.probability(logits)
        decisions = self.decision.decide(probabilities)
        return Prediction(float(probabilities[0]), int(decisions[0]), float(logits[0]))

    def predict_dicom(self, data: bytes) -> Prediction:
        """The answer for DICOM Part 10 bytes. Raises DicomError as `predict_dataset`, or if they are no DICOM."""
        import pydicom

        try:
            ds = pydicom.dcmread(io.BytesIO(data))
        except Exception as error:  # noqa: BLE001 - readers raise whatever they like on bytes that are no DICOM
            got = f"{len(data)} bytes, {type(error).__name__}"
            raise DicomError(
                "the bytes are no DICOM file", reason="NOT_DICOM", expected="DICOM Part 10 (PS3.10)", got=got
            ) from None
        return self.predict_dataset(ds)

    def check(self) -> None:
        """Compare with the answers that were packaged. Raises ArtifactError if this machine computes others."""
        try:
            with (self.folder / "reference.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
                native, expected = stored["native"], stored["logits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError("a package cannot be read", expected="reference.npz", got=str(error)) from None
        images = self.preprocessing.windowed(native)
        difference = float(np.max([self.network.difference(got, expected) for got in self.network.each_way(images)]))
        if not difference <= TOLERANCE:  # also where it is NaN
            raise ArtifactError(
                "the model answers otherwise than when it was packaged",
                expected=f"logits within {TOLERANCE:g}",
                got=f"a difference of {difference:.3g}",
                next_step="install the versions in the package's requirements; do not serve this model",
            )
