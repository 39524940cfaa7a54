"""From a study to what goes back to the PACS: each image is asked about, and the answers become one report and pictures.

Nothing is left silent: an image that the model is not for, that is damaged, or whose answer is late, stands in the report as "not
analysed" with the reason. Our own results, which come back by auto-forward, are passed over.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from radloop.dicom import results
from radloop.dicom.rejections import rejected
from radloop.dicom.results import Algorithm, Analysis
from radloop.errors import DicomError, ServingError
from radloop.learning import saliency
from radloop.learning.package import Packaged
from radloop.serving.client import Prediction
from radloop.serving.model import read_dicom

Ask = Callable[[bytes, float], Prediction]
"""Asks the gateway about one file, within so many seconds. Raises ServingError."""

_REASON_LENGTH = 48
_LONGEST_HEAT_S = 20.0


Heat = Callable[[Dataset], NDArray[np.float32] | None]
"""Where an image's answer comes from: `(rows, columns)`, 0 to 1, or None where that cannot be said in time."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be known of a served model.

    Its name and version, what label 1 means, where its decision begins, and where in an image an answer comes from.
    """

    algorithm: Algorithm
    finding: str
    threshold: float
    heat: Heat


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What goes back for one study.

    `said`: for each image the prediction's id, or the reason it has none; with the algorithm it is what a later report cites.
    """

    study_uid: str
    algorithm: Algorithm
    said: list[str]
    analysed: int
    instances: list[Dataset]


class Image(msgspec.Struct, frozen=True):
    """An image of a study as received: its data set and its file."""

    ds: Dataset
    data: bytes


def images_of(files: Sequence[bytes]) -> list[Image]:
    """The images among a study's files, DICOM Part 10.

    Not our own results, which must not be answered again for ever; nor what a rejection note in the study names.
    """
    read = [(ds, data) for data in files if (ds := _readable(data)) is not None]
    gone = rejected(ds for ds, _ in read)
    return [
        Image(ds, data)
        for ds, data in read
        if "Rows" in ds and not results.is_result(ds) and str(ds.get("SOPInstanceUID")) not in gone
    ]


def state_of(images: Sequence[Image]) -> str:
    """Digest of a study's images: it is answered again when, and only when, this changes."""
    digests = sorted(hashlib.sha256(image.data).hexdigest() for image in images)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]


def read(
    images: Sequence[Image],
    ask: Ask,
    served: Callable[[str], Served],
    champion: str,
    *,
    at: datetime,
    deadline_s: float,
    previous: Dataset | None = None,
) -> Reading:
    """Ask about every image of a study and make what goes back: a report, and a picture of what looks worst.

    Args:
        images: at least one.
        ask: the gateway.
        served: facts of a model by its digest.
        champion: digest of the model in whose name "not analysed" is said if no image had an answer.
        at: when.
        deadline_s: for the whole study; what has no answer by then is "late".
        previous: the report that this one replaces.

    Raises:
        DicomError: instances of several studies.
        ServingError: nobody serves: nothing can be said, and it is to be tried again.
    """
    until = time.monotonic() + deadline_s
    found = [_asked(image.data, ask, until) for image in images]
    answers = [answer for answer in found if not isinstance(answer, str)]
    facts = served(answers[0].model_digest if answers else champion)
    said = [_analysis(answer, facts) for answer in found]
    sets = [image.ds for image in images]
    made: list[Dataset] = [results.report(sets, said, facts.algorithm, at=at, previous=previous)]
    if answers:
        made.append(_picture(sets, said, facts, at))
    return Reading(
        study_uid=str(sets[0].StudyInstanceUID),
        algorithm=facts.algorithm,
        said=[one if isinstance(one, str) else one.prediction_id for one in said],
        analysed=len(answers),
        instances=made,
    )


def _readable(data: bytes) -> Dataset | None:
    """A file that cannot be read has no study to report on; the listener has quarantined it."""
    try:
        return read_dicom(data)
    except DicomError:
        return None


def _asked(data: bytes, ask: Ask, until: float) -> Prediction | str:
    left = until - time.monotonic()
    if left <= 0:
        return "late: no answer in time"
    try:
        return ask(data, left)
    except ServingError as error:
        if error.what == "no answer from the predictor":
            if time.monotonic() >= until:
                return "late: no answer in time"
            raise
        return _reason(str(error.got or error.what))


def _reason(told: str) -> str:
    """The server's words without its status, short; they hold no value of the image."""
    _, _, words = told.partition(": ")
    return (words or told).partition(";")[0][:_REASON_LENGTH]


def _analysis(answer: Prediction | str, served: Served) -> Analysis | str:
    if isinstance(answer, str):
        return answer
    if answer.model_digest != served.algorithm.digest:  # a release changed the model within one study
        return "another model answered meanwhile"
    return Analysis(
        prediction_id=answer.id,
        finding=served.finding,
        probability=answer.probability,
        decision=answer.decision,
        threshold=served.threshold,
    )


def _picture(images: Sequence[Dataset], said: Sequence[Analysis | str], facts: Served, at: datetime) -> Dataset:
    analysed = [(image, one) for image, one in zip(images, said, strict=True) if not isinstance(one, str)]
    image, analysis = max(analysed, key=lambda pair: pair[1].probability)
    return results.picture(image, facts.heat(image), shown(image), analysis, facts.algorithm, at=at)


def heat(packaged: Packaged, image: Dataset) -> NDArray[np.float32] | None:
    """How far an answer falls as each part of the image is covered, on the image's own grid: `(rows, columns)`, 0 to 1.

    None where the network is so slow that the study's deadline could pass over it.
    """
    seen = packaged.preprocessing.from_dataset(image)[np.newaxis]
    began = time.monotonic()
    packaged.logits(seen)
    if (time.monotonic() - began) * saliency.PATCHES**2 > _LONGEST_HEAT_S:
        return None
    (map_,) = saliency.occlusion(packaged.network, seen)
    return _unpadded(map_, int(image.Rows), int(image.Columns))


def _unpadded(square: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """A map of the centre-padded square (`Preprocessing.native`) on the grid of the image within it."""
    side = max(rows, columns)
    down, across = (((np.arange(n) + (side - n) // 2) * len(square)) // side for n in (rows, columns))
    return square[np.ix_(down, across)]


def shown(image: Dataset) -> NDArray[np.uint8]:
    """The image in 8 bits grey, dark = 0, for a picture: `(rows, columns)`; the first frame, windowed by percentiles."""
    from radloop.imaging import pixels

    array: Any = pixels.decode(image)
    low, high = np.percentile(array, (1, 99))
    grey: NDArray[np.uint8] = (np.clip((array - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    return 255 - grey if str(image.get("PhotometricInterpretation")) == "MONOCHROME1" else grey
