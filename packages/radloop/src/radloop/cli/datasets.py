"""`radloop dataset`: the versions of the dataset, and what changed between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, catalog_at, command, group, short
from radloop.errors import DataError

if TYPE_CHECKING:
    from radloop.catalog.schema import Dataset
    from radloop.catalog.store import Catalog

LATEST = "latest"
_SHORTEST = 6  # characters of a digest
Ref = Annotated[str, typer.Argument(metavar="VERSION", help="Its number, the beginning of its digest, or latest.")]


def register(app: typer.Typer) -> None:
    """Add `dataset list`, `show` and `diff`."""
    dataset = group(app, "dataset", "The versions of the dataset, and what changed between them.")

    @command(
        dataset,
        "list",
        examples=("radloop dataset list",),
        after="`radloop dataset show latest`, or `radloop dataset diff 1 2`.",
    )
    def list_(project: Project = HERE, json: Json = False) -> None:
        """List all dataset versions. A version never changes; `radloop run prepare` publishes the next."""
        with catalog_at(project) as catalog:
            versions = catalog.datasets()
        if json:
            output.print_json(versions)
            return
        output.print_table(
            "Dataset versions",
            ["no.", "digest", "published", "instances", "patients", "labelled", "positive", "flags"],
            [
                (
                    *(v.number, short(v.digest), v.created_at[:19]),
                    *(v.counts.get(name, "") for name in ("instances", "patients", "labelled", "positive")),
                    ", ".join(v.flags),
                )
                for v in versions
            ],
        )

    @command(
        dataset,
        "show",
        examples=("radloop dataset show latest", "radloop dataset show 3f9c0d --json"),
        after="`radloop dataset diff 1 latest` says what changed; `radloop run develop` trains on the latest.",
    )
    def show(version: Ref = LATEST, project: Project = HERE, json: Json = False) -> None:
        """Show one version: counts by part, site and label, the models trained on it, and its flags.

        A flag says that an instance in it was corrected since (another patient, other pixels): models trained on the
        version carry it too.
        """
        with catalog_at(project) as catalog:
            told = summary(project, catalog, find(catalog, version))
        if json:
            output.print_json(told)
            return
        output.print_pairs(
            f"Dataset version {told['number']}",
            [
                ("digest", told["digest"]),
                ("published", told["created_at"][:19]),
                ("made after", short(told["parent"])),
                ("manifest", told["path"]),
                *((name, count) for name, count in told["counts"].items() if isinstance(count, int)),
                ("models", ", ".join(short(digest) for digest in told["models"])),
                *((f"flag {name}", output.plural(len(uids), "instance")) for name, uids in told["flags"].items()),
            ],
        )
        output.print_table(
            "Instances",
            ["part", "site", "label", "instances", "patients"],
            [(r["part"], r["site"], r["label"], r["instances"], r["patients"]) for r in told["groups"]],
        )

    @command(
        dataset,
        "diff",
        examples=("radloop dataset diff 1 2", "radloop dataset diff 3f9c0d latest --json"),
        after="`radloop run develop` trains on the latest version.",
    )
    def diff(
        a: Annotated[str, typer.Argument(metavar="A", help="The version before.")],
        b: Annotated[str, typer.Argument(metavar="B", help="The version after.")] = LATEST,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Say what changed from version A to version B: added, removed, revised, relabelled, moved.

        `moved` should be nought: a patient's part is decided once and kept.
        """
        from radloop.datasets import manifest

        with catalog_at(project) as catalog:
            first, second = find(catalog, a), find(catalog, b)
        changes = manifest.diff(_table(project, first), _table(project, second))
        if json:
            output.print_json({"a": first.digest, "b": second.digest, **changes})
            return
        output.print_table(
            f"From version {first.number} to version {second.number}",
            ["change", "instances", "by site", "by label"],
            [(name, c["count"], _counts(c["by_site"]), _counts(c["by_label"])) for name, c in changes.items()],
        )


def find(catalog: Catalog, ref: str) -> Dataset:
    """The version that a number, the beginning of a digest or `latest` names.

    Raises:
        DataError: none, or several.
    """
    versions = catalog.datasets()
    if not versions:
        raise DataError("no dataset version was published yet", next_step="radloop run prepare")
    if ref == LATEST:
        return versions[-1]
    found = [v for v in versions if str(v.number) == ref]
    if not found and len(ref) >= _SHORTEST:
        found = [v for v in versions if v.digest.startswith(ref.lower())]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{v.number} ({short(v.digest)})" for v in versions[-5:])
    raise DataError(
        "several dataset versions begin like this" if found else f"there is no dataset version {ref!r}",
        expected=f"a number, {_SHORTEST} or more characters of a digest, or {LATEST}; the last are {known}",
        next_step="radloop dataset list",
    )


def summary(project: Path, catalog: Catalog, version: Dataset) -> dict[str, Any]:
    """What `dataset show` tells."""
    import msgspec

    rows = _table(project, version).select(["part", "site", "label", "patient"]).to_pylist()
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        label = "none" if row["label"] is None else str(row["label"])
        groups.setdefault((row["part"], row["site"], label), []).append(row["patient"])
    told: dict[str, Any] = msgspec.to_builtins(version)
    told["models"] = [model.digest for model in catalog.models() if model.dataset_digest == version.digest]
    told["groups"] = [
        {"part": part, "site": site, "label": label, "instances": len(patients), "patients": len(set(patients))}
        for (part, site, label), patients in sorted(groups.items())
    ]
    return told


def _table(project: Path, version: Dataset) -> Any:
    """The manifest; an ArtifactError if it is gone or changed since it was published."""
    from radloop.datasets import manifest

    return manifest.read(project / version.path, expected_digest=version.digest)


def _counts(by: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in by.items())
