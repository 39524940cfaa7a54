"""TensorFlow, SavedModel folders: the only module that imports it. Import takes seconds."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radloop.learning.runtimes.signature import not_installed, only, unreadable, wrong

_SIGNATURE = "serving_default"


class SavedModelRunner:
    """The signature `serving_default` of a SavedModel, on the CPU. Raises ArtifactError as `runtimes.open_network`."""

    platform = "tensorflow_savedmodel"

    def __init__(self, path: Path) -> None:
        tf = tensorflow()
        self._tf = tf
        if not (path / "saved_model.pb").is_file():
            raise unreadable(path / "saved_model.pb", "no such file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._loaded = tf.saved_model.load(str(path))  # kept: it holds the variables
        except Exception as error:  # noqa: BLE001 - a truncated protobuf or checkpoint raises many kinds
            raise unreadable(path, error) from None
        if _SIGNATURE not in self._loaded.signatures:
            names = ", ".join(self._loaded.signatures) or "none"
            raise wrong("has no default signature", _SIGNATURE, names, "save it with signatures=")
        self._call = self._loaded.signatures[_SIGNATURE]
        given = self._call.structured_input_signature[1]
        self._input = only("input", list(given))
        self._output = only("output", list(self._call.structured_outputs))
        spec = given[self._input]
        if spec.dtype != tf.float32:
            raise wrong("takes another type", "float32", spec.dtype.name)
        if spec.shape.rank is None:
            raise wrong("does not declare its input's shape", "four dimensions", "none")
        self.shape: tuple[int | None, ...] = tuple(spec.shape.as_list())

    def run(self, images: NDArray[np.float32]) -> NDArray[np.floating]:
        """As `Runner.run`."""
        found: NDArray[np.floating] = self._call(**{self._input: self._tf.constant(images)})[self._output].numpy()
        return found


def tensorflow() -> Any:
    """The module `tensorflow`, imported on the CPU, one thread a call, and quietly. Raises ArtifactError if it is not installed.

    Triton, which torch brings and imports late, holds an LLVM of its own: loaded after TensorFlow's it ends the process
    ("inconsistency in registered CommandLine options"; TensorFlow 2.21, torch 2.15), loaded before it does no harm.
    """
    with suppress(ImportError):
        import_module("triton._C.libtriton")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what it says of the processor is no news
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies deprecate each other
            import tensorflow as tf
    except ImportError:
        raise not_installed("tensorflow") from None
    with suppress(RuntimeError):  # once it has computed something in this process, this stays as it is
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.set_visible_devices([], "GPU")
    return tf
