"""The model that comes with qcat, the base that it was made from, and the example data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from conftest import EXAMPLE, ROOT

from qcat import Classifier
from qcat.classifier import DEFAULT_MODEL
from qcat.data.dataset import read_examples
from qcat.data.split import split_examples
from qcat.gguf.bundle import Bundle
from qcat.gguf.header import read_header
from qcat.gguf.sections import section

BASE = ROOT / "examples" / "base" / "model"


def rows(name):
    return [json.loads(line) for line in (EXAMPLE / name).read_text("utf-8").splitlines()]


def test_answers_where_no_model_is_named(qcat, tmp_path):
    done = qcat("ask", "When was the pool pump replaced?", cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("pool\n", "", 0)


def test_it_is_small_and_of_the_example_task(household):
    assert DEFAULT_MODEL.stat().st_size <= 8e6
    assert Bundle.read(DEFAULT_MODEL).task == household
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 25e6


def test_its_report_is_what_it_answers(household):
    """The accuracy in its metadata is that on the test part of seed 0, which it never saw."""
    report = section(read_header(DEFAULT_MODEL), "qcat.report", DEFAULT_MODEL)
    split = split_examples(read_examples(EXAMPLE / "questions.jsonl", household), household, seed=0)
    labels = list(household.labels)
    with Classifier.open() as house:
        said = [p.label for p in house.ask_many(example.text for example in split.test)]
    right = sum(a == labels[e.label] for a, e in zip(said, split.test, strict=True))
    proof = report["proof"]
    assert proof["questions"] == len(split.test)
    # Another processor sums in another order: a question or two on the brink may tip.
    assert right / len(said) == pytest.approx(proof["quantized"]["accuracy"], abs=0.01)


def test_the_demo_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert lines[1].split("?")[1].split()[0] == "pool"
    assert lines[-1].split()[-1] == "off_topic"


def test_it_is_calibrated_on_its_validation_questions(household):
    split = split_examples(read_examples(EXAMPLE / "questions.jsonl", household), household, seed=0)
    with Classifier.open() as house:
        known = house.calibration
        assert known.questions == len(split.validation)
        # Another threshold than none would be a choice that its users have to make.
        assert known.threshold is None
        off = sum(p.reason == "off_topic" for p in house.ask_many(e.text for e in split.validation))
    assert off / known.questions == pytest.approx(0.05, abs=0.01)


def test_the_data_is_as_its_readme_says(household):
    questions, more, off_topic = map(rows, ("questions.jsonl", "more.jsonl", "off_topic.jsonl"))
    readme = (EXAMPLE / "README.md").read_text("utf-8")
    counts = Counter(row["label"] for row in questions)
    assert list(counts) == list(household.labels)
    owners = {row["group"]: row["label"] for row in questions}
    assert all(owners[row["group"]] == row["label"] for row in questions)
    for figure in (
        f"{len(questions):,}",
        f"{len(owners):,} groups",
        f"{min(counts.values())} to {max(counts.values())} questions a label",
        f"{len(more):,}",
        str(len(off_topic)),
    ):
        assert figure in readme
    assert Counter(row["kind"] for row in off_topic) == {"near": 118, "far": 118}
    texts = [{row["text"].casefold() for row in part} for part in (questions, more, off_topic)]
    # What the shipped model is trained on must not be what it is measured on.
    assert all(one.isdisjoint(other) for one, other in combinations(texts, 2))


@pytest.mark.parametrize("name", ["questions.jsonl", "more.jsonl"])
def test_the_data_is_clean(qcat, name):
    done = qcat("lint", EXAMPLE / "task.toml", EXAMPLE / name)
    assert done.returncode == 0
    assert "0 errors, 0 warnings" in done.stdout
