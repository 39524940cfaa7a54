"""Serving on Kubernetes as files: they say what the projects' own definitions allow, and route as the gateway here does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from radloop.errors import ServingError, SettingsError
from radloop.serving import gateway, manifests
from radloop.serving.desired import ModelRef, Models, Routing, State
from radloop.serving.gateway import MODEL_HEADER, SUBJECT_HEADER, Routes, Upstream
from radloop.serving.manifests import Place
from radloop.serving.predictor.core import Asked

CHAMPION = ModelRef("artifacts/aa/package", "3", "a" * 64)
CHALLENGER = ModelRef("artifacts/bb/package", "4", "b" * 64)
PLACE = Place(
    image="registry.example/radloop:1",
    secret="radloop",
    token="serve.token",
    claim="project",
    gateway="infra/edge",
    hosts=("radloop.example",),
    namespace="imaging",
)
INFER = "/v2/models/default/infer"
MODULES = {
    "github.com/kserve/kserve@v0.20.0": "config/crd/full/serving.kserve.io_inferenceservices.yaml",
    "sigs.k8s.io/gateway-api@v1.4.0": "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",
    "istio.io/api@v1.27.1": "kubernetes/customresourcedefinitions.gen.yaml",
}
STATES = {
    "single": State(models=Models(champion=CHAMPION)),
    "smoke": State(models=Models(champion=CHAMPION, challenger=CHALLENGER)),
    "shadow": State(models=Models(champion=CHAMPION, challenger=CHALLENGER), routing=Routing("shadow")),
    **{
        f"canary-{percent}": State(
            models=Models(champion=CHAMPION, challenger=CHALLENGER), routing=Routing("canary", percent)
        )
        for percent in (0, 5, 50, 99, 100)
    },
}


def definition_files() -> list[Path]:
    """The CRDs: all in RADLOOP_TEST_CRDS, or those of `MODULES` in Go's module cache."""
    if named := os.environ.get("RADLOOP_TEST_CRDS"):
        return sorted(Path(named).rglob("*.yaml"))
    go = shutil.which("go")
    if go is None:
        return []
    told = subprocess.run([go, "env", "GOMODCACHE"], capture_output=True, text=True, check=True).stdout.strip()
    return [path for module, file in MODULES.items() if (path := Path(told) / module / file).is_file()]


@pytest.fixture(scope="module")
def definitions() -> dict[str, jsonschema.Draft202012Validator]:
    """Validators by "GROUP/VERSION KIND", which refuse what the API server would silently drop."""
    made = {}
    for path in definition_files():
        for document in yaml.load_all(path.read_bytes(), Loader=yaml.CSafeLoader):
            if not document or document.get("kind") != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                name = f"{spec['group']}/{version['name']} {spec['names']['kind']}"
                if name.split()[1] in ("InferenceService", "HTTPRoute", "VirtualService", "DestinationRule"):
                    made[name] = closed(version["schema"]["openAPIV3Schema"])
                    made[name]["properties"] |= {key: {} for key in ("apiVersion", "kind", "metadata")}
    if len(made) < 4:
        said = "no CRDs: set RADLOOP_TEST_CRDS, or run `go mod download` for each of " + ", ".join(MODULES)
        if "crds" in os.environ.get("RADLOOP_REQUIRE", "").replace(" ", "").split(","):
            pytest.fail(said, pytrace=False)
        pytest.skip(said)
    return {name: jsonschema.Draft202012Validator(schema) for name, schema in made.items()}


