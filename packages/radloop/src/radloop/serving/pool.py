"""Pools: several servers of MLflow behind one address of the gateway, balanced, and none of them missed when it dies.

| kind | servers | asked whether it lives at |
|---|---|---|
| `mlflow-server` | `mlflow server`, all on one store | `/health` |
| `mlflow-models` | `mlflow models serve`, all of one model version | `/ping` |

A request whose server dies is asked of another one, if that can do no harm:

- one that no server has got (no connection, refused, broken before it was sent): always;
- reads, predictions, and writes that lead to the same state however often they are made (`_IDEMPOTENT`, held by a test against
  MLflow): also when the connection breaks, before an answer has begun;
- any other write (a run, a version, a deletion): never. It may have been done, and twice would be two runs. Its client is told
  409, with words: MLflow's own client repeats a 503 by itself, whatever the method, and would make the second one.
"""

from __future__ import annotations

import http.client
import re
from typing import Any, Literal

import msgspec

from radloop.errors import ServingError

Kind = Literal["mlflow-server", "mlflow-models"]

HEALTH: dict[Kind, str] = {"mlflow-server": "/health", "mlflow-models": "/ping"}
MODELS_TIMEOUT_S = 60
UPSTREAM_IDLE_S = 1
"""uvicorn closes a connection that was idle for 5 s. One that closes while a request is sent cannot be told from one that died
while it worked, so none gets that old."""

_TYPE = "type.googleapis.com/envoy"
RUNTIME = {"re2.max_program_size.error_level": 1000}
"""Envoy's own limit, 100, is below what `_IDEMPOTENT` makes."""

_BUFFER_BYTES = 64 * 1024 * 1024  # a body that is larger cannot be sent again
_ONCE_HEADER = "x-radloop-once"
_ONCE = {"header": {"key": _ONCE_HEADER, "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
_NEVER_SENT = "connect-failure,refused-stream,reset-before-request"
_ALWAYS = "connect-failure,refused-stream,reset,retriable-status-codes"
_DIED = (
    "the MLflow server died, or gave no answer in time, while it worked on this: it may have been done or not. "
    "Look whether it was before you ask again"
)
_IDEMPOTENT = {
    "POST": (
        r"experiments/(search|set-experiment-tag)",
        r"runs/(search|update|log-metric|log-parameter|log-batch|set-tag|log-inputs)",
        r"(logged-models|traces|datasets)/search",
        r"registered-models/(set-tag|alias|get-latest-versions)",
        r"model-versions/set-tag",
    ),
    "PATCH": (
        r"registered-models/update",
        r"model-versions/update",
        r"logged-models/[^/]+(/tags)?",
    ),
}
"""Methods and paths below `/api/2.0/mlflow/` of writes that may be made twice, beside every PUT."""


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Servers behind one port.

    Attributes:
        name: for people and statistics: letters, digits, `-`, `_`.
        port: where the gateway listens for them.
        servers: `HOST:PORT` of each.
        token: what a client must bear (Authorization: Bearer TOKEN); empty: nothing is asked.

    Raises:
        ServingError: a name or a server that is none, or no server at all.
    """

    name: str
    kind: Kind
    port: int
    servers: tuple[str, ...]
    token: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.name):
            raise ServingError("a pool's name is none", expected="1 to 40 letters, digits, '-' or '_'", got=self.name)
        if not self.servers:
            raise ServingError(f"the pool {self.name} has no servers", expected='servers = ["HOST:PORT", ...]')
        for server in self.servers:
            _address(server)

    def __repr__(self) -> str:
        return f"Pool({self.name!r}, {self.kind!r}, port={self.port}, servers={self.servers!r})"

    @property
    def cluster(self) -> str:
        """Envoy's name for its servers."""
        return f"pool-{self.name}"

    def answers(self, server: str) -> bool:
        """Whether one of `servers` says, within two seconds, that it is well."""
        place = _address(server)["socket_address"]
        connection = http.client.HTTPConnection(place["address"], place["port_value"], timeout=2)
        try:
            connection.request("GET", HEALTH[self.kind])
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def manager(pool: Pool) -> dict[str, Any]:
    """What Envoy's HTTP connection manager does with the pool's requests, beside what every listener does."""
    return {
        "stat_prefix": f"pool-{pool.name}",
        "request_timeout": "0s",  # artifacts may be gigabytes; Envoy ends a stream that stands still for 5 minutes
        "local_reply_config": {
            "mappers": [_not_again()],
            "body_format": {
                "json_format": {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "gateway: %LOCAL_REPLY_BODY%"}
            },
        },
        "route_config": {
            "name": pool.cluster,
            "virtual_hosts": [
                {
                    "name": pool.cluster,
                    "domains": ["*"],
                    "routes": _routes(pool),
                }
            ],
        },
    }


def cluster(pool: Pool) -> dict[str, Any]:
    """The pool's servers for Envoy, with what finds out that one is gone."""
    return {
        "name": pool.cluster,
        "type": "STRICT_DNS",
        "lb_policy": "LEAST_REQUEST",
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": f"{UPSTREAM_IDLE_S}s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": pool.cluster,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(server)}} for server in pool.servers]}],
        },
        "circuit_breakers": {"thresholds": [{"max_pending_requests": 4096, "max_requests": 4096, "max_retries": 1000}]},
        # All of them ill is more likely to be slow than dead: then ask them all the same.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
        "health_checks": [
            {
                "timeout": "5s",
                "interval": "0.5s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": HEALTH[pool.kind], "codec_client_type": "HTTP1"},
            }
        ],
        "outlier_detection": _outliers(),
    }


