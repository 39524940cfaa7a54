"""A release on KServe, through the cluster's own Gateway: shares as asked for, and no traffic to what is not Ready.

Needs the cluster's KServe and Contour (`addon kserve`) and RADLOOP_TEST_SERVING_IMAGE: deploy/images/core with
EXTRAS="pixels serve".
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from radloop.errors import ServingError
from radloop.serving import apply, manifests, predictions
from radloop.serving.desired import ModelRef, Models, Routing, State
from radloop.serving.gateway import CHALLENGER_HEADER, MODEL_HEADER, SUBJECT_HEADER
from radloop.serving.manifests import Place

from .conftest import OWNER, kubectl

IMAGE = os.environ.get("RADLOOP_TEST_SERVING_IMAGE", "")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not IMAGE, reason="RADLOOP_TEST_SERVING_IMAGE names no image with radloop's serving parts"),
]
HOST = "radloop.example"

_spec = importlib.util.spec_from_file_location(
    "serving_packages", Path(__file__).parents[1] / "unit/serving/packages.py"
)
assert _spec is not None
assert _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)


@pytest.fixture
def place(namespace: str, home: Path) -> Iterator[Place]:
    """Return where predictors run: a folder of the one node, and a Secret with key and token."""
    key, token = packages.KEY.hex(), packages.TOKEN
    kubectl(
        *("-n", namespace, "create", "secret", "generic", "serving"),
        *(f"--from-literal=radloop.key={key}", f"--from-literal=serve.token={token}"),
    )
    (home / "predictions").mkdir()
    os.chown(home / "predictions", OWNER, OWNER)
    yield Place(
        image=IMAGE, secret="serving", token="serve.token", gateway="projectcontour/contour", hosts=(HOST,),
        host_path=str(home), namespace=namespace, name=f"t{secrets.token_hex(2)}", user=OWNER, group=OWNER,
        resources={"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    )  # fmt: skip
    kubectl("-n", namespace, "delete", "secret", "serving")
    kubectl("-n", namespace, "delete", "inferenceservices,httproutes", "--all", "--wait=false")


@pytest.fixture
def models(home: Path) -> tuple[ModelRef, ModelRef]:
    """Return two tiny models that answer differently."""
    made = []
    for version, weight in (("1", 4.0), ("2", -4.0)):
        digest = packages.build(home / version, weight=weight)
        made.append(ModelRef(package=version, version=version, model_digest=digest))
    for path in home.rglob("*"):
        os.chown(path, OWNER, OWNER)
    return made[0], made[1]


@pytest.fixture
def address() -> str:
    """Return the way in: Contour's Envoy."""
    return "http://" + kubectl("-n", "projectcontour", "get", "service", "envoy", "-o", "jsonpath={.spec.clusterIP}")


def route(state: State, place: Place) -> None:
    files = manifests.manifests(state, place)
    apply.release(apply.Cluster(), *files.values(), timeout_s=180)
    time.sleep(3)  # the Gateway hears of the route a moment later


def ask(address: str, n: int, **headers: str) -> Counter[str]:
    """Versions that answered `n` requests, and statuses of what was no answer."""
    data = np.zeros((1, 1, packages.SIZE, packages.SIZE), np.float32).reshape(-1).tolist()
    body = {
        "inputs": [{"name": "image", "shape": [1, 1, packages.SIZE, packages.SIZE], "datatype": "FP32", "data": data}]
    }
    told = {
        "Host": HOST,
        "Authorization": f"Bearer {packages.TOKEN}",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    counted: Counter[str] = Counter()
    with httpx.Client(base_url=address, headers=told, timeout=30) as client:
        for _ in range(n):
            answer = client.post("/v2/models/default/infer", json=body)
            counted[
                answer.json()["parameters"]["model_version"] if answer.status_code == 200 else str(answer.status_code)
            ] += 1
    return counted


def test_single_shadow_canary_promotion(
    place: Place, models: tuple[ModelRef, ModelRef], address: str, home: Path
) -> None:
    """Each patient meets the model that was approved for them, and the log says who answered and who was asked too."""
    champion, challenger = models
    both = Models(champion=champion, challenger=challenger)
    route(State(models=Models(champion=champion)), place)
    assert ask(address, 50) == {"1": 50}

    route(State(models=both, routing=Routing("shadow")), place)
    assert ask(address, 50, **{MODEL_HEADER: "challenger", CHALLENGER_HEADER: "0" * 64}) == {"1": 50}
    time.sleep(3)
    pairs = predictions.pairs(home / "predictions", champion.model_digest, challenger.model_digest)
    assert len(pairs) == 50
    assert {(pair.champion["served"], pair.challenger and pair.challenger["served"]) for pair in pairs} == {
        (True, False)
    }

    route(State(models=both, routing=Routing("canary", 25)), place)
    assert ask(address, 20, **{SUBJECT_HEADER: "2499"}) == {"2": 20}
    assert ask(address, 20, **{SUBJECT_HEADER: "2500"}) == {"1": 20}
    assert ask(address, 20, **{MODEL_HEADER: "challenger", SUBJECT_HEADER: "9999"}) == {"2": 20}
    by_chance = ask(address, 400)
    assert set(by_chance) == {"1", "2"}
    assert 60 <= by_chance["2"] <= 140  # 100 expected; beyond 4.6 standard deviations

    route(State(models=Models(champion=challenger, previous=champion)), place)
    assert ask(address, 50) == {"2": 50}


def test_what_is_not_ready_gets_no_traffic(place: Place, models: tuple[ModelRef, ModelRef], address: str) -> None:
    """A challenger that cannot start leaves the champion's route as it was."""
    champion, challenger = models
    route(State(models=Models(champion=champion)), place)
    broken = msgspec.structs.replace(challenger, package="not-there")
    state = State(models=Models(champion=champion, challenger=broken), routing=Routing("canary", 50))
    files = manifests.manifests(state, place)
    with pytest.raises(ServingError, match="no traffic was moved"):
        apply.release(apply.Cluster(), *files.values(), timeout_s=20)
    assert ask(address, 50) == {"1": 50}
