"""A base out of a GGUF: the same weights, the same tokens, and one line for what cannot be one."""

from __future__ import annotations

import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, Checkpoint
from export_job import job_of
from hypothesis import given
from hypothesis import strategies as st
from plain_logits import PROMPT, gguf_log_probabilities, torch_log_probabilities
from qcat_convert.quantize import quantize
from qcat_convert.stream import convert
from safetensors.torch import load_file

from qcat.backends.llama import LlamaModel
from qcat.base.checkpoint import base_folder, load_base
from qcat.base.gguf_base import describe, gguf_checkpoint
from qcat.base.gguf_tokenizer import check_tokenizer
from qcat.base.ollama_store import find_model
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError, ModelError
from qcat.gguf.header import read_header

KINDS = ("qwen3", "qwen2", "llama", "gemma3")


@pytest.fixture(scope="session")
def base_gguf(tmp_path_factory, make_checkpoint, household):
    """`base_gguf(kind, quant, **shape)`: a bare base as a GGUF."""

    def make(kind="qwen3", quant="f16", **shape):
        folder = tmp_path_factory.mktemp("gguf")
        checkpoint: Checkpoint = make_checkpoint(kind, **shape)
        path = folder / "base.gguf"
        convert(job_of(household, path, None, checkpoint.base))
        if quant == "f16":
            return path
        quantize(path, folder / "small.gguf", quant, threads=1)
        return folder / "small.gguf"

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_k_m", "iq4_nl"])
def test_it_computes_what_llama_cpp_computes(kind, quant, base_gguf):
    path = base_gguf(kind, quant)
    folder = base_folder(str(path))
    ids = HubTokenizer(folder).encode(PROMPT, special=False)
    theirs = gguf_log_probabilities(path, ids)
    ours = torch_log_probabilities(load_base(folder, torch.float32).eval(), ids)
    # llama.cpp rounds the activations to 8 bits where the weights are quantized
    assert np.abs(theirs - ours).max() < (2e-2 if quant == "f16" else 0.3)
    assert (theirs.argmax(-1) == ours.argmax(-1)).mean() > 0.9


