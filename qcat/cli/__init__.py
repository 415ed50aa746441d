"""The command line: one thin module a command, loaded when it is called."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from typing import Any

import click

from qcat.errors import ArgumentError, QcatError
from qcat.install import extra_with, how_to_install
from qcat.version import __version__

COMMANDS = {
    "build": "Make a model of labelled questions, in one command.",
    "ask": "Put questions into categories.",
    "batch": "Put the questions of a CSV, JSONL or Parquet file into categories.",
    "init": "Write a task for labelled questions.",
    "lint": "Check a task and its questions before training.",
    "train": "Fine-tune a base on labelled questions.",
    "export": "Turn an adapter into a 4-bit GGUF bundle, and prove it.",
    "retrain": "Train again with more questions; promote the model if it is not worse.",
    "deploy": "Put a bundle on an Ollama server, and prove it there.",
    "calibrate": "Calibrate a model's confidence, and set when it abstains.",
    "eval": "Measure a bundle on labelled questions.",
    "review": "Answer the questions that the model abstained on.",
    "drift": "Compare a log of answers with a reference period.",
    "bench": "Measure what a bundle costs on this machine.",
    "show": "Show what a model says of itself, its grammar, its Modelfile.",
    "doctor": "Show what this machine offers.",
}


class _Commands(click.Group):
    """Commands by name, each imported only when it is called: `ask` must start in a blink."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"qcat.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcat")
def cli() -> None:
    """Short questions into a fixed list of categories, on the CPU, with no invented label.

    \b
    Example:
      qcat ask -m house.gguf "When was the pool pump replaced?"
    """


def main(args: list[str] | None = None) -> None:
    """The entry point: runs a command and turns errors into one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        _show_any_text(stream)
    try:
        sys.exit(run(args))
    except BrokenPipeError:  # the reader went away (`qcat … | head`)
        _drop_stdout()
        sys.exit(1)


def _show_any_text(stream: object) -> None:
    """Let no character end a command half-way, whatever the encoding of the stream."""
    if not isinstance(stream, io.TextIOWrapper):
        return
    if sys.platform == "win32":  # which writes files in the code page of old programs
        stream.reconfigure(encoding="utf-8")
    if stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def run(args: list[str] | None) -> int:
    """Run a command line and return its exit status."""
    if sys.stdout is None:  # closed from the start, as by >&-
        click.echo("qcat: error: stdout is closed: send it somewhere", err=True)
        return 1
    debug = os.environ.get("QCAT_DEBUG") == "1"
    if not debug:
        warnings.simplefilter("ignore")  # of libraries: nothing that a user could act on
    try:
        status: Any = cli.main(args=args, prog_name="qcat", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        raise
    except QcatError as error:
        if debug:
            raise
        prefix = "Error" if isinstance(error, ArgumentError) else "qcat: error"  # as click has it
        click.echo(f"{prefix}: {' '.join(str(error).split())}", err=True)
        return error.exit_status
    except ModuleNotFoundError as error:
        if debug or error.name in (None, "qcat", "qcat_convert"):
            raise
        how = how_to_install(extra_with(error.name))
        click.echo(f"qcat: error: {error.name} is not installed: {how}", err=True)
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and _while_printing(error):
            _drop_stdout()
            click.echo(
                f"qcat: error: stdout cannot be written: {error.strerror}: make room, or write "
                "elsewhere",
                err=True,
            )
            return 1
        click.echo(
            f"qcat: error: unexpected {type(error).__name__}: {' '.join(str(error).split())}: "
            "please report it with the traceback that QCAT_DEBUG=1 shows",
            err=True,
        )
        return 1


def _while_printing(error: OSError) -> bool:
    """Whether it was `click.echo` that failed: the error itself does not name the file."""
    import traceback

    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is click.echo.__code__ for frame, _ in frames)


def _drop_stdout() -> None:
    """Keep Python from failing on its last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
