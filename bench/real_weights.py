"""Really pretrained weights against everything that a sceptic would ask for.

    python bench/real_weights.py run --cells 'published-gemma3*'
    python bench/real_weights.py list       the cells, and which are measured
    python bench/real_weights.py table      everything measured so far

`run` trains, exports and measures the cells (`real_cells.py`) whose names match, those that are
measured already left out, and keeps each result under bench/results/real_weights. A run that was
stopped goes on at the last checkpoint of its training. Trainings lie under build/real_weights;
CLINC150 and Banking77 are looked for under QCAT_SHARED. The pretrained models come out of package
registries (`examples/real_models.py`). Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bases import base_of
from data_sets import SHARED, questions
from real_cells import Cell, cells
from real_tables import print_tables
from shape import ROOT, alone, machine, machine_line

from qcat.cli.output import Bars

if TYPE_CHECKING:
    from qcat.data.dataset import Example
    from qcat.task import Task

RESULTS = Path(__file__).resolve().parent / "results" / "real_weights"
WORK = ROOT / "build" / "real_weights"
PROVED = 100
"""Held-out questions of the proof in torch; llama.cpp is asked all of them."""
FREE = 300
"""Held-out questions that are also answered without a grammar."""


def main() -> None:
    """Do what was asked for."""
    options = _options()
    if options.what == "table":
        print_tables(results())
        return
    chosen = [cell for cell in cells() if fnmatch(cell.name, options.cells)]
    for cell in chosen:
        path = RESULTS / f"{cell.name}.json"
        if options.what == "list":
            print("measured" if path.exists() else "        ", cell.name)
        elif not path.exists():
            print(f"{cell.name}; {machine_line(machine())}", flush=True)
            found = measure(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found) + "\n")
            print(json.dumps({k: v for k, v in found["label"].items() if k != "wrong"}), flush=True)


def results() -> dict[str, dict[str, Any]]:
    """What was measured, by the names of the cells."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def measure(cell: Cell) -> dict[str, Any]:
    """Train, export and ask, each in a process of its own."""
    found: dict[str, Any] = {"machine": machine()}
    run = WORK / "runs" / cell.run
    if cell.settings is not None:
        cost = WORK / "runs" / f"{cell.run}.json"
        if not cost.exists():
            cost.write_text(json.dumps(alone(train_cell, cell, run)))
        found["training"] = json.loads(cost.read_text())
    made = WORK / "made" / cell.name
    shutil.rmtree(made, ignore_errors=True)
    found["export"] = alone(export_cell, cell, run, made)
    found |= alone(ask_cell, cell, made)
    shutil.rmtree(made)
    return found


# Training and export


