"""How good the small base and the shipped model are, and which training choices are best.

    python bench/small_model.py household   the example questions, 5 split seeds, the 4-bit GGUF
    python bench/small_model.py clinc       18 CLINC150 intents that the base never saw, 5 draws
    python bench/small_model.py choices     objective × verbalizer × style, on validation

TF-IDF with SGD is trained on the same questions each time. Prints a table and one line of JSON.
CLINC150 is looked for under QCAT_SHARED.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from qcat.cli.output import table

ROOT = Path(__file__).resolve().parent.parent
HOUSEHOLD = ROOT / "examples" / "household"
SHARED = Path(os.environ.get("QCAT_SHARED", ROOT.parent / "shared"))
LABELS, PER_LABEL = 18, 45


def main() -> None:
    """Measure what was asked for, print."""
    warnings.simplefilter("ignore")
    options = _options()
    with tempfile.TemporaryDirectory() as work:
        rows = {"household": household, "clinc": clinc, "choices": choices}[options.what](
            options, Path(work)
        )
    columns = list(rows[0])
    cells = [columns, *([_cell(row[name]) for name in columns] for row in rows)]
    print("\n".join(table(cells)))
    figures = [name for name in columns if isinstance(rows[0][name], float)]
    for name in figures if options.what != "choices" else ():
        values = [row[name] for row in rows]
        print(f"{name}: mean {mean(values):.3f}, standard deviation {pstdev(values):.3f}")
    print(json.dumps({"what": options.what, "base": options.base.name, "rows": rows}))


def household(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Split, train, export to 4 bits and ask the file, for each seed."""
    from qcat.data.dataset import read_examples
    from qcat.data.split import split_examples
    from qcat.task import Task

    task = Task.read(HOUSEHOLD / "task.toml")
    examples = read_examples(HOUSEHOLD / "questions.jsonl", task)
    return [
        {"seed": seed}
        | measure(task, split_examples(examples, task, seed=seed), seed, options, work)
        for seed in range(options.draws)
    ]


def clinc(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Draws of intents that were reserved when the base was made."""
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "examples" / "base")]
    from texts import reserved

    from qcat.data.dataset import Example
    from qcat.data.split import Split
    from qcat.task import Task

    rows = {
        part: [json.loads(line) for line in (SHARED / "data/clinc150" / f"{part}.jsonl").open()]
        for part in ("train", "valid", "test")
    }
    intents = sorted(reserved(rows["train"]))
    found = []
    for draw in range(options.draws):
        chance = random.Random(draw)
        chosen = chance.sample(intents, LABELS)
        task = Task("clinc", {intent.replace("_", " "): "" for intent in chosen})
        parts = {
            part: [
                Example(row["text"], chosen.index(row["label"]), line)
                for line, row in enumerate(chance.sample(part_rows, len(part_rows)), 1)
                if row["label"] in chosen
            ]
            for part, part_rows in rows.items()
        }
        few = [
            example
            for label in range(LABELS)
            for example in [e for e in parts["train"] if e.label == label][:PER_LABEL]
        ]
        split = Split(few, parts["valid"], parts["test"])
        found.append({"draw": draw} | measure(task, split, draw, options, work))
    return found


def measure(task: Any, split: Any, seed: int, options: Any, work: Path) -> dict[str, Any]:
    """Accuracy and macro-F1 on the test part: the 4-bit GGUF, and TF-IDF beside it."""
    from sklearn.metrics import accuracy_score, f1_score

    from qcat import Classifier
    from qcat.evaluation.baseline import tfidf_predictions
    from qcat.training.train import train
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    run, made = work / "run", work / "made"
    for folder in (run, made):
        shutil.rmtree(folder, ignore_errors=True)
    train(task, split, _settings(options, seed), run)
    report = export(
        Request(
            task,
            made,
            adapter=run,
            held_out=tuple(split.test),
            training=tuple(e.text for e in split.train),
            quantization="q4_k_m",
            max_flips=1,
        )
    )
    labels, texts = list(task.labels), [e.text for e in split.test]
    truth = [e.label for e in split.test]
    with Classifier.open(made / f"{task.name}.gguf") as classifier:
        said = [labels.index(p.label) for p in classifier.ask_many(texts)]
    baseline = tfidf_predictions(split.train, texts)
    row = {
        "questions": len(split.train),
        "tested": len(truth),
        "accuracy": float(accuracy_score(truth, said)),
        "macro-F1": float(f1_score(truth, said, average="macro")),
        "TF-IDF accuracy": float(accuracy_score(truth, baseline)),
        "TF-IDF macro-F1": float(f1_score(truth, baseline, average="macro")),
        "torch accuracy": report["proof"]["merged"]["accuracy"],
        "flips": report["proof"]["quantized"]["flips"],
        "MB": round(report["bytes"] / 1e6, 1),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def choices(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Validation figures of every combination, the mean over the seeds; the test is not touched."""
    from qcat.data.dataset import read_examples
    from qcat.data.split import split_examples
    from qcat.task import Task
    from qcat.training.train import train

    plain = Task.read(HOUSEHOLD / "task.toml")
    examples = read_examples(HOUSEHOLD / "questions.jsonl", plain)
    rows = []
    for objective, verbalizer, style in product(
        ("labels", "answer"), ("name", "code"), ("plain", "chat")
    ):
        task = plain.replace(verbalizer=verbalizer, style=style)
        found: list[dict[str, Any]] = []
        for seed in range(options.draws):
            options.objective = objective
            shutil.rmtree(work / "run", ignore_errors=True)
            split = split_examples(examples, task, seed=seed)
            record = train(task, split, _settings(options, seed), work / "run")
            found.append(record["history"][record["best_epoch"] - 1])
        rows.append(
            {
                "objective": objective,
                "verbalizer": verbalizer,
                "style": style,
                "accuracy": mean(epoch["validation_accuracy"] for epoch in found),
                "macro-F1": mean(epoch["validation_macro_f1"] for epoch in found),
                "loss": mean(epoch["validation_loss"] for epoch in found),
                "best epoch": mean(epoch["epoch"] for epoch in found),
                "prefix tokens": record["prefix_tokens"],
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _settings(options: argparse.Namespace, seed: int) -> Any:
    from qcat.training.settings import Settings

    return Settings(
        method="lora",
        base=str(options.base),
        objective=options.objective,
        epochs=options.epochs,
        batch=options.batch,
        rate=options.rate,
        rank=options.rank,
        train_embeddings=not options.frozen_embeddings,
        word_dropout=options.word_dropout,
        seed=seed,
    )


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["household", "clinc", "choices"])
    parser.add_argument("--base", type=Path, default=ROOT / "examples/base/model")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--objective", choices=["labels", "answer"], default="answer")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--frozen-embeddings", action="store_true")
    parser.add_argument("--word-dropout", type=float, default=0.15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
