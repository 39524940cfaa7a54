"""`radloop deidentify`: what goes out, what does not, and that nothing stops it half-way for good."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from radloop.catalog.reason import Reason
from radloop.cli.app import run_app
from radloop.testing.burned import burn

from .conftest import NAME, Ran, write_dicom

Run = Callable[..., Ran]
CANARIES = ("ZORBAXX", "QUENTIN", "MRN-", "0012", "SCHNACKEL", "1.2.3.", "19510707")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return the command as someone runs it who has no project; their settings are in tmp_path/config."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments: str | Path) -> Ran:
        capsysbinary.readouterr()
        words = [*map(str, arguments)]
        off = [] if "--pixels" in words else ["--pixels", "off"]  # recognition takes its time, and has its own tests
        code = run_app(["deidentify", *words, *off])
        said = capsysbinary.readouterr()
        return Ran(code, said.out.decode(), said.err.decode())

    return run


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Return three studies of two patients under names and in folders that tell who they are."""
    folder = tmp_path / "export"
    for number, patient in ((1, "MRN-1"), (2, "MRN-2"), (3, "MRN-2")):
        for instance in (1, 2):
            path = folder / f"SCHNACKEL_{patient}/{NAME}-{number}.{instance}"
            ds = pydicom.dcmread(write_dicom(path, study=number, instance=instance, patient=patient))
            ds.PatientBirthDate, ds.StudyDate, ds.OperatorsName = "19510707", "20210304", "SCHNACKEL^DR"
            item = Dataset()
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "77", "99HOSPITAL", "SCHNACKEL PROTOCOL"
            ds.ProcedureCodeSequence = [item]
            ds.save_as(path)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file of the output but the state, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != ".radloop"
    }


def test_a_folder_in_a_folder_of_pseudonyms_out(alone: Run, export: Path, tmp_path: Path) -> None:
    """The one thing that people use this command for."""
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    ran = alone(export, tmp_path / "out", "--workers", "1")
    assert ran.code == 0, ran.err
    assert "6 files: 6 cleaned" in ran.out and "Of 2 patients, 3 studies, 3 series" in ran.out
    made = outputs(tmp_path / "out")
    assert len(made) == 6
    for name, data in made.items():
        ds = pydicom.dcmread(tmp_path / "out" / name)
        place = (ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID, f"{ds.SOPInstanceUID}.dcm")
        assert name == "/".join(place)
        assert ds.PatientIdentityRemoved == "YES" and len(ds.PixelData) == 2048
        assert not any(canary.encode() in data for canary in CANARIES)
    assert {path: path.read_bytes() for path in export.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (tmp_path / "out/.radloop").iterdir()) == ["journal.jsonl", "lock"]


def test_the_key_is_made_once_for_its_owner_alone_and_makes_the_same_pseudonyms(
    alone: Run, export: Path, tmp_path: Path
) -> None:
    """Next year's images must join this year's; under another key they must not."""
    first = alone(export, tmp_path / "a")
    key = tmp_path / "config/radloop/deidentify.key"
    assert str(key) in first.err and key.stat().st_mode & 0o777 == 0o600
    assert str(key) not in alone(export, tmp_path / "b").err
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    assert alone(export, tmp_path / "c", "--key", tmp_path / "other.key").code == 0
    assert not set(outputs(tmp_path / "c")) & set(outputs(tmp_path / "a"))
    key.chmod(0o644)
    assert "chmod 600" in alone(export, tmp_path / "d").err
    (tmp_path / "other.key").write_text("no key")
    refused = alone(export, tmp_path / "d", "--key", tmp_path / "other.key")
    assert refused.code == 1 and "that file is no key" in refused.err
    assert not (tmp_path / "d").exists()


