"""`qcat export --converter`: architectures that qcat's own converter does not know.

llama.cpp's converter is real, from the source distribution that llama-cpp-python is compiled from
(`tests/llama_cpp_tree.sh`); the models are tiny, with a vocabulary that lies in that tree.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT
from plain_logits import walked_labels
from safetensors import safe_open

from qcat import Classifier
from qcat.base.checkpoint import load_model, parse_config
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ModelError
from qcat.task import Task

TREE = Path(os.environ.get("QCAT_LLAMA_CPP", ROOT / "build" / "llama.cpp"))
needs_tree = pytest.mark.skipif(
    not (TREE / "convert_hf_to_gguf.py").is_file() and "CI" not in os.environ,
    reason=f"no llama.cpp at {TREE}: tests/llama_cpp_tree.sh .venv/bin/python build/llama.cpp",
)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
LFM2 = SHAPE | {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}
QWEN = SHAPE | {
    "num_hidden_layers": 4,  # each fourth attends, the others keep a state
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "tie_word_embeddings": True,
}
PICTURES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}


def make_lfm2(folder, vocabulary, **more):
    """LFM2: short convolutions, and attention."""
    import transformers

    config = transformers.Lfm2Config(vocab_size=vocabulary, **LFM2 | more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_qwen(folder, vocabulary):
    """Qwen3.5 as it is released: with a part that sees pictures, and the text's part nested."""
    import transformers

    text = QWEN | {"vocab_size": vocabulary}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=PICTURES, tie_word_embeddings=True
    )
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)


KINDS = {"qwen3.5": make_qwen, "lfm2": make_lfm2}


def read_metadata(path):
    """The vocabulary's metadata, as lists and numbers."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """Base and adapter of an architecture that qcat does not know."""
    import tiny_model
    import torch
    from transformers import AutoModelForCausalLM

    from qcat.base.gguf_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("other")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    path = TREE / "models" / "ggml-vocab-qwen2.gguf"
    metadata = read_metadata(path)
    count = len(metadata["tokenizer.ggml.tokens"])
    write_tokenizer(path, metadata, count, base)
    torch.manual_seed(0)
    KINDS[request.param](base, count)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tiny_model.make_adapter(adapter, model, str(base), target_modules=["q_proj", "v_proj"])
    return base, adapter


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_checkpoint):
    """As `trained`, with a small vocabulary, which llama.cpp's converter does not know."""
    import tiny_model
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("small")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    for path in make_checkpoint().base.glob("tokenizer*"):
        shutil.copy(path, base)
    rows = len(HubTokenizer(base).tokens())
    make_lfm2(base, rows)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
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
    (folder / "held.jsonl").write_text(few(12), "utf-8")
    (folder / "validation.jsonl").write_text(few(40, start=1), "utf-8")
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


@needs_tree
def test_the_f16_file_changes_no_label(exported):
    report = json.loads((exported[0] / "report.json").read_text("utf-8"))
    assert report["source"]["converter"] == f"{TREE.name}/convert_hf_to_gguf.py"
    assert report["source"]["base"] == "base"
    proof = report["proof"]
    assert proof["questions"] == 12
    assert proof["f16"]["flips"] == 0
    assert proof["f16"]["kl_max"] < 1e-4


@needs_tree
def test_the_file_answers_alike_one_at_a_time_and_many(exported, qcat):
    rows = [json.loads(line) for line in few(40).splitlines()]
    texts = [row["text"] for row in rows]
    with Classifier.open(exported[0]) as classifier:
        alone = [classifier.ask(text) for text in texts]
        many = list(classifier.ask_many(texts))
        said = [classifier.say(text, 8) for text in texts[:2]]
        again = classifier.say(texts[0], 8)
    labels = list(alone[0].probabilities)
    one_by_one, together = (
        np.array([[p.probabilities[label] for label in labels] for p in part])
        for part in (alone, many)
    )
    assert np.abs(one_by_one - together).max() < 2e-3
    # Questions whose states were mixed up would differ by as much as questions do.
    assert np.abs(one_by_one - np.roll(one_by_one, 1, axis=0)).max() > 0.02
    assert again == said[0] != said[1]
    done = qcat("ask", "-m", exported[0], texts[0])
    assert done.returncode == 0, done.stderr
    done = qcat("show", exported[0])
    assert done.returncode == 0, done.stderr


