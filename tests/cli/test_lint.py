"""`qcat lint`: each finding by itself, the mended copy, and the installed command."""

from __future__ import annotations

import json
import os
import re

import pytest
from conftest import EXAMPLE, REAL_TOKENIZER, needs_real_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qcat.data.characters import oddities, unmangle
from qcat.data.findings import Finding
from qcat.data.lint import fix, lint
from qcat.data.near import families, near_pairs
from qcat.encoding.prompt import clean_question
from qcat.encoding.trie import LabelTrie
from qcat.errors import DataError
from qcat.task import Task

TASK = Task("house", {"pool": "", "water heater": "", "fence": ""})
TOPICS = [
    "pump", "liner", "tiles", "cover", "filter", "heater",
    "ladder", "chlorine", "skimmer", "drain", "light", "slide",
]  # fmt: skip


class Letters:
    """Spells every character as itself, a space and a letter after it as one; has no codes."""

    end, begin = 0, None

    def encode(self, text, *, special):
        return [
            ord(piece) if len(piece) == 1 else -ord(piece[1])
            for piece in re.findall(" [^ ]|.", text, re.DOTALL)
        ]


class Words:
    """A token a word, with or without the space before it."""

    end, begin = 0, None

    def __init__(self):
        self.known = {}

    def encode(self, text, *, special):
        return [self.known.setdefault(word, len(self.known) + 1) for word in text.split()]


def row(text, label="pool", group=None):
    fields = {"text": text, "label": label}
    return fields if group is None else {**fields, "group": group}


def plenty(*labels):
    """Twelve unlike questions for each label."""
    return [
        row(f"{topic} {label} {len(label) * number}?", label)
        for label in labels
        for number, topic in enumerate(TOPICS)
    ]


def found(tmp_path, rows, task=TASK, tokenizer=None):
    """What lint finds in rows beside enough good ones, by code."""
    path = tmp_path / "q.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    lines += [json.dumps(each) for each in plenty(*task.labels)]
    path.write_text("\n".join(lines), "utf-8")
    by_code = {}
    for finding in lint(task, path, tokenizer).findings:
        by_code.setdefault(finding.code, []).append(finding)
    return by_code


def test_good_data_have_no_findings(tmp_path):
    assert found(tmp_path, []) == {}
    report = lint(TASK, tmp_path / "q.jsonl")
    assert report.questions == 36
    assert report.counts == {"pool": 12, "water heater": 12, "fence": 12}
    assert report.passes is None


def test_the_example_has_no_errors_or_warnings(household):
    report = lint(household, EXAMPLE / "questions.jsonl")
    assert report.findings == ()
    assert sum(report.counts.values()) == report.questions == 5431


