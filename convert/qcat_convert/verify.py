"""The proof: held-out questions through merged, F16 and quantized model, and what changed.

Accuracy, macro-F1, label flips and the Kullback-Leibler divergence of the label distributions;
and, for every question, that training prompt, runtime prompt and Modelfile give the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qcat.backends.llama import LlamaModel, LlamaScorer
from qcat.errors import ExportError
from qcat.grammar import grammar
from qcat.prompt import QUESTION_ROOM, Encoder, Prompt, encode_segments
from qcat.scoring import label_log_probabilities
from qcat.task import Task
from qcat.tokenization import HubTokenizer
from qcat.trie import LabelTrie
from qcat_convert.modelfile import render

_AWKWARD = (
    "When was the pool pump replaced?\nCategory: fence",
    "it's 12,345.67 o'clock… Don't WE'LL\tknow\r\n\r\n  two  spaces ",
    "水泵什么时候换的？ Straße ﬁn é e\u0301 🏊‍♀️ \u00a0x\u2028y",
    "def f(x): return {'a': [1, 2]}  # ~~~ <p> \\\\ //",
)
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """How one form of the model does on the held-out questions."""

    accuracy: float
    macro_f1: float
    flips: int
    """Questions that get another label than from the merged model."""
    kl_mean: float
    """Mean over questions of KL(merged || this), in nats."""
    kl_max: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return asdict(self)


class Replayed(NamedTuple):
    """What a GGUF says of questions."""

    log_probabilities: Floats
    """Of the labels, shape (questions, labels)."""
    seconds: list[float]
    """That each question took."""


def replay_gguf(
    path: Path,
    *,
    task: Task,
    prefix: Sequence[int],
    trie: LabelTrie,
    rests: Sequence[Sequence[int]],
    threads: int,
    base: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Replayed:
    """Load a GGUF and ask it, one question a forward pass as `qcat ask` does it.

    With a `base` the file is an adapter that lies beside it.
    """
    with LlamaModel(base or path) as model:
        scorer = LlamaScorer(
            model,
            prefix=prefix,
            trie=trie,
            grammar=grammar(task),
            room=QUESTION_ROOM,
            threads=threads,
            adapter=path if base else None,
        )
        try:
            rows, seconds = [], []
            for done, rest in enumerate(rests, 1):
                start = time.perf_counter()
                scores = next(scorer.score([rest]))
                seconds.append(time.perf_counter() - start)
                rows.append(label_log_probabilities(trie, scores.logits))
                progress(done, len(rests))
            return Replayed(np.stack(rows), seconds)
        finally:
            scorer.close()


def quality(found: Floats, reference: Floats, truth: Sequence[int]) -> Quality:
    """Compare label log-probabilities with the merged model's and with the right labels.

    Args:
        found: shape (questions, labels).
        reference: of the merged model, same shape.
        truth: index of the right label, for each question.
    """
    from sklearn.metrics import accuracy_score, f1_score

    labels = found.argmax(1)
    divergence = (np.exp(reference) * (reference - found)).sum(1)
    return Quality(
        accuracy=float(accuracy_score(truth, labels)),
        macro_f1=float(f1_score(truth, labels, average="macro", zero_division=0.0)),
        flips=int((labels != reference.argmax(1)).sum()),
        kl_mean=float(np.maximum(divergence, 0).mean()),
        kl_max=float(np.maximum(divergence, 0).max()),
    )


def spread(questions: Sequence[str], most: int) -> tuple[str, ...]:
    """At most `most` of the questions, evenly spaced, so that sorted files give all labels."""
    step = max(1.0, len(questions) / most)
    return tuple(questions[int(i * step)] for i in range(min(most, len(questions))))


def check_tokens(
    prompt: Prompt, trained: Encoder, served: Encoder, modelfile: str, questions: Sequence[str]
) -> int:
    """Assert that all three places see the same token ids, for every question.

    A question that spells a special token (`<|im_end|>`) is plain text in training and here, but
    a control token in Ollama, which has no switch for it: such questions are counted, not failed.

    Args:
        prompt: the task's prompt.
        trained: the Hugging Face tokenizer.
        served: the GGUF's.
        modelfile: the Modelfile's text.
        questions: as `clean_question` gives them.

    Returns:
        Questions that Ollama would read otherwise.

    Raises:
        ExportError: at the first question where they differ, with both ids.
    """
    for text, known in (*prompt.prefix, *prompt.rest("?")):
        if not known and served.encode(text, special=True) != served.encode(text, special=False):
            raise ExportError(
                "the task's text spells a special token, which Ollama would read as one: "
                "write its labels, descriptions and instruction without it"
            )
    special = 0
    prefix = encode_segments(prompt.prefix, served)
    for question in questions:
        rest = prompt.rest(question)
        ours = prefix + encode_segments(rest, served)
        _compare(question, "training", encode_segments((*prompt.prefix, *rest), trained), ours)
        if served.encode(question, special=True) != served.encode(question, special=False):
            special += 1
            continue
        rendered = served.encode(render(modelfile, question), special=True)
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


def check_base_tokens(gguf: Path, folder: Path, texts: Sequence[str]) -> None:
    """Assert that a tokenizer rebuilt from a GGUF gives the ids that llama.cpp gives.

    Args:
        gguf: the base, checked by `qcat.gguf_base`.
        folder: of the checkpoint that was made of it.
        texts: to be compared, besides some awkward ones. One that spells a control token is passed
            over: what the file's publisher took for text is a token here, or the other way round.

    Raises:
        ExportError: at the first text where they differ, with both ids.
    """
    rebuilt = HubTokenizer(folder)
    with LlamaModel(gguf, vocab_only=True) as model:
        for text in (*_AWKWARD, *texts):
            ids = rebuilt.encode(text, special=False)
            if ids == rebuilt.encode(text, special=True):
                _compare(
                    text,
                    "the tokenizer rebuilt from the GGUF",
                    ids,
                    model.encode(text, special=False),
                )


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
