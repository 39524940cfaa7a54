"""Find chosen elements in many headers: what one scanner writes has the same elements, most of them of the same length.

`Layouts` learns how such files are laid out and checks the next one in a few large steps: the headers of all elements up to
the next one whose length varies are compared at once, as one masked integer. A file whose element headers are equal to
those of a file that `spans.scan` accepted would be accepted with the same spans, so a replay is a proof, not a guess.
Whatever differs is scanned element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import error

from pydicom._dicom_dict import DicomDictionary

from radloop.dicom import spans
from radloop.dicom.spans import UNDEFINED, Buffer, NeedMore, NotPlain, Span

Place = tuple[int, int]
"""Where a value begins and ends."""
_Pick = tuple[int, str, int, int, int]
_Step = tuple[int, int, int, tuple[_Pick, ...], int, int, int, str]
"""Mask and pattern of a run of elements; its bytes; the wanted ones in it, as spans that count from its begin; then the
element whose header ends it: bytes of its length (-1: undefined), where it begins or -1 if nobody wants it, tag, VR."""

_FAR = 256  # bytes; a longer value is stepped over instead of masked out
_TRIED, _KEPT = 32, 256
_int = int.from_bytes


class Passed(tuple[tuple[int, str], ...]):
    """Tag and VR of the elements that nobody wanted, in order. Two layouts never share one."""

    __slots__ = ()


class Layouts:
    """Finds wanted elements of data sets. Safe for several threads.

    Args:
        wanted: by tag and VR (as `spans.Span` has it), whether an element is wanted; may raise NotPlain.
        last: tag after which nothing is looked at; None: all elements, up to the end of the data set.
    """

    def __init__(self, wanted: Callable[[int, str], bool], *, last: int | None = None) -> None:
        self._wanted, self._whole, self._last = wanted, last is None, 0xFFFFFFFF if last is None else last
        self._compiled: list[_Layout] = []
        self._seen: dict[tuple[bool, tuple[tuple[int, str], ...]], _Layout] = {}

    def find(self, data: Buffer, start: int, end: int, *, implicit: bool) -> tuple[list[Span], Passed]:
        """The wanted elements and, the same object for each file of a layout, the others. Errors as `spans.scan`."""
        compiled = self._compiled
        for number, layout in enumerate(compiled[:_TRIED]):
            if layout.implicit is implicit:
                found = self._replay(layout, data, start, end)
                if found is not None:
                    if number:
                        self._compiled = [layout, *(other for other in compiled if other is not layout)]
                    return found, layout.passed
        return self._scan(data, start, end, implicit)

    def _replay(self, layout: _Layout, data: Buffer, position: int, end: int) -> list[Span] | None:
        found: list[Span] = []
        for mask, pattern, size, picks, width, begin, tag, vr in layout.steps:
            run = data[position : position + size]
            if _int(run, "little") & mask != pattern or len(run) != size:
                return None
            for one, its_vr, first, value, following in picks:
                found.append((one, its_vr, position + first, position + value, position + following))
            start, position = position + begin, position + size
            if width > 0:
                end_of_value = position + _int(run[-width:], "little")
            else:
                try:
                    end_of_value = spans.past(data, tag, position, end, implicit=layout.implicit)
                except error:
                    return None
            if begin >= 0:
                found.append((tag, vr, start, position, end_of_value))
            position = end_of_value
        return found if position == end or self._beyond(data, position, end) else None

    def _beyond(self, data: Buffer, position: int, end: int) -> bool:
        """Whether the next element's tag is greater than all that are wanted."""
        if self._whole or position > end:
            return False
        tag = data[position : position + 4]
        if len(tag) < 4:
            raise NeedMore if len(data) < end else NotPlain
        return _int(tag[:2], "little") << 16 | _int(tag[2:], "little") > self._last

    def _scan(self, data: Buffer, start: int, end: int, implicit: bool) -> tuple[list[Span], Passed]:
        elements = spans.scan(data, start, end, implicit=implicit, last=self._last)
        if elements and elements[-1][4] > end:
            raise NotPlain
        wanted = [self._wanted(element[0], element[1]) for element in elements]
        if elements:
            self._learn(elements, wanted, data, implicit)
        passed = Passed([element[:2] for element, want in zip(elements, wanted, strict=True) if not want])
        return [element for element, want in zip(elements, wanted, strict=True) if want], passed

    def _learn(self, elements: list[Span], wanted: list[bool], data: Buffer, implicit: bool) -> None:
        """From the second file with the same elements on, there is a layout; what is found to vary is added to it."""
        headers = tuple([element[:2] for element in elements])
        layout = self._seen.get((implicit, headers))
        if layout is None:
            if len(self._seen) >= _KEPT:
                self._seen, self._compiled = {}, []
            self._seen[implicit, headers] = _Layout(elements, wanted, implicit)
            return
        layout.learn(elements, data)
        self._compiled = [layout, *(other for other in self._compiled if other is not layout)]


