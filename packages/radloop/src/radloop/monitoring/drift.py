"""Has the population changed since the champion was trained?

The statistical unit is the patient: a patient with thirty images is one observation, the mean of a numeric feature, the
first image's value of a categorical one. Per feature a two-sample test (Kolmogorov-Smirnov; Fisher, chi-square or its
Monte Carlo form for tables with small expected counts, after Cochran 1954), an effect size beside the p-value, and
Benjamini-Hochberg over all features and sites that take part in the decision.

A site is compared with its own reference patients where the reference has enough of them, else with the whole
reference. The verdict follows the sites; the pooled comparison decides only while no site alone has enough patients: a
window with another mix of sites, each unchanged, is no drift.

The reference's `probability` must come from images the model did not train on (a network is surer of what it has seen):
`population` drops it where a row's `part` is "train".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radloop.errors import DataError

Floats = npt.NDArray[np.float64]
Texts = npt.NDArray[np.str_]

DRIFTED = "drifted"
STABLE = "stable"
INSUFFICIENT = "insufficient evidence"
POOLED = "*"
PROBABILITY = "probability"
ABSENT = "(absent)"

# What may be compared: image statistics (f_*), the model's probability, and acquisition tags that identify nobody.
NUMERIC_TAGS = ("age_years", "rows", "columns", "bits_stored", "pixel_spacing_mm")
CATEGORICAL_TAGS = (
    "modality",
    "manufacturer",
    "model_name",
    "view_position",
    "body_part",
    "laterality",
    "sex",
    "photometric",
    "conversion_type",
    "transfer_syntax_uid",
    "lossy",
)
_TABLES = 9_999  # Monte Carlo tables: the smallest p-value is 1e-4, low enough to outlive the correction
_EXACT_UP_TO = 250_000  # above this product of sample sizes the asymptotic KS p-value is as good and far cheaper
_BARS = 12


class Thresholds(msgspec.Struct, frozen=True):
    """When an alarm is raised and when it is cleared; between the two it stays as it was.

    A feature has drifted when its corrected p-value is below `alpha` and its effect size (KS distance or total
    variation, both 0 to 1) reaches `smallest_effect`. An alarm is raised when the share of drifted features reaches
    `share_to_raise`, or the model's own probability has drifted; cleared when the share is at most `share_to_clear` and
    the probability has not.
    """

    alpha: float = 0.01
    smallest_effect: float = 0.1
    share_to_raise: float = 0.15
    share_to_clear: float = 0.05
    minimum_patients: int = 20

    def __post_init__(self) -> None:
        if not (
            0 < self.alpha < 1 and 0 <= self.share_to_clear <= self.share_to_raise <= 1 and self.minimum_patients >= 2
        ):
            raise DataError(
                "drift thresholds that contradict themselves",
                expected="0 < alpha < 1, 0 <= share_to_clear <= share_to_raise <= 1, minimum_patients >= 2",
                got=msgspec.to_builtins(self),
            )


class Population(msgspec.Struct, frozen=True, eq=False):
    """Images of one time or place, sorted by (patient, sop_uid); all arrays have one entry per image.

    numeric: float64, NaN where absent. categorical: text, "(absent)" where absent. Nothing in it is PHI: patients are
    pseudonyms, and features come from `NUMERIC_TAGS`, `CATEGORICAL_TAGS`, `f_*` and `probability` only.
    """

    patients: Texts
    sites: Texts
    numeric: dict[str, Floats]
    categorical: dict[str, Texts]


class FeatureDrift(msgspec.Struct, frozen=True):
    """One feature: the test, its effect size, and the two distributions as shares over common bins."""

    feature: str
    test: str
    effect: float  # KS distance, or total variation; 0 same, 1 disjoint
    psi: float  # population stability index; by custom 0.1 is small, 0.25 large
    p: float
    p_adjusted: float
    drifted: bool
    reference_patients: int
    window_patients: int
    reference_summary: str
    window_summary: str
    bins: list[str]  # numeric: the bins' lower edges and the last upper edge; categorical: the categories
    reference_shares: list[float]
    window_shares: list[float]


class ScopeDrift(msgspec.Struct, frozen=True):
    """One site (or all pooled, scope "*") of the window against its reference."""

    scope: str
    verdict: str
    decides: bool
    compared_with: str
    reference_patients: int
    window_patients: int
    share_drifted: float | None
    features: list[FeatureDrift]  # largest effect among the drifted first


class DriftReport(msgspec.Struct, frozen=True):
    """The comparison as a whole. `state` is to be kept and passed to the next `compare`: it carries the hysteresis."""

    verdict: str
    summary: str
    reference_patients: int
    window_patients: int
    window_images: int
    patients_in_both: int
    unseen_sites: list[str]
    scopes: list[ScopeDrift]
    state: dict[str, str]
    thresholds: Thresholds

    def drifted_sites(self) -> list[str]:
        """Sites whose alarm is up, sorted."""
        return sorted(site for site, verdict in self.state.items() if verdict == DRIFTED and site != POOLED)


def population(rows: Iterable[Mapping[str, Any]]) -> Population:
    """A population from manifest rows or rows of the prediction log.

    Args:
        rows: each with `patient`, `sop_uid`, and any of `site`, `probability`, `f_*` and the tags named above, flat or
            inside mappings `features` and `tags`. Other keys are ignored, and so is a feature that only one of two
            populations has as a key. An image that stands in several rows (sent twice, retried) counts once.

    Raises:
        DataError: a row without patient or sop_uid.
    """
    flat: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        merged = {**(row.get("tags") or {}), **(row.get("features") or {}), **row}
        missing = [key for key in ("patient", "sop_uid") if not merged.get(key)]
        if missing:
            raise DataError(
                "a row cannot be compared", expected="patient and sop_uid", got=f"no {' and no '.join(missing)}"
            )
        key = (str(merged["patient"]), str(merged["sop_uid"]))
        if key not in flat or _order(merged) < _order(flat[key]):
            flat[key] = merged
    ordered = [flat[key] for key in sorted(flat)]
    names = {name for row in ordered for name in row}
    numeric = sorted(n for n in names if n in NUMERIC_TAGS or n == PROBABILITY or n.startswith("f_"))
    return Population(
        patients=np.array([str(row["patient"]) for row in ordered], dtype=str),
        sites=np.array([_text(row.get("site")) for row in ordered], dtype=str),
        numeric={name: np.array([_number(name, row) for row in ordered], dtype=np.float64) for name in numeric},
        categorical={
            name: np.array([_text(row.get(name)) for row in ordered], dtype=str)
            for name in sorted(names.intersection(CATEGORICAL_TAGS))
        },
    )


def compare(
    reference: Population,
    window: Population,
    *,
    thresholds: Thresholds | None = None,
    state: Mapping[str, str] | None = None,
) -> DriftReport:
    """Compare a production window with the champion's data.

    Args:
        reference: what the champion was trained and validated on.
        window: what it predicted lately.
        thresholds: when to raise and clear.
        state: the former report's `state`, for the same champion; without it every site starts as not drifted. Too
            little evidence leaves a site's state as it was: an alarm is never cleared by silence.
    """
    limits, before = thresholds or Thresholds(), dict(state or {})
    sites = sorted(set(window.sites.tolist()))
    enough = [site for site in sites if _count(window, site) >= limits.minimum_patients]
    scopes = {site: _scope_tests(reference, window, site, limits) for site in sites}
    scopes[POOLED] = _scope_tests(reference, window, POOLED, limits)
    deciding = enough or [POOLED]
    adjusted = _adjust({name: scopes[name][1] for name in [*sites, POOLED] if name in deciding}, limits)
    if enough:  # shown, but a family of its own: it takes no part in the decision
        adjusted |= _adjust({POOLED: scopes[POOLED][1]}, limits)
        before.pop(POOLED, None)
    found = [
        _decide(name, scopes[name], adjusted.get(name, []), name in deciding, before, limits)
        for name in [*sites, POOLED]
    ]
    after = before | {one.scope: one.verdict for one in found if one.decides and one.verdict != INSUFFICIENT}
    return _report(reference, window, found, after, limits)


class _Against(msgspec.Struct):
    """What a scope is compared with."""

    words: str
    reference_patients: int
    window_patients: int


def _scope_tests(
    reference: Population, window: Population, scope: str, limits: Thresholds
) -> tuple[_Against, list[FeatureDrift]]:
    """Uncorrected tests of one scope; none where either side has too few patients."""
    known = set(reference.sites.tolist())
    inside = window.sites == scope if scope != POOLED else np.ones(len(window.sites), dtype=bool)
    wanted = set(window.sites[inside].tolist())
    theirs = np.isin(reference.sites, sorted(wanted))
    own = wanted <= known and len(set(reference.patients[theirs].tolist())) >= limits.minimum_patients
    words = (
        "the same sites' reference"
        if own and scope == POOLED
        else "its own reference"
        if own
        else "the whole reference"
    )
    if not own:
        theirs = np.ones(len(reference.sites), dtype=bool)
    old, new = _Patients(reference, theirs), _Patients(window, inside)
    against = _Against(words, old.count, new.count)
    if min(old.count, new.count) < limits.minimum_patients:
        return against, []
    return against, _tests(old, new, limits.minimum_patients)


class _Patients:
    """A part of a population, reduced to one value per patient."""

    def __init__(self, source: Population, mask: npt.NDArray[np.bool_]) -> None:
        names, first, inverse = np.unique(source.patients[mask], return_index=True, return_inverse=True)
        self.count = len(names)
        self.numeric = {name: _means(values[mask], inverse, len(names)) for name, values in source.numeric.items()}
        self.categorical = {name: values[mask][first] for name, values in source.categorical.items()}


def _means(values: Floats, patient: npt.NDArray[np.intp], count: int) -> Floats:
    """Mean of the finite values of each patient, NaN where there is none."""
    good = np.isfinite(values)
    number = np.bincount(patient[good], minlength=count)
    total = np.bincount(patient[good], weights=values[good], minlength=count)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _tests(old: _Patients, new: _Patients, minimum: int) -> list[FeatureDrift]:
    found: list[FeatureDrift] = []
    for name in sorted(set(old.numeric) & set(new.numeric)):  # a column that one side does not record says nothing
        one, two = old.numeric[name], new.numeric[name]
        a, b = one[np.isfinite(one)], two[np.isfinite(two)]
        if min(len(a), len(b)) >= minimum:
            found.append(_numeric(name, a, b))
        # A probability is absent from training images on purpose, so its absence tells nothing.
        if name != PROBABILITY and len(a) + len(b) not in (0, old.count + new.count):
            found.append(_categorical(f"{name} present", _presence(one), _presence(two)))
    for name in sorted(set(old.categorical) & set(new.categorical)):
        one_side, other = old.categorical[name], new.categorical[name]
        if set(one_side.tolist()) | set(other.tolist()) != {ABSENT}:
            found.append(_categorical(name, one_side, other))
    return found


def _presence(values: Floats) -> Texts:
    return np.where(np.isfinite(values), "yes", "no")


def _numeric(name: str, a: Floats, b: Floats) -> FeatureDrift:
    from scipy import stats

    method = "exact" if len(a) * len(b) <= _EXACT_UP_TO else "asymp"
    result = stats.ks_2samp(a, b, method=method)
    both = np.concatenate([a, b])
    edges = (
        np.linspace(both.min(), both.max(), _BARS + 1) if np.ptp(both) > 0 else np.array([both[0] - 0.5, both[0] + 0.5])
    )
    deciles = np.unique(np.quantile(a, np.linspace(0.1, 0.9, 9)))
    shares = [np.histogram(values, edges)[0] / len(values) for values in (a, b)]
    counts = [np.bincount(np.searchsorted(deciles, values), minlength=len(deciles) + 1) for values in (a, b)]
    return FeatureDrift(
        feature=name,
        test="Kolmogorov-Smirnov",
        effect=float(result.statistic),
        psi=_psi(counts[0], counts[1]),
        p=float(min(1.0, max(0.0, result.pvalue))),
        p_adjusted=1.0,
        drifted=False,
        reference_patients=len(a),
        window_patients=len(b),
        reference_summary=_median(a),
        window_summary=_median(b),
        bins=[f"{edge:.4g}" for edge in edges],
        reference_shares=[float(x) for x in shares[0]],
        window_shares=[float(x) for x in shares[1]],
    )


def _categorical(name: str, a: Texts, b: Texts) -> FeatureDrift:
    categories = sorted(set(a.tolist()) | set(b.tolist()))
    table = np.array([[np.count_nonzero(side == c) for c in categories] for side in (a, b)], dtype=np.int64)
    shares = table / table.sum(axis=1, keepdims=True)
    test, p = _table_test(table)
    return FeatureDrift(
        feature=name,
        test=test,
        effect=float(0.5 * np.abs(shares[0] - shares[1]).sum()),
        psi=_psi(table[0], table[1]),
        p=p,
        p_adjusted=1.0,
        drifted=False,
        reference_patients=len(a),
        window_patients=len(b),
        reference_summary=_commonest(categories, shares[0]),
        window_summary=_commonest(categories, shares[1]),
        bins=categories,
        reference_shares=[float(x) for x in shares[0]],
        window_shares=[float(x) for x in shares[1]],
    )


def _table_test(table: npt.NDArray[np.int64]) -> tuple[str, float]:
    """p-value of a 2 x k table of counts, by the test that its size allows."""
    from scipy import stats

    if table.shape[1] == 1:
        return "one category", 1.0
    if table.shape[1] == 2:
        return "Fisher", float(min(1.0, stats.fisher_exact(table)[1]))
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    if expected.min() >= 5:
        return "chi-square", float(stats.chi2_contingency(table).pvalue)
    drawn = stats.random_table(table.sum(axis=1), table.sum(axis=0)).rvs(_TABLES, random_state=np.random.default_rng(0))
    as_far = (((drawn - expected) ** 2 / expected).sum(axis=(1, 2))) >= (
        (table - expected) ** 2 / expected
    ).sum() - 1e-9
    return "chi-square, Monte Carlo", (1 + int(as_far.sum())) / (1 + _TABLES)


def _psi(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Population stability index of two count vectors, half a count added to each bin so that none is empty."""
    p, q = (a + 0.5) / (a.sum() + 0.5 * len(a)), (b + 0.5) / (b.sum() + 0.5 * len(b))
    return float(((p - q) * np.log(p / q)).sum())


