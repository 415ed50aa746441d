"""`qcat grammar`: the label language as GBNF."""

from __future__ import annotations

from pathlib import Path

import click

from qcat.encoding.grammar import grammar
from qcat.errors import TaskError
from qcat.gguf.bundle import Bundle
from qcat.task import Task


@click.command()
@click.argument("source", metavar="TASK.toml|FILE.gguf", type=click.Path(path_type=Path))
def command(source: Path) -> None:
    """Print the GBNF grammar that accepts exactly the task's labels, each after a space.

    \b
    Example:
      qcat grammar task.toml > labels.gbnf
    """
    task = Bundle.read(source).task if source.suffix == ".gguf" else Task.read(source)
    if task.verbalizer == "code" and not task.codes:
        raise TaskError(
            f"{source}: codes are chosen for a tokenizer: name the exported .gguf, "
            "or write them under [codes]"
        )
    click.echo(grammar(task), nl=False)
