"""Transformers' tokenizer and llama.cpp's give the same ids, in every style and verbalizer."""

from __future__ import annotations

import json
from functools import cache

import pytest
from awkward_texts import TEXT
from conftest import REAL_TOKENIZER, needs_real_tokenizer
from hypothesis import given, settings
from qcat_convert.trim import trim
from qcat_convert.vocab import CONTROL, USER_DEFINED, read_vocabulary
from tokenizers import AddedToken

from qcat.backends.llama import LlamaModel
from qcat.encoding.prompt import (
    build_prompt,
    check_boundary,
    clean_question,
    encode_answers,
    encode_segments,
    with_codes,
)
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError, ModelError, QuestionError, TaskError
from qcat.report.modelfile import modelfile, render
from qcat.task import Task


def vocabulary_file(folder, tokenizer, size):
    """A GGUF with a tokenizer and one tensor: llama.cpp opens it for its vocabulary alone."""
    import numpy as np
    from gguf import GGUFWriter
    from qcat_convert.writer import _add_vocabulary

    path = folder / "vocabulary.gguf"
    writer = GGUFWriter(path, "qwen3")
    _add_vocabulary(writer, read_vocabulary(tokenizer, size))
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["qwen3", "llama", "real", "llama trimmed", "real trimmed"])
def pair(request, make_checkpoint, tmp_path_factory):
    """The Hugging Face tokenizer and llama.cpp's, of one vocabulary."""
    kind, _, trimmed = request.param.partition(" ")
    if kind == "real":
        if not (REAL_TOKENIZER / "tokenizer.json").is_file():
            pytest.skip(f"no Qwen3 tokenizer at {REAL_TOKENIZER} (set QCAT_SHARED)")
        tokenizer, size = HubTokenizer(REAL_TOKENIZER), 151936
    else:
        checkpoint = make_checkpoint(kind, hidden=64)
        tokenizer, size = HubTokenizer(checkpoint.base), checkpoint.model.config.vocab_size
    if trimmed:
        cut = trim(tokenizer, (), size // 10)
        tokenizer, size = cut.tokenizer, len(cut.rows)
    path = vocabulary_file(tmp_path_factory.mktemp("vocabulary"), tokenizer, size)
    with LlamaModel(path, vocab_only=True) as model:
        yield tokenizer, model


def test_same_ids_for_any_question(pair):
    tokenizer, model = pair

    @settings(max_examples=1500)
    @given(TEXT)
    def check(text):
        try:
            question = clean_question(text)
        except QuestionError:
            return
        for special in (False, True):
            assert tokenizer.encode(question, special=special) == model.encode(
                question, special=special
            )

    check()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("WHO FIXED THE SPRINKLERS", "who fixed the sprinklers"),
        ("POOL PUMP?", "pool pump?"),
        ("ЦЕНА ЗАБОРА, КОГДА", "цена забора, когда"),
        ("\u0130STANBUL KAPISI", "i\u0307stanbul kapisi"),
        ("STRASSE UND ZAUN 12", "strasse und zaun 12"),
        # Not typed with caps lock on: a name among words, one word, codes, other scripts.
        ("WHO fixed the SPRINKLERS", "WHO fixed the SPRINKLERS"),
        ("EADDRINUSE", "EADDRINUSE"),
        ("E 1042", "E 1042"),
        ("RP50587 X200 Y", "RP50587 X200 Y"),
        ("HVAC 90X2 TP", "HVAC 90X2 TP"),
        ("电费 多少", "电费 多少"),
    ],
)
def test_capitals_become_lower_case(text, cleaned):
    assert clean_question(text) == cleaned


@given(TEXT | TEXT.map(str.upper))
def test_cleaning_twice_is_cleaning_once(text):
    try:
        question = clean_question(text)
    except QuestionError:
        return
    assert clean_question(question) == question


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("verbalizer", ["name", "code"])
def test_same_prompt_in_training_runtime_and_modelfile(pair, style, verbalizer, household):
    tokenizer, model = pair
    task = with_codes(household.replace(style=style, verbalizer=verbalizer), tokenizer)
    assert task == with_codes(household.replace(style=style, verbalizer=verbalizer), model)
    prompt = build_prompt(task, tokenizer)
    assert prompt == build_prompt(task, model)
    check_boundary(prompt, model)
    assert encode_answers(task, tokenizer) == encode_answers(task, model)
    text = modelfile(task, prompt, gguf="m.gguf", parameters={})

    @settings(max_examples=300)
    @given(TEXT)
    def check(raw):
        try:
            question = clean_question(raw)
        except QuestionError:
            return
        whole = (*prompt.prefix, *prompt.rest(question))
        ids = encode_segments(whole, tokenizer)
        assert ids == encode_segments(whole, model)
        assert ids == encode_segments(prompt.prefix, model) + encode_segments(
            prompt.rest(question), model
        )
        if model.encode(question, special=True) == model.encode(question, special=False):
            assert model.encode(render(text, question), special=True) == ids

    check()


