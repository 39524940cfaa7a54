"""The report's figures as inline SVG.

Drawn by hand rather than by matplotlib: they take their colours from the page's style sheet (light, dark, print), weigh
a few kilobytes, and their text can be read aloud. Every text that comes from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 420, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 46
_OPENING = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" preserveAspectRatio="xMidYMid meet">')
_BIN = Markup('<circle class="bin" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>')
_TURNED = Markup('<text class="tick middle" transform="translate(13 {:.0f}) rotate(-90)">{}</text>')


def roc(curves: Sequence[tuple[str, Points]], *, point: tuple[float, float] | None, title: str) -> Markup:
    """ROC curves, the last one prominent, and the operating point.

    Args:
        curves: (name, [(1 - specificity, sensitivity), ...]) each; the last is the model that the report is about.
        point: of the operating threshold, on the last curve.
        title: read aloud in place of the figure.
    """
    parts = [_axes("1 − specificity", "sensitivity"), _line([(0, 0), (1, 1)], "chance")]
    parts += [_line(points, "curve old") for _, points in curves[:-1]]
    parts += [_line(points, "curve") for _, points in curves[-1:]]
    if point is not None:
        x, y = _at(*point)
        parts.append(Markup('<circle class="operating" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x, y))
        parts.append(_label(_LEFT + 130, _at(0, 0.12)[1], "●  operating point", "key point"))
    for number, (name, _) in enumerate(reversed(curves)):
        style = "key curve" if number == 0 else "key curve old"
        y = _at(0, 0.26 + 0.08 * number)[1]
        parts.append(Markup('<path class="{}" d="M{} {}h22"/>').format(style, _LEFT + 130, y - 4))
        parts.append(_label(_LEFT + 160, y, name, "key"))
    return _svg(_WIDTH, _HEIGHT, title, parts)


def calibration(bins: Sequence[Mapping[str, Any]], *, title: str) -> Markup:
    """Reliability diagram: observed share against mean predicted probability, with intervals where given.

    Args:
        bins: each `predicted`, `observed` (0 to 1), `count`, and optionally `low`, `high`.
        title: read aloud in place of the figure.
    """
    parts = [_axes("predicted probability", "observed share"), _line([(0, 0), (1, 1)], "chance")]
    largest = max((float(b["count"]) for b in bins), default=1.0) or 1.0
    for one in bins:
        x, y = _at(float(one["predicted"]), float(one["observed"]))
        if one.get("low") is not None and one.get("high") is not None:
            low, high = _at(0, float(one["low"]))[1], _at(0, float(one["high"]))[1]
            parts.append(Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x, low, high))
        radius = 3 + 6 * (float(one["count"]) / largest) ** 0.5
        text = f"predicted {float(one['predicted']):.2f}, observed {float(one['observed']):.2f}, {one['count']} images"
        parts.append(_BIN.format(x, y, radius, text))
    parts.append(_line([(float(b["predicted"]), float(b["observed"])) for b in bins], "curve thin"))
    parts.append(_label(_LEFT + 12, _TOP + 18, "area of a dot: number of images", "key"))
    return _svg(_WIDTH, _HEIGHT, title, parts)


def two_histograms(
    bins: Sequence[str], reference: Sequence[float], window: Sequence[float], *, title: str, numeric: bool
) -> Markup:
    """Reference (outline) against production window (filled).

    Args:
        bins: n + 1 edges if numeric, else n categories.
        reference: n shares, 0 to 1.
        window: n shares, 0 to 1.
        title: read aloud in place of the figure.
        numeric: whether bars touch and edges are labelled.
    """
    width, height, base = 200, 114, 90
    if not numeric and len(reference) > 6:  # the commonest categories; the rest would not be legible
        kept = sorted(range(len(reference)), key=lambda i: -max(reference[i], window[i]))[:6]
        bins, reference, window = [bins[i] for i in kept], [reference[i] for i in kept], [window[i] for i in kept]
    number = max(1, len(reference))
    top = max([*reference, *window, 1e-9])
    step = (width - 8) / number
    parts: list[Markup] = []
    for i, (old, new) in enumerate(zip(reference, window, strict=True)):
        x = 4 + i * step
        text = f"{bins[i]}: reference {old:.0%}, window {new:.0%}"
        inner = step * (0.92 if numeric else 0.7)
        parts.append(_bar(x + (step - inner) / 2, base, inner, new / top * 78, "window", text))
        parts.append(_bar(x + (step - inner) / 2, base, inner, old / top * 78, "reference", text))
        if not numeric:
            limit = max(3, int(step / 7.4))
            name = bins[i] if len(bins[i]) <= limit else bins[i][: limit - 1] + "…"
            parts.append(_label(x + step / 2, base + 16, name, "tick middle"))
    parts.append(Markup('<path class="axis" d="M4 {}H{}"/>').format(base, width - 4))
    if numeric and bins:
        parts.append(_label(4, base + 16, bins[0], "tick"))
        parts.append(_label(width - 4, base + 16, bins[-1], "tick end"))
    return _svg(width, height, title, parts)


def flow(steps: Sequence[Mapping[str, Any]], ends: Sequence[Mapping[str, Any]], *, title: str) -> Markup:
    """Counts from received to predicted as ribbons, what was left behind falling away below.

    Args:
        steps: each `name`, `count`, `lost` (the sum of what did not go on).
        ends: the last step's parts, each `name` and `count`; those `apart` are shown beside, without a ribbon.
        title: read aloud in place of the figure.
    """
    columns = len(steps) + (1 if ends else 0)
    width, height, top, tall, bar = 1000, 300, 52, 170, 12
    largest = max([float(s["count"]) for s in steps] + [1.0])
    gap = (width - 120 - bar) / max(1, columns - 1)
    at = [10 + i * gap for i in range(columns)]
    parts: list[Markup] = []
    for i, step in enumerate(steps):
        tall_here = max(2.0, float(step["count"]) / largest * tall)
        if i + 1 < len(steps):
            tall_next = min(tall_here, float(steps[i + 1]["count"]) / largest * tall)
            parts.append(_ribbon(at[i] + bar, top, top + tall_next, at[i + 1], top, top + tall_next, "flow"))
        lost = float(step.get("lost") or 0)
        if lost:
            thick = max(2.0, lost / largest * tall)
            lower = top + tall_here
            # Out of the bottom of the bar, down to its label.
            parts.append(_fall(at[i] + bar, lower - thick, lower, at[i] + bar + 18, 246, thick))
            parts.append(_label(at[i] + bar + 12, 268, f"−{int(lost):,}", "lost"))
            parts.append(_label(at[i] + bar + 12, 286, str(step.get("lost_name") or "not passed on"), "tick"))
        parts.append(_block(at[i], top, bar, tall_here))
        parts.append(_label(at[i], 20, str(step["name"]), "tick"))
        parts.append(_label(at[i], 41, f"{int(step['count']):,}", "count"))
    if ends:
        drawn, bottom = _fan(ends, at[-1], at[-2] + bar if columns > 1 else 0, top, tall / largest, bar)
        parts, height = parts + drawn, max(height, round(bottom))
    return _svg(width, height, title, parts)


def _fan(
    ends: Sequence[Mapping[str, Any]], x: float, start: float, top: float, scale: float, bar: int
) -> tuple[list[Markup], float]:
    """The parts of the last step, spread over the height so that their labels do not meet; and where they end."""
    parts: list[Markup] = []
    leaving, y = top, top
    for end in ends:
        thick = max(2.0, float(end["count"]) * scale)
        if not end.get("apart"):
            parts.append(_ribbon(start, leaving, leaving + thick, x, y, y + thick, "flow"))
            leaving += thick
        parts.append(_block(x, y, bar, thick))
        middle = y + thick / 2
        parts.append(_label(x + bar + 6, middle - 2, str(end["name"]), "tick"))
        parts.append(_label(x + bar + 6, middle + 15, f"{int(end['count']):,}", "count small"))
        y += max(thick, 32) + 10
    return parts, y


def _ribbon(x1: float, top1: float, low1: float, x2: float, top2: float, low2: float, style: str) -> Markup:
    half = (x1 + x2) / 2
    return Markup(
        '<path class="{}" d="M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}V{:.1f}'
        'C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}Z"/>'
    ).format(style, x1, top1, half, top1, half, top2, x2, top2, low2, half, low2, half, low1, x1, low1)


def _fall(x: float, top: float, low: float, x2: float, floor: float, thick: float) -> Markup:
    """A ribbon that leaves to the right and bends down to the floor."""
    return Markup(
        '<path class="falling" d="M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}H{:.1f}'
        'C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}Z"/>'
    ).format(
        *(x, top, x2 + thick, top, x2 + thick, top, x2 + thick, floor, x2),
        *(x2, low, x2, low, x, low),
    )


def _block(x: float, y: float, width: float, height: float) -> Markup:
    return Markup('<rect class="node" x="{:.1f}" y="{:.1f}" width="{}" height="{:.1f}" rx="2"/>').format(
        x, y, width, height
    )


def _bar(x: float, base: float, width: float, height: float, style: str, text: str) -> Markup:
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    ).format(style, x, base - height, width, max(0.0, height), text)


def _at(x: float, y: float) -> tuple[float, float]:
    """A point of the unit square in the plot's coordinates."""
    across, up = min(1.0, max(0.0, x)), min(1.0, max(0.0, y))
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _line(points: Points, style: str) -> Markup:
    if not points:
        return Markup()
    text = "L".join("{:.1f} {:.1f}".format(*_at(x, y)) for x, y in _thinned(points))
    return Markup('<path class="{}" d="M{}"/>').format(style, text)


def _thinned(points: Points) -> Points:
    """At most 300 points: more cannot be seen at this size."""
    if len(points) <= 300:
        return points
    step = (len(points) - 1) / 299
    return [points[round(i * step)] for i in range(300)]


def _axes(across: str, up: str) -> Markup:
    parts: list[Markup] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _at(tick, tick)
        left, bottom = _at(0, 0)
        right, top = _at(1, 1)
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}V{:.1f}M{:.1f} {:.1f}H{:.1f}"/>').format(
            x, bottom, top, left, y, right
        ))  # fmt: skip
        parts.append(_label(x, bottom + 17, f"{tick:g}", "tick middle"))
        parts.append(_label(left - 7, y + 4, f"{tick:g}", "tick end"))
    parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, across, "tick middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(_TURNED.format(middle, up))
    return Markup().join(parts)


def _label(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _svg(width: int, height: int, title: str, parts: Iterable[Markup]) -> Markup:
    return _OPENING.format(width, height, title) + Markup().join(parts) + Markup("</svg>")