def _adjust(families: Mapping[str, list[FeatureDrift]], limits: Thresholds) -> dict[str, list[FeatureDrift]]:
    """Benjamini-Hochberg over every test of all given scopes together."""
    from scipy import stats

    flat = [test.p for tests in families.values() for test in tests]
    adjusted = iter(stats.false_discovery_control(flat).tolist() if flat else [])
    done: dict[str, list[FeatureDrift]] = {}
    for scope, tests in families.items():
        with_p = [msgspec.structs.replace(test, p_adjusted=next(adjusted)) for test in tests]
        done[scope] = [
            msgspec.structs.replace(t, drifted=t.p_adjusted < limits.alpha and t.effect >= limits.smallest_effect)
            for t in with_p
        ]
    return done


def _decide(
    scope: str,
    tested: tuple[_Against, list[FeatureDrift]],
    features: list[FeatureDrift],
    decides: bool,
    before: Mapping[str, str],
    limits: Thresholds,
) -> ScopeDrift:
    """The verdict of one scope, with hysteresis against its former one."""
    against = tested[0]
    share = sum(f.drifted for f in features) / len(features) if features else None
    verdict = INSUFFICIENT
    if share is not None:
        model_moved = any(f.drifted for f in features if f.feature == PROBABILITY)
        limit_passed = share > limits.share_to_clear if before.get(scope) == DRIFTED else share >= limits.share_to_raise
        verdict = DRIFTED if limit_passed or model_moved else STABLE
    return ScopeDrift(
        scope=scope,
        verdict=verdict,
        decides=decides,
        compared_with=against.words,
        reference_patients=against.reference_patients,
        window_patients=against.window_patients,
        share_drifted=share,
        features=sorted(features, key=lambda f: (not f.drifted, -f.effect, f.feature)),
    )


