"""Phantom chest radiographs: anatomy-like, random from a seed, with a finding that a network must learn.

Line integrals of attenuation are drawn part by part (trunk, lungs, heart, spine, ribs, clavicles, vessels), then seen
by a detector with photon noise, blur and its vendor's processing. No patient's image went into them, and no result on
them says anything about patients.

Coordinates: x from -1 (image left, the patient's right) to 1, y downwards in the same unit, 0 at the centre.
Images are `(rows, columns)`, row 0 at the top.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]
Generator = np.random.Generator


@dataclass(frozen=True)
class Scanner:
    """A site's detector and its processing.

    Attributes:
        rows, columns: matrix; bits_stored: depth; photometric: MONOCHROME1 or MONOCHROME2 as stored.
        photons: mean quanta a pixel through nothing; blur_px: Gaussian sigma of the detector.
        exposure, gain_spread: standard deviations of offset and gain between exposures, in fractions of full scale.
        equalise: share of the low frequencies that the vendor's processing takes away (0 none).
        gamma: exponent of the tone curve on the 0 to 1 scale, 0 dark.
        grid: amplitude of the anti-scatter grid's lines; collimated: widest border in fractions of a side.
        zoom: how much larger than the field the trunk is drawn.
        electrodes: most ECG electrodes on a chest: this site radiographs its wards' patients in bed.
    """

    manufacturer: str
    model_name: str
    modality: str
    rows: int
    columns: int
    spacing_mm: float
    bits_stored: int
    photometric: str
    photons: float
    blur_px: float
    exposure: float
    gain_spread: float
    equalise: float
    gamma: float
    grid: float
    collimated: float
    zoom: float
    electrodes: int


SCANNERS: dict[str, Scanner] = {
    "A": Scanner(
        "Aurora Imaging", "Aurora CR 12", "CR", 288, 256, 1.4, 12, "MONOCHROME2",
        photons=9000, blur_px=0.7, exposure=0.05, gain_spread=0.10, equalise=0.0, gamma=1.0,
        grid=0.0, collimated=0.0, zoom=1.0, electrodes=0,
    ),
    "B": Scanner(
        "Boreal Medical", "Boreal DX 300", "DX", 320, 320, 1.34, 14, "MONOCHROME1",
        photons=1200, blur_px=2.2, exposure=0.04, gain_spread=0.08, equalise=0.5, gamma=0.85,
        grid=0.02, collimated=0.16, zoom=0.88, electrodes=3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """One patient's chest, in the coordinates above; attenuations are natural logarithms."""

    half_width: float
    apex: float
    dome: float  # top of the right hemidiaphragm; the left stands `dome_step` lower
    dome_step: float
    mediastinum: float
    heart: float
    heart_tilt: float
    rib_step: float
    rib_phase: float
    rib_slope: float
    rib_contrast: float
    clavicle_slope: float
    trunk: float
    lung: float
    breasts: float
    texture: int


def anatomy(rng: Generator, *, sex: str, age_years: float) -> Anatomy:
    """A random chest; hearts grow and lungs shrink a little with age."""
    old = min(max((age_years - 20) / 70, 0), 1)
    return Anatomy(
        half_width=rng.uniform(0.70, 0.84) - (0.04 if sex == "F" else 0),
        apex=rng.uniform(-0.86, -0.74),
        dome=rng.uniform(0.36, 0.56) - 0.06 * old,
        dome_step=rng.uniform(0.02, 0.09),
        mediastinum=rng.uniform(0.11, 0.16) + 0.02 * old,
        heart=rng.uniform(0.25, 0.33) + 0.05 * old,
        heart_tilt=rng.uniform(0.3, 0.7),
        rib_step=rng.uniform(0.150, 0.185),
        rib_phase=rng.uniform(0, 1),
        rib_slope=rng.uniform(0.16, 0.30),
        rib_contrast=rng.uniform(0.14, 0.24) * (1.1 - 0.3 * old),
        clavicle_slope=rng.uniform(0.05, 0.30),
        trunk=rng.uniform(2.5, 3.3),
        lung=rng.uniform(1.5, 2.1),
        breasts=rng.uniform(0.15, 0.45) if sex == "F" else 0.0,
        texture=int(rng.integers(2**31)),
    )


