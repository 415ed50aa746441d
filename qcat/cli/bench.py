"""`qcat bench`: what a model costs on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qcat.cli.output import Bars, table
from qcat.data.opened import FORMATS
from qcat.encoding.prompt import clean_question
from qcat.errors import DataError, QuestionError
from qcat.files import check_writable, write_whole
from qcat.gguf.bundle import Bundle
from qcat.workflows.measure import BATCHES, Measured, measure, questions_for


@click.command()
@click.argument("gguf", metavar="FILE.gguf", type=click.Path(path_type=Path))
@click.option(
    "--questions",
    "questions_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Questions to ask, one a line, of which --count are taken; by default some that name the "
    "labels.",
)
@click.option(
    "--count", type=click.IntRange(20), default=60, show_default=True, help="Questions to ask."
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Plot latency by batch size.",
)
def command(
    gguf: Path, questions_file: Path | None, count: int, as_json: bool, plot: Path | None
) -> None:
    """Measure cold start, memory, and the latency one by one, in batches and by number of threads.

    Cold start and memory are those of a fresh `qcat ask`; the rest is of one open model, with the
    weights laid out anew where that is possible. Anything else that runs meanwhile spoils the
    figures: the load before them is shown too.

    \b
    Examples:
      qcat bench house.gguf
      qcat bench house.gguf --questions asked.txt --plot latency.png
    """
    if plot:
        import matplotlib  # noqa: F401  (that it is absent is better said now)

        check_writable(plot)
    labels = tuple(Bundle.read(gguf).task.labels)
    questions = _read(questions_file) if questions_file else questions_for(labels, count)
    questions = (questions * (count // len(questions) + 1))[:count]
    with Bars() as bars:
        found = measure(gguf, questions, bars.show)
    if plot:
        write_whole(plot, _plot(found))
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    click.echo("\n".join(_lines(found)))


def _read(path: Path) -> list[str]:
    if path.suffix.lower() in FORMATS:
        raise DataError(f"{path}: a table: name a text file with one question a line")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"{path}: {reason}: name a text file with one question a line") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                clean_question(line)  # now, and not after minutes
            except QuestionError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            questions.append(line)
    if not questions:
        raise DataError(f"{path}: no questions: write one a line")
    return questions


def _lines(found: Measured) -> list[str]:
    quota = "" if found.quota is None else f", control group allows {found.quota:g}"
    load = " ".join(f"{value:.2f}" for value in found.load) or "unknown"
    best = min(found.by_batch, key=lambda size: found.by_batch[size])
    memory = (
        "unknown"
        if found.peak_memory is None
        else (
            f"{found.peak_memory / 1e6:.0f} MB in a fresh process, "
            f"{(found.peak_memory - found.bytes) / 1e6:.0f} MB more than the file"
        )
    )
    facts = [
        ("model", f"{found.model}: {found.bytes / 1e6:.1f} MB, {found.labels} labels"),
        ("processor", f"{found.processor}, {found.physical} cores for this process{quota}"),
        ("load", f"{load}: other work spoils these figures"),
        ("threads", str(found.threads)),
        ("tokens", f"{found.tokens:g} a question, with the words after it"),
        ("cold start", f"{found.cold.median / 1e3:.2f} s, median of {found.cold.count} processes"),
        ("warm", f"p50 {found.warm.median:.1f} ms, p95 {found.warm.p95:.1f} ms a question"),
        ("batch", f"{1e3 / found.by_batch[best]:.1f} questions a second, {best} at a time"),
        ("memory", memory),
    ]
    rows = [
        ("given at once", *map(str, found.by_batch)),
        ("ms a question", *(f"{value:.1f}" for value in found.by_batch.values())),
    ]
    threads = [
        ("threads", *map(str, found.by_threads)),
        ("ms a question", *(f"{value:.1f}" for value in found.by_threads.values())),
    ]
    return [
        *(f"{name:<11} {value}" for name, value in facts),
        "",
        *table(rows),
        "",
        *table(threads),
    ]


def _plot(found: Measured) -> bytes:
    from matplotlib.figure import Figure

    from qcat.report.plot import BLUE, bare, png

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    axes.plot(list(BATCHES), [found.by_batch[size] for size in BATCHES], marker="o", color=BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(BATCHES), [str(size) for size in BATCHES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("questions given at once")
    axes.set_ylabel("milliseconds a question")
    axes.set_title(f"{Path(found.model).name}, {found.threads} threads", loc="left")
    bare(axes)
    return png(figure)
