"""Choosing a quantization: each is run on the held-out questions; the fastest that passes is kept.

Reads no files other than the given GGUFs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from qcat_convert.quantize import AUTO, CANDIDATES, TRAINED_FOR, UNPROVED

from qcat.encoding.scoring import Floats
from qcat.errors import ExportError
from qcat.evaluation.proof import Replayed, quality
from qcat.progress import Count

_ROUNDS = 3


@dataclass(frozen=True)
class Trial:
    """The results of one quantization on this machine."""

    kind: str
    bytes: int
    """Of the file."""
    median_ms: float
    """Of one question, the model loaded and the prefix evaluated."""
    flips: int
    """Questions that get another label than from the merged model."""
    accuracy: float
    kl_mean: float
    """Mean over questions of KL(merged || this), in nats."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return asdict(self)


BESIDE = "beside"
"""In the place of a quantization: the base as it is, and the adapter in a file beside it."""


def kinds_to_make(wanted: str | None, *, scales: bool, proved: bool) -> tuple[str, ...]:
    """The quantizations to make, of which one is kept.

    Args:
        wanted: one of `QUANTIZATIONS`, `AUTO`, or None for the default: for an adapter of scales
            the format it was trained in; otherwise `AUTO`, or Q4_K_M without held-out questions.
        scales: whether the adapter is one of scales.
        proved: whether there are held-out questions.

    Raises:
        ExportError: a kind other than the one an adapter of scales was trained in; or `AUTO`
            without questions.
    """
    if scales:
        if wanted not in (None, AUTO, TRAINED_FOR):
            raise ExportError(
                f"--quant {wanted}: the weights were trained in {TRAINED_FOR}, which loses nothing "
                "here: leave the option out, or train with --method lora"
            )
        return (TRAINED_FOR,)
    if wanted == AUTO and not proved:
        raise ExportError(
            f"--quant {AUTO} compares on held-out questions: give them with --data, or name one "
            "quantization"
        )
    if wanted in (None, AUTO):
        return CANDIDATES if proved else (UNPROVED,)
    return (str(wanted),)


def within_size(files: Mapping[str, Path], limit: float | None) -> dict[str, Path]:
    """The files within a limit in megabytes; all of them if there is no limit.

    Raises:
        ExportError: no file is within the limit.
    """
    sizes = {kind: path.stat().st_size / 1e6 for kind, path in files.items()}
    small = {kind: path for kind, path in files.items() if limit is None or sizes[kind] <= limit}
    if not small:
        smallest = min(sizes, key=lambda kind: sizes[kind])
        raise ExportError(
            f"{smallest} makes a file of {sizes[smallest]:.1f} MB, more than the {limit:g} of "
            "--max-mb: allow more, or trim the vocabulary with --vocab trim where that is possible"
        )
    return small


def choose(trials: Sequence[Trial], questions: int, max_flips: float) -> Trial:
    """The fastest that changes few enough labels; if there is none, the one that changes fewest.

    Ties go to the smaller file, then to the earlier one.

    Args:
        trials: at least one.
        questions: number of questions that each was asked.
        max_flips: the largest share of questions whose label may change.
    """
    passing = [trial for trial in trials if trial.flips / questions <= max_flips]
    if passing:
        return min(passing, key=lambda trial: (trial.median_ms, trial.bytes))
    return min(trials, key=lambda trial: (trial.flips, trial.median_ms, trial.bytes))


def try_all(
    files: Mapping[str, Path],
    ask: Callable[[Path, Sequence[int]], Replayed],
    reference: Floats,
    truth: Sequence[int],
    progress: Count,
) -> tuple[list[Trial], dict[str, Floats]]:
    """Run all questions through all files.

    The files take turns; each is loaded for a part of the questions and then closed. A temporary
    slowdown of the machine therefore affects all of them, and only one is in memory at a time.

    Args:
        files: the GGUF of each kind.
        ask: replays the questions with these indices through a file.
        reference: label log-probabilities of the merged model, shape (questions, labels).
        truth: index of the right label, for each question.
        progress: called with the number of questions asked and the total.

    Returns:
        What was measured, and each kind's label log-probabilities, shape (questions, labels).
    """
    count = len(truth)
    found = {kind: np.empty_like(reference) for kind in files}
    seconds: dict[str, list[float]] = {kind: [] for kind in files}
    done = 0
    for turn in range(min(_ROUNDS, count)):
        rows = range(turn, count, _ROUNDS)
        kinds = list(files)
        for kind in kinds[turn:] + kinds[:turn]:  # so that none is always the first
            replayed = ask(files[kind], rows)
            found[kind][rows] = replayed.log_probabilities
            seconds[kind] += replayed.seconds
            done += len(rows)
            progress(done, count * len(files))
    trials = []
    for kind, path in files.items():
        measured = quality(found[kind], reference, truth)
        trials.append(
            Trial(
                kind=kind,
                bytes=path.stat().st_size,
                median_ms=median(seconds[kind]) * 1e3,
                flips=measured.flips,
                accuracy=measured.accuracy,
                kl_mean=measured.kl_mean,
            )
        )
    return trials, found