def closed(schema: Any) -> Any:
    """A structural schema as JSON schema that allows no unknown field."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    open_to_all = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_to_all:
        made["additionalProperties"] = False
    return made


@pytest.mark.parametrize("mesh", ["gateway", "istio"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_projects_own_definitions_allow_it(
    state: State, mesh: manifests.Mesh, definitions: dict[str, jsonschema.Draft202012Validator]
) -> None:
    """A wrong field is refused by the cluster, or worse: dropped in silence, with the probe or the limit it was."""
    kinds = set()
    for name, documents in manifests.manifests(state, PLACE, mesh).items():
        read = list(yaml.safe_load_all(manifests.to_yaml(documents)))
        assert read == documents, f"{name} says something else as YAML"
        for document in read:
            kinds.add(document["kind"])
            definitions[f"{document['apiVersion']} {document['kind']}"].validate(document)
    routes = {"HTTPRoute"} if mesh == "gateway" else {"VirtualService", "DestinationRule"}
    assert kinds == {"InferenceService"} | routes


def test_the_definitions_find_mistakes(definitions: dict[str, jsonschema.Draft202012Validator]) -> None:
    """A check that everything passes would show nothing."""
    wrong = manifests.http_route(STATES["shadow"], PLACE)
    wrong["spec"]["rules"][0]["backendRefs"][0]["wieght"] = 1
    with pytest.raises(jsonschema.ValidationError, match="wieght"):
        definitions["gateway.networking.k8s.io/v1 HTTPRoute"].validate(wrong)
    service = manifests.inference_service(CHAMPION, PLACE)
    service["spec"]["predictor"]["containers"][0]["readinessProbe"]["httpGet"]["port"] = {}
    with pytest.raises(jsonschema.ValidationError):
        definitions["serving.kserve.io/v1beta1 InferenceService"].validate(service)


@pytest.mark.parametrize("percent", range(101))
def test_a_share_of_the_patients_as_a_pattern(percent: int) -> None:
    """One number too many is a patient who gets answers of a model that was not approved for them."""
    pattern = manifests.subject_pattern(percent)
    matched = [n for n in range(gateway.SUBJECTS) if pattern is not None and re.fullmatch(pattern, str(n))]
    assert matched == list(range(percent * 100))


@given(st.one_of(st.text(max_size=8), st.integers(10_000, 10**9).map(str), st.integers(-9999, -1).map(str)))
def test_what_is_no_subject_is_nobodys_share(value: str) -> None:
    """A header that says nonsense must not choose the challenger."""
    pattern = manifests.subject_pattern(100)
    assert pattern is not None
    is_subject = re.fullmatch("0*[0-9]{1,4}", value, re.ASCII) is not None
    assert (re.fullmatch(pattern, value) is not None) == is_subject


def here(state: State, path: str, headers: dict[str, str]) -> tuple[set[str], str | None] | None:
    """Who answers and who is asked too, by this machine's gateway: models' digests; None: nobody."""
    up = {ref: Upstream(ref.model_digest, ref.version, 1, 2) for ref in (CHAMPION, CHALLENGER)}
    routes = Routes(
        champion=up[CHAMPION],
        challenger=up[CHALLENGER] if state.models.challenger else None,
        strategy=state.routing.strategy,
        percent=state.routing.percent,
    )
    digests = {up[ref].cluster: ref.model_digest for ref in up}
    found: tuple[set[str], str | None] | None = None
    for route in gateway.route_configuration(routes)["virtual_hosts"][0]["routes"]:
        match = route["match"]
        if not envoy_matches(match, path, headers):
            continue
        cluster = route["route"]["cluster"].removesuffix("-grpc").removesuffix("-or-champion")
        mirrors = route["route"].get("request_mirror_policies", [])
        copy = digests[mirrors[0]["cluster"].removesuffix("-grpc")] if mirrors else None
        share = match.get("runtime_fraction", {}).get("default_value", {}).get("numerator", 100)
        if share == 0:
            continue
        if share < 100:
            found = ({digests[cluster]}, None)
        elif found is not None:
            return found[0] | {digests[cluster]}, None  # chance decides: whom it leaves out is not compared here
        else:
            return {digests[cluster]}, copy
    return found


def envoy_matches(match: dict[str, Any], path: str, headers: dict[str, str]) -> bool:
    if "path" in match and match["path"] != path:
        return False
    if "prefix" in match and not path.startswith(match["prefix"]):
        return False
    prefix = match.get("path_separated_prefix")
    if prefix is not None and not (path == prefix or path.startswith(prefix + "/")):
        return False
    for header in match.get("headers", []):
        value = headers.get(header["name"])
        if value is None:
            return False
        if "string_match" in header and header["string_match"]["exact"] != value:
            return False
        if "range_match" in header:
            bounds = header["range_match"]
            if not (re.fullmatch("[0-9]+", value) and bounds["start"] <= int(value) < bounds["end"]):
                return False
    return True


def by_http_route(state: State, path: str, headers: dict[str, str]) -> tuple[set[str], str | None] | None:
    """The same by the HTTPRoute, in the precedence of the Gateway API: exact, longer prefix, more headers, order."""
    found = []
    for number, rule in enumerate(manifests.http_route(state, PLACE)["spec"]["rules"]):
        [match] = rule["matches"]
        kind, value = match["path"]["type"], match["path"]["value"]
        if path != value and not (kind == "PathPrefix" and path.startswith(value + "/")):
            continue
        asked = match.get("headers", [])
        if all(header_fits(one["type"] == "Exact", one["value"], headers.get(one["name"])) for one in asked):
            found.append(((kind != "Exact", -len(value), -len(asked), number), rule))
    if not found:
        return None
    rule = min(found, key=lambda one: one[0])[1]
    mirrors = [f["requestMirror"]["backendRef"]["name"] for f in rule.get("filters", []) if "requestMirror" in f]
    return {digest_of(b["name"]) for b in rule["backendRefs"]}, digest_of(mirrors[0]) if mirrors else None


def by_virtual_service(state: State, path: str, headers: dict[str, str]) -> tuple[set[str], str | None] | None:
    """The same by Istio's VirtualService: the first that matches."""
    for rule in manifests.virtual_service(state, PLACE)["spec"]["http"]:
        [match] = rule["match"]
        uri = match["uri"]
        if not (uri["exact"] == path if "exact" in uri else re.fullmatch(uri["regex"], path)):
            continue
        asked = match.get("headers", {}).items()
        if all(header_fits("exact" in how, *how.values(), headers.get(name)) for name, how in asked):
            copy = digest_of(rule["mirror"]["host"]) if "mirror" in rule else None
            return {digest_of(one["destination"]["host"]) for one in rule["route"]}, copy
    return None


