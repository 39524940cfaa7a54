"""Stages of `release`: a challenger is smoke-tested, shadows the champion, answers a growing share, and replaces it.

No stage owns a server: each writes `serving/desired.json` and waits until `radloop serve` has brought it into effect. All of
them look at the world, so they always run; what was reached already is passed over, so a release that was killed goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from radloop.errors import ServingError
from radloop.stage import Home, In, Out, stage
from radloop.stage.execute import log, progress
from radloop.stages.kinds import Package, Registered, Released, Verdict
from radloop.stages.watch import identity, labels_now

if TYPE_CHECKING:
    from radloop.serving.desired import ModelRef
    from radloop.serving.judge import JudgeVerdict
    from radloop.serving.predictions import Pair

_POLL_S = 0.25
_CLINICAL = "clinical"  # the role that a gate's "wait" asks for (radloop.stage.execute)


@stage(cache=False)
def smoke(
    package: In[Package], registered: In[Registered], released: Out[Released], *, home: Home, wait_s: float = 600.0
) -> None:
    """Start the challenger beside the champion, without traffic, and hold its answers against the packaged ones."""
    from radloop.serving import rollout
    from radloop.serving.desired import Desired, Models, State, desired

    ours = reference(home, package, registered)
    now = (desired(home) or Desired()).models
    if now.champion != ours and now.challenger != ours:
        beside = State(models=Models(champion=now.champion, challenger=ours, previous=now.previous))
        rollout.deploy(home, beside, timeout_s=wait_s, progress=progress)
    seen = rollout.wait_for(home, (desired(home) or Desired()).generation, timeout_s=wait_s, progress=progress)
    url = rollout.predictor_url(seen, ours.model_digest)
    answered = rollout.smoke(package.path, url, token=token(home))
    log(
        f"version {ours.version} answers as packaged: {answered.n} images, largest difference "
        f"{answered.max_absolute_difference:.2g}"
    )
    ledger(home, "release", ours, {"step": "smoke", **msgspec.to_builtins(answered)})
    released.write_json("released.json", {"model_digest": ours.model_digest, "smoke": msgspec.to_builtins(answered)})


@stage(cache=False)
def shadow(
    package: In[Package],
    registered: In[Registered],
    smoked: In[Released],
    released: Out[Released],
    verdict: Out[Verdict],
    *,
    home: Home,
    judge: dict[str, Any] = {},  # noqa: B006 - stages never change their parameters
    wait_s: float = 600.0,
) -> None:
    """Both models answer every study, only the champion's answer leaves; then the judge compares them."""
    from radloop.serving import rollout
    from radloop.serving.desired import Desired, desired

    ours = reference(home, package, registered)
    now = desired(home) or Desired()
    if now.models.champion in (None, ours):
        why = "no champion to compare with" if now.models.champion is None else "it is the champion already"
        verdict.verdict("pass", f"shadow passed over: {why}")
        released.write_json("released.json", {"shadow": why})
        return
    if now.routing.strategy != "canary":  # a release that was killed in its canary goes on there
        rollout.deploy(home, rollout.shadow(home, ours), timeout_s=wait_s, progress=progress)
    found = _judged(home, ours, "shadow") or _watch_step(home, ours, judge, since="", wait_s=wait_s)
    _conclude(home, ours, "shadow", found, released, verdict)


