"""The `kubernetes` engine without a cluster: what it would send, and what it refuses before anything has run.

The conformance suite runs on a real cluster: tests/cluster.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from radloop.engines import kubernetes
from radloop.engines.kubernetes import Options
from radloop.engines.kubernetes.job import job, job_name, label
from radloop.errors import DefinitionError, EngineError, SettingsError, UnsupportedByEngine
from radloop.pipeline import Builder, Node, Pipeline
from radloop.stage.protocol import Request
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import only, small

OPTIONS = Options(image="registry/radloop:1", secret="radloop-keys", namespace="imaging")
OWNER = 10001
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a project's folder that belongs to whom the pods shall run as."""
    folder = tmp_path / "home"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, OWNER, OWNER)
    return folder


def manifest(node: Node, home: Path, options: Options = OPTIONS, **changes: Any) -> dict[str, Any]:
    request = Request(
        stage=node.stage, node=node.name, pipeline="suite", run_id="20261126-010203-abcdef", home=str(home)
    )
    request = msgspec.structs.replace(request, **changes)
    return job(node, request, home / "runs" / request.run_id / node.name, options)


def altered(pipeline: Pipeline, **changes: Any) -> Pipeline:
    """The pipeline with its first stage changed."""
    first, *rest = pipeline.nodes
    return msgspec.structs.replace(pipeline, nodes=(msgspec.structs.replace(first, **changes), *rest))


EXPECTED = """
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
  labels: &labels
    app.kubernetes.io/managed-by: radloop
    radloop.dev/pipeline: suite
    radloop.dev/run: 20261126-010203-abcdef
    radloop.dev/stage: whisper
spec:
  backoffLimit: 0
  ttlSecondsAfterFinished: 3600
  template:
    metadata: {{labels: *labels}}
    spec:
      restartPolicy: Never
      activeDeadlineSeconds: 2
      terminationGracePeriodSeconds: 3
      automountServiceAccountToken: false
      enableServiceLinks: false
      shareProcessNamespace: true
      securityContext:
        runAsNonRoot: true
        runAsUser: {uid}
        runAsGroup: {gid}
        seccompProfile: {{type: RuntimeDefault}}
      volumes:
        - {{name: project, hostPath: {{path: {home}, type: Directory}}}}
        - {{name: tmp, emptyDir: {{}}}}
      containers:
        - name: stage
          image: registry/radloop:1
          command:
            - radloop
            - stage
            - radloop.testing.suite_stages:whisper
            - --request
            - {home}/runs/20261126-010203-abcdef/whisper/request.json
            - --result
            - {home}/runs/20261126-010203-abcdef/whisper/result.json
          workingDir: {home}
          env:
            - {{name: HOME, value: /tmp}}
            - name: RADLOOP_SUITE_SECRET
              valueFrom: {{secretKeyRef: {{name: radloop-keys, key: RADLOOP_SUITE_SECRET}}}}
          resources:
            requests: &resources {{cpu: "2", memory: 4Gi}}
            limits: *resources
          securityContext:
            readOnlyRootFilesystem: true
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
          volumeMounts:
            - {{name: project, mountPath: {home}}}
            - {{name: tmp, mountPath: /tmp}}
"""


def test_the_whole_job(home: Path) -> None:
    """Who reviews what runs in a hospital's cluster reads this: no root, no privilege, no writable root, no secret's value."""
    node = msgspec.structs.replace(only(s.whisper).nodes[0], timeout_s=1.5, resources={"cpu": "2", "memory": "4Gi"})
    made = manifest(node, home)
    owner = home.stat()
    name = made["metadata"]["name"]
    text = EXPECTED.format(name=name, home=home, uid=owner.st_uid, gid=owner.st_gid)
    assert made == yaml.safe_load(text)


def test_a_claim_takes_the_place_of_the_nodes_folder(home: Path) -> None:
    """On more than one node a folder of the node's own is not the project's."""
    made = manifest(only(s.numbers).nodes[0], home, Options(image="i", claim="project"))
    volumes = made["spec"]["template"]["spec"]["volumes"]
    assert volumes[0] == {"name": "project", "persistentVolumeClaim": {"claimName": "project"}}
    moved = manifest(only(s.numbers).nodes[0], home, Options(image="i", host_path="/srv/project"))
    assert moved["spec"]["template"]["spec"]["volumes"][0]["hostPath"]["path"] == "/srv/project"


def test_additions_never_weaken_a_pod(home: Path) -> None:
    """Tolerations for the GPU nodes must not bring root back in."""
    extra = {"tolerations": [{"operator": "Exists"}], "securityContext": {"runAsUser": 0}, "restartPolicy": "Always"}
    spec = manifest(only(s.numbers).nodes[0], home, Options(image="i", pod=extra))["spec"]["template"]["spec"]
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["restartPolicy"] == "Never"


