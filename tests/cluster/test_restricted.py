"""The `kubernetes` engine as a hospital's cluster lets it: a restricted namespace, a claim, a user with one role."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from radloop.engines import kubernetes
from radloop.engines.kubernetes import Options
from radloop.errors import EngineError
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import only, small

from .conftest import IMAGE, kubectl

pytestmark = pytest.mark.cluster

ROLE = Path(__file__).resolve().parents[2] / "deploy/kubernetes/role.yaml"


def apply(*objects: dict[str, Any]) -> None:
    """Make objects on the cluster."""
    listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    subprocess.run(["kubectl", "apply", "-f", "-"], input=json.dumps(listed), text=True, check=True, timeout=60)


@pytest.fixture
def restricted(home: Path, tmp_path: Path) -> Iterator[Options]:
    """Return a namespace that enforces "restricted", with the project as a claim and a user who has no role yet."""
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
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield Options(image=IMAGE, namespace=name, claim="project", kubeconfig=str(path), wait_s=60)
    kubectl("delete", f"namespace/{name}", f"persistentvolume/{name}", "--wait=false")


def allow(namespace: str) -> None:
    """Give the user the role that we publish."""
    kubectl("-n", namespace, "apply", "-f", str(ROLE))
    kubectl(
        "-n", namespace, "create", "rolebinding", "radloop", "--role=radloop", f"--serviceaccount={namespace}:engineer"
    )


def test_one_role_and_a_restricted_namespace_are_enough(home: Path, restricted: Options) -> None:
    """Where the security team enforces "restricted", an engine that needs more is not installed."""
    allow(restricted.namespace)
    result = kubernetes.run(small(), home=home, options=restricted)
    assert result.status == "succeeded", result.message
    claims = kubectl("-n", restricted.namespace, "get", "pvc", "project", "-o", "jsonpath={.status.phase}")
    assert claims == "Bound"


def test_a_user_without_the_role_is_told_what_to_ask_for(home: Path, restricted: Options) -> None:
    """'403 Forbidden' with twelve lines of headers is not what to send to who runs the cluster."""
    with pytest.raises(EngineError, match=f"may not create jobs in the namespace '{restricted.namespace}'"):
        kubernetes.run(only(s.numbers), home=home, options=restricted)
    assert not (home / "runs").exists()


def test_a_pod_that_the_namespace_refuses(home: Path, restricted: Options) -> None:
    """A Job whose pods are never admitted has no pod to look at: the reason stands in an event only."""
    allow(restricted.namespace)
    folder = msgspec.structs.replace(restricted, claim="", wait_s=8.0)
    result = kubernetes.run(only(s.numbers), home=home, options=folder)
    assert result.status == "failed"
    assert 'violates PodSecurity "restricted' in result.message
    assert "hostPath" in result.message
