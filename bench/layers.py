"""What fewer layers of the base are worth: latency and size, and accuracy where weights are real.

    python bench/layers.py shape       Qwen3-0.6B's shape, random weights, its real vocabulary
    python bench/layers.py household   the example questions on the small base, trained as shipped
    python bench/layers.py             both

The latency is of `Classifier.ask`, every question at every depth in turn within one process. The
first part needs the folder `qwen3-tokenizer` under QCAT_SHARED and 5 GB of room; what its model
answers is noise. Prints a machine line, a table a part and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from shape import (
    EXAMPLE,
    ROOT,
    alone,
    build,
    examples,
    export,
    machine,
    machine_line,
    need_vocabulary,
    positive,
    spread,
    table,
    work_folder,
)

SMALL_BASE = ROOT / "examples" / "base" / "model"
WARM_UP = 3


def main() -> None:
    """Measure what was asked for, print."""
    options = _options()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"machine": machine()}
    print(machine_line(found["machine"]), flush=True)
    with work_folder(options.work) as work:
        for part in (shape, household):
            if options.part in (None, part.__name__):
                found[part.__name__] = part(options, work)
                print("\n" + table(rows(found[part.__name__])), flush=True)
    print("\n" + json.dumps(found))


# The shape of Qwen3-0.6B


def shape(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Export an adapter for each depth of one random base, and ask them in turn."""
    need_vocabulary()
    whole = max(options.shape_layers)
    checkpoint = work / f"checkpoint-{whole}"
    if not checkpoint.is_dir():
        _say("building random weights")
        alone(build, checkpoint, whole)
    found, files = [], []
    for layers in options.shape_layers:
        folder, target = work / f"depth-{layers}", work / f"export-{layers}"
        for old in (folder, target):
            shutil.rmtree(old, ignore_errors=True)
        _say(f"exporting {layers} of {whole} layers")
        alone(adapt, checkpoint / "base", folder, layers)
        made = alone(export, folder, target, options.quant, options.questions)
        files.append(next(target.glob("*.gguf")))
        found.append(
            {
                "layers": layers,
                "MB": made["file_mb"],
                "export s": made["seconds"],
                "export peak MB": made["peak_mb"],
            }
        )
    _say("asking")
    texts = [example.text for example in spread(examples(), options.asked)]
    _add_latency(found, alone(latency, files, texts, options.rounds))
    return found


def adapt(base: Path, folder: Path, layers: int) -> None:
    """A folder as `shape.export` takes it: a base, and a random adapter for a part of it."""
    import torch

    from qcat.base.checkpoint import load_base

    sys.path.insert(0, str(ROOT / "tools"))
    import tiny_model

    folder.mkdir()
    (folder / "base").symlink_to(base.resolve())
    model = load_base(base, torch.bfloat16, layers)
    shaped: dict[str, Any] = {"r": 16, "lora_alpha": 16, "layer_replication": [[0, layers]]}
    tiny_model.make_adapter(folder / "adapter", model, str(base.resolve()), **shaped)


# The small base


