"""A model's own chat template around a task: the prompt for a model that qcat did not train.

The template is a Jinja2 program that came with the model, as trustworthy as the file it lies in. It
is rendered within a second, in Jinja2's sandbox, with what Hugging Face's own renderer offers
(`raise_exception`, `tojson`, loop controls, `{% generation %}`). The date is not offered: the same
prompt is needed tomorrow.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qcat.encoding.prompt import Prompt, Segment, task_lines
from qcat.errors import ModelError
from qcat.task import Task

TEMPLATE_KEY = "tokenizer.chat_template"
"""Where a GGUF has it."""
_TASK, _QUESTION = "\ue000task\ue001", "\ue000question\ue001"
"""Stand for the text of the task and for the question; no template has them."""
_SECONDS = 1.0
_OPEN, _CLOSED = "<think>", "</think>"


def template_prompt(task: Task, template: str, special: Mapping[str, str]) -> Prompt:
    """The prompt of a task in a model's chat template.

    The task is the system message; if the template refuses or drops it, both stand in the user's.
    Thinking is switched off where the template has the usual switch, and ended where it has begun.
    The answer is begun with the task's word for it.

    Args:
        task: with codes, if it uses them.
        template: the program.
        special: what the template may call by name, such as `bos_token`.

    Raises:
        ModelError: the template does not compile, fails, takes too long, or drops the question.
    """
    whole = f"{_TASK}\n\n{_QUESTION}"
    attempts = (
        [{"role": "system", "content": _TASK}, {"role": "user", "content": _QUESTION}],
        [{"role": "user", "content": whole}],
    )
    failure = "leaves out the question"
    for messages in attempts:
        try:
            text = _render(template, messages, special)
        except TemplateError as error:
            failure = f"cannot be used ({_line(error)})"
            continue
        if text.count(_TASK) == text.count(_QUESTION) == 1 and text.index(_TASK) < text.index(
            _QUESTION
        ):
            return _prompt(task, text)
    raise ModelError(f'the chat template {failure}: write style = "plain" in the task')


def _prompt(task: Task, text: str) -> Prompt:
    """The prompt in a rendered text, cut at the task and at the question."""
    before, _, rest = text.partition(_TASK)
    between, _, after = rest.partition(_QUESTION)
    if after.rstrip().endswith(_OPEN):  # a template that always thinks
        after = f"{after.rstrip()}\n\n{_CLOSED}\n\n"
    parts = ((before, True), (task_lines(task), False), (between, True))
    answer = f"{task.answer}:" if task.answer else ""
    tail = ((after, True), (answer, False))
    return Prompt(
        prefix=tuple(Segment(*part) for part in parts if part[0]),
        before="",
        after=tuple(Segment(*part) for part in tail if part[0]),
    )


def _render(template: str, messages: list[dict[str, str]], special: Mapping[str, str]) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _json
    values = {
        **special,
        "messages": messages,
        "tools": None,
        "add_generation_prompt": True,
        "enable_thinking": False,
    }

    def render() -> str:
        return environment.from_string(template).render(values)

    try:
        return _within(_SECONDS, render)
    except TemplateError:
        raise
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
            AttributeError) as error:  # what an expression of the template can raise  # fmt: skip
        raise TemplateError(f"{type(error).__name__}: {error}") from None


def _within(seconds: float, call: Callable[[], str]) -> str:
    """A call's result; TemplateError if its Python code runs for longer than this."""
    deadline = time.monotonic() + seconds

    def watch(frame: FrameType, event: str, value: object) -> Any:
        if time.monotonic() > deadline:
            raise TemplateError(f"it runs for more than {seconds:g} s")
        return watch

    old = sys.gettrace()
    sys.settrace(watch)
    try:
        return call()
    finally:
        sys.settrace(old)


class _Generation(Extension):
    """`{% generation %}`, with which templates mark the answers to train on: its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it for instances)

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return found


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(value: object, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
