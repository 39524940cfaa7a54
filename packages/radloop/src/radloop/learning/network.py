"""The network: made from a description, its weights as a plain uncompressed .npz, its logits over a set of images.

A model folder holds `architecture.json`, `weights.npz`, `preprocessing.json` and `history.json`. Nothing in it is a
pickle: opening a model runs no code that came with it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.errors import ArtifactError, SettingsError
from radloop.imaging.transforms import Preprocessing
from radloop.learning.runtimes import Network, open_network, origin

if TYPE_CHECKING:
    from torch import nn

    from radloop.datasets.tensors import TensorSet

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Huang et al., CVPR 2017, with growth 12: 107,000 weights, for 96-pixel radiographs on a CPU.
    "densenet": {"init_features": 16, "growth_rate": 12, "block_config": [3, 4, 6]},
}


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network by name and by the arguments that MONAI's class takes."""

    name: str
    arguments: dict[str, Any]


def architecture(name: str) -> Architecture:
    """The architecture of that name. Raises SettingsError if there is none."""
    if name not in ARCHITECTURES:
        raise SettingsError("no such model", expected=" or ".join(sorted(ARCHITECTURES)), got=name)
    return Architecture(name, ARCHITECTURES[name])


def create(description: Architecture) -> nn.Module:
    """A network of one grey channel and one logit, freshly initialised from torch's generator."""
    from monai.networks.nets.densenet import DenseNet

    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description.arguments.items()}
    network: nn.Module = DenseNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, **arguments})
    return network


def save(network: nn.Module, description: Architecture, preprocessing: Preprocessing, folder: Path) -> None:
    """Write `weights.npz`, `architecture.json` and `preprocessing.json`: equal weights give equal bytes."""
    state = {name: value.detach().cpu().contiguous().numpy() for name, value in sorted(network.state_dict().items())}
    np.savez(folder / "weights.npz", allow_pickle=False, **state)  # entries carry the fixed date 1980-01-01
    (folder / "architecture.json").write_bytes(msgspec.json.encode(description, order="deterministic"))
    (folder / "preprocessing.json").write_bytes(msgspec.json.encode(preprocessing, order="deterministic"))


def weights(folder: Path) -> dict[str, NDArray[Any]]:
    """The weights of a model folder by name. Raises ArtifactError if they cannot be read."""
    try:
        with (folder / "weights.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError("a model's weights cannot be read", expected="weights.npz", got=str(error)) from None


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over architecture and weights: names, types, shapes and bytes."""
    seen = hashlib.sha256((folder / "architecture.json").read_bytes())
    for name, value in sorted(weights(folder).items()):
        seen.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        seen.update(np.ascontiguousarray(value).tobytes())
    return seen.hexdigest()


def load(folder: Path) -> nn.Module:
    """The network of a model folder, on the CPU, in evaluation mode. Raises ArtifactError if it is not whole."""
    import torch

    try:
        description = msgspec.json.decode((folder / "architecture.json").read_bytes(), type=Architecture)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError("a model's architecture cannot be read", expected=folder.name, got=str(error)) from None
    network = create(description)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights(folder).items()})
    return network.eval()


def open_model(folder: Path) -> nn.Module | Network:
    """The network of a model folder, whether radloop trained it or it was brought. Raises ArtifactError as `load`."""
    if origin(folder) is None:
        return load(folder)
    return open_network(folder, preprocessing_of(folder).size)


def preprocessing_of(folder: Path) -> Preprocessing:
    """The preprocessing that a model folder or package was made with. Raises ArtifactError if it cannot be read."""
    try:
        return msgspec.json.decode((folder / "preprocessing.json").read_bytes(), type=Preprocessing)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError("a model's preprocessing cannot be read", expected=folder.name, got=str(error)) from None


def logits(
    network: nn.Module | Network,
    tensors: TensorSet,
    preprocessing: Preprocessing,
    sop_uids: Sequence[str],
    *,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """The network's logits `(n,)` for instances, in evaluation mode, on the device where the network is."""
    places, out = tensors.places(sop_uids), np.empty(len(sop_uids), dtype=np.float64)
    compute = network.logits if isinstance(network, Network) else partial(_computed, network)
    module = None if isinstance(network, Network) or not network.training else network
    if module is not None:
        module.eval()
    for start in range(0, len(places), batch_size):
        here = slice(start, start + batch_size)
        out[here] = compute(preprocessing.windowed(tensors.take(places[here])))
        if progress is not None:
            progress(min(start + batch_size, len(places)), len(places))
    if module is not None:
        module.train()
    return out


def _computed(network: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float64]:
    import torch

    with torch.inference_mode():
        found = network(torch.from_numpy(images).to(next(network.parameters()).device))
    values: NDArray[np.float64] = found.reshape(-1).double().cpu().numpy()
    return values


def _device() -> str:
    import torch

    with warnings.catch_warnings():
        # Without a driver, torch says so only where TensorFlow looked for one before it.
        warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
        return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def deterministic(seed: int, threads: int | None = None) -> Iterator[str]:
    """Everything that torch may vary, fixed; put back on leaving. Gives the device: "cuda" where there is one.

    Sums on a CPU depend on the number of threads, hence `threads` (None: all that this process may use).
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must stand before CUDA's first use
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(seed)
    try:
        yield _device()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
        torch.set_rng_state(state)
