"""What 4 bits cost on really pretrained models, by each way to get there.

    python bench/four_bits.py train   --models smollm2 --data household
    python bench/four_bits.py measure --models smollm2 --data household
    python bench/four_bits.py table

`train` fine-tunes block scales and a LoRA adapter on the same questions; `measure` makes the files
and asks all of them the held-out questions in turns; `table` prints what is there, as a table and
one line of JSON. Each finished piece is kept under build/four_bits, so a run that was stopped goes
on. CLINC150 and Banking77 are looked for under QCAT_SHARED. Measure on a machine that does nothing
else. Besides the pretrained models there are their rotated forms and the small base that comes with
qcat, whose weights never lay on a grid (`bases.py`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bases import base_of, title
from data_sets import questions

from qcat.cli.output import Bars, table
from qcat.evaluation.metrics import mcnemar
from qcat.threads import wait_briefly
from qcat.workflows.choose import BESIDE

if TYPE_CHECKING:
    from qcat.data.split import Split
    from qcat.task import Task

OUT = Path(__file__).resolve().parent.parent / "build" / "four_bits"
METHODS = ("scales", "lora")
FEW = 100
DATA = ("household", "clinc150", "banking77")
PRETRAINED = ("smollm2", "qwen2.5-coder")
ROUNDED = ("q4_0", "q4_k_m", "q5_k_m", "q8_0")
"""What the merged LoRA adapter is quantized to, after the training."""
WAYS = ("f16", *ROUNDED, BESIDE)
"""Of the LoRA adapter: merged, and last beside the base's own file; scales are in Q4_0 alone."""


def main() -> None:
    """Do what was asked for."""
    warnings.simplefilter("ignore")
    wait_briefly()
    options = _options()
    if options.what == "table":
        print_table()
        return
    step: Callable[..., None] = {"train": train_all, "measure": measure_all}[options.what]
    for model in options.models.split(","):
        for data in options.data.split(","):
            step(model, data, options)


# Training


def train_all(model: str, data: str, options: argparse.Namespace) -> None:
    """Train by each method; a run that is there is left as it is."""
    from qcat.training.settings import Settings
    from qcat.training.train import train

    task, split = questions(data)
    split = replace(split, test=split.test[:FEW])  # `measure` asks them all
    for method in options.methods.split(","):
        run = OUT / "runs" / f"{model}-{data}-{method}"
        if (run / "run.json").exists():
            continue
        settings = Settings(base=str(base_of(model)), method=method, epochs=options.epochs)
        start = time.monotonic()
        with Bars() as bars:
            train(task, split, settings, run, bars.show)
        (run / "hours.json").write_text(json.dumps((time.monotonic() - start) / 3600))


# Measuring


def measure_all(model: str, data: str, options: argparse.Namespace) -> None:
    """Make all files of a model and a data set, and ask them in turns."""
    cell = OUT / "cells" / f"{model}-{data}.json"
    if cell.exists():
        return
    work = OUT / "work" / f"{model}-{data}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    task, split = questions(data)
    files: dict[str, Path] = {}
    references: dict[str, Any] = {}
    for method in options.methods.split(","):
        run = OUT / "runs" / f"{model}-{data}-{method}"
        references[method], encoded, made = _files(
            task, split, run, work / method, options.ways.split(",")
        )
        files |= {f"{method} {kind}": path for kind, path in made.items()}
    found = _ask(files, base_of(model), encoded, split, next(iter(references.values())))
    truth = np.array([example.label for example in split.test])
    rows = []
    for method, reference in references.items():
        hours = json.loads((OUT / "runs" / f"{model}-{data}-{method}" / "hours.json").read_text())
        rows.append(_row(f"{method} torch", reference, reference, truth))
        for way in (way for way in files if way.split()[0] == method):
            size = files[way].stat().st_size
            if BESIDE in way:
                size += base_of(model).stat().st_size
            row = _row(way, found[way]["logs"], reference, truth)
            rows.append(row | {"mb": size / 1e6, "ms": found[way]["ms"], "hours": hours})
    rows = [{"model": model, "data": data} | row for row in rows]
    cell.parent.mkdir(parents=True, exist_ok=True)
    cell.write_text(json.dumps(rows, indent=1))
    shutil.rmtree(work)