def test_f16_gives_the_checkpoint_back(base_gguf, make_checkpoint):
    from safetensors.torch import load_file

    folder = base_folder(str(base_gguf("llama")))  # whose rows llama.cpp orders otherwise
    original = load_file(make_checkpoint("llama").base / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == original.keys()
    for name, file in index.items():
        found = load_file(folder / file)[name]
        wanted = original[name]
        assert torch.equal(found.float(), (wanted.half() if wanted.ndim > 1 else wanted).float())


def test_it_is_made_once_and_anew_for_another_file(base_gguf):
    path = base_gguf("qwen3", "q8_0", hidden=64)
    folder = base_folder(str(path))
    before = (folder / "config.json").stat().st_mtime_ns
    assert base_folder(str(path)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    os.utime(path, ns=(1, 1))
    assert base_folder(str(path)) != folder


def test_a_named_folder(base_gguf, tmp_path):
    path = base_gguf("qwen3", "q8_0", hidden=64)
    assert gguf_checkpoint(str(path), tmp_path / "made") == tmp_path / "made"
    assert sorted(os.listdir(tmp_path)) == [".made.lock", "made"]
    os.utime(path, ns=(1, 1))  # as a copy of it has
    assert gguf_checkpoint(str(path), tmp_path / "made") == tmp_path / "made"
    other = base_gguf("qwen3", "q4_0", hidden=64)
    for config in ("{}", "no"):
        with pytest.raises(ModelError, match="is not the checkpoint of"):
            gguf_checkpoint(str(other), tmp_path / "made")
        (tmp_path / "made" / "config.json").write_text(config)


def test_what_it_says_of_a_file(base_gguf):
    assert "next to nothing is lost" in describe(str(base_gguf("qwen3", "q8_0", hidden=64)))
    assert "few bits" in describe(str(base_gguf("qwen3", "q4_0", hidden=64)))


def test_a_head_stored_at_two_precisions_is_one(base_gguf, make_checkpoint):
    """As quantizers write a tied head once more, at another precision."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import quantize as rounded

    reader = GGUFReader(base_gguf("qwen3", hidden=64))
    path = base_gguf("qwen3", hidden=64).with_name("two.gguf")
    writer = GGUFWriter(path, "qwen3")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name == "token_embd.weight":
            eight, four = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0
            writer.add_tensor(
                "output.weight", rounded(data.astype(np.float32), eight), raw_dtype=eight
            )
            data = rounded(data.astype(np.float32), four)
            writer.add_tensor(tensor.name, data, raw_dtype=four)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = base_folder(str(path))
    model = load_base(folder, torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    whole = make_checkpoint("qwen3", hidden=64).model.get_input_embeddings().weight
    error = (model.lm_head.weight - whole).norm() / whole.norm()
    assert error < 0.02  # of 8 bits, not of 4


# Tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_rebuilt_tokenizer_gives_llama_cpp_s_ids(kind, base_gguf):
    path = base_gguf(kind, hidden=64)
    folder = base_folder(str(path))
    lines = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    check_tokenizer(path, folder, [json.loads(line)["text"] for line in lines[::20]])


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_any_text(rebuilt, text):
    tokenizer, model = rebuilt
    assert tokenizer.encode(text, special=False) == model.encode(text, special=False)


@pytest.fixture(scope="module")
def rebuilt(base_gguf):
    path = base_gguf("qwen2", hidden=64)
    with LlamaModel(path, vocab_only=True) as model:
        yield HubTokenizer(base_folder(str(path))), model


def test_another_tokenizer_is_noticed(base_gguf, make_checkpoint):
    path = base_gguf("qwen2", hidden=64)
    with pytest.raises(ExportError, match="rebuilt from the GGUF has tokens"):
        check_tokenizer(path, make_checkpoint("llama", hidden=64).base, ["12 345"])


# The command


def test_trains_exports_and_asks_on_nothing_but_a_gguf(call, base_gguf, easy_job, tmp_path):
    path = tmp_path / "base.gguf"
    shutil.copy(base_gguf("qwen3", "q8_0", hidden=64), path)
    questions, task = easy_job[0] / "q.jsonl", easy_job[0] / "task.toml"
    done = call(
        "train", questions, "-t", task, "--base", path, "--epochs", 1, "-o", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert f"base {path}: 15 Q8_0: next to nothing is lost" in done.stderr
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)

    kept = ("--checkpoint", tmp_path / "kept", "--epochs", 1)
    named = call("train", questions, "-t", task, "--base", path, *kept, "-o", tmp_path / "named")
    assert named.returncode == 0, named.stderr
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "kept")
    scales = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "named")]
    assert all(torch.equal(scales[1][name], tensor) for name, tensor in scales[0].items())
    args = ("train", questions, "-t", task, "--base", tmp_path / "kept", *kept)
    refused = call(*args, "-o", tmp_path / "no")
    assert (refused.returncode, "for a GGUF base" in refused.stderr) == (2, True)

    made = call("export", tmp_path / "run", "-o", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    answer = call("ask", "-m", tmp_path / "out" / "sorts.gguf", "who did the motor here")
    assert answer.stdout.strip() in ("pool", "pool pump", "fence", "car", "-")


# Ollama's store


def stored(tmp_path, gguf, name="registry.ollama.ai/library/small/latest", kinds=("model",)):
    """A store as Ollama writes it, holding one model."""
    models = tmp_path / "models"
    digest = "ab" * 32
    (models / "blobs").mkdir(parents=True)
    shutil.copy(gguf, models / "blobs" / f"sha256-{digest}")
    manifest = models / "manifests" / name
    manifest.parent.mkdir(parents=True)
    layer = {"digest": f"sha256:{digest}", "size": 1}
    kinds = ("template", *kinds)
    layers = [layer | {"mediaType": f"application/vnd.ollama.image.{kind}"} for kind in kinds]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return models


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("small", "registry.ollama.ai/library/small/latest"),
        ("small:0.6b", "registry.ollama.ai/library/small/0.6b"),
        ("me/small", "registry.ollama.ai/me/small/latest"),
        ("hf.co/me/small:Q8_0", "hf.co/me/small/Q8_0"),
    ],
)
def test_names_in_ollama(name, place, base_gguf, tmp_path, monkeypatch):
    gguf = base_gguf("qwen3", "q8_0", hidden=64)
    monkeypatch.setenv("OLLAMA_MODELS", str(stored(tmp_path, gguf, place)))
    assert base_folder(f"ollama:{name}") == base_folder(str(find_model(name)))


def test_what_ollama_has_not(base_gguf, tmp_path, monkeypatch):
    gguf = base_gguf("qwen3", "q8_0", hidden=64)
    models = stored(tmp_path, gguf, kinds=("model", "adapter"))
    monkeypatch.setenv("OLLAMA_MODELS", str(models))
    for name, problem in {
        "absent": "no such model in Ollama's store",
        "../../x": "is no name of an Ollama model",
        "": "is no name of an Ollama model",
        "small": "is not one GGUF file",
    }.items():
        with pytest.raises(ModelError, match=problem):
            base_folder(f"ollama:{name}")
    manifest = next((models / "manifests").rglob("latest"))
    manifest.write_text("{")
    with pytest.raises(ModelError, match="not what Ollama writes"):
        base_folder("ollama:small")


# Bad files


def changed(path, target, key, value):
    """A copy whose string or number under a key is another one of the same size."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key)
    [kind] = struct.unpack_from("<I", data, at)
    if kind == 8:
        [size] = struct.unpack_from("<Q", data, at + 4)
        data[at + 12 : at + 12 + size] = value.encode().ljust(size)[:size]
    else:
        struct.pack_into("<I", data, at + 4, value)
    target.write_bytes(data)
    return target


def test_bad_files_are_one_line(call, base_gguf, easy_job, tmp_path):
    good = base_gguf("qwen3", "q8_0", hidden=64)
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-1000])
    (tmp_path / "none.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_bytes(b"no model at all, but long enough for a header")
    changed(good, tmp_path / "arch.gguf", "general.architecture", "gpt9x")
    changed(good, tmp_path / "rule.gguf", "tokenizer.ggml.pre", "mystery")
    changed(good, tmp_path / "model.gguf", "tokenizer.ggml.model", "bert")
    problems = {
        "cut.gguf": "damaged or cut short",
        "none.gguf": "not a GGUF",
        "text.gguf": "damaged",
        "gone.gguf": "No such file",
        "arch.gguf": "architecture 'gpt9x' cannot be trained: qwen3, qwen2, llama, gemma3 can",
        "rule.gguf": "with rule",
        "model.gguf": "tokenizer 'bert",
    }
    questions, task = easy_job[0] / "q.jsonl", easy_job[0] / "task.toml"
    for name, problem in problems.items():
        args = ("--base", tmp_path / name, "-o", tmp_path / "run")
        done = call("train", questions, "-t", task, *args)
        assert done.returncode == 1, name
        assert problem in done.stderr, done.stderr
        assert done.stderr.count("\n") <= 2  # what the file is may have been said before
        assert not (tmp_path / "run").exists()


def test_an_embedding_model_is_refused(base_gguf, tmp_path):
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(base_gguf("qwen3", hidden=64))
    path = tmp_path / "embedding.gguf"
    writer = GGUFWriter(path, "qwen3")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    writer.add_uint32("qwen3.pooling_type", 3)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(path).metadata["qwen3.pooling_type"] == 3
    with pytest.raises(ModelError, match="embedding model"):
        base_folder(str(path))
