"""Character sets: whatever the source declares, at the top or in an item, what is kept reads the same in the output."""

from __future__ import annotations

import io

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence

from radloop.dicom.deidentify import Deidentifier, read
from radloop.dicom.profile import chosen
from radloop.dicom.uids import Pseudonymiser

CLEANER = Deidentifier(Pseudonymiser(bytes(range(32))), profile=chosen("research", ["113105"]))
# PS3.3 C.12.1.1.2: single-byte sets, sets with code extensions (ISO 2022), and those that stand alone; a text in each.
SETS = [
    ("ISO_IR 100", "Müller GmbH"), ("ISO_IR 101", "Škoda Łódź"), ("ISO_IR 109", "Ĝusta Ħ"), ("ISO_IR 110", "Ķīmija"),
    ("ISO_IR 144", "Рентген"), ("ISO_IR 127", "أشعة"), ("ISO_IR 126", "Ακτίνα"), ("ISO_IR 138", "רנטגן"),
    ("ISO_IR 148", "Işık Ğ"),
    ("ISO_IR 166", "เอกซเรย์"), ("ISO_IR 13", "ｴｯｸｽｾﾝ"), ("ISO_IR 192", "Müller 山田 Рентген"),
    ("GB18030", "王小东"),
    ("GBK", "王小东"),
    (["", "ISO 2022 IR 87"], "山田"), (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ山田"), (["", "ISO 2022 IR 149"], "김희중"),
    (["ISO 2022 IR 100", "ISO 2022 IR 144"], "Рентген"),
    (["ISO 2022 IR 6", "ISO 2022 IR 159", "ISO 2022 IR 87"], "山田"),
]  # fmt: skip


def image(charset: str | list[str], maker: str) -> Dataset:
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.remove_private_tags()
    ds.SpecificCharacterSet, ds.Manufacturer = charset, maker
    return ds


def through(ds: Dataset) -> Dataset:
    """Written in the source's character set, read, cleaned, written, read."""
    return read(bytes_of(CLEANER.clean(read(bytes_of(ds)), site="A")))


def bytes_of(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize(("charset", "maker"), SETS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_every_character_set_is_read_and_written_anew(charset: str | list[str], maker: str) -> None:
    """A maker's name in mojibake is a new maker to everything that counts scanners."""
    out = through(image(charset, maker))
    assert out.Manufacturer == maker
    assert out.SpecificCharacterSet == "ISO_IR 192"


@pytest.mark.parametrize(("charset", "maker"), SETS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_an_item_has_its_own_character_set(charset: str | list[str], maker: str) -> None:
    """PS3.5 section 7.5.3: an item's set overrides the data set's; in the output one set holds for all."""
    ds = image("ISO_IR 100", "Müller GmbH")
    item = Dataset()
    item.SpecificCharacterSet, item.Manufacturer = charset, maker
    ds.ContributingEquipmentSequence = Sequence([item])
    out = through(ds)
    assert out.Manufacturer == "Müller GmbH"
    assert out.ContributingEquipmentSequence[0].Manufacturer == maker
    assert "SpecificCharacterSet" not in out.ContributingEquipmentSequence[0]


def test_simplified_chinese_with_code_extensions() -> None:
    """ISO 2022 IR 58 in the bytes of PS3.5 K.2: pydicom leaves the escape in what it reads, and cannot write it."""
    ds = image("ISO_IR 6", "@" * 10)
    data = bytes_of(ds)
    chinese = b"\x1b$)A" + "王小东".encode("gb2312")
    start = data.index(b"\x08\x00\x05\x00CS")
    end = start + 8 + int.from_bytes(data[start + 6 : start + 8], "little")
    declared = b"\\ISO 2022 IR 58 "
    data = data[:start] + b"\x08\x00\x05\x00CS" + len(declared).to_bytes(2, "little") + declared + data[end:]
    out = CLEANER.clean(read(data.replace(b"@" * 10, chinese)), site="A")
    assert read(bytes_of(out)).Manufacturer == "王小东"


def test_a_name_in_any_script_is_no_word_of_a_descriptor() -> None:
    """The vocabulary knows letters of five languages; a name in others must not slip by as punctuation."""
    for charset, maker in SETS:
        ds = image(charset, "Maker")
        ds.StudyDescription = f"CT {maker} Schulter" if charset in ("ISO_IR 192", "GB18030") else f"CT {maker}"
        assert CLEANER.clean(ds, site="A").StudyDescription in ("CT", "CT Schulter"), charset
