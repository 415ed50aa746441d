"""`qcat eval`: its figures against scikit-learn's on what `qcat ask` says, and what it writes."""

from __future__ import annotations

import json
import os
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from math import comb

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from qcat.classifier import Classifier
from qcat.data.dataset import Example, read_examples, read_texts
from qcat.data.split import split_examples
from qcat.errors import DataError
from qcat.evaluation.baseline import baseline_predictions
from qcat.evaluation.evaluate import labels_said
from qcat.evaluation.metrics import INVALID, confusion, label_scores, quality
from qcat.evaluation.results import Comparison, Confusion, Flip
from qcat.report.figures import confusion_png, confusion_svg
from qcat.report.html_report import html_report
from qcat.task import Task
from qcat.workflows.evaluate import evaluate

QUESTIONS = [
    json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
]
# Six of each label, most in groups of two or three.
ROWS = [row for i, row in enumerate(QUESTIONS) if row["label"] != QUESTIONS[i - 6]["label"]]
EVIL = "$x_{$ <script>alert('1')</script> & \"q\""


def asked(qcat, model, rows):
    """What `qcat ask --json` says to the rows."""
    done = qcat("ask", "-m", model, "--json", "-", input="".join(f"{r['text']}\n" for r in rows))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def held_out(tmp_path_factory):
    """The rows as a file."""
    path = tmp_path_factory.mktemp("held_out") / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def one_group(tmp_path):
    """The held-out questions as one group, whose quality has no interval to compute."""
    path = tmp_path / "one_group.jsonl"
    path.write_text("\n".join(json.dumps({**row, "group": "g"}) for row in ROWS))
    return path


def evaluated(qcat, *args):
    done = qcat("eval", "--json", *args)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_figures_are_scikit_learns_on_what_ask_says(qcat, house, household, tmp_path, held_out):
    off = ["capital of Peru?", "translate this", "who won in 1966", "2 + 2", "a poem, please"]
    (tmp_path / "off.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "kind": "far", "group": "g"}) for text in off)
    )
    found = evaluated(qcat, house, held_out, "--off-topic", tmp_path / "off.jsonl")
    answers = asked(qcat, house, ROWS)
    truth = [row["label"] for row in ROWS]
    said = [answer["label"] for answer in answers]
    assert [row["answer"] for row in found["answers"]] == said
    assert [row["truth"] for row in found["answers"]] == truth

    assert found["quality"]["accuracy"]["value"] == pytest.approx(accuracy_score(truth, said))
    for kind in ("macro", "weighted"):
        wanted = f1_score(truth, said, average=kind, zero_division=0.0)
        assert found["quality"][f"{kind}_f1"]["value"] == pytest.approx(wanted)
    labels = list(household.labels)
    wanted = f1_score(truth, said, average=None, labels=labels, zero_division=0.0)
    assert [row["label"] for row in found["per_label"]] == labels
    assert [row["f1"] for row in found["per_label"]] == pytest.approx(wanted.tolist())
    assert sum(row["support"] for row in found["per_label"]) == len(ROWS)
    assert found["confusion"]["labels"] == labels
    assert found["confusion"]["matrix"] == confusion_matrix(truth, said, labels=labels).tolist()
    assert found["confusion"]["invalid"] is None

    wrong = [a["confidence"] for a, t in zip(answers, truth, strict=True) if a["label"] != t]
    shown = [row["confidence"] for row in found["mistakes"]]
    assert shown == pytest.approx(sorted(wrong, reverse=True)[:10], abs=1e-3)
    assert all(row["answer"] != row["truth"] for row in found["mistakes"])

    masses = [answer["label_mass"] for answer in answers]
    assert found["label_mass"]["median"] == pytest.approx(np.median(masses), rel=1e-2)
    strangers = asked(qcat, house, [{"text": text} for text in off])
    signals = {signal["name"]: signal for signal in found["off_topic"]["signals"]}
    assert "on-topic score" not in signals  # the model is not calibrated
    for key, ask_key in (
        ("label mass", "label_mass"),
        ("top probability", "confidence"),
        ("energy", "energy"),
    ):
        values = [answer[ask_key] for answer in [*answers, *strangers]]
        area = roc_auc_score([1] * len(answers) + [0] * len(off), values)
        # Another batch shape gives slightly other logits, which can swap two close questions.
        assert signals[key]["detection"]["auroc"] == pytest.approx(area, abs=0.02)
        wanted = np.median(values[len(answers) :])
        assert signals[key]["median_off"] == pytest.approx(wanted, rel=1e-2)

    assert found["latency"]["questions"] == 100
    assert 0 < found["latency"]["median_ms"] <= found["latency"]["p95_ms"]
    assert found["bootstrap"]["unit"] == "group"
    assert found["bootstrap"]["units"] == len({row["group"] for row in ROWS})
    for estimate in found["quality"].values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]


