"""Networks made elsewhere: what is taken, what is refused, in which words. TensorFlow's: tests/services/test_frameworks.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from radloop.errors import ArtifactError, SettingsError
from radloop.learning import brought, gates, network, package, runtimes, saliency
from radloop.learning import evaluate as measuring
from radloop.learning.package import Packaged
from radloop.testing import networks
from radloop.testing.discs import SIZE, Toy

FORMS = ["onnx", "exported_program", "torchscript"]


@pytest.fixture(scope="module")
def images(toy: Toy) -> NDArray[np.float32]:
    return toy.preprocessing.windowed(toy.tensors.gather(toy.tensors.sop_uids[:40]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vendor")
    return {form: networks.write(form, folder) for form in FORMS}


@pytest.fixture(scope="module")
def expected(images: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.inference_mode():
        return networks.torch_module()(torch.from_numpy(images)).double().numpy().reshape(-1)


def adopt(source: Path, out: Path, toy: Toy, images: Any, gives: Any = "logit") -> runtimes.Network:
    brought.adopt(source, gives, toy.preprocessing, images, out)
    return runtimes.open_network(out, SIZE)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_networks_numbers(
    form: str, sources: dict[str, Path], toy: Toy, images: Any, expected: Any, tmp_path: Path
) -> None:
    """A converter's or a loader's rounding beyond the fifth digit would be another model than the vendor's."""
    opened = adopt(sources[form], tmp_path / "m", toy, images)
    np.testing.assert_allclose(opened.logits(images), expected, atol=2e-5)
    np.testing.assert_allclose(opened.logits(images[3:4]), expected[3:4], atol=2e-5)
    assert opened.logits(images[:0]).shape == (0,)
    assert runtimes.origin(tmp_path / "m") == runtimes.Origin(form=form)


def test_a_call_alone_and_calls_that_meet_give_the_same_numbers(
    sources: dict[str, Path], toy: Toy, images: Any, tmp_path: Path
) -> None:
    """A call that is alone is computed by more threads: a study must not be judged otherwise because the night is quiet."""
    brought.adopt(sources["onnx"], "logit", toy.preprocessing, images, tmp_path / "m")
    here = runtimes.open_network(tmp_path / "m", SIZE)
    there = runtimes.open_network(tmp_path / "m", SIZE, threads=2)
    expected = here.logits(images)
    np.testing.assert_allclose(there.logits(images), expected, atol=1e-6)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(there.logits, [images] * 200):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(there.logits(images[:1]), expected[:1], atol=1e-6)


@pytest.mark.parametrize("gives", ["probability", "two_logits", "two_probabilities"])
def test_what_the_numbers_are_is_declared(gives: str, toy: Toy, images: Any, expected: Any, tmp_path: Path) -> None:
    """A probability taken for a logit is calibrated to nonsense; the class in the wrong column is the opposite answer."""
    source = networks.write_torchscript(tmp_path / "v.pt", gives)
    opened = adopt(source, tmp_path / "m", toy, images, gives)
    np.testing.assert_allclose(opened.logits(images), expected, atol=2e-3)
    assert opened.difference(opened.logits(images), expected) < (1e-4 if gives == "two_logits" else 1e-6)


def test_what_was_not_declared_is_told(toy: Toy, images: Any, tmp_path: Path) -> None:
    """Nobody reads a shape error of onnxruntime and knows which setting to change."""
    two = networks.write_torchscript(tmp_path / "two.pt", "two_logits")
    with pytest.raises(ArtifactError, match=r'another number of values.*\n.*\n.*\n.*network_output.*"two_logits"'):
        adopt(two, tmp_path / "a", toy, images)
    logit = networks.write_torchscript(tmp_path / "logit.pt")
    with pytest.raises(ArtifactError, match="gives no probabilities"):
        adopt(logit, tmp_path / "b", toy, images, "probability")
    probability = networks.write_torchscript(tmp_path / "p.pt", "probability")
    (said,) = brought.adopt(probability, "logit", toy.preprocessing, images, tmp_path / "c")
    assert 'network_output = "probability"' in said


def test_a_network_that_takes_one_image_at_once(toy: Toy, images: Any, expected: Any, tmp_path: Path) -> None:
    """Many are exported so; nobody should have to export again for it."""
    one = networks.write_exported_program(tmp_path / "one.pt2", batch=1)
    np.testing.assert_allclose(adopt(one, tmp_path / "a", toy, images).logits(images), expected, atol=2e-5)
    three = networks.write_exported_program(tmp_path / "three.pt2", batch=3)
    with pytest.raises(ArtifactError, match="takes a fixed number of images at once"):
        adopt(three, tmp_path / "b", toy, images)


