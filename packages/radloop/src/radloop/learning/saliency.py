"""Where a logit came from, drawn beside the image.

By Grad-CAM (Selvaraju et al., ICCV 2017) over the last feature maps; for a network that was made elsewhere, whose inside is
unknown, by occlusion (Zeiler & Fergus, ECCV 2014).
A picture for a reader's eye. It explains nothing and no gate looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radloop.learning.runtimes import Network

if TYPE_CHECKING:
    from torch import nn

SCALE = 2
"""Pixels of a picture for each of the image's."""
PATCHES = 8
"""Squares a side that are covered, one after the other."""
_AT_ONCE = 8


def grad_cam(network: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Heat maps `(n, size, size)`, 0 to 1 within each image, for images `(n, 1, size, size)`.

    The gradient is that of the logit's absolute value, so that a negative answer has a map as well.
    """
    import torch
    from torch.nn import functional

    with torch.enable_grad():
        batch = torch.from_numpy(np.ascontiguousarray(images))
        maps = network.features(batch)  # type: ignore[operator]
        maps.retain_grad()
        # clone: the head begins with an in-place ReLU, which would spoil the maps kept for the gradient
        logit = network.class_layers(maps.clone())  # type: ignore[operator]
        sign = torch.sign(logit.detach())
        (gradient,) = torch.autograd.grad((logit * sign).sum(), maps)
        heat = functional.relu((maps * gradient.mean(dim=(2, 3), keepdim=True)).sum(1, keepdim=True)).detach()
    heat = functional.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    heat = heat - heat.amin(dim=(1, 2), keepdim=True)
    top = heat.amax(dim=(1, 2), keepdim=True)
    scaled: NDArray[np.float32] = (heat / torch.where(top > 0, top, torch.ones_like(top))).numpy()
    return scaled


def occlusion(network: Network, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """As `grad_cam`, from answers alone: how far the logit falls towards 0 as each square of 8 x 8 is made grey."""
    heat = np.empty(images[:, 0].shape, np.float32)
    edges = np.linspace(0, images.shape[-1], PATCHES + 1).astype(int)
    squares = [np.s_[a:b, c:d] for a, b in pairwise(edges) for c, d in pairwise(edges)]
    for image, map_ in zip(images, heat, strict=True):
        (whole,) = network.logits(image[np.newaxis])
        for start in range(0, len(squares), _AT_ONCE):
            some = squares[start : start + _AT_ONCE]
            covered = np.repeat(image[np.newaxis], len(some), axis=0)
            for one, square in zip(covered, some, strict=True):
                one[0][square] = image.mean()
            for logit, square in zip(network.logits(covered), some, strict=True):
                map_[square] = max((whole - logit) * np.sign(whole), 0)
    top = heat.max(axis=(1, 2), keepdims=True)
    return np.asarray(heat / np.where(top > 0, top, 1), np.float32)


def write(network: nn.Module | Network, images: NDArray[np.float32], names: Sequence[str], folder: Path) -> list[str]:
    """One PNG for each image `(n, 1, size, size)`: the image, and it under its heat map. Returns names."""
    from PIL import Image

    if not names:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    heats = occlusion(network, images) if isinstance(network, Network) else grad_cam(network, images)
    for name, image, heat in zip(names, images[:, 0], heats, strict=True):
        grey = np.repeat(image[:, :, np.newaxis], 3, axis=2)
        alpha = 0.6 * heat[:, :, np.newaxis]
        over = grey * (1 - alpha) + np.array([1.0, 0.45, 0.0]) * alpha
        pair = np.concatenate([grey, over], axis=1)
        pixels = (np.clip(pair, 0, 1) * 255).round().astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
        Image.fromarray(pixels).save(folder / name, format="PNG")
    return list(names)
