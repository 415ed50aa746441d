"""`qcat init` and `qcat build`: from labelled questions to a task, and to a proven model."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat.data.dataset import read_examples
from qcat.errors import DataError, TaskError
from qcat.task import Task
from qcat.workflows.init import find_task, init_task, task_name, write_task


def write(path, labels):
    rows = [{"text": f"question {n}", "label": label} for n, label in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


# init


@given(st.text(max_size=80))
def test_any_file_name_gives_a_usable_name(stem):
    from pathlib import Path

    assert Task(task_name(Path("folder") / (stem + ".csv")), {"a": "", "b": ""})


@given(st.lists(st.sampled_from(["pool", "Pool", "car", "fence", "water heater"]), min_size=1))
def test_labels_stand_in_order_of_frequency(tmp_path_factory, labels):
    path = write(tmp_path_factory.mktemp("init") / "q.jsonl", labels)
    folded = Counter(label.lower() for label in labels)
    if len(folded) < 2:
        with pytest.raises(TaskError, match="labels: 1 given"):
            init_task(path)
        return
    made = init_task(path)
    assert {label.lower(): count for label, count in made.counts.items()} == folded
    assert list(made.counts) == list(made.task.labels)
    assert list(made.counts.values()) == sorted(made.counts.values(), reverse=True)
    spelled = Counter(labels)
    for other, label in made.respelled.items():
        assert other.lower() == label.lower()
        assert spelled[other] <= spelled[label]
    assert len(read_examples(path, made.task)) == len(labels)


def test_init_through_the_command(qcat, tmp_path):
    questions = write(tmp_path / "Our House.jsonl", ["pool"] * 3 + ["pool pump"] * 4 + ["Pool"])
    done = qcat("init", questions)
    assert done.returncode == 0, done.stderr
    assert "label 'Pool' is read as 'pool'" in done.stderr
    assert "'pool' begins 'pool pump'" in done.stdout  # what lint says of names
    task = Task.read(tmp_path / "task.toml")
    assert (task.name, list(task.labels)) == ("our-house", ["pool", "pool pump"])
    again = qcat("init", questions)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "task.toml: exists already" in again.stderr
    assert qcat("init", questions, "-o", tmp_path / "b.toml", "--name", "x").returncode == 0
    assert Task.read(tmp_path / "b.toml").name == "x"


def test_init_warns_of_labels_that_may_be_none(qcat, tmp_path):
    labels = ["pool", "NA", "\\N", "nan", "None", "nano"]
    done = qcat("init", write(tmp_path / "q.jsonl", labels))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "[label-missing]" in line]
    assert len(said) == 4
    assert "warning: label 'NA' may stand for none: leave out its rows, or rename it" in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("none.jsonl", None, "cannot be read"),
        ("empty.jsonl", "", "no questions"),
        ("one.jsonl", '{"text": "a", "label": "b"}', "labels: 1 given"),
        ("bad.jsonl", '{"text": "a"}', "no key 'label': there are 'text'"),
        ("odd.jsonl", '{"text": "a", "label": "b\\u0000"}\n{"text": "a", "label": "c"}', "control"),
    ],
)
def test_init_of_what_is_no_task_is_one_line(qcat, tmp_path, name, text, problem):
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8")
    done = qcat("init", tmp_path / name)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert problem in done.stderr
    assert not (tmp_path / "task.toml").exists()


def test_a_task_beside_the_questions_is_found(tmp_path, household):
    questions = tmp_path / "q.csv"
    with pytest.raises(TaskError, match="qcat init"):
        find_task(questions, None)
    write_task(household, tmp_path / "task.toml")
    assert find_task(questions, None) == tmp_path / "task.toml"
    assert find_task(questions, tmp_path / "x") == tmp_path / "x"
    with pytest.raises(DataError, match="exists already"):
        write_task(household, tmp_path / "task.toml")


# build


@pytest.fixture(scope="module")
def questions(easy_job, tmp_path_factory):
    """The easy questions, three times as many, in a folder without a task."""
    rows = [json.loads(line) for line in (easy_job[0] / "q.jsonl").read_text("utf-8").splitlines()]
    more = [
        {**row, "text": f"{word} {row['text']}", "group": f"{word} {row['group']}"}
        for word in ("", "and", "so")
        for row in rows
    ]
    path = tmp_path_factory.mktemp("build") / "sorts.jsonl"
    path.write_text("\n".join(map(json.dumps, more)), "utf-8")
    return path


@pytest.fixture
def build(call, easy_job, questions):
    options = ("--base", easy_job[0] / "base", "--method", "lora", "--learning-rate", "0.003")

    def run(output, *more):
        return call("build", questions, "-o", output, *options, "--epochs", 4, *more)

    return run


def test_build_makes_all_and_keeps_each_step(build, call, tmp_path):
    house = tmp_path / "house"
    done = build(house, "--max-flips", 1, "--max-error", 0.5)
    assert done.returncode == 0, done.stderr
    steps = [line.split(":")[0] for line in done.stderr.splitlines()]
    for step in ("task", "lint", "training", "export", "calibrate", "evaluate"):
        assert step in steps
    assert "accuracy" in done.stdout
    assert "tfidf" in done.stdout.lower() or "TF-IDF" in done.stdout
    assert {"house.gguf", "Modelfile", "MODEL_CARD.md"} <= {path.name for path in house.iterdir()}
    task = Task.read(tmp_path / "house.build" / "task.toml")
    assert set(task.labels) == {"pool", "pool pump", "fence", "car"}
    assert call("ask", "-m", house, "--threshold", 0, "who did the motor here").stdout in {
        f"{label}\n" for label in task.labels
    }

    before = (house / "house.gguf").read_bytes()
    again = build(house, "--max-flips", 1, "--max-error", 0.5, "--json")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(": kept, ") == 3
    assert (house / "house.gguf").read_bytes() == before
    summary = json.loads(again.stdout)
    assert summary["labels"] == 4
    assert 0 <= summary["accuracy"]["value"] <= 1

    (tmp_path / "house.build" / "evaluation.json").unlink()  # as if killed before the last step
    resumed = build(house, "--max-flips", 1, "--max-error", 0.5, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count(": kept, ") == 2
    assert json.loads(resumed.stdout)["accuracy"] == summary["accuracy"]

    other = build(house, "--max-flips", 0.9, "--max-error", 0.5)
    assert other.returncode == 2
    assert "other options" in other.stderr


def test_build_stops_at_what_lint_finds(call, easy_job, tmp_path):
    rows = (easy_job[0] / "q.jsonl").read_text("utf-8").splitlines()
    clash = json.dumps({"text": json.loads(rows[0])["text"], "label": "car"})
    (tmp_path / "q.jsonl").write_text("\n".join([*rows, clash]), "utf-8")
    done = call("build", tmp_path / "q.jsonl", "-o", tmp_path / "out", "--base", "none")
    assert done.returncode == 1
    assert "stands under" in done.stdout
    assert "1 errors" in done.stderr
    assert not (tmp_path / "out").exists()


def test_build_into_a_folder_that_is_there(call, questions, tmp_path):
    (tmp_path / "out").mkdir()
    done = call("build", questions, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "exists already" in done.stderr


def test_build_can_be_rerun_after_what_it_refused(build, call, questions, easy_job, tmp_path):
    """What its messages advise has to work, and no finished step may be lost for it."""
    house = tmp_path / "house"
    impossible = call("build", questions, "-o", house, "--quant", "q8_0")
    assert impossible.returncode == 1  # by the default method, before anything else is done
    assert "trained in q4_0" in impossible.stderr
    options = ("--max-flips", 1, "--quant", "q8_0")
    hopeless = build(house, *options, "--max-error", 1e-6)
    assert hopeless.returncode == 1
    assert "1 errors" not in hopeless.stderr
    done = build(house, *options)
    assert done.returncode == 0, done.stderr
    assert "training: kept" in done.stderr
    assert "export: kept" in done.stderr
    first = (house / "house.gguf").read_bytes()

    for path in house.iterdir():
        path.unlink()
    house.rmdir()
    again = build(house, *options, "--max-error", 0.5)
    assert again.returncode == 0, again.stderr
    assert "training: kept" in again.stderr
    assert "evaluation: kept" not in again.stderr  # it was of the bundle that is gone
    assert "calibrate: " in again.stderr
    assert (house / "house.gguf").read_bytes() != first  # it has a threshold now


def test_build_after_mending(call, easy_job, tmp_path):
    rows = (easy_job[0] / "q.jsonl").read_text("utf-8").splitlines()
    clash = json.dumps({"text": json.loads(rows[0])["text"], "label": "typo"})
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join([*rows, clash]), "utf-8")
    args = ("build", path, "-o", tmp_path / "out", "--base", tmp_path / "none")
    assert call(*args).returncode == 1
    assert not (tmp_path / "out.build").exists()
    path.write_text("\n".join(rows), "utf-8")
    done = call(*args)
    assert "other questions" not in done.stderr
    assert "4 labels" in done.stderr  # and none of the typo
    assert done.returncode == 1  # there is no such base


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_build_needs_a_name(call, questions, output):
    done = call("build", questions, "-o", output)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "name the folder to make" in done.stderr


def test_a_folder_is_no_file_of_questions(call, tmp_path):
    for args in (("train", ".", "-o", tmp_path / "run"), ("build", ".", "-o", tmp_path / "x")):
        done = call(*args)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "no file of questions" in done.stderr
    assert not list(tmp_path.iterdir())