def radiograph(
    body: Anatomy, scanner: Scanner, rng: Generator, *, finding: bool, conspicuity: float = 1.0
) -> NDArray[np.uint16]:
    """One exposure of a chest.

    Args:
        body: the patient.
        scanner: the site's detector.
        rng: positioning, breathing, exposure, noise and the finding.
        finding: draw one to three blurred opacities into the lungs.
        conspicuity: how much denser than usual they are: a model that sees few images needs plain ones.

    Returns:
        uint16 `(rows, columns)` in the scanner's photometric interpretation and bits.
    """
    body = replace(body, dome=body.dome + rng.normal(0, 0.03))  # breathing
    x, y = _positioned(scanner, rng)
    attenuation, lungs = _chest(body, x, y)
    attenuation += _vessels(body, x, y, rng) * lungs
    if finding:
        attenuation += np.float32(conspicuity) * _opacities(lungs, x, y, rng)
    for _ in range(int(rng.integers(scanner.electrodes + 1))):
        attenuation += _electrode(x, y, rng)
    return _exposed(attenuation, scanner, rng)


def _positioned(scanner: Scanner, rng: Generator) -> tuple[Plane, Plane]:
    """Body coordinates of each pixel: shifted, turned by a few degrees, scaled."""
    across = np.linspace(-1, 1, scanner.columns, dtype=np.float32)
    down = np.linspace(-1, 1, scanner.rows, dtype=np.float32) * np.float32(scanner.rows / scanner.columns)
    scale = 1 / (scanner.zoom * rng.uniform(0.95, 1.05))
    turn = np.deg2rad(rng.normal(0, 2.0))
    x, y = np.meshgrid((across - rng.normal(0, 0.03)) * scale, (down - rng.normal(0, 0.03)) * scale)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return _plane(cos * x + sin * y).astype(np.float32), (cos * y - sin * x)


def _plane(value: object) -> Plane:
    return np.asarray(value, dtype=np.float32)


def _step(value: Plane, width: float) -> Plane:
    """0 below, 1 above zero, over about `width`."""
    return _plane(np.clip(value / np.float32(width) + np.float32(0.5), 0, 1))


def _blob(x: Plane, y: Plane, at: tuple[float, float], size: tuple[float, float], turn: float = 0.0) -> Plane:
    """A Gaussian, 1 at its centre, with one standard deviation an axis."""
    cos, sin = np.cos(turn), np.sin(turn)
    u, v = (x - at[0]) * cos + (y - at[1]) * sin, (y - at[1]) * cos - (x - at[0]) * sin
    return _plane(np.exp(-0.5 * ((u / size[0]) ** 2 + (v / size[1]) ** 2)))


