"""Labels with anything in them: refused in one line, or a task that works wherever its text goes.

Tasks that llama.cpp is to use are tried in another process, as in `test_hostile_files`: this file
run as a script takes one task a line and prints what came of it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from apart_cases import run_apart
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qcat import Classifier, QcatError, Task, TaskError
from qcat.encoding.grammar import grammar
from qcat.encoding.prompt import Prompt, build_prompt, clean_question, with_codes
from qcat.gguf.sections import TASK_KEY, write_sections
from qcat.report.modelfile import chat_template, modelfile, render

COUNT = 2020  # label sets
CAPABILITY_WORDS = ("tools", "tool_call", "<think>", "</think>")

QUESTIONS = tuple(
    clean_question(question)
    for question in (
        "When was the pool pump replaced?",
        "What is {{ .Prompt }} or {{ messages }}, {% if %}, {# this #}, {{ '}}' }}?",
        'She said """no""" and \\"yes\\" \\n',
        "<|im_end|>\n<think>tools</think> tool_call",
        "\u202e👩‍👩‍👧 e\u0301 \ufeff\u2028 {",
    )
)

PIECES = (
    # what means something in GBNF, JSON, TOML, Go templates, Jinja, Modelfiles, or to a tokenizer
    '"', "'", '"""', "'''", "\\", "\\n", "\\x41", "\\u0041", "\\U0010ffff", "[", "]", "[^", "(",
    ")", "{", "}", "{{", "}}", "{{{", "{%", "%}", "{#", "#}", "{{-", "-}}", "{{ .Prompt }}",
    '{{ "" }}', "{{ messages }}", "{% raw %}", "{0,9}", "|", "::=", "#", "*", "+", "?", ".", "=",
    "root", 'root ::= "a"', "//", "/*", "--", "$(id)", "`", "%s", "&amp;", "<br>", ",", ":", ": ",
    "- ", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "[INST]",
    "tools", "tool_call", "<tool_call>", "think", 'TEMPLATE """', "FROM ./a.gguf", "PARAMETER a",
    "Question: q?", "Category:", "pool", "pool pump", "Pool", "garden lights",
    # what folds, composes, joins, turns round or cannot be seen
    "é", "e\u0301", "ß", "ss", "ſ", "ŉ", "ǰ", "j\u030c", "İ", "i\u0307", "ı", "ﬁ", "Å", "\u212b",
    "A\u030a", "\u1e9b\u0323", "\u0301", "\u0323\u0307", "\u0338", "=\u0338", "ｱ", "ア", "ﾞ",
    "\u200d", "\u200b", "\ufeff", "\u00ad", "\u202e", "\u2066", "\u200f", "\u00a0", "\u3000",
    "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "🏴\U000e0067\U000e0062\U000e007f", "👍🏽", "1️⃣",
    "\U0001f600", "𝔘𝔫𝔦", "\U000e0041", "\ufffd", "\uffff",
    "\U0010ffff", "\ue000", "한", "\u1112\u1161\u11ab", "漢字", "עברית", "العربية", "हिन्दी", "ไทย",
    "Ελλάς", "ΣΑΣ", "ς",
    # what no label may have
    "\n", "\r\n", "\t", "\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\ud800", "\udfff",
)  # fmt: skip
USUAL = PIECES[:-11]

WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12)
ANYTHING = st.text(st.characters(), max_size=8)  # control characters and lone surrogates, too
PHRASES = st.lists(st.sampled_from(USUAL) | WORDS, min_size=1, max_size=5).map("".join)
LABELS = st.one_of(
    PHRASES,
    PHRASES,
    PHRASES,
    WORDS,
    st.lists(st.sampled_from(USUAL), min_size=1, max_size=4).map(" ".join),
    st.integers(150, 210).map(lambda count: "a" * count),
).filter(str.strip)
TEXTS = st.one_of(st.just(""), st.just(""), PHRASES, WORDS)


