"""`qcat export --quant auto`: the choice itself, and the whole way through the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given
from hypothesis import strategies as st
from qcat_convert.quantize import CANDIDATES

from qcat.data.dataset import Example
from qcat.errors import ExportError
from qcat.evaluation.proof import Replayed
from qcat.gguf.bundle import Bundle
from qcat.gguf.header import read_header
from qcat.workflows.choose import Trial, choose, try_all, within_size
from qcat.workflows.export import export
from qcat.workflows.export_job import Request
from qcat.workflows.retrain import _recipe

QUESTIONS = 40


def trial(kind, median_ms, flips, size=1):
    return Trial(kind, size, median_ms, flips, 0.5, 0.01)


trials_strategy = st.lists(
    st.builds(
        trial,
        st.sampled_from(CANDIDATES),
        st.floats(0.1, 1e3),
        st.integers(0, QUESTIONS),
        st.integers(1, 9),
    ),
    min_size=1,
)


@given(trials_strategy, st.floats(0, 1))
def test_the_fastest_within_the_budget_or_else_the_one_with_the_fewest_flips(trials, budget):
    chosen = choose(trials, QUESTIONS, budget)
    passing = [t for t in trials if t.flips / QUESTIONS <= budget]
    if passing:
        assert chosen in passing
        assert all(chosen.median_ms <= t.median_ms for t in passing)
    else:
        assert all(chosen.flips <= t.flips for t in trials)


@given(trials_strategy, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_budget_never_gives_a_slower_one(trials, one, two):
    low, high = (choose(trials, QUESTIONS, budget) for budget in sorted((one, two)))
    if low.flips / QUESTIONS <= min(one, two):
        assert high.median_ms <= low.median_ms


def test_examples_of_the_choice():
    q4, q8 = trial("q4_0", 9.0, 3), trial("q8_0", 14.0, 0)
    assert choose([q4, q8], QUESTIONS, 0.1) is q4
    assert choose([q4, q8], QUESTIONS, 0.075) is q4  # just as many as may
    assert choose([q4, q8], QUESTIONS, 0.074) is q8
    assert choose([q4, trial("iq4_nl", 1.0, 2)], QUESTIONS, 0).kind == "iq4_nl"  # the fewest
    assert choose([trial("a", 5.0, 0, 9), trial("b", 5.0, 0, 2)], QUESTIONS, 0).kind == "b"


def test_files_that_are_too_large_are_left_out(tmp_path):
    files = {kind: tmp_path / kind for kind in ("q8_0", "q4_0", "q4_k_m")}
    for path, size in zip(files.values(), (3_000_000, 1_000_000, 1_500_000), strict=True):
        path.write_bytes(bytes(size))
    assert within_size(files, None) == files
    assert [*within_size(files, 1.5)] == ["q4_0", "q4_k_m"]
    with pytest.raises(ExportError, match=r"q4_0 makes a file of 1\.0 MB, more than the 0\.9 of"):
        within_size(files, 0.9)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_files_take_turns_and_every_question_is_asked_once_of_each(count, tmp_path):
    files = {}
    for kind in CANDIDATES:
        files[kind] = tmp_path / kind
        files[kind].write_bytes(b"x" * len(files))
    rng = np.random.default_rng(0)
    reference = np.log(rng.dirichlet(np.ones(3), count))
    asked, told = [], []

    def ask(path, rows):
        asked.append((path.name, list(rows)))
        return Replayed(reference[list(rows)], [0.001 * (1 + row) for row in rows])

    trials, found = try_all(
        files, ask, reference, [0] * count, lambda done, total: told.append((done, total))
    )
    for kind in CANDIDATES:
        rows = sorted(row for name, part in asked for row in part if name == kind)
        assert rows == list(range(count))
        np.testing.assert_array_equal(found[kind], reference)
    turns = [name for name, _ in asked]
    for start in range(0, len(turns), len(CANDIDATES)):
        assert set(turns[start : start + len(CANDIDATES)]) == set(CANDIDATES)
    assert told[-1] == (count * 4, count * 4)
    assert [t.flips for t in trials] == [0] * 4
    assert [t.bytes for t in trials] == [1, 2, 3, 4]
    assert trials[0].median_ms == pytest.approx((1 + count) / 2)


def held_out(count):
    rows = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    return rows[:: len(rows) // count][:count]


def test_through_the_command(qcat, make_checkpoint, tmp_path):
    adapter = make_checkpoint().adapter
    (tmp_path / "held.jsonl").write_text("\n".join(held_out(12)), "utf-8")
    task = ("-t", EXAMPLE / "task.toml")
    more = ("--data", tmp_path / "held.jsonl", "--quant", "auto", "--max-flips", "1")
    done = qcat("export", adapter, *task, *more, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][:3] == ["quantization", "MB", "ms"]
    assert [line[0] for line in lines[1:5]] == list(CANDIDATES)
    [kept] = [line[0] for line in lines[1:5] if line[-1] == "kept"]

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quantization"] == kept
    assert [trial["kind"] for trial in report["choice"]] == list(CANDIDATES)
    assert choose([Trial(**t) for t in report["choice"]], 12, 1.0).kind == kept
    [chosen] = [t for t in report["choice"] if t["kind"] == kept]
    assert chosen["flips"] == report["proof"]["quantized"]["flips"]
    assert chosen["kl_mean"] == report["proof"]["quantized"]["kl_mean"]
    assert f"| {kept} |" in (tmp_path / "out" / "MODEL_CARD.md").read_text("utf-8")
    gguf = tmp_path / "out" / "household.gguf"
    assert [path.name for path in gguf.parent.glob("*.gguf")] == [gguf.name]
    wanted = {"q4_k_m": "Q4_K"}.get(kept, kept.upper())
    assert wanted in {tensor.type for tensor in read_header(gguf).tensors}
    assert _recipe(Bundle.read(gguf))["quantization"] == kept  # what `qcat retrain` exports again
    assert qcat("ask", "-m", gguf, "gutters?").returncode == 0


def test_the_budget_decides_and_none_that_passes_is_refused(make_checkpoint, household, tmp_path):
    adapter = make_checkpoint().adapter
    labels = list(household.labels)
    rows = [json.loads(line) for line in held_out(109)]
    questions = tuple(Example(row["text"], labels.index(row["label"])) for row in rows)

    def exported(name, max_flips, max_mb=None):
        more = {"quantization": "auto", "held_out": questions, "max_flips": max_flips}
        more["max_mb"] = max_mb
        return export(Request(household, tmp_path / name, adapter=adapter, **more))

    report = exported("any", 1.0)
    sizes = sorted(t["bytes"] / 1e6 for t in report["choice"])
    small = exported("small", 1.0, max_mb=sizes[1])
    assert 1 <= len(small["choice"]) < 4
    assert all(t["bytes"] / 1e6 <= sizes[1] for t in small["choice"])
    with pytest.raises(ExportError, match="--max-mb"):
        exported("none", 1.0, max_mb=sizes[0] / 2)
    flips = [t["flips"] for t in report["choice"]]
    assert 0 < min(flips) < max(flips)  # or this test says nothing
    exact = exported("exact", min(flips) / len(questions))
    assert exact["proof"]["quantized"]["flips"] == min(flips)

    with pytest.raises(ExportError, match="none of q4_0, q4_k_m, iq4_nl, q8_0") as refused:
        exported("no", (min(flips) - 1) / len(questions))
    assert f"{min(flips)} of {len(questions)} labels changed" in str(refused.value)
    assert "or with a higher --max-flips" in str(refused.value)
    assert "--quant" not in str(refused.value)  # all that could help was tried
    assert len(json.loads((tmp_path / "no.report.json").read_text())["choice"]) == 4
    with pytest.raises(ExportError, match="or with a higher --max-mb") as refused:
        exported("no", 0, max_mb=sizes[0])
    assert "--quant" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"any", "small", "exact", "no.report.json"}


def test_without_held_out_questions_it_is_one_line(qcat, make_checkpoint, tmp_path):
    adapter = make_checkpoint("qwen3", hidden=64).adapter
    done = qcat(
        "export", adapter, "-t", EXAMPLE / "task.toml", "--quant", "auto", "-o", tmp_path / "out"
    )
    assert done.returncode == 1
    assert "held-out questions: give them with --data" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_a_usage_error(qcat, make_checkpoint, tmp_path):
    adapter = make_checkpoint("qwen3", hidden=64).adapter
    done = qcat("export", adapter, "--quant", "best", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "'best'" in done.stderr
