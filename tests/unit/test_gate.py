"""A base that export would refuse is refused by lint and before the first step of training."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import EXAMPLE
from qcat_convert.gate import check_weights
from safetensors.numpy import load_file, save_file

from qcat.base.checkpoint import load_base
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError, ModelError, QcatError, TaskError
from qcat.task import Task
from qcat.workflows.train import check_trainable, prepare_base

TEXT = "When was the pool pump replaced?"


@pytest.fixture
def base(make_checkpoint, tmp_path):
    """A copy of a tiny base, to be spoiled."""
    shutil.copytree(make_checkpoint(hidden=64).base, tmp_path / "base")
    return tmp_path / "base"


def change(path, edit):
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data), "utf-8")


def set_token(spec, **fields):
    spec["added_tokens"][0].update(fields)


# Ids do not depend on what was saved with the calls that somebody made

SAVED = {
    "padding": {
        "padding": {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }
    },
    "fixed padding": {
        "padding": {
            "strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }
    },
    "truncation": {
        "truncation": {
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_what_a_call_left_in_the_tokenizer_is_ignored(base, saved):
    plain = HubTokenizer(base).encode(TEXT, special=False)
    change(base / "tokenizer.json", lambda spec: spec.update(saved))
    tokenizer = HubTokenizer(base)
    assert tokenizer.encode(TEXT, special=False) == plain
    assert len(tokenizer.encode(" pool", special=False)) < 8


def test_dropout_is_ignored(base):
    plain = HubTokenizer(base).encode(TEXT, special=False)
    change(base / "tokenizer.json", lambda spec: spec["model"].update(dropout=0.9))
    tokenizer = HubTokenizer(base)
    assert [tokenizer.encode(TEXT, special=False) for _ in range(5)] == [plain] * 5


def test_a_begin_token_of_the_post_processor_is_ignored(base):
    plain = HubTokenizer(base).encode(TEXT, special=False)
    piece = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["x"]}},
    }
    change(base / "tokenizer.json", lambda spec: spec.update(post_processor=template))
    assert HubTokenizer(base).encode(TEXT, special=False) == plain


def test_a_tokenizer_without_added_tokens_is_read(base):
    plain = HubTokenizer(base).encode(TEXT, special=False)

    def drop(spec):
        # The end token has to stay known; the base's own vocabulary has no such entry.
        del spec["added_tokens"]
        spec["model"]["vocab"].setdefault("<|endoftext|>", len(spec["model"]["vocab"]))

    ids = {added["content"]: added["id"] for added in HubTokenizer(base).spec["added_tokens"]}

    def keep_ids(spec):
        drop(spec)
        spec["model"]["vocab"].update(ids)

    change(base / "tokenizer.json", keep_ids)
    assert HubTokenizer(base).encode(TEXT, special=False) == plain


# One gate


def normalizer(kind):
    return lambda base: change(
        base / "tokenizer.json", lambda spec: spec.update(normalizer={"type": kind})
    )


def spec_of(**fields):
    return lambda base: change(base / "tokenizer.json", lambda spec: spec.update(fields))


def config_of(**fields):
    return lambda base: change(base / "config.json", lambda config: config.update(fields))


def without(key):
    return lambda base: change(base / "config.json", lambda config: config.pop(key))


def added(**fields):
    return lambda base: change(base / "tokenizer.json", lambda spec: set_token(spec, **fields))


def text(name, data):
    return lambda base: (base / name).write_bytes(data)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BASES = {
    "strips to the right": (added(rstrip=True), "strips its surroundings"),
    "strips to the left": (added(lstrip=True), "strips its surroundings"),
    "single word": (added(single_word=True), "strips its surroundings"),
    "id without a row": (added(id=10**6), "but the model's embedding has"),
    "ignore merges": (
        lambda base: change(
            base / "tokenizer.json", lambda spec: spec["model"].update(ignore_merges=True)
        ),
        "ignore_merges is set",
    ),
    "NFKC": (normalizer("NFKC"), "only NFC can be followed"),
    "lower case": (normalizer("Lowercase"), "only NFC can be followed"),
    "pre-tokenizer": (spec_of(pre_tokenizer={"type": "Whitespace"}), "neither Qwen2's nor"),
    "no pre-tokenizer": (spec_of(pre_tokenizer=None), "neither Qwen2's nor"),
    "short context": (config_of(max_position_embeddings=300), "has a context of 300 tokens"),
    "unknown architecture": (
        config_of(architectures=["Gemma3ForConditionalGeneration"]),
        "architecture Gemma3ForConditionalGeneration cannot be converted",
    ),
    "text_config": (
        lambda base: (base / "config.json").write_text(
            json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": {}})
        ),
        "architecture Qwen2_5_VLForConditionalGeneration cannot be converted",
    ),
    "no architecture": (without("architectures"), "architecture (none) cannot be converted"),
    "no layers": (without("num_hidden_layers"), "num_hidden_layers is None"),
    "layers in words": (config_of(num_hidden_layers="two"), "num_hidden_layers is 'two'"),
    "more layers than there are": (config_of(num_hidden_layers=3), "lacks model.layers.2."),
    "no heads": (config_of(num_attention_heads=0), "num_attention_heads is 0: a whole number"),
    "of another kind": (config_of(model_type="llama"), "model_type is 'llama', and 'qwen3'"),
    "code of its own": (
        config_of(model_type="qwen3_custom", auto_map={"AutoConfig": "configuration_x.X"}),
        "model_type is 'qwen3_custom'",
    ),
    "a leftover adapter": (text("adapter_config.json", b"{}"), "an adapter lies beside the model"),
    "a value of another type": (config_of(rms_norm_eps="small"), "config.json: "),
    "activation": (config_of(hidden_act="gelu"), "activation 'gelu'"),
    "byte order mark": (
        lambda base: text("config.json", b"\xef\xbb\xbf" + (base / "config.json").read_bytes())(
            base
        ),
        "config.json: begins with a byte order mark",
    ),
    "pointer for the configuration": (text("config.json", POINTER), "a Git LFS pointer"),
    "pointer for the tokenizer": (text("tokenizer.json", POINTER), "a Git LFS pointer"),
    "not JSON": (text("config.json", b"{,"), "config.json: not JSON"),
    "a list": (text("config.json", b"[]"), "config.json: a JSON object expected"),
    "no vocabulary": (text("tokenizer.json", b"{}"), "has no vocabulary"),
    "odd added tokens": (spec_of(added_tokens=[1]), "added_tokens are not what"),
    "WordPiece": (
        lambda base: change(
            base / "tokenizer.json",
            lambda spec: spec.update(
                model={"type": "WordPiece", "vocab": {"<|endoftext|>": 0, "[UNK]": 1},
                       "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                       "max_input_chars_per_word": 100}
            ),
        ),
        "BPE expected, found WordPiece",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BASES.values(), ids=BASES)
def test_a_base_is_refused_before_it_is_trained(base, household, spoil, message):
    spoil(base)
    for check in (check_trainable, lambda base, task: prepare_base(base, None, None, task, [])):
        with pytest.raises(QcatError) as caught:
            check(str(base), household)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


TASKS = {
    "description": {"labels": {"pool": "what ends <|im_end|>", "car": ""}},
    "instruction": {"instruction": "Answer. <|im_start|>", "labels": {"pool": "", "car": ""}},
    "label": {"labels": {"pool <|endoftext|>": "", "car": ""}},
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_that_spells_a_special_token_is_refused(base, task):
    with pytest.raises(TaskError, match="spells a special token"):
        check_trainable(str(base), Task("odd", **task))


def test_lint_and_train_say_the_same_line(qcat, base, tmp_path):
    normalizer("NFKC")(base)
    questions = tmp_path / "questions.jsonl"
    shutil.copy(EXAMPLE / "questions.jsonl", questions)
    done = qcat("lint", EXAMPLE / "task.toml", "--base", base)
    assert done.returncode == 1
    line = f"{base / 'tokenizer.json'}: normalizer " + '{"type": "NFKC"}: only NFC can be followed'
    assert f"error: {line} [base]\n" in done.stdout
    done = qcat(
        "train", questions, "-t", EXAMPLE / "task.toml", "--base", base, "-o", tmp_path / "run"
    )
    assert (done.returncode, done.stderr) == (1, f"qcat: error: {line}\n")
    assert not (tmp_path / "run").exists()


def test_code_in_the_folder_is_never_run(base, household, tmp_path):
    marker = tmp_path / "ran"
    config_of(auto_map={"AutoConfig": "configuration_x.X"})(base)
    code = f"open({str(marker)!r}, 'w')\nclass X: pass\n"
    (base / "configuration_x.py").write_text(code)
    assert check_trainable(str(base), household) == base
    assert not marker.exists()


# The weights


def rename(base, edit):
    path = base / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def move(tensors, take, add):
    for name in list(tensors):
        tensors[name.replace(take, add, 1)] = tensors.pop(name)


Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = {
    "without the prefix": (
        lambda tensors: move(tensors, "model.", ""),
        "stores embed_tokens.weight where model.layers.0.",
    ),
    "compiled": (
        lambda tensors: move(tensors, "model.", "_orig_mod.model."),
        "stores _orig_mod.model.",
    ),
    "one is absent": (lambda tensors: tensors.pop(f"{Q}.weight"), f"lacks {Q}.weight (1 such"),
    "one has no place": (
        lambda tensors: tensors.update({f"{Q}.bias": tensors["model.norm.weight"]}),
        f"stores {Q}.bias (1 such tensors), which has no place in a qwen3",
    ),
}


def stored_as(edit):
    """One tensor in another type."""
    return lambda tensors: tensors.update({f"{Q}.weight": edit(tensors[f"{Q}.weight"])})


WEIGHTS |= {
    "another shape": (
        stored_as(lambda tensor: tensor[:8].copy()),
        f"{Q}.weight has the shape (8, 64), and (128, 64) is expected",
    ),
    "no numbers": (
        stored_as(lambda tensor: tensor[:0].copy()),
        f"{Q}.weight has the shape (0, 64)",
    ),
    "whole numbers": (
        stored_as(lambda tensor: tensor.astype("int8")),
        f"{Q}.weight is stored as I8: it is quantized",
    ),
    "quantized by MLX": (
        lambda tensors: tensors.update({f"{Q}.scales": tensors["model.norm.weight"]}),
        "is quantized: start from the unquantized base",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_other_names_are_refused(base, household, edit, message):
    rename(base, edit)
    with pytest.raises(ModelError) as caught:
        prepare_base(str(base), None, None, household, [])
    assert message in str(caught.value)


def test_frequencies_and_layers_above_have_no_place_and_need_none(base):
    import numpy as np

    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rename(base, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    check_weights(base)
    check_weights(base, layers=1)


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(base):
    import torch

    def spoil(tensors):
        tensors[f"{Q}.weight"][0, 0] = float("nan")

    rename(base, spoil)
    with pytest.raises(ModelError, match=r"q_proj\.weight holds numbers that are not finite"):
        load_base(base, torch.float32)


@pytest.mark.parametrize("key", ["vocab_size", "num_key_value_heads"])
def test_a_configuration_of_other_sizes_is_refused(base, household, key):
    change(base / "config.json", lambda config: config.update({key: config[key] // 2}))
    with pytest.raises(QcatError) as caught:
        prepare_base(str(base), None, None, household, [])
    assert "expected by config.json" in str(caught.value) or "embedding has" in str(caught.value)


def test_no_weights_at_all(base, household):
    (base / "model.safetensors").rename(base / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        prepare_base(str(base), None, None, household, [])


def test_a_pointer_in_place_of_the_weights(base, household):
    (base / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match="a Git LFS pointer"):
        prepare_base(str(base), None, None, household, [])


def test_export_asks_the_same_questions(base, make_checkpoint, household, tmp_path):
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    added(rstrip=True)(base)
    adapter = make_checkpoint(hidden=64).adapter
    with pytest.raises(ExportError, match="strips its surroundings"):
        export(Request(household, tmp_path / "out", adapter=adapter, base=str(base)))