@stage(cache=False)
def canary(
    package: In[Package],
    registered: In[Registered],
    shadowed: In[Released],
    released: Out[Released],
    verdict: Out[Verdict],
    *,
    home: Home,
    judge: dict[str, Any] = {},  # noqa: B006
    steps: list[int] = [5, 25, 50, 100],  # noqa: B006
    clinical_canary: bool = False,
    wait_s: float = 600.0,
) -> None:
    """The challenger gives a growing share of the answers, judged at each step; harm takes it out at once."""
    from radloop.serving import rollout
    from radloop.serving.desired import Desired, desired

    ours = reference(home, package, registered)
    now = desired(home) or Desired()
    if now.models.champion in (None, ours) or not clinical_canary:
        why = "clinical_canary is false: its answers reach nobody before promotion"
        if now.models.champion in (None, ours):
            why = "no champion to stand beside" if now.models.champion is None else "it is the champion already"
        verdict.verdict("pass", f"canary passed over: {why}")
        released.write_json("released.json", {"canary": why})
        return
    begun = now.routing.percent if now.routing.strategy == "canary" and now.models.challenger == ours else 0
    seen = []
    for percent in [step for step in steps if step >= begun]:
        rollout.deploy(home, rollout.canary(home, ours, percent), timeout_s=wait_s)
        since, step = _since(home, ours, percent), f"canary {percent} %"
        found = _judged(home, ours, step) or _watch_step(home, ours, judge, since=since, wait_s=wait_s)
        seen.append({"percent": percent, **msgspec.to_builtins(found)})
        _conclude(home, ours, step, found, released, verdict, steps=seen)
        log(f"{step}: {found.verdict.replace('_', ' ')}, {found.n_patients} patients")
        if found.verdict == "undetermined" and not _let_on(home, verdict):
            return
        if found.verdict == "harm":
            return


@stage(cache=False)
def promote(
    package: In[Package],
    registered: In[Registered],
    proven: In[Released],
    released: Out[Released],
    *,
    home: Home,
    wait_s: float = 600.0,
) -> None:
    """The challenger becomes the champion: in serving, in the registry and in the ledger."""
    from radloop.serving import rollout
    from radloop.stages.project import open_tracking

    ours = reference(home, package, registered)
    rollout.deploy(home, rollout.single(home, ours), timeout_s=wait_s, progress=progress)
    tracking, task = open_tracking(home), identity(package)["task"]
    tracking.set_alias(task, "champion", int(ours.version))
    if tracking.alias(task, "challenger") == int(ours.version):
        tracking.drop_alias(task, "challenger")
    ledger(home, "release", ours, {"step": "promoted", "version": ours.version})
    log(f"version {ours.version} is the champion")
    released.write_json("released.json", {"champion": ours.model_digest, "version": ours.version})


def reference(home: Path, package: In[Package], registered: In[Registered]) -> ModelRef:
    """How serving names this package."""
    from radloop.serving.desired import ModelRef

    told = registered.json("registered.json")
    assert isinstance(told, dict)
    return ModelRef(
        package=str(package.path.resolve().relative_to(home.resolve())),
        version=str(told["version"]),
        model_digest=identity(package)["model_digest"],
    )


def token(home: Path) -> str | None:
    """The bearer token that predictors ask for, or None."""
    from radloop.settings import secret
    from radloop.stages.project import settings_of

    told = settings_of(home).serve.token
    return secret(told, home).decode() if told else None


def ledger(home: Path, kind: str, ours: ModelRef, payload: dict[str, Any]) -> None:
    """One row for a step of this model's release; the same step again adds none."""
    from radloop.stages.project import open_catalog

    with open_catalog(home) as catalog:
        attempt = len(catalog.ledger.rows(kind="rollback", subject=ours.model_digest))
        key = f"{kind}:{ours.model_digest}:{ours.version}:{attempt}:{payload['step']}:{payload.get('n_patients', '')}"
        catalog.ledger.append(kind, ours.model_digest, payload, actor="release", key=key)


def _since(home: Path, ours: ModelRef, percent: int) -> str:
    """When this step began, also if an earlier process began it."""
    from radloop.stages.project import open_catalog

    step = f"canary {percent} % began"
    ledger(home, "release", ours, {"step": step, "percent": percent})
    with open_catalog(home) as catalog:
        rows = catalog.ledger.rows(kind="release", subject=ours.model_digest)
        return [row.at for row in rows if row.payload["step"] == step][-1]


