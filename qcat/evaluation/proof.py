"""Verification: compares merged, F16 and quantized model on held-out questions.

Accuracy, macro-F1, label flips and the Kullback-Leibler divergence of the label distributions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qcat.backends.llama import LlamaModel
from qcat.backends.llama_scorer import LlamaScorer
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import QUESTION_ROOM
from qcat.encoding.scoring import Floats, label_log_probabilities
from qcat.progress import Count, uncounted
from qcat.threads import default_threads

Item = TypeVar("Item")


@dataclass(frozen=True)
class Quality:
    """Results of one form of the model on the held-out questions."""

    accuracy: float
    macro_f1: float
    flips: int
    """Questions whose label differs from the merged model's."""
    kl_mean: float
    """Mean over questions of KL(merged || this), in nats."""
    kl_max: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return asdict(self)


class Replayed(NamedTuple):
    """A GGUF's answers to questions."""

    log_probabilities: Floats
    """Of the labels, shape (questions, labels)."""
    seconds: list[float]
    """Time per question."""


def replay_gguf(
    path: Path,
    encoded: EncodedTask,
    rests: Sequence[Sequence[int]],
    *,
    base: Path | None = None,
    progress: Count = uncounted,
) -> Replayed:
    """Load a GGUF and ask it one question per forward pass, as in `qcat ask`.

    Args:
        path: path of the file.
        encoded: the task in its tokens.
        rests: results of `EncodedTask.rest`.
        base: the base of the file, if it is an adapter.
        progress: called with the number of questions asked and the total.
    """
    with LlamaModel(base or path) as model:
        scorer = LlamaScorer(
            model,
            prefix=encoded.prefix,
            trie=encoded.trie,
            grammar=encoded.grammar,
            room=QUESTION_ROOM,
            threads=default_threads(),
            adapter=path if base else None,
        )
        try:
            rows, seconds = [], []
            for done, rest in enumerate(rests, 1):
                start = time.perf_counter()
                scores = next(scorer.score([rest]))
                seconds.append(time.perf_counter() - start)
                rows.append(label_log_probabilities(encoded.trie, scores.logits))
                progress(done, len(rests))
            return Replayed(np.stack(rows), seconds)
        finally:
            scorer.close()


def quality(found: Floats, reference: Floats, truth: Sequence[int]) -> Quality:
    """Compare label log-probabilities with the merged model's and with the right labels.

    Args:
        found: shape (questions, labels).
        reference: those of the merged model, same shape.
        truth: index of the right label, for each question.
    """
    from sklearn.metrics import accuracy_score, f1_score

    labels = found.argmax(1)
    divergence = (np.exp(reference) * (reference - found)).sum(1)
    return Quality(
        accuracy=float(accuracy_score(truth, labels)),
        macro_f1=float(f1_score(truth, labels, average="macro", zero_division=0.0)),
        flips=int((labels != reference.argmax(1)).sum()),
        kl_mean=float(np.maximum(divergence, 0).mean()),
        kl_max=float(np.maximum(divergence, 0).max()),
    )


def spread(questions: Sequence[Item], most: int) -> tuple[Item, ...]:
    """At most `most` questions, evenly spaced, so that sorted files also cover all labels."""
    step = max(1.0, len(questions) / most)
    return tuple(questions[int(i * step)] for i in range(min(most, len(questions))))
