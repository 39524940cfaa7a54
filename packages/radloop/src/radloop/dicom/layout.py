"""Find chosen attributes in many headers: what one scanner writes has the same elements, most of them of the same length.

`Picker` learns such a layout and checks the next file against it in a few large steps: the headers of all elements up to
the next one whose length varies are compared at once, as one masked integer. A file whose element headers are equal to
those of a file that `spans.scan` accepted would be accepted with the same spans, so a replay is a proof, not a guess.
Whatever differs is scanned element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import error

from pydicom._dicom_dict import DicomDictionary

from radloop.dicom import spans
from radloop.dicom.spans import UNDEFINED, Buffer, NeedMore, NotPlain, Span

Place = tuple[int, int]
"""Where a value begins and ends."""
_Step = tuple[int, int, int, tuple[tuple[int, int, int], ...], int, int, int]
"""Mask and pattern of a run of elements; its bytes; slot, begin and end of each value wanted in it; then the element whose
header ends it: bytes of its length (-1: undefined), slot of its value or -1, tag."""

_FAR = 256  # bytes; a longer value is stepped over instead of masked out
_TRIED, _KEPT = 32, 256
_int = int.from_bytes


class Picker:
    """Finds the values of some attributes of a data set. Safe for several threads.

    Args:
        tags: tag numbers; the places are found in this order.
        whole: look at all elements, up to the end of the data set; else only up to the last of `tags`.
    """

    def __init__(self, tags: Sequence[int], *, whole: bool) -> None:
        self._slots = {tag: slot for slot, tag in enumerate(tags)}
        self._whole, self._last = whole, 0xFFFFFFFF if whole else max(tags)
        self._compiled: list[tuple[bool, list[_Step]]] = []
        self._seen: dict[tuple[bool, tuple[tuple[int, str], ...]], _Layout] = {}

    def pick(self, data: Buffer, start: int, end: int, *, implicit: bool) -> list[Place | None]:
        """The places of the values; None for an attribute that is absent. Arguments and errors as `spans.scan`.

        One whose VR is neither the dictionary's nor UN raises NotPlain.
        """
        for number, (kind, steps) in enumerate(self._compiled[:_TRIED]):
            if kind is implicit:
                found = self._replay(steps, data, start, end, implicit)
                if found is not None:
                    if number:
                        first = self._compiled[number]
                        self._compiled = [first, *(layout for layout in self._compiled if layout is not first)]
                    return found
        return self._scan(data, start, end, implicit)

    def _replay(
        self, steps: list[_Step], data: Buffer, position: int, end: int, implicit: bool
    ) -> list[Place | None] | None:
        found: list[Place | None] = [None] * len(self._slots)
        for mask, pattern, size, picks, width, slot, tag in steps:
            run = data[position : position + size]
            if _int(run, "little") & mask != pattern or len(run) != size:
                return None
            for wanted, begin, finish in picks:
                found[wanted] = (position + begin, position + finish)
            position += size
            if width > 0:
                following = position + _int(run[-width:], "little")
            else:
                try:
                    following = spans.past(data, tag, position, end, implicit=implicit)
                except error:
                    return None
            if slot >= 0:
                found[slot] = (position, following)
            position = following
        if position != end and not self._beyond(data, position, end):
            return None
        return found

    def _beyond(self, data: Buffer, position: int, end: int) -> bool:
        """Whether the next element's tag is greater than all that are wanted."""
        if self._whole or position > end:
            return False
        tag = data[position : position + 4]
        if len(tag) < 4:
            raise NeedMore if len(data) < end else NotPlain
        return _int(tag[:2], "little") << 16 | _int(tag[2:], "little") > self._last

    def _scan(self, data: Buffer, start: int, end: int, implicit: bool) -> list[Place | None]:
        found: list[Place | None] = [None] * len(self._slots)
        elements = spans.scan(data, start, end, implicit=implicit, last=self._last)
        for tag, vr, _, value, following in elements:
            if tag in self._slots:
                if vr != "UN" and vr not in DicomDictionary.get(tag, ("UN",))[0]:
                    raise NotPlain
                found[self._slots[tag]] = (value, following)
        if not elements:
            return found
        if elements[-1][4] > end:
            raise NotPlain
        self._learn(elements, data, implicit)
        return found

    def _learn(self, elements: list[Span], data: Buffer, implicit: bool) -> None:
        """From the second file with the same elements on, there is a layout; what is found to vary is added to it."""
        headers = tuple([element[:2] for element in elements])
        layout = self._seen.get((implicit, headers))
        if layout is None:
            if len(self._seen) >= _KEPT:
                self._seen, self._compiled = {}, []
            self._seen[implicit, headers] = _Layout(elements)
            return
        before = layout.steps
        if layout.varies(elements) or not before:
            layout.steps = layout.compiled(elements, data, self._slots, implicit)
        others = [kept for kept in self._compiled if kept[1] is not before]
        self._compiled = [(implicit, layout.steps), *others]


class _Layout:
    """The elements of a kind of file, and which of them vary in length."""

    def __init__(self, elements: list[Span]) -> None:
        self._lengths = [following - value for _, _, _, value, following in elements]
        self._varying = [length > _FAR for length in self._lengths]
        self._varying[-1] = True
        self.steps: list[_Step] = []

    def varies(self, elements: list[Span]) -> bool:
        """Note which elements have another length than before; whether any is new among them."""
        new = False
        for number, (_, _, _, value, following) in enumerate(elements):
            if following - value != self._lengths[number] and not self._varying[number]:
                self._varying[number] = new = True
        return new

    def compiled(self, elements: list[Span], data: Buffer, slots: dict[int, int], implicit: bool) -> list[_Step]:
        """The steps for this file and the ones seen before."""
        steps, begin = [], elements[0][2]
        mask, picks = bytearray(), []
        for (tag, _, start, value, following), varies in zip(elements, self._varying, strict=True):
            mask += b"\0" * (start - begin - len(mask)) + b"\xff" * (value - start)
            wide = 4 if implicit or value - start == 12 else 2
            undefined = wide == 4 and _int(data[value - 4 : value], "little") == UNDEFINED
            slot = slots.get(tag, -1)
            if not varies and not undefined:
                if slot >= 0:
                    picks.append((slot, value - begin, following - begin))
                continue
            if not undefined:
                mask[-wide:] = b"\0" * wide
            steps.append(_step(mask, data[begin:value], picks, -1 if undefined else wide, slot, tag))
            begin, mask, picks = following, bytearray(), []
        return steps


def _step(mask: bytearray, run: Buffer, picks: list[tuple[int, int, int]], width: int, slot: int, tag: int) -> _Step:
    bits = _int(mask, "little")
    return bits, _int(run, "little") & bits, len(run), tuple(picks), width, slot, tag
