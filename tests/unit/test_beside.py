"""An adapter in a file beside its base: the merged model's answers, one base for many tasks."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qcat import Classifier
from qcat.backends import llama
from qcat.data.dataset import Example
from qcat.errors import BundleError, ExportError
from qcat.gguf.bundle import Bundle
from qcat.gguf.header import read_header
from qcat.workflows.export import export
from qcat.workflows.export_job import Request
from qcat.workflows.retrain import _recipe

KINDS = ("qwen3", "qwen2", "llama", "gemma3")
QUESTIONS = tuple(
    Example(f"who fixed the {word} again", 0) for word in ("pool", "gate", "car", "AC")
)


@pytest.fixture(scope="module")
def beside(make_pair, household, tmp_path_factory):
    """`beside(kind)`: the bundle of such an adapter."""
    made = {}

    def make(kind="qwen3"):
        if kind not in made:
            target = tmp_path_factory.mktemp("beside") / "out"
            _, adapter = make_pair(kind)
            request = Request(
                household, target, adapter=adapter, beside=True, held_out=QUESTIONS, max_flips=1
            )
            made[kind] = target, export(request)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_merged_model_does(kind, beside, make_pair):
    folder, report = beside(kind)
    assert report["proof"]["quantized"]["kl_mean"] < 0.02  # activations are rounded to 8 bits
    with Classifier.open(folder / "household.gguf", calibrated=False) as classifier:
        answer = classifier.ask(QUESTIONS[0].text)
    with Classifier.open(
        make_pair(kind)[0], adapter=folder / "household.gguf", calibrated=False
    ) as classifier:
        assert classifier.ask(QUESTIONS[0].text) == answer


def test_without_the_adapter_it_answers_otherwise(beside, make_pair, household, tmp_path):
    folder, _ = beside()
    base, _ = make_pair()
    plain = export(Request(household, tmp_path / "out", base=str(base), quantization="q8_0"))
    assert plain["source"]["method"] is None

    def logs(file):
        with Classifier.open(file, calibrated=False) as classifier:
            return np.log(list(classifier.ask("the pool?").probabilities.values()))

    assert (
        np.abs(logs(folder / "household.gguf") - logs(tmp_path / "out" / "household.gguf")).max()
        > 0.1
    )


def test_what_the_bundle_says(beside, make_pair):
    folder, report = beside()
    base, _ = make_pair()
    header = read_header(folder / "household.gguf")
    assert header.metadata["general.type"] == "adapter"
    assert report["quantization"] == "beside"
    assert report["tensors"] == {"F16": 28}
    lines = (folder / "Modelfile").read_text().splitlines()
    assert f"FROM {base}" in lines
    assert "ADAPTER ./household.gguf" in lines
    assert "adapter beside it" in (folder / "MODEL_CARD.md").read_text("utf-8")


def test_it_is_not_retrained_in_place(beside):
    with pytest.raises(BundleError, match="export that with --beside"):
        _recipe(Bundle.read(beside()[0] / "household.gguf"))


def test_several_tasks_share_one_base_in_memory(beside, make_pair, household, tmp_path):
    base, adapter = make_pair()
    other = household.replace(name="other", instruction="Sort the question.")
    export(Request(other, tmp_path / "other", adapter=adapter, beside=True))
    first = Classifier.open(beside()[0] / "household.gguf", calibrated=False)
    alone = first.ask("the pool?")
    second = Classifier.open(base, adapter=tmp_path / "other" / "other.gguf")
    assert len(llama._shared) == 1
    assert second.ask("the pool?").probabilities != alone.probabilities
    assert first.ask("the pool?") == alone
    first.close()
    first.close()
    assert second.ask("the gate?").label in household.labels
    second.close()
    assert not llama._shared


def test_through_the_command(qcat, make_pair, household, tmp_path):
    base, adapter = make_pair()
    (tmp_path / "task.toml").write_text(household.to_toml(), "utf-8")
    args = ("-t", tmp_path / "task.toml", "--beside", "-o", tmp_path / "out")
    done = qcat("export", adapter, *args)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / "household.gguf"
    by_itself = qcat("ask", "-m", file, "the pool?", "--json")
    assert by_itself.returncode == 0, by_itself.stderr
    named = qcat("ask", "-m", base, "--adapter", file, "the pool?", "--json")
    assert named.stdout == by_itself.stdout
    assert json.loads(named.stdout)["label"] in household.labels
    shown = qcat("show", file)
    assert "28 F16" in shown.stdout
    refused = qcat("deploy", tmp_path / "out")
    assert "is an adapter beside its base: give `ollama create" in refused.stderr
    assert qcat("export", adapter, *args, "--quant", "q8_0").returncode == 2


def test_a_base_with_a_capable_template_is_copied_for_ollama(make_pair, household, tmp_path):
    from qcat.gguf.sections import write_metadata

    base, adapter = make_pair()
    capable = tmp_path / "capable.gguf"
    shutil.copy(base, capable)
    write_metadata(capable, {"tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}"})
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    request = Request(household, tmp_path / "out", adapter=copy, base=str(capable), beside=True)
    export(request)
    assert "FROM ./base-for-ollama.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    there = read_header(tmp_path / "out" / "base-for-ollama.gguf").metadata
    assert "tokenizer.chat_template" not in there


# Bad input


def test_another_base_is_refused(beside, make_pair, house, call, tmp_path):
    file = beside()[0] / "household.gguf"
    with pytest.raises(BundleError, match="is not the base that"):
        Classifier.open(make_pair("qwen2")[0], adapter=file)
    with pytest.raises(BundleError, match="is no adapter"):
        Classifier.open(make_pair()[0], adapter=house)
    done = call("ask", "-m", tmp_path / "none.gguf", "--adapter", file, "pool?")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No such file" in done.stderr


def test_a_base_that_is_gone_is_one_line(beside, make_pair, call, tmp_path):
    folder, _ = beside("qwen2")
    base, _ = make_pair("qwen2")
    base.rename(tmp_path / "elsewhere.gguf")
    try:
        done = call("ask", "-m", folder / "household.gguf", "pool?")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "its base is not to be had" in done.stderr
        moved = call(
            "ask",
            "-m",
            tmp_path / "elsewhere.gguf",
            "--adapter",
            folder / "household.gguf",
            "pool?",
        )
        assert moved.returncode == 0, moved.stderr
    finally:
        (tmp_path / "elsewhere.gguf").rename(base)


def test_what_cannot_lie_beside_is_refused(make_checkpoint, make_pair, household, tmp_path):
    checkpoint = make_checkpoint("qwen3")  # whose base is no GGUF
    with pytest.raises(ExportError, match="is no GGUF"):
        export(Request(household, tmp_path / "a", adapter=checkpoint.adapter, beside=True))
    _, adapter = make_pair()
    shutil.copytree(adapter, tmp_path / "dora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    request = Request(household, tmp_path / "b", adapter=tmp_path / "dora", beside=True)
    with pytest.raises(ExportError, match="uses bias, which cannot lie beside"):
        export(request)
    assert not (tmp_path / "b").exists()


def test_a_damaged_adapter_never_reaches_llama_cpp(beside, tmp_path):
    good = (beside()[0] / "household.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[:-64])
    with pytest.raises(BundleError, match="damaged or cut short"):
        Bundle.read(tmp_path / "cut.gguf")
    (tmp_path / "odd.gguf").write_bytes(good.replace(b".lora_b", b".lora_c", 1))
    with pytest.raises(BundleError, match="no LoRA adapter as qcat writes it"):
        Bundle.read(tmp_path / "odd.gguf")