def test_processes_and_one_process_write_the_same_bytes(alone: Run, export: Path, tmp_path: Path) -> None:
    """A result that depends on the number of cores could not be reproduced."""
    assert alone(export, tmp_path / "a", "--workers", "1").code == 0
    assert alone(export, tmp_path / "b", "--workers", "2").code == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_no_name_in_report_output_journal_or_paths(alone: Run, export: Path, tmp_path: Path) -> None:
    """The report is what goes to the ethics board and into e-mail."""
    (export / f"{NAME}.txt").write_text(f"exported for {NAME}")
    bad = pydicom.dcmread(write_dicom(export / f"{NAME}.leak", study=8, patient="MRN-8"))
    bad.SequenceName = "ZORBAXX QUENTIN"  # a kept attribute that holds the name: the gate's business
    bad.save_as(export / f"{NAME}.leak")
    html, data, listed = (tmp_path / name for name in ("r.html", "r.json", "refused.txt"))
    ran = alone(export, tmp_path / "out", "--report", html, "--refused", listed)
    assert ran.code == 3
    again = alone(export, tmp_path / "out", "--report", data, "--json")
    said = [ran.out, ran.err, again.out, again.err, html.read_text(), data.read_text()]
    said += [path.read_text(errors="replace") for path in (tmp_path / "out/.radloop").iterdir()]
    said += [str(path) for path in (tmp_path / "out").rglob("*")]
    for canary in CANARIES:
        assert not any(canary in text for text in said), canary
    told = json.loads(data.read_text())
    assert {(row["reason"], row["files"]) for row in told["refused"]} == {("NOT_DICOM", 1), ("PHI_FOUND", 1)}
    assert "SequenceName" in html.read_text()
    assert listed.stat().st_mode & 0o777 == 0o600
    assert sorted(listed.read_text().splitlines()) == [f"NOT_DICOM\t{NAME}.txt", f"PHI_FOUND\t{NAME}.leak"]


def test_the_report_counts_what_was_done_to_each_attribute(alone: Run, export: Path, tmp_path: Path) -> None:
    """A report that does not add up is evidence of nothing."""
    ran = alone(export, tmp_path / "out", "--json", "--option", "113109")
    told = ran.json
    actions = {row["path"]: row["actions"] for row in told["attributes"]}
    assert actions["StudyDate"] == {"SHIFT": 6}
    assert actions["OperatorsName"] == {"REMOVE": 6}
    assert actions["ProcedureCodeSequence.CodeMeaning"] == {"REMOVE": 6}
    assert [code["value"] for code in told["codes"]] == ["113100", "113107", "113108", "113109"]
    assert told["files"] == {"all": 6, "cleaned": 6, "kept": 0, "same": 0, "refused": 0, "dicomdir": 0}
    assert told["temporal"] == "MODIFIED" and "PS3.15" in told["table"]
    later = alone(export, tmp_path / "out", "--json", "--option", "retain-device-identity").json
    assert later["files"]["kept"] == 6 and later["attributes"] == told["attributes"]


def test_every_reason_of_a_refusal_is_a_reason_of_the_quarantine() -> None:
    """UNREADABLE and FAILED are this command's own: all others mean what `radloop quarantine` says."""
    assert not {"UNREADABLE", "FAILED"} & set(Reason)


def test_a_dry_run_tells_the_same_and_writes_nothing(alone: Run, export: Path, tmp_path: Path) -> None:
    """Whoever looks first must see what would happen, and find nothing changed."""
    before = sorted(tmp_path.rglob("*"))
    dry = alone(export, tmp_path / "out", "--dry-run", "--json").json
    assert sorted(tmp_path.rglob("*")) == before
    real = alone(export, tmp_path / "out", "--json").json
    assert (dry.pop("dry_run"), real.pop("dry_run")) == (True, False)
    for told in (dry, real):
        del told["generated_at"], told["key_id"]
    assert dry == real


