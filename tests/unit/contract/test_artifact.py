"""Artifacts: whole or not there, and named by what they hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.artifact import Kind, Output, Verdict, commit, digest_of, each, open_artifact
from radloop.errors import ArtifactError


class Thing(Kind):
    """Any member counts."""

    name = "thing"


class Weights(Kind):
    """Only weights count; the history rides along."""

    name = "weights"
    digested = ("weights.*",)


def make(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(exist_ok=True)
    return folder


def test_digest_is_of_content_alone(tmp_path: Path) -> None:
    """If a folder's name or a time entered a digest, no two machines would ever agree on a dataset version."""
    a = commit(make(tmp_path / "a", {"x": b"1", "d/y": b"2"}), tmp_path / "A", Thing, {})
    b = commit(make(tmp_path / "b", {"d/y": b"2", "x": b"1"}), tmp_path / "B", Thing, {"n": 3})
    c = commit(make(tmp_path / "c", {"d/y": b"2", "x": b"2"}), tmp_path / "C", Thing, {})
    assert a.digest == b.digest != c.digest


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text("0123456789abcdef", min_size=64, max_size=64)))
def test_digest_does_not_depend_on_order(members: dict[str, str]) -> None:
    """A file system that lists in another order must not make another artifact."""
    assert digest_of(members) == digest_of(dict(reversed(list(members.items()))))


def test_only_digested_members_count(tmp_path: Path) -> None:
    """A training that took longer is the same model."""
    a = commit(make(tmp_path / "a", {"weights.bin": b"w", "history.json": b"1"}), tmp_path / "A", Weights, {})
    b = commit(make(tmp_path / "b", {"weights.bin": b"w", "history.json": b"2"}), tmp_path / "B", Weights, {})
    assert a.digest == b.digest
    assert a.description.members != b.description.members


def test_changed_member_is_found(tmp_path: Path) -> None:
    """A manifest edited by hand must not train a model under the old name."""
    done = commit(make(tmp_path / "a", {"x": b"1"}), tmp_path / "A", Thing, {})
    (done.path / "x").write_bytes(b"2")
    with pytest.raises(ArtifactError, match="'x' of A changed after it was committed"):
        open_artifact(done.path, verify=True)
    (done.path / "x").unlink()
    with pytest.raises(ArtifactError, match="got: no file"):
        open_artifact(done.path, verify=True)


def test_committed_is_never_replaced_by_other_content(tmp_path: Path) -> None:
    """Two runs that disagree under one name mean a stage is not deterministic: said, not overwritten."""
    commit(make(tmp_path / "a", {"x": b"1"}), tmp_path / "A", Thing, {})
    commit(make(tmp_path / "b", {"x": b"1"}), tmp_path / "A", Thing, {})
    assert not (tmp_path / "b").exists()
    with pytest.raises(ArtifactError, match="already committed with other content"):
        commit(make(tmp_path / "c", {"x": b"2"}), tmp_path / "A", Thing, {})


@pytest.mark.parametrize(
    ("description", "match"),
    [(None, "no artifact is there"), (b"{", "cannot be read"), (b'{"kind": "thing"}', "cannot be read")],
)
def test_what_is_no_artifact_is_refused(tmp_path: Path, description: bytes | None, match: str) -> None:
    """Half an artifact read as a whole one is a dataset with patients missing."""
    folder = make(tmp_path / "a", {"x": b"1"})
    if description is not None:
        (folder / "artifact.json").write_bytes(description)
    with pytest.raises(ArtifactError, match=match):
        open_artifact(folder)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    """Labels given where images are expected are a wiring error, not an empty dataset."""
    done = commit(make(tmp_path / "a", {"x": b"1"}), tmp_path / "A", Thing, {})
    with pytest.raises(ArtifactError, match="expected: weights version 1"):
        open_artifact(done.path, Weights)


def test_unknown_verdict_is_refused(tmp_path: Path) -> None:
    """A gate that says 'ok' must not be read as anything."""
    out: Output[Verdict] = Output(tmp_path)
    with pytest.raises(ArtifactError, match="pass, stop or wait"):
        out.verdict("ok", "")


def test_each_gives_its_items_in_order(tmp_path: Path) -> None:
    """Series collected in another order than listed would be joined to other labels."""
    paths = [
        commit(make(tmp_path / f"s{i}", {"x": b"%d" % i}), tmp_path / f"{i:04d}", Thing, {}).path for i in range(12)
    ]
    opened = each(paths, Thing)
    assert [(item.path / "x").read_bytes() for item in opened.items()] == [b"%d" % i for i in range(12)]
    assert opened.digest == each(paths).digest != each(paths[::-1]).digest


def test_kill_while_committing_leaves_nothing_visible(tmp_path: Path) -> None:
    """Power that goes while a large dataset is hashed must not leave half of it under its final name."""
    script = (
        "import os, sys; from pathlib import Path; from radloop import artifact\n"
        "class T(artifact.Kind):\n    name = 'thing'\n"
        "real = artifact.sync\n"
        "def sync(path):\n"
        "    real(path)\n"
        "    if path.name == 'm5': os.kill(os.getpid(), 9)\n"
        "artifact.sync = sync\n"
        "folder = Path(sys.argv[1], 'w'); folder.mkdir()\n"
        "for i in range(10): (folder / f'm{i}').write_bytes(b'x' * 1000)\n"
        "artifact.commit(folder, Path(sys.argv[1], 'final'), T, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
