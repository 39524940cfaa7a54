"""Which studies are complete: nothing of them has come for a while, or all that a PACS says it holds has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from radloop.errors import PacsError, SettingsError
from radloop.stage.execute import log

if TYPE_CHECKING:
    from radloop.catalog.schema import StudyState
    from radloop.catalog.store import Catalog
    from radloop.dicom.landing import Landing

Count = Callable[[str], int | None]
"""How many instances of a study (its original StudyInstanceUID) there are, or None: `Pacs.count`."""

_SETTLED = (
    0.1  # of the quiet period: a study that is being sent to the PACS and to us at once has a count that still grows
)
_MOST_ASKED = 50


def release_complete(home: Path, landing: Landing, catalog: Catalog) -> str:
    """Give the pipeline what is complete; what to say of studies that are not, or nothing.

    Where PACS are configured, they are asked about studies that still wait.
    """
    from radloop.catalog.studies import complete, seconds_left
    from radloop.stages.project import settings_of

    settings = settings_of(home)
    quiet_s = settings.ingest.quiet_s
    found = catalog.unreleased()
    waiting = _without(found, complete(found, quiet_s))
    if waiting and settings.pacs:
        with ExitStack() as stack:
            ask_counts(waiting, _counts(home, list(settings.pacs), stack), landing, catalog, quiet_s)
        found = catalog.unreleased()
    released = catalog.release([study.study_uid for study in complete(found, quiet_s)], actor="ingest")
    again = sum(revision > 1 for revision in released.values())
    if again:
        log(f"late instances: {again} studies have a new revision")
    waiting = [study for study in found if study.study_uid not in released]
    if not waiting:
        return ""
    left, images = seconds_left(waiting, quiet_s), sum(study.new for study in waiting)
    return (
        f"{len(waiting)} studies ({images} images) are still arriving: a study counts as complete when nothing of it has come for"
        f" {quiet_s:g} s ([ingest] quiet_s), the last of these in {left:.0f} s"
    )


def ask_counts(
    waiting: Sequence[StudyState], counts: Sequence[Count], landing: Landing, catalog: Catalog, quiet_s: float
) -> None:
    """Ask how many instances the waiting studies have, and keep it.

    Not asked about: a study of which something came in the last tenth of the quiet period, and one of which less has come than
    was said before. The most that any PACS says counts.
    """
    before = datetime.now(UTC) - timedelta(seconds=quiet_s * _SETTLED)
    asked = [
        study.study_uid
        for study in waiting
        if datetime.fromisoformat(study.last_at) <= before
        and (study.expected is None or study.present >= study.expected)
    ][:_MOST_ASKED]
    if not asked:
        return
    originals = landing.studies(asked, who="ingest", why="ask a PACS whether the study is complete")
    expected: dict[str, int] = {}
    for pseudonym, study_uid in originals.items():
        for count in counts:
            number = count(study_uid)
            if number:
                expected[pseudonym] = max(number, expected.get(pseudonym, 0))
    if expected:
        catalog.expect(expected)


def _counts(home: Path, names: Sequence[str], stack: ExitStack) -> list[Count]:
    from radloop.stages.project import open_pacs

    found: list[Count] = []
    for name in names:
        try:
            found.append(_patient(name, stack.enter_context(open_pacs(home, name)).count))
        except (PacsError, SettingsError) as error:
            log(f"{name} is not asked whether studies are complete: {error.what}")
    return found


def _patient(name: str, count: Count) -> Count:
    """A PACS that does not answer is not asked again, and stops nothing: the quiet period decides."""
    given_up: list[str] = []

    def ask(study_uid: str) -> int | None:
        if given_up:
            return None
        try:
            return count(study_uid)
        except PacsError as error:
            given_up.append(error.what)
            log(f"{name} cannot say whether studies are complete: {error.what}")
            return None

    return ask


def _without(studies: Sequence[StudyState], done: Sequence[StudyState]) -> list[StudyState]:
    names = {study.study_uid for study in done}
    return [study for study in studies if study.study_uid not in names]
