"""Memory of `qcat batch` over many rows, killed twice on the way; is the output whole?

    python bench/batch.py                                  a million rows, CSV to Parquet
    python bench/batch.py --rows 20000 --from parquet --to jsonl

The model is the smallest that can be made: one layer of random weights. The command runs as a
user's would, is killed (-9) when about a third and two thirds of the rows are answered, and given
again. Its resident memory is read from /proc ten times a second. Prints a table and one line of
JSON, and draws memory over time. Fails if a row is lost, comes twice or has no answer, if it was
killed fewer times than planned, or if memory grew while it asked.
"""

from __future__ import annotations

import argparse
import csv
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the machine may have other work
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from qcat.cli.output import table
from qcat.data.dataset import read_examples
from qcat.files import write_whole
from qcat.task import Task

ROOT = Path(__file__).resolve().parent.parent
HOUSEHOLD = ROOT / "examples" / "household"
QCAT = Path(sys.executable).with_name("qcat")
KINDS = ("csv", "jsonl", "parquet")
KILL_AT = (1 / 3, 2 / 3)  # of the rows
WORDS = 6  # of a question that are kept
GROWTH = 1.25  # late memory over early memory that is too much
EVERY = 0.1  # seconds between two looks at the memory
PIECE = 50_000  # rows of Parquet that are made or read at once


@dataclass
class Run:
    """One process from its start to its end or its kill."""

    rows_before: int
    """Answered when it began."""
    rows_after: int = 0
    killed: bool = False
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    """Seconds since the first run began, resident memory in MB, rows answered."""


def main() -> None:
    """Make a model and rows, run, check, print, draw."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        model, source = work / "model", work / f"in.{options.source}"
        target = work / f"out.{options.target}"
        _say("making the model")
        make_model(model)
        _say("making the rows")
        texts = questions()
        write_rows(source, texts, options.rows)
        runs = list(measure(model / "household.gguf", source, target, options.rows))
        _say("reading the output")
        labels = check(target, texts, options.rows)
    found = {
        "rows": options.rows,
        "from": options.source,
        "to": options.target,
        "labels": labels,
        "runs": [summary(run) for run in runs],
    }
    columns = list(found["runs"][0])
    print("\n".join(table([columns, *([str(run[c]) for c in columns] for run in found["runs"])])))
    print(f"{options.rows} rows in order, none lost, none twice, {labels} labels among them")
    write_whole(options.png, drawn(runs))
    print(json.dumps(found))
    kills = sum(run.killed for run in runs)
    if kills < len(KILL_AT):
        sys.exit(f"batch: killed {kills} times, not {len(KILL_AT)}: give more --rows")
    for run in found["runs"]:
        if run["early_mb"] and run["late_mb"] > GROWTH * run["early_mb"]:
            sys.exit(f"batch: memory grew from {run['early_mb']} to {run['late_mb']} MB")


def make_model(folder: Path) -> None:
    """A household model with one layer of random weights."""
    sys.path.insert(0, str(ROOT / "tools"))
    import tiny_model

    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    task = Task.read(HOUSEHOLD / "task.toml")
    base = folder.with_name("base")
    texts = [*questions(), *(f"{task.instruction} {label}" for label in task.labels)]
    count = tiny_model.make_tokenizer(base, texts)
    tiny_model.make_base(base, vocabulary=count, hidden=64, layers=1)
    export(Request(task, folder, base=str(base), quantization="q8_0"))


def questions() -> list[str]:
    """Short questions: how those of the example begin."""
    task = Task.read(HOUSEHOLD / "task.toml")
    examples = read_examples(HOUSEHOLD / "questions.jsonl", task)
    return [" ".join(example.text.split()[:WORDS]) for example in examples]


def made_rows(texts: list[str], count: int) -> Iterator[dict[str, Any]]:
    """Rows with a number of their own, a question and a column that nobody asks."""
    rng = random.Random(0)
    for number in range(count):
        yield {"id": number, "text": rng.choice(texts), "note": f"row {number},\nof {count}"}


def write_rows(path: Path, texts: list[str], count: int) -> None:
    """The input."""
    rows = made_rows(texts, count)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text", "note"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        import pyarrow.parquet

        pieces = []
        while some := list(islice(rows, PIECE)):
            pieces.append(pyarrow.Table.from_pylist(some))
        # One row group for all, which qcat must not read whole.
        pyarrow.parquet.write_table(pyarrow.concat_tables(pieces), path, row_group_size=count)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The output, by other means than qcat's."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                yield {**row, "id": int(row["id"])}
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield {**row, "id": int(row["id"])}
    else:
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(PIECE):
            for row in batch.to_pylist():
                yield {**row, "id": int(row["id"])}


def measure(model: Path, source: Path, target: Path, rows: int) -> Iterator[Run]:
    """Give the command until it is done, killing it twice."""
    began = time.monotonic()
    kills = [int(rows * share) for share in KILL_AT]
    answered = 0
    while True:
        stop = kills.pop(0) if kills else None
        _say(f"running from row {answered}" + (f", to be killed at {stop}" if stop else ""))
        run = watch(model, source, target, answered, stop, began)
        yield run
        answered = run.rows_after
        if not run.killed:
            return


def watch(
    model: Path, source: Path, target: Path, before: int, stop: int | None, began: float
) -> Run:
    """Run the command and look at it; kill it once `stop` rows are answered."""
    command = [QCAT, "batch", source, "-o", target, "-m", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = Run(before)
    journal = Journal(Path(f"{target}.part"))
    while process.poll() is None:
        memory = resident(process.pid)
        answered = journal.answered()
        if memory:
            run.samples.append((time.monotonic() - began, memory, answered))
        if stop is not None and answered >= stop:
            process.kill()
            run.killed = True
            break
        time.sleep(EVERY)
    out, error = process.communicate()
    if not run.killed and process.returncode:
        sys.exit(f"batch: the command failed: {error}")
    run.rows_after = journal.answered()
    if out:
        _say(out.strip())
    return run


class Journal:
    """Counts the answers in the journal as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._lines = path, 0, 0

    def answered(self) -> int:
        """So many are there; what was counted before, if the file is gone."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                while data := file.read(1 << 20):
                    self._at += len(data)
                    self._lines += data.count(b"\n")
        except FileNotFoundError:
            pass
        return max(self._lines - 1, 0)


def resident(process: int) -> float:
    """Resident memory in MB; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) / 1024 if found else 0.0


