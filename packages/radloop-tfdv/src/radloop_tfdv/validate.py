"""A dataset version's table against its schema, and against the version before it.

One process a version: statistics, schema, anomalies, drift and skew, from the Parquet table that the stage `quality`
wrote. Everything written is a function of the table, the baseline and the parameters: no time, host or path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import anomalies_pb2, schema_pb2, statistics_pb2

from radloop.errors import ArtifactError, DataError, SettingsError
from radloop_tfdv import _quiet

tfdv = _quiet.load()

CATEGORICAL = ("manufacturer", "modality", "photometric", "sex", "site", "view_position")
INTEGER = ("bits_stored", "columns", "rows")
REAL = ("age_years",)  # and every column `f_*`, the intensity features

# A handful of unexpected values is what the quality stage quarantines by the instance. This share is another data set.
IDENTITY = ("modality", "photometric")
IDENTITY_STOP_FRACTION = 0.05

STOPS = frozenset(
    {
        "DOMAIN_INVALID_FOR_TYPE",
        "ENUM_TYPE_BYTES_NOT_STRING",
        "ENUM_TYPE_FLOAT_NOT_STRING",
        "ENUM_TYPE_INT_NOT_STRING",
        "ENUM_TYPE_INVALID_UTF8",
        "FEATURE_MISSING_NAME",
        "FEATURE_MISSING_TYPE",
        "FEATURE_TYPE_NOT_PRESENT",
        "FEATURE_TYPE_NO_VALUES",
        "FEATURE_TYPE_UNEXPECTED_REPEATED",
        "FLOAT_TYPE_NON_STRING",
        "FLOAT_TYPE_NOT_FLOAT",
        "FLOAT_TYPE_STRING_NOT_FLOAT",
        "INT_TYPE_INT_EXPECTED",
        "INT_TYPE_NOT_INT_STRING",
        "INT_TYPE_NOT_STRING",
        "INT_TYPE_STRING_EXPECTED",
        "INVALID_DOMAIN_SPECIFICATION",
        "INVALID_SCHEMA_SPECIFICATION",
        "NO_DATA_IN_SPAN",
        "SCHEMA_MISSING_COLUMN",
        "STRING_TYPE_NOW_FLOAT",
        "STRING_TYPE_NOW_INT",
        "UNEXPECTED_DATA_TYPE",
    }
)

TOP_VALUES = 20

# pandas' own integers would become floats where a value is missing, and TFDV would call that a changed type.
INTEGERS: dict[Any, Any] = {pa.int64(): pd.Int64Dtype()}

Statistics = statistics_pb2.DatasetFeatureStatisticsList


def validate(
    table: Path,
    out: Path,
    *,
    baseline: Path | None = None,
    reviewed_schema: Path | None = None,
    jensen_shannon_max: float = 0.1,
    l_infinity_max: float = 0.1,
) -> dict[str, Any]:
    """Validate one version's table and write what was found into the directory `out`.

    Read are the features and tags named at the top of this module and the columns `f_*`, as far as the table has
    them; a UID, a pseudonym or a path never enters the statistics.

    The schema is the one a person reviewed (`reviewed_schema`); else the baseline's, so that the first version's
    stays in force until somebody decides otherwise; else it is inferred from this table, which then is the first
    version and passes by construction. An inferred domain holds the values seen, so that a new one is an anomaly.

    What stops and what warns. `stop` is for a broken schema, where the numbers that follow would mean something else
    than they say: a column gone, or filled nowhere where it was filled before (a version holds the versions before
    it, so no new site can empty a column; a broken reader can), a type changed, a schema that contradicts itself, or
    more than 5 % of the instances outside the domain of `modality` or `photometric`, which say what a pixel is. All
    else warns: a new manufacturer, site or view is what a second hospital brings, a few more missing ages are life,
    and how much a changed distribution costs is for the gates on the model to say, with its labels in hand. Drift
    never stops here, for the same reason.

    Drift and skew are TFDV's two comparators, this version as the later span and as the training data, the baseline
    as the earlier span and as what is served; the measure is the approximate Jensen-Shannon divergence for numbers
    and the L-infinity distance (largest change of one value's share) for categories. Both are between 0 and 1, and
    noisy below a few hundred instances: with 24 on each side, a Jensen-Shannon divergence above 0.1 is chance.

    Args:
        table: Parquet, one row an instance.
        out: a directory, made when absent.
        baseline: the `out` of the version before.
        reviewed_schema: a `schema.pbtxt` that a person has read and kept in the project folder.
        jensen_shannon_max: above this a number has drifted, unless the schema carries a bound of its own.
        l_infinity_max: above this a category has drifted, unless the schema carries a bound of its own.

    Returns:
        What stands in `summary.json`: `verdict` ("pass" or "stop"), `schema` ("reviewed", "baseline" or "inferred"),
        `instances`, `features`, `anomalies`, `stops` and `warnings` (counts), `drifted` (names; None without baseline).

    Writes `statistics.pbtxt`, `statistics.json` (compact, for reports), `schema.pbtxt`, `anomalies.json`, `drift.json`
    and, last, `summary.json`. With anomalies, also `schema.proposed.pbtxt`, in which they are accepted: what a reviewer
    starts from.

    Raises:
        ArtifactError: the table or the baseline is missing or damaged.
        DataError: the table has no rows, none of the columns, or an infinity.
        SettingsError: the reviewed schema cannot be read.
    """
    statistics = compute_statistics(table)
    previous = _read_statistics(baseline) if baseline is not None else None
    origin, schema = _choose_schema(statistics, baseline, reviewed_schema)
    anomalies = list(_anomalies(statistics, schema))
    drift = _drift(statistics, previous, schema, jensen_shannon_max, l_infinity_max)

    stops = sum(anomaly["severity"] == "stop" for anomaly in anomalies)
    dataset = statistics.datasets[0]
    summary = {
        "verdict": "stop" if stops else "pass",
        "schema": origin,
        "instances": int(dataset.num_examples),
        "features": len(dataset.features),
        "anomalies": len(anomalies),
        "stops": stops,
        "warnings": len(anomalies) - stops,
        "drifted": None if previous is None else [row["feature"] for row in drift["features"] if row["drifted"]],
    }
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "statistics.pbtxt", text_format.MessageToString(statistics))
    _write(out / "statistics.json", _json(_compact(statistics)))
    _write(out / "schema.pbtxt", text_format.MessageToString(schema))
    if anomalies:
        proposed = tfdv.update_schema(schema, statistics, infer_feature_shape=False)
        _write(out / "schema.proposed.pbtxt", text_format.MessageToString(proposed))
    else:
        (out / "schema.proposed.pbtxt").unlink(missing_ok=True)
    _write(out / "anomalies.json", _json(anomalies))
    _write(out / "drift.json", _json(drift))
    _write(out / "summary.json", _json(summary))
    return summary


def compute_statistics(table: Path) -> Any:
    """Return TFDV's statistics of a table's features and tags.

    Raises:
        ArtifactError: no such file, or no Parquet.
        DataError: no rows, none of the columns, or an infinity.
    """
    options = tfdv.StatsOptions(num_top_values=TOP_VALUES, num_values_histogram_buckets=2)
    return tfdv.generate_statistics_from_dataframe(_frame(table), stats_options=options, n_jobs=1)


def _frame(table: Path) -> pd.DataFrame:
    """Read the columns that are validated, each in the one type that missing values do not change."""
    if not table.is_file():
        raise ArtifactError("there is no table to validate", expected="a Parquet file", got=table.name)
    try:
        file = pq.ParquetFile(table)
        names = sorted(
            name
            for name in file.schema_arrow.names
            if name in CATEGORICAL or name in INTEGER or name in REAL or name.startswith("f_")
        )
        columns = file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            "the table cannot be read as Parquet",
            expected="the table that the stage quality wrote",
            got=f"{table.name}: {error}",
            next_step="run the stage quality again",
        ) from error
    if not names:
        raise DataError(
            "the table has no column to validate", expected=", ".join((*CATEGORICAL, *INTEGER, *REAL, "f_*"))
        )
    if columns.num_rows == 0:
        raise DataError("the table has no rows", expected="at least one instance", next_step="radloop quarantine list")
    typed = pa.table({name: _typed(name, columns.column(name)) for name in names})
    _refuse_infinities(typed)
    return typed.to_pandas(ignore_metadata=True, types_mapper=INTEGERS.get)


def _refuse_infinities(table: Any) -> None:
    """TFDV would turn one infinity into moments and histograms that are no numbers."""
    real = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    infinite = [name for name in real if pc.any(pc.is_inf(table.column(name))).as_py()]
    if infinite:
        raise DataError("a feature is infinite", expected="finite numbers, or none at all", got=", ".join(infinite))


def _typed(name: str, column: Any) -> Any:
    """Return a column in the type its name promises; another kind of value is left as it is, for TFDV to report."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    empty = pa.types.is_null(kind)
    if name in CATEGORICAL:
        return (
            column.cast(pa.string()) if empty or pa.types.is_string(kind) or pa.types.is_large_string(kind) else column
        )
    if name in INTEGER:
        return column.cast(pa.int64()) if empty or pa.types.is_integer(kind) else column
    return column.cast(pa.float64()) if empty or pa.types.is_integer(kind) or pa.types.is_floating(kind) else column


def _read_statistics(baseline: Path) -> Any:
    return _read_text(
        baseline / "statistics.pbtxt",
        Statistics(),
        ArtifactError("the baseline's statistics cannot be read", expected="the output of an earlier validate"),
    )


def _choose_schema(statistics: Any, baseline: Path | None, reviewed: Path | None) -> tuple[str, Any]:
    if reviewed is not None:
        unread: Exception = SettingsError(
            "the reviewed schema cannot be read",
            expected="a schema.pbtxt as validate writes it",
            got=reviewed.name,
            next_step="copy schema.pbtxt or schema.proposed.pbtxt of a validated version there, once you have read it",
        )
        return "reviewed", _read_text(reviewed, schema_pb2.Schema(), unread)
    if baseline is not None:
        unread = ArtifactError("the baseline's schema cannot be read", expected="the output of an earlier validate")
        return "baseline", _read_text(baseline / "schema.pbtxt", schema_pb2.Schema(), unread)
    return "inferred", tfdv.infer_schema(statistics, infer_feature_shape=False)


def _read_text(path: Path, message: Any, wrong: Exception) -> Any:
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), message)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise wrong from error
    return message


