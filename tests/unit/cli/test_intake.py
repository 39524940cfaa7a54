"""Images come in: by folder, by C-STORE, from JPEG and PNG."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radloop.cli.intake import landing_at
from radloop.stages.project import open_catalog
from radloop.testing.modality import send

from .conftest import Command, Ran, configure, write_dicom


def test_ingest_takes_what_is_new_and_nothing_twice(
    inside: Callable[..., Ran], dicom_folder: Path, project: Path
) -> None:
    """A nightly export is the same folder grown: what was taken must not be taken again, nor anything refused be lost."""
    first = inside("ingest", str(dicom_folder), "--site", "site-a", "--json")
    assert first.code == 0
    assert first.json["outcomes"] == {"new": 3, "quarantined": 1}
    assert first.json["reasons"] == {"NOT_DICOM": 1}
    write_dicom(dicom_folder / "sub/4.dcm", study=4, patient="MRN-4")
    again = inside("ingest", str(dicom_folder), "--site", "site-a", "--json")
    assert again.json["outcomes"]["new"] == 1
    assert again.json["outcomes"]["same"] == 3
    with open_catalog(project) as catalog:
        assert len(catalog.pending()) == 4
        assert len(catalog.ledger.rows(kind="ingest")) == 2


def test_ingest_says_what_comes_next(inside: Callable[..., Ran], dicom_folder: Path) -> None:
    """A refused file must be seen at once, not when the dataset is too small."""
    ran = inside("ingest", str(dicom_folder), "--site", "site-a")
    assert "4 files: " in ran.out
    assert "In quarantine: 1 NOT_DICOM" in ran.out
    assert "radloop quarantine list" in ran.out


def test_empty_folder(inside: Callable[..., Ran], tmp_path: Path) -> None:
    """A mount that is not there looks like an empty folder: it must not look like a day without studies."""
    (tmp_path / "nothing").mkdir()
    ran = inside("ingest", str(tmp_path / "nothing"), "--site", "site-a")
    assert ran.code == 1
    assert "the input folder is empty" in ran.err
    missing = inside("ingest", str(tmp_path / "not-there"), "--site", "site-a")
    assert missing.code == 1
    assert "is not there" in missing.err


@pytest.mark.parametrize("site", ["", "Klinikum Nord", "a/b", "x" * 65])
def test_a_site_is_a_code(inside: Callable[..., Ran], dicom_folder: Path, site: str) -> None:
    """The site goes into the archive, metrics and the report: an institution's name there tells where patients were."""
    ran = inside("ingest", str(dicom_folder), "--site", site)
    assert ran.code == 1
    assert "no site code" in ran.err
    assert not site or site not in ran.err


def test_listen_receives_and_ends_cleanly(radloop: Command, tmp_path: Path) -> None:
    """A service manager starts it, waits until it is ready, and ends it by SIGTERM: nothing acknowledged may be lost."""
    files = [write_dicom(tmp_path / f"{n}.dcm", study=n, patient=f"MRN-{n}") for n in (1, 2)]
    ready = tmp_path / "listen.json"
    with radloop.running("listen", "--port", "0", ready=ready) as (process, told):
        assert told["pid"] == process.pid
        answered = send(files, told["host"], told["port"], calling_ae="CT1", called_ae="RADLOOP")
        assert answered == {"0000": 2}
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"RADLOOP at 127.0.0.1:{told['port']}" in out
    assert "ended; 2 received, 2 new" in out
    assert not ready.exists(), "who waits for it next must not find a dead port"
    with open_catalog(radloop.project) as catalog:
        assert len(catalog.pending()) == 2
        assert catalog.ledger.rows(kind="ingest")[0].actor == "listen"


def test_listen_json_is_one_document(radloop: Command, tmp_path: Path) -> None:
    """A script parses stdout as a whole."""
    with radloop.running("listen", "--port", "0", "--json", ready=tmp_path / "r.json") as (process, told):
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    ran = Ran(process.returncode, out, "")
    assert ran.code == 0
    assert ran.json["port"] == told["port"]
    assert ran.json["counts"]["received"] == 0


