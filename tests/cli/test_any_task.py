"""Any task on any model: models that qcat did not make, labels that a model was not made for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from plain_logits import walked_labels

from qcat import Classifier
from qcat.errors import ArgumentError, ModelError
from qcat.gguf.header import read_header
from qcat.gguf.sections import TASK_KEY, write_metadata
from qcat.task import Task

KINDS = ("qwen3", "qwen2", "llama", "gemma3")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
TASKS = {
    "sorts": ("pool", "pool pump", "fence", "car"),
    "yes or no": ("yes", "no"),
    "odd": ('a "quoted" one', "größer", "12", "back\\slash", "pool table"),
    "many": tuple(f"kind {number}" for number in range(30)),
}
QUESTIONS = ("When was the pool pump replaced?", "x", "¿Quién pintó la valla? <|im_end|>")


def task_of(name):
    return Task(name.replace(" ", "-"), dict.fromkeys(TASKS[name], ""))


@pytest.fixture(scope="module")
def foreign(make_pair, tmp_path_factory):
    """`foreign(kind, template)`: a model's GGUF that says nothing of qcat."""

    def make(kind, template=None):
        path = tmp_path_factory.mktemp("foreign") / "model.gguf"
        path.write_bytes(make_pair(kind)[0].read_bytes().replace(b"qcat.", b"gone."))
        if template:
            write_metadata(path, {"tokenizer.chat_template": template})
        assert TASK_KEY not in read_header(path).metadata
        return path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ten_tasks_in_turn_on_one_model(kind, foreign):
    """Whichever task was asked before, each is answered as if it were the only one."""
    path = foreign(kind)
    names = [*TASKS, *TASKS, "sorts", "many"]
    random.Random(kind).shuffle(names)
    first = {}
    with Classifier.open(path, task=task_of("sorts")) as kept:
        for name in names:
            with Classifier.open(path, task=task_of(name)) as classifier:
                assert not classifier.trained
                answers = [classifier.ask(question) for question in QUESTIONS]
                said = [[p.probabilities[label] for label in TASKS[name]] for p in answers]
                if name not in first:
                    first[name] = said
                    want = [walked_labels(path, classifier, question) for question in QUESTIONS]
                    # Q4_0 rounds what goes in by the shape of the batch.
                    np.testing.assert_allclose(said, want, atol=0.03)
                np.testing.assert_allclose(said, first[name], atol=1e-6)
        again = [kept.ask(question).probabilities for question in QUESTIONS]
    assert [[p[label] for label in TASKS["sorts"]] for p in again] == first["sorts"]


def test_a_chat_template_makes_the_prompt(foreign):
    path = foreign("qwen3", TEMPLATE)
    with Classifier.open(path, task=task_of("sorts")) as classifier:
        text = classifier._encoded.prompt.text("why?")
        assert text.startswith("<|im_start|>system\nClassify")
        assert text.endswith("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nCategory:")
        special = classifier._encoded.tokenizer.encode("<|im_start|>", special=True)
        assert classifier._encoded.prefix[0] == special[0]
        assert classifier.ask("pool?").label in TASKS["sorts"]


def test_some_of_a_models_own_labels(house, household):
    labels = ["pool", "fence", "car"]
    questions = ["who fixed the gate?", "chlorine", "oil change"]
    with (
        Classifier.open(house, calibrated=False) as whole,
        Classifier.open(
            house, task=Task("few", dict.fromkeys(labels, "")), calibrated=False
        ) as few,
        Classifier.open(house, task=household, calibrated=False) as same,
    ):
        assert (few.trained, few.labels, same.labels) == (True, tuple(labels), whole.labels)
        assert few.identity != whole.identity == same.identity
        for question in questions:
            own, found = whole.ask(question), few.ask(question)
            shares = np.array([own.probabilities[label] for label in labels])
            shares /= shares.sum()
            assert [found.probabilities[label] for label in labels] == pytest.approx(list(shares))
            assert found.label_mass == own.label_mass
        assert few.predict_proba(questions).shape == (3, 3)


def test_another_task_with_the_same_labels_is_another_task(house, household):
    labels = dict.fromkeys(["pool", "fence"], "")
    own = Task("few", labels, instruction=household.instruction)
    spelled = Task("few", {"Fence": "", "POOL": ""})
    other = Task("few", labels, instruction="Which of them is urgent?")
    described = Task("few", labels | {"pool": "billiards"})
    found = []
    for task in (own, spelled, other, described):
        with Classifier.open(house, task=task) as classifier:
            found.append((classifier.trained, classifier.labels))
    assert found == [
        (True, ("pool", "fence")),
        (True, ("fence", "pool")),
        (False, ("pool", "fence")),
        (False, ("pool", "fence")),
    ]
    turned = household.replace(labels=dict(reversed(household.labels.items())))
    with Classifier.open(house, task=turned) as classifier:
        assert classifier.trained
        assert classifier.labels == tuple(reversed(household.labels))