@needs_tree
def test_other_labels_on_a_model_that_keeps_a_state(exported):
    """Its state is copied for each question and label, and the tasks do not mix."""
    [path] = exported[0].glob("*.gguf")
    labels = {"sorts": ("pool", "pool pump", "fence"), "answers": ("yes", "no")}
    questions = ("When was the pool pump replaced?", "is it on?")
    for name in ("sorts", "answers", "sorts"):
        task = Task(name, dict.fromkeys(labels[name], ""))
        with Classifier.open(path, task=task) as classifier:
            for question in questions:
                found = classifier.ask(question).probabilities
                want = walked_labels(path, classifier, question)
                np.testing.assert_allclose([found[label] for label in task.labels], want, atol=0.03)


def test_without_a_converter_the_way_out_is_named(small, qcat, tmp_path):
    done = qcat("export", small[1], "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "--converter" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def fake_tree(folder, script):
    """A tree whose converter is a few lines."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(f"import sys, time\n{script}\n", "utf-8")
    return folder


REFUSES = "sys.exit('unrecognized arguments: --no-mtp' if '--no-mtp' in sys.argv else 'No Qwen9')"
HELD = ["--data", "held.jsonl"]
BAD = {
    "no tree": (["--converter", "."], "holds no convert_hf_to_gguf.py"),
    "trimmed": (["--converter", "tree", "--vocab", "trim"], "goes with neither"),
    "beside": (["--converter", "tree", "--beside"], "goes with neither"),
    "no questions": (["--converter", "tree"], "needs held-out questions"),
    "refused": (["--converter", "tree", *HELD], "cannot convert the model (No Qwen9): try a newer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, small, qcat, tmp_path):
    options, message = BAD[case]
    fake_tree(tmp_path / "tree", REFUSES)
    (tmp_path / "held.jsonl").write_text(few(3), "utf-8")
    done = qcat(
        "export", small[1], "-t", EXAMPLE / "task.toml", "-o", "out", *options, cwd=tmp_path
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.jsonl", "tree"]


def test_an_interrupt_ends_the_converter_too(small, tmp_path):
    tree = fake_tree(tmp_path / "tree", "open('started', 'w').write('x'); time.sleep(600)")
    (tmp_path / "held.jsonl").write_text(few(3), "utf-8")
    program = Path(sys.executable).with_name("qcat")
    command = [program, "export", small[1], "-t", EXAMPLE / "task.toml", "-o", "out", *HELD]
    # A shell lets the programs that it starts in the background ignore this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([*command, "--converter", tree], cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        wait_until((tmp_path / "started").exists)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not running(str(tree)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.jsonl", "started", "tree"]


def wait_until(condition, seconds=60):
    """Wait until something holds, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(text):
    """Whether a process has a text in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text.encode() in path.read_bytes():
                return True
    return False


def test_a_base_that_is_not_whole_is_named(small, tmp_path):
    """transformers would fill the gap with new random numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(small[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights that fit model.layers.1.self_attn.q_proj"):
        load_model(base, parse_config(base), torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_added_tokens_and_a_head_of_its_own_are_written(small, tmp_path):
    """An adapter with a longer embedding: rows and ties are what config.json says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from qcat_convert import converter
    from transformers import AutoModelForCausalLM

    base = small[0]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    tuned = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    with torch.no_grad():
        tuned.get_input_embeddings().weight.normal_()
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(tmp_path / "adapter")
    job = SimpleNamespace(
        folder=base, adapter=tmp_path / "adapter", base="base", prefix=[1, 2, 3],
        tokenizer_folder=base,
    )  # fmt: skip
    merged = converter._merged(job)
    converter._save(merged, job, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["vocab_size"] == rows + 3
    assert config["tie_word_embeddings"] is False
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", "pt") as file:
        stored = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(stored, tuned.get_input_embeddings().weight)


def test_a_base_that_qcat_knows_is_left_to_it(make_checkpoint, tmp_path):
    from qcat_convert.converter import locate_unknown

    checkpoint = make_checkpoint()
    kept = shutil.copytree(checkpoint.adapter, tmp_path / "kept")
    config = json.loads((kept / "adapter_config.json").read_text())
    (kept / "adapter_config.json").write_text(json.dumps(config | {"layer_replication": [[0, 1]]}))
    assert locate_unknown(kept, None) is None
