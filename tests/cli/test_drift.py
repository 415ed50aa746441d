"""The prediction log and `qcat drift`, on what the shipped model answers and against SciPy."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions import prediction
from scipy.stats import PermutationMethod, binom, chi2_contingency, fisher_exact, ks_2samp
from slips import slipped

from qcat import Classifier
from qcat.calibration.calibration import Calibration
from qcat.classifier import DEFAULT_MODEL
from qcat.cli import run
from qcat.data.dataset import read_examples, read_texts
from qcat.data.split import find_families, split_examples
from qcat.errors import DataError, RecordError
from qcat.gguf.bundle import identity
from qcat.gguf.header import read_header
from qcat.gguf.sections import CALIBRATION_KEY, REFERENCE_KEY, REPORT_KEY, section, write_sections
from qcat.monitor.drift import (
    FEWEST,
    LEVEL,
    MOST,
    SAMPLE,
    Accuracy,
    Reference,
    compare,
    history,
    psi,
)
from qcat.monitor.log import PredictionLog, Record, read_log, scan_log
from qcat.monitor.recorder import Recorder
from qcat.report.figures import drift_png
from qcat.task import MAX_LABELS

THRESHOLD = 0.5
RULE = f"threshold {THRESHOLD}"
WINDOW = 500


def written(path, answers, *, model="m", rule="r", text=False):
    """A log of (question, prediction) pairs."""
    with PredictionLog(path, model=model, rule=rule, text=text) as log:
        for question, answer in answers:
            log.add(question, answer)
    return path


def summed(answers, rule=RULE):
    return Reference.of(answers, rule=rule)


def judged(reference, window, **more):
    return compare(summed(reference), summed(window), **more)


def signal(drift, name):
    return next(s for s in drift.signals if s.name == name)


# The log


def test_a_record_has_all_but_the_question(tmp_path):
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    answer = prediction("hot tub ß", 0.25, 0.5, "ambiguous")
    path = written(tmp_path / "log", [("who?", answer)], model="house-1", rule="threshold 0.3")
    [record] = read_log(path).records
    assert before <= record.time <= datetime.now(UTC)
    assert record == Record(
        record.time,
        "house-1",
        "threshold 0.3",
        "hot tub ß",
        0.25,
        0.5,
        True,
        "ambiguous",
        0.0,
        None,
    )
    assert b"who?" not in path.read_bytes()
    assert "hot tub ß" in path.read_text("utf-8")
    assert path.stat().st_mode & 0o777 == 0o600


shares = st.none() | st.floats(0, 1)


@given(st.lists(st.tuples(st.text(), st.text(), shares, shares), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("log") / "log"
    answers = [(question, prediction(*rest)) for question, *rest in rows]
    written(path, answers, text=True)
    assert path.read_bytes().count(b"\n") == len(rows)
    found = read_log(path)
    assert found.skipped == 0
    seen = [(r.text, r.label, r.confidence, r.label_mass) for r in found.records]
    clean = [tuple(map(printable, row)) for row in rows]
    assert seen == clean


def printable(value):
    """Text as it can be encoded: a lone surrogate becomes a question mark."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def line(**changed):
    fields = {
        "v": 1, "time": "2026-01-01T00:00:00.000+00:00", "model": "m", "rule": "r",
        "label": "pool", "confidence": 0.5, "label_mass": 0.5, "abstained": False,
        "reason": None, "on_topic": None,
    }  # fmt: skip
    return json.dumps(fields | changed).encode()


