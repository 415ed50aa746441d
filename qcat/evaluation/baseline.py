"""The baseline that a fine-tuned model has to beat: TF-IDF and a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence

from qcat.data.dataset import Example
from qcat.errors import DataError

NAME = "TF-IDF 1-2-grams + linear SVM (SGD)"
SEED = 0


def tfidf_predictions(train: Sequence[Example], texts: Sequence[str]) -> list[int]:
    """Train on labelled questions, then return the label's index for each text.

    scikit-learn's TfidfVectorizer on words and pairs of words, and SGDClassifier with hinge loss
    (its default, and the one in scikit-learn's own tutorial on text), seed 0, without tuning.

    Raises:
        DataError: fewer than two labels in the training questions, or no word in them.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    labels = [example.label for example in train]
    if len(set(labels)) < 2:
        raise DataError("the baseline needs training questions of at least two labels")
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)), SGDClassifier(loss="hinge", random_state=SEED)
    )
    try:
        model.fit([example.text for example in train], labels)
    except ValueError as error:  # an empty vocabulary
        raise DataError(f"the baseline cannot learn from the training questions: {error}") from None
    return [int(label) for label in model.predict(list(texts))]
