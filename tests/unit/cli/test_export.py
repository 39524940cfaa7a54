"""What leaves radloop as a file: schemas, pipelines, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from radloop.loop import PIPELINES
from radloop.pipeline import read_pipeline, schema
from radloop.settings import Settings, load

from .conftest import Ran

Run = Callable[..., Ran]
SCHEMAS = Path(__file__).resolve().parents[3] / "docs/schemas"


@pytest.mark.parametrize("name", ["pipeline", "request", "result", "event"])
def test_the_published_schema_is_the_codes(inside: Run, name: str) -> None:
    """Whoever writes an engine reads the schema, not our code."""
    ran = inside("schema", name)
    assert ran.code == 0
    published = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert ran.json == published == json.loads(json.dumps(schema(name)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PIPELINES)
def test_an_exported_pipeline_is_read_back(inside: Run, project: Path, name: str) -> None:
    """What an engine is given must be what would run here, without a secret in it."""
    (project / "radloop.toml").write_text("[split]\ntrain = 0.5\nvalidation = 0.25\n")
    ran = inside("export", "json", name)
    assert read_pipeline(ran.out.encode()) == PIPELINES[name](load(project))
    if name == "prepare":
        assert read_pipeline(ran.out.encode()) != PIPELINES[name](Settings())
    assert (project / "radloop.key").read_text().strip() not in ran.out


def test_a_pipeline_that_is_not_there(inside: Run) -> None:
    """A typo in a deployment script must not write an empty file and succeed."""
    ran = inside("export", "json", "deploy")
    assert ran.code == 1
    assert "prepare, develop, release, watch" in ran.err
    assert ran.out == ""


def test_report_of_a_new_project(inside: Run, project: Path) -> None:
    """The first report must say what is not there yet, not fail for it."""
    ran = inside("report", "--json")
    assert ran.code == 0, ran.err
    page = Path(ran.json["report"])
    assert page == project / "reports/report.html"
    assert "<html" in page.read_text()


KUBERNETES = """
[release]
clinical_canary = {canary}
[serve]
token = "file:serve.token"
[kubernetes]
image = "registry.example/radloop:1"
secret = "radloop"
claim = "project"
namespace = "imaging"
"""


def registered(project: Path, *, promoted: str, canary: str = "true") -> None:
    """Versions 1 and 2 as `radloop run develop` registers them; one of them was promoted."""
    from radloop.stages.project import open_catalog

    (project / "radloop.toml").write_text(KUBERNETES.format(canary=canary))
    with open_catalog(project) as catalog:
        catalog.add_dataset("d" * 64, path="datasets/d.parquet", members=[], actor="publish")
        for version in ("1", "2"):
            catalog.add_model(
                version * 64, dataset_digest="d" * 64, preprocessing_digest="p" * 64, version=version,
                info={"package": f"artifacts/{version}/package", "package_digest": version * 63 + "f"},
            )  # fmt: skip
        payload = {"step": "promoted", "version": promoted}
        catalog.ledger.append("release", promoted * 64, payload, actor="release")


KSERVE = ("--gateway", "infra/edge", "--champion", "1")


@pytest.mark.parametrize("mesh", ["gateway", "istio"])
def test_a_release_on_kubernetes_as_files(inside: Run, project: Path, mesh: str) -> None:
    """A site that keeps its cluster in git reviews these files: they hold references, and no secret."""
    registered(project, promoted="1")
    (project / "serve.token").write_text("a-token-of-some-length")
    ran = inside("export", "kserve", str(project / "k8s"), *KSERVE, "--challenger", "2", "--mesh", mesh, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["strategy"], ran.json["percent"], ran.json["applied"]) == ("shadow", 0, False)
    told = [Path(file) for file in ran.json["files"]]
    assert [path.name for path in told] == ["predictors.yaml", "routes.yaml"]
    written = "".join(path.read_text() for path in told)
    assert written.count("kind: InferenceService") == 2
    assert "secretName: radloop" in written and "key: radloop.key" in written and "key: serve.token" in written
    assert (project / "radloop.key").read_text().strip() not in written
    assert "a-token-of-some-length" not in written


def test_what_the_cluster_is_told_by_the_settings(inside: Run, project: Path) -> None:
    """A site says once where its Gateway is; an address in `url` is no name that a route could be for."""
    import yaml

    told = (
        '[serve.kserve]\ngateway = "infra/edge"\nurl = "{url}"\nreplicas = 3\nresources = {{limits = {{cpu = "4"}}}}\n'
    )
    for url, hosts in (("https://radloop.example:8443", ["radloop.example"]), ("http://10.1.2.3", None)):
        registered(project, promoted="1")
        with (project / "radloop.toml").open("a") as file:
            file.write(told.format(url=url))
        ran = inside("export", "kserve", str(project / "k8s"), "--champion", "1", "--strategy", "single")
        assert ran.code == 0, ran.err
        predictor = yaml.safe_load((project / "k8s/predictors.yaml").read_text())["spec"]["predictor"]
        assert predictor["minReplicas"] == 3
        assert predictor["containers"][0]["resources"] == {"limits": {"cpu": "4"}}
        route = yaml.safe_load((project / "k8s/routes.yaml").read_text())["spec"]
        assert route["parentRefs"] == [{"name": "edge", "namespace": "infra"}]
        assert route.get("hostnames") == hosts


def test_serving_on_a_cluster_needs_its_address(inside: Run, project: Path) -> None:
    """`radloop predict` and `radloop answer` would have nobody to ask."""
    (project / "radloop.toml").write_text('[serve.kserve]\ngateway = "infra/edge"\n')
    ran = inside("serve")
    assert ran.code == 1
    assert "[serve.kserve] url" in ran.err


def test_a_canary_on_kubernetes_needs_an_approval_too(inside: Run, project: Path) -> None:
    """Moving to a cluster must not be the way around the person who has to say yes."""
    from radloop.stages.project import open_catalog

    registered(project, promoted="1")
    canary = (
        "export",
        "kserve",
        str(project / "k8s"),
        *KSERVE,
        "--challenger",
        "2",
        "--strategy",
        "canary",
        "--percent",
        "25",
    )
    refused = inside(*canary)
    assert refused.code == 1
    assert "neither promoted nor approved" in refused.err
    assert not (project / "k8s").exists()
    assert inside(*canary, "--champion", "2", "--strategy", "single", "--percent", "0").code == 1
    with open_catalog(project) as catalog:
        catalog.ledger.append("approval", "2" * 63 + "f", {"role": "clinical", "why": "reviewed"}, actor="anna")
    assert inside(*canary).code == 0
    (project / "radloop.toml").write_text(KUBERNETES.format(canary="false"))
    refused = inside(*canary)
    assert refused.code == 1
    assert "clinical_canary" in refused.err


def test_what_a_cluster_is_not_told_yet(inside: Run, project: Path) -> None:
    """The settings that are missing are named here, not by a pod that does not start."""
    registered(project, promoted="1")
    (project / "radloop.toml").write_text('[kubernetes]\nimage = "registry.example/radloop:1"\n')
    ran = inside("export", "kserve", str(project / "k8s"), *KSERVE, "--strategy", "single")
    assert ran.code == 1
    assert "[kubernetes] secret" in ran.err
