"""`radloop run --engine`: which engine runs, and what it refuses before anything has run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .conftest import Ran, configure


def test_kubernetes_without_an_image(inside: Callable[..., Ran], project: Path) -> None:
    """The first try on a cluster says which line of radloop.toml is missing."""
    ran = inside("run", "prepare", "--engine", "kubernetes")
    assert ran.code == 1
    assert '[kubernetes] image = "registry/name:tag"' in ran.err
    assert not (project / "runs").exists()


def test_kubernetes_without_the_image_of_one_environment(inside: Callable[..., Ran], project: Path) -> None:
    """The validation's image must not be missed after an hour of de-identification."""
    configure(project, '[kubernetes]\nimage = "registry/radloop:1"\n')
    ran = inside("run", "prepare", "--engine", "kubernetes")
    assert ran.code == 1
    assert "stage 'validate' has no image" in ran.err
    assert "[kubernetes] images.tfdv =" in ran.err


def test_a_typo_in_the_section_is_told(inside: Callable[..., Ran], project: Path) -> None:
    """A name space in another name would put a hospital's stages in `default`."""
    configure(project, '[kubernetes]\nimage = "registry/radloop:1"\nname_space = "imaging"\n')
    ran = inside("run", "prepare", "--engine", "kubernetes")
    assert "[kubernetes] has no setting 'name_space'" in ran.err
    assert "did you mean 'namespace'?" in ran.err


def test_subprocess_runs_each_stage_in_a_process_of_its_own(inside: Callable[..., Ran], project: Path) -> None:
    """`--engine` that runs something else than it says would make every comparison of engines worthless."""
    inside("run", "prepare", "--engine", "subprocess")
    assert list((project / "runs").glob("*/ingest/stderr.log"))  # what a stage in this process does not leave
