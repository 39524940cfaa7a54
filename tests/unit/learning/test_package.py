"""The package answers as the trained network did, or refuses; it stands alone."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pydicom
import pytest

from radloop.errors import ArtifactError, DataError, DicomError
from radloop.imaging.transforms import Preprocessing
from radloop.learning import card, gates, network, package, wheel
from radloop.learning.package import Packaged


@pytest.fixture
def copied(trained: Any, tmp_path: Path) -> Path:
    """A package to spoil."""
    return Path(shutil.copytree(trained.package, tmp_path / "package"))


def rewrite(path: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_it_answers_as_evaluation_did(trained: Any) -> None:
    """A probability in production that differs from the evaluated one was never evaluated."""
    import pyarrow.parquet as pq

    rows = pq.read_table(trained.out / "predictions.parquet").to_pylist()[:60]
    packaged = Packaged(trained.package)
    native = trained.toy.tensors.gather([row["sop_uid"] for row in rows])
    probabilities, decisions = packaged.predict_native(native)
    np.testing.assert_allclose(probabilities, [row["probability"] for row in rows], atol=1e-5)
    threshold = trained.evaluation.decision.threshold
    np.testing.assert_array_equal(decisions, [int(row["probability"] >= threshold) for row in rows])
    one, _ = packaged.predict_native(native[:1])
    np.testing.assert_allclose(one, probabilities[:1], atol=1e-6)
    assert packaged.predict_tensor(np.empty((0, 1, 32, 32), np.float32))[0].shape == (0,)


def test_a_dicom_instance_goes_through_the_same_preprocessing(trained: Any) -> None:
    """Training-serving skew is silent: the figures stay fine and the patients' answers are wrong."""
    packaged = Packaged(trained.package)
    data = package.example_dicom(packaged.inputs)
    answer = packaged.predict_dicom(data)
    with pydicom.dcmread(io.BytesIO(data)) as ds:
        images = packaged.preprocessing.from_dataset(ds)[np.newaxis]
    probabilities, decisions = packaged.predict_tensor(images)
    assert (answer.probability, answer.decision) == (probabilities[0], decisions[0])


def test_an_image_of_another_modality_is_refused(trained: Any) -> None:
    """A chest model answers for a CT slice just as surely."""
    packaged = Packaged(trained.package)
    inputs = msgspec.structs.replace(packaged.inputs, modalities=["CT"])
    with pytest.raises(DicomError, match="CR or DX") as refused:
        packaged.predict_dicom(package.example_dicom(inputs))
    assert refused.value.reason == "UNEXPECTED_MODALITY"


@pytest.mark.parametrize("data", [b"", b"no dicom", b"\0" * 128 + b"DICM" + b"\xff" * 40])
def test_bytes_that_are_no_dicom_are_refused(trained: Any, data: bytes) -> None:
    """A client's mistake must come back as its reason, not as a crash of the predictor."""
    with pytest.raises(DicomError) as refused:
        Packaged(trained.package).predict_dicom(data)
    assert refused.value.reason


def test_a_tensor_that_was_not_windowed_is_refused(trained: Any) -> None:
    """Raw grey values give a confident answer about nothing."""
    packaged, good = Packaged(trained.package), np.zeros((2, 1, 32, 32), np.float32)
    assert len(packaged.predict_tensor(good)[0]) == 2
    with pytest.raises(DataError, match="not preprocessed"):
        packaged.predict_tensor(good + 255)
    with pytest.raises(DataError, match="not preprocessed"):
        packaged.predict_tensor(good * np.float32(np.nan))
    for bad in (good[0], good[:, :, :16], good.astype(np.float64)):
        with pytest.raises(DataError, match="another shape or type"):
            packaged.predict_tensor(bad)


def test_other_preprocessing_code_refuses_to_start(copied: Path) -> None:
    """A predictor with newer preprocessing would answer differently from the model that was approved."""
    rewrite(copied / "identity.json", preprocessing_digest="0" * 64)
    with pytest.raises(ArtifactError, match=r"install the package's wheel \(radloop-"):
        Packaged(copied)


def test_check_finds_a_swapped_network(trained: Any, copied: Path) -> None:
    """Another network in the folder must be found before it answers for a patient."""
    Packaged(copied).check()
    net = network.load(trained.model)
    for weight in net.parameters():
        weight.data *= 1.05
    package.export(net, 32, copied / "model.onnx")
    with pytest.raises(ArtifactError, match="answers otherwise"):
        Packaged(copied).check()


