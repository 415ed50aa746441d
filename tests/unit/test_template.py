"""A model's own chat template as the prompt of a task."""

from __future__ import annotations

import time

import pytest

from qcat.encoding.prompt import Segment
from qcat.encoding.template import template_prompt
from qcat.errors import ModelError
from qcat.task import Task

TASK = Task("some", {"pool": "the water", "fence": ""}, instruction="Sort it.")
LINES = "Sort it.\n\nValid categories:\n- pool: the water\n- fence"
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{%- endif %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n'
 + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{{ '<start_of_turn>model\\n' }}"""
DROPS_SYSTEM = """\
{% for m in messages if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endfor %}"""
ALWAYS_THINKS = """\
{{ messages[0].content }}<|User|>{{ messages[-1].content }}<|Assistant|><think>
"""
OTHERS = """\
{% generation %}{{ messages | tojson | length }}{% endgeneration %}
{%- for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}"""


def texts(prompt, question="QUESTION"):
    return [*prompt.prefix, *prompt.rest(question)]


def whole(prompt):
    return prompt.text("QUESTION")


def test_the_task_is_the_system_message_and_thinking_is_off():
    prompt = template_prompt(TASK, CHATML, {})
    assert texts(prompt) == [
        Segment("<|im_start|>system\n", True),
        Segment(LINES, False),
        Segment("<|im_end|>\n<|im_start|>user\n", True),
        Segment("QUESTION", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", True),
        Segment("Category:", False),
    ]


def test_without_a_word_for_the_answer_nothing_is_begun():
    prompt = template_prompt(TASK.replace(answer=""), CHATML, {})
    assert texts(prompt)[-1].text.endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            GEMMA,
            f"<bos><start_of_turn>user\n{LINES}\n\nQUESTION<end_of_turn>\n"
            "<start_of_turn>model\nCategory:",
        ),
        (DROPS_SYSTEM, f"[INST] {LINES}\n\nQUESTION [/INST]Category:"),
        (ALWAYS_THINKS, f"{LINES}<|User|>QUESTION<|Assistant|><think>\n\n</think>\n\nCategory:"),
        (OTHERS, None),
    ],
    ids=["refuses a system message", "drops it", "always thinks", "other statements"],
)
def test_forms_that_are_met(template, expected):
    prompt = template_prompt(TASK, template, {"bos_token": "<bos>"})
    assert whole(prompt).endswith("Category:")
    if expected:
        assert whole(prompt) == expected


def test_a_question_and_its_answer_stay_apart():
    prompt = template_prompt(TASK, "{{ messages[0].content }}\n{{ messages[1].content }}", {})
    assert whole(prompt) == f"{LINES}\nQUESTION\nCategory:"
    bare = template_prompt(
        TASK.replace(answer=""), "{{ messages | map(attribute='content') | join }}", {}
    )
    assert whole(bare) == f"{LINES}QUESTION\n"


def test_the_date_is_always_the_same():
    template = "{% set d = strftime_now('%d %b %Y') %}{{ d }}" + CHATML
    assert whole(template_prompt(TASK, template, {})).startswith("01 Jan 2026<|im_start|>system")


def test_what_looks_like_markup_in_a_task_is_plain_text():
    task = Task("some", {"<|im_end|>": "", "{{ 7 * 7 }}": ""})
    plain = [part for part in template_prompt(task, CHATML, {}).prefix if not part.special]
    assert "<|im_end|>" in plain[0].text
    assert "{{ 7 * 7 }}" in plain[0].text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "cannot be used"),
        ("{{ messages[0].nothing.at.all }}", "cannot be used"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "cannot be used"),
        ("{% set x = 9**(9**(9**9)) %}", "takes more than 3 s"),
        ("{{ 'a' * 3000000000 }}", "MemoryError"),
        ("{{ '\ud800' }}", "UnicodeEncodeError"),
        ("{{ raise_exception('\x1b]0;mine\x07') }}", r"TemplateError: \?\]0;mine\?"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "SyntaxError"),
        ("always the same", "leaves out the question"),
        ("{{ messages[-1].content }}{{ messages[-1].content }}", "leaves out the question"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "takes more than 3 s or 1024 MB",
        ),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    began = time.monotonic()
    with pytest.raises(ModelError, match=message):
        template_prompt(TASK, template, {})
    assert time.monotonic() - began < 60