def test_a_model_of_qcats_answers_other_labels_untrained(house):
    with Classifier.open(house, task=task_of("yes or no")) as classifier:
        assert not classifier.trained
        assert classifier.calibration.temperature == 1
        assert classifier.ask("is it on?").label in ("yes", "no")
        with pytest.raises(ArgumentError, match="coverage expected for a task"):
            Classifier.open(house, task=task_of("yes or no"), coverage=0.9)
        with pytest.raises(ArgumentError, match="Task expected, not str"):
            Classifier.open(house, task="task.toml")


def test_ask_and_batch(qcat, foreign, house, tmp_path):
    path = foreign("qwen3", TEMPLATE)
    (tmp_path / "task.toml").write_text(task_of("sorts").to_toml(), "utf-8")
    done = qcat("ask", "-m", path, "-t", tmp_path / "task.toml", "pool?", "gate?")
    assert done.returncode == 0
    assert set(done.stdout.splitlines()) <= {*TASKS["sorts"]}
    assert "not trained on these labels" in done.stderr
    done = qcat("ask", "-m", house, "-l", "pool", "-l", "fence", "--threshold", "0", "pool?")
    assert done.stdout.strip() in ("pool", "fence")
    assert done.stderr == ""
    (tmp_path / "q.csv").write_text("text\npool?\ngate?\n")
    out = tmp_path / "out.jsonl"
    done = qcat("batch", tmp_path / "q.csv", "-o", out, "-m", path, "-l", "yes", "-l", "no")
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["label"] for line in out.read_text().splitlines()} <= {"yes", "no"}


def test_bad_tasks_and_models(qcat, foreign, house, tmp_path):
    path = foreign("qwen3")
    (tmp_path / "chat.toml").write_text(task_of("sorts").replace(style="chat").to_toml())
    long = Task("long", {f"label {n}": "words " * 300 for n in range(20)})
    (tmp_path / "long.toml").write_text(long.to_toml())
    kinds = {
        "embeds": {"qwen3.pooling_type": 3},
        "projects": {"general.type": "mmproj"},
        "parts": {"split.count": 3},
        "merged": {"split.count": 0},
        "stranger": {"general.architecture": "nobody"},
    }
    for name, change in kinds.items():
        (tmp_path / f"{name}.gguf").write_bytes(path.read_bytes())
        altered(tmp_path / f"{name}.gguf", change)
    looping = foreign(
        "qwen3", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    )
    yes_no = ("-l", "yes", "-l", "no")
    cases = [
        ((path,), "a GGUF without qcat metadata: make one"),
        ((path, "-l", "pool"), "labels: 1 given"),
        ((path, "-l", "pool", "-l", "pool"), "stands twice"),
        ((path, "-l", "pool", "-l", "Pool"), "keep one"),
        ((path, "-t", tmp_path / "none.toml"), "cannot read the task"),
        ((path, "-t", tmp_path / "chat.toml"), "has no chat template"),
        ((path, "-t", tmp_path / "long.toml"), "the model has room for"),
        ((looping, *yes_no), "takes more than 3 s"),
        ((tmp_path / "embeds.gguf", *yes_no), "is an embedding model"),
        ((tmp_path / "projects.gguf", *yes_no), "is a multimodal projector"),
        ((tmp_path / "parts.gguf", *yes_no), "is one of several parts"),
        ((tmp_path / "stranger.gguf", *yes_no), "unknown model architecture"),
        ((tmp_path / "none.gguf", *yes_no), "cannot be read"),
    ]  # fmt: skip
    for (model, *options), message in cases:
        done = qcat("ask", "-m", model, *options, "pool?")
        assert (done.returncode, done.stdout) == (1, ""), (message, done.stderr)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert qcat("ask", "-m", tmp_path / "merged.gguf", *yes_no, "pool?").returncode == 0
    for options in (
        ("-l", "yes", "-l", "no", "--review-default"),
        ("-l", "yes", "-t", "t.toml"),
        ("-m", "ollama:x", "-l", "yes"),
    ):
        assert qcat("ask", *options, "pool?").returncode == 2
    with pytest.raises(ArgumentError, match="a task expected for a file only"):
        Classifier.open("ollama:x", task=task_of("sorts"))


def altered(path, changes):
    """Put numbers and texts into a GGUF's metadata."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    arch = changes.get("general.architecture", fields["general.architecture"].contents())
    writer = GGUFWriter(path.with_suffix(".new"), arch)
    for key, field in fields.items():
        if key != "general.architecture" and key not in changes:
            kinds = field.types
            writer.add_key_value(
                key, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None
            )
    for key, value in changes.items():
        if isinstance(value, int):  # split.count has 16 bits
            (writer.add_uint16 if key == "split.count" else writer.add_uint32)(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path.with_suffix(".new"), path)


def test_a_file_on_which_llama_cpp_crashes_is_refused_in_a_line(foreign, tmp_path, monkeypatch):
    """What ends the process that tries it must not end this one."""
    from qcat.backends import trial

    path = foreign("qwen3")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -ABRT $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ModelError, match="crashes on it"):
        trial.try_model(path, "of a crash")
    monkeypatch.undo()
    trial.try_model(path, "of a crash")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("tried twice"))
    trial.try_model(path, "of a crash")
