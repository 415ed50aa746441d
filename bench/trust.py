"""What the confidence is worth: calibration, promises, prediction sets and off-topic questions.

    python bench/trust.py --work FOLDER     a quarter of an hour of training, once, then minutes

The shipped household model, and draws of 18 labels of CLINC150 (intents that the small base never
saw) and Banking77, 45 examples a label, trained on the small base and kept in FOLDER. The held-out
questions of each are divided 100 times at random, whole groups together: one half calibrates, the
other measures. Data are looked for under QCAT_SHARED. Prints tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcat import Classifier
from qcat.calibration.decide import decide, recalibrated
from qcat.calibration.reliability import detection, reliability
from qcat.classifier import DEFAULT_MODEL
from qcat.cli.output import Bars, table
from qcat.data.dataset import Example, read_examples, read_texts
from qcat.data.split import Split, find_families, split_examples
from qcat.errors import DataError
from qcat.prediction import Prediction
from qcat.task import Task
from qcat.workflows.calibrate import Asked, ask_all

ROOT = Path(__file__).resolve().parent.parent
HOUSEHOLD = ROOT / "examples" / "household"
DATA = Path(os.environ.get("QCAT_SHARED", ROOT.parent / "shared")) / "data"
LABELS, PER_LABEL, SPLITS = 18, 45, 100
PROMISES = (0.02, 0.05, 0.1)
COVERAGES = (0.9, 0.95)
SIGNALS = {
    "top probability": lambda p: p.confidence,
    "negative entropy": lambda p: -p.entropy,
    "label mass": lambda p: p.label_mass,
    "energy": lambda p: p.energy,
    "on-topic score": lambda p: p.on_topic,
}


@dataclass(frozen=True)
class Job:
    """A model, what it was trained on, and what to ask it."""

    name: str
    model: Path
    train: list[Example]
    held_out: list[Example]
    off_topic: list[str]


def main() -> None:
    """Train what is missing, measure, print."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with Bars() as bars:
        for job in jobs(options.work, options.draws):
            print(f"{job.name}: {job.model.name}", file=sys.stderr, flush=True)
            splits = SPLITS if job.name == "household" else SPLITS // options.draws
            found.setdefault(job.name, []).extend(measure(job, splits, bars))
    summary = {name: summed(rows) for name, rows in found.items()}
    for heading, rows in tables(summary):
        print(f"\n{heading}")
        print("\n".join(table(rows)))
    print(json.dumps(summary).replace("NaN", "null"))


def jobs(work: Path, draws: int) -> Iterator[Job]:
    """The household model, then the draws."""
    task = Task.read(HOUSEHOLD / "task.toml")
    split = split_examples(read_examples(HOUSEHOLD / "questions.jsonl", task), task, seed=0)
    off = read_texts(HOUSEHOLD / "off_topic.jsonl")
    yield Job("household", DEFAULT_MODEL, split.train, split.validation + split.test, off)
    strangers = read_texts(DATA / "clinc150" / "oos_test.jsonl")
    for name in ("clinc150", "banking77"):
        for draw in range(draws):
            folder = work / f"{name}-{draw}"
            if not (folder / "made").is_dir():
                make(name, draw, folder)
            task = Task.read(folder / "made" / "task.toml")
            parts = (read_examples(folder / "run" / f"{p}.jsonl", task) for p in ("train", "test"))
            yield Job(name, folder / "made" / f"{name}.gguf", *parts, strangers)


def make(name: str, draw: int, folder: Path) -> None:
    """Train and export one draw; what is neither trained on nor for validation is held out."""
    sys.path[:0] = [str(ROOT / "examples" / part) for part in ("base", "household")]
    from recipe import RECIPE
    from texts import reserved

    from qcat.training.settings import Settings
    from qcat.training.train import train
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    rows = {
        path.stem: [json.loads(line) for line in path.open()]
        for path in (DATA / name).glob("*.jsonl")
        if not path.stem.startswith("oos")
    }
    chance = random.Random(draw)
    intents = {row["label"] for row in rows["train"]}
    chosen = chance.sample(
        sorted(reserved(rows["train"]) if name == "clinc150" else intents), LABELS
    )
    task = Task(name, {intent.replace("_", " ").replace("?", ""): "" for intent in chosen})
    parts = {
        part: [
            Example(row["text"], chosen.index(row["label"]), line)
            for line, row in enumerate(chance.sample(rows[part], len(rows[part])), 1)
            if row["label"] in chosen
        ]
        for part in sorted(rows, key=("train", "valid", "test").index)
    }
    few, rest = [], []
    for label in range(LABELS):
        mine = [example for example in parts["train"] if example.label == label]
        few += mine[:PER_LABEL]
        rest += mine[PER_LABEL:]
    if name == "clinc150":
        split = Split(few, parts["valid"], parts["test"] + rest)
    else:  # the base has seen Banking77's training questions, so only its test is held out
        split = Split(few, rest[:360], parts["test"])
    settings = Settings(base=str(ROOT / "examples/base/model"), seed=draw, **RECIPE)
    train(task, split, settings, folder / "run")
    request = Request(
        task,
        folder / "made",
        adapter=folder / "run",
        training=tuple(example.text for example in few),
    )
    export(request)


