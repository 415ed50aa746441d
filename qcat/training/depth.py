"""Finds how few layers of a base are enough, by training at decreasing depths.

An adapter repairs much of the damage of dropping the deeper layers (Gromov et al. 2024, "The
unreasonable ineffectiveness of the deeper layers", who keep the very last one; here only the first
ones are kept, so that transformers and llama.cpp support the model). The number of layers that a
task needs is measured, not guessed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from qcat.base.checkpoint import base_folder, count_layers
from qcat.data.split import Split
from qcat.progress import Progress, silent
from qcat.task import Task
from qcat.training.run_folder import DEPTHS, clear, run_folder, write_json
from qcat.training.settings import Settings
from qcat.training.train import train

_SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # their sum is the total cost: 3 trainings


def depths(layers: int) -> list[int]:
    """The numbers of layers to try for a base, starting with all of them."""
    return list(dict.fromkeys(max(1, round(layers * share)) for share in _SHARES))


def train_shallowest(
    task: Task,
    split: Split,
    settings: Settings,
    max_f1_loss: float,
    target: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train with fewer and fewer layers while validation macro-F1 stays near that of all.

    The folder ends up as `train` would leave it for the depth that is kept: the last one before too
    much is lost. The same call resumes an unfinished search.

    Args:
        task: the task.
        split: its questions; the test part does not influence the choice.
        settings: settings of each training; its `layers` is ignored.
        max_f1_loss: how far validation macro-F1 may fall below that of all layers, at most 1.
        target: folder of the run.
        progress: as for `train`; the steps' names begin with the depth.

    Returns:
        The run's record as from `train`, with `max_f1_loss` and the depths `tried`.

    Raises:
        TrainError, ModelError, DataError, TaskError: as `train`.
    """
    plan = asdict(settings) | {"layers": "auto", "max_f1_loss": max_f1_loss}
    with run_folder(target, plan, task, split):
        whole = count_layers(base_folder(settings.base))
        tried: list[dict[str, Any]] = []
        for layers in depths(whole):
            folder = target / DEPTHS / str(layers)
            if (folder / "run.json").exists():
                found = json.loads((folder / "run.json").read_text("utf-8"))
            else:
                step = partial(_named, progress, f"{layers} of {whole} layers")
                found = train(task, split, replace(settings, layers=layers), folder, step)
            best = found["history"][found["best_epoch"] - 1]
            score = best["validation_macro_f1"]
            lost = (tried[0]["validation_macro_f1"] if tried else score) - score
            tried.append({"layers": layers, "validation_macro_f1": score, "lost": lost})
            if lost > max_f1_loss:
                break
            kept, record = folder, found
        record = {**record, "max_f1_loss": max_f1_loss, "tried": tried}
        clear(kept)  # it may have been killed during its last steps
        for path in sorted(kept.iterdir()):
            if path.name != "run.json":  # stays until all else is in place: a kill loses nothing
                os.replace(path, target / path.name)
        write_json(target / "run.json", record)
        clear(target)
    return record


def _named(progress: Progress, name: str, step: str, done: int, total: int, note: str = "") -> None:
    progress(f"{name}: {step}", done, total, note)