def _files(
    task: Task, split: Split, run: Path, folder: Path, ways: Sequence[str]
) -> tuple[Any, Any, dict[str, Path]]:
    """The merged model's answers in torch, the prompt in tokens, and the GGUFs."""
    from qcat_convert.adapter import served_base, write_adapter
    from qcat_convert.quantize import quantize
    from qcat_convert.stream import convert

    from qcat.threads import default_threads
    from qcat.workflows.export_job import Request, prepare_job

    folder.mkdir()
    request = Request(
        task,
        folder / "unused",
        adapter=run,
        training=tuple(example.text for example in split.train),
        held_out=tuple(split.test),
    )
    full = folder / "f16.gguf"
    with Bars() as bars:
        job, served = prepare_job(full, request)
        measured = convert(job, lambda done, total: bars.show(f"merge {run.name}", done, total))
    ways = ("q4_0",) if job.source.scales else ways
    files = {"f16": full} if "f16" in ways else {}
    for kind in (kind for kind in ROUNDED if kind in ways):
        files[kind] = folder / f"{kind}.gguf"
        quantize(full, files[kind], kind, imatrix=measured.imatrix, threads=default_threads())
    if BESIDE in ways:
        files[BESIDE] = folder / f"{BESIDE}.gguf"
        file = served_base(job.source, folder).file
        write_adapter(files[BESIDE], job.source, base=file, task=served.encoded.task, made_from={})
    return measured.reference, served.encoded, files


def _ask(
    files: dict[str, Path], base: Path, encoded: Any, split: Split, reference: Any
) -> dict[str, Any]:
    """Label log-probabilities and median milliseconds of each file, the files taking turns."""
    from qcat.evaluation.proof import replay_gguf
    from qcat.workflows.choose import try_all

    rests = [encoded.rest(example.text) for example in split.test]

    def ask(path: Path, rows: Sequence[int]) -> Any:
        beside = base if path.stem == BESIDE else None
        return replay_gguf(path, encoded, [rests[row] for row in rows], base=beside)

    with Bars() as bars:
        trials, found = try_all(
            files,
            ask,
            reference,
            [example.label for example in split.test],
            partial(bars.show, "ask"),
        )
    return {t.kind: {"ms": t.median_ms, "logs": found[t.kind]} for t in trials}


def _row(way: str, logs: Any, reference: Any, truth: Any) -> dict[str, Any]:
    """How a way did; `wrong` are the numbers of the questions that it got wrong."""
    from qcat.calibration.reliability import reliability
    from qcat.evaluation.proof import quality

    return {
        "way": way,
        "questions": len(truth),
        **quality(logs, reference, truth.tolist()).to_dict(),
        "ece": reliability(np.exp(logs), truth).to_dict()["ece"],
        "wrong": np.flatnonzero(logs.argmax(1) != truth).tolist(),
    }


# The table


def print_table() -> None:
    """Everything measured so far; McNemar's test is against LoRA in torch."""
    rows = [
        row
        for path in sorted((OUT / "cells").glob("*.json"))
        for row in json.loads(path.read_text())
    ]
    heading = (
        "model", "questions", "way", "accuracy", "McNemar p", "flips", "mean KL", "largest", "ECE",
        "MB", "ms", "hours",
    )  # fmt: skip
    shown = [heading]
    for row in sorted(rows, key=lambda r: (r["model"], r["data"], r["way"])):
        merged = [
            other["wrong"]
            for other in rows
            if (other["model"], other["data"], other["way"])
            == (row["model"], row["data"], "lora torch")
        ]
        shown.append(
            (
                title(row["model"]),
                f"{row['data']}, {row['questions']}",
                row["way"],
                f"{row['accuracy']:.3f}",
                f"{likeness(row['wrong'], merged[0]):.2g}" if merged else "",
                str(row["flips"]),
                f"{row['kl_mean']:.2g}",
                f"{row['kl_max']:.2g}",
                f"{row['ece']:.3f}",
                *(f"{row[key]:.{places}f}" if key in row else "" for key, places in FIGURES),
            )
        )
    print("\n".join(table(shown)))
    print(json.dumps([{k: v for k, v in row.items() if k != "wrong"} for row in rows]))


FIGURES = (("mb", 0), ("ms", 0), ("hours", 2))


def likeness(wrong: Sequence[int], others: Sequence[int]) -> float:
    """McNemar's p that two models err alike, from the questions each gets wrong."""
    return mcnemar(len({*others} - {*wrong}), len({*wrong} - {*others}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "measure", "table"])
    parser.add_argument("--models", default=",".join(PRETRAINED))
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ways", default=",".join(WAYS), help="of the merged LoRA adapter")
    parser.add_argument("--epochs", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
