"""`qcat export --vocab trim`: the same tokens and answers where all tokens are kept."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from awkward_texts import TEXT
from conftest import EXAMPLE, REAL_TOKENIZER, corpus
from export_job import job_of
from hypothesis import given, settings
from hypothesis import strategies as st
from qcat_convert.stream import convert
from qcat_convert.trim import DEFAULT_MERGES, Trimmed, trim, whole_words
from qcat_convert.vocab import CONTROL, read_vocabulary

from qcat.classifier import Classifier
from qcat.data.dataset import Example, read_examples
from qcat.encoding.agreement import check_questions
from qcat.encoding.prompt import build_prompt
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import BundleError, DataError, ExportError
from qcat.gguf.bundle import Bundle
from qcat.gguf.header import read_header
from qcat.report.card import vocabulary_line
from qcat.workflows.export import export
from qcat.workflows.export_job import Request
from qcat.workflows.retrain import _recipe

ROLES = ("eos_token", "bos_token", "pad_token")


def tokens_of(tokenizer):
    """The tokenizer's tokens by id."""
    by_id = {number: token for token, number in tokenizer.spec["model"]["vocab"].items()}
    return by_id | {added["id"]: added["content"] for added in tokenizer.spec["added_tokens"]}


def agree(tokenizer, trimmed, text):
    """Assert the theorem for a text; return whether all of its tokens are kept."""
    kept = set(trimmed.rows)
    for special in (False, True):
        whole = tokenizer.encode(text, special=special)
        cut = trimmed.tokenizer.encode(text, special=special)
        all_kept = kept.issuperset(whole)
        assert trimmed.split_otherwise(whole, cut) != all_kept
    return all_kept


# The theorem

MERGE_TABLES = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=4, max_size=40
).flatmap(lambda pairs: st.tuples(st.just(pairs), st.permutations(range(len(pairs)))))


def invented(folder, pairs, order):
    """A tokenizer of any merges over three letters: in any order, with two ways to one token."""
    tokens, merges = list("abc"), []
    for left, right in pairs:
        merge = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if merge not in merges and len("".join(merge)) <= 8:
            merges.append(merge)
            tokens += ["".join(merge)] if "".join(merge) not in tokens else []
    merges = [merges[place] for place in order if place < len(merges)]
    spec = {
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(["<end>", *tokens])},
            "merges": merges,
        },
    }
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return HubTokenizer(folder, spec)


def test_theorem_for_any_merges(tmp_path):
    """BPE by rank alone: no vocabulary that was trained holds such chains as these."""
    seen = {None: 0, False: 0, True: 0}

    @settings(max_examples=200)
    @given(
        MERGE_TABLES,
        st.integers(0, 30),
        st.lists(st.integers(1, 12), max_size=3),
        st.lists(st.text("abc", max_size=24), min_size=1, max_size=4),
    )
    def check(table, merges, needed, texts):
        tokenizer = invented(tmp_path, *table)
        trimmed = trim(tokenizer, needed, merges)
        if trimmed is None:
            seen[None] += 1
            return
        assert set(needed) & set(tokens_of(tokenizer)) <= set(trimmed.rows)
        for text in texts:
            seen[agree(tokenizer, trimmed, text)] += 1

    check()
    assert min(seen.values()) > 10


def test_equal_pairs_are_merged_leftmost_first(tmp_path):
    pairs = [(0, 0), (3, 0), (1, 1)]  # aa, then aa a, and bb
    tokenizer = invented(tmp_path, pairs, range(3))
    trimmed = trim(tokenizer, tokenizer.encode("aaa", special=False), 0)
    assert trimmed.tokenizer.spec["model"]["merges"] == [("a", "a"), ("aa", "a")]
    assert agree(tokenizer, trimmed, "aaa")
    assert not agree(tokenizer, trimmed, "bbb")


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def tiny(request, make_checkpoint):
    return HubTokenizer(make_checkpoint(request.param, hidden=64).base)


QUESTIONS = st.lists(st.sampled_from([*corpus()[:200]]), max_size=6)


def test_theorem_for_tiny_tokenizers(tiny):
    seen = {False: 0, True: 0}

    @settings(max_examples=50)
    @given(QUESTIONS, st.integers(0, 1500), st.lists(TEXT, max_size=8), QUESTIONS)
    def check(needed, merges, texts, others):
        ids = {number for text in needed for number in tiny.encode(text, special=False)}
        trimmed = trim(tiny, ids, merges)
        assert trimmed  # rare words are among neither
        for text in needed:
            assert agree(tiny, trimmed, text)
        for text in (*texts, *others):
            seen[agree(tiny, trimmed, text)] += 1

    check()
    assert min(seen.values()) > 50


