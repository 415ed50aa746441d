"""The prompt: the one place that builds its text, and the one way to turn it into tokens.

Training, the local runtime and the Modelfile all take it from here. The prompt has two parts:
the prefix, the same for every question, and the rest, which holds the question. No token spans
the two, so that the prefix can be evaluated once (`check_boundary` asserts it).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_uppercase
from typing import NamedTuple, Protocol

from qcat.errors import ModelError, QuestionError, TaskError
from qcat.task import Task

QUESTION_ROOM = 256
"""Tokens kept for the question and the words after it. Longer questions are cut."""


_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoder(Protocol):
    """Text to token ids; `special` decides whether `<|im_end|>` is a token or plain text."""

    def encode(self, text: str, *, special: bool) -> list[int]: ...


class Tokenizer(Encoder, Protocol):
    """An encoder that knows its end token: `HubTokenizer`, or a `LlamaModel`."""

    end: int
    begin: str | None
    """The token that every prompt begins with, as text; None for none."""


class Vocabulary(Tokenizer, Protocol):
    """A model's tokens, both ways."""

    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> bytes: ...


class Segment(NamedTuple):
    """A run of prompt text, and whether special tokens are recognised in it."""

    text: str
    special: bool


@dataclass(frozen=True)
class Prompt:
    """A task's prompt, cut at the question: `prefix`, `before` + question, `after`."""

    prefix: tuple[Segment, ...]
    before: str
    after: tuple[Segment, ...]
    """At least one."""

    def rest(self, question: str) -> tuple[Segment, ...]:
        """The segments after the prefix, for a question that `clean_question` has been over."""
        first, *others = self.after
        if not first.special:
            # One piece: Qwen's pre-tokenizer joins "?" and the line break after it.
            return (Segment(self.before + question + first.text, False), *others)
        return (Segment(self.before + question, False), *self.after)

    def text(self, question: str) -> str:
        """The whole prompt as text, for a person or for another runtime's template."""
        return "".join(segment.text for segment in (*self.prefix, *self.rest(question)))


def build_prompt(task: Task, encoder: Tokenizer, begin: str | None = None) -> Prompt:
    """The prompt of a task for a tokenizer.

    Chat style is ChatML as Qwen3, Qwen2.5 and SmolLM2 use it, always with a system message of
    its own (their templates add one otherwise), and with an empty think block where the
    vocabulary has `<think>`: what Qwen3's template renders under `enable_thinking=False`. With
    Gemma's vocabulary it is Gemma's turns.

    Args:
        task: with codes, if it uses them.
        encoder: the tokenizer.
        begin: what a prompt begins with; by default what this tokenizer's prompts always do.

    Raises:
        ModelError: chat style and a vocabulary without the ChatML tokens.
        TaskError: the verbalizer is `code` and no codes have been chosen.
    """
    body = task_lines(task)
    begin = begin or encoder.begin
    start = (Segment(begin, True),) if begin else ()
    if task.style == "plain":
        return Prompt(
            prefix=(*start, Segment(f"{body}\n\n{task.question}:", False)),
            before=" ",
            after=(Segment(f"\n{task.answer}:" if task.answer else "\n", False),),
        )
    if all(_is_token(encoder, token) for token in ("<start_of_turn>", "<end_of_turn>")):
        return Prompt(  # Gemma knows no system message
            prefix=(
                *start,
                Segment("<start_of_turn>user\n", True),
                Segment(f"{body}\n\n", False),
            ),
            before="",
            after=(Segment("<end_of_turn>\n<start_of_turn>model\n", True),),
        )
    if not all(_is_token(encoder, token) for token in ("<|im_start|>", "<|im_end|>")):
        raise ModelError(
            "the model's vocabulary has neither <|im_start|> nor <start_of_turn>: "
            'write style = "plain" in the task'
        )
    think = "<think>\n\n</think>\n\n" if _is_token(encoder, "<think>") else ""
    return Prompt(
        prefix=(
            Segment("<|im_start|>system\n", True),
            Segment(body, False),
            Segment("<|im_end|>\n<|im_start|>user\n", True),
        ),
        before="",
        after=(Segment(f"<|im_end|>\n<|im_start|>assistant\n{think}", True),),
    )


