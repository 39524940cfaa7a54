"""ONNX, by onnxruntime. Read into memory first: such a network cannot name other files, and holds no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radloop.learning.runtimes.signature import not_installed, only, unreadable, wrong


class OnnxRunner:
    """A session on the CPU.

    Args:
        path: an ONNX file.
        threads: for one call.

    Raises:
        ArtifactError: as `runtimes.open_network`.
    """

    platform = "onnx_onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        self._session = _session(path, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._input = only("input", [one.name for one in inputs])
        self._outputs = [only("output", [one.name for one in outputs])]
        if inputs[0].type != "tensor(float)":
            raise wrong("takes another type", "float32", inputs[0].type)
        self.shape = tuple(side if isinstance(side, int) else None for side in inputs[0].shape)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.floating]:
        """As `Runner.run`."""
        (found,) = self._session.run(self._outputs, {self._input: images})
        return np.asarray(found)


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise not_installed("onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the core from whoever brings the next image, or waits for an answer.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime has a dozen exception types without a common base
        raise unreadable(path, error) from None
