from __future__ import annotations

import re
import statistics
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.catalog.reason import Reason
from radloop.dicom.uids import Pseudonymiser, is_placeholder, normalise
from radloop.errors import DataError, DicomError, SettingsError

KEY = bytes(range(32))
PSEUDONYMISER = Pseudonymiser(KEY)

component = st.integers(min_value=0, max_value=10**12).map(str)
uids = st.lists(component, min_size=2, max_size=4).map(lambda parts: ".".join(["1.2.276", *parts]))
identifiers = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=24).filter(
    lambda text: not is_placeholder(text)
)


@given(st.sets(uids, min_size=2, max_size=40))
def test_uid_is_injective_stable_and_valid(originals: set[str]) -> None:
    """Two instances with one pseudonym would overwrite each other in the archive; an invalid UID no PACS takes."""
    mapped = [PSEUDONYMISER.uid(uid) for uid in originals]
    assert len(set(mapped)) == len(originals)
    assert mapped == [Pseudonymiser(KEY).uid(uid) for uid in originals]
    for uid in mapped:
        assert len(uid) <= 64
        assert re.fullmatch(r"2\.25\.(0|[1-9][0-9]*)", uid)
        number = uuid.UUID(int=int(uid.removeprefix("2.25.")))
        assert (number.version, number.variant) == (8, uuid.RFC_4122)


@given(st.lists(component, min_size=1, max_size=5))
def test_standard_uids_stay(parts: list[str]) -> None:
    """A mapped SOP class or transfer syntax would make every image unreadable."""
    uid = ".".join(["1.2.840.10008", *parts])
    assert PSEUDONYMISER.uid(uid) == uid


def test_a_root_that_only_looks_standard_is_mapped() -> None:
    """1.2.840.100081 is somebody's own root: its UIDs identify instances."""
    assert PSEUDONYMISER.uid("1.2.840.100081.1").startswith("2.25.")


def test_padding_does_not_make_another_uid() -> None:
    """The same UID comes padded from one reader and bare from another; references would break."""
    assert PSEUDONYMISER.uid("1.2.3\0") == PSEUDONYMISER.uid("1.2.3 ") == PSEUDONYMISER.uid("1.2.3")


def test_an_empty_uid_is_refused() -> None:
    """All instances without a UID would fall on one pseudonym."""
    with pytest.raises(DicomError, match="empty") as caught:
        PSEUDONYMISER.uid(" \0")
    assert caught.value.reason == Reason.MISSING_UID


@given(st.sets(identifiers, min_size=2, max_size=30))
def test_patients_do_not_meet(ids: set[str]) -> None:
    """Two people under one pseudonym spoil labels, splits and withdrawal."""
    different = {normalise(one) for one in ids}
    assert len({PSEUDONYMISER.patient(one, "A") for one in ids}) == len(different)


@given(identifiers, identifiers)
def test_case_and_spaces_do_not_make_another_patient(patient_id: str, issuer: str) -> None:
    """One patient typed two ways would stand in training and in test at once."""
    plain = PSEUDONYMISER.patient(patient_id, issuer)
    assert re.fullmatch(r"P[0-9a-f]{32}", plain)
    assert PSEUDONYMISER.patient(f"  {patient_id} ", f"{issuer} ") == plain
    assert PSEUDONYMISER.patient(patient_id.upper().lower(), issuer) == PSEUDONYMISER.patient(
        patient_id.upper().lower().casefold(), issuer
    )


def test_inner_spaces_collapse_and_issuers_separate() -> None:
    """`12 34` and `12  34` are one patient; patient 12 of two hospitals are two."""
    assert PSEUDONYMISER.patient("12 34", "A") == PSEUDONYMISER.patient("12  34", "A")
    assert PSEUDONYMISER.patient("1234", "A") != PSEUDONYMISER.patient("1234", "B")


@given(identifiers, identifiers, identifiers)
def test_field_boundaries_cannot_meet(a: str, b: str, c: str) -> None:
    """Without length prefixes, issuer `A` patient `B1` and issuer `AB` patient `1` would be one."""
    joined = PSEUDONYMISER.patient(b + c, a)
    if (a.casefold(), (b + c).casefold()) != ((a + b).casefold(), c.casefold()):
        assert joined != PSEUDONYMISER.patient(c, a + b)


def test_domains_cannot_meet() -> None:
    """An accession number equal to a patient id must not give away that it is."""
    pseudonyms = {
        PSEUDONYMISER.patient("4711x", "A")[1:],
        PSEUDONYMISER.accession("4711x", "A")[1:],
        PSEUDONYMISER.file("A/4711x")[1:],
    }
    assert len(pseudonyms) == 3


