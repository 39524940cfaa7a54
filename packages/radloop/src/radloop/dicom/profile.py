"""What happens to each attribute: DICOM PS3.15 Annex E and radloop's rules for what it leaves open.

The tables are in `profile_tables`. Rules for attributes that Table E.1-1 does not name (it leaves these to the
implementation):
- not in the standard's dictionary, private, retired repeating groups: removed (`retain-safe-private` keeps some);
- free text (LO LT SH ST UC UT UR PN AE) and UN: kept if on `KEPT_TEXT`, else (`clean-descriptors`) of it the words of the
  vocabulary, else emptied or replaced if the IOD demands the attribute, else removed; codes are kept if their scheme is a
  public one (`PUBLIC_SCHEMES`), else replaced;
- code strings and numbers: kept if their bytes are what the VR allows, else removed;
- UIDs: those that name a class, a scheme or a syntax (`CLASS_UIDS`) kept, all others mapped;
- bulk data (OB OW OF OD OL OV): kept if on `KEPT_BULK`, else removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from types import MappingProxyType

from pydicom._dicom_dict import DicomDictionary

from radloop.dicom.profile_tables import (
    TABLE_SOURCE,
    Row,
    attribute_type,
    image_iods,
    kinds,
    storage_classes,
    table,
    tables_digest,
)
from radloop.errors import SettingsError

__all__ = [
    "TABLE_SOURCE",
    "attribute_type",
    "image_iods",
    "storage_classes",
    "table",
    "tables_digest",
]

TEXT_VRS = frozenset({"LO", "LT", "SH", "ST", "UC", "UT", "UR", "PN", "AE"})
BULK_VRS = frozenset({"OB", "OW", "OF", "OD", "OL", "OV"})
NUMBER_VRS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})

_DESCRIPTIVE = frozenset({"LO", "LT", "SH", "ST", "UC", "UT"})

# Needed to interpret the image or to see a scanner change; vendors fill them, and the PHI gate reads them.
KEPT_TEXT = frozenset(
    str.split("""
    Manufacturer ManufacturerModelName SoftwareVersions DetectorManufacturerName DetectorManufacturerModelName
    SecondaryCaptureDeviceManufacturer SecondaryCaptureDeviceManufacturerModelName
    SecondaryCaptureDeviceSoftwareVersions ConvolutionKernel FilterType SequenceName PulseSequenceName
    ReceiveCoilName TransmitCoilName ImagedNucleus RescaleType ModalityLUTType StackID PositionReferenceIndicator
    ContrastBolusRoute Radiopharmaceutical RadiopharmaceuticalRoute AttenuationCorrectionMethod ScatterCorrectionMethod
    ReconstructionMethod DetectorLinesOfResponseUsed PlateType PhosphorType ProcessingFunction PostprocessingFunction
    AcquisitionDeviceProcessingCode
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
    SpectroscopyData VectorGridData PointCoordinatesData DoublePointCoordinatesData VectorCoordinateData
    LongPrimitivePointIndexList PrimitivePointIndexList TrianglePointIndexList EdgePointIndexList
    VertexPointIndexList LongTrianglePointIndexList LongEdgePointIndexList LongVertexPointIndexList
    FloatingPointValues AnnotationIndexList TrackPointIndexList
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
# Kept in waveform objects only (ECG, EEG and their like; audio is refused).
WAVEFORM_BULK = frozenset({"WaveformData", "WaveformPaddingValue", "ChannelMinimumValue", "ChannelMaximumValue"})
# Pictures inside an object, and what signs or encrypts the original.
REMOVED = frozenset(
    str.split("""
    IconImageSequence EncryptedAttributesSequence MACParametersSequence DirectoryRecordSequence SpecificCharacterSet
    OtherStudyNumbers
    """)
)
# Drawings and their texts: gone without clean-graphics.
GRAPHICS = frozenset(
    str.split("""
    GraphicAnnotationSequence TextObjectSequence GraphicObjectSequence CompoundGraphicSequence
    """)
)
# Images that say something about others: without their references they say nothing, so these stay, mapped.
DERIVED = frozenset({"segmentation", "height-map-segmentation", "parametric-map", "rt-dose"})
# Content items (PS3.3 section 10.2 and C.17.3): gone without clean-structured-content.
CONTENT = frozenset({"ContentSequence", "WaveformAnnotationSequence"})
CONTENT_TEXT = frozenset({"TextValue", "UnformattedTextValue"})
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
    """As it is if it is what its VR allows (CS, DS, IS, DA, DT, TM, and kept UI), else removed."""
    KEEP_TEXT = auto()
    """Decoded and written again in the output's character set."""
    CLEAN = auto()
    """Text of which the words of the vocabulary stay; if none does, what the Basic profile does (`Profile.basic`)."""
    CODE = auto()
    """Part of a coded entry: kept for a public scheme, else replaced."""
    MAP_UID = auto()
    RECURSE = auto()
    SHIFT = auto()
    AGE = auto()