def _anomalies(statistics: Any, schema: Any) -> Iterator[dict[str, str]]:
    """Yield one row a reason, sorted by feature."""
    found = tfdv.validate_statistics(statistics, schema)
    for feature in sorted(found.anomaly_info):
        yield from _reasons(feature, found.anomaly_info[feature], statistics, schema)
    if found.HasField("dataset_anomaly_info"):
        yield from _reasons("", found.dataset_anomaly_info, statistics, schema)


def _reasons(feature: str, info: Any, statistics: Any, schema: Any) -> Iterator[dict[str, str]]:
    for reason in info.reason:
        kind = anomalies_pb2.AnomalyInfo.Type.Name(reason.type)
        yield {
            "feature": feature,
            "type": kind,
            "short": reason.short_description.strip(),
            "long": reason.description.strip(),
            "severity": "stop" if kind in STOPS or _is_another_data_set(feature, kind, statistics, schema) else "warn",
        }


def _is_another_data_set(feature: str, kind: str, statistics: Any, schema: Any) -> bool:
    if feature not in IDENTITY or kind != "ENUM_TYPE_UNEXPECTED_STRING_VALUES":
        return False
    known = set(tfdv.get_domain(schema, feature).value)
    buckets = tfdv.get_feature_stats(
        statistics.datasets[0], tfdv.FeaturePath([feature])
    ).string_stats.rank_histogram.buckets
    counts = {bucket.label: bucket.sample_count for bucket in buckets}
    outside = sum(count for label, count in counts.items() if label not in known)
    return bool(outside > IDENTITY_STOP_FRACTION * sum(counts.values()))


