"""Tiny model packages, in the layout of `learning.package`, and DICOM files to ask them about. No torch."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydicom import DataElement, config
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from radloop.dicom.uids import Pseudonymiser
from radloop.imaging.transforms import Preprocessing
from radloop.learning.decision import Decision
from radloop.learning.package import Identity, Inputs, Packaged, reference_images

SIZE = 16
KEY = bytes(range(32))
TOKEN = "a-token-for-tests-only"
CANARY_NAME = "Quokkason^Zebulon"
CANARY_ID = "MRN77120433"


def build(folder: Path, *, weight: float = 4.0, key: bytes = KEY, modalities: tuple[str, ...] = ("DX", "CR")) -> str:
    """Write a package whose logit is `weight` times (mean - 0.5); returns the model digest."""
    folder.mkdir(parents=True)
    preprocessing = Preprocessing(size=SIZE)
    decision = Decision(slope=1.0, intercept=0.0, threshold=0.5, prevalence=0.1)
    inputs = Inputs(modalities=list(modalities), size=SIZE, positive="finding", negative="none")
    (folder / "model.onnx").write_bytes(network(weight))
    for name, value in (("preprocessing", preprocessing), ("decision", decision), ("inputs", inputs)):
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(value))
    digest = hashlib.sha256(f"{weight}{modalities}".encode()).hexdigest()
    identity = Identity(
        task="finding",
        model_digest=digest,
        dataset_digest="0" * 64,
        preprocessing_digest=preprocessing.digest,
        key_id=Pseudonymiser(key).key_id,
        radloop="radloop-0.1.0-py3-none-any.whl",
    )
    (folder / "identity.json").write_bytes(msgspec.json.encode(identity))
    packaged, native = Packaged(folder), reference_images(SIZE)
    logits = packaged.logits(preprocessing.windowed(native))
    probabilities = decision.probability(logits)
    decisions = decision.decide(probabilities)
    np.savez(folder / "reference.npz", native=native, logits=logits, probabilities=probabilities, decisions=decisions)
    return digest


def network(weight: float) -> bytes:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["product"]),
        helper.make_node("Sub", ["product", "b"], ["logit"]),
    ]
    weights = [
        numpy_helper.from_array(np.full((SIZE * SIZE, 1), weight / SIZE**2, np.float32), "w"),
        numpy_helper.from_array(np.array([weight / 2], np.float32), "b"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, SIZE, SIZE])
    logit = helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["n", 1])
    graph = helper.make_graph(nodes, "tiny", [image], [logit], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def dicom(
    number: int = 0,
    *,
    patient: str = CANARY_ID,
    modality: str = "DX",
    side: int = 40,
    issuer: str | None = None,
    seed: int | None = None,
) -> bytes:
    """A radiograph with an identifying header, as DICOM Part 10 bytes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.826.0.1.3680043.2.1.{number + 1}")
    ds: Dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.826.0.1.3680043.2.2.{number + 1}", "1.2.826.0.1.3680043.2.3"
    ds.PatientID, ds.PatientName = patient, CANARY_NAME
    ds[0x00080060] = DataElement(0x00080060, "CS", modality, validation_mode=config.IGNORE)
    ds.PatientSex, ds.PatientAge, ds.Manufacturer, ds.ViewPosition = "F", "095Y", "Acme", "PA"
    ds.AccessionNumber = "ACC5550123"
    if issuer is not None:
        ds.IssuerOfPatientID = issuer
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    random = np.random.default_rng(number if seed is None else seed)
    ds.PixelData = random.integers(0, 4096, (side, side), dtype=np.uint16).tobytes()
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def keys(folder: Path) -> tuple[Path, Path]:
    """Write a key file and a token file."""
    key, token = folder / "radloop.key", folder / "token"
    key.write_text(KEY.hex() + "\n")
    token.write_text(TOKEN + "\n")
    return key, token