class _Layout:
    """The elements of a kind of file, which of them are wanted, and which vary in length."""

    def __init__(self, elements: list[Span], wanted: list[bool], implicit: bool) -> None:
        self.implicit, self._wanted = implicit, wanted
        self.passed = Passed([element[:2] for element, want in zip(elements, wanted, strict=True) if not want])
        self.steps: list[_Step] = []
        self._lengths = [following - value for _, _, _, value, following in elements]
        self._varying = [length > _FAR for length in self._lengths]
        self._varying[-1] = True

    def learn(self, elements: list[Span], data: Buffer) -> None:
        """Note which elements have another length than before."""
        new = not self.steps
        for number, (_, _, _, value, following) in enumerate(elements):
            if following - value != self._lengths[number] and not self._varying[number]:
                self._varying[number] = new = True
        if new:
            self.steps = self._compiled(elements, data)

    def _compiled(self, elements: list[Span], data: Buffer) -> list[_Step]:
        steps: list[_Step] = []
        begin, mask, picks = elements[0][2], bytearray(), []
        for element, want, varies in zip(elements, self._wanted, self._varying, strict=True):
            tag, vr, start, value, following = element
            mask += b"\0" * (start - begin - len(mask)) + b"\xff" * (value - start)
            wide = 4 if self.implicit or value - start == 12 else 2
            undefined = wide == 4 and _int(data[value - 4 : value], "little") == UNDEFINED
            if not varies and not undefined:
                if want:
                    picks.append((tag, vr, start - begin, value - begin, following - begin))
                continue
            if not undefined:
                mask[-wide:] = b"\0" * wide
            bits, run = _int(mask, "little"), data[begin:value]
            at = start - begin if want else -1
            pattern = _int(run, "little") & bits
            steps.append((bits, pattern, len(run), tuple(picks), -1 if undefined else wide, at, tag, vr))
            begin, mask, picks = following, bytearray(), []
        return steps


class Picker:
    """Finds the values of some attributes of a data set. Safe for several threads.

    Args:
        tags: tag numbers; the places are found in this order.
        whole: look at all elements, up to the end of the data set; else only up to the last of `tags`.
    """

    def __init__(self, tags: Sequence[int], *, whole: bool) -> None:
        self._slots = {tag: slot for slot, tag in enumerate(tags)}
        self._find = Layouts(self._wanted, last=None if whole else max(tags)).find

    def _wanted(self, tag: int, vr: str) -> bool:
        if tag not in self._slots:
            return False
        if vr != "UN" and vr not in DicomDictionary.get(tag, ("UN",))[0]:
            raise NotPlain
        return True

    def pick(self, data: Buffer, start: int, end: int, *, implicit: bool) -> list[Place | None]:
        """The places of the values; None for an attribute that is absent. Arguments and errors as `spans.scan`.

        One whose VR is neither the dictionary's nor UN raises NotPlain.
        """
        slots = self._slots
        found: list[Place | None] = [None] * len(slots)
        for tag, _, _, value, following in self._find(data, start, end, implicit=implicit)[0]:
            found[slots[tag]] = (value, following)
        return found
