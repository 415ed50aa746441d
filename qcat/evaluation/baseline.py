"""Baselines that a fine-tuned model has to beat: TF-IDF, and sentence embeddings.

Each learns from the same training questions. scikit-learn and sentence-transformers do the work,
without tuning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qcat.data.dataset import Example
from qcat.errors import DataError, ModelError

Kind = Literal["tfidf", "embeddings", "knn"]
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
"""The embedding model by default: a hub name."""
NAMES: Mapping[Kind, str] = {
    "tfidf": "TF-IDF 1-2-grams + linear SVM (SGD)",
    "embeddings": "embeddings + logistic regression",
    "knn": "embeddings + 5 nearest neighbours",
}
SEED = 0
_NEIGHBOURS = 5


def baseline_predictions(
    kinds: Sequence[Kind],
    train: Sequence[Example],
    texts: Sequence[str],
    embedder: str = EMBEDDER,
) -> dict[Kind, list[int]]:
    """Train each baseline on labelled questions; return the label's index for each text.

    `tfidf`: words and pairs of words, weighted by TF-IDF, and SGDClassifier with hinge loss (its
    default, and the one in scikit-learn's own tutorial on text), seed 0. `embeddings`: logistic
    regression with C=10 on unit-length sentence embeddings. `knn`: the labels of the 5 nearest
    training questions by cosine, each counted by its nearness.

    Args:
        kinds: which of them.
        train: questions to learn from.
        texts: questions to classify.
        embedder: a folder or hub name that sentence-transformers can load.

    Raises:
        DataError: fewer than two labels in the training questions, or no word in them.
        ModelError: the embedding model cannot be used.
    """
    for kind in kinds:
        if kind not in NAMES:
            raise DataError(f"no baseline {kind!r}: there are {', '.join(NAMES)}")
    labels = [example.label for example in train]
    if len(set(labels)) < 2:
        raise DataError("the baseline needs training questions of at least two labels")
    learned = [example.text for example in train]
    found: dict[Kind, list[int]] = {}
    if "tfidf" in kinds:
        found["tfidf"] = _tfidf(learned, labels, texts)
    if {"embeddings", "knn"} & {*kinds}:
        there, here = _embedded(embedder, learned, texts)
        for kind in ("embeddings", "knn"):
            if kind in kinds:
                model = _on_embeddings(kind, len(train))
                model.fit(there, labels)
                found[kind] = [int(label) for label in model.predict(here)]
    return {kind: found[kind] for kind in kinds}


def _tfidf(train: Sequence[str], labels: Sequence[int], texts: Sequence[str]) -> list[int]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)), SGDClassifier(loss="hinge", random_state=SEED)
    )
    try:
        model.fit(train, labels)
    except ValueError as error:  # an empty vocabulary
        raise DataError(f"the baseline cannot learn from the training questions: {error}") from None
    return [int(label) for label in model.predict(list(texts))]


def _on_embeddings(kind: Kind, questions: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    if kind == "embeddings":
        return LogisticRegression(C=10, max_iter=1000)
    return KNeighborsClassifier(
        min(_NEIGHBOURS, questions), metric="cosine", weights="distance", algorithm="brute"
    )


def _embedded(name: str, *parts: Sequence[str]) -> list[Any]:
    """Unit vectors of each list of texts, shape (texts, width), computed on the CPU."""
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # Code in the folder is never run.
        model = SentenceTransformer(name, device="cpu", trust_remote_code=False)
        return [
            model.encode(list(part), normalize_embeddings=True, show_progress_bar=False)
            for part in parts
        ]
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"embedding model {name!r}: cannot be used ({reason}): check the name and the "
            "network, or give a folder with --embedder"
        ) from None
