"""Synthetic identities, and a `plant` that puts one wherever a real hospital leaves it in an instance. Nobody here exists."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence


class Uniform(Protocol):
    """Both `random.Random` and `numpy.random.Generator` are one."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


@dataclass(frozen=True)
class Script:
    """Names of one language, with the SpecificCharacterSet (0008,0005) that writes them."""

    charsets: tuple[str, ...]
    people: tuple[str, ...]  # PN values: family^given, component groups separated by "="
    cities: tuple[str, ...]
    hospitals: tuple[str, ...]


SCRIPTS: dict[str, Script] = {
    "english": Script(
        ("ISO_IR 100",),
        ("Harrowgate^Millicent^Rose^Mrs", "Okonkwo-Bright^Tobias", "Featherstone^Ambrose^J", "Quillfeather^Imogen"),
        ("Nether Wallop", "Little Snoring", "Ashby Puerorum"),
        ("Thornbury Cottage Hospital", "Marlstone Infirmary"),
    ),
    "german": Script(
        ("ISO_IR 100",),
        ("Grünwäldchen^Käthe", "Strößner^Jürgen^^Dr.", "Müllerschön^Zoë", "Haßdenteufel^Björn"),
        ("Übersee", "Königs Wusterhausen", "Bad Säckingen"),
        ("Klinikum Südhöhe", "Universitätsklinik Grünau"),
    ),
    "french": Script(
        ("ISO_IR 192",),
        ("Lefèvre-Beauséjour^Anaïs", "Châteauneuf^Gaël", "Côté-Ménard^Noémie"),
        ("Saint-Étienne-du-Bois", "Besançon"),
        ("Hôpital de la Providence", "Clinique des Érables"),
    ),
    "japanese": Script(
        ("", "ISO 2022 IR 87"),
        ("Yamashiro^Haruto=山城^陽翔=やましろ^はると", "Kurosawa^Mitsuko=黒沢^光子=くろさわ^みつこ"),
        ("松本市", "函館市"),
        ("桜丘総合病院", "青葉医療センター"),
    ),
    "korean": Script(
        ("", "ISO 2022 IR 149"),
        ("Namgoong^Seoyeon=南宮^瑞姸=남궁^서연", "Hwangbo^Dongwook=皇甫^東旭=황보^동욱"),
        ("전주시", "강릉시"),
        ("한빛대학교병원", "새봄의료원"),
    ),
    "russian": Script(
        ("ISO_IR 144",),
        ("Преображенский^Филипп^Филиппович", "Голенищева^Аграфена^Львовна"),
        ("Великие Луки", "Кострома"),
        ("Областная больница", "Клиника Здравница"),
    ),
    "chinese": Script(
        ("GB18030",),
        ("Ouyang^Xiaodong=欧阳^小东", "Zhuge^Minhua=诸葛^敏华"),
        ("景德镇市", "敦煌市"),
        ("康宁医院", "济世堂医院"),
    ),
    "greek": Script(
        ("ISO_IR 126",),
        ("Παπαδημητρίου^Καλλιόπη", "Χατζηγεωργίου^Σπύρος"),
        ("Μεσολόγγι", "Καρπενήσι"),
        ("Γενικό Νοσοκομείο", "Κλινική Υγεία"),
    ),
}


MORE_SCRIPTS: dict[str, Script] = SCRIPTS | {
    "polish": Script(
        ("ISO_IR 101",),
        ("Grzegżółkowska^Świętosława", "Wąsowicz-Łęcka^Żaneta", "Brzęczyszczykiewicz^Dąbrówka"),
        ("Szczebrzeszyn", "Żywiec"),
        ("Szpital pod Jodłami", "Przychodnia Źródlana"),
    ),
    "turkish": Script(
        ("ISO_IR 148",),
        ("Karagözoğlu^Şükriye", "Yıldırımtaş^Çağdaş"),
        ("Kırıkkale", "Şanlıurfa"),
        ("Gülhisar Hastanesi", "Boğazkent Tıp Merkezi"),
    ),
    "hebrew": Script(
        ("ISO_IR 138",),
        ("ירושלמסקי^אביגיל", "בן-שחרית^נתנאל"),
        ("צפתון", "נהריתא"),
        ("בית החולים הכרמלית", "מרפאת השקמה"),
    ),
    "arabic": Script(
        ("ISO_IR 127",),
        ("القيروانية^زبيدة", "البغداديون^حسان"),
        ("سيدي بوسعيد", "الزرقاوية"),
        ("مستشفى الياسمين", "عيادة النخيل"),
    ),
    "thai": Script(
        ("ISO_IR 166",),
        ("ศรีสุวรรณรัตน์^มาลัยพร", "วงศ์ประเสริฐ^ธนกฤต"),
        ("แม่ฮ่องสอน", "อุบลราชธานี"),
        ("โรงพยาบาลดอกบัว", "คลินิกร่มเย็น"),
    ),
    "kana": Script(
        ("ISO_IR 13", "ISO 2022 IR 87"),
        ("ﾔﾏﾓﾄﾀﾆ^ｷｸﾖ=山本谷^菊代=やまもとたに^きくよ", "ﾊﾔｼﾊﾞﾗ^ｹﾝｼﾞﾛｳ=林原^健次郎=はやしばら^けんじろう"),
        ("ﾅｶﾞﾔﾏｼ", "ﾄﾔﾏｼ"),
        ("ｻｸﾗｶﾞﾜﾋﾞｮｳｲﾝ", "ﾐﾄﾞﾘﾉｲｲﾝ"),
    ),
    "unicode": Script(
        ("ISO_IR 192",),
        ("Þórðardóttir^Sæunn", "Đorđevićanin^Žarko", "Nguyễn Phước^Bảo Ngọc", "Ó Dálaigh^Séafra"),
        ("Seyðisfjörður", "Đà Lạt"),
        ("Sjúkrahús Norðurlands", "Bệnh viện Hoa Sen"),
    ),
}
"""With scripts that the phantom hospital does not draw."""


