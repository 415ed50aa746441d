"""`Classifier`: questions in, `Prediction`s out. The public face of qcat.

Knows nothing of the command line. llama.cpp is loaded when a model is opened, not on import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from qcat.bundle import Bundle
from qcat.errors import ModelError, QuestionError
from qcat.grammar import grammar
from qcat.prompt import (
    QUESTION_ROOM,
    Prompt,
    build_prompt,
    check_boundary,
    clean_question,
    encode_answers,
    encode_segments,
)
from qcat.scoring import Scores, entropy, label_log_probabilities, margin
from qcat.trie import LabelTrie

if TYPE_CHECKING:
    from qcat.backends.llama import LlamaModel, LlamaScorer

DEFAULT_MODEL = Path(__file__).parent / "models" / "household.gguf"
"""The model that comes with qcat."""
_MAX_CHARS = 20_000  # of a question, before it is tokenized to see how much of it fits
_WINDOW = 64  # questions tokenized ahead by ask_many


@dataclass(frozen=True)
class Prediction:
    """The answer to one question."""

    label: str
    """The most probable label: always one of the task's."""
    confidence: float
    """Its probability given the question, from 0 to 1."""
    abstained: bool
    """Whether the confidence is under the threshold, so that a person should decide."""
    probabilities: Mapping[str, float]
    """All labels, most probable first; they sum to 1."""
    label_mass: float
    """Share of the model's whole next-token probability that falls on labels at all."""
    margin: float
    """The best probability less the second best."""
    entropy: float
    """Of the label distribution, in nats."""
    truncated: bool
    """Whether the question was too long and its end was cut."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**vars(self), "probabilities": dict(self.probabilities)}


class Classifier:
    """A qcat GGUF, ready to answer. Close it, or use it in a `with` statement.

    >>> with Classifier.open("house.gguf") as house:        # doctest: +SKIP
    ...     house.ask("When was the pool pump replaced?").label
    'pool'
    """

    def __init__(
        self,
        bundle: Bundle,
        model: LlamaModel,
        scorer: LlamaScorer,
        trie: LabelTrie,
        prompt: Prompt,
        *,
        threshold: float,
        strict: bool,
    ) -> None:
        self.task = bundle.task
        self.threshold = threshold
        self.strict = strict
        self._path = bundle.path
        self._labels = tuple(bundle.task.labels)
        self._model, self._scorer, self._trie, self._prompt = model, scorer, trie, prompt

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        threshold: float = 0.0,
        strict: bool = False,
        threads: int | None = None,
        verbose: bool = False,
    ) -> Self:
        """Load a GGUF made by `qcat export` and evaluate its prompt once.

        Args:
            model: path of the GGUF file; it needs no other file. None is the model that comes
                with qcat, for questions about a house (`DEFAULT_MODEL`).
            threshold: confidence under which a prediction is marked `abstained`, from 0 to 1.
            strict: refuse a question that is too long instead of cutting its end.
            threads: of computation; by default the physical cores this process may use.
            verbose: let llama.cpp write its log to stderr.

        Raises:
            BundleError: the file is absent, damaged, or no qcat GGUF.
            ModelError: llama.cpp cannot load it, or its vocabulary cannot spell the labels.
            ValueError: a threshold or number of threads that makes no sense.
        """
        if not 0 <= threshold <= 1 or (threads is not None and threads < 1):
            raise ValueError("threshold from 0 to 1 and at least one thread expected")
        bundle = Bundle.read(Path(model) if model is not None else DEFAULT_MODEL)
        from qcat.backends.llama import LlamaModel, LlamaScorer, default_threads

        with ExitStack() as stack:
            loaded = stack.enter_context(LlamaModel(bundle.path, verbose=verbose))
            prompt, trie = prepare(bundle, loaded)
            scorer = LlamaScorer(
                loaded,
                prefix=encode_segments(prompt.prefix, loaded),
                trie=trie,
                grammar=grammar(bundle.task),
                room=QUESTION_ROOM,
                threads=threads or default_threads(),
            )
            stack.pop_all()
        return cls(bundle, loaded, scorer, trie, prompt, threshold=threshold, strict=strict)

    def ask(self, question: str) -> Prediction:
        """Classify one question.

        Raises:
            QuestionError: the question is empty, or too long under `strict`.
        """
        rest, truncated = self._encode(question)
        return self._predict(next(self._scorer.score([rest])), truncated)

    def ask_many(self, questions: Iterable[str]) -> Iterator[Prediction]:
        """Classify many questions, in order, several in one forward pass.

        Reads the questions as it goes, a few dozen ahead. Another batch shape gives slightly
        other logits, so a probability may differ from `ask`'s in the third digit.

        Raises:
            QuestionError: for the first question that cannot be asked, naming its number, when
                its turn comes; the answers before it have been given by then.
        """
        for number, answer in enumerate(self.ask_each(questions), 1):
            if isinstance(answer, QuestionError):
                raise QuestionError(f"question {number}: {answer}")
            yield answer

    def ask_each(self, questions: Iterable[str]) -> Iterator[Prediction | QuestionError]:
        """As `ask_many`, but a question that cannot be asked gives its error in its place."""
        source = iter(questions)
        while window := list(islice(source, _WINDOW)):
            encoded = [self._encode_or_error(question) for question in window]
            scores = self._scorer.score([e[0] for e in encoded if not isinstance(e, QuestionError)])
            for entry in encoded:
                if isinstance(entry, QuestionError):
                    yield entry
                else:
                    yield self._predict(next(scores), entry[1])

    def _encode_or_error(self, question: str) -> tuple[list[int], bool] | QuestionError:
        try:
            return self._encode(question)
        except QuestionError as error:
            return error

    def say(self, question: str, limit: int = 16) -> str:
        """What the model would answer without any constraint, for comparison.

        Args:
            question: as in `ask`.
            limit: the most tokens to generate.
        """
        return self._scorer.generate(self._encode(question)[0], limit)

    def close(self) -> None:
        """Free the model. Harmless a second time."""
        self._scorer.close()
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, question: str) -> tuple[list[int], bool]:
        """Token ids after the prefix, and whether the question's end was cut to make them fit."""
        words = " ".join(question.split())
        text = clean_question(words[:_MAX_CHARS])
        ids = encode_segments(self._prompt.rest(text), self._model)
        if len(ids) <= QUESTION_ROOM and len(words) <= _MAX_CHARS:
            return ids, False
        if self.strict:
            raise QuestionError(
                f"the question is too long: {len(ids)} tokens, room for {QUESTION_ROOM}: shorten it"
            )
        pieces = [self._model.piece(token) for token in ids[:QUESTION_ROOM]]
        while len(ids) > QUESTION_ROOM and pieces:
            # What is left is spelled anew, which may take another number of tokens.
            pieces.pop()
            kept = b"".join(pieces).decode("utf-8", "ignore").removeprefix(self._prompt.before)
            ids = encode_segments(self._prompt.rest(kept.rstrip()), self._model)
        return ids, True

    def _predict(self, scores: Scores, truncated: bool) -> Prediction:
        probabilities = np.exp(label_log_probabilities(self._trie, scores.logits))
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        # The grammar is the authority: a label that it would not accept cannot come out.
        best = next((int(i) for i in order if self._scorer.accepts(int(i))), None)
        if best is None:
            raise ModelError(f"{self._path}: its grammar accepts no label: export it again")
        confidence = float(probabilities[best])
        return Prediction(
            label=self._labels[best],
            confidence=confidence,
            abstained=confidence < self.threshold,
            probabilities={self._labels[i]: float(probabilities[i]) for i in order},
            label_mass=scores.mass,
            margin=margin(probabilities),
            entropy=entropy(probabilities),
            truncated=truncated,
        )


def prepare(bundle: Bundle, model: LlamaModel) -> tuple[Prompt, LabelTrie]:
    """The prompt and label trie of a bundle in its own vocabulary, checked.

    Raises:
        ModelError: a label that the vocabulary cannot spell, or a prompt that cannot be shared.
    """
    prompt = build_prompt(bundle.task, model)
    check_boundary(prompt, model)
    sequences = encode_answers(bundle.task, model)
    for answer, sequence in zip(bundle.task.answers, sequences, strict=True):
        if model.decode(sequence) != f" {answer}":
            raise ModelError(
                f"{bundle.path}: its vocabulary cannot spell the label {answer!r}: rename it"
            )
    return prompt, LabelTrie.build(sequences, model.end)
