"""What goes back for a study: where in the image an answer came from."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import onnx
import pydicom
import pytest
from onnx import numpy_helper

from radloop.learning.package import Packaged
from radloop.serving import reading

_spec = importlib.util.spec_from_file_location("reading_packages", Path(__file__).with_name("packages.py"))
assert _spec is not None and _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)


@pytest.fixture
def looks_at_the_lower_left(tmp_path: Path) -> Packaged:
    """A model whose answer depends on the lower left quarter of the (padded) image only."""
    packages.build(tmp_path / "package")
    model = onnx.load(str(tmp_path / "package" / "model.onnx"))
    weights = np.zeros((packages.SIZE, packages.SIZE), np.float32)
    weights[packages.SIZE // 2 :, : packages.SIZE // 2] = 1
    (initializer,) = [one for one in model.graph.initializer if one.name == "w"]
    initializer.CopyFrom(numpy_helper.from_array(weights.reshape(-1, 1), "w"))
    onnx.save(model, str(tmp_path / "package" / "model.onnx"))
    return Packaged(tmp_path / "package")


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (48, 24), (24, 48), (33, 17)])
def test_colour_stands_where_the_model_looked(looks_at_the_lower_left: Packaged, rows: int, columns: int) -> None:
    """If this failed, a reader's eye would be led to another place than the model's; images are padded before it sees them."""
    ds = pydicom.dcmread(io.BytesIO(packages.dicom()))
    pixels = np.zeros((rows, columns), np.uint16)
    bright = (slice(3 * rows // 4, rows), slice(0, columns // 4))
    pixels[bright] = 4000
    pixels[: rows // 4] = 4000  # as bright, but not looked at
    ds.Rows, ds.Columns, ds.PixelData = rows, columns, pixels.tobytes()
    ds.BitsAllocated = 16
    found = reading.heat(looks_at_the_lower_left, ds)
    assert found is not None and found.shape == (rows, columns)
    assert found.max() == 1 and found[bright].mean() > 0.5
    assert found[: rows // 2].max() == 0 and found[:, (columns + 1) // 2 + columns // 8 :].max() == 0