def check(target: Path, texts: list[str], rows: int) -> int:
    """Compare the output with the input row by row; how many labels it has."""
    labels = set()
    count = 0
    for wanted, got in zip(made_rows(texts, rows), read_rows(target), strict=True):
        assert {name: got[name] for name in wanted} == wanted, (wanted, got)
        assert got["label"], got
        labels.add(got["label"])
        count += 1
    assert count == rows
    return len(labels)


def summary(run: Run) -> dict[str, Any]:
    """Figures of a run: `early_mb` and `late_mb` are of the first and last fifth of the asking."""
    asking = [s for s in run.samples if run.rows_before < s[2] < run.rows_after]
    fifth = max(len(asking) // 5, 1)
    seconds = asking[-1][0] - asking[0][0] if len(asking) > 1 else 0.0
    answered = asking[-1][2] - asking[0][2] if asking else 0
    return {
        "rows": f"{run.rows_before}-{run.rows_after}",
        "killed": run.killed,
        "seconds": round(run.samples[-1][0] - run.samples[0][0], 1),
        "rows_a_second": round(answered / seconds) if seconds else None,
        "early_mb": round(median(s[1] for s in asking[:fifth]), 1) if asking else None,
        "late_mb": round(median(s[1] for s in asking[-fifth:]), 1) if asking else None,
        "peak_mb": round(max(s[1] for s in run.samples), 1),
    }


def drawn(runs: list[Run]) -> bytes:
    """Memory and rows answered over time as a PNG."""
    from matplotlib.figure import Figure

    from qcat.report.plot import BLUE, GREY, ORANGE, bare, png

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    for run in runs:
        times, memory, rows = zip(*run.samples, strict=True)
        axes.plot(times, memory, color=BLUE)
        below.plot(times, rows, color=BLUE)
        for panel in (axes, below):
            if run.killed:
                panel.axvline(times[-1], color=ORANGE, linestyle=":")
            bare(panel)
    axes.set_ylim(bottom=0)
    axes.set_title("resident memory of qcat batch, MB (dotted: killed)", loc="left", fontsize=10)
    below.set_title("rows answered", loc="left", fontsize=10)
    below.set_xlabel("seconds", color=GREY)
    return png(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--from", dest="source", choices=KINDS, default="csv")
    parser.add_argument("--to", dest="target", choices=KINDS, default="parquet")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put 300 MB for a while")
    parser.add_argument("--png", type=Path, default=Path("batch.png"), metavar="FILE")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"batch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