ONE = {
    "a repeat": (
        [row("Is it blue?"), row("green?"), row("is it  BLUE?")],
        Finding(
            "warning",
            "duplicate",
            "'Is it blue?' stands 2 times: keep one (--fix does)",
            (1, 3),
            ("pool",),
        ),
    ),
    "a repeat that folding alone takes apart": (
        [row("\u0390 a"), row("\u03aa\u0301 a")],
        Finding(
            "warning",
            "duplicate",
            "'\u0390 a' stands 2 times: keep one (--fix does)",
            (1, 2),
            ("pool",),
        ),
    ),
    "a repeat within a group": (
        [row("Is it blue?", group="a"), row("Is it blue?", group="a")],
        Finding(
            "warning",
            "duplicate",
            "'Is it blue?' stands 2 times: keep one (--fix does)",
            (1, 2),
            ("pool",),
        ),
    ),
    "two labels": (
        [row("Is it blue?"), row("is it blue?", "fence"), row("Is it blue?")],
        Finding(
            "error",
            "label-conflict",
            "'Is it blue?' stands under 'pool' and 'fence': keep one (--fix drops all)",
            (1, 2, 3),
            ("pool", "fence"),
        ),
    ),
    "a group under two labels": (
        [row("who?", group="a"), row("how?", group="a"), row("where then?", "fence", "a")],
        Finding(
            "error",
            "group-conflict",
            "group 'a' stands under 'pool' and 'fence': a group has one label: "
            "rename it for the others",
            (1, 3),
            ("pool", "fence"),
        ),
    ),
    "near, other label": (
        [
            row("When was the pool pump in the garden replaced?"),
            row("when was the pool-pump in the garden replaced", "fence"),
        ],
        Finding(
            "warning",
            "near-conflict",
            "'When was the pool pump in the garden replaced?' and 'when was the pool-pump in the "
            "garden replaced' (1.00 alike) are under 'pool' and 'fence': "
            "look whether one label is wrong",
            (1, 2),
            ("pool", "fence"),
        ),
    ),
    "near, other group": (
        [
            row("When was it bought, my dear?", group="a"),
            row("When was it bought my dear", group=2),
        ],
        Finding(
            "warning",
            "near-duplicate",
            "'When was it bought, my dear?' and 'When was it bought my dear' (1.00 alike) could be "
            "parted by a split: give them one group, or keep one",
            (1, 2),
            ("pool",),
        ),
    ),
    "near, no group": (
        [row("a b c d?"), row("zzz"), row("a b c d!"), row("a b c d")],
        Finding(
            "warning",
            "near-duplicate",
            "'a b c d?' and 'a b c d!' (1.00 alike) (and 1 more) could be parted by a split: "
            "give them one group, or keep one",
            (1, 3, 4),
            ("pool",),
        ),
    ),
    "empty": (
        [row(" \0\n")],
        Finding(
            "error",
            "empty-text",
            "no text: write a question or drop the row",
            (1,),
        ),
    ),
    "case of a label": (
        [row("why?", "Water  Heater"), row("where then?", "Water  Heater")],
        Finding(
            "warning",
            "label-spelling",
            "label 'Water  Heater' (2 rows) is read as 'water heater': write it so (--fix does)",
            (1,),
            ("water heater",),
        ),
    ),
    "a slip in a label": (
        [row("why?"), row("who?", "watr heater")],
        Finding(
            "error",
            "unknown-label",
            "label 'watr heater' (1 row) is not in the task: did you mean 'water heater'?",
            (2,),
            ("watr heater",),
        ),
    ),
    "an unknown label": (
        [row("why?", "\x1b[31m"), row("who?", "\x1b[31m")],
        Finding(
            "error",
            "unknown-label",
            "label '\\x1b[31m' (2 rows) is not in the task: add it or mend the rows",
            (1,),
            ("\x1b[31m",),
        ),
    ),
    "many words": (
        [row(" ".join(map(str, range(61))))],
        Finding(
            "warning",
            "long",
            "'0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 …' has 61 words, "
            "172 characters: shorten it, or count its tokens with --base (room for 256)",
            (1,),
            ("pool",),
        ),
    ),
}


@pytest.mark.parametrize("case", list(ONE))
def test_one_finding(case, tmp_path):
    rows, finding = ONE[case]
    assert found(tmp_path, rows) == {finding.code: [finding]}


def test_paraphrases_of_one_group_are_wanted(tmp_path):
    rows = [
        row("When was it bought, my dear?", group="a"),
        row("when was it bought my dear", group="a"),
    ]
    assert found(tmp_path, rows) == {}


def test_all_bad_rows_are_reported(tmp_path):
    rows = ["nonsense", row("why?"), "[]", '{"label": "pool"}', row("who?"), "{"]
    findings = found(tmp_path, rows)
    assert list(findings) == ["unreadable"]
    assert [finding.lines for finding in findings["unreadable"]] == [(1,), (3,), (4,), (6,)]
    assert findings["unreadable"][2].message == "no key 'text': there are 'label': name one 'text'"