def train_cell(cell: Cell, run: Path) -> dict[str, Any]:
    """Train; what it took."""
    from qcat.training.settings import Settings
    from qcat.training.train import train

    task, split = _questions(cell)
    settings = Settings(base=str(base_of(cell.model)), **cell.settings)
    run.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with Bars() as bars:
        record = train(task, replace(split, test=split.test[:PROVED]), settings, run, bars.show)
    steps = -(-len(split.train) // settings.batch) * len(record["history"])
    return {
        "questions": len(split.train),
        "rate": record["settings"]["rate"],
        "steps": steps,
        "history": record["history"],
        "best_epoch": record["best_epoch"],
    } | _taken(start)


def export_cell(cell: Cell, run: Path, target: Path) -> dict[str, Any]:
    """Export; what it took, and what became of the labels."""
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    task, split = _questions(cell)
    target.parent.mkdir(parents=True, exist_ok=True)
    trained = cell.settings is not None
    request = Request(
        task,
        target,
        adapter=run if trained else None,
        base=str(base_of(cell.model)),
        held_out=tuple(split.test[:PROVED]),
        validation=tuple(split.validation) if trained and cell.table != "defaults" else (),
        training=tuple(example.text for example in split.train),
        max_flips=1,
        **cell.export,
    )
    start = time.monotonic()
    with Bars() as bars:
        report = export(request, bars.show)
    return {
        "quantization": report["quantization"],
        "mb": report["bytes"] / 1e6,
        "proof": report["proof"],
    } | _taken(start)


def _questions(cell: Cell) -> tuple[Task, Any]:
    task, split = questions(cell.data)
    return task.replace(**cell.task), split


def _taken(start: float) -> dict[str, float]:
    """Seconds since then, and the most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.monotonic() - start, "peak_mb": peak * 1024 / 1e6}


# Asking


def ask_cell(cell: Cell, made: Path) -> dict[str, Any]:
    """Put the held-out questions to the file, with `qcat eval`'s own measures."""
    from qcat.evaluation.evaluate import Request, evaluate

    task, split = _questions(cell)
    model = made / f"{task.name}.gguf"
    data = _written(made / "held_out.jsonl", task, split.test)
    strangers = SHARED / "clinc150" / "oos_test.jsonl"
    if cell.data.startswith("household"):
        strangers = ROOT / "examples" / "household" / "off_topic.jsonl"
    with Bars() as bars:
        request = Request(str(model), data, off_topic=strangers if cell.trust else None)
        whole = evaluate(request, bars.show)
        found = {"label": _figures(whole)}
        if cell.free:
            few = [split.test[n * len(split.test) // FREE] for n in range(FREE)]
            data = _written(made / "few.jsonl", task, few)
            free = evaluate(Request(str(model), data, decode="free", timed=1), bars.show)
            known = {answer.text: answer.answer == answer.truth for answer in whole.answers}
            found["free"] = {
                "questions": FREE,
                "accuracy": free.quality.accuracy.value,
                "invalid": free.invalid,
                "accuracy_of_labels": sum(known[example.text] for example in few) / FREE,
                "mass": free.label_mass.median,
            }
        if cell.trust:
            found["trust"] = _trust(cell, model, split, strangers, bars)
    return found


def _written(path: Path, task: Task, examples: list[Example]) -> Path:
    from qcat.data.dataset import jsonl_line

    labels = list(task.labels)
    lines = (jsonl_line(e.text, labels[e.label], e.group) for e in examples)
    path.write_bytes(b"".join(lines))
    return path


def _figures(whole: Any) -> dict[str, Any]:
    """What the tables need of an evaluation; `wrong` are the numbers of the wrong answers."""
    wrong = [n for n, answer in enumerate(whole.answers) if answer.answer != answer.truth]
    sure = [whole.answers[n].confidence for n in wrong]
    signals = whole.off_topic.signals if whole.off_topic else ()
    return {
        "questions": whole.questions,
        "accuracy": whole.quality.accuracy.value,
        "interval": [whole.quality.accuracy.low, whole.quality.accuracy.high],
        "macro_f1": whole.quality.macro_f1.value,
        "weighted_f1": whole.quality.weighted_f1.value,
        "ece_before": whole.confidence.before.ece,
        "ece_after": whole.confidence.after.ece,
        "temperature": whole.confidence.temperature,
        "ms": whole.latency.median_ms,
        "p95_ms": whole.latency.p95_ms,
        "mass": [whole.label_mass.median, whole.label_mass.p5],
        "wrong_confidence": np.quantile(sure, (0.1, 0.5, 0.9)).tolist() if sure else [],
        "auroc": {signal.name: signal.detection.auroc for signal in signals},
        "wrong": wrong,
    }


def _trust(cell: Cell, model: Path, split: Any, strangers: Path, bars: Bars) -> Mapping[str, float]:
    """As `trust.py` measures the small base: 100 divisions of the held-out questions."""
    from trust import SPLITS, Job, summed
    from trust import measure as divide

    from qcat.data.dataset import read_texts

    job = Job(cell.name, model, split.train, split.test, read_texts(strangers))
    return summed(list(divide(job, SPLITS, bars)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "list", "table"])
    parser.add_argument("--cells", default="*", help="pattern of names (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
