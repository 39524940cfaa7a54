"""The kinds of artifact that the loop's stages pass to each other, and the members each holds."""

from __future__ import annotations

from radloop.artifact import Kind, Verdict

__all__ = [
    "Dataset",
    "Decision",
    "Drift",
    "Evaluation",
    "Instances",
    "Labels",
    "Model",
    "Package",
    "Performance",
    "Predictions",
    "Registered",
    "Released",
    "Schema",
    "Split",
    "Tensors",
    "Validation",
    "Verdict",
]

TABLE = "instances.parquet"


class Instances(Kind):
    """`instances.parquet`: one row an instance, sorted by pseudonymous `sop_uid`."""

    name = "instances"


class Labels(Kind):
    """`labels.json`: value and source of each labelled instance, by pseudonymous `sop_uid`; given parts, if any."""

    name = "labels"


class Schema(Kind):
    """`schema.pbtxt`, the TFDV schema that a person reviewed and put into the project folder; empty without one."""

    name = "schema"


class Validation(Kind):
    """TFDV's statistics, schema, anomalies and comparisons, and `summary.json`."""

    name = "validation"


class Tensors(Kind):
    """`shard-*.npy` in the native integer type, `index.parquet`, `preprocessing.json`, `refused.json`."""

    name = "tensors"


class Dataset(Kind):
    """`manifest.parquet`: one row an instance with label and part; `dataset.json`: the digests it was made from."""

    name = "dataset"


class Split(Kind):
    """`split.json`: patients and instances of each part, and what was found to cross."""

    name = "split"


class Model(Kind):
    """Weights, architecture and preprocessing; or the files of a network that was made elsewhere, and `runtime.json`.

    The training's history rides along and is not digested.
    """

    name = "model"
    digested = ("weights.*", "architecture.json", "preprocessing.json", "model.*", "runtime.json")


class Evaluation(Kind):
    """`evaluation.json`, `predictions.parquet` and example images."""

    name = "evaluation"
    digested = ("evaluation.json", "predictions.parquet")


class Package(Kind):
    """What is served: the network, preprocessing, decision, declared inputs, reference outputs, model card and wheel."""

    name = "package"
    digested = (
        *("model.*", "runtime.json", "preprocessing.json", "decision.json", "inputs.json", "reference.npz"),
        "identity.json",
    )


class Registered(Kind):
    """`registered.json`: the registry's version and run of a package."""

    name = "registered"


class Released(Kind):
    """`released.json`: what a stage of the release saw and left in `serving/desired.json`."""

    name = "released"


class Predictions(Kind):
    """`predictions.json`: the production window, rows of the prediction log without times."""

    name = "predictions"


class Drift(Kind):
    """`drift.json`: the window against what the champion was trained on."""

    name = "drift"


class Performance(Kind):
    """`performance.json`: predictions against the labels that have arrived."""

    name = "performance"


class Decision(Kind):
    """`decision.json`: whether to train again, and why."""

    name = "decision"