@pytest.fixture(scope="module")
def real():
    if not (REAL_TOKENIZER / "tokenizer.json").is_file():
        pytest.skip(f"no Qwen3 tokenizer at {REAL_TOKENIZER} (set QCAT_SHARED)")
    return HubTokenizer(REAL_TOKENIZER)


@pytest.mark.parametrize("merges", [0, DEFAULT_MERGES])
def test_theorem_for_the_real_vocabulary(merges, real):
    needed = ["Who fixed the thermostat in the solarium?", "水泵什么时候换的？", "Ängström 5½"]
    ids = {number for text in needed for number in real.encode(text, special=False)}
    trimmed = trim(real, ids, merges)
    assert isinstance(trimmed, Trimmed)
    for text in needed:
        assert agree(real, trimmed, text)
    kept, seen = set(trimmed.rows), {False: 0, True: 0}
    for text in corpus()[::4]:
        seen[agree(real, trimmed, text)] += 1
    assert seen[False] > 50
    assert not merges or seen[True] > 50
    assert kept.issuperset(range(256 + merges))  # Qwen3's ids: bytes, then one a merge

    @settings(max_examples=150)
    @given(TEXT)
    def check(text):
        agree(real, trimmed, text)

    check()


# What is kept


def test_special_tokens_bytes_and_roles_are_kept(tiny):
    trimmed = trim(tiny, (), 0)
    before, after = tokens_of(tiny), tokens_of(trimmed.tokenizer)
    assert list(after) == list(range(len(after)))
    assert [before[row] for row in trimmed.rows] == list(after.values())
    assert list(trimmed.rows) == sorted(trimmed.rows)
    added = [token["content"] for token in tiny.spec["added_tokens"]]
    assert set(after.values()) == {*added, *(t for t in before.values() if len(t) == 1)}
    for role in ROLES:
        whole, cut = tiny.token_id(role), trimmed.tokenizer.token_id(role)
        assert (whole is None) == (cut is None)
        assert cut is None or before[whole] == after[cut]
    assert before[tiny.end] == after[trimmed.tokenizer.end] == "<|im_end|>"
    found = read_vocabulary(trimmed.tokenizer, len(after))
    assert found.tokens == list(after.values())
    assert found.merges == []
    assert all(found.types[found.tokens.index(token)] == CONTROL for token in added)


def test_special_tokens_at_the_front_and_merges_as_text(make_checkpoint, tmp_path):
    """As SmolLM2 has them: special tokens with the first ids, merges as `left right`."""
    base = make_checkpoint("llama", hidden=64).base
    old = HubTokenizer(base)
    names = [token["content"] for token in old.spec["added_tokens"]]
    vocabulary = [*names, *old.spec["model"]["vocab"]]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    model = {**old.spec["model"], "vocab": numbers, "unk_token": names[0]}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    added = [{**token, "id": numbers[token["content"]]} for token in old.spec["added_tokens"]]
    tokenizer = HubTokenizer(base, {**old.spec, "added_tokens": added, "model": model})
    trimmed = trim(tokenizer, (), 100)
    assert trimmed.rows[: len(names)] == tuple(range(len(names)))
    assert read_vocabulary(trimmed.tokenizer, len(trimmed.rows)).eos == names.index("<|im_end|>")
    assert {agree(tokenizer, trimmed, text) for text in (*corpus(), "a<|im_end|>b")} == {
        False,
        True,
    }


def test_nothing_to_leave_out(tiny):
    assert trim(tiny, (), 10**6) is None
    assert trim(tiny, tokens_of(tiny), 0) is None


def test_whole_words_are_those_of_the_language(real):
    tokens = tokens_of(real)

    def words(*texts):
        return {tokens[number] for number in whole_words(real, texts)}

    english = words("pool")
    assert {"Ġthermostat", "ĠDishwasher"[:5], "Ġa", "ĠI"} <= english
    assert not {"Ġ", "Ġ_", "pool", "ĠUSA", "ĠgetName", ".get", "Ġ12"} & english
    assert all(token.isascii() for token in (t[1:] for t in english))
    german = words("Größe ähnlich ÜBER")
    assert german > english
    assert {tokens[real.encode(" für", special=False)[0]]} <= german - english
    assert len(words("Когда меняли насос?")) > len(english) + 100