def test_duplicates_are_counted_and_a_conflict_overwrites_nothing(alone: Run, export: Path, tmp_path: Path) -> None:
    """Two images under one UID: which is the patient's? Neither may silently replace the other."""
    first = sorted(path for path in export.rglob("*") if path.is_file())[0]
    shutil.copy(first, export / "z-copy")
    other = pydicom.dcmread(first)
    other.PixelData = bytes(2048)
    other.save_as(export / "z-other-pixels")
    assert alone(export, tmp_path / "out").code == 3
    told = alone(export, tmp_path / "out", "--json").json
    assert told["files"] == {"all": 8, "cleaned": 0, "kept": 6, "same": 1, "refused": 1, "dicomdir": 0}
    assert told["refused"][0]["reason"] == "UID_CONFLICT" and told["refused"][0]["places"] == [8]
    assert all(any(pydicom.dcmread(tmp_path / "out" / name).PixelData) for name in outputs(tmp_path / "out"))


def test_an_unreadable_file_and_a_dicomdir(alone: Run, export: Path, tmp_path: Path) -> None:
    """A dead link or a bad sector costs one file; a DICOMDIR lists the original file names."""
    (export / "dead").symlink_to(tmp_path / "nowhere")
    (export / "DICOMDIR").write_bytes(b"\0" * 200)
    told = alone(export, tmp_path / "out", "--json").json
    assert told["files"]["cleaned"] == 6 and told["files"]["dicomdir"] == 1
    assert [(row["reason"], row["places"]) for row in told["refused"]] == [("UNREADABLE", [8])]
    (tmp_path / "nowhere").write_bytes(write_dicom(tmp_path / "more", study=9, patient="MRN-9").read_bytes())
    assert alone(export, tmp_path / "out", "--json").json["files"]["cleaned"] == 1  # mended, so looked at again


def test_a_corrected_source_replaces_its_output(alone: Run, export: Path, tmp_path: Path) -> None:
    """A study exported again with a mended image must not leave the old one in the data set."""
    assert alone(export, tmp_path / "out").code == 0
    first = sorted(path for path in export.rglob("*") if path.is_file())[0]
    ds = pydicom.dcmread(first)
    ds.PixelData = np.full((32, 32), 7, np.uint16).tobytes()
    ds.save_as(first)
    told = alone(export, tmp_path / "out", "--json").json
    assert told["files"]["cleaned"] == 1 and told["files"]["kept"] == 5
    written = [pydicom.dcmread(tmp_path / "out" / name).PixelData for name in outputs(tmp_path / "out")]
    assert len(written) == 6 and written.count(ds.PixelData) == 1


def test_an_output_that_was_changed_is_made_again(alone: Run, export: Path, tmp_path: Path) -> None:
    """After a power cut a file may be empty: by its digest it is found, and made again."""
    assert alone(export, tmp_path / "out").code == 0
    made = outputs(tmp_path / "out")
    (tmp_path / "out" / next(iter(made))).write_bytes(b"")
    assert alone(export, tmp_path / "out", "--json").json["files"]["cleaned"] == 1
    assert outputs(tmp_path / "out") == made


