"""Where a logit came from: Grad-CAM (Selvaraju et al., ICCV 2017) over the last feature maps, drawn beside the image.

A picture for a reader's eye. It explains nothing and no gate looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

SCALE = 2


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


def write(network: nn.Module, images: NDArray[np.float32], names: Sequence[str], folder: Path) -> list[str]:
    """One PNG for each image `(n, 1, size, size)`: the image, and it under its heat map. Returns names."""
    from PIL import Image

    if not names:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name, image, heat in zip(names, images[:, 0], grad_cam(network, images), strict=True):
        grey = np.repeat(image[:, :, np.newaxis], 3, axis=2)
        alpha = 0.6 * heat[:, :, np.newaxis]
        over = grey * (1 - alpha) + np.array([1.0, 0.45, 0.0]) * alpha
        pair = np.concatenate([grey, over], axis=1)
        pixels = (np.clip(pair, 0, 1) * 255).round().astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
        Image.fromarray(pixels).save(folder / name, format="PNG")
    return list(names)
