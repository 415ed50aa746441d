"""Options that several commands share: the same name, meaning and default everywhere."""

from __future__ import annotations

import click
from qcat_convert.quantize import AUTO, QUANTIZATIONS

from qcat.cli.output import FloatRange
from qcat.training.settings import EPOCHS
from qcat.workflows.train import DEFAULT_BASE


def layers_or_auto(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> int | str | None:
    """What --layers says: a number of layers, or `auto`."""
    if value is None or value == "auto":
        return value
    try:
        layers = int(value)
    except ValueError:
        message = f"{value!r} is neither a number nor 'auto'."
        raise click.BadParameter(message, ctx, param) from None
    if layers < 1:
        raise click.BadParameter("at least one layer has to stay.", ctx, param)
    return layers


# Of training

base_option = click.option(
    "--base",
    default=DEFAULT_BASE,
    show_default=True,
    metavar="MODEL",
    help="Base model: a folder, a hub name, a GGUF file, or ollama:NAME for one in Ollama's store.",
)
method_option = click.option(
    "--method",
    type=click.Choice(["scales", "lora"]),
    default="scales",
    show_default=True,
    help="`scales`: round the base to 4 bits first (Q4_0) and train the scales of its blocks, so "
    "that export loses nothing; `lora`: train a LoRA adapter, merged and rounded at export.",
)
epochs_option = click.option(
    "--epochs",
    type=click.IntRange(1),
    default=EPOCHS,
    show_default=True,
    help="At most so many passes over the data; stops two after the best.",
)
learning_rate_option = click.option(
    "--learning-rate",
    type=FloatRange(0, min_open=True),
    metavar="RATE",
    help="The highest, after the warm-up.  [default: 3e-3 for scales, relative to each; 2e-4 × "
    "1024 / the model's width for LoRA]",
)
layers_option = click.option(
    "--layers",
    callback=layers_or_auto,
    metavar="N|auto",
    help="Keep the first N layers of the base and drop those above: size and time shrink with "
    "them. `auto` tries all, 3/4, 1/2, 3/8, 1/4 and 1/8, a training each, until one loses too much "
    "validation macro-F1 (0.01 by default), and keeps the last that did not: together up to about "
    "3 times the time of a training with all.  [default: all]",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="For training and for the split.",
)

# Of export

quant_option = click.option(
    "--quant",
    type=click.Choice((*QUANTIZATIONS, AUTO)),
    help="auto tries q4_0, q4_k_m, iq4_nl and q8_0 on the held-out questions and keeps the one "
    "that is fastest here within --max-flips.  [default: q4_0 for a run of `qcat train --method "
    "scales`, which is in it already; else auto, or q4_k_m without held-out questions]",
)
vocab_option = click.option(
    "--vocab",
    type=click.Choice(["full", "trim"]),
    default="full",
    show_default=True,
    help="trim: keep only the tokens that the language and the questions need. A smaller file that "
    "loads sooner; other words are spelled in more tokens.",
)
max_flips_option = click.option(
    "--max-flips",
    type=FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="Fail if more held-out questions than this change their label.",
)
