"""A stage as a Job: what is sent to the cluster, and the options that decide it."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import msgspec

from radloop.errors import SettingsError, UnsupportedByEngine
from radloop.pipeline import Node
from radloop.stage.protocol import Request

NAME = "kubernetes"
_GRACE_S = 3


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where stages run; `[kubernetes]` in radloop.toml.

    Attributes:
        image: what holds radloop and the needs of core stages.
        images: the image of each other environment, such as `{"tfdv": "registry/radloop-tfdv:1"}`.
        namespace: where the Jobs are made.
        claim: the PersistentVolumeClaim that this machine has mounted as the project's folder. Empty: `host_path`.
        host_path: where the nodes have the project's folder; the path that it has here, by default.
        secret: the Secret that holds what stages name as `env:NAME`, under the keys NAME.
        kubeconfig: how to reach the cluster. Empty: as kubectl does, or from inside the cluster.
        wait_s: how long a stage may wait for a node, a volume or an image before it has failed.
        pod: more of the pods' specification (nodeSelector, tolerations, serviceAccountName), never against what is set here.
    """

    image: str = ""
    images: dict[str, str] = {}
    namespace: str = "default"
    claim: str = ""
    host_path: str = ""
    secret: str = ""
    kubeconfig: str = ""
    wait_s: float = 600.0
    pod: dict[str, Any] = {}


def image_of(node: Node, options: Options) -> str:
    """The image that runs a stage. Raises SettingsError where none is set for its environment."""
    image = options.image if node.environment == "core" else options.images.get(node.environment, "")
    if not image:
        setting = "image" if node.environment == "core" else f"images.{node.environment}"
        raise SettingsError(
            f"stage {node.name!r} has no image: it runs in the environment {node.environment!r}",
            expected=f'[kubernetes] {setting} = "registry/name:tag"',
            next_step="build one (deploy/images) and name it in radloop.toml",
        )
    return image


def secrets(node: Node, home: Path, options: Options) -> list[dict[str, Any]]:
    """The environment variables of a container that hold its stage's secrets, by reference.

    Raises:
        SettingsError: no Secret is named that holds them.
        UnsupportedByEngine: one is a file outside the project.
    """
    variables = {}
    for parameter in node.secrets:
        kind, _, name = str(node.params[parameter]).partition(":")
        if kind == "file" and not (home / name).resolve().is_relative_to(home):
            raise UnsupportedByEngine(NAME, node.name, f"secret outside the project's folder (file:{name})")
        if kind != "env":
            continue
        if not options.secret:
            raise SettingsError(
                f"stage {node.name!r} reads the secret env:{name}, and no Secret is named that holds it",
                expected='[kubernetes] secret = "NAME"',
                next_step=f"kubectl -n {options.namespace} create secret generic radloop --from-literal={name}=...",
            )
        variables[name] = {"name": name, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": name}}}
    return [variables[name] for name in sorted(variables)]


def job_name(folder: Path, request: Request) -> str:
    """A Job's name, an RFC 1123 label: the same for the same try of a stage in a run, another for every other."""
    told = re.sub(r"[^a-z0-9]+", "-", request.node.lower())[:16].strip("-") or "stage"
    digest = hashlib.sha256(f"{folder}\0{request.attempt}".encode()).hexdigest()[:8]
    return f"radloop-{told}-{re.sub(r'[^a-z0-9-]', '-', request.run_id.lower())[:24].strip('-')}-{digest}"


def label(value: str) -> str:
    """A text as a label's value: up to 63 of letters, digits, '-', '_' and '.', the ends alphanumeric."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", value)[:63].strip("-_.")


def job(node: Node, request: Request, folder: Path, options: Options) -> dict[str, Any]:
    """The Job of one try of a stage, as the API takes it.

    Args:
        node: the stage.
        request: what it is asked; `home` is the project's folder.
        folder: its record, in the project.
        options: where it runs.
    """
    home = Path(request.home)
    labels = {
        "app.kubernetes.io/managed-by": "radloop",
        "radloop.dev/pipeline": label(request.pipeline),
        "radloop.dev/run": label(request.run_id),
        "radloop.dev/stage": label(request.node),
    }
    limit = {"activeDeadlineSeconds": max(1, math.ceil(node.timeout_s))} if node.timeout_s else {}
    template = {
        "metadata": {"labels": labels},
        "spec": {
            **options.pod,
            **_pod(home, options),
            **limit,
            "containers": [_container(node, request, folder, options)],
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(folder, request), "labels": labels},
        # walk repeats a failed try. What a client that was killed leaves is swept away by the cluster.
        "spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": 3600, "template": template},
    }


def _pod(home: Path, options: Options) -> dict[str, Any]:
    owner = home.stat()
    project: dict[str, Any] = {"hostPath": {"path": options.host_path or str(home), "type": "Directory"}}
    if options.claim:
        project = {"persistentVolumeClaim": {"claimName": options.claim}}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # A stage must not be process 1, to which the kernel delivers neither SIGTERM nor its own SIGKILL.
        "shareProcessNamespace": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": owner.st_uid,
            "runAsGroup": owner.st_gid,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "project", **project}, {"name": "tmp", "emptyDir": {}}],
    }


def _container(node: Node, request: Request, folder: Path, options: Options) -> dict[str, Any]:
    home, files = Path(request.home), [str(folder / "request.json"), str(folder / "result.json")]
    return {
        "name": "stage",
        "image": image_of(node, options),
        "command": ["radloop", "stage", node.stage, "--request", files[0], "--result", files[1]],
        "workingDir": str(home),
        "env": [{"name": "HOME", "value": "/tmp"}, *secrets(node, home, options)],  # noqa: S108 - the pod's own
        "resources": {"requests": node.resources, "limits": node.resources} if node.resources else {},
        "securityContext": {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "project", "mountPath": str(home)}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