def task_lines(task: Task) -> str:
    """The instruction and the list of labels, as every prompt shows them.

    Raises:
        TaskError: the verbalizer is `code` and no codes have been chosen.
    """
    lines = [task.instruction, "", "Valid categories:"]
    for (label, description), answer in zip(task.labels.items(), task.answers, strict=True):
        shown = label if task.verbalizer == "name" else f"{answer} = {label}"
        lines.append(f"- {shown}: {description}" if description else f"- {shown}")
    return "\n".join(lines)


def clean_question(question: str) -> str:
    """A question as every part of qcat sees it, in training and in use.

    NFC (Qwen's own tokenizer normalises, llama.cpp does not), lone surrogates to U+FFFD, control
    characters and line breaks to spaces, runs of white space to one space, stripped. A question
    typed in capitals becomes lower case, because capitals are split into other, rarer tokens; one
    word in capitals may be a code, and stays.

    Raises:
        QuestionError: if nothing is left.
    """
    text = question
    if not (text.isascii() and text.isprintable()):  # most questions are, and need none of this
        text = unicodedata.normalize("NFC", _SURROGATE.sub("\ufffd", question))
        text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text)
    words = text.split()
    text = " ".join(words)
    if text.isupper() and sum(_is_shouted(word) for word in words) >= 2:
        text = unicodedata.normalize("NFC", text.lower())
    if not text:
        raise QuestionError("the question is empty: write one")
    return text


def _is_shouted(word: str) -> bool:
    """Whether it is a word in capitals, and not a number, an initial or a model's name."""
    return sum(map(str.isupper, word)) > 2 and not any(map(str.isdigit, word))


def encode_segments(segments: Iterable[Segment], encoder: Encoder) -> list[int]:
    """Token ids of segments, each encoded by itself and joined."""
    return [token for text, special in segments for token in encoder.encode(text, special=special)]


def encode_answers(task: Task, encoder: Encoder) -> list[tuple[int, ...]]:
    """Token ids of each label's answer, in label order, with the leading space, without the end.

    With the space ` pool` is one token, and the first tokens of most labels differ.
    """
    return [tuple(encoder.encode(f" {answer}", special=False)) for answer in task.answers]


def check_boundary(prompt: Prompt, encoder: Encoder) -> None:
    """Assert that no token spans the prefix and the rest, for a few awkward first characters.

    Raises:
        ModelError: if one does; the prefix could then not be evaluated once.
    """
    if prompt.after[0].special:
        return  # a special token stands between them in chat style
    prefix = encode_segments(prompt.prefix, encoder)
    for probe in ("When?", "?", "5", "'s", ":", "é", "…"):
        rest = encode_segments(prompt.rest(probe), encoder)
        # Special tokens at the beginning stay by themselves.
        start = [s for s in prompt.prefix if s.special]
        text = prompt.text(probe).removeprefix("".join(s.text for s in start))
        joint = encode_segments(start, encoder) + encoder.encode(text, special=False)
        if prefix + rest != joint:
            raise ModelError(
                f"this tokenizer joins the words before the question with {probe!r}: "
                'change `question` in the task, or write style = "chat"'
            )


def with_codes(task: Task, encoder: Encoder) -> Task:
    """The task with a code for each label, if it uses codes and has none yet.

    Codes are AA, AB, … in alphabetical order, only those that are one token each after a space.

    Raises:
        TaskError: if the vocabulary has too few such tokens.
    """
    if task.verbalizer != "code" or task.codes:
        return task
    single = [
        first + second
        for first, second in product(ascii_uppercase, repeat=2)
        if len(encoder.encode(f" {first}{second}", special=False)) == 1
    ]
    if len(single) < len(task.labels):
        raise TaskError(
            f"the vocabulary has {len(single)} two-letter tokens for {len(task.labels)} labels: "
            'write verbalizer = "name" in the task'
        )
    return task.replace(codes=dict(zip(task.labels, single, strict=False)))


def _is_token(encoder: Encoder, text: str) -> bool:
    return len(encoder.encode(text, special=True)) == 1
