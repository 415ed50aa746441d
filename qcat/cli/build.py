"""`qcat build`: labelled questions to a proven model, in one command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from qcat_convert.trim import DEFAULT_MERGES

from qcat.cli.lint import finding_lines
from qcat.cli.options import (
    base_option,
    epochs_option,
    layers_option,
    learning_rate_option,
    max_flips_option,
    method_option,
    quant_option,
    seed_option,
    vocab_option,
)
from qcat.cli.output import FloatRange, table
from qcat.cli.train import train_bars
from qcat.shell import quoted
from qcat.workflows.build import Built, LintError, build

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("questions", metavar="QUESTIONS", type=_FILE)
@click.option(
    "-o", "--output", required=True, metavar="DIR", type=_FILE, help="Folder of the bundle."
)
@click.option(
    "-t",
    "--task",
    "task_file",
    metavar="FILE",
    type=_FILE,
    help="What to decide.  [default: task.toml beside QUESTIONS, else made of their labels]",
)
@base_option
@method_option
@epochs_option
@learning_rate_option
@layers_option
@quant_option
@vocab_option
@max_flips_option
@click.option(
    "--max-error",
    type=FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Also set the threshold above which at most this share of the answers is wrong, as "
    "`qcat calibrate` does, on the test questions.",
)
@seed_option
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object.")
def command(
    questions: Path,
    output: Path,
    task_file: Path | None,
    base: str,
    method: Any,
    epochs: int,
    learning_rate: float | None,
    layers: Any,
    quant: str | None,
    vocab: str,
    max_flips: float,
    max_error: float | None,
    seed: int,
    as_json: bool,
) -> int:
    """Make a model of labelled QUESTIONS: init, lint, train, export, calibrate and eval in one.

    DIR.build keeps each finished step: rerun the command to resume one that was stopped.

    \b
    Example:
      qcat build questions.csv -o house
    """
    try:
        with train_bars(output) as bars:
            built = build(
                questions,
                output,
                task=task_file,
                base=base,
                method=method,
                epochs=epochs,
                learning_rate=learning_rate,
                layers=layers,
                quantization=quant,
                merges=DEFAULT_MERGES if vocab == "trim" else None,
                max_flips=max_flips,
                max_error=max_error,
                seed=seed,
                progress=bars.show,
                announce=lambda step: click.echo(step, err=True),
            )
    except LintError as error:
        task = task_file or questions.with_name("task.toml")
        for line in finding_lines(error.report, task, questions):
            click.echo(line, err=as_json)
        raise
    if as_json:
        click.echo(json.dumps(_summary(built), ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(built)))
    return 0


def _summary(built: Built) -> dict[str, Any]:
    quality = built.evaluation["quality"]
    baseline = built.evaluation["baselines"][0]["quality"]
    return {
        "bundle": str(built.bundle),
        "task": built.task.name,
        "labels": len(built.task.labels),
        "questions": built.run["questions"],
        "quantization": built.report["quantization"],
        "proof": built.report.get("proof"),
        "accuracy": quality["accuracy"],
        "macro_f1": quality["macro_f1"],
        "baseline": {"accuracy": baseline["accuracy"], "macro_f1": baseline["macro_f1"]},
        "median_ms": built.evaluation["latency"]["median_ms"],
        "abstained": sum(built.evaluation["abstaining"]["reasons"].values()),
    }


def _lines(built: Built) -> Iterator[str]:
    summary, proof = _summary(built), built.report.get("proof")
    questions = summary["questions"]
    yield (
        f"{built.bundle}: {summary['labels']} labels, {summary['quantization']}; trained on "
        f"{questions['train']} questions, tested on {questions['test']}"
    )
    figures = (("accuracy", "accuracy"), ("macro-F1", "macro_f1"))
    yield from table(
        [
            ("", "this model", built.evaluation["baselines"][0]["name"]),
            *(
                (name, f"{summary[key]['value']:.3f}", f"{summary['baseline'][key]['value']:.3f}")
                for name, key in figures
            ),
        ]
    )
    if proof:
        yield f"export: {proof['quantized']['flips']} of {proof['questions']} labels changed"
    yield (
        f"abstained on {summary['abstained']} of the test questions; "
        f"{summary['median_ms']:.0f} ms a question"
    )
    name = built.task.name
    bundle = quoted(built.bundle)
    yield f'next:\n  qcat ask -m {bundle} "…"\n  qcat deploy {bundle}'
    yield f"  ollama create {name} -f {quoted(built.bundle / 'Modelfile')}"
