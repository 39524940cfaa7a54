"""The `kubernetes` engine: every stage is a Job, from an image that holds `radloop` (deploy/images/core).

The project's folder is mounted in each pod at the path that it has here, so that requests, records and what stages write down
(MLflow's artifact locations) say the same on both sides. Pods run as the owner of that folder, never as root, on a read-only
root file system. Order, gates, cache, retries and records are those of `pipeline.run.walk`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from radloop.engines.kubernetes.cluster import Cluster
from radloop.engines.kubernetes.executor import Jobs
from radloop.engines.kubernetes.job import Options, image_of, secrets
from radloop.errors import DefinitionError, SettingsError
from radloop.pipeline import Pipeline
from radloop.pipeline.records import RunResult
from radloop.pipeline.run import walk
from radloop.stage.execute import Emit

__all__ = ["Options", "run"]


def run(
    pipeline: Pipeline,
    *,
    home: Path,
    options: Options,
    inputs: Mapping[str, Path | None] | None = None,
    emit: Emit = lambda event: None,
) -> RunResult:
    """Run a pipeline, each stage as a Job.

    Args:
        pipeline: what to run.
        home: the project's home directory, which the pods mount.
        options: where.
        inputs: artifact directory of each pipeline input, inside the project.
        emit: receives every event.

    Raises:
        SettingsError: an image, the Secret, the project's owner or the cluster's configuration is not as it must be.
        UnsupportedByEngine: a stage reads a secret that lies outside the project.
        DefinitionError: an input lies outside the project.
        EngineError: the cluster does not answer, or does not let this user make Jobs.
    """
    home = home.resolve()
    _check(pipeline, home, inputs or {}, options)
    with closing(Cluster(options)) as cluster:
        cluster.check()
        return walk(pipeline, Jobs(cluster, home, options), home=home, inputs=inputs, emit=emit)


def _check(pipeline: Pipeline, home: Path, inputs: Mapping[str, Path | None], options: Options) -> None:
    for node in pipeline.nodes:
        image_of(node, options)
        secrets(node, home, options)
    for name, path in inputs.items():
        if path is not None and not path.resolve().is_relative_to(home):
            raise DefinitionError(
                f"the input {name!r} lies outside the project, which is all that a pod sees",
                expected=f"a folder in {home}",
                got=path,
            )
    home.mkdir(parents=True, exist_ok=True)
    owner = home.stat().st_uid
    if owner == 0:
        raise SettingsError(
            "the project's folder belongs to root, and a stage never runs as root",
            expected="a folder that belongs to the user as whom the stages shall run",
            got=home,
            next_step=f"chown -R 10001:10001 {home} (any user but 0; its files are that user's then)",
        )
    if os.geteuid() not in (0, owner):
        raise SettingsError(
            "the project's folder is somebody else's: what the pods leave there could not be read here",
            expected=f"to be run by its owner, user {owner}, or by root",
            got=f"user {os.geteuid()}",
        )
