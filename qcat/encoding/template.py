"""A model's own chat template around a task: the prompt for a model that qcat did not train.

The template is a Jinja2 program that came with the model, and nobody vouches for it. It is rendered
in Jinja2's sandbox, in a process of its own with little time and memory, because a sandbox stops
neither an endless loop nor an endless text. It gets what Hugging Face's own renderer offers
(`raise_exception`, `tojson`, loop controls, `{% generation %}`), but always the same date: the same
prompt is needed tomorrow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qcat import cache
from qcat.child import run_module
from qcat.encoding.prompt import Prompt, Segment, task_lines
from qcat.errors import ModelError
from qcat.task import Task

TEMPLATE_KEY = "tokenizer.chat_template"
"""Where a GGUF has it."""
_TASK, _QUESTION = "\ue000task\ue001", "\ue000question\ue001"
"""Stand for the text of the task and for the question; no template has them."""
_CPU_SECONDS, _SECONDS, _BYTES = 3, 30, 1 << 30
_DATE = datetime(2026, 1, 1)
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
    attempts = [
        [{"role": "system", "content": _TASK}, {"role": "user", "content": _QUESTION}],
        [{"role": "user", "content": whole}],
    ]
    failure = "leaves out the question"
    for found in _rendered({"template": template, "special": special, "attempts": attempts}):
        text, failure = found.get("text", ""), found.get("error", failure)
        if text.count(_TASK) == text.count(_QUESTION) == 1 and text.index(_TASK) < text.index(
            _QUESTION
        ):
            return _prompt(task, text)
    raise ModelError(f"the chat template {failure}: choose another file of this model")


def _prompt(task: Task, text: str) -> Prompt:
    """The prompt in a rendered text, cut at the task and at the question."""
    before, _, rest = text.partition(_TASK)
    between, _, after = rest.partition(_QUESTION)
    if after.rstrip().endswith(_OPEN):  # a template that always thinks
        after = f"{after.rstrip()}\n\n{_CLOSED}\n\n"
    after = after if after.strip() else "\n"  # something must part question and answer
    parts = ((before, True), (task_lines(task), False), (between, True))
    answer = f"{task.answer}:" if task.answer else ""
    tail = ((after, True), (answer, False))
    return Prompt(
        prefix=tuple(Segment(*part) for part in parts if part[0]),
        before="",
        after=tuple(Segment(*part) for part in tail if part[0]),
    )


def _rendered(job: Mapping[str, Any]) -> list[dict[str, str]]:
    """For each list of messages the `text`, or the `error`; remembered in the cache folder."""
    data = json.dumps(job, sort_keys=True).encode()
    key = b"template 1 " + data
    if (saved := cache.load(key)) is not None:
        found: list[dict[str, str]] = json.loads(bytes(saved))
        return found
    try:
        done = run_module(__name__, data, seconds=_SECONDS)
    except subprocess.TimeoutExpired:
        return [{"error": f"runs for more than {_SECONDS} s"}]
    if done is None:
        return _render_all(job)
    if done.returncode:
        return [{"error": f"takes more than {_CPU_SECONDS} s or {_BYTES >> 20} MB"}]
    cache.save(key, done.stdout)
    found = json.loads(done.stdout)
    return found


def main() -> None:
    """Render the job on stdin, within limits where the system has them."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # what libraries reserved
        most = pages * resource.getpagesize() + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps(_render_all(json.load(sys.stdin.buffer))))


def _render_all(job: Mapping[str, Any]) -> list[dict[str, str]]:
    return [_render(job["template"], messages, job["special"]) for messages in job["attempts"]]


def _render(
    template: str, messages: list[dict[str, str]], special: Mapping[str, str]
) -> dict[str, str]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _DATE.strftime
    environment.filters["tojson"] = _json
    try:
        text = environment.from_string(template).render(
            **special,
            messages=messages,
            tools=None,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        text.encode()  # a lone surrogate cannot be tokenized
    except Exception as error:  # whatever a program can raise
        return {"error": f"cannot be used ({_line(error)})"}
    return {"text": text}


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
    """What an error says, in a line without control characters, which a terminal would obey."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return "".join(char if char.isprintable() else "?" for char in text)


if __name__ == "__main__":
    main()
