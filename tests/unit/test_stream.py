"""Export part by part gives the numbers that the whole merged model gives, and holds little."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import apart_functions
import numpy as np
import pytest
import tiny_model
import torch
from conftest import EXAMPLE
from export_job import job_of
from qcat_convert.apart import apart
from qcat_convert.merge import Merger
from qcat_convert.source import locate
from qcat_convert.stream import convert
from qcat_convert.weights import Checkpoint, Rows
from whole_model import parts, whole

from qcat.encoding.scoring import label_log_probabilities
from qcat.errors import DataError, ExportError, ModelError
from qcat.task import Task

KINDS = ("qwen3", "qwen2", "llama", "gemma3")
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}}


def assert_same_as_whole(adapter, base=None):
    found, merger = parts(adapter, base)
    expected = whole(adapter, base).state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name  # to the last bit
    assert list(merger.shapes) == [n for n in found if not (merger.tied and n == "lm_head.weight")]
    return merger


def adapter_of(checkpoint, folder, **settings):
    model = type(checkpoint.model).from_pretrained(checkpoint.base)
    tiny_model.make_adapter(folder, model, str(checkpoint.base), **settings)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_tensors_are_those_of_the_whole_model(kind, tied, make_checkpoint):
    checkpoint = make_checkpoint(kind, hidden=64, tied=tied)
    assert assert_same_as_whole(checkpoint.adapter).tied == tied
    assert_same_as_whole(None, str(checkpoint.base))


@pytest.mark.filterwarnings(
    "ignore:Model .*`tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer"
)
@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"use_rslora": True}, True),
        ({"use_dora": True}, True),
        (PATTERNS, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"trainable_token_indices": {"embed_tokens": [5, 9]}}, True),
    ],
    ids=str,
)
def test_adapters_of_many_kinds(settings, tied, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    adapter = adapter_of(checkpoint, tmp_path / "adapter", **settings)
    assert assert_same_as_whole(adapter).tied == tied


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_lora_on_ends_that_are_not_tied(module, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64, tied=False)
    adapter = adapter_of(checkpoint, tmp_path / "adapter", target_modules=["q_proj", module])
    assert not assert_same_as_whole(adapter).tied


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [8, -8])
def test_an_adapter_with_another_number_of_tokens(more, tied, make_checkpoint, tmp_path):
    """PEFT then saves embedding and head of its own accord."""
    checkpoint = make_checkpoint("qwen3", hidden=64, tied=tied)
    model = type(checkpoint.model).from_pretrained(checkpoint.base)
    model.resize_token_embeddings(model.config.vocab_size + more)
    tiny_model.make_adapter(tmp_path / "adapter", model, str(checkpoint.base))
    assert assert_same_as_whole(tmp_path / "adapter").tied == tied


def test_a_base_in_bfloat16_and_in_several_files(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    base = tmp_path / "base"
    shutil.copytree(checkpoint.base, base)
    (base / "model.safetensors").unlink()
    model = type(checkpoint.model).from_pretrained(checkpoint.base, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="200KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    assert_same_as_whole(checkpoint.adapter, str(base))

    index = base / "model.safetensors.index.json"
    text = index.read_text()
    for wrong, message in (
        ("{}", "does not say which file"),
        ("[", "does not say which file"),
        (text.replace("model-00001", "../model-00001"), "not beside it"),
        (text.replace("model-00001", "model-00099"), "model-00099"),
    ):
        index.write_text(wrong)
        with pytest.raises(ModelError, match=message):
            locate(checkpoint.adapter, str(base))


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer")
@pytest.mark.parametrize(("change", "tied"), [(0.0, True), (1.0, False)])
def test_a_base_that_stores_both_ends_is_tied_by_the_numbers(
    change, tied, make_checkpoint, tmp_path
):
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint("qwen3", hidden=64)
    base = tmp_path / "base"
    shutil.copytree(checkpoint.base, base)
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1] += change
    save_file({**tensors, "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    assert assert_same_as_whole(checkpoint.adapter, str(base)).tied == tied
    # and one that stores the head alone
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    assert assert_same_as_whole(checkpoint.adapter, str(base)).tied


def test_one_layer_is_in_memory_at_a_time(make_checkpoint):
    merger = Merger(locate(make_checkpoint("qwen3", hidden=64, layers=4).adapter, None))
    seen = []
    for layer in merger.layers():
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(p.is_meta for earlier in seen for p in earlier.parameters())
        assert "lora" not in str(layer).lower()
        seen.append(layer)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_label_distributions_are_those_of_the_whole_model(kind, make_checkpoint, tmp_path):
    """Of labels that share tokens at several depths, and questions of many lengths."""
    labels = ("pool", "pool pump", "pool pump filter", "water heater", "water", "fence")
    task = Task("sorts", dict.fromkeys(labels, ""))
    lines = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:600:20]]
    checkpoint = make_checkpoint(kind)
    texts = [row["text"] for row in rows]
    job = job_of(task, tmp_path / "m.gguf", checkpoint.adapter, held_out=texts)
    assert len(job.trie.deep_branches) >= 2
    assert len({len(rest) for rest in job.held_out}) > 3
    found = convert(job).reference

    model = whole(checkpoint.adapter)
    for row, rest in zip(found, job.held_out, strict=True):
        logits = []
        for branch in job.trie.branches:
            with torch.inference_mode():
                ids = torch.tensor([[*job.prefix, *rest, *branch.path]])
                logits.append(model(ids).logits[0, -1][branch.tokens].numpy())
        np.testing.assert_allclose(row, label_log_probabilities(job.trie, logits), atol=2e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "holds infinite or undefined numbers"),
        (float("inf"), "holds infinite or undefined numbers"),
        (1e5, "does not fit float16: export with bf16"),
    ],
)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_numbers_that_cannot_be_written_are_named(
    name, value, message, make_checkpoint, household, tmp_path
):
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint("qwen3", hidden=64)
    shutil.copytree(checkpoint.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[name][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    job = job_of(household, tmp_path / "m.gguf", None, tmp_path / "base")
    with pytest.raises(ExportError, match=f"{name} {message}"):
        convert(job)


def test_rows_are_padded_and_cut():
    stored = torch.arange(12.0).reshape(4, 3)
    more, fewer = Rows(stored, 6), Rows(stored, 2)
    assert torch.equal(torch.cat(list(more.chunks())), torch.cat([stored, torch.zeros(2, 3)]))
    assert torch.equal(more.take([5, 1]), torch.stack([torch.zeros(3), stored[1]]))
    assert torch.equal(torch.cat(list(fewer.chunks())), stored[:2])
    assert more.equals(Rows(torch.cat([stored, torch.zeros(2, 3)]), 6))
    assert not more.equals(fewer)
    assert not fewer.equals(Rows(stored + 1, 2))


def test_a_checkpoint_is_read_as_it_was_saved(make_checkpoint):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    files = Checkpoint(checkpoint.base)
    for name, tensor in checkpoint.model.state_dict().items():
        if name in files.shapes:
            assert files.shapes[name] == tuple(tensor.shape)
            assert torch.equal(files.read(name), tensor)


def test_a_process_apart_reports_returns_raises_and_dies():
    def call(function, argument, progress=print, prepare=apart_functions.nothing):
        with apart(function, prepare) as run:
            return run(argument, progress)

    told = []
    assert call(apart_functions.doubled, 21, lambda *what: told.append(what)) == 42
    assert told == [(1, 2)]
    with pytest.raises(DataError, match="no such row"):
        call(apart_functions.refused, "no such row")
    with pytest.raises(RuntimeError, match="OddError: oh!"):
        call(apart_functions.broken, "oh")
    with pytest.raises(ExportError, match="was there enough memory"):
        call(apart_functions.killed, None)
    assert call(apart_functions.doubled, 4, prepare=apart_functions.unprepared) == 8
    with pytest.raises(ExportError, match=r"from outside \(status 3\): rerun the command"):
        call(apart_functions.doubled, 4, prepare=apart_functions.ended)


def test_a_process_apart_that_is_not_needed_ends():
    with apart(apart_functions.doubled, apart_functions.nothing):
        [child] = multiprocessing.active_children()
    assert not child.is_alive()
