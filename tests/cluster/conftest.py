"""A namespace on the cluster that `make test-cluster` has started; without it nothing here is collected."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from radloop.engines.kubernetes import Options
from radloop.testing.engine_suite import SECRET

IMAGE = os.environ.get("RADLOOP_TEST_IMAGE", "")
OWNER = 10001
ROLE = Path(__file__).resolve().parents[2] / "deploy/kubernetes/role.yaml"

collect_ignore_glob = [] if IMAGE else ["test_*"]


def kubectl(*arguments: str) -> str:
    """Run kubectl as a user does, against KUBECONFIG; what it prints."""
    done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def apply(*objects: dict[str, Any]) -> None:
    """Make objects on the cluster."""
    listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    subprocess.run(["kubectl", "apply", "-f", "-"], input=json.dumps(listed), text=True, check=True, timeout=60)


@contextmanager
def restricted_namespace(home: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """A namespace that enforces "restricted", with `home` as its claim "project", and a user who has no role yet.

    Yields its name, and the user's kubeconfig, which is written into `folder`.
    """
    name = f"radloop-{secrets.token_hex(3)}"
    enforced = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    size = {"storage": "1Gi"}
    volume: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": enforced}},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {**volume, "capacity": size, "hostPath": {"path": str(home)}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "project", "namespace": name},
            "spec": {**volume, "volumeName": name, "resources": {"requests": size}},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "engineer", "namespace": name}},
    )
    config = yaml.safe_load(kubectl("config", "view", "--raw", "--flatten"))
    config["users"][0]["user"] = {"token": kubectl("-n", name, "create", "token", "engineer").strip()}
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield name, path
    kubectl("delete", f"namespace/{name}", f"persistentvolume/{name}", "--wait=false")


def allow(namespace: str, role: str) -> None:
    """Give the user one of the roles that we publish."""
    kubectl("-n", namespace, "apply", "-f", str(ROLE))
    kubectl("-n", namespace, "create", "rolebinding", role, f"--role={role}", f"--serviceaccount={namespace}:engineer")


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
