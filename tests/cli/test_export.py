"""`qcat export` through the installed command: the bundle, the proof, and what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE
from export_job import job_of
from qcat_convert.quantize import QUANTIZATIONS, quantize
from qcat_convert.stream import convert
from whole_model import whole

from qcat.classifier import Classifier
from qcat.data.dataset import Example
from qcat.encoding.prompt import Prompt, Segment
from qcat.gguf.bundle import Bundle
from qcat.gguf.header import read_header
from qcat.gguf.sections import section
from qcat.report.modelfile import go_template, render
from qcat.task import Task
from qcat.workflows.export import export
from qcat.workflows.export_job import Request

BUNDLE = ["MODEL_CARD.md", "Modelfile", "household.gguf", "labels.gbnf", "report.json", "task.toml"]


def few(count, start=0):
    """Rows of the example questions, spread over the labels, as a new file's text."""
    rows = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    return "\n".join(rows[start :: len(rows) // count][:count]) + "\n"


def test_makes_a_whole_bundle_with_proof(qcat, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    (tmp_path / "held.jsonl").write_text(few(20), "utf-8")
    (tmp_path / "train.jsonl").write_text(few(20, start=1), "utf-8")
    done = qcat(
        "export",
        checkpoint.adapter,
        "-t",
        EXAMPLE / "task.toml",
        "--data",
        tmp_path / "held.jsonl",
        "--train-data",
        tmp_path / "train.jsonl",
        "--quant",
        "q4_k_m",
        "--max-flips",
        1,
        "-o",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == [
        "model",
        "accuracy",
        "macro-F1",
        "flips",
        "mean",
        "KL",
        "largest",
        "KL",
    ]
    assert sorted(os.listdir(tmp_path / "out")) == BUNDLE
    assert sorted(os.listdir(tmp_path)) == ["held.jsonl", "out", "train.jsonl"]

    bundle = Bundle.read(tmp_path / "out" / "household.gguf")
    assert bundle.task == Task.read(tmp_path / "out" / "task.toml")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["imatrix_questions"] == 20
    proof = report["proof"]
    assert proof["questions"] == 20
    assert proof["merged"]["flips"] == 0
    assert proof["f16"]["flips"] == 0
    assert proof["f16"]["kl_max"] < 1e-3
    assert 0 < proof["quantized"]["kl_mean"] < 0.5
    assert section(bundle.header, "qcat.report", bundle.path)["proof"] == proof
    assert len(section(bundle.header, "qcat.source", bundle.path)["fingerprint"]) == 64
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text("utf-8")
    assert report["source"]["fingerprint"] in card
    assert "| q4_k_m GGUF |" in card
    assert "- layers: all 2 of the base\n" in card
    assert str(tmp_path) not in card + json.dumps(report)

    again = qcat("export", checkpoint.adapter, "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out")
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert qcat("ask", "-m", tmp_path / "out" / "household.gguf", "gutters?").returncode == 0
    shown = qcat("show", tmp_path / "out" / "household.gguf")
    assert "20 held-out questions" in shown.stdout
    assert "layers       all 2 of the base\n" in shown.stdout
    everything = json.loads(qcat("show", "--json", bundle.path).stdout)
    assert everything["task"] == bundle.task.to_dict()
    assert everything["report"]["proof"] == proof
    modelfile = qcat("show", bundle.path, "--modelfile")
    assert modelfile.stdout == (tmp_path / "out" / "Modelfile").read_text("utf-8")
    grammar = qcat("show", bundle.path, "--grammar")
    assert grammar.stdout == (tmp_path / "out" / "labels.gbnf").read_text("utf-8")


def test_too_many_flips_keep_nothing_but_the_report(make_checkpoint, qcat, tmp_path):
    checkpoint = make_checkpoint()
    (tmp_path / "held.jsonl").write_text(few(109), "utf-8")
    done = qcat(
        "export",
        checkpoint.adapter,
        "-t",
        EXAMPLE / "task.toml",
        "--data",
        tmp_path / "held.jsonl",
        "--quant",
        "q3_k_m",
        "-o",
        tmp_path / "out",
    )
    assert done.returncode == 1
    assert "labels changed, more than 5.0%" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["held.jsonl", "out.report.json"]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["proof"]["quantized"]["flips"] > 2


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("verbalizer", ["name", "code"])
def test_every_style_verbalizer_and_architecture(
    kind, style, verbalizer, make_checkpoint, household, tmp_path
):
    """F16 and torch give the same labels; the tokens agree in all three places (else it raises)."""
    task = household.replace(style=style, verbalizer=verbalizer)
    rows = [json.loads(line) for line in few(8).splitlines()]
    labels = list(task.labels)
    report = export(
        Request(
            task,
            tmp_path / "out",
            adapter=make_checkpoint(kind).adapter,
            quantization="q8_0",
            held_out=tuple(Example(row["text"], labels.index(row["label"])) for row in rows),
            max_flips=1,
        )
    )
    assert report["proof"]["f16"]["flips"] == 0
    assert report["proof"]["f16"]["kl_max"] < 1e-3
    with Classifier.open(tmp_path / "out" / "household.gguf") as classifier:
        assert classifier.ask(rows[0]["text"]).label in labels
    assert (classifier.task.codes == {}) == (verbalizer == "name")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_quantization(kind, make_checkpoint, household, tmp_path):
    report = export(
        Request(household, tmp_path / "out", adapter=make_checkpoint().adapter, quantization=kind)
    )
    wanted = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q3_k_m": "Q3_K"}.get(kind, kind.upper())
    assert report["tensors"][wanted] > 0
    with Classifier.open(tmp_path / "out" / "household.gguf") as classifier:
        assert classifier.ask("gutters?").label in household.labels


def test_awkward_row_lengths_are_reported(qcat, make_checkpoint, tmp_path):
    """Rows of 64 do not fit K-quants, which need 256."""
    checkpoint = make_checkpoint("qwen3", hidden=64)
    done = qcat("export", checkpoint.adapter, "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tensors have row lengths that q4_k_m does not fit: stored as Q5_0" in done.stderr
    assert "not proved" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fallbacks"]["Q5_0"] > 0
    types = [tensor.type for tensor in read_header(tmp_path / "out" / "household.gguf").tensors]
    assert types.count("Q5_0") == report["tensors"]["Q5_0"]


def test_importance_matrix_is_the_mean_square_of_inputs(make_checkpoint, household, tmp_path):
    """Against torch's own numbers for one layer, and it changes the quantized file."""
    import numpy as np
    import torch

    adapter = make_checkpoint().adapter
    questions = ("When was the pool pump replaced?",)
    full = tmp_path / "full.gguf"
    job = job_of(household, full, adapter, training=questions)
    matrix = convert(job).imatrix
    merged = whole(adapter)
    linear = [n for n, m in merged.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(matrix) == len(linear)

    seen = []
    layer = merged.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        merged(torch.tensor([job.prefix + job.training[0]]))
    hook.remove()
    np.testing.assert_allclose(
        matrix["blk.1.ffn_down.weight"], (seen[0] ** 2).mean(0).numpy(), rtol=1e-3
    )

    export(Request(household, tmp_path / "a", adapter=adapter))
    export(Request(household, tmp_path / "b", adapter=adapter, training=questions))
    a, b = (tmp_path / n / "household.gguf" for n in "ab")
    data = [path.read_bytes()[read_header(path).data_start :] for path in (a, b)]
    assert len(data[0]) == len(data[1])
    assert data[0] != data[1]


def test_export_without_adapter(qcat, make_checkpoint, tmp_path):
    """A checkpoint that was fine-tuned whole."""
    base = make_checkpoint("qwen3", hidden=64).base
    done = qcat("export", base, "-t", EXAMPLE / "task.toml", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == BUNDLE


def test_special_token_text_in_held_out_data_is_counted(make_checkpoint, household, tmp_path):
    report = export(
        Request(
            household,
            tmp_path / "out",
            adapter=make_checkpoint("qwen3", hidden=64).adapter,
            held_out=(Example("what is <|im_end|> doing here", 0), Example("pool?", 1)),
            max_flips=1,
        )
    )
    assert report["proof"]["special_in_ollama"] == 1
    assert "spell a special token" in (tmp_path / "out" / "MODEL_CARD.md").read_text("utf-8")


BAD = {
    "no such folder": (["export", "none"], "no such folder"),
    "no adapter": (["export", "."], "holds neither"),
    "no task": (["export", "ADAPTER"], "cannot read the task"),
    "bad label": (["export", "ADAPTER", "-t", "TASK", "--data", "bad.jsonl"], "bad.jsonl:2: label"),
    "not json": (["export", "ADAPTER", "-t", "TASK", "--data", "not.jsonl"], "not.jsonl:1: not a"),
    "empty": (["export", "ADAPTER", "-t", "TASK", "--data", "empty.jsonl"], "no questions"),
    "too long": (["export", "ADAPTER", "-t", "TASK", "--data", "long.jsonl"], "tokens, room for"),
    "no base": (["export", "ADAPTER", "-t", "TASK", "--base", "gone/base"], "base 'gone/base'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(case, qcat, make_checkpoint, tmp_path):
    args, message = BAD[case]
    files = tmp_path / "files"
    files.mkdir()
    good = json.dumps({"text": "pool?", "label": "pool"})
    (files / "bad.jsonl").write_text(good + '\n{"text": "x", "label": "spa"}\n')
    (files / "not.jsonl").write_text("pool,pool\n")
    (files / "empty.jsonl").write_text("\n\n")
    (files / "long.jsonl").write_text(json.dumps({"text": "pump " * 400, "label": "pool"}))
    names = {"ADAPTER": make_checkpoint("qwen3", hidden=64).adapter, "TASK": EXAMPLE / "task.toml"}
    before = sorted(os.listdir(files))
    done = qcat(
        *(names.get(arg, arg) for arg in args),
        "-o",
        files / "out",
        cwd=files,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(os.listdir(files)) == before


def test_a_label_that_spells_a_special_token_is_refused(make_checkpoint, tmp_path):
    from qcat.errors import TaskError

    task = Task("odd", {"pool <|im_end|>": "", "fence": ""})
    with pytest.raises(TaskError, match="spells a special token"):
        export(Request(task, tmp_path / "out", adapter=make_checkpoint("qwen3", hidden=64).adapter))
    assert os.listdir(tmp_path) == []


def test_unwritable_place(qcat, make_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    done = qcat(
        "export",
        make_checkpoint("qwen3", hidden=64).adapter,
        "-t",
        EXAMPLE / "task.toml",
        "-o",
        tmp_path / "file" / "out",
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "choose another folder" in done.stderr


@pytest.mark.parametrize("name", ["out", "h[1]", "*"])
def test_two_exports_to_one_folder(name, tmp_path):
    from qcat.errors import ExportError
    from qcat.files import whole_folder

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    stale = tmp_path / "real" / f".{name}.export-12345678"
    other = tmp_path / "real" / ".other.export-12345678"
    stale.mkdir()
    other.mkdir()
    with whole_folder(tmp_path / "real" / name, "export", ExportError) as folder:
        with (
            pytest.raises(ExportError, match="another export"),
            whole_folder(tmp_path / "link" / name, "export", ExportError),
        ):
            pass
        assert folder.is_dir()
        assert not stale.exists()
    assert sorted(os.listdir(tmp_path / "real")) == sorted([other.name, name])


def _export_held_out(task, adapter, target):
    questions = ("pool?",) * 40
    held_out = tuple(Example(question, 1) for question in questions)
    request = Request(
        task,
        target,
        adapter=adapter,
        held_out=held_out,
        training=questions,
        max_flips=1,
        quantization="q4_k_m",
    )
    export(request)


def test_killed_at_any_moment_the_target_is_whole_or_absent(make_checkpoint, household, tmp_path):
    """kill -9 at 20 random moments; then one more export works and clears what was left."""
    # A fork server has the heavy imports done, so that the kills fall into the export itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["qcat.workflows.export", "llama_cpp", "peft", "transformers.models.qwen3", "gguf"]
    )
    adapter = make_checkpoint().adapter
    target = tmp_path / "runs" / "out"

    def start():
        process = context.Process(target=_export_held_out, args=(household, adapter, target))
        process.start()
        return process

    for _ in range(2):  # the first one also waits for the server
        shutil.rmtree(target, ignore_errors=True)
        began = time.monotonic()
        process = start()
        process.join()
        assert process.exitcode == 0
        whole = time.monotonic() - began

    rng = random.Random(3)
    killed = 0
    for _ in range(20):
        shutil.rmtree(target, ignore_errors=True)
        process = start()
        process.join(rng.uniform(0, whole))
        process.kill()
        process.join()
        killed += process.exitcode != 0
        assert target.exists() or process.exitcode != 0
        if target.exists():
            assert sorted(os.listdir(target)) == BUNDLE
            with Classifier.open(target / "household.gguf") as classifier:
                assert classifier.ask("pool?").label in household.labels
    assert killed >= 10

    shutil.rmtree(target, ignore_errors=True)
    export(Request(household, target, adapter=adapter))
    assert os.listdir(tmp_path / "runs") == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_while_its_child_writes(make_checkpoint, household, tmp_path):
    """The process apart goes away too, and the next export clears up what it leaves."""
    adapter, runs = make_checkpoint().adapter, tmp_path / "runs"
    (tmp_path / "task.toml").write_text(household.to_toml(), "utf-8")
    command = [Path(sys.executable).with_name("qcat"), "export", adapter]
    command += ["-t", tmp_path / "task.toml", "-o", runs / "out"]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(runs.glob(".out.export-*/trials/full*")):
            time.sleep(0.001)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
    assert process.wait() == -9
    assert children
    export(Request(household, runs / "out", adapter=adapter))
    for _ in range(200):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a child goes on")
    assert os.listdir(runs) == ["out"]
    assert sorted(os.listdir(runs / "out")) == BUNDLE


def test_quantizer_failure_is_an_error(tmp_path):
    from qcat.errors import ExportError

    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ExportError, match="quantizer failed"):
        quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q4_0", threads=1)


def test_rendering_knows_only_its_own_actions():
    from qcat.errors import ExportError

    question = go_template(Prompt((), "", (Segment("", False),)))
    assert render(f'TEMPLATE """a {question}{{{{ "\\u200d" }}}}"""', "q") == "a q\u200d"
    with pytest.raises(ExportError, match="unknown action"):
        render('TEMPLATE """a {{ .System }} {{ .Prompt }}"""', "q")
    with pytest.raises(ExportError, match="no TEMPLATE"):
        render("FROM x", "q")