def _report(
    reference: Population, window: Population, found: list[ScopeDrift], after: dict[str, str], limits: Thresholds
) -> DriftReport:
    deciding = [one for one in found if one.decides]
    verdicts = {one.verdict for one in deciding}
    verdict = DRIFTED if DRIFTED in verdicts else STABLE if STABLE in verdicts else INSUFFICIENT
    patients, images = set(window.patients.tolist()), len(window.patients)
    if verdict == DRIFTED:
        where = [_scope_words(one) for one in deciding if one.verdict == DRIFTED]
        summary = f"drifted: {'; '.join(where)}"
    elif verdict == STABLE:
        summary = f"stable: {len(patients)} patients, no site beyond the thresholds"
    else:
        summary = (
            f"insufficient evidence: {len(patients)} patients in the window, at least {limits.minimum_patients} needed"
        )
        if DRIFTED in after.values():
            summary += "; the alarm raised before stays up"
    return DriftReport(
        verdict=verdict,
        summary=summary,
        reference_patients=len(set(reference.patients.tolist())),
        window_patients=len(patients),
        window_images=images,
        patients_in_both=len(patients & set(reference.patients.tolist())),
        unseen_sites=sorted(set(window.sites.tolist()) - set(reference.sites.tolist())),
        scopes=found,
        state=after,
        thresholds=limits,
    )


