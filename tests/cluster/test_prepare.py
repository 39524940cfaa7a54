"""The loop's own stages in pods: from DICOM files to tensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from radloop.begin import pipeline_of
from radloop.cli.init import make_project
from radloop.cli.stage import approvals
from radloop.engines import kubernetes, local
from radloop.engines.kubernetes import Options
from radloop.settings import load
from radloop.testing.hospital import make_hospital

from .conftest import OWNER

pytestmark = pytest.mark.cluster


def test_from_dicom_to_tensors_as_on_this_machine(home: Path, tmp_path: Path, options: Options) -> None:
    """A dataset that came out otherwise on the cluster would be another dataset under the same name.

    These stages write landing, archive, catalog, crosswalk and tensors, read two keys, and decode pixels in processes of
    their own: all of it as a user without rights, on a read-only root file system.
    """
    make_project(home)
    hospital = make_hospital(home / "hospital", patients=4, images=24, site="A", seed=3)
    (home / "radloop.toml").write_text('[ingest]\nfolders = [{path = "hospital/images", site = "site-a"}]\n')
    here = Path(shutil.copytree(home, tmp_path / "here"))
    for path in home.rglob("*"):
        os.chown(path, OWNER, OWNER)
    pipeline = pipeline_of("prepare", load(home)).upto("preprocess")
    there = kubernetes.run(pipeline, home=home, options=msgspec.structs.replace(options, secret=""))
    assert there.status == "succeeded", there.message
    alike = local.run(pipeline, home=here, approved=approvals(here))
    assert {name: there.output(name).digest for name in there.outputs} == {
        name: alike.output(name).digest for name in alike.outputs
    }
    assert there.output("preprocess.tensors").digest
    assert len(list((home / "archive").rglob("*.dcm"))) >= len(hospital.good)
    assert {path.stat().st_uid for path in (home / "archive").rglob("*")} == {OWNER}
