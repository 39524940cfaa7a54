"""TFDV, imported once, without its noise.

The import takes 7-9 s on two cores (TensorFlow 3 s, Apache Beam 3 s), all of it at the top of TFDV's own `__init__`, so
there is nothing to leave out short of patching it. radloop pays it once a dataset version, in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
import types
import warnings
from typing import Any


def _stand_in(name: str) -> types.ModuleType:
    """Return a module that fails on first use, in the place of one that has no wheel and that we never reach."""
    module = types.ModuleType(name)

    def refuse(attribute: str) -> Any:
        raise ModuleNotFoundError(
            f"{name}.{attribute} was asked for, but {name} is left out of radloop's TFDV environment"
        )

    module.__getattr__ = refuse  # type: ignore[method-assign]
    return module


def load() -> types.ModuleType:
    """Return the module `tensorflow_data_validation`.

    TensorFlow is told to stay on the CPU (statistics of a table gain nothing from a GPU, and it would take its memory)
    and to compute in one order, so that figures do not depend on the machine's oneDNN.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    if (
        importlib.util.find_spec("farmhash") is None
    ):  # the Beam example-level skew detector's hash; see locks/tfdv.exclude
        sys.modules["farmhash"] = _stand_in("farmhash")
    logging.getLogger("absl").setLevel(logging.ERROR)
    noise = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tensorflow_data_validation
    finally:
        logging.disable(before)
    return tensorflow_data_validation  # type: ignore[no-any-return]