def header_fits(exact: bool, wanted: str, value: str | None) -> bool:
    return value is not None and (value == wanted if exact else re.fullmatch(wanted, value) is not None)


def digest_of(service: str) -> str:
    [ref] = [
        r for r in (CHAMPION, CHALLENGER) if service.split(".")[0] == f"{manifests.service_name(r, PLACE)}-predictor"
    ]
    return ref.model_digest


@given(
    state=st.one_of(
        st.sampled_from(list(STATES.values())),
        st.integers(0, 100).map(
            lambda percent: State(
                models=Models(champion=CHAMPION, challenger=CHALLENGER), routing=Routing("canary", percent)
            )
        ),
    ),
    path=st.sampled_from(
        [
            INFER,
            f"{gateway.GRPC_SERVICE}ModelInfer",
            f"{gateway.GRPC_SERVICE}ServerReady",
            "/v2",
            "/v2/health/ready",
            "/v2/models/default/versions/4/infer",
            "/v2/models/default/versions/44/infer",
            "/metrics",
            "/v2x",
            "/",
        ]
    ),
    headers=st.fixed_dictionaries(
        {},
        optional={
            MODEL_HEADER: st.sampled_from(["champion", "challenger", "other", "Challenger"]),
            SUBJECT_HEADER: st.one_of(st.integers(0, 10_050).map(str), st.sampled_from(["", "x", "-1", "007"])),
        },
    ),
)
def test_it_routes_as_the_gateway_of_one_machine_does(state: State, path: str, headers: dict[str, str]) -> None:
    """A patient must not change models, nor a challenger reach a clinician, because serving has moved to a cluster."""
    wanted = here(state, path, headers)
    assert by_http_route(state, path, headers) == wanted
    assert by_virtual_service(state, path, headers) == wanted


@pytest.mark.parametrize("percent", [1, 5, 50, 99])
def test_chance_divides_by_weight(percent: int) -> None:
    """Requests without a subject get the share that was approved."""
    state = State(models=Models(champion=CHAMPION, challenger=CHALLENGER), routing=Routing("canary", percent))
    [route] = [r for r in manifests.http_route(state, PLACE)["spec"]["rules"] if len(r["backendRefs"]) == 2][:1]
    assert {digest_of(b["name"]): b["weight"] for b in route["backendRefs"]} == {
        CHAMPION.model_digest: 100 - percent,
        CHALLENGER.model_digest: percent,
    }
    [istio] = [r for r in manifests.virtual_service(state, PLACE)["spec"]["http"] if len(r["route"]) == 2][:1]
    assert [one["weight"] for one in istio["route"]] == [100 - percent, percent]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_predictor_knows_its_part(state: State) -> None:
    """The judge compares what the log says: a copy that counts as served, or a role mixed up, is false evidence."""
    for rule in manifests.rules(state):
        for answering, _ in rule.answers:
            told, removed = manifests.headers(state, rule, answering)
            assert not set(told) & set(removed)
            assert gateway.MIRROR_HEADER in removed
            asked = [answering] if rule.copy is None else [answering, rule.copy]
            for model in asked:
                seen = Asked.of("rest", told, model.model_digest)
                assert seen.role == ("champion" if model == CHAMPION else "challenger")
                assert seen.served == (model == answering)
                others = [one.model_digest for one in asked if one != model]
                assert seen.compared_with == (others[0] if others else None)


