"""The log of a listener and of a server as a collector gets it, with a name planted wherever a client can put one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from radloop.cli.init import make_project
from radloop.serving import rollout
from radloop.serving.desired import ModelRef
from radloop.testing.modality import send

pytestmark = pytest.mark.services


def _helpers(room: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{room}_helpers", Path(__file__).parents[1] / "unit" / room / file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


packages, cli = _helpers("serving", "packages.py"), _helpers("cli", "conftest.py")
NAME = packages.CANARY_NAME


@contextmanager
def _running(project: Path, *command: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """A server of radloop's with its log in a file: what its ready file says, and the log; ended by SIGTERM."""
    ready, log = project.parent / "ready.json", project.parent / "log.jsonl"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "radloop.cli", *command, "--project", str(project), "--ready-file", str(ready)],
            stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"RADLOOP_LOG": "json"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.02)
        yield json.loads(ready.read_text()), log
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _lines(log: Path) -> list[dict[str, Any]]:
    """Every line, each whole JSON."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_served_request_is_one_line_of_each_and_names_nobody(
    tmp_path: Path, require_service: Callable[..., str]
) -> None:
    """If this failed, nobody could find out what became of a request, or everybody could read who the patient was."""
    require_service("Envoy", "envoy")
    project = tmp_path / "project"
    make_project(project)
    (project / "radloop.key").write_text(packages.KEY.hex())
    digest = packages.build(project / "models" / "1")
    with _running(project, "serve", "--port", "0") as (ready, log):
        model = ModelRef(package="models/1", version="1", model_digest=digest)
        rollout.deploy(project, rollout.single(project, model), timeout_s=60)
        infer = f"http://127.0.0.1:{ready['port']}/v2/models/default/infer"
        hostile = dict.fromkeys(("x-request-id", "user-agent", "x-radloop-site", "x-patient"), NAME)
        dicom = {"content-type": "application/dicom"}
        fine = httpx.post(infer, content=packages.dicom(1), headers=hostile | dicom | {"x-radloop-site": "A"})
        assert fine.status_code == 200, fine.text
        for content, path, headers in (
            (packages.dicom(2)[:700], "", hostile | dicom),
            (NAME.encode(), "", hostile | {"content-type": NAME}),
            (packages.dicom(3, modality="CT"), f"?patient={NAME}", dicom | {"x-radloop-site": "A"}),
            (b"{}", f"/{NAME}", {}),
        ):
            assert 400 <= httpx.post(infer + path, content=content, headers=headers).status_code < 500
        time.sleep(0.5)
    lines = _lines(log)
    asked = [line for line in lines if line["process"] == "predictor" and "status" in line]
    [answered] = [line for line in asked if line["status"] == 200]
    assert (answered["model"], answered["version"], answered["model_digest"]) == ("default", "1", digest[:16])
    assert (answered["reason"], answered["images"], answered["level"]) == ("ok", 1, "info")
    assert 0 < answered["duration_ms"] < 60_000
    assert len([line for line in asked if line["level"] == "warning"]) == 3
    at_the_gate = [line for line in lines if line["process"] == "gateway"]
    assert [line["status"] for line in at_the_gate if line["id"] == answered["id"]] == [200]
    assert len(at_the_gate) == 5
    said = " ".join(line.get("message", "") for line in lines if line["process"] == "serve")
    assert "is ready" in said and "champion version 1" in said and "radloop serve: ended" in said
    _names_nobody(log, project / "serving")


def test_a_listener_tells_what_came_and_of_whom_nothing(tmp_path: Path) -> None:
    """If this failed, a hospital's log server would hold its patients' names, or say nothing of images that were refused."""
    project = tmp_path / "project"
    make_project(project)
    (project / "radloop.toml").write_text('[listen]\nport = 0\n[listen.senders]\nCT1 = "site-a"\n')
    files = [cli.write_dicom(tmp_path / f"{n}.dcm", study=n, patient=cli.NAME) for n in (1, 2)]
    torn = tmp_path / "torn.dcm"
    torn.write_bytes(files[0].read_bytes()[:-700])
    with _running(project, "listen") as (ready, log):
        for some in (files, [torn]):
            send(some, "127.0.0.1", ready["port"], calling_ae="CT1", called_ae="RADLOOP")
        until = time.monotonic() + 60
        while log.read_text().count("is over") < 2:  # said a moment after the sender has gone
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
    lines = _lines(log)
    said = " ".join(line.get("message", "") for line in lines)
    assert {line["process"] for line in lines} == {"listen"}
    assert "an association of CT1 is over" in said and "2 new" in said and "radloop listen: ended" in said
    _names_nobody(log)


def _names_nobody(*places: Path) -> None:
    for place in places:
        for path in [place] if place.is_file() else [one for one in place.rglob("*") if one.is_file()]:
            content = path.read_bytes().upper()
            for word in (NAME, packages.CANARY_ID, cli.NAME, "Quokkason", "Zebulon", "ZORBAXX", "MRN-"):
                assert word.upper().encode() not in content, f"{path.name} holds a name"
