"""Stages and pipelines: what is wrong is said where it is written."""

from __future__ import annotations

from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop import loop
from radloop.errors import DefinitionError
from radloop.pipeline import Builder, Pipeline, read_pipeline, schema
from radloop.settings import Settings
from radloop.stage import In, Out, Secret, load, stage
from radloop.stage.protocol import Approval
from radloop.testing import suite_stages as s


def test_untyped_parameter_is_refused() -> None:
    """An untyped parameter would reach one engine as text and another as a number."""
    with pytest.raises(DefinitionError, match="'count' has no type"):

        @stage
        def wrong(made: Out[s.Numbers], *, count=3) -> None:  # type: ignore[no-untyped-def]
            """Nothing."""


def test_positional_parameter_must_be_an_artifact() -> None:
    """A parameter in an artifact's place would be taken for a path."""
    with pytest.raises(DefinitionError, match="'count' is no artifact"):

        @stage
        def wrong(count: int) -> None:
            """Nothing."""


def test_default_must_fit_its_type() -> None:
    """A default of another type would fail on the first night, not at import."""
    with pytest.raises(DefinitionError, match="default of 'count'"):

        @stage
        def wrong(made: Out[s.Numbers], *, count: int = "three") -> None:  # type: ignore[assignment]
            """Nothing."""


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"cuont": 3}, "no parameter cuont"),
        ({"count": "3"}, "Expected `int`, got `str`"),
        ({"count": 2.5}, "Expected `int`"),
        ({"weights": [1, "x"]}, "Expected `float`"),
        ({"mode": "even"}, "Invalid enum value"),
    ],
)
def test_ill_typed_parameters_are_refused(params: dict[str, Any], match: str) -> None:
    """A typo in a parameter must not train with the default."""
    with pytest.raises(DefinitionError, match=match):
        Builder("p").add(s.numbers, **params)


def test_a_secret_itself_is_refused_and_not_repeated() -> None:
    """A key pasted into a spec would travel to every engine's database; the error must not print it either."""
    with pytest.raises(DefinitionError, match="no secret reference") as refused:
        Builder("p").add(s.whisper, key="hunter2hunter2")
    assert "hunter2" not in str(refused.value)


def test_wires_are_checked_where_they_are_written() -> None:
    """Labels wired to where images belong must fail at import, not after a night's preprocessing."""
    b = Builder("p")
    listed = b.add(s.listing, names=["a"])
    with pytest.raises(DefinitionError, match="wired to another kind"):
        b.add(s.total, given=listed.items)
    with pytest.raises(DefinitionError, match="'given' of total is not wired"):
        b.add(s.total)
    with pytest.raises(DefinitionError, match="has no output 'itens'"):
        listed.itens  # noqa: B018
    with pytest.raises(DefinitionError, match="two stages named 'listing'"):
        b.add(s.listing, names=[])
    with pytest.raises(DefinitionError, match="gate of report is no verdict"):
        b.add(s.report, given=b.add(s.numbers).made, gates=[listed.items])
    with pytest.raises(DefinitionError, match="asks approval of what it does not read"):
        b.add(s.report, name="r2", given=b.add(s.numbers, name="n2").made, approval=Approval(of="model"))


def test_optional_input_cannot_feed_a_required_one() -> None:
    """What may be absent cannot stand where something is needed."""

    @stage
    def needs(given: In[s.Numbers], made: Out[s.Numbers]) -> None:
        """Nothing."""

    b = Builder("p")
    with pytest.raises(DefinitionError, match="optional"):
        b.add(needs, given=b.input("maybe", s.Numbers, optional=True))


@pytest.mark.parametrize("name", loop.PIPELINES)
def test_pipelines_round_trip_and_fit_the_schema(name: str) -> None:
    """`pipeline.json` is all that an engine's environment sees."""
    pipeline = loop.PIPELINES[name](Settings())
    assert read_pipeline(pipeline.to_json()) == pipeline
    jsonschema.validate(msgspec.json.decode(pipeline.to_json()), schema("pipeline"))


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), _json_values, max_size=4))
def test_any_parameters_survive_the_round_trip(params: dict[str, Any]) -> None:
    """Whatever a user's parameter holds must arrive unchanged on the other side."""
    base = loop.prepare(Settings())
    changed = msgspec.structs.replace(
        base, nodes=(msgspec.structs.replace(base.nodes[0], params=params), *base.nodes[1:])
    )
    assert read_pipeline(changed.to_json()) == changed


def test_newer_spec_is_refused_naming_both_versions() -> None:
    """A newer spec read by an older engine could lose a gate without a word."""
    data = loop.prepare(Settings()).to_json().replace(b'"spec_version": 1', b'"spec_version": 7')
    with pytest.raises(DefinitionError, match=r"spec_version up to 1\n.*spec_version 7"):
        read_pipeline(data)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"spec_version": 1, "name": 3}', b"\xff"])
def test_unreadable_spec(data: bytes) -> None:
    """A truncated file is named as such."""
    with pytest.raises(DefinitionError, match=r"pipeline\.json"):
        read_pipeline(data)


def test_wires_of_a_spec_are_checked_too() -> None:
    """A spec edited by hand must not run a stage before what it reads."""
    pipeline = loop.develop(Settings())
    wrong = msgspec.structs.replace(pipeline, nodes=pipeline.nodes[::-1])
    with pytest.raises(DefinitionError, match="wired to what does not come before it"):
        read_pipeline(wrong.to_json())


@pytest.mark.parametrize("ref", ["radloop.nowhere:x", "radloop.stages.prepare:nothing", "radloop.errors:RadloopError"])
def test_unknown_stage(ref: str) -> None:
    """A stage that this environment lacks is named, with what to check."""
    with pytest.raises(DefinitionError, match=ref.split(":", maxsplit=1)[0]):
        load(ref)


def test_upto_keeps_what_a_stage_needs_and_no_more() -> None:
    """`radloop stage preprocess` must not wait for TFDV, and must not run on what is not there."""
    pipeline = loop.prepare(Settings())
    assert [node.name for node in pipeline.upto("preprocess").nodes] == [
        "ingest",
        "deidentify",
        "quality",
        "preprocess",
    ]
    assert pipeline.upto("publish") == pipeline
    with pytest.raises(DefinitionError, match="has no stage 'nothing'"):
        pipeline.upto("nothing")


def test_secret_parameters_are_listed() -> None:
    """An engine can only pass a secret by reference if the spec says which parameters are secrets."""
    node = loop.prepare(Settings()).node("deidentify")
    assert node.secrets == ("key",)
    assert node.params["key"] == "file:radloop.key"


def test_frozen() -> None:
    """A pipeline changed after it was checked is not the pipeline that was checked."""
    pipeline: Pipeline = loop.prepare(Settings())
    with pytest.raises(AttributeError):
        pipeline.name = "other"  # type: ignore[misc]


def test_secret_pattern() -> None:
    """Only references pass."""
    for good in ("env:RADLOOP_KEY", "file:radloop.key", "file:/etc/radloop/key"):
        assert msgspec.convert(good, Secret) == good
    for bad in ("", "env:", "RADLOOP_KEY", "env:1X", "plain text"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, Secret)