@dataclass(frozen=True)
class Identity:
    """One synthetic patient and the people and places around them; all values are DICOM text of `charsets`."""

    charsets: tuple[str, ...]
    patient_name: str
    patient_id: str
    issuer: str
    other_id: str
    birth_date: str  # YYYYMMDD
    sex: str  # M, F
    age: str  # NNNY
    address: str
    city: str
    phone: str
    email: str
    birth_name: str
    mother: str
    occupation: str
    institution: str
    department: str
    station: str
    device_serial: str
    referring: str
    performing: str
    operator: str
    reader: str
    comment: str

    @property
    def spoken_name(self) -> str:
        """The name as a person would type it: given name first, the last component group (the native script)."""
        family, given = (self.patient_name.split("=")[1:2] or [self.patient_name])[0].split("^")[:2]
        return f"{given} {family}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every string of this identity that may stand nowhere in a de-identified instance, its file name or a log."""
        words = [w for n in (self.patient_name, self.mother) for w in n.replace("=", "^").split("^") if len(w) > 3]
        staff = (self.referring, self.performing, self.operator, self.reader)
        words += [n.split("^")[0] for n in staff]
        words += [self.patient_id, self.other_id, self.address, self.phone, self.email, self.institution]
        return (*words, self.birth_name, self.comment, self.device_serial, self.birth_date, self.spoken_name)


def identity(seed: int, scripts: Mapping[str, Script] = SCRIPTS) -> Identity:
    """The synthetic patient number `seed`; the same seed gives the same patient, different seeds different ids."""
    draw = random.Random(f"radloop-identity-{seed}")
    script = scripts[draw.choice(sorted(scripts))]
    name, mother, *staff = (draw.choice(script.people) for _ in range(6))
    year, city = draw.randrange(1921, 2003), draw.choice(script.cities)
    spoken = " ".join(reversed((name.split("=")[1:2] or [name])[0].split("^")[:2]))
    phone = f"+49-30-{draw.randrange(10**6, 10**7)}"
    return Identity(
        charsets=script.charsets,
        patient_name=name,
        patient_id=f"{draw.choice('HKMW')}{seed:05d}-{draw.randrange(1000, 10000)}",
        issuer=draw.choice(("", "", f"MPI-{draw.randrange(100, 1000)}")),
        other_id=f"SSN{draw.randrange(10**8, 10**9)}",
        birth_date=f"{year}{draw.randrange(1, 13):02d}{draw.randrange(1, 29):02d}",
        sex=draw.choice("MF"),
        age=f"{min(2024 - year, 103):03d}Y",
        address=f"{city} Lindenallee {draw.randrange(100, 1000)}",
        city=city,
        phone=phone,
        email=f"patient{seed}.{draw.randrange(1000, 10000)}@mail.example",
        birth_name=f"Lilienthal{draw.randrange(100, 1000)}^Rosamunde",
        mother=mother,
        occupation=draw.choice(("lamp keeper", "bell founder", "cartographer")),
        institution=draw.choice(script.hospitals),
        department=draw.choice(("Radiology North Wing", "Imaging Pavilion East")),
        station=f"STN{draw.randrange(1000, 10000)}",
        device_serial=f"SN{draw.randrange(10**7, 10**8)}",
        referring=staff[0],
        performing=staff[1],
        operator=staff[2],
        reader=staff[3],
        comment=f"{spoken} tel {phone} known here since 2009",
    )