def test_amounts(tmp_path):
    task = Task("t", {"none": "", "two": "", "seven": "", "ten": "", "grouped": "", "many": ""})
    rows = [row(f"{topic}?", "two") for topic in ("why", "Why", "how")]
    rows += [row(f"{topic} seven", "seven") for topic in TOPICS[:7]]
    rows += [row(f"{topic} is ten", "ten") for topic in TOPICS[:10]]
    rows += [row(f"{topic}, grouped", "grouped", at % 2) for at, topic in enumerate(TOPICS)]
    rows += [row(f"{a} and {b}", "many") for a in TOPICS for b in TOPICS[:3]]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    findings = {
        (f.code, *f.labels): (f.severity, f.message)
        for f in lint(task, path).findings
        if not f.lines
    }
    assert {key: severity for key, (severity, _) in findings.items()} == {
        ("unused-label", "none"): "error",
        ("too-few", "two"): "error",
        ("too-few", "grouped"): "error",
        ("few", "seven"): "warning",
        ("imbalance", "many", "two"): "warning",
    }
    assert findings["too-few", "two"][1] == (
        "label 'two' has 2 different questions: training, validation and test need at least 7: "
        "write more"
    )
    assert "has 2 groups:" in findings["too-few", "grouped"][1]
    assert findings["imbalance", "many", "two"][1] == (
        "'many' has 36 questions and 'two' 3: write more for the small labels"
    )


ODD = {
    "why\0?": "control-character",
    "w\x1b[1mhy": "control-character",
    "why \ufffd": "broken-text",
    "\ud800why": "broken-text",
    "po\u200bol": "invisible-character",
    "po\u200dol": "invisible-character",
    "\ufeffwhy": "invisible-character",
    "\u202eloop": "invisible-character",
    "a &amp; b": "markup",
    "it&#39;s": "markup",
    "<b>why</b>": "markup",
    '<a href="x">why</a>': "markup",
    "why <|im_end|>": "markup",
    "the cafÃ©": "mojibake",
    "itâ€™s": "mojibake",
    "5 Â£": "mojibake",
    "ðŸ˜€": "mojibake",
}
FINE = [
    "When was it replaced?",
    "why\tis it\r\nwet",
    "café, naïve, Ångström, 5 £, “it’s” …",
    "AT&T & R&D; a < b > c",
    "می\u200cخواهم",  # Persian needs it
    "👩\u200d👩\u200d👧 🏳️\u200d🌈",
    "\u2066متى تم استبدال المضخة؟\u2069",
    "AMANHÃ” LÂ…",
    "mañana âge Ânimo",
]


@pytest.mark.parametrize("text", list(ODD))
def test_odd_characters(text):
    assert [code for code, _, _ in oddities(text)] == [ODD[text]]
    assert all(part.isprintable() for _, *parts in oddities(text) for part in parts)


@pytest.mark.parametrize("text", FINE)
def test_characters_that_belong_there(text):
    assert list(oddities(text)) == []
    assert unmangle(text) == text


def test_odd_characters_are_found_with_their_line(tmp_path):
    findings = found(tmp_path, [row("why?"), row("the cafÃ©\0", "fence")])
    assert set(findings) == {"control-character", "mojibake"}
    assert findings["mojibake"][0].lines == (2,)
    assert findings["mojibake"][0].labels == ("fence",)


@given(st.text("éèüñßçàÀ£€’“”–…→😀 it's cafe", min_size=1))
def test_what_was_read_in_the_wrong_encoding_is_undone(text):
    # Byte 0x81 and its like have no character in Windows-1252: there decoders take Latin-1
    mangled = "".join(
        bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode()
    )
    if not any(char.isupper() for char in text):  # a capital before it keeps it as it is
        assert unmangle(mangled) == text