def household(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Train, export and ask at each depth: means over the seeds, the test's of the 4-bit file."""
    from qcat.data.dataset import read_examples
    from qcat.data.split import split_examples
    from qcat.task import Task

    task = Task.read(EXAMPLE / "task.toml")
    examples = read_examples(EXAMPLE / "questions.jsonl", task)
    seeds = [
        [
            _trained(task, split_examples(examples, task, seed=seed), seed, layers, options, work)
            for layers in options.household_layers
        ]
        for seed in range(options.draws)
    ]
    found = [_over_seeds(of_depth) for of_depth in zip(*seeds, strict=True)]
    files = [work / f"household-{layers}" / "household.gguf" for layers in options.household_layers]
    texts = [example.text for example in spread(examples, options.asked)]
    _add_latency(found, alone(latency, files, texts, options.rounds))
    return found


def _trained(
    task: Any, split: Any, seed: int, layers: int, options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """One training with the recipe of `examples/household/recipe.py`, and its export."""
    sys.path.insert(0, str(ROOT / "examples" / "household"))
    from recipe import RECIPE

    from qcat.training.settings import Settings
    from qcat.training.train import train
    from qcat.workflows.export import export as run_export
    from qcat.workflows.export_job import Request

    run, target = work / "run", work / f"household-{layers}"
    for old in (run, target):
        shutil.rmtree(old, ignore_errors=True)
    recipe = RECIPE | {"epochs": options.epochs}
    settings = Settings(base=str(SMALL_BASE), seed=seed, layers=layers, **recipe)
    start = time.perf_counter()
    record = train(task, split, settings, run)
    taken = time.perf_counter() - start
    report = run_export(
        Request(
            task,
            target,
            adapter=run,
            quantization=options.quant,
            held_out=tuple(split.test),
            training=tuple(example.text for example in split.train),
            max_flips=1,
        )
    )
    made = report["proof"]["quantized"]
    row = {
        "layers": layers,
        "validation macro-F1": record["history"][record["best_epoch"] - 1]["validation_macro_f1"],
        "test accuracy": made["accuracy"],
        "test macro-F1": made["macro_f1"],
        "flips": made["flips"],
        "MB": report["bytes"] / 1e6,
        "training s": taken,
    }
    _say(f"seed {seed}: {row}")
    return row


def _over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every figure over the seeds, and the spread of the qualities."""
    row: dict[str, Any] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        row[name] = mean(values)
        if name.endswith("macro-F1"):
            row[f"{name.removesuffix(' macro-F1')} s.d."] = pstdev(values)
    return row | {"seeds": list(found)}


# Asking


def latency(files: Sequence[Path], questions: Sequence[str], rounds: int) -> list[list[float]]:
    """Milliseconds of every `ask`, for each file; each question is put to all of them in turn."""
    from qcat import Classifier
    from qcat.threads import default_threads

    times: list[list[float]] = [[] for _ in files]
    with ExitStack() as stack:
        models = [
            stack.enter_context(Classifier.open(file, threads=default_threads())) for file in files
        ]
        for question in questions[:WARM_UP]:
            for model in models:
                model.ask(question)
        for turn, question in enumerate(list(questions) * rounds):
            for step in range(len(models)):
                which = (turn + step) % len(models)  # another one begins with each question
                start = time.perf_counter()
                models[which].ask(question)
                times[which].append((time.perf_counter() - start) * 1e3)
    return times


def _add_latency(found: Sequence[dict[str, Any]], times: Sequence[Sequence[float]]) -> None:
    import numpy as np

    for row, taken in zip(found, times, strict=True):
        row["ask median ms"] = median(taken)
        row["ask p10 ms"], row["ask p90 ms"] = (float(np.percentile(taken, p)) for p in (10, 90))
        row["of all layers"] = row["ask median ms"] / median(times[0])


# Table


def rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Depths down, figures across."""
    names = [name for name in found[0] if name != "seeds"]
    return [tuple(names), *(tuple(_cell(row[name]) for name in names) for row in found)]


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _say(text: str) -> None:
    print(f"layers: {text} …", file=sys.stderr, flush=True)


def _depths(text: str) -> list[int]:
    """Numbers with commas between, the most first: the ratios are to it."""
    found = sorted({int(part) for part in text.split(",")}, reverse=True)
    if found[-1] < 1:
        raise argparse.ArgumentTypeError("1 or more expected")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["shape", "household"])
    parser.add_argument("--shape-layers", type=_depths, default=[28, 20, 14, 10], metavar="N,N,…")
    parser.add_argument("--household-layers", type=_depths, default=[3, 2, 1], metavar="N,N,…")
    parser.add_argument("--asked", type=positive, default=50, help="questions (default: 50)")
    parser.add_argument("--rounds", type=positive, default=2, help="of asking them (default: 2)")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument(
        "--questions", type=positive, default=12, help="of the shape's proof (default: 12)"
    )
    parser.add_argument("--draws", type=positive, default=5, help="split seeds (default: 5)")
    parser.add_argument("--epochs", type=positive, default=4, help="of each training (default: 4)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the files here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
