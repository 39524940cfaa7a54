"""What a network wants and gives, as its file says it; and what is told of one that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from radloop.errors import ArtifactError


class Runner(Protocol):
    """A loaded network.

    Attributes:
        platform: the framework's name in the Open Inference Protocol.
        shape: of the input, as the file declares it, None for a dimension that is free; None if it declares none.
    """

    platform: str

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """See above."""
        ...

    def run(self, images: NDArray[np.float32]) -> NDArray[np.floating]:
        """What the network gives for images in its own layout; from any thread."""
        ...


class Layout:
    """How images `(n, 1, size, size)` must be given to a network.

    Args:
        shape: of its input, as `Runner.shape`.
        size: side of the images.

    Raises:
        ArtifactError: the network wants something else.
    """

    def __init__(self, shape: tuple[int | None, ...] | None, size: int) -> None:
        self.channels_last, self.one_by_one = False, False
        if shape is None:
            return
        if len(shape) != 4:
            raise wrong("takes another number of dimensions", _wanted(size), list(shape))
        batch, *inner = shape
        self.one_by_one = batch == 1
        if batch not in (None, 1):
            raise wrong("takes a fixed number of images at once", "any number, or one", batch)
        self.channels_last = inner[0] != 1 and inner[2] == 1
        channels, sides = (inner[2], inner[:2]) if self.channels_last else (inner[0], inner[1:])
        if channels != 1:
            got = list(shape) if channels is None else f"{channels} channels"
            raise wrong("does not take one grey channel", _wanted(size), got, "put the conversion into the network")
        if any(side not in (None, size) for side in sides):
            step = f"set [preprocess] size = {sides[0]} in radloop.toml" if sides[0] == sides[1] else None
            raise wrong("takes images of another size", _wanted(size), list(shape), step)

    def of(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images `(n, 1, size, size)` as the network takes them."""
        if self.channels_last:
            return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        return np.ascontiguousarray(images)


def _wanted(size: int) -> str:
    return f"float32 (n, 1, {size}, {size}) or (n, {size}, {size}, 1), n free"


def wrong(what: str, expected: object, got: object, next_step: str | None = None) -> ArtifactError:
    """A network that loads and cannot be used."""
    step = next_step or "export the network anew; docs/own-data.md says what it must take and give"
    return ArtifactError(f"the network {what}", expected=expected, got=got, next_step=step)


def only(kind: str, names: Sequence[str]) -> str:
    """The one name there is. Raises ArtifactError if there are several, or none."""
    if len(names) != 1:
        raise wrong(f"has {len(names)} {kind}s", f"one {kind}", ", ".join(names) or "none")
    return names[0]


def unreadable(path: Path, why: object) -> ArtifactError:
    """A file that no framework reads. `why` must hold no value of the file."""
    return ArtifactError(
        "a network cannot be read",
        expected=path.name,
        got=why if isinstance(why, str) else type(why).__name__,
        next_step="copy it again; if it fails again, export it anew, by a version no newer than the one installed here",
    )


EXTRAS = {"onnxruntime": "serve", "torch": "train", "tensorflow": "tensorflow"}
"""radloop's extra that brings each framework."""


def not_installed(framework: str) -> ArtifactError:
    """The framework of a network, a key of `EXTRAS`, is not there."""
    return ArtifactError(
        f"{framework} is not installed, and the network is made for it",
        expected=framework,
        got="no such package",
        next_step=f'pip install "radloop[{EXTRAS[framework]}]"',
    )