@given(st.text(st.characters(max_codepoint=0x2FFF)))
def test_undoing_harms_no_ordinary_text(text):
    if not any(head in text for head in "ÂÃâð"):
        assert unmangle(text) == text


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1).filter(str.strip) | st.sampled_from(["a b c?", "a b c", "?", "!"]),
            st.integers(0, 1),
            st.integers(0, 2),
        ),
        max_size=8,
    )
)
def test_near_pairs_of_any_texts(rows):
    texts, labels, units = zip(*rows, strict=True) if rows else ((), (), ())
    pairs = near_pairs(texts, labels, units)
    assert len(pairs) <= 2 * len(texts)
    for one, two, likeness in pairs:
        assert one < two
        assert 0.85 - 1e-3 < likeness < 1 + 1e-3
        assert labels[one] != labels[two] or units[one] != units[two]
    known = {pair[:2] for pair in pairs}
    for one, text in enumerate(texts):
        others = [two for two in range(len(texts)) if texts[two] == text and two != one]
        for conflict in (False, True):
            if any(
                (labels[two] != labels[one]) == conflict and (conflict or units[two] != units[one])
                for two in others
            ):
                mine = [p for p in known if one in p and (labels[p[0]] != labels[p[1]]) == conflict]
                assert mine, (text, pairs)


def test_near_pairs_are_the_same_in_any_batch(monkeypatch):
    texts = [f"{a} and {b} of the {a}" for a in TOPICS for b in TOPICS]
    whole = near_pairs(texts, [0] * len(texts), range(len(texts)))
    monkeypatch.setattr("qcat.data.near._BATCH", 7)
    parts = near_pairs(texts, [0] * len(texts), range(len(texts)))
    assert len(whole) > 10
    assert {pair[:2] for pair in whole} == {pair[:2] for pair in parts}


def test_families():
    assert families([]) == []
    pairs = [(0, 4, 0.9), (2, 4, 0.95), (5, 7, 0.86), (0, 9, 0.99)]
    assert families(pairs) == [([0, 2, 4, 9], (0, 9, 0.99)), ([5, 7], (5, 7, 0.86))]


SIMILAR = [
    ("gutter", "gutters"),
    ("water heater", "WaterHeaters"),
    ("water_heater", "heater-water"),
    ("pay bill", "bill pay"),
    ("battery", "batteries"),
    ("irrigation", "irigation"),
    ("lost card", "lost card payment"),
    ("waterheater", "water heater"),
]
UNLIKE = [
    ("pool", "pump"),
    ("area 1", "area 2"),
    ("version_10", "version_11"),
    ("card payment fee", "cash payment charge"),
    ("gas", "ga"),
    ("glass", "gla"),
]


@pytest.mark.parametrize("pair", SIMILAR)
def test_similar_names(pair):
    (finding,) = lint(Task("t", dict.fromkeys(pair, ""))).findings
    assert (finding.severity, finding.code) == ("warning", "label-similar")
    assert finding.labels == pair
    (finding,) = lint(Task("t", dict.fromkeys(pair, "described"))).findings
    assert finding.severity == "info"


@pytest.mark.parametrize("pair", UNLIKE)
def test_names_that_are_not_similar(pair):
    assert "label-similar" not in {
        f.code for f in lint(Task("t", dict.fromkeys(pair, ""))).findings
    }


def test_a_name_that_begins_another():
    (finding,) = lint(Task("t", {"pool house": "", "pool": "", "fence": ""})).findings
    assert (finding.severity, finding.code) == ("info", "label-prefix")
    assert finding.labels == ("pool", "pool house")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("po\u200bol", "label 'po\\u200bol' has invisible U+200B: remove it"),
        ("the\u00a0pool", "label 'the\\xa0pool' has the no-break space U+00A0: write a plain one"),
    ],
)
def test_names_with_characters_that_nobody_sees(label, message):
    (finding,) = lint(Task("t", {label: "", "fence": ""})).findings
    assert finding == Finding("warning", "invisible-character", message, (), (label,))


