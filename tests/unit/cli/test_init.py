"""`radloop init`: the settings file says what the code says, and a key is made once."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from radloop.cli.init import make_project
from radloop.engines.kubernetes import Options
from radloop.errors import SettingsError
from radloop.imaging.transforms import Preprocessing
from radloop.learning.evaluate import EvaluateConfig
from radloop.learning.gates import GateConfig
from radloop.learning.train import TrainConfig
from radloop.monitoring.drift import Thresholds
from radloop.serving.judge import Margins
from radloop.settings import Approver, DimsePacs, Folder, FromPacs, MlflowPool, Settings, WebPacs, load

from .conftest import Command, Ran

TEMPLATE = Path(make_project.__code__.co_filename).with_name("project.toml").read_text()
ROOMS: dict[tuple[str, ...], type[msgspec.Struct]] = {
    ("preprocess",): Preprocessing,
    ("train",): TrainConfig,
    ("evaluate",): EvaluateConfig,
    ("gates",): GateConfig,
    ("watch", "drift"): Thresholds,
    ("release", "judge"): Margins,
    ("kubernetes",): Options,
}
"""Sections that a room reads, and what it understands."""

EXAMPLES = {
    *(("listen", name) for name in ("senders", "metrics_port")),
    *(("listen", "tls", name) for name in ("certificate", "key")),
    *(("listen", "stow", name) for name in ("port", "tokens")),
    *(("ingest", name) for name in ("folders", "pacs")),
    ("serve", "pools"),
    ("deidentify", "pixel_rules"),
    ("pacs",),
    ("approvers",),
    ("environments",),
}
"""What has no default and stands in the template as an example."""


def uncommented() -> dict[str, Any]:
    """The template with every setting switched on."""
    return tomllib.loads(re.sub(r"^#(?=[A-Za-z_\[])", "", TEMPLATE, flags=re.MULTILINE))


def test_every_setting_stands_in_the_template() -> None:
    """A setting that the file does not show is one that nobody finds."""
    told = uncommented()
    for field in msgspec.structs.fields(Settings):
        assert field.name in told, f"[{field.name}] is not in the template"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            missing = set(field.type.__struct_fields__) - told[field.name].keys()
            assert not missing, f"[{field.name}] lacks {sorted(missing)}"
    for path, struct in ROOMS.items():
        assert set(struct.__struct_fields__) == set(_at(told, path)), path
    assert set(Folder.__struct_fields__) == set(told["ingest"]["folders"][0])
    assert set(FromPacs.__struct_fields__) == set(told["ingest"]["pacs"][0])
    assert set(MlflowPool.__struct_fields__) == set(told["serve"]["pools"]["tracking"])
    assert set(Approver.__struct_fields__) == set(told["approvers"]["anna"])
    assert {*DimsePacs.__struct_fields__, "kind"} == set(told["pacs"]["main"])
    assert set(WebPacs.__struct_fields__) <= set(told["pacs"]["main"]) | set(told["pacs"]["web"])


def test_the_template_names_nothing_unknown() -> None:
    """A comment that shows a setting which radloop refuses costs the user's trust in all the others."""
    settings = msgspec.convert(uncommented(), Settings)
    for path, struct in ROOMS.items():
        msgspec.convert(_at(msgspec.to_builtins(settings), path), struct)


def test_the_template_shows_the_defaults() -> None:
    """Whoever uncomments a line to see what it does must not change anything by it."""
    _compare((), uncommented(), msgspec.to_builtins(Settings()))
    for path, struct in ROOMS.items():
        for name, default in msgspec.to_builtins(struct()).items():
            if default is not None:  # None: decided when it runs; the comment says how
                assert _at(uncommented(), path)[name] == default, f"{path} {name}"


def _compare(path: tuple[str, ...], told: dict[str, Any], defaults: dict[str, Any]) -> None:
    for name, value in told.items():
        here = (*path, name)
        if here in EXAMPLES or here in ROOMS:
            continue
        if isinstance(value, dict):
            _compare(here, value, defaults[name])
        else:
            assert value == (list(default) if isinstance(default := defaults[name], tuple) else default), here


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        tree = tree[name]
    return tree


def test_every_section_and_setting_has_a_sentence() -> None:
    """A bare name says nothing of what it is for."""
    lines = TEMPLATE.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\[[a-z.]+\]$", line):
            around = [lines[number - 1], *lines[number + 1 : number + 2]]
            assert any(re.match(r"# \w", one) for one in around), line


def test_as_written_it_is_all_defaults(tmp_path: Path) -> None:
    """The file that `init` writes must be one that radloop reads, and change nothing."""
    make_project(tmp_path / "new")
    assert load(tmp_path / "new") == Settings()


def test_init_makes_keys_that_only_you_can_read(radloop: Command, tmp_path: Path) -> None:
    """The two keys are all that stands between a pseudonym and a name."""
    ran = radloop("init", "fresh", cwd=tmp_path)
    assert ran.code == 0, ran.err
    keys = [tmp_path / "fresh" / name for name in ("radloop.key", "crosswalk.key")]
    for key in keys:
        assert key.stat().st_mode & 0o777 == 0o600
        assert re.fullmatch(r"[0-9a-f]{64}\n", key.read_text())
        assert key.read_text().strip() not in ran.out
        assert f"{key.name} " in ran.out
    assert keys[0].read_text() != keys[1].read_text()
    assert (tmp_path / "fresh").stat().st_mode & 0o077 == 0
    assert "Lost:" in ran.out
    assert "Leaked:" in ran.out


def test_two_projects_have_two_keys(tmp_path: Path) -> None:
    """A key that came out the same twice would link the patients of two hospitals."""
    for name in ("a", "b"):
        make_project(tmp_path / name)
    assert (tmp_path / "a/radloop.key").read_text() != (tmp_path / "b/radloop.key").read_text()


@pytest.mark.parametrize("present", ["radloop.toml", "radloop.key", "crosswalk.key"])
def test_init_never_overwrites(tmp_path: Path, present: str) -> None:
    """A key that is overwritten is lost, and with it every pseudonym it made."""
    (tmp_path / present).write_text("precious")
    with pytest.raises(SettingsError, match="there is a project here already"):
        make_project(tmp_path)
    assert (tmp_path / present).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [present]


def test_init_again_is_refused(inside: Callable[..., Ran], project: Path) -> None:
    """Who types it twice must not start from nothing."""
    before = (project / "radloop.key").read_text()
    ran = inside("init", "--json")
    assert ran.code == 1
    assert ran.json["error"]["what"] == "there is a project here already"
    assert (project / "radloop.key").read_text() == before


def test_gitignore_keeps_keys_and_data_out(tmp_path: Path) -> None:
    """A key or an image that was once pushed cannot be called back."""
    make_project(tmp_path)
    ignored = (tmp_path / ".gitignore").read_text().splitlines()
    for name in ("*.key", "landing/", "quarantine/", "identity/", "archive/", "catalog.db*", "predictions/", "mlflow/"):
        assert name in ignored


def test_an_own_gitignore_is_kept(tmp_path: Path) -> None:
    """The user's file is the user's."""
    (tmp_path / ".gitignore").write_text("mine\n")
    assert ".gitignore" not in make_project(tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "mine\n"
