"""What is particular to Gemma 3: SentencePiece, a begin token, its turns, layers with a window."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import EXAMPLE
from export_job import job_of
from hypothesis import given
from hypothesis import strategies as st
from plain_logits import gguf_log_probabilities, torch_log_probabilities
from qcat_convert.gate import check_base, check_splitting
from qcat_convert.stream import convert
from qcat_convert.trim import trim

from qcat.backends.llama import LlamaModel
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import build_prompt, clean_question
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError, QuestionError
from qcat.gguf.architecture import FULL, SLIDING
from qcat.workflows.train import check_trainable


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("gemma3")


@pytest.fixture(scope="module")
def served(checkpoint, household, tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "m.gguf"
    convert(job_of(household, path, checkpoint.adapter))
    with LlamaModel(path, vocab_only=True) as model:
        yield model


@pytest.fixture
def base(checkpoint, tmp_path):
    """A copy of the base, to be spoiled."""
    shutil.copytree(checkpoint.base, tmp_path / "base")
    return tmp_path / "base"


def change(path, edit):
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data), "utf-8")


@given(st.text(min_size=1, max_size=60))
def test_any_question_has_the_same_tokens_in_both(checkpoint, served, text):
    tokenizer = HubTokenizer(checkpoint.base)
    try:
        question = clean_question(text)
    except QuestionError:
        return
    if tokenizer.encode(question, special=True) == tokenizer.encode(question, special=False):
        assert served.encode(question, special=False) == tokenizer.encode(question, special=False)


def test_all_example_questions_have_the_same_tokens(checkpoint, served, household):
    tokenizer = HubTokenizer(checkpoint.base)
    ours = EncodedTask.build(household, tokenizer)
    theirs = EncodedTask.build(household, served)
    assert ours.prefix == theirs.prefix
    for line in (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines():
        question = clean_question(json.loads(line)["text"])
        assert ours.ids(question) == theirs.ids(question)


def test_every_prompt_begins_with_the_begin_token(checkpoint, served, household):
    tokenizer = HubTokenizer(checkpoint.base)
    for style in ("plain", "chat"):
        encoded = EncodedTask.build(household.replace(style=style), tokenizer)
        assert encoded.prefix[0] == tokenizer.token_id("bos_token")
        assert encoded.prompt.text("who?").startswith("<bos>")
    assert served.begin == tokenizer.begin == "<bos>"


def test_chat_style_is_gemmas_turns(checkpoint, household):
    text = build_prompt(household.replace(style="chat"), HubTokenizer(checkpoint.base)).text("who?")
    assert text.startswith("<bos><start_of_turn>user\nClassify the homeowner question")
    assert text.endswith("\n\nwho?<end_of_turn>\n<start_of_turn>model\n")


def test_layers_with_a_window_see_no_further(checkpoint, household, tmp_path):
    """The tiny model's window is 16 tokens; a prompt is far longer."""
    path = tmp_path / "m.gguf"
    convert(job_of(household, path, None, checkpoint.base))
    tokenizer = HubTokenizer(checkpoint.base)
    ids = list(EncodedTask.build(household, tokenizer).prefix)
    assert len(ids) > 60
    theirs = gguf_log_probabilities(path, ids)
    ours = torch_log_probabilities(checkpoint.model.eval(), ids)
    assert np.abs(theirs - ours).max() < 2e-2
    wide = type(checkpoint.model).from_pretrained(checkpoint.base, sliding_window=4096).eval()
    assert np.abs(torch_log_probabilities(wide, ids) - ours).max() > 0.1


def test_the_vocabulary_is_not_trimmed(checkpoint):
    with pytest.raises(ExportError, match="cannot be trimmed: export with --vocab full"):
        trim(HubTokenizer(checkpoint.base), (), 100)


def test_merges_that_are_not_sentencepieces_are_noticed_before_training(base, household):
    """llama.cpp merges whatever makes a token; a tokenizer that does not is another one."""

    def halve(spec):
        spec["model"]["merges"] = spec["model"]["merges"][::2]

    change(base / "tokenizer.json", halve)
    fitted = check_base(base, household)
    with pytest.raises(ExportError, match="training has tokens"):
        check_splitting(fitted, ["When was the pool pump replaced?"])


LAYERS = {
    "an order of its own": ([FULL, *[SLIDING] * 6], "in an order that llama.cpp does not know"),
    "no window": ([FULL] * 7, "in an order that llama.cpp does not know"),
}


@pytest.mark.parametrize(("kinds", "message"), LAYERS.values(), ids=LAYERS)
def test_layers_in_another_order_are_refused(base, household, kinds, message):
    change(base / "config.json", lambda config: config.update(layer_types=kinds))
    with pytest.raises(ExportError, match=message):
        check_trainable(str(base), household)


FIELDS = {
    "theta": (
        lambda config: config["rope_parameters"][SLIDING].update(rope_theta=5000.0),
        "rope of its layers with a window",
    ),
    "scaled rope": (
        lambda config: config["rope_parameters"][FULL].update(rope_type="linear", factor=8.0),
        "rope type 'linear'",
    ),
    "scale of attention": (
        lambda config: config.update(query_pre_attn_scalar=168),
        "query_pre_attn_scalar is 168",
    ),
    "soft caps": (lambda config: config.update(final_logit_softcapping=30.0), "softcapping is on"),
    "both ways": (lambda config: config.update(use_bidirectional_attention=True), "is on"),
    "activation": (lambda config: config.update(hidden_activation="silu"), "activation 'silu'"),
}


@pytest.mark.parametrize(("edit", "message"), FIELDS.values(), ids=FIELDS)
def test_what_the_gguf_would_lack_is_refused(base, household, edit, message):
    change(base / "config.json", edit)
    with pytest.raises(ExportError, match=message):
        check_trainable(str(base), household)