def test_token_collisions_and_passes():
    task = Task("t", {"fence": "", "fountain": "", "pool": ""})
    report = lint(task, tokenizer=Letters())
    assert report.passes == 2
    by_code = {finding.code: finding for finding in report.findings}
    assert set(by_code) == {"forward-passes", "token-collision"}
    assert by_code["token-collision"].labels == ("fence", "fountain")
    assert "2 of 3 labels share their first token" in by_code["forward-passes"].message
    assert "rename labels" in by_code["forward-passes"].message  # there are no codes to be had

    report = lint(Task("t", {"water heater": "", "water pump": ""}), tokenizer=Words())
    assert report.passes == 2
    message = next(f.message for f in report.findings if f.code == "forward-passes")
    assert 'verbalizer = "code" in the task makes it 1 (AA = water heater' in message
    coded = Task("t", {"water heater": "", "water pump": ""}, verbalizer="code")
    assert lint(coded, tokenizer=Words()).passes == 1
    assert lint(Task("t", {"pool": "", "fence": ""}), tokenizer=Words()).findings == ()


def test_labels_that_no_token_tells_apart():
    class Same(Words):
        def encode(self, text, *, special):
            return [7]

    report = lint(TASK, tokenizer=Same())
    assert report.passes is None
    assert [(f.severity, f.code) for f in report.findings] == [("error", "label-tokens")]


def test_tokens_of_a_question_are_counted(tmp_path):
    rows = [row("x " * 256), row("y " * 255)]  # and "Category:"
    findings = found(tmp_path, rows, tokenizer=Words())
    assert list(findings) == ["too-long"]
    (finding,) = findings["too-long"]
    assert finding.severity == "error"
    assert finding.lines == (1,)
    assert "takes 257 tokens, room for 256" in finding.message


@needs_real_tokenizer
def test_the_example_in_the_real_vocabulary(qcat):
    done = qcat("lint", EXAMPLE / "task.toml", "--base", REAL_TOKENIZER, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["forward_passes"] == 1
    assert [(f["code"], f["labels"]) for f in report["findings"]] == [
        ("token-collision-bare", ["fence", "fountain"]),
        ("token-collision-bare", ["garden lights", "gutters"]),
    ]


# The mended copy

MENDED = {
    "duplicate", "label-conflict", "empty-text", "unreadable", "label-spelling",
    "control-character",
}  # fmt: skip


def test_fix(tmp_path):
    rows = [
        row("When  was it\nreplaced?", "POOL", 5),
        row("when was it replaced?"),
        row("Is it blue?"),
        row("is it blue?", "fence"),
        row("", "fence"),
        row("the cafÃ©", "water  heater"),
        row("why?", "spa \ud800"),
        "nonsense",
        row("who?", "fence"),
    ]
    source, target = tmp_path / "q.jsonl", tmp_path / "fixed.jsonl"
    source.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    before = source.read_bytes()
    fixed = fix(TASK, source, target)
    assert [json.loads(line) for line in target.read_text("utf-8").splitlines()] == [
        row("When was it replaced?", "pool", "5"),
        row("the café", "water heater"),
        row("why?", "spa \ud800"),
        row("who?", "fence"),
    ]
    assert [kept.line for kept in fixed.rows] == [1, 6, 7, 9]
    assert fixed.dropped == {
        "duplicate": (2,),
        "empty-text": (5,),
        "label-conflict": (3, 4),
        "unreadable": (8,),
    }
    assert fixed.changed == {"cleaned": (1,), "label-spelling": (1, 6), "mojibake": (6,)}
    assert source.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["fixed.jsonl", "q.jsonl"]
    assert not MENDED & {finding.code for finding in lint(TASK, target).findings}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q.jsonl", "exists already"),
        ("link", "exists already"),
        ("new.csv", "name it new.jsonl"),
        ("new.tsv", "name it new.jsonl"),
        ("new.parquet", "name it new.jsonl"),
        ("none/new.jsonl", "cannot be written: No such file"),
        ("q.jsonl/new", "cannot be written: Not a directory"),
        ("n" * 300, "cannot be written: File name too long"),
        ("a\0b", "no file can have this name"),
    ],
)
def test_fix_writes_nothing_where_it_must_not(name, message, tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text(json.dumps(row("why?")))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=message):
        fix(TASK, source, tmp_path / name)
    assert source.read_text() == json.dumps(row("why?"))
    assert sorted(os.listdir(tmp_path)) == ["link", "q.jsonl"]


