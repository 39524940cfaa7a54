"""The gateway's configuration as data: whose answer can leave, and what each predictor is told. Envoy's own view of it is
in tests/services.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from radloop.serving import gateway
from radloop.serving.gateway import Routes, Upstream

CHAMPION, CHALLENGER = Upstream("a" * 64, "1", 1001), Upstream("b" * 64, "2", 1002)


def host(routes: Routes) -> dict[str, Any]:
    [only] = gateway.route_configuration(routes)["virtual_hosts"]
    return dict(only)


def headers(routes: Routes) -> dict[str, str]:
    return {one["header"]["key"]: one["header"]["value"] for one in host(routes)["request_headers_to_add"]}


@pytest.mark.parametrize("strategy", ["single", "shadow"])
def test_before_the_canary_no_answer_comes_from_the_challenger(strategy: Any) -> None:
    """A challenger nobody approved must not reach a clinician, by whatever path or version is asked for."""
    routes = Routes(champion=CHAMPION, challenger=CHALLENGER, strategy=strategy)
    assert {route["route"]["cluster"] for route in host(routes)["routes"]} == {CHAMPION.cluster}


def test_a_shadow_copies_inferences_only() -> None:
    """Copies of other requests would be answers to nothing in the challenger's log."""
    routes = host(Routes(champion=CHAMPION, challenger=CHALLENGER, strategy="shadow"))["routes"]
    copied = [route["match"] for route in routes if "request_mirror_policies" in route["route"]]
    assert copied == [{"path": "/v2/models/default/infer"}]


def test_a_canary_always_asks_both() -> None:
    """At 5 % the judge would otherwise have nothing to compare."""
    routes = host(Routes(champion=CHAMPION, challenger=CHALLENGER, strategy="canary", percent=5))["routes"]
    asked = [
        {
            route["route"]["cluster"].removesuffix("-or-champion"),
            route["route"]["request_mirror_policies"][0]["cluster"],
        }
        for route in routes
        if route["match"].get("path") == "/v2/models/default/infer"
    ]
    assert asked == [{CHAMPION.cluster, CHALLENGER.cluster}] * 6


def test_only_a_challenger_that_is_asked_is_named() -> None:
    """While it is only smoke-tested it gets no requests; naming it would count each one as unanswered."""
    both = {gateway.CHAMPION_HEADER: CHAMPION.model_digest, gateway.CHALLENGER_HEADER: CHALLENGER.model_digest}
    assert headers(Routes(champion=CHAMPION, challenger=CHALLENGER, strategy="shadow")) == both
    idle = Routes(champion=CHAMPION, challenger=CHALLENGER)
    assert headers(idle) == {gateway.CHAMPION_HEADER: CHAMPION.model_digest}
    assert gateway.CHALLENGER_HEADER in host(idle)["request_headers_to_remove"], "a client could set it"


def test_of_two_ports_of_one_model_the_later_counts() -> None:
    """A predictor that came back elsewhere must get its requests there."""
    moved = Upstream(CHAMPION.model_digest, "1", 2001)
    [only] = gateway.clusters(Routes(champion=CHAMPION), Routes(champion=moved))
    [lone] = only["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert lone["endpoint"]["address"]["socket_address"]["port_value"] == 2001


def test_files_appear_whole(tmp_path: Path) -> None:
    """Envoy reads on rename; a temporary file left there, or a half-written one, would be read too."""
    gateway.write_clusters(tmp_path, "1.1", Routes(champion=CHAMPION))
    gateway.write_routes(tmp_path, "1.2", Routes(champion=CHAMPION))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cds.json", "rds.json"]
    assert msgspec.json.decode((tmp_path / "rds.json").read_bytes())["version_info"] == "1.2"
