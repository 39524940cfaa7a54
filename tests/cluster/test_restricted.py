"""The `kubernetes` engine as a hospital's cluster lets it: a restricted namespace, a claim, a user with one role."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from radloop.engines import kubernetes
from radloop.engines.kubernetes import Options
from radloop.errors import EngineError
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import only, small

from .conftest import IMAGE, allow, kubectl, restricted_namespace

pytestmark = pytest.mark.cluster


@pytest.fixture
def restricted(home: Path, tmp_path: Path) -> Iterator[Options]:
    """Return a namespace that enforces "restricted", with the project as a claim and a user who has no role yet."""
    with restricted_namespace(home, tmp_path) as (name, kubeconfig):
        yield Options(image=IMAGE, namespace=name, claim="project", kubeconfig=str(kubeconfig), wait_s=60)


def test_one_role_and_a_restricted_namespace_are_enough(home: Path, restricted: Options) -> None:
    """Where the security team enforces "restricted", an engine that needs more is not installed."""
    allow(restricted.namespace, "radloop")
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
    allow(restricted.namespace, "radloop")
    folder = msgspec.structs.replace(restricted, claim="", wait_s=8.0)
    result = kubernetes.run(only(s.numbers), home=home, options=folder)
    assert result.status == "failed"
    assert 'violates PodSecurity "restricted' in result.message
    assert "hostPath" in result.message
