"""`qcat ask`: questions in, one label a line out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from qcat.classifier import OLLAMA, Classifier
from qcat.cli import answers
from qcat.cli.output import FloatRange, given, threads_option, timeout_option
from qcat.cli.stdin_lines import Line, available_lines
from qcat.cli.tasks import asked_task, note_untrained, task_options
from qcat.monitor.recorder import Recorder

FEW = 8  # questions: laying the weights out anew takes the time that it saves on some twenty


@click.command()
@click.argument("questions", nargs=-1, metavar="[QUESTION]...")
@click.option(
    "-m",
    "--model",
    envvar="QCAT_MODEL",
    metavar="MODEL",
    help="GGUF made by `qcat export`, or any with --task; by default the household model that "
    "comes with qcat. With --backend ollama, or as ollama:NAME, a model that `qcat deploy` made.  "
    "[env: QCAT_MODEL]",
)
@click.option(
    "--adapter",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A file that `qcat export --beside` wrote, with -m as its base. Without -m the base is "
    "looked for where it was at export.",
)
@click.option(
    "--backend",
    type=click.Choice(["llama", "ollama"]),
    default="llama",
    show_default=True,
    help="What computes: llama.cpp in this process, or the Ollama server at OLLAMA_HOST.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="K",
    help="Show the K best labels with their probabilities (through Ollama these may be bounds, as "
    "--json says).",
)
@click.option(
    "--threshold",
    type=FloatRange(0, 1),
    metavar="P",
    help="Below this confidence abstain: print the abstain word (with "
    "--json or --top the labels all the same) and exit with 3. 0 answers every question.  "
    "[default: what `qcat calibrate` put into the model]",
)
@click.option(
    "--set",
    "as_set",
    is_flag=True,
    help="Print a set of labels that holds the right one, most probable first, separated by tabs; "
    "the abstain word if the question is off-topic. Exit with 3 unless there is one label.",
)
@click.option(
    "--coverage",
    type=FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    metavar="P",
    help="How often the set holds the right label.",
)
@click.option(
    "--abstain",
    default="-",
    metavar="WORD",
    show_default=True,
    help="What to print where the model abstains.",
)
@click.option(
    "--review",
    envvar="QCAT_REVIEW",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Queue the questions that the model abstains on for `qcat review`; made if there is none."
    "  [env: QCAT_REVIEW]",
)
@click.option(
    "--review-default",
    is_flag=True,
    help="As --review, with the file in your data folder that `qcat review answer -m MODEL` opens.",
)
@click.option(
    "--review-hash",
    is_flag=True,
    help="Keep only a hash of each question in the queue: nobody can read the questions there.",
)
@click.option("--strict", is_flag=True, help="Refuse a question that is too long; else cut it.")
@click.option(
    "--decode",
    type=click.Choice(["label", "free"]),
    default="label",
    help="`free`: no constraint, show what the model would have said; without probabilities.",
)
@task_options
@threads_option
@click.option(
    "--log",
    metavar="FILE",
    help="Append each answer to FILE, without the question, for `qcat drift`.",
)
@click.option("--log-text", is_flag=True, help="Log the questions too.")
@timeout_option
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
def command(
    questions: tuple[str, ...],
    model: str | None,
    adapter: Path | None,
    backend: str,
    as_json: bool,
    top: int | None,
    threshold: float | None,
    as_set: bool,
    coverage: float,
    abstain: str,
    review: Path | None,
    review_default: bool,
    review_hash: bool,
    strict: bool,
    decode: str,
    task: Path | None,
    labels: tuple[str, ...],
    threads: int | None,
    log: str | None,
    log_text: bool,
    timeout: int,
    verbose: bool,
) -> int:
    """Put each QUESTION into one of the model's categories; print the label alone.

    Without a QUESTION, or with `-`, questions are read from stdin, one a line.

    \b
    Exit status: 0 answered, 1 error, 2 usage, 3 abstained on at least one.

    If a question cannot be added to the review queue, its answer is printed all the same. The
    command then ends with status 1, because the next questions would be lost.

    \b
    Examples:
      qcat ask "When was the pool pump replaced?"
      qcat ask -m house.gguf "When was the pool pump replaced?"
      qcat ask -m house.gguf --json --top 3 < questions.txt
      qcat ask -m house.gguf --set --coverage 0.9 "When was the pool pump replaced?"
      qcat ask --backend ollama -m house "When was the pool pump replaced?"
      qcat ask -m qwen3-4b-instruct-q4_k_m.gguf -t task.toml "When was the pool pump replaced?"
      qcat ask -m qwen3-4b-instruct-q4_k_m.gguf -l pool -l fence "it turned green"
    """
    model = _model(model, backend)
    served = model is not None and model.startswith(OLLAMA)
    _check_model(model, served, backend, threads)
    _check_set(as_set, threshold, decode, top, as_json)
    _check_records(decode, review_default, review_hash, log, log_text)
    asked = asked_task(task, labels, served)
    if asked and (given("review") or review_default):
        raise click.UsageError("--review is for the task in the model: not with --task or --label")
    groups = _groups(questions)
    classifier = Classifier.open(
        model,
        task=asked,
        adapter=adapter,
        threshold=threshold,
        coverage=coverage if as_set else None,
        strict=strict,
        threads=threads,
        quick_start=0 < len(questions) <= FEW and questions != ("-",),
        timeout=timeout if served else None,
        verbose=verbose,
    )
    note_untrained(classifier)
    # A queue is one task's: another would not get in, or spoil it.
    queue = None if decode == "free" or asked else True if review_default else review
    with (
        classifier,
        Recorder.open(
            classifier, log=log, log_text=log_text, review=queue, review_hash=review_hash
        ) as recorder,
    ):
        answered = answers.say if decode == "free" else answers.ask
        rows = answered(classifier, groups)
        return answers.print_all(rows, recorder, as_json, top, abstain)


def _model(model: str | None, backend: str) -> str | None:
    """The model's name with its backend in it."""
    if backend != "ollama":
        return model
    if not model:
        raise click.UsageError("--backend ollama needs -m NAME")
    return model if model.startswith(OLLAMA) else f"{OLLAMA}{model}"