def _drift(
    statistics: Any, previous: Any, schema: Any, jensen_shannon_max: float, l_infinity_max: float
) -> dict[str, Any]:
    """Return each feature's distance to the baseline; no features without one.

    A feature that only one of the two versions has is not comparable, and stands among the anomalies.
    """
    instances = {"instances": int(statistics.datasets[0].num_examples)}
    if previous is None:
        return {**instances, "baseline_instances": None, "features": []}
    is_text = {feature.path.step[0]: not feature.HasField("num_stats") for feature in statistics.datasets[0].features}
    compared = schema_pb2.Schema()
    compared.CopyFrom(schema)
    for feature in compared.feature:
        text = feature.type == schema_pb2.BYTES
        if (
            is_text.get(feature.name) is not text
        ):  # gone or of another type: an anomaly already, with nothing to compare
            continue
        for comparator in (feature.drift_comparator, feature.skew_comparator):
            if comparator.ByteSize() == 0:
                measure = comparator.infinity_norm if text else comparator.jensen_shannon_divergence
                measure.threshold = l_infinity_max if text else jensen_shannon_max
    found = tfdv.validate_statistics(
        statistics, compared, previous_statistics=previous, serving_statistics=previous
    ).drift_skew_info
    rows = sorted((_distance(info) for info in found), key=lambda row: row["feature"])
    return {**instances, "baseline_instances": int(previous.datasets[0].num_examples), "features": rows}


