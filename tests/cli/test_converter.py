"""`qcat export --converter`: architectures that qcat's own converter does not know.

llama.cpp's converter is real, from the source distribution that llama-cpp-python is compiled from
(`tests/llama_cpp_tree.sh`); the models are tiny, with a vocabulary that lies in that tree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT

from qcat import Classifier

TREE = Path(os.environ.get("QCAT_LLAMA_CPP", ROOT / "build" / "llama.cpp"))
pytestmark = pytest.mark.skipif(
    not (TREE / "convert_hf_to_gguf.py").is_file() and "CI" not in os.environ,
    reason=f"no llama.cpp at {TREE}: tests/llama_cpp_tree.sh .venv/bin/python build/llama.cpp",
)
SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.05,
}
KINDS = {
    "qwen3.5": (
        "Qwen3_5TextConfig",
        SHAPE
        | {
            "intermediate_size": 256,
            "num_hidden_layers": 4,  # each fourth attends, the others keep a state
            "head_dim": 32,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        SHAPE
        | {
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "full_attn_idxs": [1],
            "block_auto_adjust_ff_dim": False,
            "pad_token_id": None,
        },
    ),
}


def read_metadata(path):
    """The vocabulary's metadata, as lists and numbers."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """Base and adapter of an architecture that qcat does not know."""
    import tiny_model
    import torch
    import transformers

    from qcat.base.gguf_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("other")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    path = TREE / "models" / "ggml-vocab-qwen2.gguf"
    metadata = read_metadata(path)
    count = len(metadata["tokenizer.ggml.tokens"])
    write_tokenizer(path, metadata, count, base)
    name, shape = KINDS[request.param]
    config = getattr(transformers, name)(vocab_size=count, **shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    tiny_model.make_adapter(adapter, model, str(base), target_modules=["q_proj", "v_proj"])
    return base, adapter


def few(count, start=0):
    """Rows of the example questions, spread over the labels."""
    rows = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    return "\n".join(rows[start :: len(rows) // count][:count]) + "\n"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory, qcat):
    """The bundle, and what the command said."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "held.jsonl").write_text(few(24), "utf-8")
    (folder / "validation.jsonl").write_text(few(60, start=1), "utf-8")
    done = qcat(
        "export",
        trained[1],
        "-t",
        EXAMPLE / "task.toml",
        "--data",
        folder / "held.jsonl",
        "--validation-data",
        folder / "validation.jsonl",
        "--converter",
        TREE,
        "--quant",
        "q8_0",
        "--max-flips",
        1,
        "-o",
        folder / "out",
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_the_f16_file_changes_no_label(exported):
    report = json.loads((exported[0] / "report.json").read_text("utf-8"))
    assert report["source"]["converter"] == "convert_hf_to_gguf.py"
    proof = report["proof"]
    assert proof["questions"] == 24
    assert proof["f16"]["flips"] == 0
    assert proof["f16"]["kl_max"] < 1e-4


def test_the_file_answers_alike_one_at_a_time_and_many(exported, qcat):
    rows = [json.loads(line) for line in few(40).splitlines()]
    texts = [row["text"] for row in rows]
    with Classifier.open(exported[0]) as classifier:
        alone = [classifier.ask(text) for text in texts]
        many = list(classifier.ask_many(texts))
        said = classifier.say(texts[0], 8)
    assert len({round(p.confidence, 6) for p in alone}) > 1
    for one, other in zip(alone, many, strict=True):
        there = [other.probabilities[label] for label in one.probabilities]
        assert np.allclose(list(one.probabilities.values()), there, atol=2e-3)
    assert isinstance(said, str)
    done = qcat("ask", "-m", exported[0], texts[0])
    assert done.returncode == 0, done.stderr
    done = qcat("show", exported[0])
    assert done.returncode == 0, done.stderr


def test_without_a_converter_the_way_out_is_named(trained, qcat, tmp_path):
    done = qcat("export", trained[1], "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "--converter" in done.stderr
    assert len(done.stderr.splitlines()) == 1


BAD = {
    "no tree": (["--converter", "."], "holds no convert_hf_to_gguf.py"),
    "trimmed": (["--converter", TREE, "--vocab", "trim"], "goes with neither"),
    "beside": (["--converter", TREE, "--beside"], "goes with neither"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, trained, qcat, tmp_path):
    options, message = BAD[case]
    done = qcat("export", trained[1], "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out", *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_the_converter_cannot_convert_is_named(trained, qcat, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "convert_hf_to_gguf.py").write_text(
        "import sys\nsys.exit('Model Qwen9 is not supported')\n"
    )
    done = qcat(
        "export", trained[1], "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out",
        "--converter", tree,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Model Qwen9 is not supported" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
