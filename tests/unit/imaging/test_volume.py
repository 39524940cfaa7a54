"""Series to volume: the geometry gate, patient coordinates, values."""

from __future__ import annotations

import gzip
import io
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from radloop.errors import DicomError, VolumeError
from radloop.imaging.volume import Refusal, Volume, load, lps_to_ras, ras_to_lps, split_series, write_nifti
from radloop.imaging.volume.orientation import reversed_indices

CANARY = "Zzyzxson^Quilliam"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"


def plane(
    number: int,
    position: tuple[float, float, float],
    orientation: tuple[float, ...] = AXIAL,
    *,
    shape: tuple[int, int] = (6, 8),
    spacing: tuple[float, float] = (0.8, 0.5),
    **attributes: Any,
) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PatientName = CANARY
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = CT, f"1.2.3.{number}", "1.2.3"
    ds.FrameOfReferenceUID, ds.Modality, ds.InstanceNumber = "1.2.9", "CT", number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImagePositionPatient = [float(f"{v:.9g}") for v in position]
    ds.ImageOrientationPatient = [float(f"{v:.12g}") for v in orientation]
    ds.PixelSpacing = list(spacing)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.Rows, ds.Columns = shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = (np.arange(shape[0] * shape[1], dtype=np.uint16) + 100 * number).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def stack(count: int = 5, step: float = 2.0, **attributes: Any) -> list[Dataset]:
    return [plane(n, (-10.0, -20.0, 30.0 + step * n), **attributes) for n in range(count)]


def refused(sources: list[Any], **options: Any) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        load(sources, **options)
    assert CANARY not in str(caught.value) and "Zzyzx" not in str(caught.value)
    return caught.value


def test_a_ct_series_has_hu_in_order_whatever_order_its_files_came_in() -> None:
    """A volume whose slices were shuffled, or whose values were off by the intercept, would teach a model nonsense."""
    series = stack()
    volume = load([series[i] for i in (3, 0, 4, 1, 2)])
    assert volume.array.shape == (5, 6, 8)
    assert [uid for uid, _ in volume.sources] == [f"1.2.3.{n}" for n in range(5)]
    assert volume.spacing_mm == pytest.approx((2.0, 0.8, 0.5), abs=1e-9)
    assert volume.rescale_type == "HU"
    assert volume.rescaled()[3, 2, 1] == 300 + 2 * 8 + 1 - 1024
    assert volume.affine @ (3, 2, 1, 1) == pytest.approx((-10 + 0.5, -20 + 2 * 0.8, 36, 1))


def test_pet_slices_keep_each_its_own_slope() -> None:
    """One slope for all slices of a PET would be wrong by the ratio of two slices' maxima."""
    series = stack(Modality="PT", RescaleType="BQML")
    for n, ds in enumerate(series):
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 + n, 0
    volume = load(series)
    assert volume.rescaled()[:, 0, 0].tolist() == [(0.5 + n) * 100 * n for n in range(5)]


def test_bits_above_bits_stored_are_no_values() -> None:
    """Overlay bits in the high bits of old CT would appear as bone."""
    series = stack()
    for ds in series:
        ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) | 0x4000).tobytes()
    assert load(series).array.max() < 4096


