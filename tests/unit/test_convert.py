"""The converted file computes what the merged torch model computes, and a slip is noticed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
from export_job import job_of
from plain_logits import PROMPT, gguf_log_probabilities, torch_log_probabilities
from qcat_convert import writer
from qcat_convert.merge import Merger
from qcat_convert.source import locate
from qcat_convert.stream import convert
from safetensors.torch import load_file, save_file
from whole_model import whole

from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError, ModelError
from qcat.gguf import architecture as tensors

KINDS = ("qwen3", "qwen2", "llama", "gemma3")


def written(path, task, adapter, base=None, precision="f16"):
    """Write a GGUF; return the tokenizer."""
    job = job_of(task, path, adapter, base, precision=precision)
    convert(job)
    return HubTokenizer(job.source.tokenizer_folder)


def merged(adapter, base):
    return Merger(locate(adapter, base))


def difference(model, path, tokenizer):
    ids = tokenizer.encode(PROMPT, special=False)
    theirs = gguf_log_probabilities(path, ids)
    ours = torch_log_probabilities(model, ids)
    same = bool((theirs.argmax(-1) == ours.argmax(-1)).all())
    return float(np.abs(theirs - ours).max()), same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_gguf_agrees_with_torch(kind, precision, make_checkpoint, household, tmp_path):
    checkpoint = make_checkpoint(kind)
    model = whole(checkpoint.adapter)
    path = tmp_path / "m.gguf"
    tokenizer = written(path, household, checkpoint.adapter, precision=precision)
    largest, same = difference(model, path, tokenizer)
    assert largest < (2e-2 if precision == "f16" else 2e-1)
    if precision == "f16":
        assert same
    # and the adapter is not lost on the way
    ids = tokenizer.encode(PROMPT, special=False)
    base = torch_log_probabilities(checkpoint.model.eval(), ids)
    assert np.abs(base - torch_log_probabilities(model, ids)).max() > 0.1


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_old_rope_notation_gives_the_same_model(kind, make_checkpoint, household, tmp_path):
    checkpoint = make_checkpoint(kind)
    old = tmp_path / "old"
    shutil.copytree(checkpoint.base, old)
    config = json.loads((old / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    assert theta == 500000.0  # no version's default, so a lost one shows
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (old / "config.json").write_text(json.dumps(config))
    tokenizer = written(tmp_path / "old.gguf", household, checkpoint.adapter, str(old))
    largest, same = difference(whole(checkpoint.adapter), tmp_path / "old.gguf", tokenizer)
    assert largest < 2e-2
    assert same


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_untied_head(kind, make_checkpoint, household, tmp_path):
    checkpoint = make_checkpoint(kind, tied=False, hidden=64)
    tokenizer = written(tmp_path / "m.gguf", household, checkpoint.adapter)
    largest, same = difference(whole(checkpoint.adapter), tmp_path / "m.gguf", tokenizer)
    assert largest < 2e-2
    assert same


@pytest.mark.parametrize(
    ("kind", "left", "right"),
    [
        ("qwen3", "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        ("qwen2", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        ("llama", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ],
)
def test_a_swapped_mapping_is_noticed(
    kind, left, right, make_checkpoint, household, tmp_path, monkeypatch
):
    model = whole(make_checkpoint(kind).adapter)
    name = type(model).__name__
    arch = tensors.ARCHITECTURES[name]
    block = dict(arch.block)
    block[left], block[right] = block[right], block[left]
    broken = {**tensors.ARCHITECTURES, name: replace(arch, block=block)}
    monkeypatch.setattr(tensors, "ARCHITECTURES", broken)
    tokenizer = written(tmp_path / "m.gguf", household, make_checkpoint(kind).adapter)
    assert difference(model, tmp_path / "m.gguf", tokenizer)[0] > 2e-2


def test_unpermuted_llama_attention_is_noticed(make_checkpoint, household, tmp_path, monkeypatch):
    adapter = make_checkpoint("llama").adapter
    monkeypatch.setattr(writer, "gguf_tensor", lambda name, tensor, arch, params: tensor)
    tokenizer = written(tmp_path / "m.gguf", household, adapter)
    assert difference(whole(adapter), tmp_path / "m.gguf", tokenizer)[0] > 2e-2


def adapter_case(checkpoint, folder, **settings):
    model = type(checkpoint.model).from_pretrained(checkpoint.base)
    tiny_model.make_adapter(folder, model, str(checkpoint.base), **settings)
    return folder


@pytest.mark.filterwarnings(  # peft says what this test is about
    "ignore:Model .*`tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer"
)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "v_proj"], "r": 4},
    ],
    ids=str,
)
def test_adapters_of_many_kinds(settings, make_checkpoint, household, tmp_path):
    """Merged and converted they equal PEFT's own unmerged forward pass."""
    from peft import PeftModel

    checkpoint = make_checkpoint("qwen3", hidden=64)
    folder = adapter_case(checkpoint, tmp_path / "adapter", **settings)
    tokenizer = HubTokenizer(checkpoint.base)
    ids = tokenizer.encode(PROMPT, special=False)
    base = type(checkpoint.model).from_pretrained(checkpoint.base)
    unmerged = torch_log_probabilities(PeftModel.from_pretrained(base, folder).eval(), ids)
    written(tmp_path / "m.gguf", household, folder)
    assert np.abs(gguf_log_probabilities(tmp_path / "m.gguf", ids) - unmerged).max() < 2e-2


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_trained_with_added_tokens(make_checkpoint, household, tmp_path):
    """Its embedding has more rows than the base's, and its tokenizer more words."""
    import tiny_model
    from tokenizers import AddedToken, Tokenizer

    checkpoint = make_checkpoint("qwen3", hidden=64, tied=False)
    rows = checkpoint.model.config.vocab_size + 8
    model = type(checkpoint.model).from_pretrained(checkpoint.base)
    model.resize_token_embeddings(rows)
    folder = tmp_path / "adapter"
    saved = ["embed_tokens", "lm_head"]
    tiny_model.make_adapter(folder, model, str(checkpoint.base), modules_to_save=saved)
    tokenizer = Tokenizer.from_file(str(checkpoint.base / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("poolpumpX1", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(checkpoint.base / "tokenizer_config.json", folder)
    assert locate(folder, None).vocabulary_rows == rows
    found = written(tmp_path / "m.gguf", household, folder)
    assert len(found.encode("poolpumpX1", special=False)) == 1
    largest, same = difference(whole(folder), tmp_path / "m.gguf", found)
    assert largest < 2e-2
    assert same


@pytest.mark.filterwarnings(
    "ignore:Model .*`tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_lora_on_a_tied_head_is_refused(module, make_checkpoint, tmp_path):
    """Merged, it would change head and embedding alike: another model than the one trained."""
    checkpoint = make_checkpoint("qwen3", hidden=64)
    folder = adapter_case(checkpoint, tmp_path / "adapter", target_modules=["q_proj", module])
    with pytest.raises(ExportError, match="merging changes what the model computes"):
        merged(folder, None)


def weak(checkpoint, folder):
    """An adapter that changes what a module computes by about a thousandth."""
    adapter_case(checkpoint, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= 1e-3 / float(tensors[name].abs().max())
    save_file(tensors, path)
    return folder


def test_a_merge_that_loses_the_adapter_is_noticed(make_checkpoint, tmp_path, monkeypatch):
    """Each module is compared: in the model's own answers a weak adapter would not be seen."""
    from peft.tuners.lora import Linear

    folder = weak(make_checkpoint("qwen3", hidden=64), tmp_path / "adapter")
    assert list(merged(folder, None).layers())
    monkeypatch.setattr(Linear, "merge", lambda *_, **__: None)
    with pytest.raises(ExportError, match="merging changes what the model computes"):
        list(merged(folder, None).layers())


def test_an_adapter_of_a_deeper_base_is_refused(make_checkpoint, tmp_path):
    """PEFT passes over the layers that the base lacks, and half of the fine-tune would be lost."""
    folder = adapter_case(make_checkpoint("qwen3", hidden=64), tmp_path / "adapter")
    shallow = tmp_path / "shallow"
    shutil.copytree(make_checkpoint("qwen3", hidden=64).base, shallow)
    config = json.loads((shallow / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (shallow / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r": 14 tensors .*lora_A.* with --base, or save"):
        merged(folder, str(shallow))


@pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys"
)  # which convert alone would not show
def test_an_adapter_with_tensors_left_out_is_refused(make_checkpoint, tmp_path):
    folder = adapter_case(make_checkpoint("qwen3", hidden=64), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r": 1 tensors .*lora_A\.weight is expected"):
        merged(folder, None)


def test_a_tensor_out_of_turn_is_refused(make_checkpoint, household, tmp_path, monkeypatch):
    """gguf would write the numbers of k under the name of v, which have the same size."""
    layers = Merger.layers

    def turned(self):
        for layer in layers(self):
            found = dict(reversed(layer.state_dict().items()))
            layer.state_dict = lambda found=found: found
            yield layer

    monkeypatch.setattr(Merger, "layers", turned)
    with pytest.raises(ExportError, match=r"tensor model\.layers\.0\..* was due"):
        written(tmp_path / "m.gguf", household, make_checkpoint(hidden=64).adapter)


def test_saved_modules_of_other_kinds_are_refused_by_name(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    folder = adapter_case(checkpoint, tmp_path / "adapter", modules_to_save=["norm"])
    with pytest.raises(ExportError, match="modules_to_save holds 'norm'"):
        merged(folder, None)


def test_a_quantized_base_is_refused(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    shutil.copytree(checkpoint.base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="start from the unquantized base"):
        merged(checkpoint.adapter, str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel cannot"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "'linear'",
        ),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_gguf_would_lack_is_refused(change, message, make_checkpoint, household, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    base = tmp_path / "base"
    shutil.copytree(checkpoint.base, base)
    config = json.loads((base / "config.json").read_text())
    config.pop("layer_types", None)
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ExportError, match=message):
        written(tmp_path / "m.gguf", household, checkpoint.adapter, str(base))


def test_an_unknown_tensor_is_refused_by_name():
    arch = tensors.ARCHITECTURES["Qwen3ForCausalLM"]
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
        tensors.gguf_name("model.layers.0.self_attn.q_proj.bias", arch)


def test_no_base_anywhere(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    with pytest.raises(ModelError, match="no such folder, and not to be had from the hub"):
        merged(checkpoint.adapter, str(tmp_path / "gone" / "base" / "model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        merged(checkpoint.adapter, str(tmp_path / "empty"))
    with pytest.raises(ExportError, match=r"adapter_config\.json"):
        merged(tmp_path / "empty", str(checkpoint.base))


def test_an_adapter_for_another_base(make_checkpoint):
    small, large = make_checkpoint("qwen3", hidden=64), make_checkpoint("qwen3", hidden=256)
    with pytest.raises(ExportError, match="does not fit the base"):
        merged(small.adapter, str(large.base))


def test_a_truncated_adapter_or_base(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64)
    shutil.copytree(checkpoint.adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExportError, match="damaged"):
        merged(tmp_path / "adapter", None)
    shutil.copytree(checkpoint.base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        merged(checkpoint.adapter, str(tmp_path / "base"))
