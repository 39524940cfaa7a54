"""Serving on Kubernetes, as data: one KServe InferenceService a model version, and our own route over their Services.

KServe's own `canary` starts a second Deployment and sends it no traffic (0.20, Standard mode), so the routing is ours: a
Gateway API `HTTPRoute`, or Istio's `VirtualService` and `DestinationRule`s. They follow the rules of `gateway`, with three
differences:

- Neither has ranges of header values: a patient's share is a regular expression (`subject_pattern`).
- A copy of a request cannot be marked as one. Every request says instead whose answer leaves (`gateway.ANSWERS_HEADER`).
- Where chance decides (no `SUBJECT_HEADER`), only the model that answers is asked: a mirror cannot follow a weight.

Nothing falls back to the champion here: a challenger that is not ready gets its share as 503. `apply` therefore routes to
what is Ready only.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec

from radloop.errors import ServingError, SettingsError
from radloop.serving.desired import ModelRef, State
from radloop.serving.gateway import (
    ANSWERS_HEADER,
    CHALLENGER_HEADER,
    CHAMPION_HEADER,
    GRPC_SERVICE,
    MIRROR_HEADER,
    MODEL_HEADER,
    REQUEST_TIMEOUT_S,
    SUBJECT_HEADER,
    SUBJECTS,
    UPSTREAM_IDLE_S,
)

Manifest = dict[str, Any]
Mesh = Literal["gateway", "istio"]

PORT, GRPC_PORT = 8080, 8081
SERVICE_PORT = 80
"""KServe's Service has the container's first port as 80, and every other one as it is."""
PACKAGE, PREDICTIONS, SECRETS = "/package", "/predictions", "/secrets"
_DRAIN_S = 30
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how predictors run, and what leads to them.

    Attributes:
        image: what holds radloop with its serving parts (deploy/images/core).
        secret: the Secret that holds the project key, and the bearer token if there is one.
        key: the project key's name in the Secret: 64 hex digits.
        token: the bearer token's name in the Secret; empty: none is asked for.
        claim: the PersistentVolumeClaim that is the project's folder (ReadWriteMany). Predictors see their package, read only,
            and `predictions/`, nothing else of it. Empty: `host_path`; without either, packages are paths in the image and
            the prediction log ends with the pod.
        host_path: where the nodes have the project's folder.
        gateway: "NAMESPACE/NAME" of the Gateway (Gateway API's or Istio's).
        hosts: host names that it is asked by. Empty: all that the Gateway listens for.
        name: what the manifests' names begin with, up to 30 of a-z, 0-9 and '-'.
        model_name: the model's name in paths.
        user, group: who the predictor runs as: the owner of the project's folder.
        pod: more of the pods' specification, never against what is set here.

    Raises:
        SettingsError: made without an image, a Secret or a Gateway.
    """

    image: str
    secret: str
    gateway: str
    key: str = "radloop.key"
    token: str = ""
    claim: str = ""
    host_path: str = ""
    hosts: tuple[str, ...] = ()
    namespace: str = "default"
    name: str = "radloop"
    model_name: str = "default"
    replicas: int = 1
    resources: dict[str, Any] = msgspec.field(
        default_factory=lambda: {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "2Gi"}}
    )
    user: int = 10001
    group: int = 10001
    pod: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for setting, what in (("image", "registry/name:tag"), ("secret", "the name of a Secret")):
            if not getattr(self, setting):
                raise SettingsError(f"serving on Kubernetes needs its {setting}", expected=what, got="nothing")
        if self.gateway.count("/") != 1 or not all(self.gateway.split("/")):
            raise SettingsError("no Gateway leads to the predictors", expected="NAMESPACE/NAME", got=self.gateway)
        if not _NAME.fullmatch(self.name):
            raise SettingsError("the name is none for manifests", expected="a-z, 0-9, '-'; up to 30", got=self.name)


