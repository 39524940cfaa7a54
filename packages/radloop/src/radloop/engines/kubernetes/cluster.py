"""The cluster, as far as the engine needs it. The only module that imports the Kubernetes client."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import msgspec

from radloop.engines.kubernetes.job import Options
from radloop.errors import EngineError, SettingsError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_PATIENCE_S = 90.0
_POLL_S = 0.4


class Refused(EngineError):
    """The API's own refusal."""

    status = 0


class Gone(Refused):
    """What was asked for is not there."""


class NoAnswer(EngineError):
    """The API cannot be reached."""


class Told(msgspec.Struct, frozen=True, rename="camel"):
    """Why something is as it is: a condition, a waiting or terminated container, an event."""

    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    exit_code: int = 0


class State(msgspec.Struct, frozen=True):
    """A container's state; one of the three, or none yet."""

    waiting: Told | None = None
    running: dict[str, Any] | None = None
    terminated: Told | None = None


class _Container(msgspec.Struct, frozen=True):
    state: State = State()


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: list[Told] = []
    container_statuses: list[_Container] = []


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    uid: str = ""
    deletion_timestamp: str = ""


class Object(msgspec.Struct, frozen=True):
    """What is read of a Job or a pod."""

    metadata: _Meta = _Meta()
    status: _Status = _Status()

    @property
    def container(self) -> State:
        """The state of a pod's one container."""
        return self.status.container_statuses[0].state if self.status.container_statuses else State()

    @property
    def over(self) -> bool:
        """Whether a pod has ended."""
        return self.status.phase in ("Succeeded", "Failed")

    def condition(self, kind: str, status: str = "True") -> Told | None:
        """The condition of this kind and status, if it has it."""
        return next((c for c in self.status.conditions if (c.type, c.status) == (kind, status)), None)


class _List(msgspec.Struct, frozen=True):
    items: list[Object] = []


class _Events(msgspec.Struct, frozen=True):
    items: list[Told] = []