def test_listen_on_a_busy_port(inside: Callable[..., Ran]) -> None:
    """A second listener that seems to run would leave modalities sending into nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = inside("listen", "--port", str(port))
    assert ran.code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ran.err
    assert "next: " in ran.err


def test_listen_without_senders(inside: Callable[..., Ran], project: Path) -> None:
    """A listener that rejects everybody would look like a network problem."""
    configure(project, "")
    ran = inside("listen")
    assert ran.code == 1
    assert "[listen.senders]" in ran.err


def write_png(path: Path, seed: int, *, colour: bool = False) -> None:
    rng = np.random.default_rng(seed)
    shape: Any = (40, 48, 3) if colour else (40, 48)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)


def test_import_images(inside: Callable[..., Ran], tmp_path: Path, project: Path) -> None:
    """Most public data is no DICOM; its images and its patients must come in as the manifest says."""
    for seed in (1, 2):
        write_png(tmp_path / f"images/{seed}.png", seed)
    write_png(tmp_path / "images/colour.png", 3, colour=True)
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,who,sex\n1.png,P1,F\n2.png,P2,M\ncolour.png,P3,M\n")
    command = ["import-images", str(tmp_path / "images"), "--manifest", str(manifest), "--modality", "DX"]
    ran = inside(*command, "--patient", "who", "--file", "path", "--sex", "sex", "--site", "public", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["outcomes"] == {"new": 2, "quarantined": 1}
    assert ran.json["reasons"] == {"MULTI_CHANNEL": 1}
    with open_catalog(project) as catalog:
        rows = catalog.pending()
        assert {row.modality for row in rows} == {"DX"}
        assert len({row.patient for row in rows}) == 2


def test_import_images_with_a_wrong_column(inside: Callable[..., Ran], tmp_path: Path) -> None:
    """A patient column that is not there must stop the import: without it every image would be its own patient."""
    write_png(tmp_path / "images/1.png", 1)
    (tmp_path / "m.csv").write_text("path,who\n1.png,P1\n")
    command = ["import-images", str(tmp_path / "images"), "--manifest", str(tmp_path / "m.csv"), "--modality", "DX"]
    ran = inside(*command, "--patient", "patient_id", "--file", "path")
    assert ran.code == 1
    assert "patient_id" in ran.err
    assert "who" in ran.err


def test_a_run_while_a_study_is_arriving_says_when_it_will_be_complete(
    inside: Callable[..., Ran], project: Path, tmp_path: Path
) -> None:
    """Who sends images and runs `prepare` at once must not read that nothing was received, nor train on half a study."""
    with landing_at(project) as landing:
        landing.receive(write_dicom(tmp_path / "1.dcm"), site="site-a", sender="CT1")
    environment = f'[environments]\ntfdv = "{sys.executable}"\n'
    configure(project, environment)
    ran = inside("run", "prepare")
    assert ran.code == 4
    assert "1 studies (1 images) are still arriving" in ran.out
    assert "nothing of it has come for 60 s ([ingest] quiet_s), the last of these in" in ran.out
    told = inside("status", "--json").json
    assert told["studies"] == {"arriving": 1, "seconds_left": pytest.approx(55, abs=10), "revised": 0}
    assert "1 study is still arriving" in inside("status").out
    configure(project, '[ingest]\nquiet_s = 0\n[accept]\nmodalities = ["MR"]\n' + environment)
    ran = inside("run", "prepare")
    assert ran.code == 1, "a study that is complete is taken, here only to be refused"
    assert "no image passed the quality checks" in ran.out


def test_a_late_instance_is_seen_in_status(inside: Callable[..., Ran], project: Path, tmp_path: Path) -> None:
    """An image that comes after the run must show as a new revision of its study, not vanish."""
    for number in (1, 2):
        with landing_at(project) as landing:
            landing.receive(write_dicom(tmp_path / f"{number}.dcm", instance=number), site="site-a", sender="CT1")
        with open_catalog(project) as catalog:
            [study] = catalog.unreleased()
            catalog.release([study.study_uid], actor="ingest")
    assert inside("status", "--json").json["studies"] == {"arriving": 0, "seconds_left": 0, "revised": 1}
    assert "1 study has a new revision: late instances, or corrected ones" in inside("status").out