@dataclass(frozen=True, slots=True)
class Option:
    """An option of PS3.15 section E.3: its name here, its code and meaning (PS3.16 CID 7050), its column of the table."""

    name: str
    code: str
    meaning: str
    column: str


OPTIONS = MappingProxyType(
    {
        option.name: option
        for option in (
            Option("clean-pixel-data", "113101", "Clean Pixel Data Option", ""),
            Option("clean-visual-features", "113102", "Clean Recognizable Visual Features Option", ""),
            Option("clean-graphics", "113103", "Clean Graphics Option", "graphics"),
            Option("clean-structured-content", "113104", "Clean Structured Content Option", "structured"),
            Option("clean-descriptors", "113105", "Clean Descriptors Option", "descriptors"),
            Option(
                "retain-full-dates",
                "113106",
                "Retain Longitudinal Temporal Information Full Dates Option",
                "full_dates",
            ),
            Option(
                "retain-modified-dates",
                "113107",
                "Retain Longitudinal Temporal Information Modified Dates Option",
                "modified_dates",
            ),
            Option("retain-patient-characteristics", "113108", "Retain Patient Characteristics Option", "patient"),
            Option("retain-device-identity", "113109", "Retain Device Identity Option", "device"),
            Option("retain-uids", "113110", "Retain UIDs Option", "uids"),
            Option("retain-safe-private", "113111", "Retain Safe Private Option", "private"),
            Option("retain-institution-identity", "113112", "Retain Institution Identity Option", "institution"),
        )
    }
)


def resolve(compound: str, kind: str | None) -> str:
    """One of X, Z, D, U of an action such as `X/Z/D`: the mildest that keeps the IOD valid (PS3.15 E.1.1).

    Where the Type is not known, the choice that keeps any IOD valid: D (or U*) before Z before X. Z allows a dummy value
    as well as an empty one: it is D for an attribute of Type 1, and replaced UIDs (U) for references of Type 2.
    """
    if compound == "Z":
        return "D" if kind == "1" else "Z"
    if compound == "X/Z/U*":
        return "X" if kind == "3" else "U"
    choices = compound.split("/")
    order = {"3": "XZDU", "2": "ZDUX", "1": "DUZX", None: "DUZX"}[kind]
    return min((c[0] for c in choices), key=order.index)


