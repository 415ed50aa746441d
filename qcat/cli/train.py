"""`qcat train`: questions to a LoRA adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcat.cli.output import Bars
from qcat.learn.dataset import read_examples
from qcat.task import Task

if TYPE_CHECKING:
    from qcat.learn.split import Split
    from qcat.learn.train import Settings

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("questions", metavar="QUESTIONS", type=_FILE)
@click.option(
    "-t",
    "--task",
    "task_file",
    required=True,
    metavar="FILE",
    type=_FILE,
    help="What to decide: task.toml.",
)
@click.option(
    "--base",
    default="Qwen/Qwen3-0.6B",
    show_default=True,
    metavar="MODEL",
    help="Base model, folder or hub name.",
)
@click.option("-o", "--output", required=True, metavar="DIR", type=_FILE, help="Folder of the run.")
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="At most so many passes over the data; stops two after the best.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Questions a step; fewer need less memory.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    metavar="RATE",
    help="The highest, after the warm-up.  [default: 2e-4 × 1024 / the model's width]",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Of the LoRA matrices; alpha is twice that.",
)
@click.option(
    "--objective",
    type=click.Choice(["labels", "answer"]),
    default="answer",
    show_default=True,
    help="`answer`: write the label and stop, as Ollama needs it; `labels`: choose among them.",
)
@click.option(
    "--train-embeddings",
    is_flag=True,
    help="Train the token embeddings too and save them whole: for a small base.",
)
@click.option(
    "--word-dropout",
    type=click.FloatRange(0, 0.9),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Leave out this share of a question's words in training.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="For training and for the split.",
)
def command(
    questions: Path,
    task_file: Path,
    base: str,
    output: Path,
    epochs: int,
    batch_size: int,
    learning_rate: float | None,
    rank: int,
    objective: Any,
    train_embeddings: bool,
    word_dropout: float,
    seed: int,
) -> None:
    """Fine-tune a LoRA adapter on labelled QUESTIONS (JSONL, CSV or Parquet).

    Splits them 70/15/15 by group, keeps the epoch with the best validation macro-F1, and leaves a
    folder that `qcat export` takes. If it is killed, the same command goes on where it was.

    \b
    Example:
      qcat train questions.jsonl -t task.toml --base Qwen/Qwen3-0.6B -o runs/house
    """
    task = Task.read(task_file)
    examples = read_examples(questions, task)
    if sys.stderr.isatty():
        click.echo("loading torch and transformers …", err=True)
    from convert.tensors import architecture, hyper_parameters
    from qcat.checkpoint import base_folder, load_config
    from qcat.learn.split import split_examples
    from qcat.learn.train import Settings

    # Before hours of training what export would refuse after them.
    config = load_config(base_folder(base))
    architecture(config)
    hyper_parameters(config, config.vocab_size)
    settings = Settings(
        base=base,
        objective=objective,
        epochs=epochs,
        batch=batch_size,
        rate=learning_rate,
        rank=rank,
        train_embeddings=train_embeddings,
        word_dropout=word_dropout,
        seed=seed,
    )
    split = split_examples(examples, task, seed=seed)
    train_and_tell(task, split, settings, output)
    click.echo(f"next:\n  qcat export {output} -o dist/{task.name}")


def train_and_tell(task: Task, split: Split, settings: Settings, output: Path) -> None:
    """Train with progress bars, and print how it went."""
    from qcat.learn.train import train

    try:
        with Bars() as bars:
            record = train(task, split, settings, output, bars.show)
    except KeyboardInterrupt:
        click.echo(f"\n{output}: stopped: the same command goes on from its checkpoint", err=True)
        raise
    for epoch in record["history"]:
        click.echo(
            f"epoch {epoch['epoch']}: loss {epoch['train_loss']:.3f}, "
            f"validation loss {epoch['validation_loss']:.3f}, "
            f"accuracy {epoch['validation_accuracy']:.3f}, "
            f"macro-F1 {epoch['validation_macro_f1']:.3f}"
            + (" (best)" if epoch["epoch"] == record["best_epoch"] else "")
        )
    test = record["test"]
    click.echo(
        f"test, {record['questions']['test']} questions never trained on: "
        f"accuracy {test['accuracy']:.3f}, macro-F1 {test['macro_f1']:.3f}"
    )
