"""Fewer layers: what is cut, what an adapter says of it, the walk down and its resumption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcat_convert.merge import Merger
from qcat_convert.source import locate
from whole_model import put_together, whole

from qcat.base.checkpoint import load_base, load_config
from qcat.data.dataset import read_examples
from qcat.data.split import split_examples
from qcat.errors import ExportError, ModelError, TrainError
from qcat.gguf.header import read_header
from qcat.task import Task
from qcat.training.depth import depths, train_shallowest
from qcat.training.retrain import Run
from qcat.training.settings import Settings
from qcat.training.train import train

IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


# What is cut


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "gemma3"])
def test_a_cut_base_is_the_base_with_its_top_taken_off(kind, make_checkpoint):
    folder = make_checkpoint(kind, hidden=64, layers=4).base
    by_hand = load_base(folder, torch.float32).eval()
    assert load_config(folder).num_hidden_layers == len(by_hand.model.layers) == 4
    by_hand.model.layers = by_hand.model.layers[:2]
    cut = load_base(folder, torch.float32, 2).eval()
    assert torch.equal(logits(cut), logits(by_hand))
    assert not torch.allclose(logits(cut), logits(load_base(folder, torch.float32).eval()))
    assert torch.equal(
        logits(load_base(folder, torch.float32, 4).eval()),
        logits(load_base(folder, torch.float32).eval()),
    )


def test_a_cut_configuration_can_be_saved_and_read(make_checkpoint, tmp_path):
    """transformers refuses one whose lists by layer are longer than the model."""
    folder = make_checkpoint("qwen3", hidden=64, layers=4).base
    load_config(folder, 3).save_pretrained(tmp_path)
    assert load_config(tmp_path).layer_types == ["full_attention"] * 3


@pytest.mark.parametrize("layers", [-1, 0, 5])
def test_a_base_is_cut_to_between_one_and_all_of_its_layers(layers, make_checkpoint):
    folder = make_checkpoint("qwen3", hidden=64, layers=4).base
    with pytest.raises(ModelError, match=f"has 4 layers: keep between 1 and all .* not {layers}"):
        load_base(folder, torch.float32, layers)


# What an adapter says of it


def test_an_adapter_names_its_layers_as_peft_does(make_checkpoint, tmp_path):
    """PEFT cuts the whole base by what `layer_replication` says, and so must the merge."""
    import tiny_model
    from peft import PeftModel

    checkpoint = make_checkpoint("qwen3", hidden=64, layers=4)
    folder = tmp_path / "adapter"
    base = load_base(checkpoint.base, torch.float32)
    tiny_model.make_adapter(folder, base, str(checkpoint.base), layer_replication=[[0, 3]])
    in_peft = PeftModel.from_pretrained(load_base(checkpoint.base, torch.float32), folder).eval()
    source = locate(folder, None)
    assert (source.layers, source.base_layers) == (3, 4)
    merged = put_together(folder)
    assert len(merged.model.layers) == 3
    torch.testing.assert_close(logits(merged), logits(in_peft), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stack", [[[0, 2], [1, 3]], [[1, 3]], [[0, "2"]], [[0]], "all", 7])
def test_an_adapter_for_other_layers_is_refused(stack, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64, layers=4)
    shutil.copytree(checkpoint.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": stack}))
    with pytest.raises(ExportError, match=r"layer_replication is .* only a base's first"):
        locate(tmp_path / "adapter", None)


def test_an_adapter_for_more_layers_than_the_base_has_is_refused(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3", hidden=64, layers=4)
    shutil.copytree(checkpoint.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 9]]}))
    with pytest.raises(ModelError, match="has 4 layers"):
        Merger(locate(tmp_path / "adapter", None))


# The command


def test_trains_exports_and_asks_with_fewer_layers(qcat, call, easy_job, tmp_path):
    """One layer of a random base takes more epochs than two to tell the easy questions apart."""
    from peft import PeftModel

    run = tmp_path / "run"
    done = call(*easy_job[1], "--layers", "1", "--epochs", "16", "-o", run)
    assert done.stdout.startswith("layers: the first 1 of the base's 2\nepoch 1: ")
    record = json.loads((run / "run.json").read_text())
    assert (record["layers"], record["base_layers"]) == (1, 2)
    assert record["test"]["accuracy"] > 0.8  # by chance 0.25
    made = call("export", run, "-o", tmp_path / "out", "--quant", "q8_0", "--max-flips", "1")
    assert made.returncode == 0, made.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["source"]["layers"], report["source"]["base_layers"]) == (1, 2)
    assert report["proof"]["f16"]["flips"] == 0
    assert report["proof"]["merged"]["accuracy"] == record["test"]["accuracy"]
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text("utf-8")
    assert "- layers: the first 1 of the base's 2\n" in card
    gguf = tmp_path / "out" / "sorts.gguf"
    assert read_header(gguf).metadata["qwen3.block_count"] == 1
    assert "layers       the first 1 of the base's 2\n" in call("show", gguf).stdout
    assert qcat("ask", "-m", gguf, "who did the motor here").stdout == "pool pump\n"

    base = load_base(Path(record["settings"]["base"]), torch.float32)
    in_peft = PeftModel.from_pretrained(base, run).eval()  # the whole base and nothing of qcat
    torch.testing.assert_close(logits(put_together(run)), logits(in_peft))

    found = Run.read(run)  # which `qcat retrain` begins with
    assert found.settings.layers == 1
    assert found.is_in(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "0"), "Invalid value for '--layers': at least one layer has to stay."),
        (("--layers", "-3"), "Invalid value for '--layers': at least one layer has to stay."),
        (("--layers", "half"), "Invalid value for '--layers': 'half' is neither a number nor"),
        (("--layers", "3"), "Invalid value for '--layers': {base} has 2 layers: give a number"),
        (("--layers", "1", "--max-f1-loss", "0.1"), "--max-f1-loss is for --layers auto"),
        (("--layers", "auto", "--max-f1-loss", "2"), "Invalid value for '--max-f1-loss'"),
    ],
)
def test_impossible_layers_are_usage_errors(call, easy_job, tmp_path, options, message):
    folder, args = easy_job
    done = call(*args, *options, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert f"Error: {message.format(base=folder / 'base')}" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


# The walk down


def test_depths_of_the_usual_bases():
    assert depths(28) == [28, 21, 14, 10, 7, 4]
    assert depths(3) == [3, 2, 1]
    assert depths(1) == [1]


@given(st.integers(1, 200))
def test_depths_go_down_from_all(layers):
    found = depths(layers)
    assert found[0] == layers
    assert all(more > fewer >= 1 for more, fewer in pairwise(found))
    assert sum(found) <= 3 * layers + len(found) / 2  # what the help says it costs, and rounding


def test_a_killed_walk_goes_on_and_keeps_depth_that_matters(call, easy_job, easy_run, tmp_path):
    """One layer of the random base does not learn in so few epochs what two do."""
    _, args = easy_job
    target = tmp_path / "run"
    walk = (*args, "--layers", "auto", "--max-f1-loss", "0.1", "-o", target)
    process = subprocess.Popen([Path(sys.executable).with_name("qcat"), *map(str, walk)])
    try:
        deadline = time.monotonic() + 200
        while not (target / "depths/2/run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = (target / "depths/2/adapter_model.safetensors").stat()
    assert not (target / "run.json").exists()
    early = call("export", target, "-o", tmp_path / "out")
    assert "its training is unfinished" in early.stderr
    done = call(*walk)
    assert done.returncode == 0, done.stderr
    assert (target / "adapter_model.safetensors").stat().st_mtime_ns == first.st_mtime_ns

    alone, said = easy_run
    rows = [line.split() for line in done.stdout.splitlines()[:3]]
    assert rows[0] == ["layers", "validation", "macro-F1", "lost"]
    assert rows[1] == ["2", "of", "2", "1.000", "0.000", "kept"]
    assert (rows[2][:3], rows[2][5:]) == (["1", "of", "2"], ["more", "than", "0.1"])
    assert done.stdout.splitlines()[3:-1] == said.stdout.splitlines()[:-1]
    assert sorted(os.listdir(target)) == sorted(os.listdir(alone))
    for name in ("adapter_model.safetensors", "metrics.csv", "task.toml", "train.jsonl"):
        assert (target / name).read_bytes() == (alone / name).read_bytes()


class StoppedError(Exception):
    pass


def test_a_walk_stopped_anywhere_ends_where_the_depth_alone_does(
    easy_job, easy_run, tmp_path, monkeypatch
):
    """On a base that knows the answers already, and needs but its first layer for them."""
    folder, _ = easy_job
    task = Task.read(folder / "task.toml")
    split = split_examples(read_examples(folder / "q.jsonl", task), task, seed=0)
    base = tmp_path / "base"
    whole(easy_run[0]).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "base" / name, base)
    settings = Settings(base=str(base), method="lora", epochs=2, rate=1e-3, layers=1)
    alone = train(task, split, settings, tmp_path / "alone")

    monkeypatch.setattr("qcat.training.loop._SAVE_SECONDS", 0)  # a checkpoint after every step
    target = tmp_path / "run"
    for stop in (
        ("2 of 2 layers: train", 5),
        ("1 of 2 layers: train", 2),
        ("1 of 2 layers: test", 1),
    ):

        def progress(step, done, total, note, stop=stop):
            if step == stop[0] and done >= stop[1]:
                raise StoppedError

        with pytest.raises(StoppedError):
            train_shallowest(task, split, settings, 0.01, target, progress)

    def fail(path, data):  # all is in its place but the record
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("qcat.training.depth.write_json", fail)
        with pytest.raises(StoppedError):
            train_shallowest(task, split, settings, 0.01, target)
    assert (target / "adapter_model.safetensors").exists()
    with pytest.raises(TrainError, match="unfinished run of other"):
        train_shallowest(task, split, settings, 0.02, target)
    with pytest.raises(TrainError, match="unfinished run of other"):
        train(task, split, settings, target)

    record = train_shallowest(task, split, settings, 0.01, target)
    assert record == alone | {"max_f1_loss": 0.01, "tried": record["tried"]}
    assert [depth["layers"] for depth in record["tried"]] == [2, 1]
    assert sorted(os.listdir(target)) == sorted(os.listdir(tmp_path / "alone"))
    for path in target.iterdir():
        if path.name not in ("run.json", "curves.png"):
            assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()
    assert json.loads((target / "run.json").read_text()) == record
    assert Run.read(target).settings == Run.read(tmp_path / "alone").settings
