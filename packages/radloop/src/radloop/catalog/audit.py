"""Audit events: who had access to what identifies patients, or gave it away. Rows of the ledger, kind `audit`.

A row's payload: `action`, `why` where somebody said it, `pseudonyms` of whom or what it was about (none where
it was about all), and counts. Never an original identifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from radloop.catalog.ledger import Kind, Ledger

_MOST = 1000  # pseudonyms in one row; more make several rows


def record(
    ledger: Ledger,
    action: str,
    subject: str,
    *,
    actor: str,
    why: str = "",
    pseudonyms: Iterable[str] = (),
    detail: Mapping[str, Any] | None = None,
    failed: bool = False,
) -> None:
    """Append one audit event; with very many pseudonyms, several rows.

    Args:
        action: what was done, such as "crosswalk read"; `radloop.dicom.audit` says which DICOM event each is.
        subject: what it was done to: "landing", "crosswalk", "quarantine", "catalog", "patients", "labels".
        actor: person or component.
        why: the reason given, without PHI.
        pseudonyms: of the patients, studies or instances.
        detail: counts and digests, without PHI.
        failed: it was refused, or went wrong.
    """
    named = sorted(set(pseudonyms))
    payload: dict[str, Any] = {"action": action, **(detail or {})}
    if why:
        payload["why"] = why
    if failed:
        payload["failed"] = True
    for start in range(0, len(named) or 1, _MOST):
        some = named[start : start + _MOST]
        ledger.append(Kind.AUDIT, subject, {**payload, "pseudonyms": some} if some else payload, actor=actor)
