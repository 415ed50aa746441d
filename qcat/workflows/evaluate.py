"""Evaluates a model on a file of labelled questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qcat.evaluation.baseline import EMBEDDER, Kind
from qcat.evaluation.evaluate import LATENCY_QUESTIONS, Request
from qcat.evaluation.evaluate import evaluate as evaluate_request
from qcat.evaluation.results import Decode, Evaluation
from qcat.progress import Progress, silent


def evaluate(
    model: str | os.PathLike[str],
    questions: str | os.PathLike[str],
    *,
    decode: Decode = "label",
    off_topic: str | os.PathLike[str] | None = None,
    compare: str | os.PathLike[str] | None = None,
    baselines: Sequence[Kind] = ("tfidf",),
    train_data: str | os.PathLike[str] | None = None,
    embedder: str = EMBEDDER,
    timed: int = LATENCY_QUESTIONS,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model on labelled questions that it was not trained on.

    Args:
        model: a GGUF, the folder of a bundle, or `ollama:NAME`.
        questions: file of labelled questions: JSONL, CSV or Parquet.
        decode: `label` under the grammar, or `free`, where any other text counts as wrong.
        off_topic: file of texts that belong to no label.
        compare: another model with the same labels, given in the same way.
        baselines: which baselines to train beside it: `tfidf`, `embeddings`, `knn`.
        train_data: their training questions; None for no baseline.
        embedder: folder or hub name of the embedding model of the last two.
        timed: the largest number of questions to time.
        progress: called as the work goes on.

    Raises:
        DataError: a file cannot be read, or the model lacks a label.
        BundleError, ModelError: a GGUF or the embedding model cannot be used.
        ServerError: a server does not answer, or returns no probabilities.
    """
    request = Request(
        os.fspath(model),
        Path(questions),
        decode=decode,
        off_topic=Path(off_topic) if off_topic else None,
        compare=os.fspath(compare) if compare else None,
        baselines=tuple(baselines),
        train_data=Path(train_data) if train_data else None,
        embedder=embedder,
        timed=timed,
    )
    return evaluate_request(request, progress)
