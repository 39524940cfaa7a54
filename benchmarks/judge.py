"""How often the judge errs when it is asked after every patient, and how soon it finds harm: a simulation.

Method: releases of 400 patients, one image each, drawn at stated true rates; the judge of `serving.judge`, at its default
margins, looks after every patient. False roll-back: a challenger well within all margins is ever called harm. False
promotion: one whose true rate stands exactly at a margin (the worst case that must not pass) is ever called safe before it
is called harm. Time to detect: patients until harm. The intervals of all moments come from one pass of the same confidence
sequences; in some runs the last moment is held against `judge` itself. Beside it, for errors, the naive way: a 95 % Clopper-
Pearson interval looked at after every patient from the 40th on.

    .venvs/core/bin/python benchmarks/judge.py [--runs 400] [--plot docs/images/judge.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from ville import BernoulliCS, BettingCS

from radloop.serving import judge as rule
from radloop.serving.predictions import Pair

PATIENTS = 400
LIMITS = rule.Margins()
FIGURES = 5
ALPHA = 1 - LIMITS.confidence
Curve = np.ndarray


def drawn(rng: np.random.Generator, errors: float, slow: float, disagreeing: float) -> dict[str, np.ndarray]:
    """One release: what each patient's pair shows."""
    flipped = rng.random(PATIENTS) < disagreeing
    first = np.where(rng.random(PATIENTS) < 0.3, rng.uniform(0.5, 1, PATIENTS), rng.uniform(0, 0.5, PATIENTS))
    second = np.where(flipped, 1 - first, np.clip(first + rng.normal(0, 0.02, PATIENTS), 0, 1))
    decided = np.where(flipped, first < 0.5, first >= 0.5)
    return {
        "error": rng.random(PATIENTS) < errors, "slow": rng.random(PATIENTS) < slow,
        "first": first, "second": second, "decided": decided,
    }  # fmt: skip


def pairs(release: dict[str, np.ndarray]) -> list[Pair]:
    """The same as the judge gets it."""
    made = []
    for n in range(PATIENTS):
        one: dict[str, Any] = {
            "patient": f"P{n}", "sop_uid": f"1.{n}", "status": "ok", "at": f"{n:06d}", "prediction_id": str(n), "latency_ms": 5.0,
            "probability": float(release["first"][n]), "decision": int(release["first"][n] >= 0.5),
        }  # fmt: skip
        two = one | {
            "probability": float(release["second"][n]), "decision": int(release["decided"][n]),
            "latency_ms": 900.0 if release["slow"][n] else 5.0,
        }  # fmt: skip
        made.append(Pair(one, None if release["error"][n] else two))  # type: ignore[arg-type]
    return made


def moments(release: dict[str, np.ndarray]) -> tuple[Curve, Curve]:
    """After each patient: is it harm, is it safe. Patients without an answer are in the error rate only."""
    answered = ~release["error"]
    at = np.cumsum(answered)  # answered patients so far
    opposite = (release["first"] >= 0.5) != release["decided"]
    shift = release["second"] - release["first"]
    harm, safe = np.zeros(PATIENTS, bool), at >= LIMITS.minimum_patients
    mean = {"grid": rule._GRID}
    several = [
        (BernoulliCS, {"prior": rule._RARE}, release["error"], LIMITS.error_rate, False, np.arange(PATIENTS)),
        (BernoulliCS, {"prior": rule._RARE}, release["slow"][answered], LIMITS.slow, False, at - 1),
        (BernoulliCS, {"prior": rule._RARE}, opposite[answered], 1 - LIMITS.agreement, False, at - 1),
        (BettingCS, mean | {"bounds": (0, 1)}, np.abs(shift)[answered], LIMITS.mean_absolute_difference, False, at - 1),
        (BettingCS, mean | {"bounds": (-1, 1)}, shift[answered], LIMITS.score_shift, True, at - 1),
    ]  # fmt: skip
    for kind, options, stream, bound, both_sides, where in several:
        plain, shared = (kind(alpha=a, **options).fit(stream.astype(float)) for a in (ALPHA, ALPHA / FIGURES))
        seen = where >= 0
        place = np.maximum(where, 0)
        ok = (plain.upper_[place] <= bound) & ((plain.lower_[place] >= -bound) | (not both_sides))
        safe &= ok & seen
        if not both_sides:
            harm |= (shared.lower_[place] > bound) & seen
    return harm, safe & ~harm


