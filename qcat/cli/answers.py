"""Answers of `qcat ask`: asked in the order of the lines, recorded, and printed one a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import click

from qcat.classifier import Classifier
from qcat.cli.output import json_line
from qcat.cli.stdin_lines import Line
from qcat.errors import QcatError, QuestionError, RecordError, ReviewError, ServerError
from qcat.monitor.recorder import Recorder
from qcat.prediction import Prediction

ABSTAINED = 3
"""Exit status: the model abstained on at least one question."""
Answer = tuple[int, str, Prediction | str | QuestionError]
"""Number of the question, its text, and its label, free answer or error."""


def ask(classifier: Classifier, groups: Iterator[list[Line]]) -> Iterator[Answer]:
    """Answers in order; a question that cannot be asked spoils only its own line."""
    number = 0
    try:
        for group in groups:
            answers = classifier.ask_each(line.text for line in group if not line.error)
            for line in group:
                answer = line.error or next(answers)
                number += 1
                yield number, line.text, answer
    except ServerError as error:
        raise ServerError(f"question {number + 1}: {error}") from None


def say(classifier: Classifier, groups: Iterator[list[Line]]) -> Iterator[Answer]:
    """As `ask`, without any constraint."""
    for number, line in enumerate(chain.from_iterable(groups), 1):
        try:
            yield number, line.text, line.error or classifier.say(line.text)
        except QuestionError as error:
            yield number, line.text, error
        except ServerError as error:
            raise ServerError(f"question {number}: {error}") from None


def print_all(
    answers: Iterator[Answer], recorder: Recorder, as_json: bool, top: int | None, abstain: str
) -> int:
    """Print and record the answers as they come; the exit status."""
    status, warned, unlogged = 0, False, False
    for number, question, answer in answers:
        if isinstance(answer, QuestionError):
            # Its line is kept, so that line n of the output answers line n of the input.
            row = {"question": question, "error": str(answer)}
            click.echo(json_line(row) if as_json else abstain)
            click.echo(f"qcat: error: question {number}: {answer}", err=True)
            status = 1
        elif isinstance(answer, str):
            row = {"question": question, "said": answer}
            click.echo(json_line(row) if as_json else answer.replace("\n", "\\n"))
        else:
            if answer.truncated:
                click.echo(f"qcat: warning: question {number} was cut: it is too long", err=True)
            if answer.confidence is None and not warned:
                warned = True
                click.echo(
                    "qcat: warning: this Ollama gives no probabilities: 0.12.11 or later does",
                    err=True,
                )
            if answer.abstained and status == 0:
                status = ABSTAINED
            errors = _record(recorder, question, answer)
            click.echo(_line(question, answer, as_json, top, abstain))
            for error in errors:
                if isinstance(error, ReviewError):  # the next question would be lost too
                    raise ReviewError(f"question {number}: {error}")
                if not unlogged:
                    click.echo(f"qcat: error: {error}", err=True)
                unlogged = True
    return 1 if unlogged else status


def _record(recorder: Recorder, question: str, answer: Prediction) -> Sequence[QcatError]:
    """Keep an answer; why it is not kept, if it is not."""
    try:
        recorder.add(question, answer)
    except RecordError as error:
        return error.errors
    return ()


def _line(question: str, answer: Prediction, as_json: bool, top: int | None, abstain: str) -> str:
    best = list(answer.probabilities.items())[:top]
    if as_json:
        row = {"question": question, **answer.to_dict(), "probabilities": dict(best)}
        return json_line(row)
    if answer.prediction_set is not None:
        return "\t".join(answer.prediction_set) or abstain
    if top and best:
        return "\t".join(f"{label} {probability:.4f}" for label, probability in best)
    return abstain if answer.abstained else answer.label