@pytest.mark.parametrize(
    "change, refusal, said",
    [
        (lambda s: s.pop(2), Refusal.MISSING_SLICES, r"1 missing, first after slice 2 of 4 \(4.000 mm"),
        (lambda s: s.__delitem__(slice(1, None)), Refusal.SINGLE_SLICE, "got: 1"),
        (lambda s: _move(s[2], 2, 0.4), Refusal.IRREGULAR_SPACING, r"0.400 mm off the grid"),
        (lambda s: _move(s[2], 0, 0.4), Refusal.IRREGULAR_POSITIONS, "slice 3 of 5 is 0.320 mm off the line"),
        (lambda s: s.append(s[1]), Refusal.DUPLICATE_POSITIONS, "1 again"),
        (lambda s: s.append(plane(9, tuple(s[1].ImagePositionPatient))), Refusal.DUPLICATE_POSITIONS, "1 too many"),
        (lambda s: s.append(plane(9, (0, 0, 40), spacing=(0.8, 0.6))), Refusal.MIXED_SPACING, "0.800 mm"),
        (lambda s: s.append(plane(9, (0, 0, 40), shape=(6, 9))), Refusal.MIXED_MATRIX, "6 x 9"),
        (lambda s: setattr(s[1], "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), Refusal.MIXED_ORIENTATION, "mm"),
        (lambda s: setattr(s[1], "ImageOrientationPatient", [1, 0, 0, 0.1, 1, 0]), Refusal.NOT_ORTHONORMAL, "0.1000"),
        (lambda s: setattr(s[1], "ImageOrientationPatient", [1, 0, 0]), Refusal.NO_GEOMETRY, "6 numbers"),
        (lambda s: setattr(s[1], "PixelSpacing", [0, 1]), Refusal.NO_GEOMETRY, "not positive"),
        (lambda s: s[1].__delattr__("ImagePositionPatient"), Refusal.NO_GEOMETRY, "ImagePositionPatient is missing"),
        (lambda s: setattr(s[1], "FrameOfReferenceUID", "1.2.8"), Refusal.MIXED_FRAME_OF_REFERENCE, "got: 2"),
        (lambda s: setattr(s[1], "SeriesInstanceUID", "1.2.8"), Refusal.MIXED_SERIES, "got: 2"),
        (lambda s: setattr(s[1], "PixelRepresentation", 1), Refusal.MIXED_MATRIX, "16 bits signed"),
        (lambda s: s[1].__delattr__("RescaleSlope"), Refusal.RESCALE, "RescaleSlope is missing"),
        (lambda s: setattr(s[1], "RescaleSlope", 0), Refusal.RESCALE, "RescaleSlope is 0"),
        (lambda s: setattr(s[1], "RescaleType", "US"), Refusal.RESCALE, "different units"),
        (lambda s: setattr(s[1], "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), Refusal.LOCALIZER, "planning"),
        (lambda s: setattr(s[1], "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), Refusal.MOSAIC, "dcm2niix"),
        (lambda s: setattr(s[1], "ModalityLUTSequence", [Dataset()]), Refusal.MODALITY_LUT, "Modality LUT"),
        (lambda s: setattr(s[1], "Modality", "SEG"), Refusal.NOT_AN_IMAGE, "segmentation"),
        (lambda s: setattr(s[1], "NumberOfFrames", 3), Refusal.NO_GEOMETRY, "no positions of their own"),
        (lambda s: setattr(s[1], "EchoTime", 4.6), Refusal.MIXED_KIND, "EchoTime"),
        (lambda s: setattr(s[1], "PixelData", b"\0" * 10), Refusal.UNREADABLE, "cannot be decoded"),
    ],
)
def test_the_gate_refuses_and_says_why(change: Callable[[list[Dataset]], Any], refusal: Refusal, said: str) -> None:
    """Each of these, loaded all the same, would put voxels where the patient has none, or values in no unit."""
    series = stack()
    change(series)
    error = refused(series)
    assert error.refusal == refusal
    assert error.reason == "BAD_GEOMETRY" and isinstance(error, DicomError)
    assert re.search(said, str(error))


def _move(ds: Dataset, axis: int, by_mm: float) -> None:
    place = list(ds.ImagePositionPatient)
    place[axis] += by_mm
    ds.ImagePositionPatient = place


def test_rounded_positions_pass_and_the_tolerance_can_be_tightened() -> None:
    """Scanners round positions; a gate that refused those would refuse every real series."""
    series = stack(20, 0.7)
    for ds in series:
        ds.ImagePositionPatient = [round(v, 1) for v in ds.ImagePositionPatient]
    for n, ds in enumerate(series):
        _move(ds, 2, 0.02 * (n % 2))
    assert load(series).spacing_mm[0] == pytest.approx(0.7, abs=0.002)
    assert refused(series, tolerance_mm=0.005).refusal == Refusal.IRREGULAR_SPACING


def test_a_gap_between_thin_slices_is_found_below_the_tolerance_in_mm() -> None:
    """In micro-CT the tolerance of 0.05 mm is more than a slice: a missing slice must be found all the same."""
    series = stack(8, 0.03)
    del series[3]
    assert refused(series).refusal == Refusal.MISSING_SLICES


def test_a_gantry_tilt_is_refused_with_its_angle_or_kept_exactly() -> None:
    """A tilted head CT taken for an upright one is off by centimetres at the vertex."""
    angle = np.radians(14)
    tilted = (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(-np.sin(angle)))
    series = [plane(n, (-10.0, -20.0, 5.0 * n), tilted) for n in range(4)]
    assert "got: 14.00 degrees" in str(refused(series))
    volume = load(series, keep_tilt=True)
    assert volume.tilt_deg == pytest.approx(14, abs=1e-4)
    for n, ds in enumerate(series):
        assert (volume.affine @ (n, 5, 7, 1))[:3] == pytest.approx(_voxel(ds, 5, 7), abs=1e-6)


def _voxel(ds: Dataset, row: int, column: int) -> NDArray[np.float64]:
    """PS3.3 equation C.7.6.2.1-1."""
    orientation = np.array(ds.ImageOrientationPatient, dtype=float)
    down, across = (float(v) for v in ds.PixelSpacing)
    return np.array(ds.ImagePositionPatient, float) + orientation[:3] * across * column + orientation[3:] * down * row


@given(
    quaternion=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(v * v for v in q) > 0.1),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    step=st.floats(0.3, 8),
    count=st.integers(2, 6),
    order=st.randoms(use_true_random=False),
)
def test_every_voxel_lies_where_its_own_attributes_say(
    quaternion: tuple[float, ...], origin: tuple[float, ...], step: float, count: int, order: Any
) -> None:
    """A contour or a dose drawn on the volume would else land beside the tumour."""
    across, down, normal = _rotation(np.array(quaternion)).T
    series = [plane(n, tuple(np.array(origin) + n * step * normal), (*across, *down)) for n in range(count)]
    shuffled = list(series)
    order.shuffle(shuffled)
    volume = load(shuffled)
    for n, ds in enumerate(series):
        assert (volume.affine @ (n, 5, 7, 1))[:3] == pytest.approx(_voxel(ds, 5, 7), abs=1e-4)
    assert np.linalg.det(volume.affine) < 0
    array, affine = volume.nifti()
    assert affine @ (7, 5, count - 1, 1) == pytest.approx(
        np.diag((-1, -1, 1, 1)) @ volume.affine @ (count - 1, 5, 7, 1)
    )
    assert array[7, 5, 0] == volume.array[0, 5, 7]


def _rotation(q: NDArray[np.float64]) -> NDArray[np.float64]:
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@given(st.lists(st.floats(-1e4, 1e4), min_size=12, max_size=12), st.tuples(*[st.integers(0, 512)] * 3))
def test_lps_and_ras_name_the_same_point(numbers: list[float], index: tuple[int, int, int]) -> None:
    """A side swapped between the two conventions is a wrong-side finding."""
    affine = np.vstack([np.array(numbers).reshape(3, 4), (0, 0, 0, 1)])
    assert np.array_equal(ras_to_lps(lps_to_ras(affine)), affine)
    assert np.array_equal(reversed_indices(reversed_indices(affine)), affine)
    lps, ras = affine @ (*index, 1), lps_to_ras(affine) @ (*index, 1)
    assert (-ras[0], -ras[1], ras[2]) == pytest.approx(tuple(lps[:3]))
    assert reversed_indices(affine) @ (*index[::-1], 1) == pytest.approx(lps)


def test_times_echoes_and_phases_become_volumes_of_their_own() -> None:
    """A dynamic series taken for one volume would mix contrast phases slice by slice."""
    series = []
    for n in range(4):
        for echo in (1, 2):
            for part in ("M", "P"):
                ds = plane(n * 4 + echo * 2 + (part == "P"), (0.0, 0.0, 3.0 * n), Modality="MR", EchoTime=echo * 4.6)
                ds.ImageType = ["ORIGINAL", "PRIMARY", part]
                series.append(ds)
    assert refused(series).refusal == Refusal.SEVERAL_VOLUMES
    assert "ComplexImageComponent, EchoTime, ImageType" in str(refused(series))
    parts = split_series(series)
    assert len(parts) == 4 and sorted(len(p.sources) for p in parts) == [4] * 4
    for part in parts:
        volume = part.load()
        wanted = [i for i, ds in enumerate(series) if str(ds.EchoTime) == part.told_by["EchoTime"]]
        assert {i for i, _ in part.sources} <= set(wanted)
        assert volume.array.shape == (4, 6, 8)


def test_what_nothing_tells_apart_but_its_number_is_split_by_it() -> None:
    """Time series without a temporal attribute are common (GE, Philips); the n-th image of each place is the n-th time."""
    series = [plane(10 * t + n, (0.0, 0.0, 3.0 * n)) for t in range(3) for n in range(4)]
    parts = split_series(series)
    assert [part.told_by for part in parts] == [{"order": "1"}, {"order": "2"}, {"order": "3"}]
    assert [part.load().array[2, 0, 0] for part in parts] == [200, 1200, 2200]
    incomplete = split_series(series[:-1])
    assert [part.refusal and part.refusal.refusal for part in incomplete] == [Refusal.DUPLICATE_POSITIONS]


def test_two_orientations_and_a_scout_in_one_folder_fall_apart() -> None:
    """A folder export holds scouts and reformats beside the scan; none of it may get lost or mixed in."""
    coronal = [plane(20 + n, (0.0, 3.0 * n, 0.0), (1, 0, 0, 0, 0, -1)) for n in range(3)]
    scout = plane(40, (0, 0, 0), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    parts = split_series([scout, *stack(), *coronal])
    assert [part.refusal and part.refusal.refusal for part in parts] == [Refusal.LOCALIZER, None, None]
    assert sorted(place for part in parts for place in part.sources) == [(n, 0) for n in range(9)]


def test_a_file_that_is_no_dicom_is_a_part_that_says_so(tmp_path: Path) -> None:
    """A stray file must not take a whole series with it, nor be passed over in silence; its name may be a patient's."""
    for n, ds in enumerate(stack()):
        ds.save_as(tmp_path / f"{n}.dcm", enforce_file_format=True)
    (tmp_path / f"{CANARY}.txt").write_text("no DICOM")
    parts = split_series(sorted(tmp_path.iterdir()))
    assert [part.refusal and part.refusal.refusal for part in parts] == [Refusal.UNREADABLE, None]
    assert CANARY not in str(parts[0].refusal)
    assert parts[1].load().array.shape == (5, 6, 8)


def enhanced(count: int = 4, times: int = 2) -> Dataset:
    """An Enhanced CT whose frames come position by position, newest time first."""
    ds = plane(1, (0, 0, 0))
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        del ds[keyword]
    shared, measures, orientation, scale = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, orientation.ImageOrientationPatient = [0.8, 0.5], list(AXIAL)
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 2, -1000, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
    shared.PixelValueTransformationSequence = Sequence([scale])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for n in range(count):
        for t in reversed(range(times)):
            group, place, content = Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient = [0, 0, -2.5 * n]
            content.StackID, content.TemporalPositionIndex = "1", t + 1
            group.PlanePositionSequence, group.FrameContentSequence = Sequence([place]), Sequence([content])
            frames.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.NumberOfFrames = count * times
    ds.PixelData = np.repeat(np.arange(count * times, dtype=np.uint16), 48).tobytes()
    return ds


def test_an_enhanced_object_is_read_by_its_frames_own_attributes() -> None:
    """Enhanced CT and MR keep geometry per frame; frames need not come in any order."""
    assert refused([enhanced()]).refusal == Refusal.SEVERAL_VOLUMES
    parts = {part.told_by["TemporalPositionIndex"]: part.load() for part in split_series([enhanced()])}
    assert parts["1"].array[:, 0, 0].tolist() == [7, 5, 3, 1]
    assert parts["2"].rescaled()[:, 0, 0].tolist() == [2 * v - 1000 for v in (6, 4, 2, 0)]
    assert parts["1"].affine @ (0, 0, 0, 1) == pytest.approx((0, 0, -7.5, 1))
    broken = enhanced()
    broken.PerFrameFunctionalGroupsSequence.pop()
    assert refused([broken]).refusal == Refusal.NO_GEOMETRY


def test_compressed_slices_are_decoded_in_the_sandbox(tmp_path: Path) -> None:
    """A PACS archive is mostly JPEG 2000; a codec that crashes must cost one volume, not the process."""
    paths = []
    for n, ds in enumerate(stack(shape=(64, 72))):
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        paths.append(tmp_path / f"{n}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    assert np.array_equal(load(paths).array, load(stack(shape=(64, 72))).array)
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[: data.rindex(b"\xff\x93") + 4])
    assert refused(list(paths)).refusal == Refusal.UNREADABLE


def test_colour_other_than_rgb_is_refused() -> None:
    """YBR values taken for RGB are other colours."""
    colour = {"SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PlanarConfiguration": 0}
    series = stack(Modality="OT", PhotometricInterpretation="YBR_FULL", PixelData=bytes(range(144)), **colour)
    assert refused(series).refusal == Refusal.COLOUR
    for ds in series:
        ds.PhotometricInterpretation = "RGB"
    assert load(series).array.shape == (5, 6, 8, 3)


def test_a_damaged_header_is_a_refusal_and_nothing_else(tmp_path: Path) -> None:
    """One flipped bit in one file of a night's conversion must cost that file."""
    rng = np.random.default_rng(5)
    for n, ds in enumerate([*stack(3), enhanced()]):
        path = tmp_path / f"{n}.dcm"
        ds.save_as(path, enforce_file_format=True)
    whole = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    refusals = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that are none
        for turn in range(150):
            path = list(whole)[turn % len(whole)]
            data = bytearray(whole[path])
            for place in rng.integers(132, len(data), 4):
                data[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(data[: rng.integers(200, len(data))] if turn % 5 == 0 else data)
            parts = split_series(list(whole))
            assert {i for part in parts for i, _ in part.sources} == set(range(4))
            for part in parts:
                try:
                    part.load()
                except VolumeError as error:
                    refusals.add(error.refusal)
            path.write_bytes(whole[path])
    assert {Refusal.UNREADABLE, Refusal.NO_GEOMETRY, Refusal.SINGLE_SLICE} <= refusals


# --- references -------------------------------------------------------------------------------------------------------


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A NIfTI-1 file as `(i, j, k, t[, rgba])` and its sform, RAS mm."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    assert struct.unpack_from("<i", raw)[0] == 348 and struct.unpack_from("<h", raw, 254)[0] > 0
    dim = struct.unpack_from("<8h", raw, 40)
    code, offset = struct.unpack_from("<h", raw, 70)[0], int(struct.unpack_from("<f", raw, 108)[0])
    slope, intercept = struct.unpack_from("<2f", raw, 112)
    shape = [*dim[1 : 1 + dim[0]], *[1] * (4 - dim[0])]
    names = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8", 512: "<u2", 768: "<u4", 2304: "(4,)u1"}
    kind = np.dtype(names[code])
    data = np.frombuffer(raw, kind.base, int(np.prod(shape)) * (4 if kind.shape else 1), offset)
    whole = [4, *shape] if kind.shape else shape
    data = data.reshape(whole, order="F")
    data = np.moveaxis(data, 0, -1) if kind.shape else data
    affine = np.vstack([np.frombuffer(raw, "<f4", 12, 280).reshape(3, 4), (0, 0, 0, 1)]).astype(float)
    return data if (slope, intercept) in ((1, 0), (0, 0)) else data * slope + intercept, affine


def placed(volume: Volume, reference: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """The reference's values at our voxels, `(slices, rows, columns, t)`: by the two affines, which must agree to 1e-3 mm."""
    ours = lps_to_ras(volume.affine)
    onto = np.round(np.linalg.inv(affine) @ ours)
    indices = np.stack(np.meshgrid(*map(np.arange, volume.array.shape[:3]), indexing="ij")).reshape(3, -1)
    indices = np.vstack([indices, np.ones(indices.shape[1], int)])
    off = ours @ indices - affine @ onto @ indices
    assert float(np.abs(off).max()) < 1e-3, "a voxel lies elsewhere than in the reference"
    i, j, k = (onto @ indices).astype(int)[:3]
    assert sorted(volume.array.shape[:3]) == sorted(reference.shape[:3])
    return reference[i, j, k].reshape(*volume.array.shape[:3], *reference.shape[3:])


SERIES = [
    ("anatomical/001", 1),
    ("ge/anatomical/001_implicit", 1),
    ("ge/dti/001_implicit", 2),
    ("ge/dti/002", 4),
    ("generic/anatomical/001_implicit", 1),
    ("generic/anatomical/002_non_isotropic", 1),
    ("generic/rgb/001", 1),
    ("hyperfine/anatomical/001", 1),
    ("philips/anatomical/001", 1),
    ("philips/anatomical/001_implicit", 1),
    ("philips/dti/001", 4),
    ("philips/fmri/001_implicit", 4),
    ("philips_enhanced/dti/001", 4),
    ("philips_enhanced/dti/001_implicit", 4),
    ("philips_enhanced/fmri/001", 4),
    ("philips_enhanced/fmri/001_implicit", 4),
    ("siemens/anatomical/001", 1),
    ("siemens/anatomical/001_implicit", 1),
    ("siemens/fmri_classic/001", 2),
    ("siemens/fmri_classic/001_implicit", 2),
]


@pytest.fixture
def vendor(test_data: Path) -> Path:
    return test_data / "dicom_vendor_series/icometrix__dicom2nifti/tests/data"


@pytest.mark.data
@pytest.mark.parametrize("name, count", SERIES)
def test_vendors_series_equal_their_reference_nifti(vendor: Path, name: str, count: int) -> None:
    """GE, Siemens, Philips and Hyperfine: the same voxels at the same place, to 1e-3 mm, with the same values."""
    reference, affine = read_nifti(vendor / f"{name}_ground_truth.nii.gz")
    parts = split_series(sorted((vendor / name).iterdir()))
    assert [part.refusal for part in parts] == [None] * count
    matched = set()
    for volume in (part.load() for part in parts):
        there = placed(volume, reference, affine)
        for t in range(reference.shape[3]):
            if volume.array.ndim == 4:
                same = np.array_equal(there[..., t, :3], volume.array)
            else:
                same = np.allclose(there[..., t], volume.rescaled(), rtol=1e-6, atol=1e-4)
            if same:
                matched.add(t)
    # dicom2nifti left three of the four volumes of an enhanced DTI empty; dcm2niix has all four, equal to ours.
    filled = {t for t in range(reference.shape[3]) if np.any(reference[:, :, :, t])}
    assert matched == filled and (len(filled) == count or name.startswith("philips_enhanced/dti"))


@pytest.mark.data
@pytest.mark.parametrize(
    "name, refusal",
    [
        ("ge/anatomical/001_single_slice", Refusal.SINGLE_SLICE),
        ("failing/gantrytilting/001", Refusal.GANTRY_TILT),
        ("siemens/fmri/001", Refusal.MOSAIC),
    ],
)
def test_vendors_series_that_are_no_volume_say_why(vendor: Path, name: str, refusal: Refusal) -> None:
    """Real examples of what must not be loaded as if it were a plain stack."""
    files = sorted((vendor / name).iterdir())
    assert {part.refusal.refusal for part in split_series(files) if part.refusal} == {refusal}
    assert refused(list(files)).refusal == refusal


@pytest.mark.data
def test_every_series_of_the_shared_data_is_loaded_or_refused_with_a_reason(test_data: Path) -> None:
    """Whatever a folder holds, no image is lost in silence and nothing but a VolumeError comes out."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(test_data.rglob("*")):
        if path.is_file() and path.suffix in ("", ".dcm") and "ct_contrast" not in str(path):
            by_folder.setdefault(path.parent, []).append(path)
    loaded = 0
    for files in by_folder.values():
        parts = split_series(files)
        assert {place for part in parts for place, _ in part.sources} == set(range(len(files)))
        for part in parts:
            if part.refusal is not None:
                assert part.refusal.refusal in set(Refusal)
                continue
            try:
                volume = part.load()
            except VolumeError as error:
                assert error.refusal in (Refusal.UNREADABLE, Refusal.COLOUR)
                continue
            loaded += 1
            assert volume.array.shape[0] == len(part.sources) and np.isfinite(volume.affine).all()
    assert loaded > 40


def test_a_written_nifti_says_the_same(tmp_path: Path) -> None:
    """Viewers and MONAI read NIfTI: a file that is flipped or shifted there is a wrong image."""
    volume = load(stack())
    array, affine = volume.nifti()
    for name in ("v.nii", "v.nii.gz"):
        write_nifti(tmp_path / name, array, affine)
        data, read = read_nifti(tmp_path / name)
        assert np.array_equal(data[..., 0], array) and read == pytest.approx(affine, abs=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.nii", "v.nii.gz"]
    with pytest.raises(ValueError, match="bool"):
        write_nifti(tmp_path / "b.nii", array > 0, affine)


def test_pydicom_reads_what_these_tests_build() -> None:
    """The phantoms above are files that a scanner could have written: written and read again, they load the same."""
    again = []
    for ds in stack():
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        again.append(pydicom.dcmread(io.BytesIO(buffer.getvalue())))
    assert np.array_equal(load(again).affine, load(stack()).affine)
