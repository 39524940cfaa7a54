"""Records of runs."""

from __future__ import annotations

from pathlib import Path

from radloop.pipeline import Builder
from radloop.pipeline.records import Record
from radloop.testing import suite_stages as s


def test_runs_sort_as_they_began_within_a_second_too(tmp_path: Path) -> None:
    """If this failed, `develop` would train on the dataset version before the newest, though patients were linked since."""
    b = Builder("prepare")
    b.add(s.numbers)
    pipeline = b.build()
    ids = []
    for _ in range(20):
        record = Record.open(pipeline, tmp_path)
        ids.append(record.run_id)
        record.close()
    assert ids == sorted(set(ids))
