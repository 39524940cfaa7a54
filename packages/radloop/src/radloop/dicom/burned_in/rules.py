"""Which images are looked at for text in their pixels: a table, the first matching row decides."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any, Literal

import msgspec
from pydicom.dataset import Dataset
from pydicom.uid import UID

from radloop.dicom.burned_in.ocr import Box
from radloop.errors import SettingsError

Action = Literal["refuse", "ocr", "sample", "pass"]

_COLUMNS = {
    "modality": "Modality",
    "conversion_type": "ConversionType",
    "manufacturer": "Manufacturer",
    "model": "ManufacturerModelName",
    "software": "SoftwareVersions",
    "series_description": "SeriesDescription",
    "burned_in": "BurnedInAnnotation",
}


Attributes = Dataset | Mapping[str, Any]
"""A Dataset, or attributes by keyword."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row. Columns left out match anything; `rows` and `columns` are exact.

    Attributes:
        name, why: what a report says of it; no identifying word.
        action: refuse; ocr (every frame is looked at); sample (as ocr, for the first instance of a series and one in
            `every`); pass (the pixels are not looked at).
        declared: BurnedInAnnotation (0028,0301) says that there is text: it is neither NO nor empty.
        blank: rectangles (x, y, width, height) that are emptied before text is looked for; in pixels, or in shares of the
            image where all four are at most 1.
        banner: what lies above all of SequenceOfUltrasoundRegions (0018,6011) is emptied too.
    """

    name: str
    why: str = ""
    action: Action
    every: int = 50
    sop_class: tuple[str, ...] = ()
    modality: tuple[str, ...] = ()
    image_type: tuple[str, ...] = ()
    burned_in: tuple[str, ...] = ()
    conversion_type: tuple[str, ...] = ()
    manufacturer: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    software: tuple[str, ...] = ()
    series_description: tuple[str, ...] = ()
    rows: int | None = None
    columns: int | None = None
    declared: bool = False
    blank: tuple[tuple[float, float, float, float], ...] = ()
    banner: bool = False

    def matches(self, ds: Attributes) -> bool:
        """Whether every column given matches the instance."""
        if self.declared and not declares_text(ds):
            return False
        if not all(
            value is None or ds.get(k) == value for k, value in (("Rows", self.rows), ("Columns", self.columns))
        ):
            return False
        uid = UID(text(ds, "SOPClassUID"))
        if self.sop_class and not _fits(self.sop_class, (str(uid), uid.keyword if uid.is_private is False else "")):
            return False
        parts = values(ds, "ImageType")
        if not all(_fits((pattern,), parts) for pattern in self.image_type):
            return False
        return all(
            not (patterns := getattr(self, column)) or _fits(patterns, values(ds, keyword))
            for column, keyword in _COLUMNS.items()
        )

    def regions(self, ds: Dataset) -> list[Box]:
        """What is emptied unseen, in pixels of this instance."""
        rows, columns = int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)
        found = []
        for x, y, width, height in self.blank:
            share = max(x, y, width, height) <= 1
            across, down = (columns, rows) if share else (1, 1)
            found.append(
                Box(
                    max(int(x * across), 0),
                    max(int(y * down), 0),
                    min(-int(-(x + width) * across // 1), columns),
                    min(-int(-(y + height) * down // 1), rows),
                )
            )
        if self.banner:
            tops = [item.get("RegionLocationMinY0") for item in ds.get("SequenceOfUltrasoundRegions") or []]
            if tops and all(isinstance(top, int) and 0 <= top < rows for top in tops) and min(tops) > 0:
                found.append(Box(0, 0, columns, min(tops)))
        return [box for box in found if box.x1 > box.x0 and box.y1 > box.y0]


class Rules:
    """The project's own rows, then radloop's."""

    def __init__(self, own: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raises SettingsError where a row is not of the form of `Rule`."""
        try:
            mine = msgspec.convert(list(own), tuple[Rule, ...])
        except msgspec.ValidationError as error:
            raise SettingsError(
                f"[[deidentify.pixel_rules]]: {error}",
                expected="the columns of radloop's own table",
                next_step='see "Text in pixels" in docs/deidentification.md',
            ) from None
        self.rows: tuple[Rule, ...] = (*mine, *_defaults())

    def first(self, ds: Attributes) -> Rule:
        """The row that decides; the last of radloop's own matches everything."""
        return next(rule for rule in self.rows if rule.matches(ds))


@functools.cache
def _defaults() -> tuple[Rule, ...]:
    table = resources.files("radloop.dicom.burned_in").joinpath("rules.toml").read_text()
    return msgspec.convert(tomllib.loads(table)["rule"], tuple[Rule, ...])


def sampled(ds: Attributes, every: int, draw: Callable[[str], float]) -> bool:
    """Whether a sample holds this instance: InstanceNumber 1 or none, and one in `every` by a keyed draw for the series.

    Args:
        ds: an instance.
        every: 50: instances whose number is congruent to the series' draw modulo 50.
        draw: uniform in [0, 1) by a keyed hash, the same for the same series for ever.
    """
    number = ds.get("InstanceNumber")
    if not isinstance(number, int) or number <= 1 or every <= 1:
        return True
    return number % every == int(draw(text(ds, "SeriesInstanceUID")) * every)


def declares_text(ds: Attributes) -> bool:
    """Whether BurnedInAnnotation (0028,0301) says that the pixels hold text; NO says nothing."""
    return text(ds, "BurnedInAnnotation").upper() not in ("NO", "")


def values(ds: Attributes, keyword: str) -> tuple[str, ...]:
    """The values of an attribute as text, without padding; none if it is absent."""
    try:
        value = ds.get(keyword)
    except Exception:  # noqa: BLE001 - bytes that are not what the VR says; pydicom raises many kinds
        return ()
    if value is None:
        return ()
    many = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    return tuple(str(one).strip() for one in many)


def text(ds: Attributes, keyword: str) -> str:
    """The first value as text, or nothing."""
    return next(iter(values(ds, keyword)), "")


def _fits(patterns: Sequence[str], found: Sequence[str]) -> bool:
    return any(fnmatchcase(one.upper(), pattern.upper()) for one in found for pattern in patterns)
