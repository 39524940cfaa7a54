"""The conformance suite on the `local` engine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radloop.cli.stage import approvals
from radloop.engines import local
from radloop.errors import DefinitionError, RunLocked, SettingsError
from radloop.pipeline import Builder, Pipeline
from radloop.pipeline.records import RunResult
from radloop.stage.protocol import Event
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import EngineSuite, small


class TestLocal(EngineSuite):
    name = "local"

    @pytest.fixture
    def engine(self) -> Callable[..., RunResult]:
        def run(pipeline: Pipeline, *, home: Path, **options: Any) -> RunResult:
            return local.run(pipeline, home=home, approved=approvals(home), **options)

        return run


def test_second_run_at_once_is_refused(tmp_path: Path) -> None:
    """Two runs of one pipeline would publish two dataset versions from half of the images each."""
    import sys

    home = tmp_path / "home"
    script = (
        "import sys, time; from pathlib import Path; from radloop.stage.lock import hold\n"
        "with hold(Path(sys.argv[1]), 'suite', 'first-run'):\n    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(home)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(RunLocked, match=f"run first-run, process {holder.pid}"):
                local.run(small(), home=home)
        finally:
            holder.kill()
    for _ in range(600):  # the kernel drops the lock with the process
        try:
            assert local.run(small(), home=home).status == "succeeded"
            break
        except RunLocked:
            time.sleep(0.1)


def test_interrupt_ends_stages_in_other_processes(tmp_path: Path) -> None:
    """Ctrl-C while TFDV runs must give the terminal back at once, and leave no process behind."""
    b = Builder("suite")
    b.add(s.linger, seconds=120)
    b.add(s.numbers)

    def interrupt(event: Event) -> None:
        if event.node == "numbers":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        local.run(b.build(), home=tmp_path, emit=interrupt)
    assert time.monotonic() - began < 100


def test_missing_environment_names_the_command(tmp_path: Path) -> None:
    """Without TFDV a user must learn what to type, before anything has run."""
    b = Builder("suite")
    b.add(s.numbers)
    pipeline = b.build()
    node = pipeline.nodes[0].__class__(**{**as_dict(pipeline.nodes[0]), "environment": "tfdv"})
    with pytest.raises(SettingsError, match="radloop setup"):
        local.run(Pipeline(name="suite", nodes=(node,)), home=tmp_path)
    with pytest.raises(SettingsError, match="got: /nowhere/python"):
        local.run(Pipeline(name="suite", nodes=(node,)), home=tmp_path, environments={"tfdv": "/nowhere/python"})


def test_unknown_or_missing_pipeline_input(tmp_path: Path) -> None:
    """A dataset passed under a wrong name must not be passed over."""
    b = Builder("suite")
    b.add(s.total, given=b.input("given", s.Numbers))
    with pytest.raises(DefinitionError, match="needs the input 'given'"):
        local.run(b.build(), home=tmp_path)
    made = local.run(small(), home=tmp_path)
    path = Path(made.outputs["numbers.made"])
    with pytest.raises(DefinitionError, match="has no input 'givn'"):
        local.run(b.build(), home=tmp_path, inputs={"given": path, "givn": path})
    with pytest.raises(DefinitionError, match="of another kind"):
        local.run(b.build(), home=tmp_path, inputs={"given": Path(made.outputs["limit.verdict"])})


def test_code_is_part_of_the_key() -> None:
    """A mended `dicom/uids.py` must run deidentify again, or the old pseudonyms stay."""
    import grimp

    from radloop.stage.keys import code_digest

    upstream = grimp.build_graph("radloop").find_upstream_modules("radloop.stages.prepare")
    assert {"radloop.dicom.uids", "radloop.imaging.transforms", "radloop.datasets.manifest"} <= upstream
    assert "radloop.engines.local" not in upstream
    assert code_digest("radloop.stages.prepare") != code_digest("radloop.testing.suite_stages")


def as_dict(node: Any) -> dict[str, Any]:
    return {name: getattr(node, name) for name in node.__struct_fields__}