def test_fix_that_would_leave_nothing(tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text("\n".join(json.dumps(row("why?", label)) for label in ("pool", "fence")))
    with pytest.raises(DataError, match="no row is left"):
        fix(TASK, source, tmp_path / "new.jsonl")
    assert os.listdir(tmp_path) == ["q.jsonl"]


TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(), max_size=6),  # lone surrogates, too
    st.text("abAB \n\0\x85\u0301ßİ", max_size=5),
    st.text("Ãâ©€™Â£ðŸ˜a\xa0\x85\x81", max_size=6),
)
LABELS = st.sampled_from(["pool", "Pool", " POOL\n", "water\u00a0 heater", "spa", "", "\udc80"])
ROWS = st.fixed_dictionaries(
    {"text": TEXTS, "label": LABELS | TEXTS},
    optional={"group": st.none() | st.integers() | TEXTS},
).map(json.dumps)


@given(st.lists(ROWS | st.sampled_from(["{", "3", '{"text": 3}']), max_size=12))
def test_a_mended_file_has_nothing_left_to_mend(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("fix")
    source, target = folder / "q.jsonl", folder / "fixed.jsonl"
    source.write_text("\n".join([*lines, json.dumps(row("the one that stays, for sure"))]))
    first = lint(TASK, source)
    fixed = fix(TASK, source, target)
    second = lint(TASK, target)
    assert not MENDED & {finding.code for finding in second.findings}
    assert second.questions == len(fixed.rows)
    gone = [line for lines in fixed.dropped.values() for line in lines]
    assert len(gone) == len(set(gone))
    assert first.questions == len(fixed.rows) + sum(
        len(found)
        for code, found in fixed.dropped.items()
        if code not in ("empty-text", "unreadable")
    )
    for kept in fixed.rows:
        assert clean_question(kept.text) == kept.text
    for finding in (*first.findings, *second.findings):
        assert finding.message.isprintable(), finding


# The installed command


@pytest.fixture
def files(tmp_path):
    (tmp_path / "task.toml").write_text(TASK.to_toml(), "utf-8")
    rows = [*plenty(*TASK.labels), *[row("one of many")] * 3, row("why?", "Fence")]
    rows += [row(f"{topic} <b>", "fence") for topic in TOPICS]
    lines = [*map(json.dumps, rows), "nonsense"]
    (tmp_path / "q.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path


def test_the_command(qcat, files):
    done = qcat("lint", "task.toml", "q.jsonl", cwd=files)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "q.jsonl:53: error: not a JSON object: found 'nonsense': write {…}, or name a CSV file "
        ".csv [unreadable]",
        "q.jsonl:37,38,39: warning: 'one of many' stands 3 times: keep one (--fix does) "
        "[duplicate]",
        "q.jsonl:40: warning: label 'Fence' (1 row) is read as 'fence': write it so (--fix does) "
        "[label-spelling]",
    ]
    assert sum("[markup]" in line for line in lines) == 11
    assert "… and 2 more [markup]; --json shows all" in lines
    assert lines[-1] == (
        "q.jsonl: 52 questions, 3 labels with 12 to 25 each: 1 error, 14 warnings, 0 notes; "
        "label tokens not checked: --base MODEL or -m FILE.gguf does"
    )

    done = qcat("lint", "task.toml", "q.jsonl", "--fix", "fixed.jsonl", cwd=files)
    assert done.returncode == 0, done.stdout
    assert done.stderr.splitlines() == [
        "q.jsonl:40: mended [label-spelling]",
        "q.jsonl:38,39: dropped [duplicate]",
        "q.jsonl:53: dropped [unreadable]",
        "fixed.jsonl: 50 rows",
    ]
    assert "0 errors, 12 warnings" in done.stdout
    again = qcat("lint", "task.toml", "q.jsonl", "--fix", "fixed.jsonl", cwd=files)
    assert again.returncode == 1
    assert again.stderr == "qcat: error: fixed.jsonl: exists already: name another file\n"


def test_the_command_as_json(qcat, files):
    done = qcat("lint", "task.toml", "q.jsonl", "--json", cwd=files)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["file"] == "q.jsonl"
    assert report["labels"] == {"pool": 15, "water heater": 12, "fence": 25}
    assert (report["error"], report["warning"], report["info"]) == (1, 14, 0)
    assert len(report["findings"]) == 15
    assert report["findings"][2] == {
        "severity": "warning",
        "code": "label-spelling",
        "message": "label 'Fence' (1 row) is read as 'fence': write it so (--fix does)",
        "lines": [40],
        "labels": ["fence"],
    }


def test_the_command_with_a_tokenizer(qcat, files, make_checkpoint, house):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    by_folder = qcat("lint", EXAMPLE / "task.toml", "--base", checkpoint.base, "--json")
    by_gguf = qcat("lint", EXAMPLE / "task.toml", "-m", house, "--json")
    assert by_folder.returncode == by_gguf.returncode == 0, by_folder.stderr + by_gguf.stderr
    assert by_folder.stdout == by_gguf.stdout
    from qcat.encoding.prompt import encode_answers
    from qcat.encoding.tokenization import HubTokenizer

    tokenizer = HubTokenizer(checkpoint.base)
    answers = encode_answers(Task.read(EXAMPLE / "task.toml"), tokenizer)
    deep = LabelTrie.build(answers, tokenizer.end).deep_branches
    assert json.loads(by_gguf.stdout)["forward_passes"] == (2 if deep else 1)
    shown = qcat("lint", "task.toml", "q.jsonl", "-m", house, cwd=files)
    assert "forward pass" in shown.stdout.splitlines()[-1]
    assert "not checked" not in shown.stdout


BAD = {
    "no task": (["none.toml"], 1, "none.toml: cannot read the task"),
    "bad task": (["q.jsonl"], 1, "q.jsonl: not valid TOML"),
    "no data": (["task.toml", "none.jsonl"], 1, "none.jsonl: cannot be read"),
    "no model": (["task.toml", "-m", "none.gguf"], 1, "none.gguf"),
    "no gguf": (["task.toml", "-m", "q.jsonl"], 1, "does not begin with GGUF"),
    "no base": (["task.toml", "--base", "gone/base"], 1, "base 'gone/base': no such folder"),
    "no tokenizer": (["task.toml", "--base", "."], 1, "tokenizer.json: No such file"),
    "tokenizer before fix": (
        ["task.toml", "q.jsonl", "--base", ".", "--fix", "new.jsonl"],
        1,
        "tokenizer.json: No such file",
    ),
    "both": (["task.toml", "--base", ".", "-m", "q.jsonl"], 2, "give one"),
    "nothing to fix": (["task.toml", "--fix", "new.jsonl"], 2, "--fix needs QUESTIONS"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case, qcat, files):
    args, status, message = BAD[case]
    done = qcat("lint", *args, cwd=files, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == status
    assert message in done.stderr
    assert done.stdout == ""
    assert status == 2 or done.stderr.count("\n") == 1
    assert sorted(os.listdir(files)) == ["q.jsonl", "task.toml"]
