"""What happens to each attribute: DICOM PS3.15 Table E.1-1 (edition 2024e) and radloop's rules for what it leaves open.

`profile_table.csv` carries the facts of Table E.1-1: the Basic profile's action and one column for each option.
`iod_types.csv` carries from PS3.3 the Type (1, 2 or 3; a conditional attribute counts as its unconditional one) of the
attributes whose action depends on it, by enclosing sequence; `image_iods.csv` the image SOP classes and their IODs.

Rules for attributes that Table E.1-1 does not name (it leaves these to the implementation):
- not in the standard's dictionary, private, retired repeating groups: removed;
- free text (LO LT SH ST UC UT UR PN AE) and UN: kept if on `KEPT_TEXT`, else emptied or replaced if the IOD demands the
  attribute, else removed; codes are kept if their scheme is a public one (`PUBLIC_SCHEMES`), else replaced;
- code strings and numbers: kept if their bytes are what the VR allows, else removed;
- UIDs: those that name a class, a scheme or a syntax (`CLASS_UIDS`) kept, all others mapped;
- bulk data (OB OW OF OD OL OV): kept if on `KEPT_BULK`, else removed.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

from pydicom._dicom_dict import DicomDictionary

from radloop.errors import SettingsError

TABLE_SOURCE = "DICOM PS3.15 2024e, Table E.1-1"

TEXT_VRS = frozenset({"LO", "LT", "SH", "ST", "UC", "UT", "UR", "PN", "AE"})
BULK_VRS = frozenset({"OB", "OW", "OF", "OD", "OL", "OV"})
NUMBER_VRS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})

# Needed to interpret the image or to see a scanner change; vendors fill them, and the PHI gate reads them.
KEPT_TEXT = frozenset(
    str.split("""
    Manufacturer ManufacturerModelName SoftwareVersions DetectorManufacturerName DetectorManufacturerModelName
    SecondaryCaptureDeviceManufacturer SecondaryCaptureDeviceManufacturerModelName
    SecondaryCaptureDeviceSoftwareVersions ConvolutionKernel FilterType SequenceName PulseSequenceName
    ReceiveCoilName TransmitCoilName ImagedNucleus RescaleType ModalityLUTType StackID
    """)
)
CODE_TEXT = frozenset(str.split("CodeValue CodingSchemeDesignator CodingSchemeVersion CodeMeaning LongCodeValue"))
KEPT_BULK = frozenset(
    str.split("""
    PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths LUTData ICCProfile
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    AlphaPaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
    SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData
    SegmentedAlphaPaletteColorLookupTableData RecommendedDisplayCIELabValueList
    """)
)
CLASS_UIDS = frozenset(
    str.split("""
    SOPClassUID RelatedGeneralSOPClassUID OriginalSpecializedSOPClassUID SOPClassesInStudy ReferencedSOPClassUID
    SOPClassesSupported CodingSchemeUID ContextGroupExtensionCreatorUID ContextUID MappingResourceUID
    StoredInstanceTransferSyntaxUID AvailableTransferSyntaxUID ReferencedSOPClassUIDInFile
    ReferencedRelatedGeneralSOPClassUIDInFile PertinentSOPClassesInStudy PertinentSOPClassesInSeries
    """)
)
# Pictures, drawings, text and sounds inside an image object, and what signs the original bytes.
REMOVED_SEQUENCES = frozenset(
    str.split("""
    IconImageSequence GraphicAnnotationSequence ContentSequence WaveformSequence EncryptedAttributesSequence
    MACParametersSequence DirectoryRecordSequence TextObjectSequence GraphicObjectSequence CompoundGraphicSequence
    """)
)
# PS3.16 section 8 and HL7's external schemes: public vocabularies, whose codes name no person or place of a hospital.
PUBLIC_SCHEMES = frozenset(
    str.split("""
    DCM SCT SRT SNM3 99SDM UCUM LN FMA RADLEX NEU UMLS MSH NCIt NDC RXNORM I9 I10 I11 I9C I10P ICDO3 BI BARI IBSI MDC
    ITIS_TSN PUBCHEM_CID RADELEMENT MA UBERON C4 CD2 CPT HPC ISO639_1 ISO639_2 ISO3166_1 ISO3166_2
    """)
)


class Action(Enum):
    """What is done to one element."""

    REMOVE = auto()
    EMPTY = auto()
    DUMMY = auto()
    KEEP = auto()
    """Bytes as they are: numbers and bulk data."""
    KEEP_STRING = auto()
    """As it is if it is what its VR allows (CS, DS, IS, TM, and kept UI), else removed."""
    KEEP_TEXT = auto()
    """Decoded and written again in the output's character set."""
    CODE = auto()
    """Part of a coded entry: kept for a public scheme, else replaced."""
    MAP_UID = auto()
    RECURSE = auto()
    SHIFT = auto()
    AGE = auto()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of Table E.1-1: the Basic profile's action, and the options' (`K` keep, `C` clean)."""

    keyword: str
    basic: str
    options: Mapping[str, str]


@lru_cache(maxsize=1)
def table() -> Mapping[int, Row]:
    """Table E.1-1 by tag number; the repeating groups 50xx and 60xx and private groups are handled by rule."""
    rows: dict[int, Row] = {}
    for record in _read("profile_table.csv"):
        tag, keyword, basic = record.pop("tag"), record.pop("keyword"), record.pop("basic")
        if tag != "private" and "x" not in tag:
            options = {name: action for name, action in record.items() if action}
            rows[int(tag, 16)] = Row(keyword, basic, MappingProxyType(options))
    return MappingProxyType(rows)


@lru_cache(maxsize=1)
def image_iods() -> Mapping[str, str]:
    """SOP class UID to IOD, for every image storage class but the video ones."""
    return MappingProxyType({r["sop_class_uid"]: r["iod"] for r in _read("image_iods.csv")})


@lru_cache(maxsize=1)
def _types() -> Mapping[tuple[str, str], tuple[str, Mapping[str, str]]]:
    types: dict[tuple[str, str], tuple[str, Mapping[str, str]]] = {}
    for r in _read("iod_types.csv"):
        exceptions: dict[str, str] = {}
        for group in filter(None, r["exceptions"].split(";")):
            kind, iods = group.split(":")
            exceptions.update(dict.fromkeys(iods.split(), kind))
        types[r["keyword"], r["parent"]] = (r["type"], exceptions)
    return MappingProxyType(types)


def attribute_type(iod: str, keyword: str, parent: str = "") -> str | None:
    """The Type (`1`, `2` or `3`) of an attribute in an IOD, where it decides something; None if not tabled.

    Args:
        iod: as `image_iods` names it.
        keyword: the attribute.
        parent: keyword of the sequence it stands in, empty at the top level.
    """
    entry = _types().get((keyword, parent))
    return None if entry is None else entry[1].get(iod, entry[0])


def resolve(compound: str, kind: str | None) -> str:
    """One of X, Z, D, U of a compound action such as `X/Z/D`: the mildest that keeps the IOD valid (PS3.15 E.1.1).

    Where the Type is not known, the choice that keeps any IOD valid: D (or U*) before Z before X.
    """
    choices = compound.split("/")
    order = {"3": "XZDU", "2": "ZDUX", "1": "DUZX", None: "DUZX"}[kind]
    return min((c[0] for c in choices), key=order.index)


@dataclass(frozen=True)
class Profile:
    """A named profile: the Basic profile and its options.

    Attributes:
        name: `basic` or `research`.
        options: columns of the table that apply.
        codes: DeidentificationMethodCodeSequence (0012,0064), code value and meaning, PS3.16 CID 7050.
        temporal: LongitudinalTemporalInformationModified (0028,0303).
    """

    name: str
    options: tuple[str, ...]
    codes: tuple[tuple[str, str], ...]
    temporal: str

    @property
    def shifts_dates(self) -> bool:
        """Whether dates stay, moved by whole days."""
        return "modified_dates" in self.options

    @property
    def keeps_patient(self) -> bool:
        """Whether sex, age and other coded characteristics stay."""
        return "patient" in self.options

    def action(self, tag: int, vr: str, iod: str, parent: str = "") -> Action:
        """What to do with an element.

        Args:
            tag: tag number; vr: its VR in the file (the dictionary's for implicit VR).
            iod: of the instance; parent: keyword of the enclosing sequence, empty at the top level.
        """
        return _action(self, tag, vr, iod, parent)

    def option(self, tag: int) -> str:
        """`K` or `C` if one of this profile's options speaks of the attribute, else an empty string."""
        row = table().get(tag)
        return "" if row is None else next((row.options[o] for o in self.options if o in row.options), "")


BASIC = Profile("basic", (), (("113100", "Basic Application Confidentiality Profile"),), "REMOVED")
RESEARCH = Profile(
    "research",
    ("modified_dates", "patient"),
    (
        ("113100", "Basic Application Confidentiality Profile"),
        ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
        ("113108", "Retain Patient Characteristics Option"),
    ),
    "MODIFIED",
)
PROFILES = MappingProxyType({p.name: p for p in (BASIC, RESEARCH)})


def named(name: str) -> Profile:
    """The profile of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in PROFILES:
        raise SettingsError("unknown de-identification profile", expected=" or ".join(PROFILES), got=name)
    return PROFILES[name]


def tables_digest() -> str:
    """sha256 over the three data files."""
    digest = hashlib.sha256()
    for name in ("profile_table.csv", "iod_types.csv", "image_iods.csv"):
        digest.update(resources.files(__package__).joinpath(name).read_bytes())
    return digest.hexdigest()


def is_identifying_uid(tag: int) -> bool:
    """Whether a UI attribute names an instance, a patient's event or a device rather than a class or a scheme."""
    entry = DicomDictionary.get(tag)
    return entry is not None and entry[0] == "UI" and entry[4] not in CLASS_UIDS


# A profile is hashed by identity of its fields; a study has some thousand distinct (tag, vr, parent).
@lru_cache(maxsize=65536)
def _action(profile: Profile, tag: int, vr: str, iod: str, parent: str) -> Action:
    entry = DicomDictionary.get(tag)
    group, element = tag >> 16, tag & 0xFFFF
    # SpecificCharacterSet is written anew for what the output holds.
    if entry is None or group % 2 or group in (0x0000, 0x0002, 0x0004) or element == 0:
        return Action.REMOVE
    keyword = entry[4]
    if (
        keyword in REMOVED_SEQUENCES
        or keyword in ("SpecificCharacterSet", "OtherStudyNumbers")
        or not _vr_fits(vr, entry[0])
    ):
        return Action.REMOVE
    row = table().get(tag)
    if row is None:
        return _unlisted(profile, keyword, vr, iod, parent)
    optional = _optional(profile, row, vr)
    if optional is not None:
        return optional
    letter = resolve(row.basic, attribute_type(iod, keyword, parent) if "/" in row.basic else None)
    return _basic(letter, vr)


def _basic(letter: str, vr: str) -> Action:
    if letter == "X":
        return Action.REMOVE
    if letter == "Z":
        return Action.EMPTY
    if vr == "SQ":
        return Action.RECURSE
    return Action.MAP_UID if vr == "UI" else Action.DUMMY


def _optional(profile: Profile, row: Row, vr: str) -> Action | None:
    if profile.shifts_dates and "modified_dates" in row.options:
        if vr in ("DA", "DT"):
            return Action.SHIFT
        if vr == "TM" or row.keyword == "TimezoneOffsetFromUTC":
            return Action.KEEP_STRING  # whole days move, so times of day stay true
    # Characteristics that are text (EthnicGroup, Allergies, ...) would need a person to read them: Basic's action.
    if profile.keeps_patient and row.options.get("patient") == "K" and vr not in TEXT_VRS:
        if row.keyword in ("PatientAge", "SelectorASValue"):
            return Action.AGE
        return Action.KEEP if vr in NUMBER_VRS else Action.KEEP_STRING
    return None


def _unlisted(profile: Profile, keyword: str, vr: str, iod: str, parent: str) -> Action:
    if vr == "SQ":
        return Action.RECURSE
    if vr in NUMBER_VRS:
        return Action.KEEP
    if vr in ("CS", "DS", "IS"):
        return Action.KEEP_STRING
    if vr == "UI":
        return Action.KEEP_STRING if keyword in CLASS_UIDS else Action.MAP_UID
    if vr in BULK_VRS:
        return Action.KEEP if keyword in KEPT_BULK else Action.REMOVE
    if keyword in KEPT_TEXT:
        return Action.KEEP_TEXT
    if keyword in CODE_TEXT:
        return Action.CODE
    if vr in ("DA", "DT") and profile.shifts_dates:
        return Action.SHIFT
    if vr == "TM" and profile.shifts_dates:
        return Action.KEEP_STRING
    kind = attribute_type(iod, keyword, parent)
    if vr == "AS" or vr == "UN" or kind in (None, "3") or keyword == "URNCodeValue":
        return Action.REMOVE
    return Action.EMPTY if kind == "2" else Action.DUMMY


def _vr_fits(vr: str, standard: str) -> bool:
    """Whether an element's VR is one the dictionary allows; another one may hide text in a number, or hold garbage."""
    if vr in standard.split(" or ") or vr == standard:
        return True
    allowed = set(standard.split(" or "))
    return (vr in BULK_VRS and bool(allowed & BULK_VRS)) or (vr in NUMBER_VRS and bool(allowed & NUMBER_VRS))


def _read(name: str) -> list[dict[str, str]]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