@pytest.mark.parametrize(
    "placeholder",
    [
        "",
        " ",
        "0",
        "000000",
        "unknown",
        "UNKNOWN",
        "Anonymous",
        "na",
        "N/A",
        "test",
        "n.n.",
        "-",
        "???",
        "xxx",
        "none",
        "99999",
        "Not Available",
        "no-id",
        "\0\0",
    ],
)
def test_placeholder_ids_are_quarantined(placeholder: str) -> None:
    """A thousand `unknown`s would become one patient: the split, the counts and the labels would all be wrong."""
    with pytest.raises(DicomError, match="cannot be told from others") as caught:
        PSEUDONYMISER.patient(placeholder, "A")
    assert caught.value.reason == Reason.NO_PATIENT_ID


@pytest.mark.parametrize("real", ["1", "42", "0001", "TESTA-17", "NOEL", "9999", "X1", "00700", "ANON-0042"])
def test_short_and_odd_but_real_ids_are_taken(real: str) -> None:
    """A research folder numbers its patients 1, 2, 3; refusing them would lose real data."""
    assert PSEUDONYMISER.patient(real, "A").startswith("P")


def test_blank_accession_and_path_have_no_key() -> None:
    """A key for "none" would join every label without an accession number to every study without one."""
    with pytest.raises(DataError, match="blank accession"):
        PSEUDONYMISER.accession("  ", "A")
    with pytest.raises(DataError, match="empty path"):
        PSEUDONYMISER.file("./")


def test_file_keys_do_not_depend_on_how_a_path_is_written() -> None:
    """Labels made on Windows or macOS must find the images read on Linux."""
    assert (
        PSEUDONYMISER.file("a/b/ü.png")
        == PSEUDONYMISER.file(".\\a\\b\\u\u0308.png")
        == PSEUDONYMISER.file("a//b/ü.png")
    )
    assert PSEUDONYMISER.file("a/b.png") != PSEUDONYMISER.file("a/B.png")


@given(identifiers)
def test_day_shift_moves_into_the_past_by_whole_days(patient: str) -> None:
    """A zero shift leaves real dates in the archive; a future date breaks age arithmetic."""
    pseudonym = PSEUDONYMISER.patient(patient, "A")
    shift = PSEUDONYMISER.day_shift(pseudonym)
    assert -3650 <= shift <= -1
    assert shift == Pseudonymiser(KEY).day_shift(pseudonym)


def test_fraction_is_uniform_and_stable() -> None:
    """A skewed fraction fills the test set with too many or too few patients."""
    fractions = [PSEUDONYMISER.fraction(PSEUDONYMISER.patient(f"patient {n}", "A")) for n in range(4000)]
    assert all(0 <= f < 1 for f in fractions)
    assert abs(statistics.mean(fractions) - 0.5) < 0.02
    assert abs(statistics.stdev(fractions) - 12**-0.5) < 0.01
    assert len(set(fractions)) == 4000


def test_another_key_gives_other_pseudonyms() -> None:
    """Two projects must not be joinable without their keys."""
    other = Pseudonymiser(bytes(32))
    assert other.key_id != PSEUDONYMISER.key_id
    assert re.fullmatch(r"[0-9a-f]{8}", other.key_id)
    assert other.uid("1.2.3") != PSEUDONYMISER.uid("1.2.3")
    assert other.patient("abc", "A") != PSEUDONYMISER.patient("abc", "A")
    assert other.fraction("P1") != PSEUDONYMISER.fraction("P1")


def test_pseudonyms_do_not_change_between_releases() -> None:
    """These are in archives: a change here cuts every archive off from its crosswalk and its labels."""
    assert PSEUDONYMISER.key_id == GOLDEN[0]
    assert PSEUDONYMISER.uid("1.2.3") == GOLDEN[1]
    assert PSEUDONYMISER.patient("ABC 1", "A") == GOLDEN[2]
    assert PSEUDONYMISER.accession("X7", "A") == GOLDEN[3]
    assert PSEUDONYMISER.file("a/b.png") == GOLDEN[4]
    assert PSEUDONYMISER.day_shift("P1") == GOLDEN[5]
    assert PSEUDONYMISER.fraction("P1") == GOLDEN[6]


def test_a_short_key_is_refused_and_no_key_is_shown() -> None:
    """A guessable key undoes all pseudonyms; a key in a log does too."""
    with pytest.raises(SettingsError, match="too short"):
        Pseudonymiser(b"x" * 31)
    assert "bytes" not in repr(PSEUDONYMISER)
    assert KEY.hex() not in repr(PSEUDONYMISER)


GOLDEN = (
    "d32f0cb5",
    "2.25.32693511667033723685514080325645315308",
    "P808403823aa13c4cf7eff4a33ee938e9",
    "A45dc89f70237b69ff0d26ddada0feee7",
    "F506ea0681e95c6fa92471c9d8fad738d",
    -2083,
    0.047300049489152785,
)