def _distance(info: Any) -> dict[str, Any]:
    # A schema may ask for several measures of one feature; the first is the one it names first.
    drift, skew = info.drift_measurements[0], info.skew_measurements[0]
    return {
        "feature": ".".join(info.path.step),
        "measure": anomalies_pb2.DriftSkewInfo.Measurement.Type.Name(drift.type).lower(),
        "drift": drift.value,
        "skew": skew.value,
        "threshold": drift.threshold,
        "drifted": drift.value > drift.threshold or skew.value > skew.threshold,
    }


def _compact(statistics: Any) -> dict[str, Any]:
    """Return what a report shows of each feature: counts, and moments and deciles or the commonest values."""
    dataset = statistics.datasets[0]
    features: dict[str, Any] = {}
    for feature in sorted(dataset.features, key=lambda feature: feature.path.step[0]):
        numeric = feature.HasField("num_stats")
        stats = feature.num_stats if numeric else feature.string_stats
        row = {"count": int(stats.common_stats.num_non_missing), "missing": int(stats.common_stats.num_missing)}
        features[feature.path.step[0]] = row | (_numbers(stats) if numeric else _values(stats))
    return {"instances": int(dataset.num_examples), "features": features}


def _numbers(stats: Any) -> dict[str, Any]:
    if stats.common_stats.num_non_missing == 0:
        return {"kind": "number"}
    quantiles = [histogram for histogram in stats.histograms if histogram.type == statistics_pb2.Histogram.QUANTILES]
    edges = (
        [bucket.low_value for bucket in quantiles[0].buckets] + [quantiles[0].buckets[-1].high_value]
        if quantiles
        else []
    )
    return {
        "kind": "number",
        "mean": stats.mean,
        "std": stats.std_dev,
        "min": stats.min,
        "median": stats.median,
        "max": stats.max,
        "deciles": edges,
    }


def _values(stats: Any) -> dict[str, Any]:
    top = [{"value": value.value, "count": int(value.frequency)} for value in stats.top_values]
    return {"kind": "category", "unique": int(stats.unique), "top": top}


def _json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file that is seen whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
