"""The report is rendered from whatever there is, and nothing that enters it can act."""

from __future__ import annotations

import copy
import math
import random
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radloop.errors import DataError
from radloop.monitoring import plots, report, views

SAMPLE: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("sample_report.py")))["sample"]()
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 191 }}{% include '/etc/passwd' %}",
    "</style></svg></title><iframe src=//evil.example>",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep it."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep it."""
        self.text.append(data)


def harmless(text: str) -> Page:
    """A page without anything that acts or asks a server."""
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "form", "base", "foreignobject"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "action", "xlink:href", "srcset"}:
                assert value is not None
                assert value.startswith(("data:image/", "data:,", "#")), (tag, name, value[:40])
    return page


def poisoned(value: Any, text: str) -> Any:
    """Every text in the data, keys too where they are free, followed by `text`."""
    if isinstance(value, str):
        return value + text
    if isinstance(value, dict):
        free = {"by_site", "by_label", "sites", "flags", "fields", "payload", "figures", "trained_on_test"}
        return {
            key: {f"{k}{text}": poisoned(v, text) for k, v in inner.items()}
            if key in free and isinstance(inner, dict)
            else poisoned(inner, text)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [poisoned(one, text) for one in value]
    return value


PLAIN: dict[str, Any] = msgspec.to_builtins(SAMPLE, builtin_types=(bytes,))


def test_every_part_is_there_with_its_figures() -> None:
    """What the report leaves out, nobody signs off."""
    text = report.render(SAMPLE)  # type: ignore[arg-type]
    page = harmless(text)
    ids = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    assert ids == {"summary", *(name for name, *_ in views.SECTIONS)}
    assert "Not run yet" not in text
    for figure in (
        "0.958 (0.928 to 0.988)",
        "812",
        "NOT_DICOM",
        "Operationally safe",
        "Insufficient evidence",
        "3 min 47 s",
    ):
        assert figure in text, figure
    assert "Not a medical device" in text
    assert "Not for use on patients." in text
    assert sum(tag == "img" for tag, _ in page.tags) == 6
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if attributes.get("role") == "img")


def test_an_empty_report_names_the_command_for_every_part() -> None:
    """A run that stopped at a gate still gets its report."""
    text = report.render({})
    harmless(text)
    for name, _, key, command in views.SECTIONS:
        if key and name != "quarantine":
            assert f"<code>{command}</code>" in text
    assert text.count("Not run yet.") == len(views.SECTIONS) - 2  # quarantine has its own words, intended use is text
    assert "No intended use is stated" in text


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(evil: str) -> None:
    """A manufacturer tag with a script in it must not run in the physicist's browser."""
    data = poisoned(PLAIN, evil)
    text = report.render(data)
    page = harmless(text)
    assert "1337" not in text
    assert sum(tag == "img" for tag, _ in page.tags) == 6
    assert any(evil in piece for piece in page.text) or evil in "".join(page.text)
    assert "root:" not in text


def test_only_images_are_embedded(tmp_path: Path) -> None:
    """An SVG can hold a script, and a path in the data could name any file."""
    secret = tmp_path / "radloop.key"
    secret.write_text("0" * 64)
    for image in (b"<svg onload=alert(1)>", str(secret), tmp_path / "none.png"):
        with pytest.raises(DataError, match="example image"):
            report.render({"examples": [{"image": image, "outcome": "TP", "probability": 0.5}]})


