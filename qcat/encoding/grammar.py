"""The label language as GBNF, llama.cpp's grammar notation: for llama.cpp, llama-server and users.

Escapes are those of llama.cpp's `parse_char` (src/llama-grammar.cpp). The text cannot fail to
parse there for a checked `Task`: an unescaped quote would crash the process.
"""

from __future__ import annotations

from collections.abc import Iterable

from qcat.task import Task


def grammar(task: Task) -> str:
    """GBNF that accepts exactly the task's answers, each with its leading space.

    Raises:
        TaskError: the verbalizer is `code` and no codes have been chosen.
    """
    return alternatives(f" {answer}" for answer in task.answers)


def alternatives(texts: Iterable[str]) -> str:
    """GBNF whose root is one of `texts`."""
    # A line may only break after the bar: llama.cpp ends a rule at any other line break.
    return "root ::= " + " |\n  ".join(f'"{_escaped(text)}"' for text in texts) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