@pytest.mark.parametrize("node", ["Prüfe_Maße (2)", "x" * 90, "肺", "-a-"])
def test_names_are_what_kubernetes_takes(home: Path, node: str) -> None:
    """A stage's name is the user's; a Job whose name the API refuses would never start."""
    made = manifest(msgspec.structs.replace(only(s.numbers).nodes[0], name=node), home)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,55}[a-z0-9])?", made["metadata"]["name"])  # its pods add six characters
    for value in made["metadata"]["labels"].values():
        assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", value)
        assert len(value) <= 63
    assert label("_.run-1.") == "run-1"


def test_each_try_has_a_name_of_its_own_and_always_the_same(home: Path) -> None:
    """Two items' Jobs under one name would be one Job; a resumed try under another name would run beside the first."""
    request = Request(stage="m:f", node="piece", run_id="r1", pipeline="suite", home=str(home))
    folders = [home / "runs/r1/piece" / number for number in ("0000", "0001")]
    tries = [msgspec.structs.replace(request, attempt=number) for number in (1, 2)]
    names = [job_name(folder, request) for folder in folders for request in tries]
    assert len(set(names)) == 4
    assert names == [job_name(folder, request) for folder in folders for request in tries]


def test_a_missing_image_is_told_before_anything_runs(home: Path) -> None:
    """Half a pipeline run, and then no image for its validation, is an hour lost."""
    with pytest.raises(SettingsError, match=r"\[kubernetes\] image ="):
        kubernetes.run(small(), home=home, options=Options())
    pipeline = altered(small(), environment="tfdv")
    with pytest.raises(SettingsError, match=r"\[kubernetes\] images\.tfdv ="):
        kubernetes.run(pipeline, home=home, options=OPTIONS)
    assert not (home / "runs").exists()
    made = manifest(pipeline.nodes[0], home, Options(image="core", images={"tfdv": "registry/tfdv:2"}))
    assert made["spec"]["template"]["spec"]["containers"][0]["image"] == "registry/tfdv:2"


def test_secrets_need_a_secret(home: Path) -> None:
    """A stage without its key fails in the pod; here it says which command makes it."""
    with pytest.raises(SettingsError, match="kubectl -n default create secret"):
        kubernetes.run(only(s.whisper), home=home, options=Options(image="i"))


def test_a_secret_outside_the_project_is_unsupported(home: Path) -> None:
    """A pod sees the project's folder and nothing else of this machine."""
    for path in ("/run/secrets/key", "../key"):
        with pytest.raises(UnsupportedByEngine, match="secret outside the project's folder"):
            kubernetes.run(only(s.whisper, key=f"file:{path}"), home=home, options=OPTIONS)
    made = manifest(only(s.whisper, key="file:suite.key").nodes[0], home)
    assert [entry["name"] for entry in made["spec"]["template"]["spec"]["containers"][0]["env"]] == ["HOME"]


def test_an_input_outside_the_project_is_refused(home: Path, tmp_path: Path) -> None:
    """It would be looked for in a pod that has no such folder."""
    b = Builder("suite")
    b.add(s.total, given=b.input("given", s.Numbers))
    with pytest.raises(DefinitionError, match="'given' lies outside the project"):
        kubernetes.run(b.build(), home=home, inputs={"given": tmp_path / "elsewhere"}, options=OPTIONS)


@as_root
def test_stages_never_run_as_root(tmp_path: Path) -> None:
    """A project of root's would need pods that run as root."""
    with pytest.raises(SettingsError, match="chown -R 10001"):
        kubernetes.run(small(), home=tmp_path / "new", options=OPTIONS)


def test_without_the_client(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not installed the extra learns its name, not that of a module."""
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(SettingsError, match=r"pip install \"radloop\[kubernetes\]\""):
        kubernetes.run(small(), home=home, options=OPTIONS)


def test_without_a_cluster(home: Path, tmp_path: Path, free_port: int) -> None:
    """'Connection refused' with a traceback of five modules tells nobody which of two clusters is down."""
    missing = Options(image="i", kubeconfig=str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="no cluster's configuration was found"):
        kubernetes.run(small(), home=home, options=missing)
    address = f"http://127.0.0.1:{free_port}"
    config = kubeconfig(tmp_path / "kubeconfig", address)
    with pytest.raises(EngineError, match=f"Kubernetes API at {address} does not answer") as told:
        kubernetes.run(small(), home=home, options=Options(image="i", kubeconfig=str(config)))
    assert "next: kubectl cluster-info" in str(told.value)
    assert not (home / "runs").exists()


def kubeconfig(path: Path, address: str) -> Path:
    """Write how to reach a cluster at an address, without any credential."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path
