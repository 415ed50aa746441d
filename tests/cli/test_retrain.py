"""`qcat retrain`: what is trained on, what is held back, and what a kill or a bad model leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcat.calibration.calibration import Calibration, Promise
from qcat.classifier import Classifier
from qcat.data.dataset import Example, read_examples
from qcat.data.near import near_texts
from qcat.data.split import Split, find_families, split_examples
from qcat.errors import DataError, ExportError, TrainError
from qcat.evaluation.results import Comparison, Flip
from qcat.gguf.bundle import Bundle
from qcat.gguf.header import read_header
from qcat.gguf.sections import CALIBRATION_KEY, SOURCE_KEY, section, write_sections
from qcat.task import Task
from qcat.training.retrain import Run, add_questions, refusal
from qcat.training.settings import Settings
from qcat.training.train import train
from qcat.workflows.promote import candidate_of, clear, previous_of, promote, reserved

# What to train on


def warnings_and_errors(stderr):
    """Lines of stderr, less those that say how training goes."""
    return [line for line in stderr.splitlines() if not line.startswith("epoch ")]


def example(text, label=0, group=None, line=1):
    return Example(text, label, line, group)


def add(old, added, seed=0):
    return add_questions(old, added, seed=seed, name="more.jsonl")


OLD = Split(
    train=[example("who fixed the pump", 0, "t"), example("is the gate shut", 1)],
    validation=[example("when did the boiler break", 0, "v")],
    test=[example("what does a new fence cost", 1, "x"), example("Straße frei", 1)],
    reviewed=[example("does the attic leak", 0, "r")],
)
WORDS = ("gutter", "lawn", "oven", "porch", "cable", "drain", "shelf", "tiles", "paint", "brick")


def strangers(count, label=0):
    """Questions that share no word with each other or with the old ones."""
    return [example(f"{WORDS[i]}{label}", label, None, i + 1) for i in range(count)]


@pytest.mark.parametrize(
    ("added", "fate"),
    [
        (example("a paraphrase", 0, "v"), "left_out"),
        (example("a paraphrase", 0, "x"), "left_out"),
        (example("a paraphrase", 0, "r"), "left_out"),
        (example("a paraphrase", 0, "t"), "joined"),
        (example("WHAT DOES A NEW FENCE COST", 0), "left_out"),
        (example("STRASSE FREI", 0), "left_out"),
        (example("what does the new fence cost?!", 1), "joined"),  # another word
        (example("what does a new fence cost?!", 1), "left_out"),
        (example("what does a new fence cost?!", 0), "joined"),  # differs in what matters
        (example("what does a new fence cost", 1), "known"),
        (example("Is the gate shut", 1), "known"),
        (example("is the gate shut", 0), "joined"),
    ],
)
def test_a_question_stays_where_its_family_is(added, fate):
    found = add(OLD, [example("entirely new"), added])
    assert added in getattr(found, fate)
    assert (found.split.validation, found.split.test) == (OLD.validation, OLD.test)


def test_a_family_is_left_out_whole():
    # The second row is known: it ties the first one to the test all the same.
    rows = [example("one", 1, "a"), example("what does a new fence cost", 1, "a")]
    found = add(OLD, [*rows, example("entirely new")])
    assert (found.left_out, found.known) == (rows[:1], rows[1:])


def test_a_new_label_replaces_the_old_one_in_training_only():
    trained, tested = example("is the gate shut", 0), example("what does a new fence cost", 0)
    found = add(OLD, [trained, tested])
    assert found.replaced == [OLD.train[1]]
    assert found.contradicting == [tested]
    assert found.split.train == [OLD.train[0], trained]
    assert found.split.test == OLD.test


def test_one_in_five_of_each_label_is_held_back():
    found = add(OLD, strangers(10, 0) + strangers(10, 1))
    assert sorted(e.label for e in found.held_back) == [0, 0, 1, 1]
    assert found.split.reviewed == OLD.reviewed + found.held_back
    assert found.split.train == OLD.train + found.joined
    assert add(OLD, strangers(4)).held_back == []
    drawn = {tuple(add(OLD, strangers(10), seed).held_back) for seed in range(10)}
    assert len(drawn) > 1
    assert drawn == {tuple(add(OLD, strangers(10), seed).held_back) for seed in range(10)}


def test_one_question_under_two_labels_is_refused():
    rows = [example("new", 0, line=3), example("New", 1, line=7)]
    with pytest.raises(DataError, match=r"more.jsonl:7: the question of line 3 under another"):
        add(OLD, rows)


@pytest.mark.parametrize("rows", [OLD.train, OLD.test, [example("q", 0, "x")]])
def test_nothing_new_is_refused(rows):
    with pytest.raises(DataError, match="can be trained on"):
        add(OLD, rows)


TEXT = st.lists(st.sampled_from(["pool", "POOL", "gate", "the", "old?", "é"]), min_size=1).map(
    " ".join
)
EXAMPLES = st.lists(
    st.builds(Example, TEXT, st.integers(0, 1), st.just(1), st.sampled_from([None, *"abcdefgh"])),
    min_size=1,
    max_size=15,
)


@st.composite
def splits(draw):
    """A split that keeps families on one side, as `qcat train` makes it."""
    examples = draw(EXAMPLES)
    parts = [[], [], [], []]
    side = draw(st.lists(st.integers(0, 3), min_size=len(examples), max_size=len(examples)))
    for row, family in zip(examples, find_families(examples), strict=True):
        parts[side[family]].append(row)
    return Split(*parts)


def tied(one, two):
    return one.text.casefold() == two.text.casefold() or (one.group and one.group == two.group)


def measuring(split):
    return [*split.validation, *split.test, *split.reviewed]


def try_add(old, added):
    try:
        return add(old, added)
    except DataError:
        return None


@given(splits(), EXAMPLES, EXAMPLES)
@settings(max_examples=40)
def test_what_measures_is_never_trained_on(old, added, more):
    found = try_add(old, added)
    assume(found)
    assert found == add(old, added)
    for later in (found, try_add(found.split, more), try_add(found.split, added + more)):
        if later is None:
            continue
        new = later.split
        assert (new.validation, new.test) == (old.validation, old.test)
        assert new.reviewed[: len(found.split.reviewed)] == found.split.reviewed
        assert not any(tied(a, b) for a in new.train for b in measuring(new))
    # every row has one fate, and none that nearly repeats a row that measures is trained on
    fates = (found.joined, found.held_back, found.left_out, found.known)
    assert sorted(map(repr, chain.from_iterable(fates))) == sorted(map(repr, added))
    others = [*measuring(old), *old.train]
    near = near_texts([e.text for e in added], [e.text for e in others])
    rows = [*added, *others]
    measures = {id(e) for e in (*measuring(old), *found.held_back)}
    joined = {id(e) for e in found.joined}
    for row, alike in zip(added, near, strict=True):
        if id(row) in joined:
            assert not any(id(rows[n]) in measures and rows[n].label == row.label for n in alike)


def test_near_texts_are_those_of_the_brute_force():
    texts = ["when was the pump fixed", "When was the pump fixed?", "is it hot", "was the pump hot"]
    assert near_texts(texts, []) == [[0, 1], [0, 1], [2], [3]]
    assert near_texts(texts[:1], texts[1:]) == [[0, 1]]
    assert near_texts([], texts) == []


# Whether the new model may serve


@pytest.mark.parametrize(
    ("fixed", "broken", "max_loss", "refused"),
    [
        (0, 0, 0, False),
        (3, 3, 0, False),
        (3, 4, 0, True),
        (0, 29, 0.29, False),
        (0, 30, 0.29, True),
    ],
)
def test_refusal(fixed, broken, max_loss, refused):
    flips = [Flip(1, "q", "a", "b", "a")] * fixed + [Flip(1, "q", "a", "a", "b")] * broken
    found = Comparison("old", None, tuple(flips), fixed, broken, 1.0, None)
    said = refusal("test", found, 100, max_loss)
    assert (said is not None) == refused
    if refused:
        assert f"{broken - fixed} more of 100 test questions wrong" in said


# Promotion


def bundles(folder, *, previous=False):
    """A bundle, its candidate and perhaps a previous one: all that promotion looks at."""
    bundle = folder / "house"
    names = {bundle: "old", candidate_of(bundle): "new"}
    if previous:
        names[previous_of(bundle)] = "older"
    for path, text in names.items():
        path.mkdir()
        (path / "a.gguf").write_text(text)
        (path / "b").write_text(text)
    return bundle


def holds(bundle):
    if not bundle.exists():
        return None
    texts = {path.read_text() for path in bundle.iterdir()}
    assert len(texts) == len(list(bundle.iterdir())) - 1 == 1  # whole
    return texts.pop()


@pytest.mark.parametrize("previous", [False, True])
def test_promotes_and_keeps_the_one_before(tmp_path, previous):
    bundle = bundles(tmp_path, previous=previous)
    with reserved(bundle) as cut_short:
        assert not cut_short
        promote(bundle)
    assert (holds(bundle), holds(previous_of(bundle))) == ("new", "old")
    assert sorted(os.listdir(tmp_path)) == ["house", "house.previous"]


KILLED = """
import os, signal, sys
from pathlib import Path
from qcat.workflows.promote import promote, reserved
left, rename = int(sys.argv[2]), os.rename
def counted(source, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(source, target)
os.rename = counted
with reserved(Path(sys.argv[1])):
    promote(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_at_any_rename_leaves_a_whole_bundle(tmp_path, renames):
    bundle = bundles(tmp_path, previous=True)
    done = subprocess.run([sys.executable, "-c", KILLED, bundle, str(renames)], check=False)
    if renames == 3:  # after the last one
        assert done.returncode == 0
        assert holds(bundle) == "new"
        return
    assert done.returncode == -signal.SIGKILL
    between = renames == 2
    assert holds(bundle) == (None if between else "old")
    assert holds(candidate_of(bundle)) == "new"
    if between:
        assert holds(previous_of(bundle)) == "old"
    with reserved(bundle) as cut_short:
        assert cut_short == between
        assert holds(bundle) == "old"
        promote(bundle)
    assert (holds(bundle), holds(previous_of(bundle))) == ("new", "old")
    assert sorted(os.listdir(tmp_path)) == ["house", "house.previous"]


def test_a_failed_rename_is_taken_back(tmp_path):
    bundle = bundles(tmp_path)
    shutil.rmtree(candidate_of(bundle))
    with reserved(bundle), pytest.raises(ExportError, match=r"house\.candidate: cannot be renamed"):
        promote(bundle)
    assert holds(bundle) == "old"
    assert sorted(os.listdir(tmp_path)) == ["house"]


def test_what_is_no_bundle_is_left_alone(tmp_path):
    bundle = bundles(tmp_path)
    previous_of(bundle).mkdir()
    (previous_of(bundle) / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match=r"house\.previous: is no bundle"), reserved(bundle):
        pass
    with pytest.raises(ExportError, match="is no bundle"):
        clear(previous_of(bundle))
    assert (previous_of(bundle) / "letter.txt").read_text() == "dear"


def test_two_at_once_are_kept_apart(tmp_path):
    bundle = bundles(tmp_path)
    with reserved(bundle), pytest.raises(ExportError, match="another retraining"), reserved(bundle):
        pass
    for name in ("/", "..", "."):
        with pytest.raises(ExportError, match="its own name"), reserved(Path(name)):
            pass


# The command, on a model that was really trained

PLACES = [
    *("on monday", "by tuesday", "next week", "last year", "in autumn", "under the stairs"),
    *("near the road", "for free", "once more", "after lunch", "on the left", "since easter"),
]


def rows(places=PLACES):
    """Questions as in the easy job, of other families: 16 a place."""
    words = {"pool": "water", "pool pump": "motor", "fence": "gate", "car": "tires"}
    return [
        {"text": f"{shape} the {word} {place}", "label": label, "group": f"{label}+{place}"}
        for label, word in words.items()
        for place in places
        for shape in ("who did", "when was it", "why is", "how much for")
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def train_easily(easy_job, target, epochs):
    """A run on the easy questions; two epochs are too few to learn much."""
    folder = easy_job[0]
    task = Task.read(folder / "task.toml")
    split = split_examples(read_examples(folder / "q.jsonl", task), task, seed=0)
    settings = Settings(base=str(folder / "base"), method="lora", epochs=epochs, rate=0.003)
    train(task, split, settings, target)
    return target


def bundle_of(run, target):
    """The run's bundle, in which some labels may have changed."""
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    found = Run.read(run)
    held_out = tuple(found.split.test)
    kind = {"quantization": "q8_0", "merges": 0}
    export(Request(found.task, target, run, held_out=held_out, max_flips=1, **kind))
    return target


@pytest.fixture(scope="module")
def learned(easy_job, tmp_path_factory):
    """A run that knows all its test questions."""
    return train_easily(easy_job, tmp_path_factory.mktemp("learned") / "run", 8)


@pytest.fixture(scope="module")
def exported(learned, tmp_path_factory):
    return bundle_of(learned, tmp_path_factory.mktemp("exported") / "house")


@pytest.fixture
def serving(exported, tmp_path):
    """The bundle of `learned`."""
    return shutil.copytree(exported, tmp_path / "house")


def start(*args):
    command = [Path(sys.executable).with_name("qcat"), *args]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def meanwhile(begins, do, *args):
    """Run the command; when it prints a line that begins so, do something."""
    with start(*args) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(begins):
                do()
        status, said = process.wait(), process.stderr.read()
    return subprocess.CompletedProcess(args, status, "".join(lines), said)


def calibrate(bundle, known):
    write_sections(bundle / "sorts.gguf", {CALIBRATION_KEY: known.to_dict()})


def threshold(bundle):
    return section(*found_in(bundle))["threshold"]


def found_in(bundle):
    path = bundle / "sorts.gguf"
    return read_header(path), CALIBRATION_KEY, path


def texts(path):
    return {json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_retrains_after_a_kill_compares_and_promotes(call, easy_job, tmp_path):
    run, out = train_easily(easy_job, tmp_path / "run", 2), tmp_path / "run-2"
    serving = bundle_of(run, tmp_path / "house")
    more = write(tmp_path / "more.jsonl", [*rows(), rows()[0]])
    calibrate(serving, Calibration().with_threshold(0.25))
    before = contents(serving)
    args = ("retrain", run, "--add", more, "-o", out, "--bundle", serving)
    process = start(*args)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (out / "checkpoint.pt").exists()
    assert not (out / "run.json").exists()
    assert contents(serving) == before

    # The line is printed before the training and after the bundle was read.
    set_anew = partial(calibrate, serving, Calibration().with_threshold(0.5))
    done = meanwhile("training questions: ", set_anew, *args)
    assert done.returncode == 0, done.stderr
    [warning] = warnings_and_errors(done.stderr)
    assert "warning: not calibrated: " in warning  # twenty validation questions are too few
    for name in ("test.jsonl", "validation.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes()
    asked_after, trained = texts(out / "reviewed.jsonl"), texts(out / "train.jsonl")
    assert len(asked_after) == 4 * len(PLACES) // 5 * 4
    assert trained == texts(run / "train.jsonl") | texts(more) - asked_after
    old = previous_of(serving)
    assert contents(old).keys() == before.keys()
    assert threshold(old) == 0.5
    assert not candidate_of(serving).exists()
    report = json.loads((serving / "report.json").read_text("utf-8"))
    assert (report["quantization"], report["max_flips"]) == ("q8_0", 1)
    assert report["vocabulary"]["merges"] == 0  # trimmed as the old one is
    assert report["proof"]["questions"] == len(texts(run / "test.jsonl"))
    assert f"{len(rows()) + 1} questions" in done.stdout
    assert f"reviewed: {len(asked_after)} questions" in done.stdout
    assert "McNemar" in done.stdout
    assert f"{serving}: now the bundle of {out}" in done.stdout
    assert "threshold 0.5000, as set by hand for the old bundle" in done.stdout
    assert threshold(serving) == 0.5
    right = {}
    for bundle in (old, serving):
        with Classifier.open(bundle / "sorts.gguf") as classifier:
            right[bundle] = [
                classifier.ask(row["text"]).label == row["label"]
                for row in map(json.loads, (out / "reviewed.jsonl").read_text().splitlines())
            ]
    fixed = sum(new > old for old, new in zip(*right.values(), strict=True))
    broken = sum(new < old for old, new in zip(*right.values(), strict=True))
    assert fixed > broken
    assert f"{fixed} for better, {broken} for worse" in done.stdout

    promoted = contents(serving)
    again = call(*args)
    assert again.returncode == 0
    assert f"{serving}: is the bundle of {out} already" in again.stdout
    third = ("-o", tmp_path / "run-3", "--bundle", serving)
    known = call("retrain", out, "--add", more, *third)
    assert known.returncode == 1
    assert f"questions can be trained on ({len(rows()) + 1} known" in known.stderr
    behind = call("retrain", run, "--add", more, *third)
    assert behind.returncode == 1
    assert f"not made of {run} as it is now but of a run named run-2: begin" in behind.stderr
    assert not (tmp_path / "run-3").exists()
    assert contents(serving) == promoted


def test_a_worse_model_is_not_promoted(call, learned, serving, tmp_path):
    run, out = shutil.copytree(learned, tmp_path / "run"), tmp_path / "run-2"
    record = json.loads((run / "run.json").read_text("utf-8"))
    record["settings"]["epochs"] = 1  # enough to be worse
    (run / "run.json").write_text(json.dumps(record))
    labels = ["pool", "pool pump", "fence", "car"]
    wrong = [
        {**row, "label": labels[labels.index(row["label"]) - 1]}
        for row in map(json.loads, (run / "train.jsonl").read_text("utf-8").splitlines())
    ]
    more = write(tmp_path / "more.jsonl", wrong)
    promise = Promise(0.01, 0.95, questions=500, answered=400, errors=0)  # of 20 none is possible
    calibrate(serving, replace(Calibration(), threshold=0.5, promise=promise))
    before = contents(serving)
    args = ("retrain", run, "--add", more, "-o", out, "--bundle", serving)
    done = call(*args)
    assert done.returncode == 5
    found = [line.split(":")[1] for line in warnings_and_errors(done.stderr)]
    assert found == [" warning", " error"]
    assert "test questions wrong" in done.stderr
    assert "no threshold that keeps the old one's promise (an error of at most" in done.stderr
    gguf = serving / "sorts.gguf"
    assert done.stderr.endswith(
        f"or set another promise with `qcat calibrate {gguf} QUESTIONS --max-error SHARE` and "
        "rerun the command with a higher --max-loss\n"
    )
    assert "larger --max-error" not in done.stderr
    assert f"training questions that take the added label: {len(wrong)}; they had" in done.stdout
    assert "reviewed: no questions held back yet" in done.stdout
    assert contents(serving) == before
    assert (out / "run.json").exists()
    candidate = contents(candidate_of(serving))
    Bundle.read(candidate_of(serving) / "sorts.gguf")
    assert not previous_of(serving).exists()

    calibrate(serving, Calibration().with_threshold(0.5))
    os.rename(serving, previous_of(serving))  # as if killed between the two renames
    # The line is printed after the threshold is carried and before the models are asked.
    set_anew = partial(calibrate, serving, Calibration())
    anyway = meanwhile("threshold 0.5000", set_anew, *args, "--max-loss", "1")
    assert anyway.returncode == 1
    assert f"{serving}: was changed while it was compared: rerun" in anyway.stderr
    assert f"{serving}: a promotion was cut short" in anyway.stdout
    assert "trained already" in anyway.stdout
    assert "exported already" in anyway.stdout
    before = contents(serving)

    anyway = call(*args, "--max-loss", "1")
    assert anyway.returncode == 0, anyway.stderr
    assert threshold(serving) is None  # the candidate's was 0.5
    assert contents(previous_of(serving)) == before
    assert {**contents(serving), "sorts.gguf": None} == {**candidate, "sorts.gguf": None}


# Bad input


@pytest.fixture
def unfinished(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "plan.json").write_text("{}")
    return tmp_path / "unfinished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "no-such"}, "no-such: no such folder: name one that `qcat train` made"),
        ({"run": "unfinished"}, "its training is unfinished"),
        ({"run": "house"}, "holds no run.json"),
        ({"--bundle": "no-bundle"}, "0 GGUF files there"),
        ({"--bundle": "other"}, "its task is not that of"),
        ({"--bundle": "later"}, "was not made of run as it is now but of a run named house-2: "),
        ({"--bundle": "damaged"}, "damaged/sorts.gguf: metadata qcat.calibration is of another"),
        ({"--bundle": "."}, "name the bundle's folder by its own name"),
        ({"--add": "no.jsonl"}, "no.jsonl: cannot be read"),
        ({"--add": "empty.jsonl"}, "empty.jsonl: no questions"),
        ({"--add": "unknown.jsonl"}, "unknown.jsonl:1: label 'boat' is not in the task"),
        ({"-o": "run"}, "holds a finished run"),
        ({"--max-loss": "2"}, "--max-loss"),
    ],
)
def test_bad_input_changes_nothing(
    call, learned, serving, house, unfinished, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(learned)
    (tmp_path / "other").symlink_to(house.parent)
    sections = {
        "later": {SOURCE_KEY: {"fingerprint": "0" * 64, "adapter": "house-2"}},
        "damaged": {CALIBRATION_KEY: {"version": 99}},
    }
    for name, data in sections.items():
        write_sections(shutil.copytree(serving, tmp_path / name) / "sorts.gguf", data)
    write(tmp_path / "more.jsonl", rows())
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "unknown.jsonl", [{"text": "a", "label": "boat"}])
    wanted = {"--add": "more.jsonl", "-o": "run-2", "--bundle": "house"} | change
    before = contents(serving)
    listed = sorted(os.listdir(tmp_path))
    run = wanted.pop("run", "run")
    done = call("retrain", run, *(word for pair in wanted.items() for word in pair))
    assert done.returncode == (2 if "--max-loss" in change else 1)
    assert message in done.stderr
    assert "unexpected" not in done.stderr
    assert contents(serving) == before
    assert sorted(os.listdir(tmp_path)) == listed


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {"base": "b", "what": 1}}'])
def test_a_damaged_run_is_named(learned, tmp_path, text):
    shutil.copytree(learned, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(TrainError, match="not what `qcat train` writes"):
        Run.read(tmp_path / "run")


def test_a_run_is_read_as_it_was_trained(learned, easy_job, tmp_path):
    found = Run.read(learned)
    assert found.settings.base == str(easy_job[0] / "base")
    assert found.settings.epochs == 8
    found.split.write(tmp_path, found.task)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (learned / name).read_bytes()
    assert found.is_in(learned)
    assert not found.is_in(tmp_path)
