"""Patients that turn out to be one person, through the real stages; and a late instance of a study already used."""

from __future__ import annotations

from pathlib import Path

import pytest

from radloop.begin import inputs_of
from radloop.cli.init import make_project
from radloop.cli.run import run_one
from radloop.errors import DataError
from radloop.settings import load
from radloop.stages.project import open_catalog
from radloop.testing.hospital import make_hospital

pytestmark = pytest.mark.slow


def test_after_a_link_no_training_begins_until_each_person_has_one_part(home: Path, tfdv_python: Path) -> None:
    """If this failed, a person with two numbers would be learnt from and tested on, and the figures believed."""
    make_project(home)
    make_hospital(home / "hospital", patients=12, images=36, site="A", seed=3)
    folders = '[ingest]\nfolders = [{path = "hospital/images", site = "site-a"}]\n'
    (home / "radloop.toml").write_text(f'{folders}[environments]\ntfdv = "{tfdv_python}"\n')
    first = run_one(home, load(home), "prepare")
    assert first.status == "succeeded", first.message
    again = run_one(home, load(home), "prepare")
    assert again.output("publish.dataset").digest == first.output("publish.dataset").digest
    with open_catalog(home) as catalog:
        parts = catalog.parts()
        learnt, tested = (next(p for p, part in parts.items() if part == wanted) for wanted in ("train", "test"))
        assert catalog.link([(learnt, tested, "double registration")], by="ada").datasets
    with pytest.raises(DataError, match=r"one person stands in several parts.*\n.*\n.*\n.*radloop run prepare"):
        inputs_of(home, "develop")
    second = run_one(home, load(home), "prepare")
    assert second.status == "succeeded", second.message
    with open_catalog(home) as catalog:
        old, new = catalog.datasets()
        assert new.flags == {}
        assert {m.part for m in catalog.members(new.digest) if m.patient in (learnt, tested)} == {"train"}
        assert {m.part for m in catalog.members(old.digest) if m.patient in (learnt, tested)} == {"train", "test"}
    gate = run_one(home, load(home), "develop", upto="split")
    assert gate.status == "succeeded", gate.message
    told = gate.output("split.split").json("split.json")
    assert isinstance(told, dict)
    assert (told["patients"], told["crossing_patients"]) == (len(parts) - 1, 0)