def _check_model(model: str | None, served: bool, backend: str, threads: int | None) -> None:
    if served and backend == "llama" and given("backend"):
        raise click.UsageError(f"{model} is not for --backend llama")
    if served and threads:
        raise click.UsageError("--threads is for llama.cpp here: the Ollama server has its own")
    if not served and given("timeout"):
        raise click.UsageError("--timeout is for an Ollama server")


def _check_set(
    as_set: bool, threshold: float | None, decode: str, top: int | None, as_json: bool
) -> None:
    if as_set and (threshold is not None or decode == "free" or (top and not as_json)):
        raise click.UsageError(
            "--set goes with neither --threshold nor --decode free, nor with --top but in --json"
        )
    if given("coverage") and not as_set:
        raise click.UsageError("--coverage is for --set")


def _check_records(
    decode: str, review_default: bool, review_hash: bool, log: str | None, log_text: bool
) -> None:
    if review_default and given("review"):
        raise click.UsageError("--review and --review-default name two files: give one of them")
    if decode == "free" and (given("review") or review_default or review_hash):
        raise click.UsageError("--review is for --decode label: a free answer has no probabilities")
    if review_hash and not (given("review") or review_default or os.environ.get("QCAT_REVIEW")):
        raise click.UsageError("--review-hash is for --review or --review-default")
    if log_text and log is None:
        raise click.UsageError("--log-text is for --log")
    if log is not None and decode == "free":
        raise click.UsageError("--log is not for --decode free, which gives no probabilities")


def _groups(questions: tuple[str, ...]) -> Iterator[list[Line]]:
    """The questions: those on the command line, or stdin's lines as they come."""
    if "-" in questions and len(questions) > 1:
        raise click.UsageError("- stands for stdin, alone")
    if questions not in ((), ("-",)):
        return iter([[Line(question) for question in questions]])
    if sys.stdin is None:
        raise click.UsageError("stdin is closed: give a QUESTION, or questions on stdin")
    return available_lines(sys.stdin.fileno())
