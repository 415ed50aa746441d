"""`qcat init`: labelled questions to a task."""

from __future__ import annotations

from pathlib import Path

import click

from qcat.cli.lint import finding_lines, tokenizer_of
from qcat.cli.output import table
from qcat.data.findings import shown
from qcat.data.lint import lint
from qcat.shell import quoted
from qcat.workflows.init import Initialized, init_task, write_task

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("questions", metavar="QUESTIONS", type=_FILE)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=_FILE,
    help="File to write; it must not exist.  [default: task.toml beside QUESTIONS]",
)
@click.option("--name", help="Name of the task.  [default: that of the file, in lower case]")
@click.option(
    "--base",
    metavar="MODEL",
    help="Check the label tokens with this model's tokenizer, folder or hub name.",
)
def command(questions: Path, output: Path | None, name: str | None, base: str | None) -> None:
    """Write a task.toml with the labels of QUESTIONS: JSONL, CSV or Parquet with text and label.

    Labels stand in order of frequency. What `qcat lint` has to say of their names follows; edit
    the file, describe labels that are alike, and go on with `qcat lint` and `qcat train`.

    \b
    Example:
      qcat init questions.csv
    """
    made = init_task(questions, name=name)
    path = output or questions.with_name("task.toml")
    with tokenizer_of(base, None) as tokenizer:
        report = lint(made.task, tokenizer=tokenizer)
    write_task(made.task, path)
    print_task(made)
    for line in finding_lines(report, path, None):
        click.echo(line)
    click.echo(f"{path}: {len(made.task.labels)} labels; next:")
    click.echo(f"  qcat lint {quoted(path)} {quoted(questions)}")
    click.echo(f"  qcat train {quoted(questions)} -t {quoted(path)} -o runs/{made.task.name}")


def print_task(made: Initialized) -> None:
    """The labels with their numbers of questions, and spellings that were made one."""
    click.echo("\n".join(table([(label, str(count)) for label, count in made.counts.items()])))
    for other, label in made.respelled.items():
        click.echo(
            f"qcat: warning: label {shown(other)} is read as {shown(label)}: write it so, as "
            "`qcat lint --fix` does",
            err=True,
        )
