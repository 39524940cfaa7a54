"""ONNX, PyTorch and TensorFlow behind one predictor: each form of a network passes the same suite, as a real process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from radloop.errors import ArtifactError
from radloop.learning import runtimes
from radloop.learning.runtimes.saved_model import tensorflow
from radloop.testing import networks
from radloop.testing.discs import SIZE
from radloop.testing.predictor_suite import PredictorSuite, Served


class _Written(PredictorSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return networks.write(cls.form, tmp_path_factory.mktemp(cls.form))


class TestOnnx(_Written):
    form, platform = "onnx", "onnx_onnxruntime"


class TestExportedProgram(_Written):
    form, platform = "exported_program", "pytorch_exportedprogram"


class TestTorchScript(_Written):
    form, platform = "torchscript", "pytorch_torchscript"


class TestSavedModel(_Written):
    form, platform = "saved_model", "tensorflow_savedmodel"

    def test_a_damaged_folder_is_refused(self, served: Served, tmp_path: Path) -> None:
        """Of a folder, one file is easily lost on the way."""
        for number, name in enumerate(["saved_model.pb", "variables/variables.index"]):
            copy = Path(shutil.copytree(served.package, tmp_path / str(number)))
            file = copy / "model.savedmodel" / name
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            with pytest.raises(ArtifactError, match=r"cannot be read\n.*model\.savedmodel"):
                runtimes.open_network(copy, SIZE)
            file.unlink()
            with pytest.raises(ArtifactError, match="cannot be read"):
                runtimes.open_network(copy, SIZE)

    def test_another_signature_is_refused(self, tmp_path: Path) -> None:
        """What a vendor forgot to say cannot be guessed about a patient's image."""
        tf = tensorflow()

        def saved(name: str, spec: Any, key: str) -> Path:
            module = tf.Module()
            call = tf.function(lambda x: {"y": tf.reduce_mean(tf.cast(x, tf.float32), [1, 2])}, input_signature=[spec])
            tf.saved_model.save(
                module,
                str(tmp_path / name / "model.savedmodel"),
                signatures={key: call},
            )
            (tmp_path / name / runtimes.FILE).write_text('{"form":"saved_model"}')
            return tmp_path / name

        good = tf.TensorSpec((None, 1, SIZE, SIZE), tf.float32)
        for name, spec, key, match in (
            ("type", tf.TensorSpec((None, SIZE, SIZE, 1), tf.float64), "serving_default", "another type"),
            ("channels", tf.TensorSpec((None, SIZE, SIZE, 3), tf.float32), "serving_default", "one grey channel"),
            ("size", tf.TensorSpec((None, 8, 8, 1), tf.float32), "serving_default", r"another size[\s\S]*size = 8"),
            ("unknown", tf.TensorSpec(None, tf.float32), "serving_default", "does not declare its input's shape"),
            ("name", good, "predict", r"no default signature[\s\S]*got: predict"),
        ):
            with pytest.raises(ArtifactError, match=match):
                runtimes.open_network(saved(name, spec, key), SIZE)