def families(labels: list[str]) -> list[list[str]]:
    """Label sets whose labels are hard to tell apart, from a few labels."""
    first = labels[0]
    beginnings = [first[: end + 1] for end in range(len(first)) if first[: end + 1].strip()]
    cases = [first, first.upper(), first.swapcase(), first.casefold()]
    longer = [first, *(first + label for label in labels)]
    words = [first, *(f"{first} {label}" for label in labels)]
    return [beginnings[-12:], cases, longer, words, [*labels, f" {first}"]]


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a task, mostly usable ones."""
    labels = draw(st.lists(LABELS, min_size=2, max_size=6, unique=True))
    match draw(st.sampled_from(["as they are"] * 6 + ["family"] * 3 + ["anything"])):
        case "family":
            labels = draw(st.sampled_from(families(labels)))
        case "anything":
            labels = [*labels, draw(ANYTHING | st.sampled_from(PIECES))]
    fields: dict[str, Any] = {
        "name": "hostile",
        "labels": {label: draw(TEXTS) for label in labels},
        "style": draw(st.sampled_from(["plain", "chat"])),
        "verbalizer": draw(st.sampled_from(["name", "name", "name", "code"])),
    }
    if draw(st.booleans()):
        fields["instruction"] = "\n".join(draw(st.lists(PHRASES, min_size=1, max_size=3)))
    if draw(st.integers(0, 3)) == 0:
        fields["question"], fields["answer"] = draw(PHRASES), draw(PHRASES)
    return fields


@settings(max_examples=COUNT, phases=[Phase.generate], database=None)
@given(fields=tasks())
def _collect(found: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    found.append(fields)


def usable(fields: dict[str, Any]) -> Task | TaskError:
    try:
        return Task(**fields)
    except TaskError as error:
        return error


def main(gguf: Path) -> None:
    """The script: puts each task into the GGUF and asks a question."""
    import llama_cpp

    from qcat.backends.llama import LlamaModel

    os.fsync = lambda file: None  # half of the time; the copy need not survive a power cut
    with LlamaModel(gguf, vocab_only=True) as vocabulary:
        for line in sys.stdin:
            task = with_codes(Task.from_dict(json.loads(line)), vocabulary)
            text = grammar(task).encode()
            sampler = llama_cpp.llama_sampler_init_grammar(vocabulary.vocab, text, b"root")
            outcome: dict[str, Any] = {"grammar": bool(sampler)}
            llama_cpp.llama_sampler_free(sampler)
            write_sections(gguf, {TASK_KEY: task.to_dict()})
            try:
                with Classifier.open(gguf, threads=1) as classifier:
                    answer = classifier.ask('When was "it" replaced?')
                    outcome["label"] = answer.label
                    outcome["labels"] = sorted(answer.probabilities)
                    outcome["sum"] = sum(answer.probabilities.values())
                    scorer = classifier._scorer
                    outcome["refused"] = [
                        label for number, label in enumerate(task.labels)
                        if not scorer.accepts(number)
                    ]  # fmt: skip
            except QcatError as error:
                outcome |= {"error": type(error).__name__, "message": str(error)}
            print(json.dumps(outcome), flush=True)


@pytest.fixture(scope="module")
def generated() -> list[dict[str, Any]]:
    """The fields of many tasks, no two alike."""
    found: list[dict[str, Any]] = []
    _collect(found)
    assert len(found) >= 2000
    return found


@pytest.fixture(scope="module")
def valid(generated: list[dict[str, Any]]) -> list[Task]:
    """The tasks that can be made of them."""
    found = [task for fields in generated if isinstance(task := usable(fields), Task)]
    assert len(found) > COUNT // 2
    return found


@pytest.fixture(scope="module")
def prompts(valid: list[Task], house: Path) -> list[tuple[Task, Prompt]]:
    """Their prompts in both styles."""
    from qcat.backends.llama import LlamaModel

    with LlamaModel(house, vocab_only=True) as vocabulary:
        return [
            (styled, build_prompt(styled, vocabulary))
            for task in valid
            for style in ("plain", "chat")
            for styled in [with_codes(task.replace(style=style), vocabulary)]
        ]


def test_a_label_set_is_a_task_or_one_line(generated):
    for fields in generated:
        result = usable(fields)
        if isinstance(result, TaskError):
            assert str(result).isprintable(), fields
            assert re.match("labels?|question|answer|instruction", str(result)), fields


def test_a_task_holds_what_it_promises(valid):
    for task in valid:
        labels = list(task.labels)
        assert 2 <= len(labels) <= 500
        for text in (*labels, *task.labels.values(), task.question, task.answer):
            assert text == unicodedata.normalize("NFC", text).strip()
            assert not {unicodedata.category(char) for char in text} & {"Cc", "Cs", "Zl", "Zp"}
        folded = {unicodedata.normalize("NFC", label.casefold()) for label in labels}
        assert len(folded) == len(labels)
        assert all(0 < len(label) <= 200 for label in labels)


def test_a_task_survives_toml_and_dict(valid):
    for task in valid:
        for again in (Task.from_toml(task.to_toml()), Task.from_dict(task.to_dict())):
            assert again == task
            assert list(again.labels.items()) == list(task.labels.items())  # in order
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_a_valid_task_answers_with_one_of_its_labels(valid, house, tmp_path):
    copy = tmp_path / "house.gguf"
    shutil.copyfile(house, copy)
    outcomes = run_apart(__file__, [copy], [task.to_dict() for task in valid], seconds=120)
    wrong = []
    for task, outcome in zip(valid, outcomes, strict=True):
        right = outcome.get("grammar") and (
            (
                outcome["label"] in task.labels
                and outcome["labels"] == sorted(task.labels)
                and abs(outcome["sum"] - 1) < 1e-9
                and not outcome["refused"]  # the grammar takes every label
            )
            if "label" in outcome
            else "error" in outcome
            and outcome["message"].isprintable()
            and str(copy) in outcome["message"]
        )
        if not right:
            wrong.append((task.to_dict(), outcome))
    assert not wrong
    answered = sum("label" in outcome for outcome in outcomes)
    assert answered > 0.95 * len(valid)  # its vocabulary has all bytes


def renders(task: Task, prompt: Prompt, question: str) -> bool:
    """Whether the Modelfile of a task says its prompt, in characters that Ollama keeps."""
    text = modelfile(task, prompt, gguf="hostile.gguf", parameters={})
    printable = all(char.isprintable() or char == "\n" for char in text)
    return printable and render(text, question) == prompt.text(question)


def test_the_modelfile_renders_characters_that_go_does_not_print(house):
    from qcat.backends.llama import LlamaModel

    task = Task("flags", {"🏴\U000e0067\U000e0062\U000e007f": "", "\U00100000": "\U0010ffff"})
    with LlamaModel(house, vocab_only=True) as vocabulary:
        assert renders(task, build_prompt(task, vocabulary), QUESTIONS[0])


def test_the_modelfile_renders_the_prompt(prompts):
    questions = itertools.cycle(QUESTIONS)
    wrong = [task for task, prompt in prompts if not renders(task, prompt, next(questions))]
    assert not wrong


def test_the_chat_template_renders_the_prompt(prompts):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    questions = itertools.cycle(QUESTIONS)
    for _, prompt in prompts:
        question, template = next(questions), chat_template(prompt)
        messages = [{"role": "user", "content": question}]
        said = environment.from_string(template).render(messages=messages)
        assert said == prompt.text(question)
        assert not [word for word in CAPABILITY_WORDS if word in template]


def test_the_texts_go_through_the_real_transformers(prompts):
    """Its own renderer, for a few: the environment above might not be what it uses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for _, prompt in prompts[:: len(prompts) // 40]:
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        [said], _ = render_jinja_template([messages], chat_template=chat_template(prompt))
        assert said == prompt.text(QUESTIONS[0])


# What a person who wrote the task is told


TWO = {"pool": "", "fence": ""}


def test_an_empty_answer_word_leaves_a_line_break():
    class Letters:
        begin = None

        def encode(self, text, *, special):
            return list(text.encode())

    task = Task.from_dict({"name": "house", "labels": TWO, "answer": ""})
    assert Task.from_toml(task.to_toml()) == task
    assert build_prompt(task, Letters()).text("who?").endswith("Question: who?\n")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"labels": {"Pool": "", "pool": ""}}, ["'Pool'", "'pool'", "case"]),
        ({"labels": {"straße": "", "STRASSE": ""}}, ["'straße'", "'STRASSE'"]),
        ({"labels": {"café": "", "cafe\u0301": ""}}, ["'café'"]),
        ({"labels": {"\u01f0": "", "J\u030c": ""}}, ["'ǰ'"]),
        ({"labels": {" pool": "", "pool ": ""}}, ["'pool'", "spacing"]),
        ({"labels": {"a\nb": "", "c": ""}}, [r"'a\nb'", "U+000A"]),
        ({"labels": {"a\0b": "", "c": ""}}, [r"'a\x00b'", "U+0000"]),
        ({"labels": {"a\x1b[31m": "", "c": ""}}, ["U+001B"]),
        ({"labels": {"a\x85b": "", "c": ""}}, ["U+0085"]),
        ({"labels": {"a\u2028b": "", "c": ""}}, ["U+2028"]),
        ({"labels": {"a\ud800": "", "c": ""}}, ["U+D800"]),
        ({"labels": {"a": "b\tc", "c": ""}}, ["'a'", "description", "U+0009"]),
        ({"labels": {"": "", "c": ""}}, ["label ''", "empty"]),
        ({"labels": {" \t": "", "c": ""}}, ["label", "empty"]),
        ({"labels": {1: "", "c": ""}}, ["label 1", "int"]),
        ({"labels": {"a": None, "c": ""}}, ["'a'", "NoneType"]),
        ({"labels": {"a" * 201: "", "c": ""}}, ["aaaa", "201", "200"]),
        ({"labels": {}}, ["labels", "0 given"]),
        ({"labels": {"pool": ""}}, ["labels", "1 given", "2"]),
        ({"labels": {f"label {n}": "" for n in range(501)}}, ["labels", "501 given", "500"]),
        ({"labels": ["pool", "fence"]}, ["labels", "table"]),
        ({"labels": None}, ["labels", "table"]),
        ({"name": ""}, ["name", "''"]),
        ({"name": "My House"}, ["name", "'My House'"]),
        ({"name": "../house"}, ["name", "'../house'"]),
        ({"name": None}, ["name", "None"]),
        ({"name": "house\n"}, ["name", r"'house\n'"]),
        ({"instruction": ""}, ["instruction", "empty"]),
        ({"instruction": "a\0b"}, ["instruction", "U+0000"]),
        ({"instruction": ["a"]}, ["instruction", "list"]),
        ({"question": " "}, ["question", "empty"]),
        ({"question": "a\nb"}, ["question", "U+000A"]),
        ({"answer": 5}, ["answer", "int"]),
        ({"style": "ollama"}, ["style", "'ollama'", "plain", "chat"]),
        ({"style": ["plain"]}, ["style", "plain"]),
        ({"verbalizer": "codes"}, ["verbalizer", "'codes'", "name", "code"]),
        ({"codes": ["AA", "AB"]}, ["codes", "table"]),
        ({"codes": {"pool": "AA"}}, ["codes", "'fence'"]),
        ({"codes": {"pool": "AA", "fence": "AA"}}, ["codes", "'AA'"]),
        ({"codes": {"pool": "AA", "fence": "ab"}}, ["codes", "'fence'", "'ab'"]),
        ({"codes": {"pool": "AA", "fence": "ABC"}}, ["codes", "'fence'", "'ABC'"]),
        ({"codes": {"pool": "AA", "fence": "ÀÉ"}}, ["codes", "'fence'"]),
        ({"codes": {"pool": "AA", "fence": 7}}, ["codes", "'fence'", "7"]),
        ({"codes": {"pool": "AA", "fence": "AB", "car": "AC"}}, ["codes", "'car'"]),
        ({"codes": {"pool": "AA", "fence\n ": "AB", 3: "AC"}}, ["codes", "3"]),
        ({"colour": "red"}, ["unknown key", "'colour'", "labels"]),
        ({"a\nb": 1}, ["unknown key", r"'a\nb'"]),
    ],
)
def test_what_is_wrong_with_a_task_is_named(fields, named):
    data = {"name": "house", "labels": TWO} | fields
    with pytest.raises(TaskError) as caught:
        Task.from_dict(data)
    message = str(caught.value)
    assert message.isprintable()
    assert not [word for word in named if word not in message], message


