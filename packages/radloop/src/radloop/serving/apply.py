"""Manifests onto a cluster: predictors first; routes only once every predictor that they lead to is Ready.

The only module of serving that imports the Kubernetes client. A route to a model that is not ready is 503 for its share of
the patients, so a model that does not become ready leaves the routes as they were.

A Gateway may hear of a route before it knows the Service that it names, and forget a Service before the route to it; a
request in between is 503 (Contour: 2 of 2,210 in five changes). So an HTTPRoute changes in three steps: a rule that nobody
meets names the old and the new Services; then the rules change; then that rule goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from radloop.errors import ServingError, SettingsError
from radloop.serving.manifests import Manifest

MANAGER = "radloop"
_POLL_S = 1.0
_SETTLE_S = 1.5
"""How long a Gateway may take to hear of a change; none says when all its proxies have."""

_ASIDE = "/radloop/in-change"
"""The path of the rule that nobody meets; a predictor answers it with 404."""

_PLURALS = {
    "InferenceService": "inferenceservices",
    "HTTPRoute": "httproutes",
    "VirtualService": "virtualservices",
    "DestinationRule": "destinationrules",
}


class Cluster:
    """The two calls that are made, by the official client.

    Args:
        kubeconfig: how to reach the cluster; empty: as kubectl does, or from inside the cluster.

    Raises:
        SettingsError: the client is not installed, or finds no cluster's configuration.
    """

    def __init__(self, kubeconfig: str = "") -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            raise SettingsError(
                "the Kubernetes client is not installed", next_step='pip install "radloop[kubernetes]"'
            ) from None
        settings = client.Configuration()
        try:
            if not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)
            else:
                config.load_kube_config(
                    config_file=kubeconfig or None, client_configuration=settings, persist_config=False
                )
        except (config.ConfigException, OSError) as error:
            raise SettingsError(
                "no cluster's configuration was found",
                expected="[kubernetes] kubeconfig, KUBECONFIG or ~/.kube/config",
                got=str(error),
            ) from None
        self._client = client.ApiClient(settings)
        self.address = str(settings.host)

    def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply under the manager "radloop"; what others set on the same object stays theirs.

        Returns:
            The object as the cluster has it now.

        Raises:
            ServingError: the cluster refuses, with its own words, or does not answer.
        """
        query = [("fieldManager", MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
        return self._call("PATCH", manifest, query, manifest)

    def get(self, manifest: Manifest) -> Manifest:
        """The object of this kind and name as the cluster has it; empty if there is none. Raises as `apply`."""
        return self._call("GET", manifest, [], None)

    def _call(self, method: str, manifest: Manifest, query: list[tuple[str, str]], body: Manifest | None) -> Manifest:
        from kubernetes.client import ApiException, rest

        metadata = manifest["metadata"]
        path = f"/apis/{manifest['apiVersion']}/namespaces/{metadata['namespace']}/{_PLURALS[manifest['kind']]}"
        what = f"{manifest['kind']} {metadata['namespace']}/{metadata['name']}"
        try:
            answer = self._client.call_api(
                f"{path}/{metadata['name']}",
                method,
                query_params=query,
                header_params={"Accept": "application/json", "Content-Type": "application/apply-patch+yaml"},
                body=body,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=(5, 30),
            )
            found: Manifest = msgspec.json.decode(answer.data)
        except ApiException as error:
            if method == "GET" and error.status == 404:
                return {}
            raise ServingError(
                f"the cluster refused {what}",
                got=_words(error.body) or error.reason,
                next_step="kubectl auth can-i patch; are the CRDs of KServe and of the Gateway API (or Istio) there?",
            ) from None
        except (rest.urllib3.exceptions.HTTPError, msgspec.DecodeError) as error:
            raise ServingError(
                f"the Kubernetes API at {self.address} does not answer",
                got=str(error)[:300],
                next_step="kubectl cluster-info",
            ) from None
        return found


def unready(service: Manifest) -> str:
    """Why an InferenceService, as the cluster tells it, must get no traffic yet; empty once it may."""
    metadata, status = service.get("metadata", {}), service.get("status", {})
    if metadata.get("deletionTimestamp"):
        return "it is being deleted"
    generation, seen = metadata.get("generation"), status.get("observedGeneration")
    if seen is not None and generation is not None and seen < generation:
        return f"KServe has not seen its generation {generation} yet"
    conditions: dict[str, Any] = {one.get("type"): one for one in status.get("conditions", [])}
    for name in ("Ready", "PredictorReady"):
        told = conditions.get(name)
        if told is None:
            return f"KServe says nothing of {name} yet"
        if told.get("status") != "True":
            return f"{name} is {told.get('status')}: {told.get('message') or told.get('reason') or 'no reason given'}"
    return ""


def release(
    cluster: Cluster,
    predictors: list[Manifest],
    routes: list[Manifest],
    *,
    timeout_s: float = 600.0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Apply predictors, wait until all are Ready, then apply the routes. The same again changes nothing.

    Args:
        progress: called with (predictors ready, predictors wanted).

    Raises:
        ServingError: the cluster refuses something, or a predictor was not Ready in time: the routes are then untouched.
    """
    for predictor in predictors:
        cluster.apply(predictor)
    until, shown = time.monotonic() + timeout_s, -1
    while True:
        waiting = check_ready(cluster, predictors)
        ready = len(predictors) - len(waiting)
        if progress is not None and ready != shown:
            progress(shown := ready, len(predictors))
        if not waiting:
            break
        if time.monotonic() > until:
            raise ServingError(
                f"not Ready within {timeout_s:g} s: {', '.join(waiting)}; no traffic was moved",
                expected="every InferenceService Ready",
                got="; ".join(f"{name}: {why}" for name, why in waiting.items()),
                next_step="kubectl describe inferenceservice; the same command goes on where this one stopped",
            )
        time.sleep(_POLL_S)
    for route in routes:
        move(cluster, route)


def move(cluster: Cluster, route: Manifest) -> None:
    """Apply a route, so that no request meets a Gateway that knows half of it. The same again changes nothing.

    Raises:
        ServingError: the cluster refuses.
    """
    if route["kind"] == "HTTPRoute":
        now = cluster.get(route)
        rules = [rule for rule in now.get("spec", {}).get("rules", []) if not _is_aside(rule)]
        gone = _services(rules) - _services(route["spec"]["rules"])
        if now and (gone or _services(route["spec"]["rules"]) - _services(rules)):
            aside = _aside(_services(rules) | _services(route["spec"]["rules"]))
            for wanted in (rules, route["spec"]["rules"]):
                cluster.apply({**route, "spec": {**route["spec"], "rules": [*wanted, aside]}})
                time.sleep(_SETTLE_S)
    cluster.apply(route)
    time.sleep(_SETTLE_S)


def _services(rules: list[Manifest]) -> set[tuple[str, int]]:
    """Names and ports of all Services that rules lead to, copies included."""
    refs = [ref for rule in rules for ref in rule.get("backendRefs", [])]
    copies = [
        told["requestMirror"]["backendRef"]
        for rule in rules
        for told in rule.get("filters", [])
        if "requestMirror" in told
    ]
    return {(ref["name"], ref["port"]) for ref in [*refs, *copies]}


def _aside(services: set[tuple[str, int]]) -> Manifest:
    backends = [{"name": name, "port": port, "weight": 1} for name, port in sorted(services)]
    return {"matches": [{"path": {"type": "Exact", "value": _ASIDE}}], "backendRefs": backends}


def _is_aside(rule: Manifest) -> bool:
    return any(match.get("path", {}).get("value") == _ASIDE for match in rule.get("matches", []))


def check_ready(cluster: Cluster, predictors: list[Manifest]) -> dict[str, str]:
    """Names of InferenceServices that must get no traffic yet, each with the reason. Raises as `Cluster.get`."""
    told = {one["metadata"]["name"]: unready(cluster.get(one)) for one in predictors}
    return {name: why for name, why in told.items() if why}


def _words(body: object) -> str:
    try:
        return str(msgspec.json.decode(body if isinstance(body, bytes | str) else b"", type=dict[str, Any])["message"])
    except (msgspec.MsgspecError, KeyError):
        return str(body or "")[:300]
