"""Block scales: Q4_0 to the bit, gradients by plain arithmetic, an export that loses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from qcat_convert.merge import Merger
from qcat_convert.source import locate
from qcat_convert.stream import convert
from safetensors.torch import load_file, save_file
from torch import nn

from qcat.base.checkpoint import load_base
from qcat.errors import ExportError, TrainError
from qcat.gguf import q4_0
from qcat.gguf.architecture import EMBEDDING, architecture, gguf_name, gguf_tensor, hyper_parameters
from qcat.gguf.header import read_header
from qcat.training.adapters import RoundedEmbedding, ScaledLinear, attach_scales, save
from qcat.workflows.choose import kinds_to_make

Q4_0 = GGMLQuantizationType.Q4_0
matrices = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([32, 96])),
    # gguf's own code divides by what is far smaller
    elements=st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0),
)


def packed(codes, scales):
    return np.frombuffer(b"".join(map(bytes, q4_0.pack(codes, scales))), np.uint8)


# The format


@given(matrices)
def test_the_bytes_are_what_ggml_reads(values):
    weight = torch.tensor(values)
    scales = q4_0.fit_scales(weight)
    codes = q4_0.encode(weight, scales)
    theirs = dequantize(packed(codes, scales).reshape(len(values), -1), Q4_0)
    np.testing.assert_array_equal(theirs, q4_0.decode(codes, scales).numpy())


@given(matrices)
def test_no_block_is_further_off_than_ggml_has_it(values):
    weight = torch.tensor(values)
    scales = q4_0.fit_scales(weight)
    ours = q4_0.decode(q4_0.encode(weight, scales), scales).numpy()
    theirs = dequantize(quantize(values, Q4_0), Q4_0)

    def error(rounded):
        return np.square(rounded - values.astype(np.float64)).reshape(-1, 32).sum(1)

    # float16 rounds either scale, by a share of 2^-11 and not finer than 6e-8
    slack = error(np.zeros_like(values)) * 2**-20 + 32 * (8 * 6e-8) ** 2
    assert (error(ours) <= error(theirs) * 1.01 + slack).all()


@given(matrices)
def test_what_was_rounded_stays(values):
    weight = torch.tensor(values)
    scales = q4_0.fit_scales(weight)
    codes = q4_0.encode(weight, scales)
    again = q4_0.encode(q4_0.decode(codes, scales), scales)
    assert torch.equal(codes * scales.unsqueeze(-1), again * scales.unsqueeze(-1))


# Training


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return ScaledLinear(nn.Linear(64, 300))  # more rows than are taken at once


def test_gradients_are_those_of_plain_arithmetic(layer):
    inputs = torch.randn(3, 5, 64, requires_grad=True)
    with torch.no_grad():
        layer.change.normal_(std=0.1)
    layer(inputs).square().sum().backward()
    ours = [inputs.grad.clone(), layer.change.grad.clone(), layer.bias.grad.clone()]
    again = inputs.detach().requires_grad_()
    layer.zero_grad()
    weight = (layer.codes * layer.scales().unsqueeze(-1)).reshape(300, 64)
    (again @ weight.T + layer.bias).square().sum().backward()
    wanted = [again.grad, layer.change.grad, layer.bias.grad]
    for found, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def test_scales_are_exact_in_float16(layer):
    with torch.no_grad():
        layer.change.normal_(std=0.1)
    scales = layer.scales()
    assert torch.equal(scales.half().float(), scales)
    assert not torch.equal(scales, layer.first)


def test_rows_that_do_not_fit_are_refused(make_checkpoint):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(48, 8)

    with pytest.raises(TrainError, match="rows of 48, no multiple of 32"):
        attach_scales(Odd(), train_embeddings=False)


# Export


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama", "gemma3"])
def trained(request, make_checkpoint, tmp_path_factory):
    """A base, an adapter of scales with other numbers everywhere, and the model in torch."""
    kind = request.param
    checkpoint = make_checkpoint(kind, tied=kind != "qwen2")
    model = attach_scales(load_base(checkpoint.base, torch.float32), train_embeddings=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.1 if name.endswith("change") else 0.05
                parameter.add_(torch.randn_like(parameter) * size)
    folder = tmp_path_factory.mktemp("scales")
    save(model, folder, base=str(checkpoint.base), layers=None)
    return folder, model.eval()


def test_the_merged_model_is_the_trained_one(trained):
    folder, model = trained
    merger = Merger(locate(folder, None))
    wanted = dict(model.named_parameters())
    for number, layer in enumerate(merger.layers()):
        for name, tensor in layer.state_dict().items():
            path = f"model.layers.{number}.{name}"
            if path in merger.blocks:
                module = model.get_submodule(path.removesuffix(".weight"))
                right = q4_0.decode(module.codes, module.scales())
            else:
                right = wanted[path]
            assert torch.equal(tensor, right), path
    assert torch.equal(merger.norm().weight, wanted["model.norm.weight"])
    embedding = torch.cat(list(merger.embedding().chunks()))
    looked_up = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    assert torch.equal(embedding * merger.embedding_scale, looked_up)
    assert (EMBEDDING in merger.blocks) == (not merger.tied)


def test_the_file_holds_the_trained_numbers(trained, qcat, household, tmp_path):
    """Through the command: every block in the GGUF is the one that was trained."""
    from gguf import GGUFReader

    folder, model = trained
    (tmp_path / "task.toml").write_text(household.to_toml(), "utf-8")
    lines = [f'{{"text": "the {label}?", "label": "{label}"}}' for label in household.labels]
    (tmp_path / "held.jsonl").write_text("\n".join(lines), "utf-8")
    args = ("-t", tmp_path / "task.toml", "--data", tmp_path / "held.jsonl", "--max-flips", 1)
    done = qcat("export", folder, *args, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    gguf = tmp_path / "out" / "household.gguf"
    kinds = {t.name: t.type for t in read_header(gguf).tensors}
    assert {kind for name, kind in kinds.items() if "blk" in name} == {"Q4_0", "F32"}
    reader = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    arch = architecture(model.config)
    params = hyper_parameters(model.config, model.config.vocab_size)
    for name, module in model.named_modules():
        if isinstance(module, ScaledLinear | RoundedEmbedding):
            weight = f"{name}.weight"
            found = dequantize(reader[gguf_name(weight, arch)].data, Q4_0)
            trained_as = q4_0.decode(module.codes, module.scales()).detach()
            wanted = gguf_tensor(weight, trained_as, arch, params)
            np.testing.assert_array_equal(found, wanted.numpy())

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quantization"] == "q4_0"
    assert report["source"]["method"] == "scales"
    assert report["imatrix_questions"] == 0
    # What is left is that llama.cpp rounds activations to 8 bits, and the head.
    assert report["proof"]["quantized"]["kl_mean"] < 0.01


def test_a_trimmed_file_holds_the_rounded_rows(make_checkpoint, household, tmp_path):
    """The embedding of a base with a head of its own, only the rows that are kept."""
    from export_job import job_of
    from gguf import GGUFReader

    base = make_checkpoint("qwen2", tied=False).base
    model = attach_scales(load_base(base, torch.float32), train_embeddings=False)
    save(model, tmp_path, base=str(base), layers=None)
    job = job_of(household, tmp_path / "whole.gguf", tmp_path, None)
    rows = (*range(5, len(job.vocabulary.tokens), 3),)
    kept = [
        [values[row] for row in rows] for values in (job.vocabulary.tokens, job.vocabulary.types)
    ]
    cut = replace(job.vocabulary, tokens=kept[0], types=kept[1])
    convert(replace(job, rows=rows, vocabulary=cut))
    tensors = {tensor.name: tensor for tensor in GGUFReader(job.target).tensors}
    found = dequantize(tensors["token_embd.weight"].data, Q4_0)
    wanted = model.get_input_embeddings()(torch.tensor(rows))
    np.testing.assert_array_equal(found, wanted.numpy())


def test_another_kind_would_round_anew(trained, qcat, household, tmp_path):
    (tmp_path / "task.toml").write_text(household.to_toml(), "utf-8")
    args = ("-t", tmp_path / "task.toml", "-o", tmp_path / "out")
    done = qcat("export", trained[0], *args, "--quant", "q4_k_m")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "trained in q4_0, which loses nothing" in done.stderr


def test_kinds_by_default():
    assert kinds_to_make(None, scales=True, proved=False) == ("q4_0",)
    assert kinds_to_make(None, scales=False, proved=False) == ("q4_k_m",)
    assert kinds_to_make(None, scales=False, proved=True)[-1] == "q8_0"
    assert kinds_to_make("q5_k_m", scales=False, proved=True) == ("q5_k_m",)
    with pytest.raises(ExportError, match="held-out questions"):
        kinds_to_make("auto", scales=False, proved=False)


def test_what_does_not_fit_its_base_is_refused(trained, make_checkpoint, tmp_path):
    folder, _ = trained
    source = locate(folder, None)
    tensors = load_file(folder / "adapter_model.safetensors")

    def refused(changed, problem, base=None):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        whole = {name: tensor.contiguous().clone() for name, tensor in changed.items()}
        save_file(whole, copy / "adapter_model.safetensors")
        with pytest.raises(ExportError, match=problem):
            list(Merger(locate(copy, base)).layers())

    name = "model.layers.0.mlp.down_proj.scales"
    refused({k: v for k, v in tensors.items() if k != name}, "first_scales has no place")
    refused(tensors | {name: tensors[name][:-1]}, "down_proj.scales has no place")
    refused(tensors | {"model.layers.7.x": tensors[name]}, "layers.7.x has no place")
    others = tensors | {
        key: value.roll(1, 1) * 3 for key, value in tensors.items() if "first_scales" in key
    }
    refused(others, r"not of the weights of model\.(layers\.0|embed)", source.base)
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ExportError, match="damaged"):
        Merger(locate(tmp_path / "copy", None))


@pytest.fixture(scope="module")
def run(easy_job, tmp_path_factory):
    """A random base has nothing that scales alone bring out: its embeddings learn."""
    args = [*easy_job[1]]
    args[args.index("--method") + 1] = "scales"
    folder = tmp_path_factory.mktemp("run") / "run"
    command = [Path(sys.executable).with_name("qcat"), *args, "--train-embeddings", "-o", folder]
    subprocess.run(command, capture_output=True, check=True)
    return folder


def test_trains_embeddings_too(call, run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["method"] == "scales"
    assert record["test"]["accuracy"] > 0.8  # by chance 0.25
    made = call("export", run, "-o", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["proof"]["merged"]["accuracy"] == record["test"]["accuracy"]
    assert report["proof"]["quantized"]["flips"] == 0
    answer = call("ask", "-m", tmp_path / "out" / "sorts.gguf", "who did the motor here")
    assert answer.stdout == "pool pump\n"


def test_with_a_trimmed_vocabulary_and_trained_again(call, run, tmp_path):
    bundle = tmp_path / "house"
    made = call("export", run, "--vocab", "trim", "--merges", 0, "-o", bundle)
    assert made.returncode == 0, made.stderr
    before = json.loads((bundle / "report.json").read_text())
    assert before["vocabulary"]["tokens"] < before["vocabulary"]["of"]
    assert before["proof"]["quantized"]["flips"] == 0

    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "how is the motor doing", "label": "pool pump"}\n', "utf-8")
    done = call("retrain", run, "--add", more, "-o", tmp_path / "run-2", "--bundle", bundle)
    assert done.returncode == 0, done.stderr
    after = json.loads((bundle / "report.json").read_text())
    assert after["source"]["fingerprint"] != before["source"]["fingerprint"]
    assert (after["source"]["method"], after["quantization"]) == ("scales", "q4_0")
    assert after["vocabulary"]["merges"] == 0
    settings = json.loads((tmp_path / "run-2" / "run.json").read_text())["settings"]
    assert (settings["method"], settings["train_embeddings"]) == ("scales", True)


def test_rank_is_for_lora(call, easy_job, tmp_path):
    args = [*easy_job[1]]
    args[args.index("--method") + 1] = "scales"
    done = call(*args, "--rank", 8, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "--rank is for --method lora" in done.stderr
