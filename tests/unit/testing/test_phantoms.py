"""The phantoms: a finding that can be learnt but not read off the mean, and two sites that look different."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from radloop.imaging import pixels
from radloop.imaging.transforms import Preprocessing
from radloop.testing.phantoms import SCANNERS, anatomy, radiograph


def drawn(site: str, seed: int, *, finding: bool) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    body = anatomy(rng, sex="MF"[seed % 2], age_years=30 + seed % 50)
    return radiograph(body, SCANNERS[site], rng, finding=finding)


def auc(positive: list[float], negative: list[float]) -> float:
    """Mann-Whitney: the share of pairs in the right order."""
    a, b = np.array(positive)[:, np.newaxis], np.array(negative)
    return float(((a > b) + 0.5 * (a == b)).mean())


@pytest.mark.parametrize("site", ["A", "B"])
def test_a_seed_is_an_image(site: str) -> None:
    """The demo's figures and the torture test's digests rest on it."""
    first = drawn(site, 5, finding=True)
    np.testing.assert_array_equal(first, drawn(site, 5, finding=True))
    assert (first != drawn(site, 6, finding=True)).mean() > 0.5


@pytest.mark.parametrize("site", ["A", "B"])
def test_a_radiograph_is_what_its_scanner_writes(site: str) -> None:
    """12 bits in one site, 14 and inverted in the other: the differences that preprocessing must take away."""
    scanner = SCANNERS[site]
    image = drawn(site, 1, finding=False)
    assert image.shape == (scanner.rows, scanner.columns)
    assert image.dtype == np.uint16
    assert image.max() < 1 << scanner.bits_stored
    assert image.max() > 1 << (scanner.bits_stored - 1)
    # Lungs are dark and the spine bright, once shown as MONOCHROME2.
    shown = Preprocessing(size=64).windowed(Preprocessing(size=64).native(image, scanner.photometric))[0]
    lungs, spine = shown[25:35, [14, 15, 16, 47, 48, 49]], shown[40:50, 31:33]
    assert spine.mean() > lungs.mean() + 0.25


@pytest.mark.parametrize("site", ["A", "B"])
def test_the_finding_cannot_be_read_off_the_intensity_statistics(site: str) -> None:
    """Else the shortcut would be learnt, and the demo would show nothing."""
    scanner = SCANNERS[site]
    found = {
        label: [
            pixels.features(drawn(site, 2 * i + label, finding=bool(label)), scanner.photometric, scanner.bits_stored)
            for i in range(60)
        ]
        for label in (0, 1)
    }
    for name in ("mean", "std", "p50", "p99"):
        score = auc([one[name] for one in found[1]], [one[name] for one in found[0]])
        assert 0.35 < score < 0.65, name


def test_the_finding_is_there() -> None:
    """A brighter patch than any that the same chest shows without it: a network has something to find."""
    preprocessing = Preprocessing(size=48)
    contrast = []
    for seed in range(12):
        with_it = preprocessing.native(drawn("A", seed, finding=True)).astype(float)
        without = preprocessing.native(drawn("A", seed, finding=False)).astype(float)
        contrast.append((with_it - without).max() / (without.max() - without.min()))
    assert np.median(contrast) > 0.12
    assert min(contrast) > 0.05


def test_the_sites_differ_as_vendors_do() -> None:
    """The demo's drift must be found by the statistics that a predictor computes."""
    found = {
        site: [
            pixels.features(drawn(site, i, finding=False), SCANNERS[site].photometric, SCANNERS[site].bits_stored)
            for i in range(20)
        ]
        for site in "AB"
    }
    for name in ("noise_sigma", "edge_energy"):
        assert auc([one[name] for one in found["B"]], [one[name] for one in found["A"]]) > 0.95, name