@settings(max_examples=100)
@given(st.data())
def test_a_torn_or_foreign_line_spoils_no_other(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "log"
    foreign = st.binary(max_size=60) | st.builds(lambda at: line()[:at], st.integers(0, 150))
    end = st.sampled_from([b"\n", b""])
    parts = data.draw(st.lists(st.tuples(foreign, end), max_size=6))
    good = [line(label=str(number)) for number in range(len(parts) + 1)]
    text = good[0] + b"\n"
    for (junk, ending), record in zip(parts, good[1:], strict=True):
        text += junk + ending + record + b"\n"
    path.write_bytes(text)
    found = read_log(path)
    assert [record.label for record in found.records] == [str(n) for n in range(len(good))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(st.sampled_from(list(json.loads(line()))), json_values)
def test_a_hostile_field_is_skipped_or_sane(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(line(**{key: value}))
    for record in scan_log(path):
        if record is not None:
            assert isinstance(record.label, str)
            assert isinstance(record.model, str)
            assert record.time.tzinfo is UTC
            assert isinstance(record.rule, str)
            assert record.on_topic is None or math.isfinite(record.on_topic)
            for share in (record.confidence, record.label_mass):
                assert share is None or 0 <= share <= 1


@pytest.mark.parametrize(
    "row",
    [
        line(time="2026-01-01"),
        line(time="9999-12-31T23:59:59-14:00"),
        line(time="0001-01-01T00:00:00+00:00"),
        line(confidence=10**400),
        line(confidence=float("nan")),
        line(confidence=True),
        line(abstained=0),
        line(reason=0),
        b'{"v": 1, ' + b"[" * 100_000,
        b'{"v": 1, "time": ' + b"9" * 5000 + b"}",
        b'{"v": 2, "time": 1}',
        b"\xff\xfe",
    ],
    ids=range(12),
)
def test_no_records(tmp_path, row):
    (tmp_path / "log").write_bytes(row + b"\n")
    found = read_log(tmp_path / "log")
    assert (found.records, found.skipped) == ([], 1)


def test_a_huge_foreign_line_is_read_in_pieces(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * (5 << 20) + b"\n" + line())
    found = read_log(tmp_path / "log")
    assert (len(found.records), found.skipped) == (1, 5)


def test_a_stretch_of_a_log(tmp_path):
    path = tmp_path / "log"
    rows = [
        line(time=f"2026-01-0{day}T00:00:00+00:00", model=model)
        for day, model in enumerate("ababbb", 1)
    ]
    path.write_bytes(b"\n".join(rows))

    def days(**more):
        found = read_log(path, **more)
        return [record.time.day for record in found.records], found.others

    assert days() == ([1, 2, 3, 4, 5, 6], 0)
    assert days(model="b") == ([2, 4, 5, 6], 2)
    assert days(model="b", last=2) == ([5, 6], 2)
    assert days(since=datetime(2026, 1, 5, tzinfo=UTC)) == ([5, 6], 0)


def test_a_record_after_a_torn_line_has_a_line_of_its_own(tmp_path):
    path = written(tmp_path / "log", [("q", prediction("one")), ("q", prediction("torn"))])
    os.truncate(path, path.stat().st_size - 20)
    with PredictionLog(path, model="m", rule="r") as log:
        log.add("q", prediction("two"))
        log.add("q", prediction("three"))
        os.truncate(path, path.stat().st_size - 20)  # another writer, killed while this one is open
        log.add("q", prediction("four"))
    lines = path.read_text("utf-8").split("\n")
    assert lines.pop() == ""
    found = ["one", None, "two", None, "four"]
    assert len(lines) == len(found)
    for text, label in zip(lines, found, strict=True):
        if label:
            assert json.loads(text)["label"] == label
    assert read_log(path).skipped == 2


def test_a_log_that_may_not_be_read_is_written(unprivileged_folder):
    path = unprivileged_folder / "log"
    path.touch()
    path.chmod(0o200)
    written(path, [("q", prediction("one")), ("q", prediction("two"))])
    path.chmod(0o600)
    assert [r.label for r in read_log(path).records] == ["one", "two"]


def test_follows_a_renamed_and_a_deleted_file(tmp_path):
    path = tmp_path / "log"
    with PredictionLog(path, model="m", rule="r") as log:
        log.add("q", prediction("one"))
        path.rename(tmp_path / "log.1")
        log.add("q", prediction("two"))
        path.unlink()
        log.add("q", prediction("three"))
    assert [r.label for r in read_log(tmp_path / "log.1").records] == ["one"]
    assert [r.label for r in read_log(path).records] == ["three"]


def test_a_record_cut_by_a_full_disk_is_told_and_spoils_no_other(tmp_path):
    """A file size limit stands for the full disk: the kernel takes what fits."""
    code = (
        "import resource, sys\n"
        "from predictions import prediction\n"
        "from qcat.errors import DataError\n"
        "from qcat.monitor.log import PredictionLog\n"
        "log = PredictionLog(sys.argv[1], model='m', rule='r')\n"
        "most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "log.add('q', prediction('before'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, most))\n"
        "for _ in range(2):\n"
        "    try: log.add('q', prediction('lost'))\n"
        "    except DataError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "log.add('q', prediction('after'))\n"
    )
    path = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == [
        f"{path}: the answer is not in the log: no room left",
        f"{path}: the answer is not in the log: File too large",
    ], done.stderr
    found = read_log(path)
    assert ([record.label for record in found.records], found.skipped) == (["before", "after"], 1)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "no" / "log", tmp_path / "pipe", "a\0b", "\udc80\ud800"):
        with pytest.raises(DataError):
            PredictionLog(bad, model="m", rule="r")
    with PredictionLog("/dev/full", model="m", rule="r") as log, pytest.raises(DataError):
        log.add("q", prediction())
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot be read"):
            read_log(bad)


def test_a_recorder_logs_and_says_if_it_cannot(house, tmp_path):
    path = tmp_path / "log"
    questions = ["the fence?", "the car?"]
    with (
        Classifier.open(house, threshold=0.2) as classifier,
        Recorder.open(classifier, log=path, log_text=True) as recorder,
    ):
        first = classifier.ask("the pool?")
        recorder.add("the pool?", first)
        path.unlink()
        path.mkdir()
        with pytest.raises(RecordError, match="not in the log: Is a directory"):
            recorder.add("the pool?", first)
        path.rmdir()
        recorder.add("again?", first)
        many = list(classifier.ask_many(questions))
        for question, prediction in zip(questions, many, strict=True):
            recorder.add(question, prediction)
    again, *records = read_log(path).records
    assert again.text == "again?"
    assert [(r.text, r.label) for r in records] == list(
        zip(questions, [p.label for p in many], strict=True)
    )
    assert {(r.rule, r.model) for r in records} == {("threshold 0.2", classifier.identity)}


def test_identity_is_of_what_answers(house, tmp_path):
    model = tmp_path / "m.gguf"
    shutil.copy(house, model)

    def name():
        return identity(read_header(model).metadata)

    first = name()
    assert first.startswith("household-")
    write_sections(model, {REFERENCE_KEY: {"a": 1}})
    assert name() == first
    write_sections(model, {REPORT_KEY: {"another": "training"}})
    assert name() != first


# The statistics


def test_the_tests_are_scipys():
    rng = np.random.default_rng(0)

    def answers(count, p, low):
        labels = rng.choice(["a", "b", "c"], count, p=p)
        values = np.round(rng.uniform(low, 1, (count, 2)), 3)
        return [
            prediction(str(label), float(c), float(m), "low_confidence" if c < THRESHOLD else None)
            for label, (c, m) in zip(labels, values, strict=True)
        ]

    before, now = answers(400, [0.5, 0.3, 0.2], 0.3), answers(300, [0.35, 0.3, 0.35], 0.4)
    found = compare(
        Reference.of(before, rule=RULE, truth=["a"] * 400),
        Reference.of(now, rule=RULE),
        accuracy=Accuracy(60, 200),
    )
    assert [s.name for s in found.signals] == [
        "label mix", "confidence", "label mass", "share abstained", "accuracy",
    ]  # fmt: skip
    counts = [[sum(p.label == label for p in side) for label in "abc"] for side in (before, now)]
    mix = signal(found, "label mix")
    assert mix.p_value == pytest.approx(5 * chi2_contingency(counts).pvalue)
    first, second = (np.add(row, 0.5) / np.add(row, 0.5).sum() for row in counts)
    assert mix.psi == mix.change == pytest.approx(((second - first) * np.log(second / first)).sum())
    for name, value in (("confidence", "confidence"), ("label mass", "label_mass")):
        a, b = ([getattr(p, value) for p in side] for side in (before, now))
        test = ks_2samp(a, b, method="asymp")
        row = signal(found, name)
        assert row.change == pytest.approx(test.statistic)
        assert row.p_value == pytest.approx(min(1, 5 * test.pvalue))
        assert row.reference == pytest.approx(np.mean(a))
        tenths = np.unique(np.quantile(a, np.arange(1, 10) / 10))
        binned = [np.histogram(side, [-1, *np.nextafter(tenths, 2), 2])[0] for side in (a, b)]
        assert row.psi == pytest.approx(psi(*binned))
    a, b = (sum(p.abstained for p in side) for side in (before, now))
    row = signal(found, "share abstained")
    expected = fisher_exact([[a, 400 - a], [b, 300 - b]]).pvalue
    assert row.p_value == pytest.approx(min(1, 5 * expected))
    assert row.change == pytest.approx(b / 300 - a / 400)
    right = counts[0][0]
    row = signal(found, "accuracy")
    expected = fisher_exact([[right, 400 - right], [60, 140]], alternative="greater").pvalue
    assert row.p_value == pytest.approx(min(1, 5 * expected))
    assert row.drifted


def test_psi_of_known_shares():
    assert psi([30, 70], [30, 70]) == 0
    # Half counts hardly matter here: (0.8 - 0.5) ln(0.8/0.5) + (0.2 - 0.5) ln(0.2/0.5)
    assert psi([5e6, 5e6], [8e6, 2e6]) == pytest.approx(0.4159, abs=1e-4)
    assert 0 < psi([100, 0], [99, 1]) < 0.02


def test_many_rare_labels_are_tested_by_resampling():
    """150 labels in windows of 100: chi-square's own p-value is too small too often."""
    names = range(150)
    rng = random.Random(0)
    skewed = [1 / (number + 1) ** 2 for number in names]
    sides = [rng.choices(names, skewed, k=count) for count in (1000, 100)]
    table = np.array([np.bincount(side, minlength=150) for side in sides])
    table = table[:, table.any(0)]
    rows = [[prediction(str(x), None, None) for x in side] for side in sides]
    p_value = signal(judged(*rows), "label mix").p_value / 2  # of two signals
    draws = PermutationMethod(2000, rng=np.random.default_rng(1))
    exact = chi2_contingency(table, correction=False, method=draws).pvalue
    assert p_value == pytest.approx(exact, abs=0.01)
    assert p_value != pytest.approx(chi2_contingency(table).pvalue, abs=0.01)
    one = [prediction("0")] * 50 + [prediction(str(x)) for x in rng.choices(names, k=50)]
    all_over = [prediction(str(x)) for x in rng.choices(names, k=100)]
    assert signal(judged(all_over, one), "label mix").drifted


def test_a_huge_window_does_not_alarm_on_nothing():
    def answers(count, share):
        first = round(count * share)
        return [*[prediction("a")] * first, *[prediction("b")] * (count - first)]

    found = judged(answers(100_000, 0.50), answers(100_000, 0.52))
    assert signal(found, "label mix").p_value < 1e-10
    assert found.drifted == ()


def test_one_label_alone_is_no_drift():
    answers = [prediction("a", None, None)] * FEWEST
    found = judged(answers, answers)
    assert [(s.name, s.p_value) for s in found.signals] == [
        ("label mix", 1.0),
        ("share abstained", 1.0),
    ]


def test_only_what_both_sides_have_is_compared():
    answers = [prediction()] * 200
    bare = [prediction(confidence=None, label_mass=None)] * 200
    assert [s.name for s in judged(answers, bare).signals] == ["label mix", "share abstained"]
    other = compare(summed(answers), summed(answers, rule="other"))
    assert [s.name for s in other.signals] == ["label mix", "confidence", "label mass"]
    unknown = compare(summed(answers), summed(answers), accuracy=Accuracy(1, 100))
    assert "accuracy" not in [s.name for s in unknown.signals]


def test_accuracy_alarms_when_it_falls_only():
    quiet = replace(summed([prediction()] * 400), right=320)

    def drifted(right):
        found = compare(quiet, quiet, accuracy=Accuracy(right, 400))
        return [s.name for s in found.drifted]

    assert drifted(240) == ["accuracy"]
    assert drifted(318) == drifted(400) == []


def test_too_few_to_tell():
    few, many = [prediction("a")] * (FEWEST - 1), [prediction("b")] * 1000
    for sides in ((few, many), (many, few), ([], many), (few, [])):
        found = judged(*sides)
        assert not found.enough
        assert found.signals == found.drifted == ()


def test_a_reference_keeps_an_even_sample():
    values = [number / 10_000 for number in range(10_001)]
    found = summed([prediction(confidence=value) for value in reversed(values)])
    assert len(found.confidence) == SAMPLE
    assert list(found.confidence) == sorted(found.confidence)
    assert (found.confidence[0], found.confidence[-1]) == (0, 1)
    assert np.abs(np.array(found.confidence) - np.linspace(0, 1, SAMPLE)).max() < 0.001


def test_one_of_each_family_is_kept():
    """Three paraphrases an answer say no more than one of them."""
    answers = [prediction(f"{n % 7}", n / 200, 1 - n / 200, None) for n in range(200)]
    truth = [answer.label if n % 3 else "other" for n, answer in enumerate(answers)]
    mixed = random.Random(0).sample(range(600), 600)
    found = Reference.of(
        [answers[n % 200] for n in mixed],
        rule=RULE,
        truth=[truth[n % 200] for n in mixed],
        groups=[n % 200 for n in mixed],
    )
    assert found == Reference.of(answers, rule=RULE, truth=truth)
    assert 0 < found.right < found.questions == 200
    # Which one is drawn, always alike: neither the first nor the last of each.
    pairs = [prediction(str(n % 2)) for n in range(400)]
    families = [n // 2 for n in range(400)]
    found = Reference.of(pairs, rule=RULE, groups=families)
    assert 70 < found.labels["0"] < 130
    assert found == Reference.of(pairs, rule=RULE, groups=families)
    with pytest.raises(ValueError, match="a group for each answer"):
        Reference.of(pairs, rule=RULE, groups=families[1:])


answer_lists = st.lists(
    st.builds(prediction, st.text(max_size=3), shares, shares, st.sampled_from([None, "ambiguous"]))
)


@given(answer_lists, st.none() | st.text())
def test_a_reference_survives_json(answers, rule):
    truth = [answer.label for answer in answers]
    found = Reference.of(answers, ["pool"], rule=rule, truth=truth)
    assert found.right == found.questions == len(answers)
    assert found.labels == {"pool": 0, **Counter(truth)}
    assert Reference.from_dict(json.loads(json.dumps(found.to_dict()))) == found


GOOD = summed([prediction("a", 0.5, 0.5)] * 3 + [prediction("b")]).to_dict()


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*GOOD]), json_values), st.sets(st.sampled_from([*GOOD])))
def test_a_hostile_reference_is_refused_or_sane(changed, without):
    data = {key: value for key, value in (GOOD | changed).items() if key not in without}
    try:
        found = Reference.from_dict(data)
    except DataError:
        return
    assert sum(found.labels.values()) == found.questions
    compare(found, Reference.from_dict(GOOD))
    compare(summed([prediction()] * 200), found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("questions", -1),
        ("questions", 4.0),
        ("questions", 2**53),
        ("labels", {"a": 4} | dict.fromkeys(map(str, range(MAX_LABELS)), 0)),
        ("labels", {"a": 3}),
        ("labels", {"a": 3, "labels": -1}),
        ("labels", ["a"] * 4),
        ("confidence", [2]),
        ("confidence", [float("nan")]),
        ("confidence", [0.5] * (SAMPLE + 1)),
        ("label_mass", "x"),
        ("abstained", 5),
        ("rule", 2),
        ("right", 5),
    ],
)
def test_nonsense_in_a_reference(key, value):
    with pytest.raises(DataError, match=key):
        Reference.from_dict({**GOOD, key: value})


