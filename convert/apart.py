"""A function in a process of its own, whose memory is given back whole when it ends.

torch and what it leaves behind would otherwise stay while llama.cpp needs memory for its own.
"""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from qcat.errors import ExportError, QcatError

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]


def apart(
    function: Callable[[Argument, Progress], Result], argument: Argument, progress: Progress
) -> Result:
    """Call `function(argument, progress)` in a fresh process and return what it returns.

    Args:
        function: of a module, so that the process finds it.
        argument: anything that can be pickled; so must the result.
        progress: called here with what the function reports there.

    Raises:
        ExportError: the process ended without a word, as one that the system killed for memory.
        QcatError, OSError: whatever the function raises of these.
        RuntimeError: for any other error of it, which it names.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, argument), daemon=True)
    try:
        process.start()
        sender.close()
        while True:
            what, value = receiver.recv()
            if what == "result":
                found: Result = value
                return found
            if what == "error":
                raise value
            progress(*value)
    except EOFError:
        process.join()
        raise ExportError(
            f"merging was ended from outside (status {process.exitcode}): was there enough memory?"
        ) from None
    finally:
        receiver.close()
        if process.pid is not None:
            process.kill()  # if it still runs, as after Ctrl-C here
            process.join()


def _work(sender: Any, function: Callable[..., Any], argument: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits takes care of it
    warnings.simplefilter("ignore")  # of libraries: nothing that a user could act on
    with suppress(BrokenPipeError):  # nobody waits any more
        sender.send(_outcome(function, argument, lambda *done: sender.send(("progress", done))))


def _outcome(
    function: Callable[[Argument, Progress], Result], argument: Argument, progress: Progress
) -> tuple[str, Result | Exception]:
    try:
        return "result", function(argument, progress)
    except BrokenPipeError:
        raise
    except Exception as error:
        known = isinstance(error, QcatError | OSError)  # others may not survive the way
        found = error if known else RuntimeError(f"{type(error).__name__}: {error}")
        found.add_note(traceback.format_exc())
        return "error", found