class Match(msgspec.Struct, frozen=True):
    """A path, whole or as a prefix of whole segments, and at most one header: its exact value, or a pattern for all of it."""

    path: str
    exact: bool = True
    header: str = ""
    value: str = ""
    pattern: str = ""


class Rule(msgspec.Struct, frozen=True):
    """Who answers what matches, by weights that sum up to 100, and who is asked too. The first that matches counts."""

    match: Match
    answers: tuple[tuple[ModelRef, int], ...]
    copy: ModelRef | None = None
    grpc: bool = False


def subject_pattern(percent: int) -> str | None:
    """A regular expression (RE2's syntax) for the numbers from 0 to percent * 100 - 1, of 0 to 9999; None for no number.

    Leading zeros are read as Envoy's ranges read them.
    """
    assert SUBJECTS == 10_000 and 0 <= percent <= 100
    if percent == 0:
        return None
    tens, ones = divmod(percent, 10)
    hundreds = []  # what may stand before the last two digits: 1 to percent - 1
    if percent > 1:
        hundreds.append(f"[1-{min(percent - 1, 9)}]")
    if tens > 1:
        hundreds.append(f"[1-{min(tens - 1, 9)}][0-9]")
    if tens and ones:
        hundreds.append(f"{tens}[0-{ones - 1}]")
    return f"^0*({'|'.join(['[0-9]{1,2}', *(f'{digits}[0-9]{{2}}' for digits in hundreds)])})$"


def rules(state: State, model_name: str = "default") -> list[Rule]:
    """What the routes say, in order; nothing but the protocol's own paths is let through.

    Raises:
        ServingError: there is no champion.
    """
    champion, challenger = _champion(state), state.models.challenger
    made = []
    for path, grpc in ((f"/v2/models/{model_name}/infer", False), (f"{GRPC_SERVICE}ModelInfer", True)):
        made += _inferences(state, path, grpc=grpc)
    if challenger is not None and state.routing.strategy == "canary":
        versioned = Match(f"/v2/models/{model_name}/versions/{challenger.version}", exact=False)
        made.append(Rule(versioned, ((challenger, 100),)))
    made.append(Rule(Match("/v2", exact=False), ((champion, 100),)))
    made.append(Rule(Match(GRPC_SERVICE.rstrip("/"), exact=False), ((champion, 100),), grpc=True))
    return made


def _inferences(state: State, path: str, *, grpc: bool) -> list[Rule]:
    champion, challenger, percent = _champion(state), state.models.challenger, state.routing.percent
    if challenger is None or state.routing.strategy == "single":
        return [Rule(Match(path), ((champion, 100),), grpc=grpc)]
    to_champion = Rule(Match(path), ((champion, 100),), copy=challenger, grpc=grpc)
    if state.routing.strategy == "shadow":
        return [to_champion]
    to_challenger = Rule(Match(path), ((challenger, 100),), copy=champion, grpc=grpc)
    made = [
        _for(to_challenger, MODEL_HEADER, value="challenger"),
        _for(to_champion, MODEL_HEADER, value="champion"),
    ]
    pattern = subject_pattern(percent)
    if pattern is not None:
        made.append(_for(to_challenger, SUBJECT_HEADER, pattern=pattern))
    made.append(_for(to_champion, SUBJECT_HEADER, pattern=".*"))
    by_chance = Rule(Match(path), ((champion, 100 - percent), (challenger, percent)), grpc=grpc)
    made.append({0: to_champion, 100: to_challenger}.get(percent, by_chance))
    return made


def _for(rule: Rule, header: str, *, value: str = "", pattern: str = "") -> Rule:
    match = msgspec.structs.replace(rule.match, header=header, value=value, pattern=pattern)
    return msgspec.structs.replace(rule, match=match)


def service_name(model: ModelRef, place: Place) -> str:
    """The InferenceService's name: another one for every version and for every model of a version."""
    version = re.sub(r"[^a-z0-9]+", "-", model.version.lower())[:12].strip("-")
    return f"{place.name}-v{version}-{model.model_digest[:8]}"