def first(moment: Curve) -> int:
    """The first patient at which it holds; PATIENTS if never."""
    return int(np.argmax(moment)) + 1 if moment.any() else PATIENTS + 1


def naive(stream: np.ndarray, bound: float) -> tuple[int, int]:
    """First moments at which Clopper-Pearson, looked at after each patient from the 40th on, says harm, and safe."""
    n, x = np.arange(1, PATIENTS + 1), np.cumsum(stream)
    low = np.where(x > 0, stats.beta.ppf(ALPHA, np.maximum(x, 1), n - x + 1), 0)
    high = np.where(x < n, stats.beta.ppf(1 - ALPHA, x + 1, np.maximum(n - x, 1)), 1)
    return first((low > bound) & (n >= 40)), first((high <= bound) & (n >= 40))


def simulated(runs: int, **rates: float) -> dict[str, Any]:
    """When each of `runs` releases was first called harm, and safe."""
    harm, safe, checked = [], [], 0
    plain_harm, plain_safe = [], []
    for seed in range(runs):
        release = drawn(np.random.default_rng(seed), **rates)
        is_harm, is_safe = moments(release)
        harm.append(first(is_harm))
        safe.append(first(is_safe))
        one, two = naive(release["error"], LIMITS.error_rate)
        plain_harm.append(one)
        plain_safe.append(two)
        if seed % 100 == 0:
            verdict = rule.judge(pairs(release)).verdict
            assert verdict == ("harm" if is_harm[-1] else "operationally_safe" if is_safe[-1] else "undetermined"), (
                verdict
            )
            checked += 1
    return {
        "harm": np.array(harm),
        "safe": np.array(safe),
        "naive_harm": np.array(plain_harm),
        "naive_safe": np.array(plain_safe),
    }


def main() -> None:
    """Simulate, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    good = {"errors": 0.01, "slow": 0.01, "disagreeing": 0.10}
    cases = {
        "good: errors 1 %, disagreement 10 %": good,
        "at the margin: errors 10 %": good | {"errors": LIMITS.error_rate},
        "at the margin: slow for 10 %": good | {"slow": LIMITS.slow},
        "at the margin: disagreement 30 %": good | {"disagreeing": 1 - LIMITS.agreement},
        "harmful: errors 20 %": good | {"errors": 0.20},
        "harmful: errors 40 %": good | {"errors": 0.40},
        "harmful: disagreement 50 %": good | {"disagreeing": 0.5},
    }
    found = {name: simulated(options.runs, **rates) for name, rates in cases.items()}
    print(
        f"{options.runs} releases of {PATIENTS} patients, looked at after each; default margins, confidence {LIMITS.confidence}\n"
    )
    print(f"{'':38}  harm %  safe %   patients to the verdict (median, 90 %)   naive harm %  safe %")
    for name, told in found.items():
        harm, safe = told["harm"] <= PATIENTS, (told["safe"] <= PATIENTS) & (told["safe"] < told["harm"])
        when = np.where(harm, told["harm"], np.where(safe, told["safe"], PATIENTS))[harm | safe]
        middle = f"{np.median(when):6.0f} {np.percentile(when, 90):6.0f}" if len(when) else "     -      -"
        errors = "errors" in name
        bare = f"{100 * (told['naive_harm'] <= PATIENTS).mean():12.1f} {100 * (told['naive_safe'] <= PATIENTS).mean():7.1f}"
        print(f"  {name:36} {100 * harm.mean():6.1f} {100 * safe.mean():7.1f}   {middle:38}" + (bare if errors else ""))
    if options.plot:
        plot(found, options.plot)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Share of releases that have been called harm, or safe, by the number of patients seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    patients = np.arange(1, PATIENTS + 1)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for name, told in found.items():
        for axis, kind in zip(axes, ("safe", "harm"), strict=True):
            moment = (
                np.where(told["safe"] < told["harm"], told["safe"], PATIENTS + 1) if kind == "safe" else told["harm"]
            )
            axis.plot(patients, [100 * (moment <= n).mean() for n in patients], label=name)
    for axis, title in zip(axes, ("called operationally safe", "called harm, rolled back"), strict=True):
        axis.axhline(100 * ALPHA, color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel="patients", title=f"% of releases {title}", ylim=(-2, 102))
    axes[0].legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
