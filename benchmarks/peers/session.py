"""What every peer runs: the same ONNX file, one thread a call unless THREADS_A_CALL says otherwise."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime


def session() -> onnxruntime.InferenceSession:
    """The model that PEER_MODEL names."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(os.environ.get("THREADS_A_CALL", "1")), 1
    return onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)


def image(data: bytes) -> np.ndarray:
    """Raw float32 values as one square image (1, 1, side, side)."""
    values = np.frombuffer(data, np.float32)
    side = int(values.size**0.5)
    return values.reshape(1, 1, side, side)