@dataclass(frozen=True)
class Profile:
    """A named profile and the options that apply.

    Attributes:
        name: `basic` or `research`.
        options: names of `OPTIONS`, in the order of their codes.
    """

    name: str
    options: tuple[str, ...]

    @property
    def columns(self) -> frozenset[str]:
        """The columns of Table E.1-1 that apply."""
        return _columns(self.options)

    @property
    def codes(self) -> tuple[tuple[str, str], ...]:
        """DeidentificationMethodCodeSequence (0012,0064): code value and meaning, PS3.16 CID 7050.

        Clean Pixel Data is not among them: it is listed for an instance whose pixels were cleaned.
        """
        chosen = [OPTIONS[name] for name in self.options if name != "clean-pixel-data"]
        return ("113100", "Basic Application Confidentiality Profile"), *((o.code, o.meaning) for o in chosen)

    @property
    def temporal(self) -> str:
        """LongitudinalTemporalInformationModified (0028,0303)."""
        return "UNMODIFIED" if self.keeps_dates else "MODIFIED" if self.shifts_dates else "REMOVED"

    @property
    def shifts_dates(self) -> bool:
        """Whether dates stay, moved by whole days."""
        return "retain-modified-dates" in self.options

    @property
    def keeps_dates(self) -> bool:
        """Whether dates stay as they are."""
        return "retain-full-dates" in self.options

    @property
    def keeps_patient(self) -> bool:
        """Whether sex, age and other coded characteristics stay."""
        return "retain-patient-characteristics" in self.options

    @property
    def keeps_uids(self) -> bool:
        """Whether UIDs stay as they are."""
        return "retain-uids" in self.options

    @property
    def cleans_pixels(self) -> bool:
        """Whether text in the pixels must be looked for and removed."""
        return "clean-pixel-data" in self.options

    @property
    def cleans_faces(self) -> bool:
        """Whether images that may show a face must not pass as they are."""
        return "clean-visual-features" in self.options

    @property
    def keeps_private(self) -> bool:
        """Whether private elements of Table E.3.10-1 stay; `action` says REMOVE of every private element."""
        return "retain-safe-private" in self.options

    def action(self, tag: int, vr: str, iod: str, parent: str = "") -> Action:
        """What to do with an element.

        Args:
            tag: tag number; vr: its VR in the file (the dictionary's for implicit VR).
            iod: of the instance; parent: keyword of the enclosing sequence, empty at the top level.
        """
        return _action(self, tag, vr, iod, parent)

    def basic(self, tag: int, vr: str, iod: str, parent: str = "") -> Action:
        """What the Basic profile alone does with an attribute: where CLEAN left nothing."""
        return _action(BASIC, tag, vr, iod, parent)

    def option(self, tag: int) -> str:
        """`K` or `C` if one of this profile's options speaks of the attribute, else an empty string."""
        row = table().get(tag)
        return "" if row is None else next((row.options[c] for c in row.options if c in self.columns), "")


@lru_cache(maxsize=256)
def _columns(options: tuple[str, ...]) -> frozenset[str]:
    return frozenset(OPTIONS[name].column for name in options) - {""}


BASIC = Profile("basic", ())
RESEARCH = Profile("research", ("retain-modified-dates", "retain-patient-characteristics"))
PROFILES = MappingProxyType({p.name: p for p in (BASIC, RESEARCH)})


def named(name: str) -> Profile:
    """The profile of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in PROFILES:
        raise SettingsError("unknown de-identification profile", expected=" or ".join(PROFILES), got=name)
    return PROFILES[name]


def chosen(name: str, options: Sequence[str] = ()) -> Profile:
    """A named profile with further options, each by its name or its code.

    Raises:
        SettingsError: no such profile or option, or two that contradict each other.
    """
    base = named(name)
    by_code = {option.code: option.name for option in OPTIONS.values()}
    wanted = set(base.options)
    for given in options:
        option = by_code.get(given, given)
        if option not in OPTIONS:
            raise SettingsError(
                "unknown de-identification option",
                expected=", ".join(f"{o.name} ({o.code})" for o in OPTIONS.values()),
                got=given,
            )
        wanted.add(option)
    if {"retain-full-dates", "retain-modified-dates"} <= wanted:
        raise SettingsError(
            "dates cannot stay and be moved: retain-full-dates (113106) excludes retain-modified-dates (113107)",
            expected="one of the two (PS3.15 section E.3.6); the profile research has retain-modified-dates",
            next_step='set profile = "basic" and options = ["retain-full-dates", "retain-patient-characteristics"]',
        )
    return Profile(name, tuple(option for option in OPTIONS if option in wanted))


def is_identifying_uid(tag: int) -> bool:
    """Whether a UI attribute names an instance, a patient's event or a device rather than a class or a scheme."""
    entry = DicomDictionary.get(tag)
    return entry is not None and entry[0] == "UI" and entry[4] not in CLASS_UIDS


