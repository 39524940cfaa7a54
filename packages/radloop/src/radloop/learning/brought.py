"""A network that was made elsewhere, taken into the loop: checked, and put into a model folder as training would have."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.errors import SettingsError
from radloop.imaging.transforms import Preprocessing
from radloop.learning import runtimes
from radloop.learning.runtimes import FORMS, Gives, Network, Origin
from radloop.learning.runtimes.signature import wrong

TOLERANCE = 1e-4
"""Largest difference between two answers of one network for the same image that is taken for rounding."""

_SUFFIXES = {Path(name).suffix: form for form, name in FORMS.items() if form != "saved_model"}


def form_of(source: Path) -> str:
    """The form of a network file or folder, by its name. Raises SettingsError if it is none, or not there."""
    if (source / "saved_model.pb").is_file():
        return "saved_model"
    form = _SUFFIXES.get(source.suffix)
    if form is None or not source.is_file():
        raise SettingsError(
            "there is no such network",
            expected="a file .onnx, .pt2 (exported program) or .pt (TorchScript), or a SavedModel folder",
            got="another kind of file or folder" if source.exists() else "nothing there",
            next_step="check [train] network in radloop.toml; the path is inside the project folder",
        )
    return form


def adopt(
    source: Path, gives: Gives, preprocessing: Preprocessing, images: NDArray[np.float32], out: Path
) -> list[str]:
    """Write a model folder of a network that was trained elsewhere; returns what should be looked at, one sentence each.

    Args:
        source: as `form_of`.
        gives: what its numbers are.
        preprocessing: the one that it will be given images of.
        images: some of those, `(n, 1, size, size)`, on which it is tried.
        out: gets the network's files, `runtime.json`, `preprocessing.json`, and an empty `history.json`.

    Raises:
        SettingsError: there is no such network.
        ArtifactError: it cannot be read, takes or gives something else, or is not in evaluation mode.
    """
    form = form_of(source)
    out.mkdir(parents=True, exist_ok=True)
    place = out / FORMS[form]
    if form == "saved_model":
        shutil.copytree(source, place)
    else:
        shutil.copyfile(source, place)
    told = msgspec.convert({"form": form, "gives": gives}, Origin)
    for name, value in ((runtimes.FILE, told), ("preprocessing.json", preprocessing)):
        (out / name).write_bytes(msgspec.json.encode(value, order="deterministic"))
    (out / "history.json").write_bytes(b'{"best_epoch":0,"epochs":[]}')
    return _try(runtimes.open_network(out, preprocessing.size), images)


def _try(network: Network, images: NDArray[np.float32]) -> list[str]:
    """Whether it answers for each image alone, and always the same."""
    found = network.logits(images)
    if not np.isfinite(found).all():
        raise wrong("gives values that are not finite", "a number for each image", "NaN or infinity")
    alone = np.concatenate([network.logits(image[np.newaxis]) for image in images])
    again = network.logits(images)
    if (apart := max(network.difference(found, alone), network.difference(found, again))) > TOLERANCE:
        raise wrong(
            "does not always give the same for the same image",
            f"differences up to {TOLERANCE:g}, alone and among others",
            f"{apart:.3g}",
            "export it in evaluation mode: batch normalisation and dropout must be frozen",
        )
    said = []
    if network.gives == "logit" and found.min() >= 0 and found.max() <= 1:
        said.append('all its values lie between 0 and 1: if they are probabilities, set network_output = "probability"')
    if float(np.ptp(found)) <= TOLERANCE:
        said.append("it gives the same for every image: its preprocessing may be another one, or stand inside it twice")
    return said
