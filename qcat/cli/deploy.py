"""`qcat deploy`: a bundle onto an Ollama server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qcat.cli.output import Bars, timeout_option


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Of the model.  [default: the task's name]")
@click.option(
    "--data",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Questions to prove it with: JSONL, CSV or Parquet.  [default: made up from the labels]",
)
@timeout_option
def command(folder: Path, name: str | None, data: Path | None, timeout: float) -> None:
    """Make an Ollama model of the bundle in DIR, and prove that it answers as qcat does.

    The server is the one at OLLAMA_HOST. Its prompts are compared with the training prompt, token
    for token, and its labels with those that the GGUF gives here. Only then does the model get
    its name; a model of the same task that had it is replaced.

    \b
    Examples:
      qcat deploy dist/house
      qcat deploy dist/house --name house:v2 --data held_out.jsonl
    """
    questions: Sequence[str] = ()
    if data:
        from qcat.data.dataset import read_examples
        from qcat.gguf.bundle import Bundle, find_gguf

        task = Bundle.read(find_gguf(folder)).task
        questions = [example.text for example in read_examples(data, task)]
    deploy_and_tell(folder, name, questions, timeout)


def deploy_and_tell(
    folder: Path, name: str | None, questions: Sequence[str], timeout: float
) -> None:
    """Deploy with progress bars, and print what was proved."""
    from qcat.workflows.deploy import deploy

    with Bars() as bars:
        done = deploy(folder, name, questions=questions, timeout=timeout, progress=bars.show)
    count = done.questions
    click.echo(
        f"{done.name} on {done.address}: {count} prompts equal to the training prompt, token for "
        f"token; {count - done.near_ties} of {count} labels as here"
    )
    if done.near_ties:
        click.echo(
            f"qcat: warning: {done.near_ties} labels differ where the best two are close: Ollama's "
            "attention rounds otherwise (see docs/ollama.md)",
            err=True,
        )
    if done.unspoken:
        click.echo(
            f"qcat: warning: {done.unspoken} answers of `ollama run` were no label: ask through "
            "qcat, which allows nothing else",
            err=True,
        )
    click.echo("next:")
    click.echo(f'  ollama run {done.name} "…"')
    click.echo(f'  qcat ask --backend ollama -m {done.name} "…"')
