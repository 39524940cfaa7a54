"""One small network, the same weights, in each form that a network may be brought in. It finds the discs of `discs`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radloop.testing.discs import SIZE

if TYPE_CHECKING:
    from torch import nn

SIDE, CHANNELS = 7, 4


class Weights(NamedTuple):
    """A convolution `(channels, 1, side, side)`, whose rectified maxima a linear layer `(1, channels)` weighs."""

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    out: NDArray[np.float32]
    offset: NDArray[np.float32]


def weights(sharpness: float = 25.0) -> Weights:
    """The first channel averages 7 x 7 pixels, which a disc makes bright; the others see texture and count little."""
    random = np.random.default_rng(5)
    kernel = random.normal(0, 0.05, (CHANNELS, 1, SIDE, SIDE))
    kernel[0] = 1 / SIDE**2
    out = np.array([[sharpness, 0.3, -0.2, 0.1]])
    return Weights(
        kernel.astype(np.float32),
        np.zeros(CHANNELS, np.float32),
        out.astype(np.float32),
        np.array([-0.6 * sharpness], np.float32),
    )


def torch_module(gives: str = "logit", size: int = SIZE) -> nn.Module:
    """The network in torch, in evaluation mode; `gives` as `[train] network_output`."""
    import torch
    from torch import nn

    told = weights()

    class Disc(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, CHANNELS, SIDE), nn.Linear(CHANNELS, 1)
            with torch.no_grad():
                for parameter, value in zip(self.parameters(), told, strict=True):
                    parameter.copy_(torch.from_numpy(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logit: torch.Tensor = self.out(torch.relu(self.conv(x)).amax((2, 3)))
            if gives == "probability":
                return torch.sigmoid(logit)
            both = torch.cat([-logit / 2, logit / 2], 1)
            return torch.softmax(both, 1) if gives == "two_probabilities" else both if gives == "two_logits" else logit

    return Disc().eval()


def write_onnx(path: Path, gives: str = "logit") -> Path:
    """As ONNX."""
    from radloop.learning.package import export

    export(torch_module(gives), SIZE, path)
    return path


def write_exported_program(path: Path, gives: str = "logit", module: Any = None, batch: int | None = None) -> Path:
    """As an exported program (`.pt2`), for any number of images, or a fixed one."""
    import torch

    shapes = None if batch else ({0: torch.export.Dim("n")},)
    example = (torch.zeros(batch or 2, 1, SIZE, SIZE),)
    torch.export.save(torch.export.export(module or torch_module(gives), example, dynamic_shapes=shapes), path)
    return path


def write_torchscript(path: Path, gives: str = "logit", module: Any = None) -> Path:
    """As TorchScript (`.pt`), traced."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.15 would rather have torch.export
        module = module or torch_module(gives)
        trace: Any = torch.jit.trace
        traced = trace(module, torch.zeros(2, 1, SIZE, SIZE), check_trace=False)
        torch.jit.save(traced, str(path))
    return path


def write_saved_model(path: Path, *, channels_last: bool = True) -> Path:
    """As a TensorFlow SavedModel folder, which takes `(n, size, size, 1)` as TensorFlow's networks do."""
    from radloop.learning.runtimes.saved_model import tensorflow

    tf = tensorflow()
    told = weights()
    kernel = tf.Variable(told.kernel.transpose(2, 3, 1, 0))
    out = tf.Variable(told.out.T)

    class Disc(tf.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.out = kernel, out

    module = Disc()
    shape = (None, SIZE, SIZE, 1) if channels_last else (None, 1, SIZE, SIZE)

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, name="pixels")])  # type: ignore[untyped-decorator]
    def serve(pixels: Any) -> Any:
        images = pixels if channels_last else tf.transpose(pixels, (0, 2, 3, 1))
        maps = tf.nn.relu(tf.nn.conv2d(images, module.kernel, strides=1, padding="VALID") + told.bias)
        return {"score": tf.reduce_max(maps, axis=(1, 2)) @ module.out + told.offset}

    tf.saved_model.save(module, str(path), signatures={"serving_default": serve})
    return path


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "onnx": ("vendor.onnx", write_onnx),
    "exported_program": ("vendor.pt2", write_exported_program),
    "torchscript": ("vendor.pt", write_torchscript),
    "saved_model": ("vendor", write_saved_model),
}
"""For each form a file name, and what writes it."""


def write(form: str, folder: Path) -> Path:
    """The network in a form, in a folder; returns its path."""
    name, writer = WRITERS[form]
    folder.mkdir(parents=True, exist_ok=True)
    return writer(folder / name)
