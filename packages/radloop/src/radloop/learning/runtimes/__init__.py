"""Networks in three frameworks behind one interface: images `(n, 1, size, size)` in, logits `(n,)` out.

A network that radloop trained is `model.onnx`. One that was made elsewhere stands, as it came, in one of four forms beside a
`runtime.json`, which says which form and what its numbers are. Each framework is imported by its own module only.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.artifact import digest_of, file_digest
from radloop.errors import ArtifactError
from radloop.learning.runtimes.signature import Layout, Runner, wrong

FILE = "runtime.json"
FORMS = {
    "onnx": "model.onnx",
    "exported_program": "model.pt2",
    "torchscript": "model.pt",
    "saved_model": "model.savedmodel",
}
"""The forms, and what each is called in a folder of a model or a package; a SavedModel is a folder itself."""

FRAMEWORKS = {
    "onnx": "onnxruntime",
    "exported_program": "torch",
    "torchscript": "torch",
    "saved_model": "tensorflow",
}
"""The package that runs each form."""

Gives = Literal["logit", "probability", "two_logits", "two_probabilities"]
_SMALLEST = 1e-7
"""Probabilities closer to 0 or 1 are no further from each other: float32 ends there."""


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a network that was trained elsewhere; `runtime.json`.

    Attributes:
        form: a key of `FORMS`.
        gives: what its numbers are. `two_*`: `(n, 2)`, of label 0 and label 1 in this order.
    """

    form: Literal["onnx", "exported_program", "torchscript", "saved_model"]
    gives: Gives = "logit"


def origin(folder: Path) -> Origin | None:
    """What a folder says of its network's origin; None: radloop trained it. Raises ArtifactError if it is unreadable."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Origin)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError("a network's origin cannot be read", expected=FILE, got=str(error)) from None


def files(folder: Path) -> list[Path]:
    """The files of the network in a folder, sorted, `runtime.json` among them if there is one."""
    told = origin(folder) or Origin(form="onnx")
    place = folder / FORMS[told.form]
    found = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return sorted(found + [path for path in [folder / FILE] if path.exists()])


def digest(folder: Path) -> str:
    """SHA-256 (hex) over the network's files, names and contents."""
    return digest_of({path.relative_to(folder).as_posix(): file_digest(path) for path in files(folder)})


def framework(folder: Path) -> str:
    """The package that runs a folder's network, by its name on the package index."""
    told = origin(folder)
    return FRAMEWORKS["onnx" if told is None else told.form]


class Network:
    """A loaded network of any framework. From any thread.

    Args:
        runner: the framework's side.
        gives: what its numbers are.
        size: side of the images.
        alone: the same network for a call that meets no other, computed by more threads (docs/adr/0010).

    Raises:
        ArtifactError: it takes something else than these images.
    """

    def __init__(self, runner: Runner, gives: Gives, size: int, *, alone: Runner | None = None) -> None:
        self.platform, self.gives = runner.platform, gives
        self._among_others, self._alone = runner, alone or runner
        self._guard, self._under_way = threading.Lock(), 0
        self._layout = Layout(runner.shape, size)
        self._width = 2 if gives.startswith("two_") else 1

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits `(n,)` of images `(n, 1, size, size)`, 0 to 1.

        Raises:
            ArtifactError: the network gives something else than was declared.
        """
        if not len(images):
            return np.empty(0)
        with self._guard:
            runner = self._among_others if self._under_way else self._alone
            self._under_way += 1
        try:
            return self._logits(runner, images)
        finally:
            with self._guard:
                self._under_way -= 1

    def each_way(self, images: NDArray[np.float32]) -> list[NDArray[np.float64]]:
        """As `logits`, of at least one image, by each of the ways in which a call may be computed."""
        return [self._logits(runner, images) for runner in {self._alone, self._among_others}]

    def _logits(self, runner: Runner, images: NDArray[np.float32]) -> NDArray[np.float64]:
        if self._layout.one_by_one:
            return np.concatenate([self._as_logits(runner.run(self._layout.of(one[None])), 1) for one in images])
        return self._as_logits(runner.run(self._layout.of(images)), len(images))

    def difference(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        """The largest absolute difference of logits, or of probabilities if the network gives those.

        Near 0 and 1 a rounding of the probability in float32 is a large step of the logit.
        """
        if self.gives.endswith("probability") or self.gives.endswith("probabilities"):
            a, b = (np.exp(-np.logaddexp(0, -np.clip(x, -50, 50))) for x in (a, b))
        return float(np.abs(a - b).max(initial=0.0))

    def _as_logits(self, raw: NDArray[np.floating], count: int) -> NDArray[np.float64]:
        if raw.size != count * self._width or (count > 1 and raw.shape[0] != count):
            step = 'set [train] network_output: "logit", "probability", "two_logits" or "two_probabilities"'
            expected = f"({count}, {self._width}), as network_output = {self.gives!r} says"
            raise wrong("gives another number of values", expected, list(raw.shape), step)
        values = np.asarray(raw, np.float64).reshape(count, self._width)
        if self.gives == "logit":
            return values[:, 0]
        if self.gives == "two_logits":
            return values[:, 1] - values[:, 0]
        if not (values.min() >= 0 and values.max() <= 1):
            step = 'set [train] network_output = "logit" or "two_logits" in radloop.toml'
            raise wrong("gives no probabilities", "values from 0 to 1", "other values", step)
        values = np.clip(values, _SMALLEST, 1 - _SMALLEST)
        other = 1 - values[:, 0] if self._width == 1 else values[:, 0]
        return np.log(values[:, -1]) - np.log(other)


def open_network(folder: Path, size: int, *, threads: int = 1) -> Network:
    """Load the network of a model or package folder.

    Args:
        folder: holds one of `FORMS`, and `runtime.json` unless radloop trained it.
        size: side of the images it will be given.
        threads: that calls may take together. ONNX: a call that is alone takes all, and the weights are in memory twice.

    Raises:
        ArtifactError: the file is missing, damaged or of another kind; its framework is not installed (names the extra);
            it takes other images.
    """
    told = origin(folder) or Origin(form="onnx")
    path = folder / FORMS[told.form]
    alone = _runner(told.form, path, threads) if told.form == "onnx" and threads > 1 else None
    return Network(_runner(told.form, path), told.gives, size, alone=alone)


def _runner(form: str, path: Path, threads: int = 1) -> Runner:
    if form == "onnx":
        from radloop.learning.runtimes.onnx_runtime import OnnxRunner

        return OnnxRunner(path, threads)
    if form == "saved_model":
        from radloop.learning.runtimes.saved_model import SavedModelRunner

        return SavedModelRunner(path)
    from radloop.learning.runtimes.pytorch import ExportedRunner, ScriptRunner

    return ExportedRunner(path) if form == "exported_program" else ScriptRunner(path)