def test_examples_are_found_in_the_evaluation_folder(tmp_path: Path) -> None:
    """The stages hand over a folder, not bytes."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "00-TP.png").write_bytes(SAMPLE["examples"][0]["image"])
    evaluation = copy.deepcopy(PLAIN["models"][1]["evaluation"])
    evaluation["examples"] = [
        {"file": "examples/00-TP.png", "outcome": "TP", "sop_uid": "2.25.1", "label": 1, "probability": 0.9}
    ]
    text = report.render({"models": [{"version": "1", "evaluation": evaluation, "folder": tmp_path}]})
    assert text.count("data:image/png") == 1
    assert str(tmp_path) not in text


def test_the_sample_has_the_shapes_of_the_rooms_that_make_it() -> None:
    """If evaluation, gates or judge change their fields, the report would silently show nothing."""
    from radloop.datasets.split import Leakage
    from radloop.learning.evaluate import Evaluation
    from radloop.learning.gates import Gate
    from radloop.monitoring.drift import DriftReport
    from radloop.serving.judge import JudgeVerdict

    for model in PLAIN["models"]:
        for kind, value in ((Evaluation, model["evaluation"]), (list[Gate], model["gates"])):
            found = msgspec.convert(value, kind)
            assert set(msgspec.to_builtins(found) if isinstance(value, dict) else value[0]) >= set(
                value if isinstance(value, dict) else value[0]
            )
    msgspec.convert(PLAIN["split"]["leakage"], Leakage)
    for field in Evaluation.__struct_fields__:
        assert field in PLAIN["models"][1]["evaluation"]
    steps = [step["judge"] for rollout in PLAIN["rollouts"] for step in rollout["steps"] if "judge" in step]
    assert [msgspec.convert(step, JudgeVerdict).n_patients for step in steps] == [44, 12, 41, 60]
    assert msgspec.convert(PLAIN["drift"]["before"], DriftReport).verdict == "drifted"


def gaps(value: Any, draw: random.Random) -> Any:
    """The data with some fields gone, null, or not a number, and some rows gone."""
    if isinstance(value, dict):
        kept = {k: gaps(v, draw) for k, v in value.items() if draw.random() > 0.08}
        strange = {k: draw.choice([None, math.nan, math.inf]) for k in kept if draw.random() < 0.05}
        return {k: v if k not in strange or isinstance(v, str | list | dict) else strange[k] for k, v in kept.items()}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return [gaps(one, draw) for one in value if draw.random() > 0.1]
    return value


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_missing_field_is_an_empty_cell_not_a_lost_report(seed: int) -> None:
    """An older evaluation.json, or a run that died half way, must still be shown."""
    harmless(report.render(gaps(PLAIN, random.Random(seed))))


def test_a_verdict_not_known_is_no_pass() -> None:
    """A word that a later version invents must not show as green."""
    assert views.tone("pass") == "pass"
    assert views.tone("fail") == "stop"
    for word in ("undetermined", "insufficient evidence", "waiting", "whatever", None):
        assert views.tone(word) == "unknown"
    worst = views.status({}, [{"gates": [{"verdict": "pass"}, {"verdict": "undetermined"}]}])
    assert worst["verdict"] == "undetermined"
    assert views.status({}, [{"gates": [{"verdict": "fail"}, {"verdict": "undetermined"}]}])["verdict"] == "stop"
    assert views.status({}, [{"gates": [{"verdict": "pass"}]}])["verdict"] == "pass"


def test_a_leak_is_shown_as_a_stop() -> None:
    """30 of 264 patients in two parts is the one line that must not be overlooked."""
    leak = {**PLAIN["split"]["leakage"], "patients": 264, "crossing_patients": 30}
    text = report.render({"split": {"parts": PLAIN["split"]["parts"], "leakage": leak}})
    assert "Leak found" in text
    assert "30 of 264 patients are in more than one part" in text


def test_write_appears_whole_and_is_the_same_again(tmp_path: Path) -> None:
    """A browser that opens the report while it is written must not see half a page."""
    path = report.write(SAMPLE, tmp_path / "reports" / "report.html")  # type: ignore[arg-type]
    first = path.read_text()
    report.write(SAMPLE, path)  # type: ignore[arg-type]
    assert path.read_text() == first
    assert first.endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert len(first) < 2_000_000


@given(st.lists(st.tuples(st.text(max_size=30), st.floats(0, 1), st.floats(0, 1)), max_size=20), st.booleans())
def test_plots_hold_any_text_and_any_share(rows: list[tuple[str, float, float]], numeric: bool) -> None:
    """A category name is free text from a scanner."""
    names = [row[0] for row in rows] + ([""] if numeric else [])
    svg = plots.two_histograms(names, [r[1] for r in rows], [r[2] for r in rows], title="t", numeric=numeric)
    tags = {tag for tag, _ in harmless(str(svg)).tags}
    assert tags <= {"svg", "rect", "title", "path", "text"}
    assert "nan" not in str(svg).split("<title>")[0]


def test_numpy_values_and_paths_are_welcome() -> None:
    """Figures come from numpy; a stage should not have to convert each one."""
    text = report.render({"timing": [{"name": "train", "seconds": np.float64(61.2)}], "project": {"name": Path("a/b")}})  # type: ignore[typeddict-item]
    assert "1 min 01 s" in text
    with pytest.raises(TypeError, match="cannot hold"):
        report.render({"timing": [{"name": "x", "seconds": object()}]})  # type: ignore[typeddict-item]