def measure(job: Job, splits: int, bars: Bars) -> Iterator[dict[str, Any]]:
    """The figures of each split."""
    questions = job.held_out
    asked = ask_all(job.model, questions, lambda done, n: bars.show("on the list", done, n))
    with Classifier.open(job.model, calibrated=False) as classifier:
        off = []
        for done, text in enumerate(job.off_topic, 1):
            off.append(classifier.ask(text))
            bars.show("off the list", done, len(job.off_topic))
    beside = tfidf(job)
    families = np.array(find_families(job.held_out))
    for seed in range(splits):
        drawn = np.random.default_rng(seed).permutation(families.max() + 1)
        first = np.isin(families, drawn[: len(drawn) // 2])
        halves = (asked.part(np.flatnonzero(rows).tolist()) for rows in (first, ~first))
        yield of_split(*halves, off, beside)


def of_split(
    half: Asked, other: Asked, off: list[Prediction], beside: dict[str, float]
) -> dict[str, Any]:
    """Calibrate on one half, measure on the other."""
    known = half.fit().calibration
    row = {"temperature": known.temperature} | calibration_figures(half, other)
    judged = other.judged(known)
    for promised in PROMISES:
        try:
            found = half.promise(known, max_error=promised, level=0.95, by_label=False)
        except DataError:
            found = known.with_threshold(1.0)
        answered = other.judged(found).answered
        errors = (~judged.right[answered]).mean() if answered.any() else 0.0
        row[f"answered {promised}"] = float(answered.mean())
        row[f"error {promised}"] = float(errors) if answered.any() else None
        row[f"kept {promised}"] = float(errors <= promised)
    for coverage in COVERAGES:
        sets = [
            decide(
                known, other.labels, int(shares.argmax()), shares, shares, mass=p.label_mass,
                energy=p.energy, truncated=False, coverage=coverage,
            ).prediction_set
            for p, shares in zip(
                other.predictions, other.probabilities(known.temperature), strict=True
            )
        ]  # fmt: skip
        truth = [other.labels[number] for number in other.truth]
        row[f"covered {coverage}"] = float(
            np.mean([t in s for t, s in zip(truth, sets, strict=True)])
        )
        row[f"size {coverage}"] = float(np.mean([len(s) for s in sets]))
        row[f"one {coverage}"] = float(np.mean([len(s) == 1 for s in sets]))
    there = [recalibrated(p, known, other.labels) for p in off]
    for name, signal in SIGNALS.items():
        told = detection([signal(p) for p in other.answers(known)], [signal(p) for p in there])
        row[f"AUROC {name}"], row[f"FPR95 {name}"] = told.auroc, told.fpr
    row["called off, on"] = float(np.mean(~judged.answerable))
    row["called off, off"] = float(np.mean([p.reason == "off_topic" for p in there]))
    return row | beside


def calibration_figures(half: Asked, other: Asked) -> dict[str, float]:
    """Each half measured with the temperature of the other, all questions in one diagram.

    Bins of few questions are off by chance even where the confidence is right, so that is given
    too: the mean error of questions whose right labels are drawn from the calibrated shares.
    """
    pairs = ((half, other.fit().calibration), (other, half.fit().calibration))
    before = np.concatenate([asked.probabilities() for asked, _ in pairs])
    after = np.concatenate([asked.probabilities(known.temperature) for asked, known in pairs])
    truth = np.concatenate([asked.truth for asked, _ in pairs])
    row = {"accuracy": float((before.argmax(1) == truth).mean())}
    for when, shares in (("before", before), ("after", after)):
        found = reliability(shares, truth)
        row |= {f"{k} {when}": getattr(found, k) for k in ("ece", "adaptive_ece", "brier")}
    below = after.cumsum(1)
    chance = np.random.default_rng(0).random((20, len(truth), 1))
    drawn = [(below < at).sum(1).clip(max=after.shape[1] - 1) for at in chance]
    row["ece by chance"] = float(np.mean([reliability(after, labels).ece for labels in drawn]))
    return row


def tfidf(job: Job) -> dict[str, float]:
    """How well the top probability of TF-IDF with logistic regression tells the same questions."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit([e.text for e in job.train], [e.label for e in job.train])
    on, off = (
        model.predict_proba(texts).max(1).tolist()
        for texts in ([e.text for e in job.held_out], job.off_topic)
    )
    found = detection(on, off)
    return {"AUROC TF-IDF": found.auroc, "FPR95 TF-IDF": found.fpr}


def summed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the splits, and the worst of some."""
    found: dict[str, float] = {"splits": len(rows)}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        found[key] = float(np.mean(values)) if values else float("nan")
        if key.startswith("kept"):
            found[key] = float(np.sum(values))
        if key.startswith(("covered", "ece after")):
            found[f"{key}, deviation"] = float(np.std(values))
    return found


def tables(found: dict[str, dict[str, float]]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """What is printed."""
    names = list(found)

    def rows(*keys: str, digits: int = 3) -> list[tuple[str, ...]]:
        cells = [(key, *(f"{found[name][key]:.{digits}f}" for name in names)) for key in keys]
        return [("", *names), *cells]

    yield (
        "calibration, means over the splits",
        rows(
            "accuracy", "temperature", "ece before", "ece after", "ece after, deviation",
            "ece by chance", "adaptive_ece before", "adaptive_ece after",
            "brier before", "brier after",
        ),
    )  # fmt: skip
    yield (
        "promises: splits that kept it, of 100; share answered; error among the answered",
        rows(*(f"{what} {p}" for p in PROMISES for what in ("kept", "answered", "error"))),
    )
    yield (
        "sets",
        rows(
            *(
                f"{what} {c}{more}"
                for c in COVERAGES
                for what, more in (
                    ("covered", ""),
                    ("covered", ", deviation"),
                    ("size", ""),
                    ("one", ""),
                )
            )
        ),
    )
    signals = [*SIGNALS, "TF-IDF"]
    yield (
        "off-topic",
        rows(
            *(f"{what} {name}" for what in ("AUROC", "FPR95") for name in signals),
            "called off, on",
            "called off, off",
        ),
    )


if __name__ == "__main__":
    main()