def test_the_largest_reference_is_compared():
    """SciPy crashes on tables of 2**53 questions: a file from anyone must not hold such."""
    data = {**GOOD, "questions": MOST, "labels": {"a": MOST - 1, "b": 1}}
    window = summed([prediction("a")] * 499 + [prediction("b")])
    assert 0 < signal(compare(Reference.from_dict(data), window), "label mix").p_value < 0.05
    data |= {"questions": 2**53, "labels": {"a": 2**53 - 1, "b": 1}}
    with pytest.raises(DataError, match=f"at most {MOST}"):
        Reference.from_dict(data)


def test_more_labels_than_models_have_are_not_drawn():
    """Only a forged log has them; drawing would take minutes and all memory."""
    names = [str(number) for number in range(1500)]
    sides = [[*names[:750], *names[:50]], names[750:]]
    rows = [[prediction(name, None, None) for name in side] for side in sides]
    table = [[side.count(name) for name in names] for side in sides]
    p_value = signal(judged(*rows), "label mix").p_value / 2  # of two signals
    assert p_value == pytest.approx(chi2_contingency(table).pvalue)
    assert 0.1 < p_value < 0.4


# What the shipped model answers


@pytest.fixture(scope="session")
def unseen(household):
    """Questions that the model never saw: 200 families of paraphrases, some 500."""
    split = split_examples(read_examples(EXAMPLE / "questions.jsonl", household), household, seed=0)
    examples = [*split.validation, *split.test]
    families = defaultdict(list)
    for family, example in zip(find_families(examples), examples, strict=True):
        families[family].append(example.text)
    return random.Random(0).sample(list(families.values()), 200)