def _scope_words(one: ScopeDrift) -> str:
    name = "all sites" if one.scope == POOLED else f"site {one.scope}"
    count = sum(f.drifted for f in one.features)
    return f"{name}, {count} of {len(one.features)} features ({one.window_patients} patients)"


def _count(source: Population, site: str) -> int:
    return len(set(source.patients[source.sites == site].tolist()))


def _order(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A total order on what is compared: of two rows of one image the same one is kept, whichever came first."""
    compared = {PROBABILITY, "site", *NUMERIC_TAGS, *CATEGORICAL_TAGS}
    return tuple(f"{name}={row[name]!r}" for name in sorted(row) if name in compared or name.startswith("f_"))


def _number(name: str, row: Mapping[str, Any]) -> float:
    value = row.get(name)
    if value is None or isinstance(value, str) or (name == PROBABILITY and row.get("part") == "train"):
        return math.nan
    if isinstance(value, list | tuple | np.ndarray):  # PixelSpacing (row, column): the first will do
        value = value[0] if len(value) else math.nan
    return float(value)


def _text(value: object) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    return str(value)


def _median(values: Floats) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _commonest(categories: list[str], shares: Floats) -> str:
    most = int(np.argmax(shares))
    return f"{categories[most]} {shares[most]:.0%}"