def _let_on(home: Path, verdict: Any) -> bool:
    """Whether a person approved the verdict just written: an undetermined step then leads to the next one."""
    from radloop.artifact import describe
    from radloop.stages import approvals
    from radloop.stages.project import open_catalog

    with open_catalog(home) as catalog:
        return approvals.approved(home, catalog, describe(verdict.path, Verdict, {}).digest, _CLINICAL)


def _judged(home: Path, ours: ModelRef, step: str) -> JudgeVerdict | None:
    """What the judge said when it ended this step, if an earlier process got so far.

    Forgotten are a look at too few patients, and everything before a roll-back.
    """
    from radloop.serving.judge import JudgeVerdict
    from radloop.stages.project import open_catalog

    told = None
    with open_catalog(home) as catalog:
        for row in catalog.ledger.rows(subject=ours.model_digest):
            if row.kind == "rollback":
                told = None
            elif row.kind == "release" and row.payload.get("step") == step and "verdict" in row.payload:
                told = row.payload
    if told is None or any(str(reason).startswith("patients:") for reason in told["reasons"]):
        return None
    return msgspec.convert(told, JudgeVerdict)


def _watch_step(home: Path, ours: ModelRef, margins: dict[str, Any], *, since: str, wait_s: float) -> JudgeVerdict:
    """Ask the judge again and again, which may be asked at any time, until it knows; after `wait_s`, what it says then."""
    from radloop.serving import judge, predictions
    from radloop.serving.desired import Desired, desired

    limits = msgspec.convert(margins, judge.Margins)
    champion = (desired(home) or Desired()).models.champion
    if champion is None:
        raise ServingError("the champion went away during the release", next_step="radloop status")
    until, seen = time.monotonic() + wait_s, -1
    while True:
        pairs = predictions.pairs(home / "predictions", champion.model_digest, ours.model_digest)
        if len(pairs) != seen:
            seen = len(pairs)
            found = judge.judge(pairs, limits, labels=_held_out(home, pairs), since=since)
            progress(min(found.n_patients, limits.minimum_patients), limits.minimum_patients, "patients asked of both")
            if found.verdict != "undetermined":
                return found
        if time.monotonic() > until:
            return found
        time.sleep(_POLL_S)


def _held_out(home: Path, pairs: Sequence[Pair]) -> dict[str, int]:
    """Labels by SOP instance UID, of patients whom neither model learnt from: any other label would flatter."""
    from radloop.stages.project import open_catalog, settings_of

    labels = labels_now(home, settings_of(home).task.name)
    if not labels:
        return {}
    with open_catalog(home) as catalog:
        learnt = {patient for patient, part in catalog.parts().items() if part != "test"}
    uids = {str(pair.champion["sop_uid"]) for pair in pairs if pair.champion["patient"] not in learnt}
    return {uid: label for uid, label in labels.items() if uid in uids}


def _conclude(
    home: Path,
    ours: ModelRef,
    step: str,
    found: JudgeVerdict,
    released: Any,
    verdict: Any,
    steps: list[dict[str, Any]] | None = None,
) -> None:
    from radloop.serving import rollout

    told = {"harm": "stop", "undetermined": "wait"}.get(found.verdict, "pass")
    message = f"{step}: {found.verdict.replace('_', ' ')}, {found.n_patients} patients, {found.n_requests} requests"
    if found.reasons:
        message += f" ({', '.join(found.reasons)})"
    ledger(home, "release", ours, {"step": step, **msgspec.to_builtins(found)})
    if told == "stop":
        rollout.deploy(home, rollout.rolled_back(home))
        ledger(home, "rollback", ours, {"step": step, "why": message})
        message += "; the challenger was taken out, the champion answers alone"
    verdict.verdict(told, message, msgspec.to_builtins(found.figures))
    released.write_json("released.json", {"step": step, "judge": msgspec.to_builtins(found), "steps": steps or []})