def _chest(body: Anatomy, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """Attenuation of everything but vessels and findings, and the lungs' share of each pixel (0 to 1)."""
    side = np.where(x < 0, np.float32(-1), np.float32(1))
    r = np.abs(x)
    total = _trunk(body, r, y)
    lungs, depth = _lungs(body, r, y, side)
    total -= np.float32(body.lung) * depth
    total += _heart(body, x, y)
    spine = np.exp(-((r / 0.075) ** 4)) * (1 + 0.18 * np.cos(y * 2 * np.pi / 0.13))
    total += 0.42 * spine * _step(y + 1.05, 0.1)
    total += _ribs(body, r, y) + _clavicles(body, r, y)
    if body.breasts:
        shade = 1 - (((r - 0.42) / 0.34) ** 2 + ((y - body.dome + 0.02) / 0.32) ** 2)
        total += np.float32(body.breasts) * np.sqrt(np.clip(shade, 0, 1))
    return total.astype(np.float32), lungs


def _trunk(body: Anatomy, r: Plane, y: Plane) -> Plane:
    """Soft tissue: a flattened cylinder, wider at the shoulders, with a neck and two upper arms."""
    wall = body.half_width + 0.15
    shoulders = wall + 0.28 * _step(-0.45 - y, 0.5)
    neck = 0.30 + (shoulders - 0.30) * _step(y + 1.02 - 0.22 * r, 0.28)
    profile = np.sqrt(np.clip(1 - (r / neck) ** 2, 0, 1))
    belly = 1 + 0.18 * _step(y - body.dome, 0.5)
    arms = 1.0 * _step(r - wall - 0.10 + 0.1 * y, 0.05) * _step(0.9 - y, 0.5) * _step(1.35 - r, 0.05)
    return _plane(np.maximum(body.trunk * belly * profile**0.7, 1.1 * arms))


def _lungs(body: Anatomy, r: Plane, y: Plane, side: Plane) -> tuple[Plane, Plane]:
    """Share of lung and depth of air (0 to 1): between mediastinum, chest wall and the dome of the diaphragm."""
    widest = 0.30
    rise = np.clip((widest - y) / (widest - body.apex), 0, 1)
    lateral = body.half_width * (1 - rise**2.3) ** 0.58 * (1 - 0.10 * np.clip(y - widest, 0, 1))
    medial = body.mediastinum * (1 + 0.25 * np.clip(y, -1, 1)) - 0.02 * rise
    middle = 0.55 * body.half_width
    dome = body.dome + np.where(side > 0, body.dome_step, 0) + 0.85 * (r - middle + 0.10) ** 2
    share = _step(lateral - r, 0.03) * _step(r - medial, 0.04) * _step(dome - y, 0.035)
    where = np.clip((r - medial) / np.maximum(lateral - medial, 0.02), 0, 1)
    depth = (1 - np.abs(2 * where - 0.9) ** 3 * 0.6) * (0.72 + 0.28 * _step(y + 0.45, 0.9))
    return _plane(share), _plane(share * depth)


def _heart(body: Anatomy, x: Plane, y: Plane) -> Plane:
    """Heart towards the patient's left, aortic knob, both hila."""
    u = x - 0.13
    v = y - (body.dome - 0.16)
    cos, sin = np.cos(body.heart_tilt), np.sin(body.heart_tilt)
    round_ = ((u * cos + v * sin) / (body.heart * 1.15)) ** 2 + ((v * cos - u * sin) / (body.heart * 0.85)) ** 2
    muscle = 1.15 * np.sqrt(np.clip(1.05 - round_, 0, 1)) * _step(1.04 - round_, 0.10)
    total = muscle * (0.45 + 0.55 * _step(np.abs(x) - 0.10, 0.06))  # it displaces less air before the spine
    knob = ((x - 0.12) / 0.085) ** 2 + ((y + 0.36) / 0.10) ** 2
    total += 0.45 * _step(1 - knob, 0.5)
    for at in ((-0.22, -0.02), (0.24, -0.06)):
        total += 0.35 * _blob(x, y, at, (0.07, 0.11))
    return _plane(total)


def _ribs(body: Anatomy, r: Plane, y: Plane) -> Plane:
    """Posterior ribs, which fall outwards, and the fainter anterior ones, which fall inwards."""
    u = np.clip(r / (body.half_width + 0.04), 0, 1)
    cage = _step(body.half_width + 0.05 - r, 0.03) * _step(0.80 - y, 0.1)
    posterior = (y + 0.10 * np.sin(np.pi * u) - body.rib_slope * u**2) / body.rib_step + body.rib_phase
    anterior = (y - 0.55 * (1 - u) ** 1.3 + 0.05) / (body.rib_step * 1.1) + body.rib_phase * 1.7
    back = _band(posterior, 0.20) * _step(r - 0.06, 0.03) * _step(y - body.apex + 0.05 - 0.2 * (u - 0.5), 0.08)
    front = _band(anterior, 0.24) * _step(r - 0.36, 0.10) * _step(y - body.apex - 0.25, 0.1)
    return _plane(np.float32(body.rib_contrast) * cage * (back + 0.5 * front))


def _band(phase: Plane, half: float) -> Plane:
    """A periodic bar (period 1) of half-width `half` with brighter edges, as cortical bone has."""
    off = np.abs(phase - np.round(phase))
    bar = np.clip((half - off) / 0.06 + 0.5, 0, 1)
    rim = np.exp(-(((off - half + 0.05) / 0.05) ** 2))
    return _plane(0.75 * bar + 0.45 * rim * bar)


def _clavicles(body: Anatomy, r: Plane, y: Plane) -> Plane:
    """Two slender bones from the manubrium outwards and upwards."""
    u = np.clip((r - 0.10) / 0.75, 0, 1)
    line = body.apex + 0.20 - body.clavicle_slope * u + 0.05 * np.sin(2 * np.pi * u)
    off = np.abs(y - line) / (0.035 + 0.012 * u)
    shape = np.clip((1 - off) / 0.3 + 0.5, 0, 1) * _step(r - 0.09, 0.03) * _step(0.88 - r, 0.05)
    return _plane(0.42 * shape * (0.8 + 0.5 * np.exp(-(((off - 0.85) / 0.25) ** 2))))


def _vessels(body: Anatomy, x: Plane, y: Plane, rng: Generator) -> Plane:
    """Lung markings: coarse and fine 1/f texture, denser near the hila."""
    fixed = np.random.default_rng(body.texture)
    coarse = _texture(x.shape, 0.022, fixed)
    fine = _texture(x.shape, 0.008, rng)
    near = np.exp(-(((np.abs(x) - 0.22) / 0.30) ** 2) - ((y + 0.02) / 0.42) ** 2)
    streaks = np.abs(coarse)  # ridges of a random field branch as vessels do
    lines = np.exp(-((streaks / 0.30) ** 2))
    return _plane((0.03 + 0.17 * near) * lines + 0.05 * near * coarse + 0.035 * fine)


def _texture(shape: tuple[int, ...], scale: float, rng: Generator) -> Plane:
    """Gaussian random field of unit variance, correlated over `scale` of the image's side."""
    field = _blurred(rng.standard_normal(shape, dtype=np.float32), scale * shape[1])
    return _plane(field / field.std())


def _blurred(image: Plane, sigma_px: float) -> Plane:
    """Gaussian blur; the image is continued by its edge, so that opposite borders do not bleed into each other."""
    pad = math.ceil(3 * sigma_px)
    wide = np.pad(image.astype(np.float32, copy=False), pad, mode="edge")
    rows, columns = wide.shape
    blurred = np.fft.irfft2(np.fft.rfft2(wide) * _transfer(rows, columns, sigma_px), s=wide.shape)
    return _plane(blurred[pad : rows - pad, pad : columns - pad])


@functools.lru_cache(maxsize=16)
def _transfer(rows: int, columns: int, sigma_px: float) -> Plane:
    """A Gaussian's transfer function on the frequencies of `rfft2`."""
    fy, fx = np.fft.fftfreq(rows)[:, np.newaxis], np.fft.rfftfreq(columns)
    return _plane(np.exp(-2 * (np.pi * sigma_px) ** 2 * (fy**2 + fx**2)))


def _opacities(lungs: Plane, x: Plane, y: Plane, rng: Generator) -> Plane:
    """One to three consolidations: clustered Gaussians of ragged density inside the lungs."""
    total = np.zeros_like(x)
    inside = np.flatnonzero((lungs > 0.95) & (np.abs(x) > 0.25))
    if inside.size == 0:  # a chest that lies outside the field
        inside = np.flatnonzero(lungs >= lungs.max())
    for _ in range(int(rng.choice((1, 1, 2, 3)))):
        at = int(rng.choice(inside))
        cx, cy = float(x.flat[at]), float(y.flat[at])
        size, strength = rng.uniform(0.11, 0.20), rng.uniform(1.2, 1.9)
        for _ in range(3):
            lobe = (cx + rng.normal(0, 0.6 * size), cy + rng.normal(0, 0.6 * size))
            axes = (size * rng.uniform(0.5, 1.0), size * rng.uniform(0.5, 1.0))
            total += np.float32(0.5 * strength) * _blob(x, y, lobe, axes, rng.uniform(0, np.pi))
    ragged = 1 + 0.25 * _texture(x.shape, 0.012, rng)
    return _plane(total * ragged * np.clip(lungs + 0.15, 0, 1))


def _electrode(x: Plane, y: Plane, rng: Generator) -> Plane:
    """An ECG electrode on the chest and the wire that leaves it sideways."""
    cx, cy = rng.uniform(0.2, 0.65) * rng.choice((-1, 1)), rng.uniform(-0.5, 0.4)
    radius = rng.uniform(0.045, 0.065)
    off = np.hypot(x - cx, y - cy)
    wire = np.abs(y - cy - rng.uniform(-0.3, 0.3) * (x - cx) - 0.05 * np.sin(6 * (x - cx)))
    outwards = _step((x - cx) * np.sign(cx), 0.02)
    return _plane(rng.uniform(0.7, 1.1) * _step(radius - off, 0.02) + 0.5 * outwards * _step(0.012 - wire, 0.01))


def _exposed(attenuation: Plane, scanner: Scanner, rng: Generator) -> NDArray[np.uint16]:
    """What the detector and the vendor's processing make of the attenuation."""
    seen = _blurred(attenuation, scanner.blur_px)
    relative = np.exp(seen / 2) / np.sqrt(scanner.photons)  # of Poisson counts, after the logarithm
    noise = rng.standard_normal(seen.shape, dtype=np.float32)
    seen = seen + relative * _blurred(noise, 0.5) * 1.6
    if scanner.equalise:
        seen = seen - scanner.equalise * (_blurred(seen, scanner.columns / 12) - 2.0)
    value = (seen - 0.3) / 4.6 * (1 + rng.normal(0, scanner.gain_spread)) + rng.normal(0, scanner.exposure)
    value = np.clip(value, 0, 1) ** scanner.gamma
    if scanner.grid:
        value += scanner.grid * np.sin(2 * np.pi * (0.27 + 0.01 * rng.random()) * np.arange(scanner.columns))
    value = _shuttered(_marked(value, rng), scanner, rng)
    top = (1 << scanner.bits_stored) - 1
    stored = np.rint(np.clip(value, 0, 1) * top).astype(np.uint16)
    return (top - stored) if scanner.photometric == "MONOCHROME1" else stored


def _marked(value: Plane, rng: Generator) -> Plane:
    """A lead letter L beside the patient's left shoulder."""
    rows, columns = value.shape
    unit = columns // 64
    top, left = int(rows * rng.uniform(0.08, 0.16)), int(columns * rng.uniform(0.88, 0.92))
    value[top : top + 5 * unit, left : left + unit] = 0.97
    value[top + 4 * unit : top + 5 * unit, left : left + 3 * unit] = 0.97
    return value


def _shuttered(value: Plane, scanner: Scanner, rng: Generator) -> Plane:
    """Black borders where the beam was collimated."""
    if scanner.collimated:
        rows, columns = value.shape
        top, bottom = (int(rows * rng.uniform(0.02, scanner.collimated)) for _ in range(2))
        left, right = (int(columns * rng.uniform(0.02, scanner.collimated)) for _ in range(2))
        value[:top], value[rows - bottom :] = 0, 0
        value[:, :left], value[:, columns - right :] = 0, 0
    return value