class Cluster:
    """The few calls that the engine makes, by the official client; answers are read as far as they are needed."""

    def __init__(self, options: Options) -> None:
        """Raises SettingsError where the client is not installed or finds no cluster's configuration."""
        self.options, self.namespace = options, options.namespace
        self._client = _connect(options.kubeconfig)
        self.address = str(self._client.configuration.host)

    def close(self) -> None:
        """Close the connections."""
        self._client.rest_client.pool_manager.clear()

    def check(self) -> None:
        """Ask whether the cluster answers, and lets this user do what the engine does. Raises EngineError."""
        for verb, group, resource in (
            ("create", "batch", "jobs"),
            ("delete", "batch", "jobs"),
            ("list", "", "pods"),
            ("get", "", "pods/log"),
        ):
            resource, _, part = resource.partition("/")
            attributes = {"verb": verb, "group": group, "resource": resource, "subresource": part}
            review = {"spec": {"resourceAttributes": {"namespace": self.namespace, **attributes}}}
            answer = self._call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review)
            if not msgspec.json.decode(answer)["status"]["allowed"]:
                raise EngineError(
                    f"this user may not {verb} {resource} in the namespace {self.namespace!r}",
                    expected="a role that allows: create, get, delete jobs; list pods; get pods/log",
                    got=self.address,
                    next_step="ask whoever runs the cluster for such a role",
                )

    def create(self, body: dict[str, Any]) -> str:
        """Make a Job, in the place of one of that name that a killed client has left; its uid."""
        name = body["metadata"]["name"]
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                answer = self._call("POST", self._jobs(), body=body)
                return msgspec.json.decode(answer, type=Object).metadata.uid
            except Refused as refused:
                if refused.status != 409 or time.monotonic() > until:
                    raise
            self.delete(name)
            time.sleep(_POLL_S)

    def delete(self, name: str) -> None:
        """Delete a Job and its pods, if it is still there."""
        with contextlib.suppress(Gone):
            self._call("DELETE", self._jobs(name), query=[("propagationPolicy", "Background")])

    def job(self, name: str) -> Object:
        """A Job. Raises Gone."""
        return msgspec.json.decode(self._call("GET", self._jobs(name)), type=Object)

    def pod(self, uid: str) -> Object | None:
        """The pod of the Job that has this uid; None as long as there is none, or when it is gone."""
        query = [("labelSelector", f"batch.kubernetes.io/controller-uid={uid}")]
        answer = self._call("GET", f"/api/v1/namespaces/{self.namespace}/pods", query=query)
        return next(iter(msgspec.json.decode(answer, type=_List).items), None)

    def complaint(self, *names: str) -> str:
        """The last warning about any of these objects; empty where there is none, or none that this user may read."""
        found = ""
        for name in names:
            query = [("fieldSelector", f"involvedObject.name={name},type=Warning")]
            with contextlib.suppress(EngineError):
                answer = self._call("GET", f"/api/v1/namespaces/{self.namespace}/events", query=query)
                said = [f"{e.reason}: {e.message}" for e in msgspec.json.decode(answer, type=_Events).items]
                found = said[-1] if said else found
        return found

    def log(self, pod: str) -> Generator[bytes]:
        """The lines of a pod's log as they come, until it ends or the connection does."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        with contextlib.suppress(Refused, NoAnswer, _http_error()):
            answer = self._send("GET", path, query=[("follow", "true")], timeout=(5, 60))
            try:
                rest = b""
                for chunk in answer.stream(1 << 16):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from lines
                if rest:
                    yield rest
            finally:
                answer.close()

    def _jobs(self, name: str = "") -> str:
        return f"/apis/batch/v1/namespaces/{self.namespace}/jobs" + (f"/{name}" if name else "")

    def _call(self, method: str, path: str, **options: Any) -> bytes:
        """What the API answers. Raises Gone (404), Refused (any other refusal), EngineError (no answer)."""
        try:
            return bytes(self._send(method, path, **options).data)
        except _http_error() as error:
            raise self._silent(error) from None

    def _silent(self, why: object) -> NoAnswer:
        return NoAnswer(
            f"the Kubernetes API at {self.address} does not answer",
            got=str(why)[:300],
            next_step="kubectl cluster-info; is [kubernetes] kubeconfig the right one?",
        )

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        query: list[tuple[str, str]] | None = None,
        timeout: tuple[float, float] = (5, 30),
    ) -> Any:
        from kubernetes.client import ApiException

        try:
            return self._client.call_api(
                path,
                method,
                query_params=query or [],
                header_params={"Accept": "*/*", "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=timeout,
            )
        except ApiException as error:
            if not error.status:  # the client's word for a connection that TLS could not be made of
                raise self._silent(error.reason) from None
            raise _refusal(error.status, error.body or error.reason, self.address) from None


def _refusal(status: int, body: object, address: str) -> Refused:
    try:
        told = msgspec.json.decode(body if isinstance(body, bytes | str) else b"", type=Told).message
    except msgspec.MsgspecError:
        told = str(body)[:300]
    kind = Gone if status == 404 else Refused
    refused = kind(f"the Kubernetes API at {address} refused: {told}", got=f"HTTP status {status}")
    refused.status = status
    return refused


def _connect(kubeconfig: str) -> ApiClient:
    try:
        from kubernetes import client, config
    except ImportError:
        raise SettingsError(
            "the Kubernetes client is not installed", next_step='pip install "radloop[kubernetes]"'
        ) from None
    settings = client.Configuration()
    settings.retries = False
    try:
        if not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(config_file=kubeconfig or None, client_configuration=settings, persist_config=False)
    except (config.ConfigException, OSError) as error:
        raise SettingsError(
            "no cluster's configuration was found",
            expected="[kubernetes] kubeconfig, KUBECONFIG or ~/.kube/config",
            got=str(error),
        ) from None
    return client.ApiClient(settings)


def _http_error() -> type[Exception]:
    """What the client lets through where no answer comes: its transport's error."""
    from kubernetes.client import rest

    error: type[Exception] = rest.urllib3.exceptions.HTTPError
    return error