@pytest.mark.parametrize("missing", ["name", "labels"])
def test_a_missing_key_is_named(missing):
    data = {"name": "house", "labels": TWO}
    del data[missing]
    with pytest.raises(TaskError, match=f"^key '{missing}' is missing$"):
        Task.from_dict(data)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('name = "house"\nlabels = {x = 1}}\n', ["TOML", "line 2"]),
        ('name = "house"\nlabels = {', ["TOML", "end of document"]),
        ('name = "house"\n\n[labels]\n"pool" = ""\npool = ""\n', ["TOML", "line 5"]),
        ('name = "house"\n[labels]\npool\n', ["TOML", "line 3"]),
        ('name = "house\n', ["TOML", "line 1"]),
        ("name = 'a'\n\x00", ["TOML", "line 2"]),
        ('name = "house"\n[labels]\n"a\\ud800" = ""', ["TOML", "line 3"]),
        ("x = " + "[" * 100_000, ["TOML"]),
        ("x = " + "9" * 5000, ["TOML"]),
        ("", ["is empty", "qcat init"]),
        ('name = "house"\n[labels]\n"a\\u0000b" = ""\nc = ""', [r"'a\x00b'", "U+0000"]),
        ('name = "house"\nlabels = ["pool", "fence"]', ["labels", "table"]),
        ('name = "house"\n[labels]\npool = 1\nfence = ""', ["'pool'", "int"]),
        (
            'name = "house"\n[labels]\npool.deep = ""\nfence = ""',
            ["'pool.deep'", "table"],
        ),
        ('name = 1979-05-27\n[labels]\npool = ""\nfence = ""', ["name"]),
    ],
)
def test_a_file_that_is_no_task_is_named_with_what_is_wrong(tmp_path, text, named):
    path = tmp_path / "task.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TaskError) as caught:
        Task.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert not [word for word in named if word not in message], message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "missing.toml"
    with pytest.raises(TaskError, match="No such file") as caught:
        Task.read(missing)
    assert str(caught.value).startswith(f"{missing}: ")
    with pytest.raises(TaskError, match="directory") as caught:
        Task.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    latin = tmp_path / "latin.toml"
    latin.write_bytes('name = "café"'.encode("latin-1"))
    with pytest.raises(TaskError, match=r":1: not UTF-8 \(byte 0xE9, 'é' in") as caught:
        Task.read(latin)
    assert str(caught.value).startswith(f"{latin}:1: ")
    utf16 = tmp_path / "utf16.toml"
    utf16.write_bytes('name = "house"'.encode("utf-16"))
    with pytest.raises(TaskError, match="not UTF-8 but UTF-16"):
        Task.read(utf16)


def test_an_impossible_path_is_refused():
    with pytest.raises(TaskError):
        Task.read("a\0b.toml")


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 5000: 1},
        {"labels": {"x" * 5000: "", "b": ""}},
        {"labels": {"a\0" * 5000: "", "b": ""}},
        {"name": "x" * 5000},
        {"style": "x" * 5000},
        {"codes": {"x" * 5000: "AA"}},
        {"codes": {"pool": "x" * 5000}},
    ],
    ids=["key", "long label", "bad label", "name", "style", "codes' label", "code"],
)
def test_a_message_stays_short(fields):
    with pytest.raises(TaskError) as caught:
        Task.from_dict({"name": "house", "labels": TWO} | fields)
    assert len(str(caught.value)) < 300


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path):
    path = tmp_path / "task.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "house"\r\n[labels]\r\npool = ""\r\nfence = ""\r\n')
    assert Task.read(path) == Task("house", TWO)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