def test_markup_in_a_question_is_plain_text(pair):
    _, model = pair
    controls = {model.encode(text, special=True)[0] for text in ("<|im_end|>", "<|im_start|>")}
    ids = model.encode("end it <|im_end|> now <|im_start|>", special=False)
    assert not controls & set(ids)


@needs_real_tokenizer
def test_household_labels_differ_in_their_first_token(household):
    tokenizer = HubTokenizer(REAL_TOKENIZER)
    with_space = {ids[0] for ids in encode_answers(household, tokenizer)}
    without = {tokenizer.encode(label, special=False)[0] for label in household.labels}
    assert len(with_space) == 18
    assert len(without) == 16


@needs_real_tokenizer
def test_chat_style_is_what_the_stock_template_renders(household):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = json.loads((REAL_TOKENIZER / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        config["chat_template"]
    )
    prompt = build_prompt(household.replace(style="chat"), HubTokenizer(REAL_TOKENIZER))
    system = prompt.prefix[1].text
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "Who cleaned the gutters?"},
    ]
    rendered = template.render(messages=messages, add_generation_prompt=True, enable_thinking=False)
    assert rendered == prompt.text("Who cleaned the gutters?")


@needs_real_tokenizer
def test_codes_for_500_labels_in_the_real_vocabulary():
    tokenizer = HubTokenizer(REAL_TOKENIZER)
    labels = {f"label {number}": "" for number in range(500)}
    task = with_codes(Task("many", labels, verbalizer="code"), tokenizer)
    answers = encode_answers(task, tokenizer)
    assert all(len(ids) == 1 for ids in answers)
    assert len(set(answers)) == 500
    assert next(iter(task.codes.values())) == "AA"


def test_too_few_codes_is_an_error(make_checkpoint):
    tokenizer = HubTokenizer(make_checkpoint(hidden=64).base)
    labels = {f"label {number}": "" for number in range(500)}
    with pytest.raises(TaskError, match="two-letter tokens for 500 labels"):
        with_codes(Task("many", labels, verbalizer="code"), tokenizer)


def test_chat_style_needs_its_tokens(household):
    class Letters:
        begin = None

        def encode(self, text, *, special):
            return [ord(char) for char in text]

    with pytest.raises(ModelError, match=r"neither <\|im_start\|> nor"):
        build_prompt(household.replace(style="chat"), Letters())


def test_added_words_are_kept_and_found_in_questions(tmp_path):
    import tiny_model

    words = [AddedToken("poolpumpX1", normalized=False), AddedToken("<part>", normalized=False)]
    size = tiny_model.make_tokenizer(tmp_path / "t", ["some text"] * 10, size=300, added=words)
    tokenizer = HubTokenizer(tmp_path / "t")
    found = read_vocabulary(tokenizer, size)
    assert found.types[found.tokens.index("poolpumpX1")] == USER_DEFINED
    assert found.types[found.tokens.index("<part>")] == CONTROL
    with LlamaModel(vocabulary_file(tmp_path, tokenizer, size), vocab_only=True) as model:
        for text in ("my poolpumpX1 broke", "my <part> broke"):
            assert tokenizer.encode(text, special=False) == model.encode(text, special=False)
        assert found.tokens.index("poolpumpX1") in model.encode("a poolpumpX1", special=False)


@cache
def specification(folder):
    return (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["model"].update(byte_fallback=True), "only that of spaces"),
        (lambda spec: spec["model"].update(ignore_merges=True), "ignore_merges is set"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "only NFC can be followed"),
        (lambda spec: spec["added_tokens"][0].update(lstrip=True), "strips its surroundings"),
        (lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(0), "llama.cpp would split"),
    ],
)
def test_tokenizers_that_llama_cpp_would_not_follow(change, message, make_checkpoint, tmp_path):
    base = make_checkpoint(hidden=64).base
    spec = json.loads(specification(base))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text())
    with pytest.raises(ExportError, match=message):
        read_vocabulary(HubTokenizer(tmp_path), 4096)


def test_vocabulary_larger_than_the_embedding(make_checkpoint):
    tokenizer = HubTokenizer(make_checkpoint(hidden=64).base)
    with pytest.raises(ExportError, match="the model's embedding has 100 rows"):
        read_vocabulary(tokenizer, 100)
