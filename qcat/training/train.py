"""Fine-tuning of a base model on a task's questions.

A run is a folder. It holds the split and, during training, `plan.json` and `checkpoint.pt`; at the
end it holds the task with its codes, the best adapter, `metrics.csv` and `run.json`: everything
that export needs. Every step seeds its own random numbers, so a resumed run ends with the same
result as an uninterrupted one (on a GPU, except for the order of sums). Independent of GGUF.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qcat.base.checkpoint import base_folder, count_layers, load_base
from qcat.data.dataset import Example
from qcat.data.split import Split
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import QUESTION_ROOM
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import DataError
from qcat.install import versions
from qcat.progress import Progress, silent
from qcat.task import Task
from qcat.training.loop import Loop, device
from qcat.training.objective import Encoded
from qcat.training.run_folder import clear, run_folder, write_json
from qcat.training.settings import Settings

_PARTS = ("train", "validation", "test")


def train(
    task: Task,
    split: Split,
    settings: Settings,
    target: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train into a folder, or resume an unfinished run with the same settings in it.

    Returns:
        The run's record, as in `run.json`.

    Raises:
        TrainError: the folder holds something else, or the model cannot be trained.
        ModelError, DataError, TaskError: the base, a question or the task does not fit.
    """
    with run_folder(target, asdict(settings), task, split) as resumed:
        folder = base_folder(settings.base)
        tokenizer = HubTokenizer(folder)
        encoded_task = EncodedTask.build(task, tokenizer)
        task = encoded_task.task

        def encode(example: Example) -> Encoded:
            return _encode(example, encoded_task)

        encoded = {part: list(map(encode, getattr(split, part))) for part in _PARTS}
        prefix = list(encoded_task.prefix)
        model = _adapted(folder, settings)
        run = Loop(model, prefix, encoded_task.trie, settings, target)
        if resumed:
            run.load()
        run.fit(split.train, encode, encoded["validation"], progress)
        test_loss, accuracy, macro_f1 = run.evaluate(encoded["test"], "test", progress)
        record = {
            "settings": asdict(replace(settings, rate=run.rate)),
            "task": task.name,
            "questions": {part: len(rows) for part, rows in encoded.items()},
            "layers": model.config.num_hidden_layers,
            "base_layers": count_layers(folder),
            "prefix_tokens": len(prefix),
            "history": [asdict(epoch) for epoch in run.state.history],
            "best_epoch": run.best_epoch,
            "test": {"loss": test_loss, "accuracy": accuracy, "macro_f1": macro_f1},
            "versions": versions("torch", "transformers", "peft"),
        }
        _finish(target, run, task, record)
    return record


def _encode(example: Example, task: EncodedTask) -> Encoded:
    rest = task.ids(example.text)
    if len(rest) > QUESTION_ROOM:
        raise DataError(
            f"line {example.line} of the questions: {len(rest)} tokens, room for {QUESTION_ROOM}: "
            "shorten it"
        )
    return Encoded(tuple(rest), example.label)


def _adapted(folder: Path, settings: Settings) -> Any:
    """The base with the weights to train attached."""
    import torch

    from qcat.training.adapters import attach_lora, attach_scales

    # The codes must be derived from the exact numbers of the checkpoint.
    half = device().type == "cuda" and settings.method == "lora"
    base = load_base(folder, torch.bfloat16 if half else torch.float32, settings.layers)
    torch.manual_seed(settings.seed)
    if settings.method == "scales":
        return attach_scales(base, settings.train_embeddings)
    return attach_lora(
        base,
        rank=settings.rank,
        dropout=settings.dropout,
        train_embeddings=settings.train_embeddings,
        folder=folder,
    )


def _finish(target: Path, run: Loop, task: Task, record: dict[str, Any]) -> None:
    """Write the adapter and the record; the last file marks the run as complete."""
    from qcat.report.figures import training_png
    from qcat.training.adapters import save

    (target / "task.toml").write_text(task.to_toml(), "utf-8")
    with (target / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(record["history"][0]))
        writer.writeheader()
        writer.writerows(record["history"])
    (target / "curves.png").write_bytes(training_png(record["history"], run.best_epoch))
    # For export: the absolute path of a folder or file, so that it works from anywhere.
    base = run.settings.base
    name = str(Path(base).resolve()) if Path(base).exists() else base
    save(run.model, target, base=name, layers=run.settings.layers)
    write_json(target / "run.json", record)
    clear(target)
