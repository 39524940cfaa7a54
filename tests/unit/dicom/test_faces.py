"""The option clean-visual-features with a face cleaner of one's own: a small real one, and ones that fail in each way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    RLELossless,
)

from radloop.catalog.reason import Reason
from radloop.cli.app import run_app
from radloop.cli.init import make_project
from radloop.cli.run import run_one
from radloop.dicom.burned_in import Pixels
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.deidentify.face_cleaner import FaceCleaner
from radloop.dicom.deidentify.faces import clean_series, series_with_faces
from radloop.dicom.profile import chosen
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError, SettingsError
from radloop.settings import load
from radloop.stages.project import open_catalog

from .test_conformance import errors

KEY = bytes(range(32))
CANARIES = ("ZORBAXX", "QUENTIN", "MRN-", "SCHNACKEL", "19510707")
# Removes the anterior quarter of a volume, in whatever orientation it is; `sys.argv[3]` adds what it also does.
DEFACER = '''
import sys
from pathlib import Path
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

given, left, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
files = [pydicom.dcmread(path) for path in sorted(given.iterdir())]
# A tool's log: all that it could have seen of the headers, and how many images it got.
with (Path(__file__).parent / "log").open("a") as log:
    log.write(str(len(files)) + "\\n")
    for ds in files:
        log.write(ds.to_json(bulk_data_element_handler=lambda _: "") + "\\n")


def y_of(ds):
    """Towards posterior, in mm, of each pixel (PS3.3 C.7.6.2.1.1)."""
    row, column = np.split(np.array(ds.ImageOrientationPatient, float), 2)
    down, right = map(float, ds.PixelSpacing)
    y, x = np.mgrid[: ds.Rows, : ds.Columns]
    return float(ds.ImagePositionPatient[1]) + x * right * row[1] + y * down * column[1]


places = [y_of(ds) for ds in files]
front, back = min(y.min() for y in places), max(y.max() for y in places)
for number, (ds, y) in enumerate(zip(files, places)):
    pixels = ds.pixel_array.copy()
    pixels[y < front + (back - front) / 4] = 0
    little = ds.original_encoding[1]
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    if how == "header":
        ds.PatientName, ds.ImageComments = "Zorbaxx^Quentin", "seen by Schnackel"
        ds.RescaleType, ds.BodyPartExamined = "HU", "CHEST"
    if how == "spacing":
        ds.PixelSpacing = [1.5, 1.5]
    if how == "slope":
        ds.RescaleSlope, ds.RescaleIntercept = 2, 0
    if how == "stranger" and number == 1:
        ds.SOPInstanceUID = "1.2.3"
    if how == "smaller":
        ds.Rows = ds.Rows // 2
    if how == "rounded":
        ds.ImagePositionPatient = [round(float(v), 4) + 0.0001 for v in ds.ImagePositionPatient]
    ds.save_as(left / f"out-{number}", enforce_file_format=True)
(left / "qc.txt").write_text("not DICOM")
'''
SHELL = {
    "crash": "echo Zorbaxx Quentin was here >&2; exit 3",
    "signal": "kill -SEGV $$",
    "nothing": 'cp "$1"/* "$2"/',
    "in place": "exit 0",
    "missing": 'cp "$1"/* "$2"/; rm "$2"/00002.dcm',
    "twice": 'cp "$1"/* "$2"/; cp "$1"/00001.dcm "$2"/again',
    "cut": 'cp "$1"/* "$2"/; head -c -1000 "$1"/00001.dcm > "$2"/00001.dcm',
    "links": 'for f in "$1"/*; do ln -s "$f" "$2"/; done',
    "removed": 'rm -r "$1" "$2"',
}


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def defacer(tmp_path: Path) -> Path:
    """A face cleaner; what it saw of the headers is in `log` beside it."""
    (tmp_path / "tool").mkdir()
    return script(tmp_path / "tool/deface", f"#!{sys.executable}{DEFACER}")


def head(number: int, *, series: str = "1", sagittal: bool = False, part: str = "HEAD") -> Dataset:
    """Slice `number` of a head MR 16 slices deep at most, noise all over."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = MRImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f"1.2.3.{series}.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.9", f"1.2.3.{series}", "1.2.3.8"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "ZORBAXX^QUENTIN", "MRN-4711", "19510707", "M"
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "20210304", "101500", "MRN-A1", "MRN-S"
    ds.OperatorsName, ds.ReferringPhysicianName, ds.StudyDescription = "SCHNACKEL^DR", "SCHNACKEL^DR", "SCHNACKEL HEAD"
    ds.Modality, ds.BodyPartExamined, ds.Manufacturer = "MR", part, "ACME"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "GR", "NONE", "", "3D"
    ds.EchoTime, ds.EchoTrainLength, ds.RepetitionTime, ds.SliceThickness = 3, 1, 900, 2
    ds.SeriesNumber, ds.InstanceNumber, ds.PositionReferenceIndicator, ds.PatientPosition = 1, number, "", "HFS"
    ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1] if sagittal else [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [2.0 * number, -20, 20] if sagittal else [-20, -20, 2.0 * number]
    ds.PixelSpacing, ds.SamplesPerPixel, ds.PhotometricInterpretation = [1.25, 1.25], 1, "MONOCHROME2"
    ds.Rows = ds.Columns = 32
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(number).integers(1, 4096, (32, 32), np.uint16).tobytes()
    return ds


def write(folder: Path, *datasets: Dataset) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for ds in datasets:
        paths.append(folder / f"SCHNACKEL-{ds.SeriesInstanceUID}-{ds.InstanceNumber:02}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def deidentifier(*command: str | Path, timeout_s: float = 60, pixels: Pixels | None = None) -> Deidentifier:
    words = tuple(str(word) for word in command)
    tool = FaceCleaner((*words[:1], "{input}", "{output}", *words[1:]), timeout_s) if words else None
    profile = chosen("research", ["clean-visual-features"])
    return Deidentifier(Pseudonymiser(KEY), profile=profile, pixels=pixels or Pixels("off"), face_cleaner=tool)


def cleaned(cleaner: Deidentifier, paths: list[Path], work: Path) -> list[Path]:
    """The series through the face cleaner and each instance through all else."""
    faceless = clean_series(cleaner, dict.fromkeys(paths, "A"), work / "faces")
    assert {path.suffix for path in (work / "faces").iterdir()} <= {".npy"}
    made = []
    for number, path in enumerate(paths):
        pixels = faceless[path]
        if isinstance(pixels, DicomError):
            raise pixels
        made.append(work / f"clean-{number}.dcm")
        cleaner.clean_file(path, made[-1], site="A", faceless=pixels)
    return made


def codes(ds: Dataset) -> list[str]:
    return [item.CodeValue for item in ds.DeidentificationMethodCodeSequence]


# ---- what it does


@pytest.mark.parametrize("sagittal", [False, True])
def test_a_head_loses_its_face_and_nothing_else(tmp_path: Path, defacer: Path, sagittal: bool) -> None:
    """What the option promises: the face is gone, every other voxel and the geometry are what the scanner measured."""
    paths = write(tmp_path / "in", *(head(number, sagittal=sagittal) for number in range(1, 6)))
    made = cleaned(deidentifier(defacer, "header"), paths, tmp_path)
    kept = Deidentifier(Pseudonymiser(KEY))
    for path, file in zip(paths, made, strict=True):
        before, after = pydicom.dcmread(path), pydicom.dcmread(file)
        face = (slice(None), slice(0, 8)) if sagittal else (slice(0, 8), slice(None))
        wanted = before.pixel_array.copy()
        wanted[face] = 0
        assert np.array_equal(after.pixel_array, wanted)
        assert "113102" in codes(after) and after.RecognizableVisualFeatures == "NO"
        data = file.read_bytes().upper()
        assert not any(canary.encode() in data for canary in CANARIES)
        # The header is what it is without a face cleaner: nothing that the tool wrote into its headers came through.
        plain = kept.clean(before, site="A")
        changed = {"PixelData", "RecognizableVisualFeatures", "DeidentificationMethodCodeSequence"}
        assert {e.keyword for e in plain} | {"RecognizableVisualFeatures"} == {e.keyword for e in after}
        assert all((after[e.keyword].value or "") == (e.value or "") for e in plain if e.keyword not in changed)


def test_the_tool_sees_no_name_and_no_key(
    tmp_path: Path, defacer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a tool never had it cannot leave in its log, its cache or the files that it forgets in /tmp."""
    monkeypatch.setenv("RADLOOP_KEY", "secret")
    paths = write(tmp_path / "in", *(head(number) for number in range(1, 4)))
    tool = script(
        tmp_path / "tool/look", f'#!/bin/sh\n(env; pwd; ls -lnR "$1"; umask) > "$0.saw"\n{defacer} "$1" "$2"\n'
    )
    cleaned(deidentifier(tool), paths, tmp_path)
    saw = (tmp_path / "tool/look.saw").read_text()
    assert "RADLOOP" not in saw and "0077" in saw
    assert f"TMPDIR={tmp_path}/faces/scratch" in saw and f"{tmp_path}/faces/scratch\n" in saw
    assert "00003.dcm" in saw
    seen = (tmp_path / "tool/log").read_text()
    assert "ImagePositionPatient" not in seen and "00200032" in seen  # the geometry is there, by tag
    assert not any(canary in (saw.replace(str(tmp_path), "") + seen).upper() for canary in CANARIES)
    assert (tmp_path / "faces").stat().st_mode & 0o777 == 0o700


def test_compressed_slices_stay_in_their_syntax(tmp_path: Path, defacer: Path) -> None:
    """A change of the syntax that nobody asked for, or a loss; slices that the tool did not touch are copied."""
    slices = [head(number) for number in range(1, 5)]
    slices[0].compress(RLELossless)
    slices[1].compress(JPEG2000Lossless, encoding_plugin="pylibjpeg")
    slices[3].ImagePositionPatient = [-20, 20, 8]  # behind the others: no face in it
    slices[3].compress(RLELossless)
    paths = write(tmp_path / "in", *slices)
    implicit = pydicom.dcmread(paths[2])
    implicit.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    implicit.save_as(paths[2], implicit_vr=True, little_endian=True)
    made = [pydicom.dcmread(path) for path in cleaned(deidentifier(defacer), paths, tmp_path)]
    syntaxes = [RLELossless, JPEG2000Lossless, ExplicitVRLittleEndian, RLELossless]
    assert [ds.file_meta.TransferSyntaxUID for ds in made] == syntaxes
    for number, ds in enumerate(made):
        wanted = head(number + 1).pixel_array.copy()
        wanted[: 0 if number == 3 else 16] = 0
        assert np.array_equal(ds.pixel_array, wanted)
    assert made[3].PixelData == slices[3].PixelData


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MR_small_bigendian.dcm", "MR_small_jpeg_ls_lossless.dcm", "CT_small.dcm"])
def test_real_slices(tmp_path: Path, defacer: Path, name: str) -> None:
    """Real files, signed and big-endian ones among them: off by a sign, a head is a mask of noise."""
    path = Path(get_testdata_file(name))
    (made,) = cleaned(deidentifier(defacer), [path], tmp_path)
    before, after = pixel_array(pydicom.dcmread(path), raw=True), pixel_array(pydicom.dcmread(made), raw=True)
    rows = np.flatnonzero((before != after).any(axis=1))
    assert rows.size and rows[-1] < before.shape[0] / 3
    assert np.array_equal(before[rows[-1] + 1 :], after[rows[-1] + 1 :])


def renamed(folder: Path, to: Path) -> list[Path]:
    """The files of a vendor, whose one string for all (an anonymiser's, in SequenceName too) the PHI gate would stop."""
    to.mkdir()
    paths = []
    for file in sorted(folder.glob("*.dcm")):
        ds = pydicom.dcmread(file)
        ds.PatientName, ds.PatientID, ds.SequenceName = "ZORBAXX^QUENTIN", "MRN-4711", "tfl3d1"
        paths.append(to / file.name)
        ds.save_as(paths[-1])
    return paths


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_a_vendors_series_and_its_enhanced_kind(
    tmp_path: Path, defacer: Path, test_data: Path, require_service: Callable[..., str]
) -> None:
    """Real head MR: defaced, valid as before; and of a multi-frame one the place of each frame is held against its own."""
    require_service("dciodvfy", "dciodvfy")
    vendors = test_data / "dicom_vendor_series/icometrix__dicom2nifti/tests/data"
    slices = renamed(vendors / "siemens/anatomical/001", tmp_path / "slices")
    assert series_with_faces(slices) == [slices]
    for path, made in zip(slices, cleaned(deidentifier(defacer), slices, tmp_path), strict=True):
        before, after = pydicom.dcmread(path).pixel_array, pydicom.dcmread(made).pixel_array
        (columns,) = np.flatnonzero((before != after).any(axis=0))[[-1]]
        assert 50 < columns < 64 and not after[:, :columns].any()
        assert errors(made, tmp_path) - errors(path, tmp_path) == set()
    enhanced = renamed(vendors / "philips_enhanced/fmri/001", tmp_path / "enhanced")
    assert series_with_faces(enhanced) == [enhanced]
    change = "import pydicom, sys\nds = pydicom.dcmread(sys.argv[1] + '/00001.dcm')\n"
    change += "ds.PixelData = bytes(2000) + ds.PixelData[2000:]\n"
    first = "ds.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient[0] += 1\n"
    for more, outcome in (("", None), (first, "changed ImagePositionPatient")):
        text = f"#!{sys.executable}\n{change}{more}ds.save_as(sys.argv[2] + '/x')\n"
        cleaner = deidentifier(script(tmp_path / "tool/top", text))
        if outcome is None:
            cleaned(cleaner, enhanced, tmp_path)
        else:
            with pytest.raises(DicomError, match=outcome):
                cleaned(cleaner, enhanced, tmp_path)


def test_text_is_removed_from_the_cleaned_pixels(tmp_path: Path, defacer: Path) -> None:
    """Faces first, then text: either alone leaves the other in the image."""
    rule = {"name": "banner", "action": "pass", "modality": ["MR"], "blank": [[0, 0.75, 1, 0.25]]}
    paths = write(tmp_path / "in", *(head(number) for number in range(1, 3)))
    cleaner = deidentifier(defacer, pixels=Pixels("clean", [rule]))
    for number, made in enumerate(cleaned(cleaner, paths, tmp_path), 1):
        ds = pydicom.dcmread(made)
        wanted = head(number).pixel_array.copy()
        wanted[:8] = wanted[24:] = 0
        assert np.array_equal(ds.pixel_array, wanted)
        assert {"113101", "113102"} <= set(codes(ds)) and ds.BurnedInAnnotation == "NO"


def test_which_series_go_through_it(tmp_path: Path) -> None:
    """A chest needs no tool that does not know it; a slice without its label belongs to its series all the same."""
    paths = write(tmp_path, head(1), head(2, part="CHEST"), head(1, series="2", part="CHEST"))
    declared = head(1, series="3", part="CHEST")
    declared.RecognizableVisualFeatures = "YES"
    other = head(3)
    other.PatientID = "MRN-5"  # the same UIDs, and somebody else
    more = write(tmp_path, declared, other)
    (tmp_path / "x").write_text("no DICOM")
    found = series_with_faces([*paths, *more, tmp_path / "x", tmp_path / "nowhere"])
    assert found == [paths[:2], more[:1], more[1:]]


# ---- what it does not let pass


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("crash", "ended with exit code 3; it said 25 bytes, which were not read"),
        ("signal", "ended with signal 11"),
        ("nothing", "changed no pixel of the series"),
        ("in place", "left 0 of 3 instances: 3 are missing"),
        ("missing", "left 2 of 3 instances: 1 are missing"),
        ("twice", "left an instance twice"),
        ("cut", "cannot be read"),
        ("links", "left 0 of 3 instances"),
        ("removed", "left 0 of 3 instances"),
        ("spacing", "changed PixelSpacing"),
        ("slope", "changed RescaleSlope"),
        ("stranger", "left 1 instances that it was not given"),
        ("smaller", "changed Rows"),
    ],
)
def test_a_tool_that_fails_releases_nothing(tmp_path: Path, defacer: Path, how: str, what: str) -> None:
    """Each of these, let through, is a face in the archive, a slice in another place, or a volume with a hole."""
    paths = write(tmp_path / "in", *(head(number) for number in range(1, 4)))
    tool = [script(tmp_path / "tool/x", f"#!/bin/sh\n{SHELL[how]}\n")] if how in SHELL else [defacer, how]
    cleaner = deidentifier(*tool)
    done = clean_series(cleaner, dict.fromkeys(paths, "A"), tmp_path / "faces")
    for path in paths:
        error = done[path]
        assert isinstance(error, DicomError) and error.reason == Reason.RECOGNIZABLE_FACE
        assert what in error.what and "orbaxx" not in f"{error}"
    assert not any(path.suffix != ".npy" for path in (tmp_path / "faces").iterdir())


def test_rounding_on_the_way_through_nifti_is_no_other_geometry(tmp_path: Path, defacer: Path) -> None:
    """Every tool that goes through NIfTI writes positions with other last digits."""
    cleaned(deidentifier(defacer, "rounded"), write(tmp_path / "in", head(1), head(2)), tmp_path)


def gone(pid: int) -> bool:
    """Whether a process has ended, seen for at most half a minute."""
    for _ in range(600):
        try:
            if f"{pid} (" not in (stat := Path(f"/proc/{pid}/stat").read_text()) or ") Z" in stat:
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_tool_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Otherwise one series stops a night's run, and its processes are still there in the morning."""
    tool = script(tmp_path / "hang", '#!/bin/sh\nsleep 300 & echo $! > "$0.pid"\nsleep 300\n')
    (path,) = write(tmp_path / "in", head(1))
    began = time.monotonic()
    done = clean_series(deidentifier(tool, timeout_s=0.5), {path: "A"}, tmp_path / "faces")
    error = done[path]
    assert isinstance(error, DicomError) and "had not ended after 0.5 s" in error.what
    assert time.monotonic() - began < 100
    assert gone(int((tmp_path / "hang.pid").read_text()))


def test_ctrl_c_ends_the_tool_and_takes_its_folders_away(tmp_path: Path) -> None:
    """Whoever stops a run wants it stopped, and no face left lying about."""
    tool = script(tmp_path / "hang", '#!/bin/sh\nsleep 300 & echo $! > "$0.pid"\nsleep 300\n')
    (path,) = write(tmp_path / "in", head(1))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            clean_series(deidentifier(tool), {path: "A"}, tmp_path / "faces")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(int((tmp_path / "hang.pid").read_text()))
    assert not list((tmp_path / "faces").iterdir())


def test_what_cannot_be_cleaned_at_all_says_so_and_is_not_given(tmp_path: Path, defacer: Path) -> None:
    """A slice without a patient is refused for that, and one with another's UID for that; the others are cleaned."""
    nobody, twin = head(3), head(2)
    nobody.PatientID = ""
    twin.InstanceNumber, twin.PixelData = 9, bytes(2048)
    paths = write(tmp_path / "in", head(1), head(2), nobody, twin)
    copy = tmp_path / "in/copy"
    copy.write_bytes(paths[0].read_bytes())
    done = clean_series(deidentifier(defacer), dict.fromkeys([*paths, copy], "A"), tmp_path / "faces")
    told = [value.reason if isinstance(value, DicomError) else "" for value in done.values()]
    assert dict(zip(done, told, strict=True)) == {
        **{paths[0]: "", paths[1]: "", copy: ""},
        **{paths[2]: Reason.NO_PATIENT_ID, paths[3]: Reason.UID_CONFLICT},
    }
    assert (tmp_path / "tool/log").read_text().startswith("2\n")


def test_a_command_that_is_none(tmp_path: Path) -> None:
    """A typo must stop the run, not put every head into quarantine."""
    for words in ((), ("deface",), ("deface", "{input}"), ("{input}", "{output}")):
        with pytest.raises(SettingsError, match="no command with two folders"):
            FaceCleaner(words)
    with pytest.raises(SettingsError, match="above 0"):
        FaceCleaner(("x", "{input}{output}"), 0)
    with pytest.raises(SettingsError, match="it would never run"):
        Deidentifier(Pseudonymiser(KEY), face_cleaner=FaceCleaner(("x", "{input}", "{output}")))
    (path,) = write(tmp_path / "in", head(1))
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    for name, match in (("/nowhere/x", "is not there"), (str(tmp_path / "text"), "cannot be started")):
        with pytest.raises(SettingsError, match=match):
            clean_series(deidentifier(name), {path: "A"}, tmp_path / "faces")


def test_the_tool_is_part_of_what_the_archive_was_made_with() -> None:
    """Heads cleaned by two tools in one archive, and nobody could tell which is which."""
    assert len({deidentifier(*words).digest for words in ((), ("a",), ("b",), ("b", "--fast"))}) == 4
    assert deidentifier("a", timeout_s=1).digest == deidentifier("a", timeout_s=2).digest


# ---- radloop deidentify


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`radloop deidentify --json` in this process."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments: str | Path) -> Any:
        capsys.readouterr()
        code = run_app(["deidentify", *map(str, arguments), *CLI, "--json"])
        said = capsys.readouterr()
        return {**(json.loads(said.out) if said.out else {}), "code": code, "err": said.err}

    return run


CLI = ["--pixels", "off", "--option", "clean-visual-features"]


def outputs(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*.dcm")) if ".radloop" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Two series of heads, mixed up in one folder, and a chest."""
    folder = tmp_path / "export"
    write(folder, *(head(number, series=series) for number in range(1, 4) for series in ("1", "2")))
    write(folder, head(1, series="3", part="CHEST"))
    return folder


def test_a_folder_by_one_process_and_by_two(
    alone: Callable[..., Any], export: Path, tmp_path: Path, defacer: Path
) -> None:
    """A result that depends on the number of cores could not be reproduced; and the report says what was done."""
    tool = f"{defacer} {{input}} {{output}}"
    ran = alone(export, tmp_path / "a", "--face-cleaner", tool, "--workers", "1")
    assert ran["code"] == 0 and ran["files"]["cleaned"] == 7, ran
    assert alone(export, tmp_path / "b", "--face-cleaner", tool, "--workers", "2")["code"] == 0
    made = outputs(tmp_path / "a")
    assert made == outputs(tmp_path / "b") and len(made) == 7
    assert ran["pixels"][1] == {"decision": "faces by the face cleaner; text not looked at", "files": 6}
    assert any("is what your face cleaner says" in line for line in ran["left"])
    assert [line for line in (tmp_path / "tool/log").read_text().splitlines() if line == "3"] == ["3"] * 4
    for name in made:
        ds = pydicom.dcmread(tmp_path / "a" / name)
        assert bool(ds.pixel_array[:8].any()) is (ds.BodyPartExamined == "CHEST") and "113102" in codes(ds)
    assert not list((tmp_path / "a/.radloop").glob("work*"))
    again = alone(export, tmp_path / "a", "--face-cleaner", tool)
    assert again["files"]["kept"] == 7 and (tmp_path / "tool/log").read_text().count("\n3\n") == 3


def test_no_face_cleaner_or_a_dry_run_refuses(
    alone: Callable[..., Any], export: Path, tmp_path: Path, defacer: Path
) -> None:
    """The option alone is a promise that no face passes; a dry run starts nothing and leaves nothing in /tmp."""
    ran = alone(export, tmp_path / "a")
    assert ran["code"] == 3 and ran["files"]["cleaned"] == 1 and len(outputs(tmp_path / "a")) == 1
    assert {row["reason"] for row in ran["refused"]} == {"RECOGNIZABLE_FACE"}
    dry = alone(export, "--dry-run", "--face-cleaner", f"{defacer} {{input}} {{output}}")
    assert dry["code"] == 3 and dry["refused"][0]["what"] == "no face cleaner is started in a dry run"
    assert not (tmp_path / "tool/log").exists()
    wrong = alone(export, tmp_path / "b", "--face-cleaner", "/nowhere/deface {input} {output}")
    assert wrong["code"] == 1 and "the face cleaner is not there" in wrong["err"] and not outputs(tmp_path / "b")


def test_a_late_slice_and_a_repaired_tool(
    alone: Callable[..., Any], export: Path, tmp_path: Path, defacer: Path
) -> None:
    """A slice that comes later alone has no face that a tool could find: its series is cleaned anew, the other stays."""
    flaky = script(tmp_path / "tool/flaky", f'#!/bin/sh\ntest -e "$0.broken" && exit 1\nexec {defacer} "$@"\n')
    tool = ("--face-cleaner", f"{flaky} {{input}} {{output}}")
    late = export / "SCHNACKEL-1.2.3.1-03.dcm"
    data = late.read_bytes()
    late.unlink()
    assert alone(export, tmp_path / "a", *tool)["code"] == 0
    before = outputs(tmp_path / "a")
    late.write_bytes(data)
    (tmp_path / "tool/flaky.broken").touch()
    failed = alone(export, tmp_path / "a", *tool)
    assert failed["code"] == 3 and failed["files"]["refused"] == 3
    left = outputs(tmp_path / "a")
    assert len(left) == 4 and left.items() <= before.items()  # what was cleaned without the late slice is not there
    (tmp_path / "tool/flaky.broken").unlink()
    assert alone(export, tmp_path / "a", *tool)["files"] == failed["files"] | {"cleaned": 3, "kept": 4, "refused": 0}
    assert alone(export, tmp_path / "b", *tool)["code"] == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    sizes = [line for line in (tmp_path / "tool/log").read_text().splitlines() if line.isdigit()]
    assert sizes == ["2", "3", "3", "3", "3"]


def test_killed_while_the_tool_runs_it_goes_on(
    alone: Callable[..., Any], export: Path, tmp_path: Path, defacer: Path
) -> None:
    """A power cut leaves a volume with its face in a temporary folder, and a tool that goes on alone."""
    slow = script(
        tmp_path / "tool/slow",
        f'#!/bin/sh\nif test -e "$0.slow"; then rm "$0.slow"; echo $$ > "$0.pid"; sleep 300; fi\nexec {defacer} "$@"\n',
    )
    (tmp_path / "tool/slow.slow").touch()
    arguments = [export, tmp_path / "a", "--face-cleaner", f"{slow} {{input}} {{output}}", "--workers", "1"]
    command = [sys.executable, "-m", "radloop.cli", "deidentify", *map(str, arguments), *CLI]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}) as process:
        pid = tmp_path / "tool/slow.pid"
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert gone(int(pid.read_text()))
    assert list((tmp_path / "a/.radloop/work").rglob("00001.dcm"))
    ran = alone(*arguments)
    assert ran["code"] == 0 and not (tmp_path / "a/.radloop/work").exists()
    assert alone(export, tmp_path / "b", *arguments[2:])["code"] == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b") and len(outputs(tmp_path / "a")) == 7


# ---- the loop


def test_in_the_loop_a_series_is_cleaned_whole_and_refused_whole(tmp_path: Path, defacer: Path) -> None:
    """The loop's archive holds heads without faces, however the slices arrive and whatever the tool does in between."""
    home = tmp_path / "project"
    make_project(home)
    flaky = script(tmp_path / "tool/flaky", f'#!/bin/sh\ntest -e "$0.broken" && exit 1\nexec {defacer} "$@"\n')
    told = '[accept]\nmodalities = ["MR"]\n[ingest]\nfolders = [{path = "in", site = "site-a"}]\n[deidentify]\npixels = "off"\n'
    told += f'options = ["clean-visual-features"]\nface_cleaner = ["{flaky}", "{{input}}", "{{output}}"]\n'
    (home / "radloop.toml").write_text(told)

    def run() -> dict[str, bytes]:
        result = run_one(home, load(home), "prepare", upto="deidentify")
        assert result.status == "succeeded", result.message
        assert not (home / "landing/.faces").exists()
        with open_catalog(home) as catalog:
            return {row.archive_path: (home / "archive" / row.archive_path).read_bytes() for row in catalog.archived()}

    def sizes() -> list[str]:
        return [line for line in (tmp_path / "tool/log").read_text().splitlines() if line.isdigit()]

    write(home / "in", head(1), head(2), head(1, series="3", part="CHEST"))
    (tmp_path / "tool/flaky.broken").touch()
    assert len(run()) == 1
    (tmp_path / "tool/flaky.broken").unlink()
    assert len(run()) == 1  # a person has to see it
    with open_catalog(home) as catalog:
        numbers = [str(row.id) for row in catalog.quarantined()]
    assert run_app(["quarantine", "retry", *numbers, "--project", str(home)]) == 0
    assert len(run()) == 3 and sizes() == ["2"]
    write(home / "in", head(3))
    first = run()
    assert len(first) == 4 and sizes() == ["2", "3"]
    for path in first:
        ds = pydicom.dcmread(home / "archive" / path)
        assert bool(ds.pixel_array[:8].any()) is (ds.BodyPartExamined == "CHEST") and "113102" in codes(ds)
    (home / "landing/.faces/0/input").mkdir(parents=True)  # of a run that was killed; `run` looks whether it goes
    (tmp_path / "tool/flaky.broken").touch()
    write(home / "in", head(4))
    assert len(run()) == 1
    (tmp_path / "tool/flaky.broken").unlink()
    write(home / "in", head(5))
    assert len(run()) == 1  # alone it is no volume
    with open_catalog(home) as catalog:
        held = catalog.quarantined()
        assert {row.reason for row in held} == {Reason.RECOGNIZABLE_FACE}
        assert [row.detail for row in held if "exit code 1" in row.detail] and "retry them together" in held[-1].detail
    numbers = [str(row.id) for row in held]
    assert run_app(["quarantine", "retry", *numbers, "--project", str(home)]) == 0
    assert len(run()) == 6 and sizes() == ["2", "3", "5"]
    last = run()
    assert last == run() and sizes() == ["2", "3", "5"]
    for canary in CANARIES:
        assert not any(canary.encode() in data for data in last.values())
