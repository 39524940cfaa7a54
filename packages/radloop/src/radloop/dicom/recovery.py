"""What a kill or a power cut left in landing and quarantine, brought in order. `Landing.recover` calls it, alone with the files.

Three things may be found. A file without a row: it is received again, from the crosswalk's word of whence it came, or its own
sealed header's. A row without crosswalk entries, of a file with a sealed header: the entries are made again. A file that is not
what its name says: a power cut tore it before anybody was told of it; it is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from radloop.dicom.arrival import Mismatch, Received, arrival_from
from radloop.dicom.identity import Identity
from radloop.dicom.landed import Buffer, came, identity, mapped
from radloop.dicom.landing import Landing, Recovered

_MINE = "radloop landing"
_WHY = "register files left by an interrupted process"


def recover(landing: Landing) -> Recovered:
    """Bring landing and quarantine in order; the caller holds the lock."""
    removed = _remove_half_written(landing)
    landed = _by_arrival(landing.landing.glob("??/*.dcm"))
    refused = _by_arrival(landing.quarantine.glob("??/*.bin"))
    known = landing._catalog.digests(landed, landing._pseudonymiser.key_id)
    held = landing._catalog.held_sources(refused)
    orphans = {sha256: path for sha256, path in refused.items() if sha256 not in held}
    orphans |= {sha256: path for sha256, path in landed.items() if sha256 not in known}
    registered, torn, unknown = _register(landing, orphans)
    registered += _complete_crosswalk(landing, {sha256: uid for sha256, uid in known.items() if sha256 in landed})
    return Recovered(registered=registered, removed=removed + torn, unknown=unknown)


def _remove_half_written(landing: Landing) -> int:
    leftovers = [*landing.landing.glob("??/.*.tmp"), *landing.quarantine.glob("??/.*.tmp")]
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def _by_arrival(paths: Iterator[Path]) -> dict[str, Path]:
    """Identity -> file, the oldest first: of two revisions the later one must win again."""
    return {path.stem: path for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.stem))}


def _register(landing: Landing, orphans: Mapping[str, Path]) -> tuple[int, int, int]:
    """How many were registered, were torn and removed, are of unknown origin and stay."""
    if not orphans:
        return 0, 0, 0
    registered, torn, unknown = 0, 0, 0
    sources = landing._crosswalk.get_many(Identity.SOURCE, orphans, who=_MINE, why=_WHY)
    for sha256, path in orphans.items():
        with mapped(path) as data:
            if sha256 not in (identity(data), hashlib.sha256(data).hexdigest()):
                path.unlink()
                torn += 1
                continue
            known = sources.get(sha256)
            arrival = arrival_from(data, known) if known is not None else _received(landing, sha256, data)
            if arrival is None:
                unknown += 1
                continue
            try:
                # Again: a conflict may be held already, and its copy in landing be what is left to remove.
                [outcome] = landing._receive([arrival], again=True)
            except Mismatch:  # the sender was, or would have been, told that it was not kept
                path.unlink()
                torn += 1
                continue
        registered += 1
        if outcome.reason is not None or outcome.sha256 != sha256:
            landing.landed(sha256).unlink(missing_ok=True)
    return registered, torn, unknown


def _received(landing: Landing, sha256: str, data: Buffer) -> Received | None:
    """What the file's own header says of its arrival."""
    told = came(data, sha256, landing.stamp)
    if told is None:
        return None
    return Received(
        data=data,
        site=told.site,
        sender=told.sender,
        sha256=sha256,
        sop_class_uid=told.sop_class_uid,
        sop_uid=told.sop_uid,
    )


def _complete_crosswalk(landing: Landing, known: Mapping[str, str]) -> int:
    """Make the crosswalk entries anew of registered files (identity -> SOP instance UID) that it does not know."""
    missing = landing._crosswalk.missing(Identity.INSTANCE, known.values())
    done = 0
    for sha256, sop_uid in known.items():
        if sop_uid not in missing:
            continue
        with mapped(landing.landed(sha256)) as data:
            arrival = _received(landing, sha256, data)
            if arrival is not None:
                landing.remember(arrival)
                done += 1
    return done
