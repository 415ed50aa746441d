"""An adapter that cannot be merged is refused by its own cause; names of known wrappers are not."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcat_convert.merge import Merger
from qcat_convert.peft_adapter import plain_name, read_adapter_config
from qcat_convert.source import locate
from safetensors.torch import load_file, save_file

from qcat.errors import ExportError, QcatError
from qcat.workflows.export import export
from qcat.workflows.export_job import Request, read_request

NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("qwen3", hidden=64)


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A copy of a LoRA adapter, to be spoiled."""
    shutil.copytree(checkpoint.adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def merged(folder, base=None):
    """All merged tensors of the layers."""
    merger = Merger(locate(folder, base))
    return [
        {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for layer in merger.layers()
    ]


def rename(folder, edit):
    path = folder / "adapter_model.safetensors"
    save_file({edit(name): tensor for name, tensor in load_file(path).items()}, path)


def alter(folder, name, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, path)


def say(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Names

WRAPPED = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "sharded": lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
    "checkpointed": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "multimodal": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "named": lambda name: name.replace(".weight", ".default.weight"),
    "parallel": lambda name: name.replace("base_model.model.", "module."),
    "injected": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_names_of_known_wrappers_are_taken_away(adapter, checkpoint, wrap):
    rename(adapter, wrap)
    for one, two in zip(merged(adapter), merged(checkpoint.adapter), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in two)


def test_two_tensors_of_one_name_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"_orig_mod.{NAME}": tensors[NAME].clone()}, path)
    with pytest.raises(ExportError, match="holds two tensors for base_model"):
        merged(adapter)


def test_other_names_are_said(adapter):
    rename(adapter, lambda name: name.replace("up_proj", "w1"))
    with pytest.raises(ExportError) as caught:
        merged(adapter)
    assert "does not fit the base" in str(caught.value)
    assert "w1.lora_A.weight, and base_model" in str(caught.value)
    assert "up_proj.lora_A.weight is expected" in str(caught.value)


@given(st.text(max_size=80))
def test_any_name_stays_or_becomes_plain(name):
    plain = plain_name(name)
    assert plain == name or plain.startswith("base_model.model.")
    assert plain_name(plain) == plain


# Numbers

NUMBERS = {
    "NaN": (lambda tensor: tensor.fill_(float("nan")), "not finite: the training diverged"),
    "infinite": (lambda tensor: tensor.fill_(float("inf")), "not finite: the training diverged"),
    "huge": (lambda tensor: tensor.fill_(1e38), "too large to compute with"),
    "a number": (lambda tensor: tensor[0, 0], r"has the shape \(\), not"),
    "rank": (lambda tensor: tensor[:2], r"has rank 2, and adapter_config.json says r = "),
    "another width": (lambda tensor: tensor[:, :32], r"has the shape \(\d+, 32\), not \(\d+, 64\)"),
}


@pytest.mark.parametrize(("edit", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_cannot_be_are_refused(adapter, edit, message):
    for name in (NAME, NAME.replace("lora_A", "lora_B")) if message.startswith("too") else (NAME,):
        alter(adapter, name, edit)
    with pytest.raises(ExportError, match=message):
        merged(adapter)


# The configuration

CONFIGS = {
    "r in words": ({"r": "sixteen"}, "r is 'sixteen': a number above 0"),
    "r zero": ({"r": 0}, "r is 0: a number above 0"),
    "no r": ({"r": None}, "r is None: a number above 0"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "has changed the base's own weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "has changed the base's own weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "has changed the base's own weights"),
    "a classification head": ({"task_type": "SEQ_CLS"}, "train with task_type CAUSAL_LM"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3': only LoRA"),
    "a head in modules": ({"modules_to_save": ["score"]}, "modules_to_save holds 'score'"),
    "unknown and set": ({"use_mylora": True}, "sets 'use_mylora', which PEFT"),
    "activated LoRA": ({"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens, which"),
    "biases of its own": ({"lora_bias": True}, "sets lora_bias, which cannot be merged"),
    "no expression": ({"target_modules": "(q_proj"}, "target_modules is '(q_proj'"),
    "no names": ({"target_modules": [1]}, "target_modules is [1]: names of modules"),
    "dropout in words": ({"lora_dropout": "0.05"}, "lora_dropout is '0.05': a number"),
    "ranks as a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']: numbers by"),
    "alphas in words": ({"alpha_pattern": {"q_proj": "32"}}, "alpha_pattern is {'q_proj': '32'}"),
    "no finite alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan: a number above 0"),
    "no layers": ({"layer_replication": [[0, 0]]}, "layer_replication is [[0, 0]]"),
    "no module of the base": ({"target_modules": ["c_attn"]}, "does not fit the base"),
}


@pytest.mark.parametrize(("fields", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_cannot_be_merged_is_refused(adapter, fields, message):
    say(adapter, **fields)
    with pytest.raises(ExportError) as caught:
        merged(adapter)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_fields_that_are_off_do_no_harm(adapter):
    say(adapter, use_mylora=False, my_pattern={}, my_config=None)
    assert merged(adapter)


@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "peft_type", "task_type", "modules_to_save", "x",
                         "layer_replication", "init_lora_weights"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)  # fmt: skip
def test_any_configuration_is_read_or_refused(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("adapter")
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(plain | fields))
    with suppress(QcatError):
        assert read_adapter_config(folder)["peft_type"] in ("LORA", "QCAT_SCALES")


# The files


def test_the_tokenizer_of_another_model_is_refused(adapter, make_checkpoint, household, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_checkpoint("llama", hidden=64).base / name, adapter)
    with pytest.raises(ExportError, match="brings the tokenizer of another model"):
        export(Request(household, tmp_path / "out", adapter=adapter))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_mlx_is_named(adapter):
    say(adapter, peft_type=None)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors")
    with pytest.raises(ExportError, match=r"fuse it with mlx_lm\.fuse"):
        merged(adapter)


def test_an_adapter_in_a_folder_below_is_named(adapter, tmp_path, household):
    (tmp_path / "run").mkdir()
    shutil.move(adapter, tmp_path / "run" / "checkpoint-100")
    with pytest.raises(ExportError, match=r"folders below that do, such as .*checkpoint-100$"):
        read_request(tmp_path / "run", tmp_path / "out")


def test_a_pickle_is_not_read(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ExportError, match=r"adapter_model\.bin: a pickle can run any code"):
        merged(adapter)


def test_no_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match="no such file: save the adapter"):
        merged(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_place_of_a_file(adapter, name):
    (adapter / name).write_bytes(POINTER)
    with pytest.raises(ExportError, match=f"{name}: a Git LFS pointer"):
        merged(adapter)