def test_terminal_page_and_picture(qcat, house, tmp_path):
    (tmp_path / "test.csv").write_text(
        "text,label,group\nwho mends the pump,pool,1\nfence gate?,fence,1\n"
    )
    (tmp_path / "train.jsonl").write_text((EXAMPLE / "questions.jsonl").read_text("utf-8"))
    page, picture = tmp_path / "r.html", tmp_path / "c.png"
    done = qcat(
        "eval",
        house,
        tmp_path / "test.csv",
        "--baseline",
        "tfidf",
        "--html",
        page,
        "--plot-confusion",
        picture,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("accuracy", "macro-F1", "TF-IDF", "only one group", "latency"):
        assert word in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "2 questions" in page.read_text("utf-8")
    assert sorted(os.listdir(tmp_path)) == ["c.png", "r.html", "test.csv", "train.jsonl"]


def test_free_answers_that_are_no_label_are_wrong(qcat, house, tmp_path):
    """Random weights never end a label, so every free answer is invalid."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({**row, "group": "g"}) for row in ROWS[:8]))
    found = evaluated(qcat, house, few, "--decode", "free")
    assert found["invalid"] == 8
    assert found["quality"]["accuracy"]["value"] == 0
    assert found["quality"]["macro_f1"]["value"] == 0
    assert sum(found["confusion"]["invalid"]) == 8
    assert found["mistakes"] == []
    done = qcat("ask", "-m", house, "--decode", "free", "--json", ROWS[0]["text"])
    said = json.loads(done.stdout)["said"].strip()
    assert found["answers"][0]["answer"] is None
    assert found["answers"][0]["said"].startswith(said)


def test_free_answers_are_read_exactly():
    task = Task("t", {"pool": "", "Pump": "", "AB": ""})
    assert labels_said(task, ["pool", "Pool", "pool.", "", "AB"]).tolist() == [0, -1, -1, -1, 2]
    coded = task.replace(verbalizer="code", codes={"pool": "AA", "Pump": "AB", "AB": "AC"})
    # A code wins over a label that is written alike.
    assert labels_said(coded, ["AA", "AB", "AC", "Pump", "AD"]).tolist() == [0, 1, 2, 1, INVALID]


def test_compare_counts_flips(qcat, house, bundle_file, household, one_group):
    other = bundle_file(household, kind="llama")
    found = evaluated(qcat, house, one_group, "--compare", other)
    here, there = (asked(qcat, model, ROWS) for model in (house, other))
    rows = list(zip(ROWS, here, there, strict=True))
    compared = found["comparison"]
    flipped = [row["text"] for row, a, b in rows if a["label"] != b["label"]]
    assert flipped
    assert [flip["text"] for flip in compared["flips"]] == flipped
    fixed = sum(a["label"] == row["label"] != b["label"] for row, a, b in rows)
    broken = sum(b["label"] == row["label"] != a["label"] for row, a, b in rows)
    assert (compared["fixed"], compared["broken"]) == (fixed, broken)
    right = sum(b["label"] == row["label"] for row, a, b in rows)
    assert compared["quality"]["accuracy"]["value"] == pytest.approx(right / len(ROWS))
    # McNemar's exact test by its definition: twice the binomial tail of the smaller count
    total = fixed + broken
    assert total > 0
    tail = sum(comb(total, k) for k in range(min(fixed, broken) + 1)) / 2**total
    assert compared["p_value"] == pytest.approx(min(1, 2 * tail))

    back = evaluate(other, one_group, compare=house).comparison
    assert (back.fixed, back.broken, back.p_value) == (broken, fixed, compared["p_value"])
    timed_once = evaluate(house, one_group, compare=house, timed=1)
    assert timed_once.latency.questions == 1
    same = timed_once.comparison
    assert (same.flips, same.p_value) == ((), 1.0)


def test_compare_goes_by_label_not_by_number(bundle_file, household, house, one_group):
    turned = household.replace(labels=dict(reversed(household.labels.items())))
    other = bundle_file(turned)
    compared = evaluate(house, one_group, compare=other).comparison
    texts = [row["text"] for row in ROWS]
    with Classifier.open(house) as one, Classifier.open(other) as two:
        wanted = [
            (a.label, b.label)
            for a, b in zip(one.ask_many(texts), two.ask_many(texts), strict=True)
            if a.label != b.label
        ]
    assert wanted
    assert [(flip.this, flip.other) for flip in compared.flips] == wanted
    with pytest.raises(DataError, match="its labels are not those of"):
        evaluate(house, one_group, compare=bundle_file(Task("ab", {"yes": "", "no": ""})))


def test_bootstrap_draws_whole_families():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 120)
    answers = np.where(rng.random(120) < 0.7, truth, (truth + 1) % 3)
    alone = quality(truth, answers, [np.array([row]) for row in range(120)], 200)
    assert alone == quality(truth, answers, [np.array([row]) for row in range(120)], 200)
    for found in (alone.accuracy, alone.macro_f1, alone.weighted_f1):
        assert 0 <= found.low < found.value < found.high <= 1

    # The textbook's interval for a share of independent questions.
    spread = 1.96 * (alone.accuracy.value * (1 - alone.accuracy.value) / 120) ** 0.5
    assert alone.accuracy.high - alone.accuracy.low == pytest.approx(2 * spread, rel=0.25)

    # Every question four times over: as families they tell no more than once.
    families = [np.arange(4 * row, 4 * row + 4) for row in range(120)]
    copied = quality(truth.repeat(4), answers.repeat(4), families, 200)
    assert copied.accuracy == alone.accuracy
    naive = quality(
        truth.repeat(4), answers.repeat(4), [np.array([row]) for row in range(480)], 400
    )
    assert naive.accuracy.high - naive.accuracy.low < 0.6 * (
        alone.accuracy.high - alone.accuracy.low
    )

    single = quality(truth, answers, [np.arange(120)])
    assert (single.accuracy.low, single.accuracy.high) == (None, None)
    assert single.accuracy.value == alone.accuracy.value


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=30),
)
def test_counts_add_up(pairs):
    """Also for labels that never occur and answers that are none."""
    task = Task("t", dict.fromkeys("abcd", ""))
    truth, answers = (np.array(column) for column in zip(*pairs, strict=True))
    found = confusion(task, truth, answers, free=True)
    assert sum(map(sum, found.matrix)) + sum(found.invalid) == len(pairs)
    assert sum(found.invalid) == (answers == INVALID).sum()
    right = sum(found.matrix[i][i] for i in range(4))
    assert sum(count for *_, count in found.pairs()) + right + sum(found.invalid) == len(pairs)
    used = found.used()
    assert sum(map(sum, used.matrix)) == sum(map(sum, found.matrix))
    assert set(used.labels) == {"abcd"[i] for i in {*truth, *answers} - {INVALID}}
    scores = label_scores(task, truth, answers)
    assert [score.support for score in scores] == [(truth == i).sum() for i in range(4)]
    value = quality(truth, answers, [np.arange(len(pairs))])
    occur = sorted({*truth, *answers} - {INVALID})
    wanted = f1_score(truth, answers, labels=occur, average="macro", zero_division=0.0)
    assert value.macro_f1.value == pytest.approx(wanted)
    assert value.accuracy.value == right / len(pairs)


def test_baseline_learns(household):
    split = split_examples(read_examples(EXAMPLE / "questions.jsonl", household), household, seed=0)
    train, test = split.train, split.test
    texts = [example.text for example in test]
    found = baseline_predictions(["tfidf"], train, texts)["tfidf"]
    assert found == baseline_predictions(["tfidf"], train, texts)["tfidf"]
    right = sum(a == example.label for a, example in zip(found, test, strict=True))
    assert right / len(test) > 0.7
    with pytest.raises(DataError, match="at least two labels"):
        baseline_predictions(["tfidf"], [Example("a b", 0, 1)], ["a"])
    with pytest.raises(DataError, match="cannot learn"):
        baseline_predictions(["tfidf"], [Example("?", 0, 1), Example("!", 1, 2)], ["a"])


def test_baselines_on_embeddings_learn(household):
    """The small base as it is, its states averaged, beats chance by far."""
    base = str(ROOT / "examples" / "base" / "model")
    split = split_examples(read_examples(EXAMPLE / "questions.jsonl", household), household, seed=0)
    train, test = split.train[::8], split.test[::8]
    texts = [example.text for example in test]
    kinds = ("knn", "embeddings")
    found = baseline_predictions(kinds, train, texts, base)
    assert tuple(found) == kinds
    for said in found.values():
        right = sum(a == example.label for a, example in zip(said, test, strict=True))
        assert right / len(test) > 3 / len(household.labels)
    again = baseline_predictions(["knn"], train, texts, base)
    assert again["knn"] == found["knn"]
    few = [Example("pool pump", 0, 1), Example("fence gate", 1, 2)]  # fewer than neighbours
    said = baseline_predictions(["knn"], few, ["pool pump"], base)
    assert said["knn"] == [0]


def test_eval_with_several_baselines(qcat, house, make_checkpoint, tmp_path):
    rows = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[::20]) + "\n", "utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(rows[1:1000:50]) + "\n", "utf-8")
    base = make_checkpoint().base
    options = ["--baseline", "knn,tfidf,embeddings", "--embedder", base]
    done = qcat("eval", house, tmp_path / "test.jsonl", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)["baselines"]
    assert [b["name"].split(" + ")[1] for b in found] == [
        "5 nearest neighbours",
        "linear SVM (SGD)",
        "logistic regression",
    ]
    assert {b["train_questions"] for b in found} == {len(rows[::20])}


def png_size(data):
    """Width and height, after a check of every chunk's sum."""
    at = 8
    while at < len(data):
        length = struct.unpack_from(">I", data, at)[0]
        chunk = data[at + 4 : at + 8 + length]
        assert zlib.crc32(chunk) == struct.unpack_from(">I", data, at + 8 + length)[0]
        at += 12 + length
    return struct.unpack_from(">II", data, 16)


@pytest.mark.parametrize("count", [2, 30])
def test_confusion_pictures(count):
    labels = tuple(f"label {number}" for number in range(count))
    found = Confusion(labels, tuple(map(tuple, np.eye(count, dtype=int).tolist())), None)
    width, height = png_size(confusion_png(found))
    assert 150 < min(width, height) <= max(width, height) <= 4500
    root = ElementTree.fromstring(confusion_svg(found))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*labels, "answer", "right label"} <= texts