def test_no_more_rules_than_an_http_route_may_have() -> None:
    """16 rules are the API's limit; one more is there while a route changes (`apply.move`)."""
    assert max(len(manifests.rules(state)) for state in STATES.values()) < 16


def test_a_predictor_sees_its_package_and_nothing_identified() -> None:
    """The claim holds landing, the catalog and the crosswalk: a predictor that is broken into must not reach them."""
    spec = manifests.inference_service(CHAMPION, PLACE)["spec"]["predictor"]
    [container] = spec["containers"]
    of_project = [mount for mount in container["volumeMounts"] if mount["name"] == "project"]
    assert [(mount["subPath"], mount.get("readOnly", False)) for mount in of_project] == [
        (CHAMPION.package, True),
        ("predictions", False),
    ]
    assert "env:" not in str(spec) and "valueFrom" not in str(spec)
    [secret] = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
    assert {item["key"]: item["path"] for item in secret["items"]} == {"radloop.key": "key", "serve.token": "token"}


def test_the_predictor_itself_understands_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the predictor does not know is a pod that restarts for ever."""
    from radloop.serving.predictor import start

    [container] = manifests.inference_service(CHAMPION, PLACE)["spec"]["predictor"]["containers"]
    told = start._options(container["args"])
    assert (told.host, told.port, told.grpc_port, told.expect_digest) == ("0.0.0.0", 8080, 8081, CHAMPION.model_digest)
    assert [port["containerPort"] for port in container["ports"]] == [told.port, told.grpc_port]


def test_pods_settings_cannot_undo_what_keeps_it_unprivileged() -> None:
    """[kubernetes] pod is for nodes and tolerations."""
    place = msgspec.structs.replace(PLACE, pod={"nodeSelector": {"gpu": "yes"}, "securityContext": {"runAsUser": 0}})
    spec = manifests.inference_service(CHAMPION, place)["spec"]["predictor"]
    assert spec["nodeSelector"] == {"gpu": "yes"}
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001


@pytest.mark.parametrize("package", ["/elsewhere/package", "../other/package"])
def test_a_package_that_pods_cannot_see_is_told_at_once(package: str) -> None:
    """Otherwise the pod waits for its volume until somebody looks."""
    with pytest.raises(ServingError, match="cannot see its package"):
        manifests.inference_service(msgspec.structs.replace(CHAMPION, package=package), PLACE)


def test_a_package_in_the_image_needs_no_claim() -> None:
    """Where a model is baked into the image, there is no volume to wait for."""
    place = msgspec.structs.replace(PLACE, claim="")
    [container] = manifests.inference_service(msgspec.structs.replace(CHAMPION, package="/models/3"), place)["spec"][
        "predictor"
    ]["containers"]
    assert "--package=/models/3" in container["args"]
    assert [m for m in container["volumeMounts"] if m["name"] == "project"] == []


@pytest.mark.parametrize(
    "changed", [{"image": ""}, {"secret": ""}, {"gateway": "edge"}, {"gateway": "/edge"}, {"name": "Radloop"}]
)
def test_what_is_missing_is_named(changed: dict[str, str]) -> None:
    """The cluster would say it later, and less clearly."""
    with pytest.raises(SettingsError):
        msgspec.structs.replace(PLACE, **changed)


def test_without_a_champion_nothing_is_routed() -> None:
    """Promotion and roll-back write the files anew: never to nobody."""
    with pytest.raises(ServingError, match="no champion"):
        manifests.manifests(State(), PLACE)
