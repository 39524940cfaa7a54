"""Every error radloop raises on purpose.

RadloopError
├── DefinitionError        a stage or pipeline that cannot work as written
│   └── SettingsError      radloop.toml, a secret, or an environment that is not as it must be
├── ArtifactError          an artifact that is missing, half-written, of another kind, or changed since
├── DicomError             bytes that are no usable DICOM; carries `reason`, a quarantine reason
│   ├── PhiError           identifying text was found where none may be
│   └── VolumeError        frames that are no volume; carries `refusal`
├── PacsError              a PACS refused, or answered what cannot be used
│   └── PacsUnavailable    a PACS cannot be reached, broke off, or is busy: again may help
├── DataError              labels, manifests and datasets that contradict themselves
├── NotYet                 nothing to do yet: what a stage waits for comes by itself
├── GateError              a gate refused; names gate, figure and bound
└── EngineError            the machinery that runs stages failed
    ├── UnsupportedByEngine  the engine cannot do what the pipeline asks
    ├── RunLocked          another run holds this pipeline
    └── ServingError       predictor, gateway or rollout could not do as asked

An error says what was wrong, what was expected, what came instead, and the next step. It never holds PHI.
"""

from __future__ import annotations


class RadloopError(Exception):
    """Base of all of radloop's own errors.

    Args:
        what: what was wrong, one sentence.
        expected: what would have been right.
        got: what came instead.
        next_step: what the reader can do now, ideally a command.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.expected, self.got, self.next_step = what, expected, got, next_step
        parts = [what]
        if expected is not None:
            parts.append(f"expected: {expected}")
        if got is not None:
            parts.append(f"got: {got}")
        if next_step is not None:
            parts.append(f"next: {next_step}")
        super().__init__("\n  ".join(parts))


class DefinitionError(RadloopError):
    """A stage or pipeline cannot work as written."""


class SettingsError(DefinitionError):
    """Configuration, a secret or an environment is not as it must be."""


class ArtifactError(RadloopError):
    """An artifact is missing, half-written, of another kind, or changed since it was committed."""


class DicomError(RadloopError):
    """Bytes that are no usable DICOM. `reason` is a value of `radloop.catalog.schema.Reason`."""

    def __init__(self, what: str, *, reason: str, **details: object) -> None:
        self.reason = reason
        super().__init__(what, **details)  # type: ignore[arg-type]


class PhiError(DicomError):
    """Identifying text was found where none may be. Names tag paths, never values."""


class VolumeError(DicomError):
    """Frames that make no volume. `refusal` is a value of `radloop.imaging.volume.Refusal`; no attribute value is told."""

    def __init__(self, what: str, *, refusal: str, **details: object) -> None:
        self.refusal = refusal
        super().__init__(what, reason="BAD_GEOMETRY", **details)


class PacsError(RadloopError):
    """A PACS refused, or answered what cannot be used; the same again would not help. Holds no value of a query."""


class PacsUnavailable(PacsError):
    """A PACS cannot be reached, broke off, or is busy. `retry_after_s`: how long it asked us to wait, if it did."""

    def __init__(self, what: str, *, retry_after_s: float | None = None, **details: object) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what, **details)  # type: ignore[arg-type]


class DataError(RadloopError):
    """Labels, manifests or datasets contradict themselves."""


class NotYet(RadloopError):
    """Nothing to do yet: what is waited for comes by itself. A stage that raises it ends as `waiting`, not as `failed`."""


class GateError(RadloopError):
    """A gate refused. The message names gate, figure and bound."""


class EngineError(RadloopError):
    """The machinery that runs stages failed; the stage's own error is its cause where there is one."""


class UnsupportedByEngine(EngineError):
    """Raised when a pipeline is compiled for an engine that cannot do what it asks."""

    def __init__(self, engine: str, stage: str, feature: str) -> None:
        self.engine, self.stage, self.feature = engine, stage, feature
        super().__init__(
            f"the engine {engine!r} cannot run stage {stage!r}: it has no {feature}",
            next_step="choose another engine (docs/engines.md lists what each can do) or drop the feature",
        )


class RunLocked(EngineError):
    """Another run of the same pipeline is under way."""


class ServingError(EngineError):
    """A predictor, the gateway or a rollout could not do what was asked."""
