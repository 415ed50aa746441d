"""`qcat train`: questions to an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcat.cli.output import Bars, FloatRange, given, table
from qcat.data.dataset import read_examples
from qcat.task import Task
from qcat.threads import wait_briefly

if TYPE_CHECKING:
    from qcat.data.split import Split
    from qcat.training.settings import Settings

_FILE = click.Path(path_type=Path)


class _Layers(click.ParamType[int | str]):
    """A number of layers, or `auto`."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "auto":
            return "auto"
        try:
            layers = int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto'.", param, ctx)
        if layers < 1:
            self.fail("at least one layer has to stay.", param, ctx)
        return layers


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
    help="Base model: a folder, a hub name, a GGUF file, or ollama:NAME for one in Ollama's store.",
)
@click.option(
    "--checkpoint",
    metavar="DIR",
    type=_FILE,
    help="Keep the dequantized checkpoint of a GGUF base here, where other programs can use it.  "
    "[default: qcat's cache folder]",
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
    type=FloatRange(0, min_open=True),
    metavar="RATE",
    help="The highest, after the warm-up.  [default: 3e-3 for scales, relative to each; 2e-4 × "
    "1024 / the model's width for LoRA]",
)
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
@click.option(
    "--method",
    type=click.Choice(["scales", "lora"]),
    default="scales",
    show_default=True,
    help="`scales`: round the base to 4 bits first (Q4_0) and train the scales of its blocks, so "
    "that export loses nothing; `lora`: train a LoRA adapter, merged and rounded at export.",
)
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
@click.option(
    "--layers",
    type=_Layers(),
    metavar="N|auto",
    help="Keep the first N layers of the base and drop those above: size and time shrink with "
    "them. `auto` tries all, 3/4, 1/2, 3/8, 1/4 and 1/8, a training each, until one loses more "
    "than --max-f1-loss, and keeps the last that did not: together up to about 3 times the time "
    "of a training with all.  [default: all]",
)
@click.option(
    "--max-f1-loss",
    type=FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="F1",
    help="With --layers auto: validation macro-F1 that fewer layers may lose against all.",
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
    layers: int | str | None,
    max_f1_loss: float,
    seed: int,
) -> None:
    """Fine-tune a base on labelled QUESTIONS (JSONL, CSV or Parquet).

    Splits them 70/15/15 by group, keeps the epoch with the best validation macro-F1, and leaves a
    folder that `qcat export` takes. If it is killed, the same command goes on where it was.

    \b
    Example:
      qcat train questions.jsonl -t task.toml --base Qwen/Qwen3-0.6B -o runs/house
    """
    if method != "lora" and given("rank"):
        raise click.UsageError("--rank is for --method lora")
    if layers != "auto" and given("max_f1_loss"):
        raise click.UsageError("--max-f1-loss is for --layers auto")
    task = Task.read(task_file)
    examples = read_examples(questions, task)
    wait_briefly()
    if sys.stderr.isatty():
        click.echo("loading torch and transformers …", err=True)
    from qcat.base.checkpoint import base_folder, load_config
    from qcat.base.gguf_base import describe, gguf_checkpoint, gguf_file, is_gguf
    from qcat.data.split import split_examples
    from qcat.gguf.architecture import architecture, hyper_parameters
    from qcat.training.settings import Settings

    # Before a download what cannot be, before hours of training what export would refuse then.
    gguf = gguf_file(base) if is_gguf(base) else None
    if gguf:
        click.echo(f"base {base}: {describe(base)}; dequantized for training", err=True)
    if checkpoint:
        if not gguf:
            raise click.UsageError("--checkpoint is for a GGUF base")
        base = str(gguf_checkpoint(base, checkpoint))
    folder = base_folder(base, weights=False)
    config = load_config(folder)
    architecture(config)
    kept = layers if isinstance(layers, int) else None
    if kept and kept > config.num_hidden_layers:
        raise click.BadParameter(
            f"{base} has {config.num_hidden_layers} layers: give a number up to that.",
            param_hint="'--layers'",
        )
    hyper_parameters(load_config(folder, kept), config.vocab_size)
    base_folder(base)
    if gguf:
        from qcat.base.gguf_tokenizer import check_tokenizer

        check_tokenizer(gguf, folder, [example.text for example in examples])
    settings = Settings(
        base=base,
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
    train_and_tell(task, split, settings, output, max_f1_loss if layers == "auto" else None)
    click.echo(f"next:\n  qcat export {output} -o dist/{task.name}")


def train_and_tell(
    task: Task,
    split: Split,
    settings: Settings,
    output: Path,
    max_f1_loss: float | None = None,
) -> None:
    """Train with progress bars, and print how it went.

    Args:
        task: what to decide.
        split: its questions.
        settings: how to train.
        output: folder of the run.
        max_f1_loss: walk down the layers, as `train_shallowest` does; None keeps to the settings.
    """
    from qcat.training.depth import train_shallowest
    from qcat.training.train import train

    try:
        with Bars() as bars:
            if max_f1_loss is None:
                record = train(task, split, settings, output, bars.show)
            else:
                record = train_shallowest(task, split, settings, max_f1_loss, output, bars.show)
    except KeyboardInterrupt:
        click.echo(f"\n{output}: stopped: the same command goes on from its checkpoint", err=True)
        raise
    if "tried" in record:
        click.echo("\n".join(table([*_tried(record)])))
    if record["layers"] < record["base_layers"]:
        click.echo(f"layers: the first {record['layers']} of the base's {record['base_layers']}")
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


def _tried(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
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
