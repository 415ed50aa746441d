"""Training: the split, the loss against plain arithmetic, the run that is killed and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcat.backends.llama import LlamaModel
from qcat.base.checkpoint import load_base
from qcat.data.dataset import Example, read_examples
from qcat.data.split import Split, split_examples
from qcat.encoding.prompt import build_prompt, encode_segments
from qcat.encoding.scoring import label_log_probabilities
from qcat.encoding.tokenization import HubTokenizer
from qcat.encoding.trie import LabelTrie
from qcat.errors import DataError, ModelError, TrainError
from qcat.task import Task
from qcat.training.forward import branch_states, shared_prefix_states
from qcat.training.loop import _parts, _thinned
from qcat.training.objective import Encoded, Scorer
from qcat.training.settings import Settings
from qcat.training.train import train

# First tokens shared, a label that begins another, a label alone on its branch.
SEQUENCES = [(5,), (5, 6), (5, 6, 7), (8, 9), (8, 10, 11), (12,)]


def sorts(count):
    """A task with so many labels."""
    return Task("sorts", {f"l{i}": "" for i in range(count)})


# The split


@given(
    st.lists(st.integers(7, 25), min_size=2, max_size=5),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_families_stay_together(sizes, seed, chance):
    examples = [
        Example(f"{label} {family} {row}", label, 1, f"g{label}-{family}")
        for label, families in enumerate(sizes)
        for family in range(families)
        for row in range(chance.randint(1, 4))
    ]
    chance.shuffle(examples)
    task = sorts(len(sizes))
    split = split_examples(examples, task, seed=seed)
    parts = [split.train, split.validation, split.test]
    assert sorted(e.text for part in parts for e in part) == sorted(e.text for e in examples)
    groups = [{e.group for e in part} for part in parts]
    assert all(not a & b for a, b in combinations(groups, 2))
    assert {e.label for e in split.train} == set(range(len(sizes)))
    assert split == split_examples(examples, task, seed=seed)


def test_the_split_is_70_15_15_and_stratified(household):
    from conftest import EXAMPLE

    examples = read_examples(EXAMPLE / "questions.jsonl", household)
    split = split_examples(examples, household, seed=0)
    for part, share in ((split.train, 0.7), (split.validation, 0.15), (split.test, 0.15)):
        assert abs(len(part) / len(examples) - share) < 0.01
        counts = np.bincount([e.label for e in part])
        assert counts.min() > 0.75 * counts.mean()
    assert split != split_examples(examples, household, seed=1)


def test_rows_of_one_text_are_a_family_whatever_their_groups():
    examples = [
        Example(f"{text} {label}", label, 1, group)
        for label in (0, 1)
        for text in ("a", "A", "b", "c", "d", "e", "f", "g", "h")
        for group in (None, f"{text}{label}", f"other {text}{label}")
    ]
    split = split_examples(examples, sorts(2), seed=0)
    parts = (split.train, split.validation, split.test)
    texts = [{e.text.casefold() for e in part} for part in parts]
    assert all(not a & b for a, b in combinations(texts, 2))


def test_a_split_is_written_as_it_can_be_read(household, tmp_path):
    group = "\ud800 cannot be encoded"  # JSON can escape it
    parts = [[Example("who fixed it", 2, 1, group)], [Example("é?", 0, 1)], [Example("b", 1, 1)]]
    Split(*parts).write(tmp_path, household)
    names = ("train", "validation", "test")
    assert [read_examples(tmp_path / f"{name}.jsonl", household) for name in names] == parts


def test_too_few_families_are_refused():
    examples = [Example(f"q{i}", i % 2, i + 1, f"g{i % 16}") for i in range(32)]
    with pytest.raises(DataError, match="label 'l2' has 0 groups of questions, and 7 are needed"):
        split_examples(examples, sorts(3), seed=0)
    examples += [Example(f"x{i}", 2, 33 + i, f"h{i % 6}") for i in range(12)]
    with pytest.raises(DataError, match="label 'l2' has 6 groups"):
        split_examples(examples, sorts(3), seed=0)


@given(st.text(min_size=1), st.floats(0, 1), st.randoms(use_true_random=False))
def test_thinning_leaves_words_of_the_question(text, share, chance):
    example = Example(f"a {text}", 1, 7, "g")
    words = iter(example.text.split())
    thinned = _thinned(example, share, chance)
    assert thinned.text
    assert all(word in words for word in thinned.text.split())  # in order
    assert (thinned.label, thinned.line, thinned.group) == (1, 7, "g")
    assert _thinned(example, 0, chance).text == " ".join(example.text.split())


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 600), st.integers(0, 100))
def test_parts_hold_every_row_once_and_stay_small(lengths, tokens, prefix):
    rows = [Encoded(tuple(range(length)), 0) for length in lengths]
    parts = list(_parts(rows, tokens, prefix))
    assert sorted(len(row.rest) for part in parts for row in part) == sorted(lengths)
    for part in parts:
        assert len(part) == 1 or len(part) * (prefix + max(len(r.rest) for r in part)) <= tokens


# The forward pass and the loss, against passes that share nothing


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return make_checkpoint(hidden=64).model.eval()


def plain_log_probabilities(model, tokens):
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0], -1)


def test_a_shared_prefix_changes_nothing(model):
    chance = np.random.default_rng(0)
    prefix = chance.integers(20, 200, 17).tolist()
    rests = [chance.integers(20, 200, size).tolist() for size in (1, 9, 4, 12)]
    every = shared_prefix_states(model.model, prefix, rests)
    states = every[range(len(rests)), [len(rest) - 1 for rest in rests]]
    alone = [
        model.model(input_ids=torch.tensor([prefix + r])).last_hidden_state[0, -1] for r in rests
    ]
    torch.testing.assert_close(states, torch.stack(alone), atol=1e-4, rtol=1e-4)
    weight = model.model.layers[0].self_attn.k_proj.weight
    shared = torch.autograd.grad(states.square().sum(), weight)[0]
    plain = torch.autograd.grad(torch.stack(alone).square().sum(), weight)[0]
    torch.testing.assert_close(shared, plain, atol=1e-3, rtol=1e-3)


def test_paths_after_rows_change_nothing(model):
    chance = np.random.default_rng(1)
    prefix = chance.integers(20, 200, 11).tolist()
    rests = [chance.integers(20, 200, size).tolist() for size in (7, 1, 12)]
    paths = [(), (33,), (44, 55, 66), (44,), ()]
    with torch.inference_mode():
        for path, states in zip(
            paths, branch_states(model.model, prefix, rests, paths), strict=True
        ):
            for rest, state in zip(rests, states, strict=True):
                ids = torch.tensor([[*prefix, *rest, *path]])
                alone = model.model(input_ids=ids).last_hidden_state[0, -1]
                torch.testing.assert_close(state, alone, atol=1e-4, rtol=1e-4)


def test_label_loss_is_what_the_runtime_computes(model):
    trie = LabelTrie.build(SEQUENCES, end=2)
    prefix, rests = [30, 31, 32], [[40, 41], [42], [43, 44, 45]]
    scorer = Scorer(model, prefix, trie)
    wanted = np.array(
        [
            label_log_probabilities(
                trie,
                [
                    plain_log_probabilities(model, [*prefix, *rest, *branch.path])[-1][
                        branch.tokens
                    ]
                    for branch in trie.branches
                ],
            )
            for rest in rests
        ]
    )
    np.testing.assert_allclose(scorer.log_probabilities(rests), wanted, atol=1e-4)
    for label in range(len(SEQUENCES)):
        batch = [Encoded(tuple(rest), label) for rest in rests]
        loss = scorer.loss(batch, "labels").item()
        assert loss == pytest.approx(-wanted[:, label].mean(), abs=1e-4)


def test_answer_loss_is_the_language_models(model):
    trie = LabelTrie.build(SEQUENCES, end=2)
    prefix, rest = [30, 31, 32], [40, 41]
    for label, answer in enumerate(SEQUENCES):
        given_ = [*prefix, *rest, *answer]
        rows = plain_log_probabilities(model, given_)
        start = len(prefix) + len(rest) - 1
        wanted = -sum(rows[start + i][t].item() for i, t in enumerate((*answer, trie.end)))
        loss = Scorer(model, prefix, trie).loss([Encoded((40, 41), label)], "answer").item()
        assert loss == pytest.approx(wanted, abs=1e-4)


# The command

LOOSE = ("--quant", "q8_0", "--max-flips", "1")  # how well it was quantized is not the matter here


@pytest.fixture
def job(easy_job):
    """A folder with a base, a task and easy questions, and the arguments of `qcat train`."""
    return easy_job


@pytest.fixture
def run(easy_run):
    """A finished run."""
    return easy_run


def test_trains_exports_and_asks(qcat, run, tmp_path):
    folder, done = run
    assert "never trained on: accuracy" in done.stdout
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        f"epoch {number} of 8" for number in range(1, 9)
    ]
    assert sorted(os.listdir(folder)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "curves.png",
        "metrics.csv",
        "run.json",
        "task.toml",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    record = json.loads((folder / "run.json").read_text())
    assert record["test"]["accuracy"] > 0.8  # by chance 0.25
    assert record["history"][-1]["train_loss"] < 0.5 * record["history"][0]["train_loss"]
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + len(record["history"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    made = qcat("export", folder, "-o", tmp_path / "out", *LOOSE)
    assert made.returncode == 0, made.stderr
    answer = qcat("ask", "-m", tmp_path / "out" / "sorts.gguf", "who did the motor here")
    assert answer.stdout == "pool pump\n"


def test_training_sees_the_ids_that_the_runtime_sees(run, qcat, tmp_path):
    folder, _ = run
    qcat("export", folder, "-o", tmp_path / "out", *LOOSE)
    task = Task.read(folder / "task.toml")
    tokenizer = HubTokenizer(
        Path(json.loads((folder / "run.json").read_text())["settings"]["base"])
    )
    prompt = build_prompt(task, tokenizer)
    with LlamaModel(tmp_path / "out" / "sorts.gguf", vocab_only=True) as served:
        assert build_prompt(task, served) == prompt
        for part in ("train", "validation", "test"):
            for example in read_examples(folder / f"{part}.jsonl", task):
                rest = prompt.rest(example.text)
                assert encode_segments(rest, tokenizer) == encode_segments(rest, served)


def test_one_seed_gives_one_adapter(qcat, job, run, tmp_path):
    _, args = job
    again = qcat(*args, "-o", tmp_path / "again")
    assert again.stdout.splitlines()[:-1] == run[1].stdout.splitlines()[:-1]
    assert adapter(tmp_path / "again") == adapter(run[0])
    qcat(*args, "-o", tmp_path / "other", "--seed", "1", "--epochs", "1")
    assert adapter(tmp_path / "other") != adapter(run[0])


def test_a_killed_run_goes_on_to_the_same_end(qcat, job, run, tmp_path):
    _, args = job
    target = tmp_path / "run"
    command = [Path(sys.executable).with_name("qcat"), *args, "-o", target]
    process = subprocess.Popen([str(part) for part in command])
    try:
        deadline = time.monotonic() + 120
        while not (target / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (target / "checkpoint.pt").exists()
    assert not (target / "run.json").exists()
    early = qcat("export", target, "-o", tmp_path / "out")
    assert early.returncode == 1
    assert "unfinished" in early.stderr
    other = qcat(*args, "-o", target, "--rank", "4")
    assert other.returncode == 1
    assert "unfinished run of other data, task or settings" in other.stderr
    done = qcat(*args, "-o", target)
    assert done.returncode == 0, done.stderr
    assert adapter(target) == adapter(run[0])
    for name in ("metrics.csv", "task.toml", "train.jsonl"):
        assert (target / name).read_text() == (run[0] / name).read_text()


class StoppedError(Exception):
    pass


def stop_at(step_number):
    def progress(step, done, total, note):
        if step == "train" and done == step_number:
            raise StoppedError

    return progress


@pytest.mark.parametrize(
    ("method", "embeddings"), [("lora", False), ("lora", True), ("scales", False)]
)
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_end(
    job, tmp_path, monkeypatch, method, embeddings
):
    monkeypatch.setattr("qcat.training.loop._SAVE_SECONDS", 0)  # a checkpoint after every step
    folder, _ = job
    task = Task.read(folder / "task.toml")
    split = split_examples(read_examples(folder / "q.jsonl", task), task, seed=0)
    plan = Settings(
        method=method,
        base=str(folder / "base"),
        epochs=2,
        train_embeddings=embeddings,
        word_dropout=0.2,
    )
    train(task, split, plan, tmp_path / "whole")
    for stop in (3, 5, 14):
        with pytest.raises(StoppedError):
            train(task, split, plan, tmp_path / "run", stop_at(stop))
    train(task, split, plan, tmp_path / "run")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert (tmp_path / "run" / "run.json").read_text() == (
        tmp_path / "whole" / "run.json"
    ).read_text()


def test_trained_embeddings_are_exported(qcat, job, tmp_path):
    _, args = job
    assert (
        qcat(*args, "-o", tmp_path / "run", "--train-embeddings", "--epochs", "1").returncode == 0
    )
    made = qcat("export", tmp_path / "run", "-o", tmp_path / "out", *LOOSE)
    assert made.returncode == 0, made.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["proof"]["f16"]["flips"] == 0


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# Bad input


def test_a_finished_run_is_not_overwritten(qcat, job, run):
    done = qcat(*job[1], "-o", run[0])
    assert done.returncode == 1
    assert done.stderr.endswith("holds a finished run: remove it or choose another folder\n")


def test_a_folder_with_something_else_is_left_alone(qcat, job, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    done = qcat(*job[1], "-o", tmp_path)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_a_damaged_checkpoint_is_named(job, tmp_path):
    folder, _ = job
    task = Task.read(folder / "task.toml")
    split = split_examples(read_examples(folder / "q.jsonl", task), task, seed=0)
    plan = Settings(base=str(folder / "base"), method="lora", epochs=2)

    with pytest.raises(StoppedError):
        train(task, split, plan, tmp_path / "run", stop_at(20))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"checkpoint\.pt: damaged"):
        train(task, split, plan, tmp_path / "run")


def test_a_folder_of_a_failed_start_can_be_used_again(qcat, job, tmp_path):
    _, (command, questions, *rest) = job
    failed = qcat(command, questions, *rest, "-o", tmp_path / "run", "--learning-rate", "1e30")
    assert failed.returncode == 1
    done = qcat(command, questions, *rest, "-o", tmp_path / "run", "--epochs", "1")
    assert done.returncode == 0, done.stderr


def test_a_base_that_lacks_weights_is_refused(job, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = job
    shutil.copytree(folder / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights that fit model\.layers\.0\.mlp\.up_proj"):
        load_base(tmp_path / "base", torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base": "no/such-base"}, "no such folder, and not to be had from the hub"),
        ({"-t": "no.toml"}, "no.toml"),
        ({"--learning-rate": "1e30"}, "lower --learning-rate"),
        ({"-o": "/proc/run"}, "choose another folder"),
    ],
)
def test_bad_input_gets_one_line(qcat, job, tmp_path, change, message):
    command, questions, *rest = job[1]
    options = dict(zip(rest[::2], rest[1::2], strict=True)) | {"-o": tmp_path / "run"} | change
    done = qcat(
        command,
        questions,
        *(part for option in options.items() for part in option),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_question_too_long_is_named_with_its_line(qcat, job, tmp_path):
    folder, args = job
    text = (folder / "q.jsonl").read_text()
    row = {"text": "word " * 400, "label": "car", "group": "long"}
    (tmp_path / "q.jsonl").write_text(f"{text}\n{json.dumps(row)}\n")
    done = qcat("train", tmp_path / "q.jsonl", *args[2:], "-o", tmp_path / "run")
    assert done.returncode == 1
    assert "line 129 of the questions: " in done.stderr