def test_a_vocabulary_that_spells_otherwise_is_noticed(tiny):
    trimmed = trim(tiny, (), 0)
    whole = tiny.encode("pool", special=False)
    with pytest.raises(ExportError, match="spells 'poox' for 'pool'"):
        trimmed.split_otherwise(whole, trimmed.tokenizer.encode("poox", special=False))


def test_other_tokens_in_training_are_noticed(tiny, household):
    prompt, cut = build_prompt(household, tiny), trim(tiny, (), 0).tokenizer
    check_questions(prompt, cut, cut, corpus())
    with pytest.raises(ExportError, match=r"question 'gutters\?': training has tokens"):
        check_questions(prompt, tiny, cut, ["gutters?"])


# The file


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_embedding_and_head(tied, make_checkpoint, tmp_path, household, monkeypatch):
    from gguf import GGUFReader

    monkeypatch.setattr(
        "qcat_convert.weights._CHUNK", 64 * 20
    )  # some chunks have no row that is kept
    checkpoint = make_checkpoint("qwen3", hidden=64, tied=tied)
    base, size = checkpoint.base, checkpoint.model.config.vocab_size
    tokenizer = HubTokenizer(base)
    trimmed = trim(tokenizer, (), 300)
    count = len(trimmed.rows)
    tensors = []
    for name, vocabulary, rows in (
        ("whole", read_vocabulary(tokenizer, size), None),
        ("cut", read_vocabulary(trimmed.tokenizer, count), trimmed.rows),
    ):
        file = tmp_path / f"{name}.gguf"
        convert(job_of(household, file, None, base, vocabulary=vocabulary, rows=rows))
        tensors.append({tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors})
    whole, cut = tensors
    assert whole.keys() == cut.keys()
    assert ("output.weight" in cut) != tied
    for name, values in cut.items():
        by_token = name in ("token_embd.weight", "output.weight")
        assert np.array_equal(values, whole[name][list(trimmed.rows)] if by_token else whole[name])
        assert not by_token or len(values) == count < len(tokens_of(tokenizer))
    assert read_header(tmp_path / "cut.gguf").metadata["qwen3.vocab_size"] == count


def split(household):
    """Texts to train on, and held-out ones with their labels."""
    examples = read_examples(EXAMPLE / "questions.jsonl", household)
    return [e.text for e in examples[::180]], [(e.text, e.label) for e in examples[90::180]]


@pytest.mark.parametrize(
    ("kind", "hidden", "quantization", "style", "verbalizer"),
    [
        ("qwen3", 256, "q4_k_m", "plain", "name"),
        ("qwen3", 64, "q8_0", "chat", "code"),
        ("qwen2", 64, "q4_0", "plain", "code"),
    ],
)
def test_same_answers_where_all_tokens_are_kept(
    kind, hidden, quantization, style, verbalizer, make_checkpoint, household, tmp_path
):
    task = household.replace(style=style, verbalizer=verbalizer)
    training, held_out = split(household)
    checkpoint = make_checkpoint(kind, hidden=hidden)
    reports, answers = {}, {}
    for merges in (None, 200):
        reports[merges] = export(
            Request(
                task,
                tmp_path / str(merges),
                adapter=checkpoint.adapter,
                quantization=quantization,
                merges=merges,
                held_out=tuple(Example(*one) for one in held_out),
                training=tuple(training),
                max_flips=1,
            )
        )
        with Classifier.open(tmp_path / str(merges) / "household.gguf") as classifier:
            asked = [*training, *(text for text, _ in held_out)]
            answers[merges] = [classifier.ask(text) for text in asked]
    assert "vocabulary" not in reports[None]
    found = reports[200]["vocabulary"]
    assert found["tokens"] < found["of"] - 200
    assert found["training"] == {"questions": len(training), "split_otherwise": 0}
    assert 0 < found["held_out"]["split_otherwise"] < found["held_out"]["questions"]
    # The matrix is of columns, so it rounds the rows that are left as before.
    assert reports[200]["tensors"] == reports[None]["tensors"]
    assert reports[200]["bytes"] < reports[None]["bytes"]
    same = list(zip(answers[None], answers[200], strict=True))
    for whole, cut in same[: len(training)]:
        assert cut.label == whole.label
        assert cut.probabilities == pytest.approx(whole.probabilities, abs=1e-5)
        assert cut.label_mass >= whole.label_mass - 1e-6  # of fewer tokens in all
    differ = sum(
        cut.probabilities != pytest.approx(whole.probabilities, abs=1e-5) for whole, cut in same
    )
    assert differ <= found["held_out"]["split_otherwise"]
    assert reports[200]["proof"]["merged"] == reports[None]["proof"]["merged"]


