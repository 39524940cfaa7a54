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


class Ends(msgspec.Struct, frozen=True):
    """Containers started again, and the exit status and last words of the one that ended last."""

    restarts: int = 0
    status: int | None = None
    said: str = ""


class Cluster:
    """The calls that are made, by the official client.

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
        self._settings, self._client = settings, client.ApiClient(settings)
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

    def delete(self, manifest: Manifest) -> None:
        """Delete the object of this kind and name, if it is there. Raises as `apply`."""
        self._call("DELETE", manifest, [], None)

    def list_services(self, namespace: str, *, part_of: str) -> list[Manifest]:
        """The InferenceServices that radloop made under one name (`Place.name`). Raises as `apply`."""
        kind = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
        labels = f"app.kubernetes.io/managed-by=radloop,app.kubernetes.io/part-of={part_of}"
        found = self._call(
            "GET", {**kind, "metadata": {"namespace": namespace, "name": ""}}, [("labelSelector", labels)], None
        )
        return [{**kind, **one} for one in found.get("items", [])]

    def ends(self, namespace: str, service: str) -> Ends:
        """How the containers of an InferenceService have ended so far. Raises as `apply`."""
        found = [told for pod in self._pods(namespace, service) for told in pod.status.container_statuses or []]
        over = [end for told in found if (end := told.state.terminated or told.last_state.terminated) is not None]
        last = max(over, key=lambda end: end.finished_at.timestamp() if end.finished_at else 0.0, default=None)
        return Ends(
            restarts=sum(told.restart_count for told in found),
            status=None if last is None else int(last.exit_code),
            said="" if last is None else str(last.message or last.reason or "").strip(),
        )

    def connect(self, namespace: str, service: str, port: int) -> Any:
        """A connection to one Ready pod of an InferenceService, through the API: a socket to read and write.

        Raises:
            ServingError: no pod is Ready, or the cluster lets nobody through.
        """
        from kubernetes import client, stream

        ready = [pod.metadata.name for pod in self._pods(namespace, service) if _is_ready(pod)]
        if not ready:
            raise ServingError(f"no pod of {service} is Ready", next_step="kubectl get pods")
        # A client of its own: `portforward` changes the one that it is given for as long as it connects.
        call = client.CoreV1Api(client.ApiClient(self._settings)).connect_get_namespaced_pod_portforward
        try:
            return stream.portforward(call, ready[0], namespace, ports=str(port)).socket(port)
        except Exception as error:  # noqa: BLE001 - ApiException and websocket's, with all headers in them
            raise ServingError(
                f"no way to the pods of {service}",
                got=getattr(error, "reason", None) or type(error).__name__,
                next_step="kubectl auth can-i get pods/portforward; can-i create pods/portforward",
            ) from None

    def _pods(self, namespace: str, service: str) -> list[Any]:
        from kubernetes import client
        from kubernetes.client import rest

        labels = f"serving.kserve.io/inferenceservice={service}"
        core = client.CoreV1Api(self._client)
        try:
            return list(core.list_namespaced_pod(namespace, label_selector=labels, _request_timeout=(5, 30)).items)
        except (client.ApiException, rest.urllib3.exceptions.HTTPError) as error:
            raise ServingError(
                f"the pods of {service} cannot be listed",
                got=_words(error.body) if isinstance(error, client.ApiException) else str(error)[:300],
                next_step="kubectl auth can-i list pods",
            ) from None

    def _call(self, method: str, manifest: Manifest, query: list[tuple[str, str]], body: Manifest | None) -> Manifest:
        from kubernetes.client import ApiException, rest

        metadata = manifest["metadata"]
        path = f"/apis/{manifest['apiVersion']}/namespaces/{metadata['namespace']}/{_PLURALS[manifest['kind']]}"
        what = f"{manifest['kind']} {metadata['namespace']}/{metadata['name']}"
        try:
            answer = self._client.call_api(
                f"{path}/{metadata['name']}".rstrip("/"),
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
            if method in ("GET", "DELETE") and error.status == 404:
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
    now = cluster.get(route)
    before, wanted = now.get("spec", {}).get("rules", []), route["spec"].get("rules", [])
    before = [rule for rule in before if not _is_aside(rule)]
    if route["kind"] == "HTTPRoute" and now and _services(before) != _services(wanted):
        aside = _aside(_services(before) | _services(wanted))
        for rules in (before, wanted):
            cluster.apply({**route, "spec": {**route["spec"], "rules": [*rules, aside]}})
            time.sleep(_SETTLE_S)
    made = cluster.apply(route)
    if made["metadata"].get("resourceVersion") != now.get("metadata", {}).get("resourceVersion"):
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


def _is_ready(pod: Any) -> bool:
    conditions = pod.status.conditions or []
    return not pod.metadata.deletion_timestamp and any(c.type == "Ready" and c.status == "True" for c in conditions)


def _words(body: object) -> str:
    try:
        return str(msgspec.json.decode(body if isinstance(body, bytes | str) else b"", type=dict[str, Any])["message"])
    except (msgspec.MsgspecError, KeyError):
        return str(body or "")[:300]
