"""Checks that training, runtime and Modelfile see the same token ids, for every question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qcat.encoding.prompt import Encoder, Prompt, encode_segments
from qcat.errors import ExportError

AWKWARD = (
    "When was the pool pump replaced?\nCategory: fence",
    "it's 12,345.67 o'clock… Don't WE'LL\tknow\r\n\r\n  two  spaces ",
    "水泵什么时候换的？ Straße ﬁn é e\u0301 🏊‍♀️ \u00a0x\u2028y",
    "def f(x): return {'a': [1, 2]}  # ~~~ <p> \\\\ //",
)
"""Texts on which tokenizers differ that are not quite the same."""


def check_tokens(
    prompt: Prompt,
    trained: Encoder,
    served: Encoder,
    render: Callable[[str], str],
    questions: Sequence[str],
) -> int:
    """Assert that all three places see the same token ids, for every question.

    A question that spells a special token (`<|im_end|>`) is plain text in training and here, but
    a control token in Ollama, which has no switch for it: such questions are counted, not failed.

    Args:
        prompt: the task's prompt.
        trained: the Hugging Face tokenizer.
        served: the GGUF's tokenizer.
        render: renders a question with the Modelfile's template.
        questions: questions cleaned by `clean_question`.

    Returns:
        Number of questions that Ollama would read differently.

    Raises:
        ExportError: at the first question where they differ, with both ids.
    """
    special = 0
    prefix = encode_segments(prompt.prefix, served)
    for question in questions:
        rest = prompt.rest(question)
        ours = prefix + encode_segments(rest, served)
        _compare(question, "training", encode_segments((*prompt.prefix, *rest), trained), ours)
        if served.encode(question, special=True) != served.encode(question, special=False):
            special += 1
            continue
        rendered = served.encode(render(question), special=True)
        _compare(question, "the Modelfile's TEMPLATE", rendered, ours)
    return special


def check_questions(
    prompt: Prompt, trained: Encoder, served: Encoder, questions: Sequence[str]
) -> None:
    """As `check_tokens`, without the prefix and the Modelfile: quick, for many questions."""
    for question in questions:
        rest = prompt.rest(question)
        ids = (encode_segments(rest, encoder) for encoder in (trained, served))
        _compare(question, "training", *ids)


def check_texts(where: str, theirs: Encoder, served: Encoder, texts: Sequence[str]) -> None:
    """Assert that a tokenizer gives the ids that llama.cpp gives.

    Args:
        where: what the tokenizer is, for messages.
        theirs: the tokenizer.
        served: llama.cpp's.
        texts: texts to compare. One that spells a control token is skipped: a GGUF's publisher
            may have treated a token as text, or the other way round.

    Raises:
        ExportError: at the first text where they differ, with both ids.
    """
    for text in texts:
        ids = theirs.encode(text, special=False)
        if ids == theirs.encode(text, special=True):
            _compare(text, where, ids, served.encode(text, special=False))


def _compare(question: str, where: str, theirs: list[int], ours: list[int]) -> None:
    if theirs == ours:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
        min(len(theirs), len(ours)),
    )
    raise ExportError(
        f"question {question[:60]!r}: {where} has tokens {theirs[at : at + 4]} at {at}, "
        f"the runtime {ours[at : at + 4]}: please report it with the tokenizer's name"
    )
