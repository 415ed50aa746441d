"""A function in a process of its own, whose memory is given back whole when it ends.

torch and what it leaves behind would otherwise stay while llama.cpp needs memory for its own.
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

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@contextmanager
def apart(
    function: Callable[[Argument, Count], Result], prepare: Callable[[], None]
) -> Iterator[Callable[[Argument, Count], Result]]:
    """Start a fresh process for one call of `function(argument, progress)`.

    Args:
        function: of a module, so that the process finds it.
        prepare: called there at once, while there is other work here: to import what is heavy. A
            failure of it is passed over, since the call will meet the cause again.

    Yields:
        What makes the call: argument and result must be such as can be pickled, and `progress` is
        called here with what the function reports there. It raises

        ExportError: the process ended without a word, as one that the system killed for memory.
        QcatError, OSError: whatever the function raises of these.
        RuntimeError: for any other error of it, which it names.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, function, prepare), daemon=True)

    def call(argument: Argument, progress: Count) -> Result:
        try:
            here.send(argument)
            while True:
                what, value = here.recv()
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
            process.kill()  # if it still runs, as after Ctrl-C here
            process.join()


def _work(pipe: Any, function: Callable[..., Any], prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits takes care of it
    warnings.simplefilter("ignore")  # of libraries: nothing that a user could act on
    with suppress(Exception):
        prepare()
    with suppress(EOFError, ConnectionError):  # nobody waits any more
        argument = pipe.recv()
        pipe.send(_outcome(function, argument, lambda *done: pipe.send(("progress", done))))


def _outcome(
    function: Callable[[Argument, Count], Result], argument: Argument, progress: Count
) -> tuple[str, Result | Exception]:
    try:
        return "result", function(argument, progress)
    except ConnectionError:
        raise
    except Exception as error:
        known = isinstance(error, QcatError | OSError)  # others may not survive the way
        found = error if known else RuntimeError(f"{type(error).__name__}: {error}")
        found.add_note(traceback.format_exc())
        return "error", found
