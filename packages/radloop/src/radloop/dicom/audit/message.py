"""One ledger row as an AuditMessage in XML (PS3.15 section A.5.1). Whom it is about stands as a pseudonym.

The codes are those of PS3.16 context groups 400 (event) and 401 (event type), coding scheme DCM.
"""

from __future__ import annotations

import base64
import json
import os
from typing import Any
from xml.etree import ElementTree

import msgspec

from radloop.catalog.ledger import Kind
from radloop.catalog.schema import LedgerRow

_PATIENT_RECORD = ("110110", "Patient Record")
_ACCESSED = ("110103", "DICOM Instances Accessed")
_TRANSFERRED = ("110104", "DICOM Instances Transferred")
_ALERT = ("110113", "Security Alert")


class _Event(msgspec.Struct, frozen=True):
    """Event code and meaning, action (C R U D E), event type code and meaning."""

    code: tuple[str, str]
    action: str
    type: tuple[str, str] | None = None


_EVENTS = {
    "read": _Event(_PATIENT_RECORD, "R"),  # of the crosswalk
    "rotate": _Event(_ALERT, "E", ("110129", "Security Configuration")),
    "landing read": _Event(_ACCESSED, "R"),
    "quarantine show": _Event(_ACCESSED, "R"),
    "retried": _Event(_ACCESSED, "U"),
    "released": _Event(_ACCESSED, "U"),
    "purged": _Event(_ACCESSED, "D"),
    "backup": _Event(("110106", "Export"), "R"),
    "restore": _Event(("110107", "Import"), "C"),
    "labels import": _Event(("110107", "Import"), "C"),
    "patients link": _Event(_PATIENT_RECORD, "U"),
    "patients unlink": _Event(_PATIENT_RECORD, "U"),
    "pacs find": _Event(("110112", "Query"), "E"),
    "pacs fetch": _Event(_TRANSFERRED, "C"),
    "results sent": _Event(_TRANSFERRED, "C"),
    "ingest": _Event(_TRANSFERRED, "C"),
    "listen start": _Event(("110100", "Application Activity"), "E", ("110120", "Application Start")),
    "listen stop": _Event(("110100", "Application Activity"), "E", ("110121", "Application Stop")),
    "audit read": _Event(("110101", "Audit Log Used"), "R"),
}
_OTHER = _Event(_ALERT, "E", ("110132", "Use of Restricted Function"))

_OBJECTS = {
    "patient": ("1", "1", ("2", "RFC-3881", "Patient Number")),
    "study": ("2", "3", ("110180", "DCM", "Study Instance UID")),
    "other": ("2", "4", ("12", "RFC-3881", "URI")),
}
"""Kind of pseudonym -> ParticipantObjectTypeCode (1 person, 2 system object), its role (1 patient, 3 report, 4 master file), and
ParticipantObjectIDTypeCode."""


def auditable(row: LedgerRow) -> bool:
    """Whether a ledger row says that somebody had access to what identifies patients, or moved it."""
    return row.kind in (Kind.AUDIT, Kind.QUARANTINE, Kind.INGEST)


def message(row: LedgerRow, source: str) -> bytes:
    """The message of one row, XML in UTF-8 without a declaration or a line break.

    Args:
        row: one that is `auditable`.
        source: AuditSourceID: which system says this, unique in the enterprise.
    """
    action = _action(row)
    event = _EVENTS.get(action, _OTHER)
    root = ElementTree.Element("AuditMessage")
    identification = ElementTree.SubElement(
        root,
        "EventIdentification",
        {
            "EventActionCode": event.action,
            "EventDateTime": row.at,
            "EventOutcomeIndicator": "4" if row.payload.get("failed") else "0",
        },
    )
    _code(identification, "EventID", event.code[0], "DCM", event.code[1])
    if event.type is not None:
        _code(identification, "EventTypeCode", event.type[0], "DCM", event.type[1])
    requestor = {"UserID": row.actor, "UserIsRequestor": "true"}
    ElementTree.SubElement(root, "ActiveParticipant", requestor)
    ours = {"UserID": "radloop", "AlternativeUserID": str(os.getpid()), "UserIsRequestor": "false"}
    application = ElementTree.SubElement(root, "ActiveParticipant", ours)
    _code(application, "RoleIDCode", "110150", "DCM", "Application")
    said = ElementTree.SubElement(root, "AuditSourceIdentification", {"AuditSourceID": source})
    ElementTree.SubElement(said, "AuditSourceTypeCode", {"csd-code": "4"})  # application server process
    for pseudonym in row.payload.get("pseudonyms", []):
        _object(root, row, action, str(pseudonym), detail=False)
    _object(root, row, action, f"radloop:ledger/{row.seq}#{row.subject}", detail=True)
    encoded: bytes = ElementTree.tostring(root, encoding="utf-8")
    return encoded


def _action(row: LedgerRow) -> str:
    if row.kind == Kind.QUARANTINE:
        return str(row.payload.get("state", ""))
    return "ingest" if row.kind == Kind.INGEST else str(row.payload.get("action", ""))


def _object(root: ElementTree.Element, row: LedgerRow, action: str, identifier: str, *, detail: bool) -> None:
    """A patient, a study or an instance by pseudonym; or the ledger row itself, with what else it says as details."""
    kind = str(row.payload.get("kind", ""))
    name = "other"
    if not detail:
        name = "patient" if kind == "patient" or identifier.startswith("P") else "study" if kind == "study" else "other"
    type_code, role, code = _OBJECTS[name]
    attributes = {
        "ParticipantObjectID": identifier,
        "ParticipantObjectTypeCode": type_code,
        "ParticipantObjectTypeCodeRole": role,
    }
    element = ElementTree.SubElement(root, "ParticipantObjectIdentification", attributes)
    _code(element, "ParticipantObjectIDTypeCode", *code)
    if not detail:
        return
    more: dict[str, Any] = {name: value for name, value in row.payload.items() if name not in ("pseudonyms", "action")}
    for key, value in {"action": action, **more, "hash": row.hash}.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        encoded = base64.b64encode(text.encode()).decode()
        ElementTree.SubElement(element, "ParticipantObjectDetail", {"type": key, "value": encoded})


def _code(parent: ElementTree.Element, name: str, code: str, system: str, meaning: str) -> None:
    attributes = {"csd-code": code, "codeSystemName": system, "originalText": meaning}
    ElementTree.SubElement(parent, name, attributes)
