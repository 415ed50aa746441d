"""`qcat bench`: what it says is what it measured, and bad input is one line."""

from __future__ import annotations

import json

import pytest

from qcat.workflows import measure
from qcat.workflows.measure import BATCHES, Spread, questions_for


def test_spread():
    found = Spread.of([0.001] * 19 + [1.0])
    assert found.median == pytest.approx(1)
    assert 1 < found.p95 < 1000
    assert found.count == 20


def test_questions_name_every_label_in_turn():
    found = questions_for(["pool", "fence"], 9)
    assert len(found) == 9
    assert len(set(found[:8])) == 8
    assert all("pool" in question for question in found[::2])
    assert all("fence" in question for question in found[1::2])


def test_json_and_plot(qcat, house, tmp_path):
    plot = tmp_path / "b.png"
    done = qcat("bench", house, "--count", 20, "--json", "--plot", plot)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["bytes"] == house.stat().st_size
    assert found["labels"] == 18
    assert found["warm"]["count"] == 20
    assert 0 < found["warm"]["median"] <= found["warm"]["p95"]
    assert found["cold"]["median"] > found["warm"]["median"]  # it holds one, and a start
    assert list(found["by_batch"]) == [str(size) for size in BATCHES]
    assert "1" in found["by_threads"]
    assert found["peak_memory"] > found["bytes"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_own_questions_in_a_table(qcat, house, tmp_path):
    asked = tmp_path / "q.txt"
    asked.write_text("one\n\ntwo three four five six seven eight nine ten eleven\n", "utf-8")
    done = qcat("bench", house, "--questions", asked, "--count", 20)
    assert done.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert rows["warm"].startswith("p50 ")
    assert "questions a second" in rows["batch"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "no questions"),
        (b"\n \n", "no questions"),
        (b"\xff", "UTF-8"),
        (b"one\n\n\0\1\ntwo", "q.txt:3: the question is empty"),
    ],
)
def test_bad_questions(qcat, house, tmp_path, content, said):
    asked = tmp_path / "q.txt"
    if content is not None:
        asked.write_bytes(content)
    done = qcat("bench", house, "--questions", asked)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_bad_model_or_plot(qcat, house, tmp_path):
    assert qcat("bench", tmp_path / "absent.gguf").returncode == 1
    done = qcat("bench", house, "--plot", tmp_path / "no" / "b.png")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr


def test_the_users_review_queue_is_left_alone(call, bundle_file, household, tmp_path, monkeypatch):
    model = bundle_file(household.replace(review="text"))
    mine = tmp_path / "mine.txt"
    mine.write_text("no queue: whoever opens it as one fails")
    monkeypatch.setattr(measure, "COLD_STARTS", 1)
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for queue in (None, mine):
        if queue:
            monkeypatch.setenv("QCAT_REVIEW", str(queue))
        done = call("bench", model, "--count", 20)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert mine.read_text().startswith("no queue")
