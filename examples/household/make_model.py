"""Make the model that comes with qcat, and measure it on the test questions beside TF-IDF.

    python examples/household/make_model.py             a quarter of an hour on two cores
    python examples/household/make_model.py --seed 1    with another division of the questions

The small base is trained on the training part of `questions.jsonl`, on all of `more.jsonl`, and on
each of these questions once more as people type them. Validation and test questions are those of
`questions.jsonl` alone, as `qcat train` divides it. Prints the evaluation, then how the labels
hold when the test questions are typed in other ways, and which labels off-topic questions get.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from as_typed import as_typed, capitals, slips, telegram  # noqa: E402 (they lie beside this file)
from recipe import RECIPE  # noqa: E402

from qcat import Classifier  # noqa: E402
from qcat.cli.output import Bars  # noqa: E402
from qcat.data.dataset import Example, read_examples, read_texts  # noqa: E402
from qcat.data.split import split_examples  # noqa: E402
from qcat.encoding.prompt import clean_question  # noqa: E402
from qcat.task import Task  # noqa: E402
from qcat.training.settings import Settings  # noqa: E402
from qcat.training.train import train  # noqa: E402

BASE = ROOT / "examples" / "base" / "model"
OFF_TOPIC = HERE / "off_topic.jsonl"
EPOCHS = 3


def main() -> None:
    """Make it and measure it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "household")
    options = parser.parse_args()
    work = options.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    task = Task.read(HERE / "task.toml")
    split = split_examples(read_examples(HERE / "questions.jsonl", task), task, seed=options.seed)
    questions = [*split.train, *read_examples(HERE / "more.jsonl", task)]
    chance = random.Random(options.seed)
    again = [replace(e, text=clean_question(as_typed(e.text, chance))) for e in questions]
    split = replace(split, train=[*questions, *again])
    recipe = RECIPE | {"epochs": EPOCHS, "dropout": 0.0}
    settings = Settings(base=str(BASE), seed=options.seed, **recipe)
    with Bars() as bars:
        train(task, split, settings, work / "run", bars.show)
    qcat("export", work / "run", "-o", work / "made", "--quant", "q4_k_m")
    qcat(
        "eval", work / "made" / "household.gguf", work / "run" / "test.jsonl", "--baseline",
        "tfidf", "--off-topic", OFF_TOPIC, "--html", work / "report.html",
    )  # fmt: skip
    measure(work / "made" / "household.gguf", split.test, options.seed)


def measure(model: Path, test: Sequence[Example], seed: int) -> None:
    """Accuracy on the test questions typed in other ways, and the labels of off-topic ones."""
    chance = random.Random(seed)
    ways: dict[str, Callable[[str], str]] = {
        "as written": str,
        "in capitals": capitals,
        "as a telegram": telegram,
        "with slips": lambda text: slips(text, chance),
    }
    row: dict[str, object] = {"seed": seed}
    with Classifier.open(model) as classifier:
        labels = list(classifier.task.labels)
        for name, way in ways.items():
            said = classifier.ask_many([way(e.text) for e in test])
            right = sum(p.label == labels[e.label] for p, e in zip(said, test, strict=True))
            row[name] = right / len(test)
        said = list(classifier.ask_many(read_texts(OFF_TOPIC)))
    label, most = Counter(p.label for p in said).most_common(1)[0]
    row |= {"off-topic": len(said), "most frequent": label, "of them": most}
    row["called off-topic"] = sum(p.reason == "off_topic" for p in said)
    print(json.dumps(row))


def qcat(*arguments: object) -> None:
    """Run the command."""
    program = Path(sys.executable).with_name("qcat")
    subprocess.run([program, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