@pytest.mark.parametrize("way", ["_alone", "_among_others"])
def test_check_asks_each_way_in_which_a_call_may_be_computed(
    trained: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A predictor that is right while it is quiet and wrong under load would pass every test of it."""
    packaged = Packaged(trained.package, threads=2)
    packaged.check()
    runner = getattr(packaged.network, way)
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda images: run(images) + 1)
    with pytest.raises(ArtifactError, match="answers otherwise"):
        packaged.check()


@pytest.mark.parametrize("name", ["model.onnx", "identity.json", "decision.json", "inputs.json", "preprocessing.json"])
def test_a_damaged_package_is_refused(copied: Path, name: str) -> None:
    """A half-copied package must say which file, not die in a parser."""
    (copied / name).write_bytes((copied / name).read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=name):
        Packaged(copied)
    (copied / name).unlink()
    with pytest.raises((ArtifactError, FileNotFoundError), match=name):
        Packaged(copied)


def build(trained: Any, out: Path, model: Path | None = None, evaluation: Path | None = None) -> package.Identity:
    """Package once more."""
    return package.build(
        model or trained.model, evaluation or trained.out, trained.toy.tensors, trained.toy.tensors.sop_uids, out,
        task="disc", dataset_digest="d" * 64, key_id="0a0b0c0d",
        inputs=package.Inputs(modalities=["CR", "DX"], size=32, positive="disc", negative="no disc"),
    )  # fmt: skip


def test_an_export_that_computes_something_else_is_refused(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter's bug must not reach a patient: the comparison is the only thing that would see it."""
    whole = package.export

    def wrong(net: Any, size: int, path: Path) -> None:
        list(net.parameters())[-1].data += 0.01
        whole(net, size, path)
        list(net.parameters())[-1].data -= 0.01

    monkeypatch.setattr(package, "export", wrong)
    with pytest.raises(ArtifactError, match=r"expected: logits within 0\.0001"):
        build(trained, tmp_path)


def test_the_digest_is_of_weights_preprocessing_and_signature(trained: Any, tmp_path: Path) -> None:
    """Two models with one digest could be mistaken for each other; one model with two would be evaluated twice."""
    again = build(trained, tmp_path / "a")
    assert again.model_digest == trained.identity.model_digest
    for name in ("model.onnx", "reference.npz", "decision.json", "inputs.json", "preprocessing.json"):
        assert (tmp_path / "a" / name).read_bytes() == (trained.package / name).read_bytes(), name
    other = Path(shutil.copytree(trained.out, tmp_path / "evaluation"))
    rewrite(other / "decision.json", threshold=0.123)
    assert build(trained, tmp_path / "b", evaluation=other).model_digest != again.model_digest
    model = Path(shutil.copytree(trained.model, tmp_path / "model"))
    weights = network.weights(model)
    weights["class_layers.out.bias"] = weights["class_layers.out.bias"] + 1
    np.savez(model / "weights.npz", **weights)
    assert build(trained, tmp_path / "c", model=model).model_digest != again.model_digest


def test_nothing_of_a_patient_is_in_the_package(trained: Any) -> None:
    """A package travels further than the data: it must not carry images of the training set."""
    with np.load(trained.package / "reference.npz") as stored:
        native = stored["native"]
    assert native.shape == (8, 32, 32)
    np.testing.assert_array_equal(native, package.reference_images(32))


def test_a_predictor_needs_neither_torch_nor_mlflow(trained: Any) -> None:
    """torch in the predictor would be gigabytes and seconds at every start."""
    code = (
        "import sys; from pathlib import Path; from radloop.learning import package;"
        f"p = package.Packaged(Path({str(trained.package)!r})); p.check();"
        "p.predict_dicom(package.example_dicom(p.inputs));"
        "print(sorted({'torch', 'monai', 'mlflow', 'sklearn', 'scipy', 'pandas', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_is_this_code(tmp_path: Path) -> None:
    """A package that carried other code than was tested would load, and answer otherwise."""
    from importlib import metadata

    import radloop

    made = wheel.build(tmp_path)
    (tmp_path / "again").mkdir()
    assert wheel.build(tmp_path / "again").read_bytes() == made.read_bytes()
    root = Path(radloop.__file__).parent
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        assert archive.read("radloop/imaging/transforms.py") == (root / "imaging/transforms.py").read_bytes()
        assert not [n for n in archive.namelist() if "__pycache__" in n or n.endswith(".pyc")]
        info = made.name.removesuffix("-py3-none-any.whl") + ".dist-info"
        assert f"Version: {made.name.split('-')[1]}" in archive.read(f"{info}/METADATA").decode()
        assert "radloop =" in archive.read(f"{info}/entry_points.txt").decode()
        listed = archive.read(f"{info}/RECORD").decode().splitlines()
        assert sorted(line.split(",")[0] for line in listed) == sorted(archive.namelist())
    assert made.name.startswith(f"radloop-{metadata.version('radloop')}+code.")


def test_the_model_card_says_what_must_be_said(trained: Any, copied: Path) -> None:
    """Whoever opens the package without us must read what it is for, and that it is no medical device."""
    judged = gates.judge(trained.evaluation, gates.GateConfig())
    inputs = Packaged(copied).inputs
    data = card.card(trained.evaluation, judged, trained.identity, inputs, intended_use="Triage | research")
    card.write(data, copied)
    text = (copied / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "not a medical device" in text
    assert "Triage | research" in text
    assert trained.identity.model_digest in text
    for gate in judged:
        assert gate.detail.replace("|", "\\|") in text
    assert msgspec.json.decode((copied / "model_card.json").read_bytes())["metrics"]["auc"]["value"] > 0.9
    assert "none was stated" in card.markdown(
        card.card(trained.evaluation, judged, trained.identity, inputs, intended_use="")
    )


def test_preprocessing_of_reads_what_was_saved(trained: Any) -> None:
    """The package must be built with the preprocessing that trained, not with today's default."""
    assert network.preprocessing_of(trained.model) == Preprocessing(size=32)
