"""PyTorch: exported programs (`.pt2`) and TorchScript (`.pt`). No pickle is opened on the way.

`torch.export.load` would unpickle what an archive brings along, torch 2.15 says so itself: weights and example inputs where
the safe way fails, custom objects always. So the safe way is forced, and archives with custom objects or compiled code are
refused. It still is a program, which PyTorch compiles: take it from whom you would take software.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radloop.learning.runtimes.signature import not_installed, unreadable, wrong

_REFUSED = {
    "data/constants/custom_obj": "objects of a class of its own",
    "data/constants/opaque_obj": "pickled objects",
    "data/aotinductor/": "compiled code",
}


class TorchRunner:
    """A module on the CPU; its class attribute `platform` is the subclass's."""

    platform = "pytorch"
    shape: tuple[int | None, ...] | None = None

    def __init__(self, module: Any) -> None:
        import torch

        self._torch, self._module = torch, module
        torch.set_num_threads(1)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.floating]:
        """As `Runner.run`."""
        with self._torch.inference_mode():
            found = self._module(self._torch.from_numpy(images))
        if not isinstance(found, self._torch.Tensor):
            raise wrong("gives no single tensor", "one tensor", type(found).__name__)
        numbers: NDArray[np.floating] = found.double().cpu().numpy()
        return numbers


class ExportedRunner(TorchRunner):
    """What `torch.export.save` wrote. Raises ArtifactError as `runtimes.open_network`."""

    platform = "pytorch_exportedprogram"

    def __init__(self, path: Path) -> None:
        _check_archive(path)
        try:
            with _safely():
                import torch
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(torch.export.load(path), "cpu")
                module = program.module()
        except Exception as error:  # noqa: BLE001 - whatever the archive provokes
            raise unreadable(path, error) from None
        self.shape = _shape(program)
        super().__init__(module)


class ScriptRunner(TorchRunner):
    """What `torch.jit.save` wrote. It declares no shape. Raises ArtifactError as `runtimes.open_network`."""

    platform = "pytorch_torchscript"

    def __init__(self, path: Path) -> None:
        torch = _torch()
        try:
            with _safely():
                module = torch.jit.load(str(path), map_location="cpu").eval()
        except Exception as error:  # noqa: BLE001 - a pickle, or damaged: torch says RuntimeError and more
            why = f"no TorchScript ({type(error).__name__}); a pickled model or state_dict is never opened"
            raise unreadable(path, why) from None
        super().__init__(module)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise not_installed("torch") from None
    return torch


def _check_archive(path: Path) -> None:
    """Raises ArtifactError for an archive that cannot be read or that holds what only unpickling or running would open."""
    torch = _torch()
    try:
        names = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError as error:
        raise unreadable(path, error) from None
    for name in names:
        for part, what in _REFUSED.items():
            if part in name:
                raise wrong(f"carries {what}", "an exported program of tensors and operations", part.rstrip("/"))


def _shape(program: Any) -> tuple[int | None, ...]:
    """The input's declared shape, of a program with one."""
    from torch import float32

    wanted = program.graph_signature.user_inputs
    given = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    if len(given) != 1 or not hasattr(given[0], "shape"):
        raise wrong(f"has {len(given)} inputs", "one tensor", f"{len(given)}")
    if given[0].dtype != float32:
        raise wrong("takes another type", "float32", str(given[0].dtype))
    return tuple(side if isinstance(side, int) else None for side in given[0].shape)


@contextmanager
def _safely() -> Iterator[None]:
    """Every `torch.load` below is weights-only, whatever its caller asks; and without what torch says about itself."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before, quiet = os.environ.get(name), logging.root.manager.disable
    os.environ[name] = "1"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(quiet)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
