"""`qcat batch`: a file of questions in, the same file with their answers out."""

from __future__ import annotations

from pathlib import Path

import click

from qcat.classifier import OLLAMA, Classifier
from qcat.cli.output import Bars, FloatRange, given, threads_option, timeout_option
from qcat.cli.tasks import asked_task, note_untrained, task_options
from qcat.encoding.prompt import QUESTION_ROOM
from qcat.workflows.batch import batch, check_paths

STOPPED = 130

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="IN", type=_FILE)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    type=_FILE,
    help="File to make, CSV, JSONL or Parquet by its suffix; it must not exist.",
)
@click.option(
    "-m",
    "--model",
    envvar="QCAT_MODEL",
    metavar="MODEL",
    help="GGUF made by `qcat export`, or any with --task; by default the household model that "
    "comes with qcat. As ollama:NAME, a model that `qcat deploy` made.  [env: QCAT_MODEL]",
)
@click.option(
    "--column",
    default="text",
    show_default=True,
    metavar="NAME",
    help="The column of IN that holds the questions.",
)
@click.option(
    "--prefix",
    default="",
    metavar="PREFIX",
    help="Before the names of the columns added, where IN has a column of such a name.",
)
@click.option(
    "--threshold",
    type=FloatRange(0, 1),
    metavar="P",
    help="Below this confidence mark the row as abstained. 0 answers every question.  "
    "[default: what `qcat calibrate` put into the model]",
)
@task_options
@threads_option
@timeout_option
def command(
    source: Path,
    output: Path,
    model: str | None,
    column: str,
    prefix: str,
    threshold: float | None,
    task: Path | None,
    labels: tuple[str, ...],
    threads: int | None,
    timeout: int,
) -> int:
    """Put the question in each row of IN into one of the model's categories; write OUT.

    IN is CSV with a header line, JSONL or Parquet, by its suffix; Parquet needs pyarrow. OUT has
    all its columns and after them label, confidence, abstained, reason, truncated and error. Where
    abstained is true the row needs review: the label is then a guess, and reason says why. A row
    without a question affects only itself: it needs review too, has no label, and error says
    why. A line that cannot be read at all ends the command before any work. A question of more than
    256 tokens is cut, and truncated is true. Nothing is added to a review queue: the rows to review
    are in OUT.

    OUT appears when it is whole. Until then OUT.part holds the answers: if the command is stopped
    or killed, rerun it to resume. Delete OUT.part to start over.

    \b
    Exit status: 0 OUT is written, 1 error, 2 usage, 130 stopped with Ctrl-C.

    \b
    Examples:
      qcat batch questions.csv -o answers.csv
      qcat batch -m house.gguf --column question mails.parquet -o mails.jsonl
      qcat batch -m house.gguf labelled.jsonl -o compared.jsonl --prefix qcat_
    """
    served = model is not None and model.startswith(OLLAMA)
    if served and threads:
        raise click.UsageError("--threads is for llama.cpp here: the Ollama server has its own")
    if not served and given("timeout"):
        raise click.UsageError("--timeout is for an Ollama server")
    asked = asked_task(task, labels, served)
    check_paths(source, output)
    try:
        with (
            Classifier.open(
                model,
                task=asked,
                threshold=threshold,
                threads=threads,
                timeout=timeout if served else None,
            ) as classifier,
            Bars() as bars,
        ):
            note_untrained(classifier)
            done = batch(
                classifier, source, output, column=column, prefix=prefix, progress=bars.show
            )
    except KeyboardInterrupt:
        click.echo("qcat: stopped: rerun the command to resume", err=True)
        return STOPPED
    if done.truncated:
        click.echo(
            f"qcat: warning: {done.truncated} questions of more than {QUESTION_ROOM} tokens were "
            f"cut (see the column {prefix}truncated)",
            err=True,
        )
    parts = [f"{done.answered} answered", f"{done.abstained} abstained"]
    if done.failed:
        parts.append(f"{done.failed} not asked (see the column {prefix}error)")
    before = f", {done.before} of them asked before" if done.before else ""
    said = f"{output}: {done.rows} rows{before}: {', '.join(parts)}"
    click.echo(said.encode("utf-8", "replace").decode())
    return 0