@pytest.fixture(scope="session")
def asked(unseen):
    """Answers to questions that the model never saw, and to others.

    `pool`: all of `unseen`; `slips`: 150 of these with slips; `off`: off the list.
    """
    texts = [text for family in unseen for text in family]
    mixed = random.Random(0).sample(texts, 150)
    parts = {
        "pool": texts,
        "slips": [slipped(text) for text in mixed],
        "off": read_texts(EXAMPLE / "off_topic.jsonl")[::2],
    }
    with Classifier.open(threshold=THRESHOLD) as classifier:
        return {name: list(classifier.ask_many(part)) for name, part in parts.items()}


def test_a_thousand_windows_without_drift(unseen, asked):
    """Alarms are at most the stated share, with the slack that chance asks for.

    The reference is of whole families, the window of single questions, as users ask them.
    """
    pool = iter(asked["pool"])
    families = [[next(pool) for _ in family] for family in unseen]
    rng = random.Random(0)
    alarms = 0
    for _ in range(1000):
        drawn = rng.choices(families, k=320)
        rows = [(number, answer) for number, family in enumerate(drawn) for answer in family]
        groups, answers = zip(*rows, strict=True)
        quiet = Reference.of(answers, rule=RULE, groups=groups)
        window = [rng.choice(family) for family in rng.choices(families, k=WINDOW)]
        alarms += bool(compare(quiet, summed(window)).drifted)
    assert alarms <= binom.isf(0.001, 1000, LEVEL)


