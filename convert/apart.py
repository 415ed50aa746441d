"""A function in a process of its own, whose memory is given back whole when it ends.

torch and what it leaves behind would otherwise stay while llama.cpp needs memory for its own.
"""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, TypeVar

from qcat.errors import ExportError

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
        Exception: whatever the function raises.
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
    try:
        result = function(argument, lambda done, total: sender.send(("progress", (done, total))))
    except BrokenPipeError:
        return  # nobody waits any more
    except Exception as error:
        error.add_note(traceback.format_exc())
        sender.send(("error", error))
    else:
        sender.send(("result", result))
