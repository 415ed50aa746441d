"""Training: from a file of labelled questions to the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qcat.data.dataset import read_examples
from qcat.errors import ArgumentError
from qcat.progress import Progress, silent
from qcat.task import Task
from qcat.threads import wait_briefly
from qcat.training.settings import EPOCHS

if TYPE_CHECKING:
    from qcat.training.adapters import Method
    from qcat.training.objective import Objective

DEFAULT_BASE = "Qwen/Qwen3-0.6B"


def train(
    questions: str | os.PathLike[str],
    *,
    task: str | os.PathLike[str] | Task,
    output: str | os.PathLike[str],
    base: str = DEFAULT_BASE,
    checkpoint: str | os.PathLike[str] | None = None,
    epochs: int = EPOCHS,
    batch_size: int = 8,
    learning_rate: float | None = None,
    rank: int = 16,
    objective: Objective = "answer",
    method: Method = "scales",
    train_embeddings: bool = False,
    word_dropout: float = 0.0,
    layers: int | Literal["auto"] | None = None,
    max_f1_loss: float = 0.01,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fine-tune a base on labelled questions, split 70/15/15 by group.

    The same call resumes an interrupted training.

    Args:
        questions: file of labelled questions: JSONL, CSV or Parquet.
        task: the task, or the path of its task.toml.
        output: folder of the run, for `qcat.export`.
        base: a folder, a hub name, a GGUF file, or `ollama:NAME`.
        checkpoint: folder for the dequantized checkpoint of a GGUF base; None for the cache
            folder.
        epochs: the largest number of passes over the data; stops two after the best.
        batch_size: questions per step.
        learning_rate: the peak rate, after the warm-up; None for `Settings.rate`'s default.
        rank: rank of the LoRA matrices.
        objective: `answer` to write the label and stop, `labels` to choose among them.
        method: `scales` or `lora`.
        train_embeddings: also train the token embeddings, and save them in full.
        word_dropout: share of a question's words that are left out in training.
        layers: how many layers of the base to keep; `auto` tries fewer and fewer.
        max_f1_loss: with `auto`, the validation macro-F1 that fewer layers may lose.
        seed: for training and for the split.
        progress: called as the work goes on.

    Returns:
        The run's record, as in `run.json`.

    Raises:
        ArgumentError: options contradict each other, or the base has fewer layers.
        DataError, TaskError, ModelError, TrainError: questions, task or base cannot be used.
    """
    task = task if isinstance(task, Task) else Task.read(Path(task))
    examples = read_examples(Path(questions), task)
    wait_briefly()
    from qcat.data.split import split_examples
    from qcat.training.settings import Settings

    kept = None if layers == "auto" else layers
    texts = [example.text for example in examples]
    settings = Settings(
        base=prepare_base(base, checkpoint, kept, task, texts),
        objective=objective,
        epochs=epochs,
        batch=batch_size,
        rate=learning_rate,
        rank=rank,
        method=method,
        train_embeddings=train_embeddings,
        word_dropout=word_dropout,
        seed=seed,
        layers=kept,
    )
    split = split_examples(examples, task, seed=seed)
    if layers == "auto":
        from qcat.training.depth import train_shallowest

        return train_shallowest(task, split, settings, max_f1_loss, Path(output), progress)
    from qcat.training.train import train as train_run

    return train_run(task, split, settings, Path(output), progress)


def prepare_base(
    base: str,
    checkpoint: str | os.PathLike[str] | None,
    layers: int | None,
    task: Task,
    texts: Sequence[str],
) -> str:
    """Check that a base can be trained and exported, before hours of work; download it if needed.

    Args:
        base: as for `train`.
        checkpoint: as for `train`.
        layers: how many layers to keep; None for all.
        task: the task.
        texts: cleaned questions, which llama.cpp must tokenize in the same way as training.

    Returns:
        The base to train on: the same, or the folder of the checkpoint.

    Raises:
        ArgumentError, ModelError, ExportError, TaskError: the base or the task does not fit.
    """
    from qcat_convert.gate import check_shapes, check_weights

    from qcat.base.checkpoint import base_folder
    from qcat.base.gguf_base import gguf_checkpoint, gguf_file, is_gguf
    from qcat.base.gguf_tokenizer import check_tokenizer

    gguf = gguf_file(base) if is_gguf(base) else None
    if checkpoint:
        if not gguf:
            raise ArgumentError("--checkpoint is for a GGUF base")
        base = str(gguf_checkpoint(base, Path(checkpoint)))
    folder = check_trainable(base, task, layers, texts)
    weights = base_folder(base)  # which may only now be downloaded
    check_weights(weights, layers)
    check_shapes(weights, layers)
    if gguf:
        check_tokenizer(gguf, folder, texts)
    return base


def check_trainable(
    base: str, task: Task, layers: int | None = None, texts: Sequence[str] = ()
) -> Path:
    """Check, without its weights, that a base can be trained for a task and exported.

    Args:
        base: as for `train`.
        task: the task.
        layers: how many layers to keep; None for all.
        texts: cleaned questions, which llama.cpp must tokenize in the same way as training.

    Returns:
        The folder of its configuration and tokenizer.

    Raises:
        ArgumentError, ModelError, ExportError, TaskError: the base or the task does not fit.
    """
    from qcat_convert.gate import check_base, check_config, check_splitting, check_weights

    from qcat.base.checkpoint import base_folder, count_layers

    folder = base_folder(base, weights=False)
    whole = count_layers(folder)
    if layers and layers > whole:
        raise ArgumentError(
            f"Invalid value for '--layers': {base} has {whole} layers: give a number up to that."
        )
    check_splitting(check_base(folder, task), texts)
    if any(folder.glob("*.safetensors")):
        check_weights(folder, layers)
    check_config(folder, layers)
    return folder