def test_through_the_installed_command(qcat, call, make_checkpoint, household, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=256)
    training, held_out = split(household)
    labels = list(household.labels)
    for name, rows in (("train", [(text, 0) for text in training]), ("held", held_out)):
        lines = [json.dumps({"text": text, "label": labels[label]}) for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    args = ["export", checkpoint.adapter, "-t", EXAMPLE / "task.toml", "--vocab", "trim"]
    args += ["--quant", "q4_k_m"]
    args += ["--data", tmp_path / "held.jsonl", "--train-data", tmp_path / "train.jsonl"]

    refused = call(*args, "--merges", 0, "--max-flips", 0, "-o", tmp_path / "out")
    assert refused.returncode == 1
    assert "labels changed, more than 0.0%, and accuracy went from 0." in refused.stderr
    assert ": export with --vocab full, or with --quant auto" in refused.stderr
    assert sorted(os.listdir(tmp_path)) == ["held.jsonl", "out.report.json", "train.jsonl"]

    done = qcat(*args, "--merges", 300, "--max-flips", 1, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    found = report["vocabulary"]
    line = vocabulary_line(found)
    assert (found["merges"], found["of"]) == (300, 2112 + 64)
    assert f"vocabulary: {line}" in done.stdout
    assert f"- vocabulary: {line}\n" in (tmp_path / "out" / "MODEL_CARD.md").read_text("utf-8")
    gguf = tmp_path / "out" / "household.gguf"
    shown = call("show", gguf).stdout
    assert line in shown
    assert f"{found['tokens']} tokens in the vocabulary" in shown
    asked = qcat("ask", "-m", gguf, "--json", "when was the pool pump replaced", "水泵")
    assert [json.loads(row)["label"] in labels for row in asked.stdout.splitlines()] == [True] * 2
    assert _recipe(Bundle.read(gguf))["merges"] == 300  # so that `qcat retrain` makes its like


def test_nothing_to_trim_is_said(call, make_checkpoint, tmp_path):
    args = ["export", make_checkpoint(hidden=64).adapter, "-t", EXAMPLE / "task.toml"]
    done = call(*args, "--vocab", "trim", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "warning: vocabulary not trimmed: with 16000 merges all of its tokens" in done.stderr
    assert "vocabulary" not in json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))


@pytest.mark.parametrize("more", [["--merges", 300], ["--vocab", "trim", "--merges", -1]])
def test_options_that_make_no_sense(more, call, tmp_path):
    done = call("export", tmp_path, "-o", tmp_path / "out", *more)
    assert done.returncode == 2
    assert "--merges" in done.stderr


def test_a_question_that_smaller_tokens_make_too_long(make_checkpoint, household, tmp_path):
    """Told before the merge, which may take minutes."""
    adapter, text = make_checkpoint(hidden=64).adapter, "(When" * 100
    more = {"adapter": adapter, "held_out": (Example(text, 0),), "merges": 0}
    with pytest.raises(DataError, match="tokens, room for 256: shorten it"):
        export(Request(household, tmp_path / "out", **more))
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizers_are_refused(call, make_checkpoint, tmp_path):
    base = make_checkpoint(hidden=64).base
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = json.loads((base / "tokenizer.json").read_text("utf-8"))
    pieces = [[token, -1.0] for token in spec["model"]["vocab"]]
    spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    args = ["export", tmp_path, "-t", EXAMPLE / "task.toml", "--vocab", "trim"]
    done = call(*args, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "BPE expected, found Unigram" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("vocabulary", [{}, {"merges": "many"}, 5])
def test_a_damaged_report_is_told_to_retrain(vocabulary, house, tmp_path):
    from qcat.gguf.sections import REPORT_KEY, write_sections

    file = tmp_path / "house.gguf"
    file.write_bytes(house.read_bytes())
    write_sections(file, {REPORT_KEY: {"vocabulary": vocabulary}})
    with pytest.raises(BundleError, match="not what `qcat export` writes"):
        _recipe(Bundle.read(file))