class Page(HTMLParser):
    """A page's tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def check_page(text):
    """It runs nothing and fetches nothing, whatever it shows. Returns its words."""
    page = Page(text)
    assert not page.tags & {"script", "img", "iframe", "object", "link", "base", "form", "a"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    return "\n".join(page.words)


def test_page_escapes_labels_and_questions(qcat, bundle_file, tmp_path):
    model = bundle_file(Task("evil", {EVIL: "", "<b onload=1>": "", "pool": ""}))
    rows = [
        {"text": f"{label} <img src=x onerror=alert(1)> {number}", "label": label, "group": 1}
        for label in (EVIL, "<b onload=1>", "pool")
        for number in range(2)
    ]
    data = tmp_path / "<i>.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "off.jsonl").write_text('{"text": "<script>off</script>"}')
    done = qcat(
        "eval",
        model,
        data,
        "--off-topic",
        tmp_path / "off.jsonl",
        "--decode",
        "free",
        "--html",
        tmp_path / "r.html",
        "--plot-confusion",
        tmp_path / "c.png",
    )
    assert done.returncode == 0, done.stderr
    assert "6 of 6 free answers are no label" in done.stdout
    words = check_page((tmp_path / "r.html").read_text("utf-8"))
    assert EVIL in words
    assert rows[0]["text"] in words
    assert "evil.gguf on <i>.jsonl" in words
    png_size((tmp_path / "c.png").read_bytes())


@pytest.fixture(scope="module")
def evaluation(house, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "two.jsonl"
    path.write_text("\n".join(json.dumps({**row, "group": "g"}) for row in ROWS[:2]))
    return evaluate(house, path)


_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=40)


@settings(max_examples=10)
@given(st.lists(_NAMES, min_size=2, max_size=4, unique=True), st.text())
def test_page_with_any_words(evaluation, names, text):
    matrix = tuple((1,) * len(names) for _ in names)
    row = replace(evaluation.answers[0], text=text, truth=names[0], answer=None, said=text)
    mistake = replace(row, answer=names[1], confidence=0.5)
    found = replace(
        evaluation,
        model=text,
        confusion=Confusion(tuple(names), matrix, (0,) * len(names)),
        mistakes=(mistake,),
        answers=(row,),
        invalid=1,
    )
    check_page(html_report(found))


def test_reads_texts_without_labels(tmp_path):
    path = tmp_path / "off.jsonl"
    path.write_text('\ufeff{"text": " a  b "}\n\n{"text": "c", "kind": "far"}\n', "utf-8")
    assert read_texts(path) == ["a b", "c"]
    for text, problem in {
        "[1]": r'off.jsonl:1: \{"text": …\} expected',
        "[]": "no questions",
        '{"text": 3}': "off.jsonl:1: ",
        '{"text": " "}': "off.jsonl:1: the question is empty",
        '{"text": "a"}\n{': "off.jsonl:2: not a JSON object",
        "": "no questions",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=problem):
            read_texts(path)
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts(path)


def test_flips_with_answers_that_are_no_label(evaluation):
    flip = Flip(1, "q", "pool", None, "pool")
    compared = Comparison(
        "other.gguf", evaluation.quality, (flip,), 1, 0, 1.0, evaluation.abstaining
    )
    assert "(no label)" in check_page(html_report(replace(evaluation, comparison=compared)))


BAD = {
    "no model": (["none.gguf", "good.jsonl"], "none.gguf"),
    "no data": (["HOUSE", "none.jsonl"], "none.jsonl: cannot be read"),
    "no rows": (["HOUSE", "empty.jsonl"], "empty.jsonl: no questions"),
    "unknown label": (["HOUSE", "bad.jsonl"], "bad.jsonl:2: label 'spa' is not in the task"),
    "no folder": (["HOUSE", "good.jsonl", "--plot-confusion", "no/c.png"], "no/c.png: cannot be"),
    "a folder": (["HOUSE", "good.jsonl", "--html", "."], ".: is a folder"),
    "long name": (["HOUSE", "good.jsonl", "--html", "x" * 300], "cannot be written"),
    "no training": (["HOUSE", "good.jsonl", "--baseline", "tfidf"], "name the baseline's training"),
    "no embedder": (
        [
            "HOUSE",
            "good.jsonl",
            "--baseline",
            "knn",
            "--train-data",
            "two.jsonl",
            "--embedder",
            "./none",
        ],
        "embedding model './none': cannot be used",
    ),
    "bad off-topic": (["HOUSE", "good.jsonl", "--off-topic", "empty.jsonl"], "empty.jsonl: no"),
    "no other": (["HOUSE", "good.jsonl", "--compare", "none.gguf"], "none.gguf"),
    "poor training": (
        ["HOUSE", "good.jsonl", "--baseline", "tfidf", "--train-data", "good.jsonl"],
        "at least two labels",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(case, qcat, house, tmp_path):
    args, message = BAD[case]
    good = json.dumps({"text": "pool?", "label": "pool"})
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(good + '\n{"text": "x", "label": "spa"}\n')
    (tmp_path / "two.jsonl").write_text(good + '\n{"text": "x", "label": "fence"}\n')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    before = sorted(os.listdir(tmp_path))
    if "--html" not in args:
        args = [*args, "--html", "page.html"]
    done = qcat("eval", *(house if arg == "HOUSE" else arg for arg in args), cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("library", ["sklearn", "matplotlib"])
def test_an_absent_library_is_one_line(library, qcat, house, tmp_path, held_out):
    (tmp_path / f"{library}.py").write_text(
        f"raise ModuleNotFoundError('none', name='{library}')\n"
    )
    args = ["eval", house, held_out, "--plot-confusion", tmp_path / "c.png"]
    done = qcat(*args, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == (
        f'qcat: error: {library} is not installed: pip install "qcat-llm[eval]", or in a clone '
        'pip install -e ".[eval]"\n'
    )


def test_usage(qcat, house, held_out):
    for options, message in (
        (["--baseline", "tfidf,bert"], "'bert' is none of tfidf, embeddings, knn"),
        (["--embedder", "x"], "--embedder is for --baseline embeddings and knn"),
        (["--train-data", "x"], "--train-data is for --baseline"),
    ):
        done = qcat("eval", house, held_out, *options)
        assert done.returncode == 2
        assert message in done.stderr
    assert qcat("eval", house).returncode == 2
    assert qcat("eval", house, held_out, "--train-data", held_out).returncode == 2
    assert "qcat eval house.gguf test.jsonl" in qcat("eval", "--help").stdout