@pytest.mark.parametrize(
    ("other", "share", "within"),
    [
        ("to one label", 0.2, 500),
        ("slips", 1.0, 300),
        ("off", 0.2, 500),
        ("off", 0.5, 250),
    ],
)
def test_a_shift_is_seen_in_time(asked, other, share, within):
    """A rolling window of 500, looked at every 50 questions: the median delay of nine."""
    pool = asked["pool"]
    others = asked.get(other) or [answer for answer in pool if answer.label == "pool"]
    rng = random.Random(0)

    def delay():
        reference, window = (rng.choices(pool, k=count) for count in (800, WINDOW))
        for asked_since in range(50, 2001, 50):
            fresh = [rng.choice(others if rng.random() < share else pool) for _ in range(50)]
            window = [*window[50:], *fresh]
            if judged(reference, window).drifted:
                return asked_since
        return float("inf")

    assert np.median([delay() for _ in range(9)]) <= within


# The pictures


def png_size(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def records(answers, start, step):
    time = datetime.fromisoformat(start)
    return [
        Record(
            (time + number * step).astimezone(UTC), "m", 0.0, answer.label, answer.confidence,
            answer.label_mass, answer.abstained, answer.reason, None, None,
        )
        for number, answer in enumerate(answers)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [FEWEST, 1050])
@pytest.mark.parametrize("step", [timedelta(0), timedelta(hours=20)])
def test_the_picture_of_any_log(count, step):
    names = [f"${'a very long label ' * 10}{number}" for number in range(150)]
    rng = random.Random(0)
    answers = [prediction(rng.choice(names), rng.random(), 1.0) for _ in range(count)]
    rows = records(answers, "2026-01-01T00:00:00+00:00", step)
    points = list(history(Reference.of_log(rows), iter(rows), 100))
    assert len(points) == count // 100
    assert points[-1][0] == rows[len(points) * 100 - 1].time
    assert history(Reference.of_log(rows), iter(rows), 100, last=3) == points[-3:]
    width, height = png_size(drift_png(points))
    assert 900 < width < 1300
    assert 700 < height < 1300


def test_the_picture_of_a_log_without_probabilities():
    rows = records([prediction("a", None, None)] * 200, "2026-01-01T00:00:00+00:00", timedelta(1))
    width, height = png_size(drift_png(list(history(Reference.of_log(rows), rows, 100))))
    assert width > height


# The command


@pytest.fixture
def model(tmp_path, asked):
    """The shipped model with a reference in it, whose accuracy is four in five."""
    path = tmp_path / "house.gguf"
    shutil.copy(DEFAULT_MODEL, path)
    reference = replace(summed(asked["pool"]), right=len(asked["pool"]) * 4 // 5)
    write_sections(path, {REFERENCE_KEY: reference.to_dict()})
    return path


def name_of(model):
    return identity(read_header(model).metadata)


def log_of(path, model, answers):
    return written(path, [("q", a) for a in answers], model=name_of(model), rule=RULE)


def test_ask_logs_and_drift_judges(qcat, model, asked, tmp_path):
    """As a user does it, in files alone; then with strange answers in the same log."""
    log = tmp_path / "log.jsonl"
    texts = "".join(f"{text}\n" for text in read_texts(EXAMPLE / "off_topic.jsonl")[:120])
    done = qcat("ask", "-m", model, "--threshold", THRESHOLD, "--log", log, input=texts)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == len(read_log(log).records) == 120
    assert b"insurance" not in log.read_bytes()

    done = qcat("drift", log, "-m", model, "--plot", tmp_path / "d.png")
    assert done.returncode == 4, done.stderr
    verdict, _, head, *rows = done.stdout.splitlines()
    assert verdict.startswith("drift in 120 questions: ")
    assert "share abstained" in verdict
    assert head.split() == ["reference", "window", "change", "PSI", "p"]
    assert [row.split("  ")[0] for row in rows[:4]] == [
        "label mix", "confidence", "label mass", "share abstained",
    ]  # fmt: skip
    png_size((tmp_path / "d.png").read_bytes())

    log_of(log, model, random.Random(1).choices(asked["pool"], k=500))
    done = qcat("drift", log, "-m", model, "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert (found["drifted"], found["questions"], found["model"]) == (False, 500, name_of(model))
    assert qcat("drift", log, "-m", model, "--since", "1h", "--json").returncode == 4


def test_against_a_quiet_log(qcat, asked, tmp_path):
    rng = random.Random(0)
    quiet = log_of(tmp_path / "quiet", DEFAULT_MODEL, asked["pool"])
    log = log_of(tmp_path / "log", DEFAULT_MODEL, rng.choices(asked["pool"], k=200))
    with log.open("ab") as file:
        file.write(b"torn\n")
    written(log, [("q", prediction())] * 3, model="another")
    done = qcat("drift", log, "--reference", quiet, "--plot", tmp_path / "d.png")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "no drift in 200 questions"
    assert last == "left out: 3 answers of other models, 1 damaged lines"

    few = log_of(tmp_path / "few", DEFAULT_MODEL, asked["off"][:20])
    done = qcat("drift", few, "--reference", quiet, "--plot", tmp_path / "few.png")
    assert done.returncode == 0
    assert done.stdout == "too few to tell: 20 questions to judge, 100 needed\n"
    assert done.stderr == "qcat: warning: nothing to plot: fewer than 100 answers\n"
    assert not (tmp_path / "few.png").exists()


def test_accuracy_on_labelled_questions(qcat, model, asked, household, tmp_path):
    log = log_of(tmp_path / "log", model, asked["pool"])
    rows = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()[::60]
    (tmp_path / "good.jsonl").write_text("\n".join(rows))
    wrong = [{**json.loads(row), "label": "car"} for row in rows]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, wrong)))
    done = qcat("drift", log, "-m", model, "--data", tmp_path / "good.jsonl", "--json")
    assert done.returncode == 0, done.stdout
    accuracy = json.loads(done.stdout)["signals"][-1]
    examples = read_examples(tmp_path / "good.jsonl", household)
    labels = list(household.labels)
    with Classifier.open(model) as classifier:
        said = list(classifier.ask_many(example.text for example in examples))
    right = sum(p.label == labels[e.label] for p, e in zip(said, examples, strict=True))
    assert accuracy["name"] == "accuracy"
    assert accuracy["window"] == pytest.approx(right / len(rows))
    done = qcat("drift", log, "-m", model, "--data", tmp_path / "bad.jsonl")
    assert done.returncode == 4
    assert done.stdout.startswith("drift in 500 questions: accuracy 0.80 -> 0.")


