"""A namespace on the cluster that `make test-cluster` has started; without it nothing here is collected."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from radloop.engines.kubernetes import Options
from radloop.testing.engine_suite import SECRET

IMAGE = os.environ.get("RADLOOP_TEST_IMAGE", "")
OWNER = 10001

collect_ignore_glob = [] if IMAGE else ["test_*"]


def kubectl(*arguments: str) -> str:
    """Run kubectl as a user does, against KUBECONFIG; what it prints."""
    done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def namespace() -> Iterator[str]:
    """Return a namespace of our own that holds the suite's Secret."""
    name = f"radloop-{secrets.token_hex(3)}"
    kubectl("create", "namespace", name)
    kubectl("-n", name, "create", "secret", "generic", "suite", f"--from-literal=RADLOOP_SUITE_SECRET={SECRET}")
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def options(namespace: str) -> Options:
    """Return where the suite's stages run."""
    return Options(image=IMAGE, namespace=namespace, secret="suite", wait_s=120)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a project's folder that belongs to the user of the image."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    os.chown(folder, OWNER, OWNER)
    return folder


@pytest.fixture
def jobs(namespace: str) -> Callable[[], list[str]]:
    """Return a function that lists the Jobs and pods that are there."""

    def names() -> list[str]:
        return kubectl("-n", namespace, "get", "jobs,pods", "-o", "name").split()

    return names