def plant(ds: Dataset, identity: Identity, rng: Uniform) -> None:
    """Write an identity into an instance, in place, as real archives hold it: plain, nested, private and in free text.

    SpecificCharacterSet becomes the identity's. UIDs, dates, pixels and a present AccessionNumber stay as they are.

    Args:
        ds: any instance with its UIDs set.
        identity: whose.
        rng: decides what varies from study to study (accession number, which comments are filled in).
    """
    charsets = list(identity.charsets)
    ds.SpecificCharacterSet = charsets if len(charsets) > 1 else charsets[0]
    _plant_patient(ds, identity)
    _plant_places(ds, identity)
    if not ds.get("AccessionNumber"):
        ds.AccessionNumber = f"ACC{int(rng.random() * 10**9):09d}"
    ds.StudyID = f"S{int(rng.random() * 10**6):06d}"
    _plant_free_text(ds, identity, rng)
    _plant_sequences(ds, identity)
    _plant_private(ds, identity)


def _plant_patient(ds: Dataset, who: Identity) -> None:
    ds.PatientName, ds.PatientID = who.patient_name, who.patient_id
    if who.issuer:
        ds.IssuerOfPatientID = who.issuer
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = who.birth_date, who.sex, who.age
    ds.PatientBirthTime = "031500"
    ds.OtherPatientNames = who.mother
    ds.PatientBirthName, ds.PatientMotherBirthName = who.birth_name, who.mother
    ds.PatientAddress = who.address
    ds.PatientTelephoneNumbers = who.phone
    ds.PatientTelecomInformation = who.email
    ds.Occupation = who.occupation
    ds.EthnicGroup = "GROUP-" + who.station[-4:]
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID, other.TypeOfPatientID = who.other_id, "STATE", "TEXT"
    ds.OtherPatientIDsSequence = Sequence([other])


def _plant_places(ds: Dataset, who: Identity) -> None:
    ds.InstitutionName, ds.InstitutionAddress = who.institution, who.address
    ds.InstitutionalDepartmentName = who.department
    ds.StationName, ds.DeviceSerialNumber = who.station, who.device_serial
    ds.ReferringPhysicianName, ds.PerformingPhysicianName = who.referring, who.performing
    ds.OperatorsName, ds.NameOfPhysiciansReadingStudy = [who.operator, who.reader], who.reader
    ds.ReferringPhysicianTelephoneNumbers = who.phone
    ds.RequestingService = who.department


def _plant_free_text(ds: Dataset, who: Identity, rng: Uniform) -> None:
    comments = ("PatientComments", "AdditionalPatientHistory", "ImageComments", "StudyComments")
    for keyword in comments:
        if rng.random() < 0.7:
            setattr(ds, keyword, who.comment)
    ds.StudyDescription = f"Chest {who.spoken_name}"
    ds.SeriesDescription = f"PA {who.patient_id}"
    ds.ProtocolName = f"THORAX {who.operator.split('=')[0].split('^')[0]}"
    ds.RequestedProcedureDescription = f"{who.birth_date} {who.spoken_name}"


def _plant_sequences(ds: Dataset, who: Identity) -> None:
    context = Dataset()  # three deep: request > protocol code > protocol context
    context.ValueType, context.TextValue, context.PersonName = "TEXT", who.comment, who.patient_name
    protocol = Dataset()
    protocol.CodeValue, protocol.CodingSchemeDesignator, protocol.CodeMeaning = "P1", "99LOCAL", who.spoken_name
    protocol.ProtocolContextSequence = Sequence([context])
    request = Dataset()
    request.RequestedProcedureID, request.ScheduledProcedureStepID = "RP" + who.station, "SPS" + who.station
    request.ScheduledProcedureStepDescription = f"for {who.spoken_name}"
    request.RequestingPhysician = who.referring
    request.ScheduledProtocolCodeSequence = Sequence([protocol])
    ds.RequestAttributesSequence = Sequence([request])

    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    study.ReferencedSOPInstanceUID = str(ds.get("StudyInstanceUID", "1.2.3.4"))
    ds.ReferencedStudySequence = Sequence([study])

    modified = Dataset()  # an item with a character set of its own
    modified.SpecificCharacterSet = "ISO_IR 192"
    modified.PatientName, modified.PatientID = who.patient_name, who.other_id
    original = Dataset()
    original.ModifiedAttributesSequence = Sequence([modified])
    original.AttributeModificationDateTime = "20240101120000"
    original.ModifyingSystem, original.SourceOfPreviousValues = who.station, who.institution
    original.ReasonForTheAttributeModification = "CORRECT"
    ds.OriginalAttributesSequence = Sequence([original])


def _plant_private(ds: Dataset, who: Identity) -> None:
    block = ds.private_block(0x0011, "ACME WARD 1.1", create=True)
    block.add_new(0x01, "LO", who.patient_id)
    block.add_new(0x02, "PN", who.patient_name)
    block.add_new(0x03, "UN", who.spoken_name.encode("utf-8"))
    inner = Dataset()
    inner.PatientName, inner.PatientComments = who.patient_name, who.comment
    block.add_new(0x04, "SQ", Sequence([inner]))
    ds.private_block(0x0029, "ACME HEADER", create=True).add_new(0x10, "OB", who.patient_id.encode("ascii") + b"  ")