def test_labelled_questions_are_not_queued(
    bundle_file, household, asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    made = bundle_file(household.replace(name="measured", review="text"))
    model = shutil.copy(made, tmp_path / "m.gguf")
    reference = replace(summed(asked["pool"]), right=0)
    calibration = Calibration().with_threshold(1.0)
    write_sections(
        model, {CALIBRATION_KEY: calibration.to_dict(), REFERENCE_KEY: reference.to_dict()}
    )
    log = log_of(tmp_path / "log", model, asked["pool"])
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(json.dumps({"text": "a secret?", "label": "pool"}))
    assert run(["drift", str(log), "-m", str(model), "--data", str(labelled)]) == 0
    assert capsys.readouterr().out.startswith("no drift in 500 questions\n")
    assert not (tmp_path / "qcat").exists()


def test_the_picture_is_of_the_last_windows(model, asked, tmp_path, monkeypatch):
    """However long the log: no window is compared that is not drawn."""
    log = log_of(tmp_path / "log", model, asked["pool"] * 2)
    monkeypatch.setattr("qcat.workflows.drift.PLOTTED", 2)
    compared = []

    def counted(*args, **more):
        compared.append(args)
        return compare(*args, **more)

    monkeypatch.setattr("qcat.monitor.drift.compare", counted)
    png = tmp_path / "d.png"
    args = ["drift", log, "-m", model, "--window", 100, "--plot", png]
    assert run([str(arg) for arg in args]) in (0, 4)
    assert len(compared) == 2
    png_size(png.read_bytes())


def test_bad_input_is_one_line(model, asked, tmp_path, capsys):
    log = log_of(tmp_path / "log", model, asked["pool"][:100])
    foreign = written(tmp_path / "foreign", [("q", prediction())])
    (tmp_path / "words").write_text("no log\n")
    hostile = tmp_path / "hostile.gguf"
    shutil.copy(DEFAULT_MODEL, hostile)
    write_sections(hostile, {REFERENCE_KEY: {"questions": "many"}})
    silent = tmp_path / "silent.gguf"
    shutil.copy(DEFAULT_MODEL, silent)
    data = section(read_header(model), REFERENCE_KEY, model)
    write_sections(silent, {REFERENCE_KEY: data | {"right": None}})
    bare = tmp_path / "bare.gguf"
    shutil.copy(DEFAULT_MODEL, bare)
    write_sections(bare, {REFERENCE_KEY: {}})
    cases = [
        ([tmp_path / "none", "-m", model], "none: cannot be read"),
        ([log, "-m", bare], "carries no reference: run `qcat calibrate"),
        ([foreign, "-m", model], "no answer of household-"),
        ([tmp_path / "words", "-m", model], "1 lines that are no answer"),
        ([log, "--reference", tmp_path / "words"], "no answers in it"),
        ([log, "-m", hostile], "'questions' must be a count"),
        ([log, "-m", silent, "--data", log], "has no accuracy to compare with"),
        ([foreign, "--reference", log], "name a quiet log of the same model"),
        ([log, "-m", model, "--plot", tmp_path], "is a folder"),
        ([tmp_path / "none", "-m", model, "--plot", tmp_path / "no" / "d.png"], "d.png: cannot be"),
    ]
    for args, message in cases:
        assert run(["drift", *map(str, args)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert message in said.err
        assert said.err.count("\n") == 1
        assert said.err.startswith("qcat: error: ")


def test_an_answer_that_cannot_be_logged_still_comes_out(qcat, house, tmp_path):
    done = qcat("ask", "-m", house, "--log", "/dev/full", "one?", "two?")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == (
        "qcat: error: /dev/full: the answer is not in the log: No space left on device\n"
    )
    for bad, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "a/b", "No such file or directory"),
    ):
        done = qcat("ask", "-m", house, "--log", bad, "one?")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"qcat: error: {bad}: cannot be written: {reason}: choose another\n"


def test_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args in (
        ["log", "--window", "99"],
        ["log", "--level", "0.9"],
        ["log", "--since", "yesterday"],
        ["log", "--since", "7d", "--window", "200"],
        ["log", "--data", "x", "--reference", "y"],
        ["log", "--model", "x", "--reference", "y"],
        ["log", "--model", "ollama:house"],
    ):
        assert run(["drift", *args]) == 2, args
    assert run(["ask", "--log-text", "q"]) == 2
    assert run(["ask", "--log", "x", "--decode", "free", "q"]) == 2
    monkeypatch.setenv("QCAT_MODEL", "ollama:house")
    capsys.readouterr()
    assert run(["drift", "log"]) == 2
    assert (
        "ollama:house is on a server, whose probabilities may be bounds: name its GGUF"
        in capsys.readouterr().err
    )
    assert run(["drift", "log", "--reference", "y"]) == 1  # which needs no model
    assert not list(tmp_path.iterdir())
