"""The engine conformance suite. An engine's test file is one fixture:

    class TestMine(EngineSuite):
        name = "mine"

        @pytest.fixture
        def engine(self):
            return my_engine.run

`engine(pipeline, home=..., inputs=..., emit=...) -> RunResult`. Artifact digests must be those of the `local` engine.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from radloop.artifact import open_artifact
from radloop.catalog.store import Catalog
from radloop.engines import local
from radloop.pipeline import Builder, Pipeline, read_pipeline
from radloop.pipeline.records import RunResult
from radloop.stage.protocol import Approval, Event
from radloop.testing import suite_stages as s

SECRET = "correct-horse-battery-staple"


def small(at_most: float = 100.0, ask: bool = False, **params: Any) -> Pipeline:
    """numbers -> total -> limit, and report behind the gate."""
    b = Builder("suite")
    made = b.add(s.numbers, **params)
    summed = b.add(s.total, given=made.made)
    gate = b.add(s.limit, given=summed.summed, at_most=at_most, ask=ask)
    b.add(s.report, given=summed.summed, gates=[gate.verdict])
    return b.build()


def only(stage: Any, **params: Any) -> Pipeline:
    """A pipeline of one stage."""
    b = Builder("suite")
    b.add(stage, **params)
    return b.build()


def ran(home: Path, name: str) -> int:
    """How often a stage left its mark."""
    mark = home / f"{name}.ran"
    return len(mark.read_text()) if mark.exists() else 0


class EngineSuite:
    """What every engine must do alike. `name`: the engine's, under which its results are kept (docs/engines.md)."""

    name: ClassVar[str] = ""

    @pytest.fixture
    def engine(self) -> Callable[..., RunResult]:
        raise NotImplementedError("give the engine's run function")

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        return tmp_path / "home"

    @pytest.fixture
    def small_disk(self, home: Path) -> Iterator[Path]:
        """The home on a file system of 8 MB."""
        home.mkdir(exist_ok=True)
        owner = home.stat()
        options = f"size=8m,mode=700,uid={owner.st_uid},gid={owner.st_gid}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(home)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("a small file system can only be mounted by root")
        yield home
        subprocess.run(["umount", "-l", home], check=True)

    def values(self, result: RunResult, source: str) -> Any:
        content = result.output(source).json("numbers.json")
        assert isinstance(content, dict)
        return content

    def test_typed_parameters_arrive(self, engine: Any, home: Path) -> None:
        """A float that becomes an int, or a text that loses its umlaut, trains another model than was asked for."""
        params: dict[str, Any] = {
            "count": 2,
            "scale": 0.1,
            "negative": True,
            "weights": [0.5, 1e-9],
            "unit": "µm ☢ 肺",
            "mode": "odd",
        }
        content = self.values(engine(small(**params), home=home), "numbers.made")
        assert content == {"values": [0.0, -0.1], "weights": [0.5, 1e-9], "unit": "µm ☢ 肺", "mode": "odd"}

    def test_digests_are_those_of_local(self, engine: Any, home: Path, tmp_path: Path) -> None:
        """Two engines that make different artifacts of one pipeline cannot stand for each other."""
        ours, theirs = engine(small(), home=home), local.run(small(), home=tmp_path / "local")
        assert ours.status == "succeeded", ours.message
        assert {o: ours.output(o).digest for o in ours.outputs} == {o: theirs.output(o).digest for o in theirs.outputs}

    def test_pipeline_json_says_the_same(self, engine: Any, home: Path) -> None:
        """An engine that reads pipeline.json must run what was written in Python."""
        assert read_pipeline(small().to_json()) == small()
        assert engine(read_pipeline(small().to_json()), home=home).status == "succeeded"

    def test_failure_brings_the_stages_own_words(self, engine: Any, home: Path) -> None:
        """'exit code 1' sends a user reading logs at night; the error itself says what to do."""
        result = engine(only(s.refuse), home=home)
        assert result.status == "failed"
        assert "expected: one value a key" in result.message
        assert result.results["refuse"].error == "DataError"

    def test_a_foreign_errors_text_stays_behind(self, engine: Any, home: Path) -> None:
        """A library's error may repeat a patient's name, and a result travels into logs, MLflow and mails."""
        result = engine(only(s.stumble), home=home)
        assert result.status == "failed"
        assert result.results["stumble"].error == "ValueError"
        assert "suite_stages.py" in result.message
        assert "it may hold PHI" in result.message
        assert [p for p in home.rglob("*") if p.is_file() and b"DOE^JANE" in p.read_bytes()] == []

    def test_killed_stage_has_failed(self, engine: Any, home: Path) -> None:
        """A stage shot by the kernel's out-of-memory killer must not leave half an artifact behind as a whole one."""
        result = engine(only(s.die), home=home)
        assert result.status == "failed"
        assert "SIGKILL" in result.message
        assert not result.outputs
        assert not list((home / "artifacts").glob("*/made"))

    def test_exit_zero_without_closing_event_has_failed(self, engine: Any, home: Path) -> None:
        """A library that calls exit(0) in the middle must not pass for success."""
        result = engine(only(s.vanish), home=home)
        assert result.status == "failed"
        assert "without its closing event" in result.message

    def test_time_limit(self, engine: Any, home: Path) -> None:
        """A stage that hangs must not hold the loop for ever."""
        result = engine(only(s.hang), home=home)
        assert result.status == "failed"
        assert "limit of 1 s" in result.message

    def test_garbage_on_the_streams(self, engine: Any, home: Path) -> None:
        """What a native library prints must neither close a stage nor break the engine."""
        result = engine(only(s.garbage), home=home)
        assert result.status == "succeeded", result.message
        assert self.values(result, "garbage.made") == {"values": [7]}

    def test_gate_stops_what_follows(self, engine: Any, home: Path) -> None:
        """A model that failed its gate must not be registered."""
        result = engine(small(at_most=1.0), home=home)
        assert result.status == "stopped"
        assert "total 4.5, bound 1" in result.message
        assert ran(home, "report") == 0

    def test_a_verdict_with_nothing_behind_it_stops_the_run(self, engine: Any, home: Path) -> None:
        """The last gate of a pipeline counts as much as the first."""
        b = Builder("suite")
        b.add(s.limit, given=b.add(s.numbers, count=1).made, at_most=-1.0)
        assert engine(b.build(), home=home).status == "stopped"

    def test_undetermined_gate_waits_for_approval(self, engine: Any, home: Path) -> None:
        """'Insufficient evidence' goes on only when a person says so, and then without running anything twice."""
        waiting = engine(small(ask=True), home=home)
        assert waiting.status == "waiting", waiting.message
        assert "radloop approve" in waiting.message
        approve(home, waiting.output("limit.verdict").digest, "clinical")
        assert engine(small(ask=True), home=home).status == "succeeded"
        assert (ran(home, "total"), ran(home, "report")) == (1, 1)

    def test_approval_needs_the_role(self, engine: Any, home: Path) -> None:
        """Only who may release may release."""
        b = Builder("suite")
        b.add(s.report, given=b.add(s.numbers).made, approval=Approval(of="given", role="clinical"))
        pipeline = b.build()
        subject = engine(pipeline, home=home).output("numbers.made").digest
        approve(home, subject, "engineer")
        assert engine(pipeline, home=home).status == "waiting"
        approve(home, subject, "clinical")
        assert engine(pipeline, home=home).status == "succeeded"

    def test_secret_stays_a_reference(self, engine: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key in a spec, a log or a record is a key lost."""
        monkeypatch.setenv("RADLOOP_SUITE_SECRET", SECRET)
        pipeline = only(s.whisper)
        result = engine(pipeline, home=home)
        assert self.values(result, "whisper.made") == {"values": [len(SECRET)]}
        assert SECRET.encode() not in pipeline.to_json()
        leaked = [p for p in home.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
        assert leaked == []

    def test_nothing_known_is_run_again(self, engine: Any, home: Path) -> None:
        """A day of preprocessing is paid once."""
        first, second = engine(small(), home=home), engine(small(), home=home)
        assert ran(home, "total") == 1
        assert second.results["total"].cached
        assert first.outputs == second.outputs
        assert engine(small(count=4), home=home).results["total"].cached is False

    def test_resumes_after_a_loss(self, engine: Any, home: Path) -> None:
        """What was half-written when the power went is made anew; what was whole is kept."""
        first = engine(small(), home=home)
        whole = Path(first.outputs["total.summed"]).parent
        (whole / "result.json").write_bytes(b'{"status": "succ')
        shutil.copytree(whole, whole.with_name(f".{whole.name}.999999999"))
        again = engine(small(), home=home)
        assert again.status == "succeeded"
        assert (ran(home, "total"), ran(home, "report")) == (2, 1)
        assert not list((home / "artifacts").glob(".*"))
        assert open_artifact(Path(again.outputs["total.summed"]), verify=True)

    def test_full_disk_leaves_nothing_half_written(self, small_disk: Path, engine: Any) -> None:
        """Half an artifact under its final name would be trained on tomorrow; what was whole before must stay."""
        before = engine(small(), home=small_disk)
        full = engine(only(s.numbers, count=1_000_000), home=small_disk)
        assert full.status == "failed"
        assert "No space left on device" in full.message
        assert not list((small_disk / "artifacts").glob(".*"))
        again = engine(small(), home=small_disk)
        assert again.outputs == before.outputs
        assert all(result.cached for result in again.results.values())

    def test_retries_failed_tries(self, engine: Any, home: Path) -> None:
        """A share that goes away for a moment does not end a night's run."""
        result = engine(only(s.flaky), home=home)
        assert result.status == "succeeded", result.message
        assert ran(home, "flaky") == 3

    def test_fans_out_and_collects(self, engine: Any, home: Path) -> None:
        """One item each, in the listed order, none left out and none run twice."""
        b = Builder("suite")
        items = b.add(s.listing, names=["a", "bb", "ccc", "ü/x y"])
        pieces = b.add(s.piece, of=items.items, over=items.items)
        b.add(s.gather, pieces=pieces.made)
        result = engine(b.build(), home=home)
        assert result.status == "succeeded", result.message
        assert self.values(result, "gather.made") == {"values": [1, 2, 3, 5]}
        engine(b.build(), home=home)
        assert ran(home, "piece-" + b"bb".hex()) == 1

    def test_events(self, engine: Any, home: Path) -> None:
        """Whoever watches sees each stage start, move and close, in that order."""
        events: list[Event] = []
        engine(small(count=5), home=home, emit=events.append)
        seen = [e for e in events if e.node == "numbers"]
        assert seen[0].event == "started"
        assert seen[-1].event == "closed"
        assert any(e.event == "progress" and e.done == e.total == 5 for e in seen)

    def test_records_are_kept(self, engine: Any, home: Path) -> None:
        """A run can be audited from its files."""
        result = engine(small(), home=home)
        folder = home / "runs" / result.run_id
        for name in ("numbers", "total", "limit", "report"):
            assert (folder / name / "request.json").stat().st_size
            assert b'"status":"succeeded"' in (folder / name / "result.json").read_bytes()
        assert b'"status":"succeeded"' in (folder / "run.json").read_bytes()


def approve(home: Path, digest: str, role: str) -> None:
    """Record an approval as `radloop approve` does."""
    with Catalog(f"sqlite:///{home / 'catalog.db'}") as catalog:
        catalog.ledger.append("approval", digest, {"role": role, "why": "suite"}, actor="suite")
