"""The loop's own commands with a cluster beneath: develop here, `radloop serve` and `radloop run release` onto KServe."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from radloop.cli.init import make_project
from radloop.errors import ServingError
from radloop.serving import client, rollout
from radloop.stages.project import open_catalog
from radloop.testing.hospital import make_hospital

from .conftest import OWNER, allow, kubectl, restricted_namespace
from .test_serving import IMAGE, TOML, pytestmark, wait_until

__all__ = ["pytestmark"]
TOKEN = "a-token-of-the-loop"
SETTINGS = """
[task]
name = "opacity"
[[ingest.folders]]
path = "hospital/images"
site = "site-a"
[split]
train = 0.4
validation = 0.3
test = 0.3
[train]
epochs = {epochs}
[evaluate]
minimum_patients = 1
resamples = 50
examples = 2
[gates]
auc_lower = 0.0
ece = 1.0
subgroup_gap = 1.0
shortcut_stop = 1.0
margin = 2.0
[release.judge]
minimum_patients = 30
latency_floor_ms = 5000.0
error_rate = 0.25
slow = 0.25
agreement = 0.0
mean_absolute_difference = 1.0
score_shift = 1.0
accuracy_difference = 1.0
[environments]
tfdv = "{tfdv}"
"""


class Project:
    """A project whose predictions a cluster makes; its commands, as a user types them."""

    def __init__(self, home: Path, namespace: str, kubeconfig: Path, images: list[bytes]) -> None:
        self.home, self._namespace, self._kubeconfig, self.images = home, namespace, kubeconfig, images
        self._address = kubectl("-n", "projectcontour", "get", "service", "envoy", "-o", "jsonpath={.spec.clusterIP}")

    def configure(self, *, epochs: int) -> None:
        """Write radloop.toml."""
        tfdv = Path(sys.prefix).parent / "tfdv" / "bin" / "python"
        cluster = TOML.format(host=self._address, image=IMAGE, namespace=self._namespace, kubeconfig=self._kubeconfig)
        release = "[release]\nclinical_canary = true\n"
        assert release in cluster
        cluster = cluster.replace(release, f"{release}steps = [25, 100]\nwait_s = 120.0\n")
        (self.home / "radloop.toml").write_text(cluster + SETTINGS.format(epochs=epochs, tfdv=tfdv))

    def run(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> int:
        """A command of radloop's."""
        command = [sys.executable, "-m", "radloop.cli", *arguments, "--project", str(self.home)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in codes, done.stdout[-2000:] + done.stderr[-5000:]
        self.said = done.stdout
        return done.returncode

    def run_with_approvals(self, pipeline: str) -> int:
        """Run a pipeline to its end, approving what waits; how often a person was asked."""
        for asked in range(4):
            if self.run("run", pipeline, codes=(0, 4)) == 0:
                return asked
            self.run("status", "--json")
            for one in json.loads(self.said)["waiting"]:
                self.run("approve", one["digest"], "--why", "read the report")
        pytest.fail(f"{pipeline} waits for ever: {self.said}")

    def develop(self) -> None:
        """Train a model; what it wrote belongs to the user of the image, as on a volume that both mount."""
        self.run_with_approvals("develop")
        for path in (self.home, *self.home.rglob("*")):
            os.chown(path, OWNER, OWNER, follow_symlinks=False)

    def predict(self) -> client.Prediction:
        """Ask once."""
        return client.predict_dicom(rollout.gateway_url(self.home), self.images[0], site="site-a", token=TOKEN)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A hospital's project on a cluster, with the Secret, the claim and the role that `radloop serve` needs."""
    home = tmp_path / "home"
    make_project(home)
    make_hospital(home / "hospital", patients=18, images=24, site="A", seed=3)
    clinic = make_hospital(tmp_path / "clinic", patients=60, images=60, site="A", seed=4)
    (home / "serve.token").write_text(TOKEN + "\n")
    (home / "serve.token").chmod(0o600)
    with restricted_namespace(home, tmp_path) as (namespace, kubeconfig):
        kubectl(
            *("-n", namespace, "create", "secret", "generic", "radloop"),
            *(f"--from-file={home}/radloop.key", f"--from-file={home}/serve.token"),
        )
        for role in ("radloop-release", "radloop-serve"):
            allow(namespace, role)
        made = Project(home, namespace, kubeconfig, [one.path.read_bytes() for one in clinic.good])
        made.configure(epochs=1)
        yield made


@contextlib.contextmanager
def serving(project: Project, folder: Path) -> Iterator[None]:
    """`radloop serve`."""
    ready, said = folder / "ready.json", folder / "serve.err"
    command = [sys.executable, "-m", "radloop.cli", "serve", "--ready-file", str(ready), "--project", str(project.home)]
    with said.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None)
            assert process.poll() is None, said.read_text()
            yield
        finally:
            process.terminate()
    assert process.returncode == 0, said.read_text()


@contextlib.contextmanager
def asking(project: Project) -> Iterator[Counter[str]]:
    """A router beside the PACS that asks about every image again and again; versions that answered, and what failed."""
    told, stop = Counter[str](), threading.Event()
    url = rollout.gateway_url(project.home)

    def ask() -> None:
        with httpx.Client(timeout=30) as session:
            while not stop.is_set():
                for file in project.images:
                    try:
                        answer = client.predict_dicom(url, file, site="site-a", token=TOKEN, client=session)
                        told[answer.version] += 1
                    except ServingError as error:
                        told[str(error)] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        thread.join()


@pytest.mark.timeout(1200)
def test_two_models_are_trained_and_released_and_one_taken_back(project: Project, tmp_path: Path) -> None:
    """Whoever moves from one machine to a cluster must find that the same commands end in the same places."""
    labels = project.home / "hospital" / "labels.csv"
    given = ("--key", "accession", "--key-column", "AccessionNumber", "--value-column", "label", "--site", "site-a")
    project.run("labels", "import", str(labels), *given)
    project.run("run", "prepare")
    project.develop()
    with serving(project, tmp_path):
        assert project.run_with_approvals("release") == 1
        assert project.predict().version == "1"
        project.configure(epochs=2)
        project.develop()
        with asking(project) as told:
            assert project.run_with_approvals("release") == 1
        second = project.predict()
        assert second.version == "2"
        print(f"answers during the second release: {dict(told)}")
        assert set(told) == {"1", "2"}
        project.run("rollback", "--why", "a drill")
        wait_until(lambda: project.predict().version == "1")
    project.run("trace", second.id, "--instances", "--json")
    with open_catalog(project.home) as catalog:
        steps = [row.payload["step"] for row in catalog.ledger.rows(kind="release")]
        assert len(catalog.ledger.rows(kind="rollback")) == 1
        learnt = [row.sop_uid for row in catalog.members(catalog.datasets()[0].digest) if row.part == "train"]
    assert learnt and all(uid in project.said for uid in learnt)
    print(steps)
    order = [steps.index(step) for step in ("smoke", "shadow", "canary 25 %", "canary 100 %")]
    assert order == sorted(order) and steps.count("promoted") == 2
