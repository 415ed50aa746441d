"""`qcat export`: adapter to proven bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from qcat_convert.trim import DEFAULT_MERGES

from qcat.cli.options import max_flips_option, quant_option, vocab_option
from qcat.cli.output import Bars, FloatRange, given, table, timeout_option
from qcat.shell import quoted
from qcat.workflows.export_job import read_request

if TYPE_CHECKING:
    from qcat.workflows.export_job import Request

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("run", metavar="RUN", type=_FILE)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=_FILE,
    help="Folder to make; it must not exist.",
)
@click.option(
    "-t",
    "--task",
    "task_file",
    metavar="FILE",
    type=_FILE,
    help="The task.  [default: RUN/task.toml]",
)
@click.option(
    "--base",
    metavar="MODEL",
    help="Base model: a folder, a hub name, a GGUF file, or ollama:NAME.  "
    "[default: what the adapter names]",
)
@click.option(
    "--data",
    metavar="FILE",
    type=_FILE,
    help="Held-out questions for the proof: JSONL, CSV or Parquet.  "
    "[default: RUN/test.jsonl, if there]",
)
@click.option(
    "--train-data",
    metavar="FILE",
    type=_FILE,
    help="Training questions for the importance matrix, likewise.  "
    "[default: RUN/train.jsonl, if there]",
)
@click.option(
    "--validation-data",
    metavar="FILE",
    type=_FILE,
    help="Labelled questions for the calibration, likewise.  "
    "[default: RUN/validation.jsonl, if there]",
)
@quant_option
@click.option(
    "--beside",
    is_flag=True,
    help="For a LoRA adapter on a GGUF base: leave the base as it is and write the adapter as a "
    "file beside it. One base then serves many tasks.",
)
@click.option(
    "--precision",
    type=click.Choice(["f16", "bf16"]),
    default="f16",
    show_default=True,
    help="Of the GGUF before it is quantized; bf16 if the base overflows f16.",
)
@vocab_option
@click.option(
    "--merges",
    type=click.IntRange(0),
    default=DEFAULT_MERGES,
    show_default=True,
    metavar="N",
    help="With --vocab trim: how many of the tokenizer's first merges to keep besides.",
)
@click.option(
    "--converter",
    metavar="DIR",
    type=_FILE,
    help="Source tree of llama.cpp: where qcat does not know the base's architecture, the "
    "convert_hf_to_gguf.py in it converts the merged model.",
)
@max_flips_option
@click.option(
    "--max-mb",
    type=FloatRange(0, min_open=True),
    metavar="N",
    help="Make no file of more megabytes than this; --quant auto chooses among the others.",
)
@click.option(
    "--ollama",
    "ollama_name",
    metavar="NAME",
    help="Then make this model on the Ollama server, as `qcat deploy` does.",
)
@timeout_option
def command(
    run: Path,
    output: Path,
    task_file: Path | None,
    base: str | None,
    data: Path | None,
    train_data: Path | None,
    validation_data: Path | None,
    quant: str | None,
    beside: bool,
    precision: Any,
    vocab: str,
    merges: int,
    converter: Path | None,
    max_flips: float,
    max_mb: float | None,
    ollama_name: str | None,
    timeout: int,
) -> None:
    """Merge the LoRA adapter in RUN, convert it to a 4-bit GGUF and measure what that changed.

    RUN is a folder that `qcat train` or PEFT's save_pretrained wrote, or a whole checkpoint
    without an adapter.

    \b
    Examples:
      qcat export runs/house -o dist/house
      qcat export adapter -t task.toml --base Qwen/Qwen3-0.6B --train-data train.jsonl \\
        --data held_out.jsonl -o house
    """
    if not ollama_name and given("timeout"):
        raise click.UsageError("--timeout is for --ollama")
    if beside and (quant or max_mb or vocab == "trim" or ollama_name):
        raise click.UsageError("--beside: not with --quant, --max-mb, --vocab trim, --ollama")
    if vocab == "full" and given("merges"):
        raise click.UsageError("--merges is for --vocab trim")
    request = read_request(
        run,
        output,
        task=task_file,
        base=base,
        data=data,
        train_data=train_data,
        validation_data=validation_data,
        quantization=quant,
        beside=beside,
        precision=precision,
        merges=merges if vocab == "trim" else None,
        converter=converter,
        max_flips=max_flips,
        max_mb=max_mb,
    )
    from qcat.workflows.export import convert_apart, export

    if ollama_name:
        from qcat.workflows.deploy import check_server

        check_server(ollama_name, request.task, timeout)  # now, and not after minutes of work
    with Bars() as bars:
        report = export(request, bars.show, convert_apart)
    print_report(request, report)
    if ollama_name:
        from qcat.cli.deploy import deploy_and_tell

        click.echo(f"{output}: {report['bytes'] / 1e6:.1f} MB")
        deploy_and_tell(
            output, ollama_name, [example.text for example in request.held_out], timeout
        )
        return
    _print_next(output, request.task.name, report, beside)


def _print_next(output: Path, name: str, report: Mapping[str, Any], beside: bool) -> None:
    click.echo(f"{output}: {report['bytes'] / 1e6:.1f} MB; next:")
    click.echo(f'  qcat ask -m {quoted(output / f"{name}.gguf")} "…"')
    click.echo(f"  ollama create {name} -f {quoted(output / 'Modelfile')}")
    if not beside:
        click.echo(f"  qcat deploy {quoted(output)}")


def print_report(request: Request, report: Mapping[str, Any]) -> None:
    """Print the proof and what is known of the confidence."""
    from qcat.report.card import calibration_line, choice_rows, quality_rows, vocabulary_line

    for kind, count in report["fallbacks"].items():
        click.echo(
            f"qcat: warning: {count} tensors have row lengths that {report['quantization']} does "
            f"not fit: stored as {kind}",
            err=True,
        )
    if "vocabulary" in report:
        click.echo(f"vocabulary: {vocabulary_line(report['vocabulary'])}")
    elif request.merges is not None:
        click.echo(
            f"qcat: warning: vocabulary not trimmed: with {request.merges} merges all of its "
            "tokens are kept",
            err=True,
        )
    if "choice" in report:
        click.echo("\n".join([*table(choice_rows(report)), ""]))
    if "proof" in report:
        click.echo("\n".join(table(quality_rows(report))))
    else:
        click.echo("qcat: warning: not proved: give held-out questions with --data", err=True)
    calibration = report.get("calibration", {"refused": "give questions with --validation-data"})
    if "after" in calibration:
        click.echo(calibration_line(calibration))
    if calibration["refused"]:
        click.echo(f"qcat: warning: not calibrated: {calibration['refused']}", err=True)