@pytest.mark.parametrize(
    "place, extra, said",
    [
        ("out", ("--profile", "basic"), "another key, profile, option"),
        ("out", ("--site", "site-b"), "another key, profile, option"),
        ("export/inner", (), "the output must lie outside the input"),
        (".", (), "the output must lie outside the input"),
        ("foreign", (), "neither new nor empty"),
        ("busy", (), "another run is writing there"),
        ("out", ("--option", "retain-everything"), "unknown de-identification option"),
        ("out", ("--option", "retain-full-dates"), "dates cannot stay and be moved"),
        ("out", ("--report", "r.pdf"), r"a report is .html or .json"),
        ("out", ("--site", "Dr. Schnackel"), "is no site code"),
    ],
)
def test_what_would_mix_or_overwrite_is_refused(
    alone: Run, export: Path, tmp_path: Path, place: str, extra: tuple[str, ...], said: str
) -> None:
    """One folder must not hold two ways of de-identification, nor lose what somebody else put there."""
    assert alone(export, tmp_path / "out").code == 0
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("mine")
    (tmp_path / "busy/.radloop").mkdir(parents=True)
    made = outputs(tmp_path / "out")
    with (tmp_path / "busy/.radloop/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = alone(export, tmp_path / place, *extra)
    assert ran.code == 1 and said in ran.err
    assert outputs(tmp_path / "out") == made
    assert (tmp_path / "foreign/thesis.txt").read_text() == "mine"


def test_nothing_to_do_is_an_error(alone: Run, tmp_path: Path) -> None:
    """A mistyped path that reads as "all clean" would be the worst answer."""
    (tmp_path / "empty").mkdir()
    assert alone(tmp_path / "empty", tmp_path / "out").code == 1
    assert alone(tmp_path / "nowhere", tmp_path / "out").code == 1
    assert alone(tmp_path / "empty").code == 2
    assert not (tmp_path / "out").exists()


def test_a_patient_whose_id_is_a_number_of_a_file(alone: Run, tmp_path: Path) -> None:
    """Short numeric ids are common; the gate must not take the tool's own counting for one."""
    for number in range(1, 13):
        write_dicom(tmp_path / "in" / f"{number:02d}", study=number, patient=str(number))
    write_dicom(tmp_path / "in/13", study=13, patient="i.dcm")
    assert alone(tmp_path / "in", tmp_path / "out", "--json").json["files"]["cleaned"] >= 12


def test_one_file(alone: Run, export: Path, tmp_path: Path) -> None:
    """Somebody has one image to send."""
    first = sorted(path for path in export.rglob("*") if path.is_file())[0]
    assert alone(first, tmp_path / "out").code == 0
    assert len(outputs(tmp_path / "out")) == 1


def test_text_in_the_pixels_is_removed_or_the_image_refused(alone: Run, tmp_path: Path) -> None:
    """A name burned into a radiograph survives any cleaning of headers."""
    path = write_dicom(tmp_path / "in/1", study=1)
    ds = pydicom.dcmread(path)
    image = np.full((240, 480), 300, np.uint16)
    burn(image, "SCHNACKEL MARTHA 07.07.1951", at=(20, 20), size_px=24, value=4000)
    ds.Rows, ds.Columns, ds.PixelData = 240, 480, image.tobytes()
    ds.save_as(path)
    ran = alone(tmp_path / "in", tmp_path / "out", "--pixels", "clean", "--json")
    assert ran.code == 0, ran.err
    (row,) = ran.json["pixels"]
    assert row["decision"].endswith("text removed") and row["files"] == 1
    (name,) = outputs(tmp_path / "out")
    out = pydicom.dcmread(tmp_path / "out" / name)
    assert out.BurnedInAnnotation == "NO" and out.pixel_array.max() < 4000
    assert "113101" in [item.CodeValue for item in out.DeidentificationMethodCodeSequence]
    assert "looked at for text: rule" in alone("--explain", path, "--pixels", "clean").out
    refused = alone(tmp_path / "in", tmp_path / "out2", "--pixels", "refuse", "--json")
    assert refused.code == 3 and refused.json["refused"][0]["reason"] == "BURNED_IN_TEXT"
    assert outputs(tmp_path / "out2") == {}
    off = alone(tmp_path / "in", tmp_path / "out3", "--json").json
    assert "Look for text in the pixels of 1 file, or of a sample: radloop did not." in off["left"]


def test_with_a_project_it_uses_its_key(alone: Run, export: Path, tmp_path: Path, project: Path) -> None:
    """Images cleaned beside the loop must join those in its archive."""
    told = alone(export, tmp_path / "out", "--project", project, "--json").json
    from radloop.stages.project import pseudonymiser

    assert told["key_id"] == pseudonymiser(project, "file:radloop.key").key_id
    assert not (tmp_path / "config").exists()
    mistyped = alone(export, tmp_path / "out2", "--project", tmp_path / "no-project")
    assert mistyped.code == 1 and "there is no radloop.toml here" in mistyped.err


def test_explain_says_what_and_why_without_values(alone: Run, export: Path) -> None:
    """Before anyone trusts a tool with their patients they ask what it does to one file."""
    first = sorted(path for path in export.rglob("*") if path.is_file())[0]
    ran = alone("--explain", first)
    assert ran.code == 0
    assert "REMOVE       PN  OperatorsName  (Table E.1-1: X/Z/D; Type 3)" in ran.out
    assert "SHIFT        DA  StudyDate  (Table E.1-1: Z; option 113107 says C)" in ran.out
    assert "REMOVE       LO  ProcedureCodeSequence[1].CodeMeaning" in ran.out
    assert "STAMP        PN  PatientName  (the pseudonym)" in ran.out
    assert "ADDED" in ran.out and "PatientIdentityRemoved" in ran.out
    assert not any(canary in ran.out + ran.err for canary in CANARIES)
    rows = {row["path"]: row for row in alone("--explain", first, "--json", "--profile", "basic").json}
    assert rows["StudyDate"]["action"] == "EMPTY" and "before" not in rows["StudyDate"]
    shown = {row["path"]: row for row in alone("--explain", first, "--json", "--show-values").json}
    assert shown["PatientName"]["before"] == NAME and shown["PatientName"]["after"].startswith("P")


def test_explain_reads_what_it_can(alone: Run, export: Path, tmp_path: Path) -> None:
    """Who asks why a broken file was cleaned as it was must get an answer, not a traceback that may quote it."""
    first, broken = sorted(path for path in export.rglob("*") if path.is_file())[0], tmp_path / "broken.dcm"
    data = first.read_bytes()
    broken.write_bytes(data.replace(b"\x08\x00\x70\x10PN", b"\x08\x00\x70\x10QC"))  # no VR
    rows = {row["path"]: row for row in alone("--explain", broken, "--json", "--show-values").json}
    assert (rows["OperatorsName"]["before"], rows["OperatorsName"]["action"]) == ("unreadable", "REMOVE")
    assert rows["Modality"]["before"] == rows["Modality"]["after"] != ""


def test_explain_and_the_report_agree(alone: Run, export: Path, tmp_path: Path) -> None:
    """Two tellings of one thing that differ would both be worth nothing."""
    first = sorted(path for path in export.rglob("*") if path.is_file())[0]
    rows = alone("--explain", first, "--json").json
    told = alone(first, tmp_path / "out", "--json").json
    counted = {row["path"]: set(row["actions"]) for row in told["attributes"]}
    for row in rows:
        path = row["path"].replace("[1]", "")
        if row["action"] not in ("ADDED", "STAMP") and not row["path"].startswith("("):
            assert row["action"] in counted[path], row


# --- kills, full disks ------------------------------------------------------------------------------------------------


def many(folder: Path, count: int) -> Path:
    for number in range(count):
        write_dicom(folder / f"{number:04d}", study=number // 10 + 1, instance=number, patient=f"MRN-{number // 20}")
    return folder


def start(source: Path, target: Path, key: Path, *more: str) -> subprocess.Popen[str]:
    words = ["deidentify", str(source), str(target), "--key", str(key), "--pixels", "off", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "radloop.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out) if "--json" in process.args else None


def children(pid: int) -> set[int]:
    return {int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()}


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_leaves_no_half_file_and_goes_on(tmp_path: Path, workers: int) -> None:
    """A night's run that a reboot ended must neither start anew nor leave a cut image among the good ones."""
    source, key = many(tmp_path / "in", 120), tmp_path / "k.key"
    with start(source, tmp_path / "out", key, "--workers", str(workers)) as process:
        try:
            wait_for(lambda: len(list((tmp_path / "out").glob("P*/*/*/*.dcm"))) > 20)
            others = children(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
    for other in others:
        wait_for(lambda other=other: gone(other))
    left = outputs(tmp_path / "out")
    assert 20 < len(left) < 120
    for name in left:
        assert name.endswith(".dcm") and len(pydicom.dcmread(tmp_path / "out" / name).PixelData) == 2048
    again = ended(start(source, tmp_path / "out", key, "--workers", str(workers), "--json"))
    assert again["files"]["kept"] > 0 and again["files"]["kept"] + again["files"]["cleaned"] == 120
    whole = ended(start(source, tmp_path / "whole", key, "--json"))
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "out")
    assert whole["attributes"] == again["attributes"]


@pytest.mark.torture
def test_killed_at_a_hundred_moments(tmp_path: Path) -> None:
    """Power cuts choose their moment: between a rename and its note, in the middle of a line, before the first file."""
    source, key, moments = many(tmp_path / "in", 240), tmp_path / "k.key", random.Random(20)
    ended(start(source, tmp_path / "whole", key))
    whole = outputs(tmp_path / "whole")
    kills = finished = 0
    while kills < 100:
        out = tmp_path / f"out{finished}"
        with start(source, out, key, "--workers", str(moments.choice((1, 2)))) as process:
            wait_for(lambda out=out, process=process: (out / ".radloop/work").exists() or process.poll() is not None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, 1.5))
            process.kill()
        made = outputs(out)
        assert all(whole[name] == data for name, data in made.items())
        if process.returncode == 0:
            assert made == whole
            finished += 1
        else:
            kills += 1
    ended(start(source, out, key))
    assert outputs(out) == whole


def test_a_worker_that_dies_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    """The kernel kills what takes too much memory: that must read as such, and lose nothing."""
    source, key = many(tmp_path / "in", 120), tmp_path / "k.key"
    process = start(source, tmp_path / "out", key, "--workers", "2")
    wait_for(lambda: len(list((tmp_path / "out").glob("P*/*/*/*.dcm"))) > 20)
    workers = [c for c in children(process.pid) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "a worker process died" in err
    told = ended(start(source, tmp_path / "out", key, "--json"))["files"]
    assert told["kept"] > 0 and told["kept"] + told["cleaned"] == 120


def test_a_journal_that_was_cut_is_read_up_to_there(alone: Run, export: Path, tmp_path: Path) -> None:
    """The last line may be half a line after a power cut."""
    assert alone(export, tmp_path / "out", "--workers", "1").code == 0
    journal = tmp_path / "out/.radloop/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    told = alone(export, tmp_path / "out", "--json").json["files"]
    assert (told["kept"], told["cleaned"]) == (5, 1)
    assert alone(export, tmp_path / "out", "--json").json["files"]["kept"] == 6
    journal.write_bytes(journal.read_bytes().replace(b'"line"', b'"lyne"', 2))
    assert "the target's journal is damaged" in alone(export, tmp_path / "out").err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 400 KB, where this user may mount one."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k,mode=0700", "tmpfs", str(where)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_is_said_and_room_makes_it_go_on(alone: Run, tmp_path: Path, small_disk: Path) -> None:
    """Half a data set that looks whole is the danger; the error says how far it came."""
    source = many(tmp_path / "in", 150)
    ran = alone(source, small_disk / "out")
    assert ran.code == 1
    assert "no space is left" in ran.err and "files are done" in ran.err and "run the same command again" in ran.err
    made = outputs(small_disk / "out")
    assert 10 < len(made) < 150
    for name in made:
        assert len(pydicom.dcmread(small_disk / "out" / name).PixelData) == 2048
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    told = alone(source, small_disk / "out", "--json").json["files"]
    assert told["kept"] > 10 and told["kept"] + told["cleaned"] == 150


@pytest.mark.data
def test_real_images_of_a_public_data_set(alone: Run, test_data: Path, tmp_path: Path) -> None:
    """Real headers hold what no test invents: each file comes out clean, or is refused by name of a reason."""
    source = test_data / "deid_data"
    html = tmp_path / "r.html"
    ran = alone(source, tmp_path / "out", "--report", html, "--json")
    told = ran.json
    assert told["files"]["all"] == 8 and told["files"]["cleaned"] + told["files"]["refused"] == 8
    assert told["files"]["cleaned"] >= 1
    said = html.read_text() + ran.out + "".join(str(path) for path in (tmp_path / "out").rglob("*"))
    for name in ("SIMPSON", "HOMER", "HIBBARD", "SPRINGFIELD", "999887722", "ctbrain"):
        assert name.casefold() not in said.casefold()
    for name in outputs(tmp_path / "out"):
        with contextlib.suppress(AttributeError):
            assert pydicom.dcmread(tmp_path / "out" / name).PatientIdentityRemoved == "YES"
