"""Runs a function in a separate process, whose memory is released completely when it ends.

Otherwise the memory of torch would stay allocated while llama.cpp needs memory itself.
"""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from qcat.errors import ExportError, QcatError
from qcat.progress import Count

_GRACE = 5  # seconds
Argument = TypeVar("Argument")
Result = TypeVar("Result")


@contextmanager
def apart(
    function: Callable[[Argument, Count], Result], prepare: Callable[[], None]
) -> Iterator[Callable[[Argument, Count], Result]]:
    """Start a new process for one call of `function(argument, progress)`.

    Args:
        function: a module-level function, so that the process can find it.
        prepare: called there at once, in parallel with work here, to import heavy libraries. Its
            failure is ignored, because the call will run into the cause again.

    Yields:
        What makes the call: argument and result must be such as can be pickled, and `progress` is
        called here with what the function reports there. It raises

        ExportError: the process ended without a result, for example killed for lack of memory.
        QcatError, OSError: raised by the function.
        RuntimeError: the function raised any other error, which is named.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, function, prepare), daemon=True)
    done = False

    def call(argument: Argument, progress: Count) -> Result:
        nonlocal done
        try:
            here.send(argument)
            while True:
                what, value = here.recv()
                done = what != "progress"
                if what == "result":
                    found: Result = value
                    return found
                if what == "error":
                    raise value
                progress(*value)
        except (EOFError, ConnectionError):
            process.join()
            killed = process.exitcode == -getattr(signal, "SIGKILL", 9)  # Windows has none
            raise ExportError(
                f"merging was ended from outside (status {process.exitcode})"
                f"{': was there enough memory?' if killed else ': rerun the command'}"
            ) from None

    try:
        process.start()
        there.close()
        yield call
    finally:
        here.close()
        if process.pid is not None:
            if not done:  # as after Ctrl-C here; it ends the programs that it runs itself
                process.terminate()
                process.join(_GRACE)
            process.kill()
            process.join()


def _work(pipe: Any, function: Callable[..., Any], prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the waiting process handles it
    signal.signal(signal.SIGTERM, _leave)
    warnings.simplefilter("ignore")  # from libraries: nothing that a user could act on
    with suppress(Exception):
        prepare()
    with suppress(EOFError, ConnectionError):  # nobody is waiting any more
        argument = pipe.recv()
        pipe.send(_outcome(function, argument, lambda *done: pipe.send(("progress", done))))


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _outcome(
    function: Callable[[Argument, Count], Result], argument: Argument, progress: Count
) -> tuple[str, Result | Exception]:
    try:
        return "result", function(argument, progress)
    except ConnectionError:
        raise
    except Exception as error:
        known = isinstance(error, QcatError | OSError)  # other errors may not survive pickling
        found = error if known else RuntimeError(f"{type(error).__name__}: {error}")
        found.add_note(traceback.format_exc())
        return "error", found