class Rounding(torch.nn.Module):
    """Batch normalisation and dropout, left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = torch.nn.BatchNorm2d(1), torch.nn.Dropout(), torch.nn.Linear(SIZE * SIZE, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.norm(x)).flatten(1))


def test_a_network_exported_in_training_mode_is_refused(toy: Toy, images: Any, tmp_path: Path) -> None:
    """Its answer for one patient would depend on who else was asked about at that moment."""
    torch.manual_seed(0)
    frozen = networks.write_exported_program(tmp_path / "n.pt2", module=Rounding().train())
    with pytest.raises(ArtifactError, match=r"same for the same image[\s\S]*evaluation mode"):
        adopt(frozen, tmp_path / "m", toy, images)


def graph(path: Path, shape: list[Any], *, kind: int = TensorProto.FLOAT, inputs: int = 1, outputs: int = 1) -> Path:
    """An ONNX network that averages what it is given."""
    given = [helper.make_tensor_value_info(f"in{i}", kind, shape) for i in range(inputs)]
    nodes = [helper.make_node("Cast", ["in0"], ["x"], to=TensorProto.FLOAT)]
    made = []
    for i in range(outputs):
        nodes += [helper.make_node("Flatten", ["x"], [f"f{i}"], axis=1)]
        nodes += [helper.make_node("ReduceMean", [f"f{i}"], [f"out{i}"], axes=[1], keepdims=1)]
        made.append(helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, [None, 1]))
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", given, made), opset_imports=opset, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"shape": ["n", 3, SIZE, SIZE]}, "one grey channel"),
        ({"shape": ["n", "c", "h", "w"]}, "one grey channel"),
        ({"shape": ["n", 1, 224, 224]}, r"another size[\s\S]*set \[preprocess\] size = 224"),
        ({"shape": ["n", SIZE * SIZE]}, "another number of dimensions"),
        ({"shape": ["n", 1, SIZE, SIZE], "kind": TensorProto.DOUBLE}, "another type"),
        ({"shape": ["n", 1, SIZE, SIZE], "inputs": 2}, "has 2 inputs"),
        ({"shape": ["n", 1, SIZE, SIZE], "outputs": 2}, "has 2 outputs"),
    ],
)
def test_a_network_of_another_signature_is_refused(
    how: dict[str, Any], match: str, toy: Toy, images: Any, tmp_path: Path
) -> None:
    """Before a patient is evaluated, and with what to change."""
    with pytest.raises(ArtifactError, match=match):
        adopt(graph(tmp_path / "g.onnx", **how), tmp_path / "m", toy, images)


def test_channels_last_is_seen_in_the_signature(toy: Toy, images: Any, tmp_path: Path) -> None:
    """An image read with its axes swapped gives a plausible number for a picture that nobody took."""
    path = graph(tmp_path / "g.onnx", ["n", SIZE, SIZE, 1])
    assert adopt(path, tmp_path / "m", toy, images)._layout.channels_last
    assert not adopt(graph(path, ["n", 1, SIZE, SIZE]), tmp_path / "n", toy, images)._layout.channels_last


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_network_is_refused(
    form: str, sources: dict[str, Path], toy: Toy, images: Any, tmp_path: Path
) -> None:
    """A copy that broke off must be named, not die in a framework's parser."""
    adopt(sources[form], tmp_path / "m", toy, images)
    file = tmp_path / "m" / runtimes.FORMS[form]
    whole = file.read_bytes()
    for data in (b"", b"no network at all", whole[:-40], whole[: len(whole) // 2]):
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"cannot be read\n.*{file.name}"):
            runtimes.open_network(tmp_path / "m", SIZE)
    file.unlink()
    with pytest.raises((ArtifactError, FileNotFoundError), match=file.name):
        runtimes.open_network(tmp_path / "m", SIZE)


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_is_never_opened(toy: Toy, images: Any, tmp_path: Path) -> None:
    """Whoever sends a network would otherwise run what he likes where the patients' images are."""
    mark = tmp_path / "ran"
    torch.save({"model": Payload(mark)}, tmp_path / "pickled.pt")
    with pytest.raises(ArtifactError, match="a pickled model or state_dict is never opened"):
        adopt(tmp_path / "pickled.pt", tmp_path / "a", toy, images)
    # Example inputs stand as torch.save wrote them; torch falls back to a full unpickling where the safe one fails.
    whole = networks.write_exported_program(tmp_path / "whole.pt2")
    torch.save((Payload(mark),), tmp_path / "inputs")
    swapped = tmp_path / "swapped.pt2"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(swapped, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = (tmp_path / "inputs").read_bytes() if "sample_inputs" in name else old.read(name)
            new.writestr(name.replace("whole/", "swapped/", 1), data)
    with pytest.raises(ArtifactError, match="cannot be read"):
        adopt(swapped, tmp_path / "b", toy, images)
    assert not mark.exists()
    code = f"import torch; torch.export.load({str(swapped)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=False)
    assert mark.exists(), "the archive of this test does no harm to torch itself, so nothing was proven"


@pytest.mark.parametrize(
    "part", ["data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/m/a.so"]
)
def test_an_archive_with_more_than_tensors_is_refused(part: str, toy: Toy, images: Any, tmp_path: Path) -> None:
    """Compiled code and objects run when they are loaded, whatever is checked afterwards."""
    path = networks.write_exported_program(tmp_path / "v.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"v/{part}", b"x")
    with pytest.raises(ArtifactError, match="the network carries"):
        adopt(path, tmp_path / "m", toy, images)


@pytest.mark.parametrize("name", ["nothing.onnx", "weights.h5", "folder"])
def test_what_is_no_network_is_told(name: str, toy: Toy, images: Any, tmp_path: Path) -> None:
    """A wrong path in radloop.toml is the commonest mistake of all."""
    (tmp_path / "weights.h5").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match=r"SavedModel folder[\s\S]*\[train\] network"):
        adopt(tmp_path / name, tmp_path / "m", toy, images)


@pytest.mark.parametrize(
    ("form", "module", "extra"), [("saved_model", "tensorflow", "tensorflow"), ("torchscript", "torch", "train")]
)
def test_a_framework_that_is_not_there_is_named(
    form: Any, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A predictor's image has not every framework: the message must say what to install."""
    import msgspec

    (tmp_path / runtimes.FILE).write_bytes(msgspec.json.encode(runtimes.Origin(form=form)))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArtifactError, match=rf"is not installed[\s\S]*radloop\[{extra}\]"):
        runtimes.open_network(tmp_path, SIZE)


def evaluated(toy: Toy, model: Path, out: Path) -> measuring.Evaluation:
    config = measuring.EvaluateConfig(resamples=50, minimum_patients=5)
    return measuring.evaluate(model, toy.tensors, toy.table, toy.preprocessing, config, out, task="disc")


def test_it_is_evaluated_and_packaged_like_any_other(
    sources: dict[str, Path], toy: Toy, images: Any, tmp_path: Path
) -> None:
    """A network that comes by another door must meet the same test patients, or its figures mean nothing."""
    from radloop.learning import card

    adopt(sources["torchscript"], tmp_path / "m", toy, images)
    measured = evaluated(toy, tmp_path / "m", tmp_path / "e")
    assert measured.metrics["auc"].value > 0.95 and len(list((tmp_path / "e/examples").glob("*.png"))) == 8
    judged = {gate.gate: gate.verdict for gate in gates.judge(measured, gates.GateConfig())}
    assert judged["auc"] == "pass" and judged["provenance"] == "undetermined"
    inputs = package.Inputs(modalities=["DX"], size=SIZE, positive="disc", negative="no disc")
    identity = package.build(
        tmp_path / "m", tmp_path / "e", toy.tensors, toy.tensors.sop_uids, tmp_path / "p",
        task="disc", dataset_digest="d" * 64, key_id="0a0b0c0d", inputs=inputs,
    )  # fmt: skip
    packaged = Packaged(tmp_path / "p")
    packaged.check()
    assert packaged.platform == "pytorch_torchscript"
    text = card.markdown(card.card(measured, [], identity, inputs, intended_use=""))
    assert "trained elsewhere; on whose patients is not known" in text
    other = shutil.copytree(tmp_path / "p", tmp_path / "q")
    (other / "model.pt").write_bytes(networks.write_torchscript(tmp_path / "w.pt", module=Brighter()).read_bytes())
    with pytest.raises(ArtifactError, match="answers otherwise"):
        Packaged(other).check()


class Brighter(torch.nn.Module):
    """Another network of the same signature."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3), keepdim=True).flatten(1)


def test_the_same_network_elsewhere_is_the_same_model(
    sources: dict[str, Path], toy: Toy, images: Any, tmp_path: Path
) -> None:
    """A digest that hung on a path or a time would make a new model of every copy; one that missed a change, none."""
    for name in ("a", "b"):
        adopt(sources["onnx"], tmp_path / name, toy, images)
    assert runtimes.digest(tmp_path / "a") == runtimes.digest(tmp_path / "b")
    adopt(graph(tmp_path / "g.onnx", ["n", 1, SIZE, SIZE]), tmp_path / "c", toy, images)
    assert runtimes.digest(tmp_path / "c") != runtimes.digest(tmp_path / "a")
    twin = networks.write_onnx(tmp_path / "twin.onnx")
    brought.adopt(twin, "logit", toy.preprocessing, images, tmp_path / "d")
    (tmp_path / "d" / runtimes.FILE).write_text('{"form":"onnx","gives":"probability"}')
    assert runtimes.digest(tmp_path / "d") != runtimes.digest(tmp_path / "a")


def test_occlusion_finds_the_disc(sources: dict[str, Path], toy: Toy, tmp_path: Path, images: Any) -> None:
    """A picture that points elsewhere than the network looks would mislead whoever reads it."""
    opened = adopt(sources["onnx"], tmp_path / "m", toy, images)
    image = np.full((1, 1, SIZE, SIZE), 0.4, np.float32)
    image[0, 0, 16:24, 20:28] = 1.0
    heat = saliency.occlusion(opened, image)
    assert heat.shape == (1, SIZE, SIZE) and heat.max() == 1
    y, x = np.unravel_index(heat[0].argmax(), heat[0].shape)
    assert 14 <= y < 26 and 18 <= x < 30
    assert heat[0, :12, :12].max() == 0


def test_a_trained_model_is_opened_as_torch(trained: Any) -> None:
    """What radloop trained is evaluated by the network that was trained, not by its export."""
    assert isinstance(network.open_model(trained.model), torch.nn.Module)
    assert runtimes.origin(trained.package) is None