def inference_service(model: ModelRef, place: Place) -> Manifest:
    """The predictor of one model version (KServe, Standard mode).

    It has no address outside the cluster: KServe's own would lead past our route, to a challenger that nobody approved.

    Raises:
        ServingError: the package lies where its pods cannot see it.
    """
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            **_metadata(service_name(model, place), place, {"networking.kserve.io/visibility": "cluster-local"}),
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "none",
                "radloop.dev/model-digest": model.model_digest,
                "radloop.dev/version": model.version,
            },
        },
        "spec": {
            "predictor": {
                **place.pod,
                "minReplicas": place.replicas,
                "deploymentStrategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
                },
                "terminationGracePeriodSeconds": _DRAIN_S,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": place.user,
                    "runAsGroup": place.group,
                    "fsGroup": place.group,
                    "fsGroupChangePolicy": "OnRootMismatch",
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "volumes": _volumes(place),
                "containers": [_container(model, place)],
            }
        },
    }


def _container(model: ModelRef, place: Place) -> Manifest:
    package, mounts = _mounts(model, place)
    arguments = {
        "package": package,
        "key-file": f"{SECRETS}/key",
        "predictions": PREDICTIONS,
        "name": place.model_name,
        "version": model.version,
        "expect-digest": model.model_digest,
        "host": "0.0.0.0",  # noqa: S104 - the pod's own network; only its Service leads here
        "port": str(PORT),
        "grpc-port": str(GRPC_PORT),
        **({"token-file": f"{SECRETS}/token"} if place.token else {}),
    }
    return {
        "name": "kserve-container",
        "image": place.image,
        "command": ["python", "-m", "radloop.serving.predictor"],
        "args": [f"--{name}={value}" for name, value in arguments.items()],
        # The first is the Service's port 80; "grpc" in the name makes KServe say that the other speaks HTTP/2.
        "ports": [
            {"name": "http", "containerPort": PORT, "protocol": "TCP"},
            {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
        ],
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - the pod's own
        "startupProbe": {**_probe("ready"), "periodSeconds": 1, "failureThreshold": 120},
        "readinessProbe": {**_probe("ready"), "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {**_probe("live"), "periodSeconds": 10, "failureThreshold": 3},
        # Why a model cannot be served is said on the way out; KServe hands it on.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        # Routes hear of a pod's end a moment after it does: until then it takes what still comes.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}},
        "resources": place.resources,
        "securityContext": {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }


def _probe(what: str) -> Manifest:
    return {"httpGet": {"path": f"/v2/health/{what}", "port": PORT}, "timeoutSeconds": 2}


def _volumes(place: Place) -> list[Manifest]:
    items = [{"key": place.key, "path": "key"}, *([{"key": place.token, "path": "token"}] if place.token else [])]
    secret = {"secretName": place.secret, "defaultMode": 0o440, "items": items}
    made: list[Manifest] = [{"name": "secrets", "secret": secret}, {"name": "tmp", "emptyDir": {}}]
    if place.claim:
        made.append({"name": "project", "persistentVolumeClaim": {"claimName": place.claim}})
    elif place.host_path:
        made.append({"name": "project", "hostPath": {"path": place.host_path, "type": "Directory"}})
    else:
        made.append({"name": "predictions", "emptyDir": {}})
    return made


def _mounts(model: ModelRef, place: Place) -> tuple[str, list[Manifest]]:
    """Where the container finds the package, and what it sees. Landing, keys and the catalog are not among it."""
    secrets = {"name": "secrets", "mountPath": SECRETS, "readOnly": True}
    path, shared = PurePosixPath(model.package), bool(place.claim or place.host_path)
    if path.is_absolute() == shared or ".." in path.parts:
        raise ServingError(
            f"the pods of version {model.version} cannot see its package",
            expected="a path in the project's folder" if shared else "a path in the image (there is no claim)",
            got=model.package,
            next_step="name the claim that holds the project, or an image that holds the package",
        )
    if not shared:
        return model.package, [secrets, {"name": "predictions", "mountPath": PREDICTIONS}]
    return PACKAGE, [
        secrets,
        {"name": "project", "mountPath": PACKAGE, "subPath": model.package, "readOnly": True},
        {"name": "project", "mountPath": PREDICTIONS, "subPath": "predictions"},
    ]


def http_route(state: State, place: Place) -> Manifest:
    """The Gateway API's route. Its precedence is its own: exact paths, longer prefixes, more headers; then our order."""
    namespace, name = place.gateway.split("/")
    hosts = {"hostnames": list(place.hosts)} if place.hosts else {}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": _metadata(f"{place.name}-release", place),
        "spec": {
            "parentRefs": [{"name": name, "namespace": namespace}],
            **hosts,
            "rules": [_http_rule(state, rule, place) for rule in rules(state, place.model_name)],
        },
    }


def _http_rule(state: State, rule: Rule, place: Place) -> Manifest:
    match: Manifest = {"path": {"type": "Exact" if rule.match.exact else "PathPrefix", "value": rule.match.path}}
    if rule.match.header:
        kind = "RegularExpression" if rule.match.pattern else "Exact"
        value = rule.match.pattern or rule.match.value
        match["headers"] = [{"type": kind, "name": rule.match.header, "value": value}]
    backends = [
        {**_backend(model, place, grpc=rule.grpc), "weight": weight, "filters": [_marked(state, rule, model)]}
        for model, weight in rule.answers
    ]
    made: Manifest = {"matches": [match], "backendRefs": backends, "timeouts": {"request": f"{REQUEST_TIMEOUT_S}s"}}
    if len(backends) == 1:  # headers of the rule are the copy's too
        made["filters"] = backends[0].pop("filters")
        if rule.copy is not None:
            copy = {"backendRef": _backend(rule.copy, place, grpc=rule.grpc)}
            made["filters"] = [*made["filters"], {"type": "RequestMirror", "requestMirror": copy}]
    return made


def _backend(model: ModelRef, place: Place, *, grpc: bool) -> Manifest:
    return {"name": f"{service_name(model, place)}-predictor", "port": GRPC_PORT if grpc else SERVICE_PORT}


def _marked(state: State, rule: Rule, answering: ModelRef) -> Manifest:
    told, removed = headers(state, rule, answering)
    modifier = {"set": [{"name": name, "value": value} for name, value in told.items()], "remove": removed}
    return {"type": "RequestHeaderModifier", "requestHeaderModifier": modifier}


def headers(state: State, rule: Rule, answering: ModelRef) -> tuple[dict[str, str], list[str]]:
    """What a predictor is told by the route, and what a client may not tell it: headers to set, headers to remove."""
    in_play = [answering] if rule.copy is None else [answering, rule.copy]
    named = {CHAMPION_HEADER: state.models.champion, CHALLENGER_HEADER: state.models.challenger}
    told = {name: model.model_digest for name, model in named.items() if model is not None and model in in_play}
    removed = [name for name in named if name not in told] + [MIRROR_HEADER]
    return {**told, ANSWERS_HEADER: answering.model_digest}, removed


def virtual_service(state: State, place: Place) -> Manifest:
    """Istio's route, in the order of `rules`."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": _metadata(f"{place.name}-release", place),
        "spec": {
            "hosts": list(place.hosts) or ["*"],
            "gateways": [place.gateway],
            "http": [_istio_rule(state, rule, place) for rule in rules(state, place.model_name)],
        },
    }


def _istio_rule(state: State, rule: Rule, place: Place) -> Manifest:
    # Istio's prefix knows no segments; every path below has something after it.
    match: Manifest = {"uri": {"exact": rule.match.path}}
    if not rule.match.exact:
        match = {"uri": {"regex": f"{re.escape(rule.match.path)}(/.*)?"}}
    if rule.match.header:
        told = {"regex": rule.match.pattern} if rule.match.pattern else {"exact": rule.match.value}
        match["headers"] = {rule.match.header: told}
    made: Manifest = {
        "match": [match],
        "route": [_istio_backend(state, rule, place, model, weight) for model, weight in rule.answers],
        "timeout": f"{REQUEST_TIMEOUT_S}s",
        # An inference changes nothing but the log, so asking again is safe. 503 is a predictor that is about to end.
        "retries": {"attempts": 3, "retryOn": "connect-failure,refused-stream,reset,unavailable,503"},
    }
    if rule.copy is not None:
        made["mirror"] = _destination(rule.copy, place, grpc=rule.grpc)
        made["mirrorPercentage"] = {"value": 100}
    return made


def _istio_backend(state: State, rule: Rule, place: Place, model: ModelRef, weight: int) -> Manifest:
    told, removed = headers(state, rule, model)
    return {
        "destination": _destination(model, place, grpc=rule.grpc),
        "weight": weight,
        "headers": {"request": {"set": told, "remove": removed}},
    }


def _destination(model: ModelRef, place: Place, *, grpc: bool) -> Manifest:
    return {"host": _host(model, place), "port": {"number": GRPC_PORT if grpc else SERVICE_PORT}}


def _host(model: ModelRef, place: Place) -> str:
    return f"{service_name(model, place)}-predictor.{place.namespace}.svc.cluster.local"


def destination_rule(model: ModelRef, place: Place) -> Manifest:
    """Istio's treatment of one model's pods: a patient's requests to one of them, a failing one left out for a while."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": _metadata(service_name(model, place), place),
        "spec": {
            "host": _host(model, place),
            "trafficPolicy": {
                "loadBalancer": {"consistentHash": {"httpHeaderName": SUBJECT_HEADER}},
                "connectionPool": {
                    "tcp": {"maxConnections": 4096, "connectTimeout": "1s"},
                    "http": {
                        "http1MaxPendingRequests": 4096,
                        "http2MaxRequests": 4096,
                        "maxRetries": 1000,
                        # Let go of idle connections before the predictor does.
                        "idleTimeout": f"{UPSTREAM_IDLE_S}s",
                    },
                },
                "outlierDetection": {
                    "consecutive5xxErrors": 5,
                    "interval": "5s",
                    "baseEjectionTime": "30s",
                    "maxEjectionPercent": 50,
                },
            },
        },
    }


def manifests(state: State, place: Place, mesh: Mesh = "gateway") -> dict[str, list[Manifest]]:
    """All files of a state: "predictors.yaml", then "routes.yaml", in the order in which they are to be applied.

    A challenger without traffic ("single" with two models) has its predictor already.

    Raises:
        ServingError: there is no champion, or a package that pods cannot see.
    """
    models = [_champion(state), *([state.models.challenger] if state.models.challenger else [])]
    routes = [http_route(state, place)]
    if mesh == "istio":
        routes = [*(destination_rule(model, place) for model in models), virtual_service(state, place)]
    return {"predictors.yaml": [inference_service(model, place) for model in models], "routes.yaml": routes}


def to_yaml(documents: list[Manifest]) -> bytes:
    """One YAML file of them, in their own order.

    Raises:
        SettingsError: PyYAML is not installed.
    """
    try:
        return b"---\n".join(msgspec.yaml.encode(document) for document in documents)
    except ImportError:
        raise SettingsError("PyYAML is not installed", next_step='pip install "radloop[kubernetes]"') from None


def _champion(state: State) -> ModelRef:
    if state.models.champion is None:
        raise ServingError("there is no champion to route to", expected="a champion", next_step="release a version")
    return state.models.champion


def _metadata(name: str, place: Place, labels: dict[str, str] | None = None) -> Manifest:
    told = {"app.kubernetes.io/managed-by": "radloop", "app.kubernetes.io/part-of": place.name}
    return {"name": name, "namespace": place.namespace, "labels": {**told, **(labels or {})}}
