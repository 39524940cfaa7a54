"""What de-identification does to one instance, attribute by attribute, and by which rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset

from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.deidentify.items import LOCAL_CODE
from radloop.dicom.deidentify.values import text_of, values_of, vr_of
from radloop.dicom.profile import (
    BULK_VRS,
    NUMBER_VRS,
    OPTIONS,
    TEXT_VRS,
    Action,
    attribute_type,
    storage_classes,
    table,
)

_SHOWN = 60
"""Characters of a value that are shown."""
_RULES = {
    "number": "not in the table: numbers are kept",
    "string": "not in the table: kept if the value is what its VR allows",
    "text": "not in the table: free text is kept only if imaging needs it",
    "code": "not in the table: a code of a public scheme is kept, any other replaced by a dummy",
    "UI": "not in the table: UIDs of instances are replaced, those of classes kept",
    "SQ": "not in the table: its items are cleaned",
    "bulk": "not in the table: bulk data is kept only if it is pixels or belongs to them",
    "else": "not in the table",
}


_STAMPED = {
    "PatientName": "the pseudonym",
    "PatientID": "the pseudonym",
    "PatientBirthDate": "emptied under every profile",
    "SpecificCharacterSet": "written anew, as the output needs it",
    "PatientIdentityRemoved": "says what was done (PS3.15 E.1.1)",
    "DeidentificationMethod": "says what was done (PS3.15 E.1.1)",
    "DeidentificationMethodCodeSequence": "says what was done (PS3.15 E.1.1)",
    "LongitudinalTemporalInformationModified": "says what was done (PS3.15 E.1.1)",
}


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One attribute.

    Attributes:
        path: keywords with item numbers from 1, `RequestAttributesSequence[1].ScheduledProcedureStepID`; a tag where the
            standard's dictionary has no keyword.
        vr: in the file.
        action: what was done (an `Action` name); ADDED; STAMP: set whatever it was.
        why: the row of the table, the option, the Type, the rule.
        before, after: the values, identifying; empty if they were not asked for.
    """

    path: str
    vr: str
    action: str
    why: str
    before: str = ""
    after: str = ""


def explain(ds: Dataset, deidentifier: Deidentifier, *, site: str, values: bool = False) -> list[Explained]:
    """Every attribute of the instance and of its sequences' items, in the order of the file, then what was added.

    Args:
        ds: as in `Deidentifier.clean`; site: as there.
        values: give values, too. They identify the patient.

    Raises:
        DicomError: the instance cannot be made safe.
    """
    out = deidentifier.clean(ds, site=site)
    iod = storage_classes()[text_of(ds, "SOPClassUID")][0]
    return list(_Explainer(deidentifier, iod, values).items(ds, out, "", ""))


class _Explainer:
    def __init__(self, deidentifier: Deidentifier, iod: str, values: bool) -> None:
        self.profile, self.iod, self.values = deidentifier.profile, iod, values
        self.decide = deidentifier.pixels.decide
        self.options = [OPTIONS[name] for name in self.profile.options]

    def items(self, before: Dataset, after: Dataset | None, path: str, parent: str) -> Iterator[Explained]:
        """Of one data set or item; `after` is None where it was removed with its sequence."""
        for tag in list(before.keys()):
            element = before.get_item(tag, keep_deferred=True)
            vr = vr_of(element)
            new = after.get_item(tag) if after is not None and tag in after else None
            action = self.profile.action(int(tag), vr, self.iod, parent)
            name = path + (keyword_for_tag(tag) or str(tag).replace(" ", ""))
            if tag.is_private:
                why = "private attribute" + (", on the safe list" if new is not None else "")
                action = Action.REMOVE if new is None else Action.KEEP
            else:
                why = self._why(int(tag), vr, parent, action)
            if new is None and action is not Action.REMOVE:
                action, why = Action.REMOVE, f"{why}; its value is not what is kept"
            if action is Action.CODE:
                local = text_of(after or Dataset(), keyword_for_tag(tag)) in LOCAL_CODE.values()
                action = Action.REMOVE if local else Action.KEEP_TEXT
            if not path and name == "PixelData":
                why = self._pixels(before)
            done = action.name
            if not path and name in _STAMPED:
                done, why = "STAMP", _STAMPED[name]
            yield self._row(name, vr, done, why, tag, before, after)
            if new is not None and vr == "SQ" and action is Action.RECURSE:
                yield from self._inner(before[tag].value, after[tag].value if after is not None else [], name, tag)
        for tag in list(after.keys()) if after is not None else []:
            if tag not in before:
                assert after is not None
                name = path + (keyword_for_tag(tag) or str(tag))
                why = "says what was done (PS3.15 E.1.1)" if not path else "stands for what was removed"
                yield self._row(name, after[tag].VR, "ADDED", why, tag, None, after)

    def _inner(self, before: Any, after: Any, name: str, tag: Any) -> Iterator[Explained]:
        for number, item in enumerate(before):
            other = after[number] if number < len(after) else None
            yield from self.items(item, other, f"{name}[{number + 1}].", keyword_for_tag(tag))

    def _row(
        self, name: str, vr: str, action: str, why: str, tag: Any, before: Dataset | None, after: Dataset | None
    ) -> Explained:
        shown = (_shown(before, tag), _shown(after, tag)) if self.values else ("", "")
        return Explained(path=name, vr=vr, action=action, why=why, before=shown[0], after=shown[1])

    def _pixels(self, ds: Dataset) -> str:
        decision = self.decide(ds)
        looked = "looked at for text" if decision.look else "not looked at for text"
        return f"{looked}: rule {decision.rule}, {decision.why}"

    def _why(self, tag: int, vr: str, parent: str, action: Action) -> str:
        row = table().get(tag)
        if row is None:
            return _RULES[_rule(vr, action)]
        said = f"Table E.1-1: {row.basic}"
        letters = [f"{o.code} says {row.options[o.column]}" for o in self.options if o.column in row.options]
        if letters:
            said += f"; option {', '.join(letters)}"
        elif "/" in row.basic or row.basic == "Z":
            kind = attribute_type(self.iod, row.keyword, parent)
            said += f"; Type {kind}" if kind else "; Type not tabled: what suits any IOD"
        return said


def _rule(vr: str, action: Action) -> str:
    if action is Action.CODE:
        return "code"
    if vr in ("SQ", "UI"):
        return vr
    if vr in NUMBER_VRS:
        return "number"
    if vr in BULK_VRS:
        return "bulk"
    if vr in TEXT_VRS or vr == "UN":
        return "text"
    return "string" if vr in ("CS", "DS", "IS") else "else"


def _shown(ds: Dataset | None, tag: Any) -> str:
    """A value for the eyes of someone who may see it; empty if there is none."""
    if ds is None or tag not in ds:
        return ""
    try:
        element = ds[tag]
        if element.VR == "SQ":
            return f"{len(element.value)} item{'s' * (len(element.value) != 1)}"
        if isinstance(element.value, bytes):
            return f"{len(element.value)} bytes"
        text = "\\".join(values_of(element))
    except Exception:  # noqa: BLE001 - pydicom raises many kinds on bytes that are not what the VR says
        return "unreadable"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
