"""`qcat lint`: is the data fit to train on?"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from qcat.base.checkpoint import base_folder
from qcat.data.findings import Finding, Report, Severity
from qcat.data.lint import Fixed, fix, lint
from qcat.encoding.prompt import Tokenizer
from qcat.errors import ExportError, ModelError, TaskError
from qcat.task import Task
from qcat.workflows.train import check_trainable

_FILE = click.Path(path_type=Path)
_SHOWN = 10  # findings of one code, and lines of one finding
_NAMES: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}


@click.command()
@click.argument("task_file", metavar="TASK", type=_FILE)
@click.argument("questions", metavar="[QUESTIONS]", required=False, type=_FILE)
@click.option(
    "--base",
    metavar="MODEL",
    help="Check the label tokens with this model's tokenizer, folder or hub name.",
)
@click.option(
    "-m", "--model", metavar="FILE", type=_FILE, help="The same with a GGUF's vocabulary."
)
@click.option("--json", "as_json", is_flag=True, help="All findings, as one JSON object.")
@click.option(
    "--fix",
    "target",
    metavar="FILE",
    type=_FILE,
    help="Write a mended copy of QUESTIONS as JSONL, and check that one.",
)
def command(
    task_file: Path,
    questions: Path | None,
    base: str | None,
    model: Path | None,
    as_json: bool,
    target: Path | None,
) -> int:
    """Check a task and its questions before training: JSONL, CSV or Parquet with text and label.

    With --fix the texts are cleaned, labels that differ in case or spaces only are mended, and
    repeats, unreadable rows and texts under two labels are dropped; stderr says which. The input
    stays as it is.

    \b
    Exit status: 0 no errors (there may be warnings), 1 errors, 2 usage.

    \b
    Examples:
      qcat lint task.toml questions.jsonl
      qcat lint task.toml questions.csv --base Qwen/Qwen3-0.6B
      qcat lint task.toml questions.jsonl --fix clean.jsonl
    """
    if base and model:
        raise click.UsageError("--base and -m both name a tokenizer: give one")
    if target and not questions:
        raise click.UsageError("--fix needs QUESTIONS to mend")
    task = Task.read(task_file)
    with tokenizer_of(base, model) as tokenizer:
        if target and questions:
            _say_fixed(questions, target, fix(task, questions, target))
            questions = target
        report = lint(task, questions, tokenizer)
    if base:
        report = _with_base(report, base, task)
    if as_json:
        document = {
            "task": click.format_filename(task_file),
            "file": click.format_filename(questions) if questions else None,
            **report.to_dict(),
        }
        text = json.dumps(document, indent=1, ensure_ascii=False)
        click.echo(text.encode("utf-8", "replace").decode())
    else:
        for line in finding_lines(report, task_file, questions):
            click.echo(line)
        click.echo(_summary(report, task_file, questions))
    return 1 if report.count("error") else 0


@contextmanager
def tokenizer_of(base: str | None, model: Path | None) -> Iterator[Tokenizer | None]:
    """The tokenizer of a base or of a GGUF, if one is named."""
    if base:
        from qcat.encoding.tokenization import HubTokenizer

        yield HubTokenizer(base_folder(base, weights=False))
    elif model:
        from qcat.backends.llama import LlamaModel
        from qcat.gguf.bundle import find_gguf
        from qcat.gguf.check import check_model
        from qcat.gguf.header import read_header

        if os.path.isdir(model):
            model = find_gguf(model)
        check_model(model, read_header(model))  # llama.cpp can abort on what this refuses
        with LlamaModel(model, vocab_only=True) as loaded:
            yield loaded
    else:
        yield None


def _with_base(report: Report, base: str, task: Task) -> Report:
    """The report with what speaks against training on a base, unless it is there already."""
    try:
        check_trainable(base, task)
    except (ModelError, ExportError, TaskError) as error:
        finding = Finding("error", "base", str(error))
        if finding.message not in {known.message for known in report.findings}:
            return replace(report, findings=(finding, *report.findings))
    return report


def _say_fixed(questions: Path, target: Path, fixed: Fixed) -> None:
    for what, by_code in (("mended", fixed.changed), ("dropped", fixed.dropped)):
        for code, lines in by_code.items():
            place = f"{click.format_filename(questions)}:{_numbers(lines)}"
            click.echo(f"{place}: {what} [{code}]", err=True)
    click.echo(f"{click.format_filename(target)}: {_count(len(fixed.rows), 'row')}", err=True)


def finding_lines(report: Report, task_file: Path, questions: Path | None) -> Iterator[str]:
    """One line a finding, at most `_SHOWN` of a code."""
    totals = Counter((finding.severity, finding.code) for finding in report.findings)
    shown: Counter[tuple[str, str]] = Counter()
    for finding in report.findings:
        kind = (finding.severity, finding.code)
        shown[kind] += 1
        if shown[kind] <= _SHOWN:
            yield _line(finding, questions if finding.lines and questions else task_file)
        elif shown[kind] == totals[kind]:
            more = totals[kind] - _SHOWN
            yield f"… and {more} more [{finding.code}]; --json shows all"


def _line(finding: Finding, path: Path) -> str:
    place = click.format_filename(path)
    if finding.lines:
        place += f":{_numbers(finding.lines)}"
    return f"{place}: {finding.severity}: {finding.message} [{finding.code}]"


def _numbers(lines: Sequence[int]) -> str:
    shown = ",".join(map(str, lines[:_SHOWN]))
    return f"{shown} and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else shown


def _summary(report: Report, task_file: Path, questions: Path | None) -> str:
    found = ", ".join(_count(report.count(severity), name) for severity, name in _NAMES.items())
    if not questions:
        text = f"{click.format_filename(task_file)}: {found}"
    else:
        counts = report.counts.values()
        text = (
            f"{click.format_filename(questions)}: {_count(report.questions, 'question')}, "
            f"{len(counts)} labels with {min(counts)} to {max(counts)} each: {found}"
        )
    if report.passes:
        return f"{text}; {_count(report.passes, 'forward pass', 'forward passes')} a question"
    if "label-tokens" in {finding.code for finding in report.findings}:
        return text
    return f"{text}; label tokens not checked: --base MODEL or -m FILE.gguf does"


def _count(number: int, name: str, plural: str = "") -> str:
    return f"{number} {name if number == 1 else plural or name + 's'}"