def _outliers() -> dict[str, Any]:
    """A server whose connection broke gets nothing for a second; what it answers, a 500 too, is its own business."""
    off = (
        "consecutive_5xx",
        "consecutive_gateway_failure",
        "success_rate",
        "local_origin_success_rate",
        "failure_percentage",
    )
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 1,
        "enforcing_consecutive_local_origin_failure": 100,
        "interval": "0.5s",
        "base_ejection_time": "1s",
        "max_ejection_percent": 50,
    } | {f"enforcing_{name}": 0 for name in off}


def _routes(pool: Pool) -> list[dict[str, Any]]:
    if pool.kind == "mlflow-models":
        return _guarded(pool, [_route(pool, {"prefix": "/"}, _ALWAYS, timeout_s=MODELS_TIMEOUT_S)])
    made = [_route(pool, {"prefix": "/"} | _method("GET", "HEAD", "OPTIONS", "PUT"), _ALWAYS)]
    for method, paths in _IDEMPOTENT.items():
        below = rf"(/.*)?/(ajax-)?api/[23]\.0/mlflow/({'|'.join(paths)})"
        made.append(_route(pool, {"safe_regex": {"regex": below}} | _method(method), _ALWAYS))
    return _guarded(pool, [*made, _route(pool, {"prefix": "/"}, _NEVER_SENT)])


def _guarded(pool: Pool, routes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Routes for who bears the token; 401 for the others."""
    if not pool.token:
        return routes
    bears = {"name": "authorization", "string_match": {"exact": f"Bearer {pool.token}"}}
    for route in routes:
        route["match"].setdefault("headers", []).append(bears)
    asked = {"header": {"key": "www-authenticate", "value": "Bearer"}}
    body = {"inline_string": "a token is needed: send the header Authorization: Bearer TOKEN"}
    refused = {"match": {"prefix": "/"}, "direct_response": {"status": 401, "body": body}}
    return [*routes, refused | {"response_headers_to_add": [asked]}]


def _method(*names: str) -> dict[str, Any]:
    return {"headers": [{"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(names)}}}]}


def _route(pool: Pool, match: dict[str, Any], retry_on: str, *, timeout_s: int = 0) -> dict[str, Any]:
    previous = f"{_TYPE}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    policy = {
        "retry_on": retry_on,
        "retriable_status_codes": [503],
        "num_retries": 5,
        "retry_back_off": {"base_interval": "0.05s", "max_interval": "1s"},
        "retry_host_predicate": [
            {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {"@type": previous}}
        ],
        "host_selection_retry_max_attempts": 5,
    }
    action = {"cluster": pool.cluster, "timeout": f"{timeout_s}s", "retry_policy": policy}
    return {"match": match, "route": action, **({"request_headers_to_add": [_ONCE]} if retry_on == _NEVER_SENT else {})}


def _not_again() -> dict[str, Any]:
    """What a client hears of a write that must not be made twice and whose server died over it."""
    died = {"response_flag_filter": {"flags": ["UC", "UR", "UT", "UPE"]}}
    once = {"header_filter": {"header": {"name": _ONCE_HEADER, "present_match": True}}}
    return {
        "filter": {"and_filter": {"filters": [died, once]}},
        "status_code": 409,
        "body_format_override": {"json_format": {"error_code": "ABORTED", "message": _DIED}},
    }


def _address(server: str) -> dict[str, Any]:
    """Envoy's address of `HOST:PORT`. Raises ServingError if it is none."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ServingError("a pool's server has no address", expected="HOST:PORT", got=server)
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
