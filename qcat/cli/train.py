"""`qcat train`: questions to an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qcat.cli.options import (
    base_option,
    epochs_option,
    layers_option,
    learning_rate_option,
    method_option,
    seed_option,
)
from qcat.cli.output import Bars, FloatRange, given, table
from qcat.shell import quoted
from qcat.workflows.init import find_task
from qcat.workflows.train import train

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("questions", metavar="QUESTIONS", type=_FILE)
@click.option(
    "-t",
    "--task",
    "task_file",
    metavar="FILE",
    type=_FILE,
    help="What to decide.  [default: task.toml beside QUESTIONS]",
)
@base_option
@click.option(
    "--checkpoint",
    metavar="DIR",
    type=_FILE,
    help="Keep the dequantized checkpoint of a GGUF base here, where other programs can use it.  "
    "[default: qcat's cache folder]",
)
@click.option("-o", "--output", required=True, metavar="DIR", type=_FILE, help="Folder of the run.")
@epochs_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Questions a step; fewer need less memory.",
)
@learning_rate_option
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Of the LoRA matrices, with --method lora; alpha is twice that.",
)
@click.option(
    "--objective",
    type=click.Choice(["labels", "answer"]),
    default="answer",
    show_default=True,
    help="`answer`: write the label and stop, as Ollama needs it; `labels`: choose among them.",
)
@method_option
@click.option(
    "--train-embeddings",
    is_flag=True,
    help="Train the token embeddings too and save them whole: for a small base.",
)
@click.option(
    "--word-dropout",
    type=FloatRange(0, 0.9),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Leave out this share of a question's words in training.",
)
@layers_option
@click.option(
    "--max-f1-loss",
    type=FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="F1",
    help="With --layers auto: validation macro-F1 that fewer layers may lose against all.",
)
@seed_option
def command(
    questions: Path,
    task_file: Path | None,
    base: str,
    checkpoint: Path | None,
    output: Path,
    epochs: int,
    batch_size: int,
    learning_rate: float | None,
    rank: int,
    objective: Any,
    method: Any,
    train_embeddings: bool,
    word_dropout: float,
    layers: Any,
    max_f1_loss: float,
    seed: int,
) -> None:
    """Fine-tune a base on labelled QUESTIONS (JSONL, CSV or Parquet).

    Splits them 70/15/15 by group, keeps the epoch with the best validation macro-F1, and leaves a
    folder that `qcat export` takes. Rerun the command to resume one that was stopped.

    \b
    Example:
      qcat train questions.jsonl -t task.toml --base Qwen/Qwen3-0.6B -o runs/house
    """
    if method != "lora" and given("rank"):
        raise click.UsageError("--rank is for --method lora")
    if layers != "auto" and given("max_f1_loss"):
        raise click.UsageError("--max-f1-loss is for --layers auto")
    if sys.stderr.isatty():
        click.echo("loading torch and transformers …", err=True)
    from qcat.base.gguf_base import describe, is_gguf

    if is_gguf(base):
        click.echo(f"base {base}: {describe(base)}; dequantized for training", err=True)
    with train_bars(output) as bars:
        record = train(
            questions,
            task=find_task(questions, task_file),
            output=output,
            base=base,
            checkpoint=checkpoint,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            rank=rank,
            objective=objective,
            method=method,
            train_embeddings=train_embeddings,
            word_dropout=word_dropout,
            layers=layers,
            max_f1_loss=max_f1_loss,
            seed=seed,
            progress=bars.show,
        )
    click.echo("\n".join(record_lines(record)))
    click.echo(f"next:\n  qcat export {quoted(output)} -o dist/{record['task']}")


@contextmanager
def train_bars(output: Path) -> Iterator[Bars]:
    """Progress bars of a training; one that is interrupted says how to go on."""
    try:
        with Bars() as bars:
            yield bars
    except KeyboardInterrupt:
        click.echo(f"\n{output}: stopped: rerun the command to resume", err=True)
        raise


def record_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """How a training went."""
    if "tried" in record:
        yield from table([*_tried(record)])
    if record["layers"] < record["base_layers"]:
        yield f"layers: the first {record['layers']} of the base's {record['base_layers']}"
    for epoch in record["history"]:
        yield (
            f"epoch {epoch['epoch']}: loss {epoch['train_loss']:.3f}, "
            f"validation loss {epoch['validation_loss']:.3f}, "
            f"accuracy {epoch['validation_accuracy']:.3f}, "
            f"macro-F1 {epoch['validation_macro_f1']:.3f}"
            + (" (best)" if epoch["epoch"] == record["best_epoch"] else "")
        )
    test = record["test"]
    yield (
        f"test, {record['questions']['test']} questions never trained on: "
        f"accuracy {test['accuracy']:.3f}, macro-F1 {test['macro_f1']:.3f}"
    )


def _tried(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table of the depths that were tried, heading first."""
    yield "layers", "validation macro-F1", "lost", ""
    for depth in record["tried"]:
        kept = "kept" if depth["layers"] == record["layers"] else ""
        too_much = depth["lost"] > record["max_f1_loss"]
        yield (
            f"{depth['layers']} of {record['base_layers']}",
            f"{depth['validation_macro_f1']:.3f}",
            f"{depth['lost']:.3f}",
            f"more than {record['max_f1_loss']:g}" if too_much else kept,
        )