# A profile is hashed by identity of its fields; a study has some thousand distinct (tag, vr, parent).
@lru_cache(maxsize=65536)
def _action(profile: Profile, tag: int, vr: str, iod: str, parent: str) -> Action:
    entry = DicomDictionary.get(tag)
    group, element = tag >> 16, tag & 0xFFFF
    if entry is None or group % 2 or group in (0x0000, 0x0002, 0x0004) or element == 0:
        return Action.REMOVE
    keyword = entry[4]
    if keyword in REMOVED or not _vr_fits(vr, entry[0]):
        return Action.REMOVE
    if keyword in GRAPHICS:
        return Action.RECURSE if "graphics" in profile.columns else Action.REMOVE
    if keyword in CONTENT:
        return Action.RECURSE if "structured" in profile.columns else Action.REMOVE
    if keyword == "WaveformSequence":
        return Action.RECURSE if kinds().get(iod) == "waveform" else Action.REMOVE
    if keyword in CONTENT_TEXT and profile.columns & {"graphics", "structured"}:
        return Action.CLEAN
    row = table().get(tag)
    if row is None:
        return _unlisted(profile, keyword, vr, iod, parent)
    optional = _optional(profile, row, vr)
    if optional is not None:
        return optional
    kind = attribute_type(iod, row.keyword, parent)
    if row.basic == "X/Z/U*" and (iod in DERIVED or kinds().get(iod, "image") != "image"):
        kind = "1"
    return _basic(row, vr, kind)


def _basic(row: Row, vr: str, kind: str | None) -> Action:
    letter = resolve(row.basic, kind)
    if letter == "X":
        return Action.REMOVE
    if letter == "Z":
        return Action.EMPTY
    if vr == "SQ":  # a code that names a person or a place is replaced whole
        return Action.DUMMY if letter == "D" and row.keyword.endswith("CodeSequence") else Action.RECURSE
    return Action.MAP_UID if vr == "UI" else Action.DUMMY


def _optional(profile: Profile, row: Row, vr: str) -> Action | None:
    """What the profile's options do to an attribute of the table; None: the Basic profile decides."""
    columns = profile.columns
    if "full_dates" in row.options and columns & {"full_dates", "modified_dates"}:
        if vr in ("DA", "DT") and profile.shifts_dates:
            return Action.SHIFT
        if vr in ("DA", "DT", "TM") or row.keyword == "TimezoneOffsetFromUTC":
            return Action.KEEP_STRING  # whole days move, so times of day stay true
    for column in ("uids", "device", "institution", "patient", "structured", "descriptors"):
        if column in columns and column in row.options:
            found = _kept(row, vr, column)
            if found is not None:
                return found
    return None


def _kept(row: Row, vr: str, column: str) -> Action | None:
    if vr == "SQ":
        return Action.RECURSE
    if vr in TEXT_VRS:
        # Who a patient is in somebody's words (EthnicGroup, Allergies, ...) is cleaned even where the table says keep.
        return Action.KEEP_TEXT if row.options[column] == "K" and column != "patient" else Action.CLEAN
    if row.options[column] != "K":
        return None
    if row.keyword in ("PatientAge", "SelectorASValue"):
        return Action.AGE
    if vr in NUMBER_VRS:
        return Action.KEEP
    return Action.KEEP_STRING if vr in ("CS", "DS", "IS", "DA", "DT", "TM", "UI") else None


def _unlisted(profile: Profile, keyword: str, vr: str, iod: str, parent: str) -> Action:
    if vr == "SQ":
        return Action.RECURSE
    if vr in NUMBER_VRS:
        return Action.KEEP
    if vr in ("CS", "DS", "IS"):
        return Action.KEEP_STRING
    if vr == "UI":
        return Action.KEEP_STRING if keyword in CLASS_UIDS or profile.keeps_uids else Action.MAP_UID
    if vr in BULK_VRS:
        kept = keyword in KEPT_BULK or (keyword in WAVEFORM_BULK and kinds().get(iod) == "waveform")
        return Action.KEEP if kept else Action.REMOVE
    if keyword in KEPT_TEXT:
        return Action.KEEP_TEXT
    if keyword in CODE_TEXT:
        return Action.CODE
    if vr in ("DA", "DT") and profile.shifts_dates:
        return Action.SHIFT
    if vr in ("DA", "DT", "TM") and (profile.shifts_dates or profile.keeps_dates):
        return Action.KEEP_STRING
    if vr in _DESCRIPTIVE and "descriptors" in profile.columns:
        return Action.CLEAN
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
