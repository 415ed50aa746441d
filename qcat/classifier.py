"""`Classifier`: questions in, `Prediction`s out. The public face of qcat.

Knows nothing of the command line. llama.cpp is loaded when a model is opened, not on import.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from qcat.bundle import TASK_KEY, Bundle, identity
from qcat.errors import BundleError, DataError, ModelError, QuestionError, ServerError
from qcat.grammar import grammar
from qcat.prediction import Prediction, Reason
from qcat.prompt import (
    QUESTION_ROOM,
    Prompt,
    Vocabulary,
    build_prompt,
    check_boundary,
    clean_question,
    encode_answers,
    encode_segments,
)
from qcat.scoring import (
    BoundedScores,
    Floats,
    Scores,
    entropy,
    label_log_probabilities,
    margin,
)
from qcat.task import Task
from qcat.trie import LabelTrie
from qcat.trust.log import PredictionLog
from qcat.vocabulary import write_vocabulary

DEFAULT_MODEL = Path(__file__).parent / "models" / "household.gguf"
"""The model that comes with qcat."""
_MAX_CHARS = 20_000  # of a question, before it is tokenized to see how much of it fits
OLLAMA = "ollama:"
"""How the name of a model on an Ollama server begins."""
_WINDOW = 64  # questions tokenized ahead by ask_many


class Scorer(Protocol):
    """A backend: questions as token ids after the prompt's prefix to what the model thinks."""

    def score(self, rests: Sequence[Sequence[int]]) -> Iterator[Scores | BoundedScores]: ...
    def accepts(self, label: int) -> bool: ...
    def spells(self, ids: Sequence[int]) -> bool: ...
    def generate(self, rest: Sequence[int], limit: int) -> str: ...


class Classifier:
    """A qcat model, ready to answer. Close it, or use it in a `with` statement.

    >>> with Classifier.open("house.gguf") as house:        # doctest: +SKIP
    ...     house.ask("When was the pool pump replaced?").label
    'pool'
    """

    def __init__(
        self,
        task: Task,
        vocabulary: Vocabulary,
        scorer: Scorer,
        trie: LabelTrie,
        prompt: Prompt,
        identity: str,
        *,
        name: str,
        resources: ExitStack,
        threshold: float,
        strict: bool,
        log: PredictionLog | None,
    ) -> None:
        self.task = task
        self.identity = identity
        self.threshold = threshold
        self.strict = strict
        self.log_error: DataError | None = None
        """Why the last answer is not in the log; None if it is, or if there is no log."""
        self._log = log
        self._name, self._resources = name, resources
        self._labels = tuple(task.labels)
        self._vocabulary, self._scorer, self._trie, self._prompt = vocabulary, scorer, trie, prompt

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        threshold: float = 0.0,
        strict: bool = False,
        threads: int | None = None,
        timeout: float | None = None,
        log: str | os.PathLike[str] | None = None,
        log_text: bool = False,
        verbose: bool = False,
    ) -> Self:
        """Load a GGUF made by `qcat export` and evaluate its prompt once, or find it on a server.

        Args:
            model: path of the GGUF file; it needs no other file. None is the model that comes
                with qcat, for questions about a house (`DEFAULT_MODEL`). `ollama:NAME` is a model
                on the Ollama server that OLLAMA_HOST names, made by `qcat deploy`.
            threshold: confidence under which a prediction is marked `abstained`, from 0 to 1.
            strict: refuse a question that is too long instead of cutting its end.
            threads: of computation; by default the physical cores this process may use. Not for
                a server, which has its own.
            timeout: seconds that a server may keep silent, 60 by default. Not for a file.
            log: file to append each answer to, for `qcat drift`. An answer that cannot be logged
                comes out all the same, with a warning, and `log_error` says why.
            log_text: log the questions too.
            verbose: let llama.cpp write its log to stderr.

        Raises:
            BundleError: the file is absent, damaged, or no qcat GGUF.
            ModelError: llama.cpp cannot load it, or its vocabulary cannot spell the labels.
            ServerError: the server does not answer, or has no such model made by qcat.
            DataError: the log cannot be opened.
            ValueError: an argument that makes no sense.
        """
        served = isinstance(model, str) and model.startswith(OLLAMA)
        if not 0 <= threshold <= 1 or (threads is not None and threads < 1):
            raise ValueError("threshold from 0 to 1 and at least one thread expected")
        if served and threads is not None:
            raise ValueError("threads are the server's own affair")
        if timeout is not None and not (served and 0 < timeout < float("inf")):
            raise ValueError("timeout expected for an Ollama model only, in seconds, more than 0")
        name = os.fspath(DEFAULT_MODEL if model is None else model)
        with ExitStack() as stack:
            if served:
                parts = _open_ollama(name.removeprefix(OLLAMA), timeout, verbose, stack)
            else:
                parts = _open_file(Path(name), threads, verbose, stack)
            kept = None
            if log is not None:
                kept = PredictionLog(log, model=parts[-1], threshold=threshold, text=log_text)
                stack.callback(kept.close)
            resources = stack.pop_all()
        return cls(
            *parts, name=name, resources=resources, threshold=threshold, strict=strict, log=kept
        )

    def ask(self, question: str) -> Prediction:
        """Classify one question.

        Raises:
            QuestionError: the question is empty, or too long under `strict`; or it holds the text
                of a special token, which a server would obey.
            ServerError: the server does not answer.
        """
        rest, truncated = self._encode(question)
        prediction = self._predict(next(self._scorer.score([rest])), truncated)
        self._keep(question, prediction)
        return prediction

    def ask_many(self, questions: Iterable[str]) -> Iterator[Prediction]:
        """Classify many questions, in order, several in one forward pass.

        Reads the questions as it goes, a few dozen ahead. Another batch shape gives slightly
        other logits, so a probability may differ from `ask`'s in the third digit.

        Raises:
            QuestionError: for the first question that cannot be asked, naming its number, when
                its turn comes; the answers before it have been given by then.
            ServerError: likewise for the first question that the server does not answer, so
                that the caller can go on from there.
        """
        number = 1
        try:
            for answer in self.ask_each(questions):
                if isinstance(answer, QuestionError):
                    raise QuestionError(f"question {number}: {answer}")
                yield answer
                number += 1
        except ServerError as error:
            raise ServerError(f"question {number}: {error}") from None

    def ask_each(self, questions: Iterable[str]) -> Iterator[Prediction | QuestionError]:
        """As `ask_many`, but a question that cannot be asked gives its error in its place."""
        source = iter(questions)
        while window := list(islice(source, _WINDOW)):
            encoded = [self._encode_or_error(question) for question in window]
            scores = self._scorer.score([e[0] for e in encoded if not isinstance(e, QuestionError)])
            for question, entry in zip(window, encoded, strict=True):
                if isinstance(entry, QuestionError):
                    yield entry
                else:
                    prediction = self._predict(next(scores), entry[1])
                    self._keep(question, prediction)
                    yield prediction

    def _keep(self, question: str, prediction: Prediction) -> None:
        """Log an answer; one that cannot be logged is still an answer."""
        if self._log is None:
            return
        try:
            self._log.add(question, prediction)
            self.log_error = None
        except DataError as error:
            self.log_error = error
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)

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
        """Free the model, or leave the server. Harmless a second time."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, question: str) -> tuple[list[int], bool]:
        """Token ids after the prefix, and whether the question's end was cut to make them fit."""
        words = " ".join(question.split())
        text = clean_question(words[:_MAX_CHARS])
        ids, truncated = encode_segments(self._prompt.rest(text), self._vocabulary), False
        if len(ids) > QUESTION_ROOM or len(words) > _MAX_CHARS:
            if self.strict:
                raise QuestionError(
                    f"the question is too long: {len(ids)} tokens, room for {QUESTION_ROOM}: "
                    "shorten it"
                )
            ids, truncated = self._cut(ids), True
        if not self._scorer.spells(ids):
            raise QuestionError(
                "the question holds the text of a special token, which Ollama would obey: "
                "take it out"
            )
        return ids, truncated

    def _cut(self, ids: list[int]) -> list[int]:
        pieces = [self._vocabulary.piece(token) for token in ids[:QUESTION_ROOM]]
        while len(ids) > QUESTION_ROOM and pieces:
            # What is left is spelled anew, which may take another number of tokens.
            pieces.pop()
            kept = b"".join(pieces).decode("utf-8", "ignore").removeprefix(self._prompt.before)
            ids = encode_segments(self._prompt.rest(kept.rstrip()), self._vocabulary)
        return ids

    def _predict(self, scores: Scores | BoundedScores, truncated: bool) -> Prediction:
        if isinstance(scores, BoundedScores):
            return self._predict_bounded(scores, truncated)
        probabilities = np.exp(label_log_probabilities(self._trie, scores.logits))
        probabilities /= probabilities.sum()
        # The grammar is the authority: a label that it would not accept cannot come out.
        order = np.argsort(-probabilities, kind="stable")
        best = next((int(i) for i in order if self._scorer.accepts(int(i))), None)
        if best is None:
            raise ModelError(f"{self._name}: its grammar accepts no label: export it again")
        confidence, ahead = float(probabilities[best]), margin(probabilities)
        reason = self._reason(confidence, ahead)
        return Prediction(
            label=self._labels[best],
            confidence=confidence,
            abstained=reason is not None,
            reason=reason,
            probabilities=self._by_label(probabilities, best),
            exact=True,
            label_mass=scores.mass,
            margin=ahead,
            entropy=entropy(probabilities),
            truncated=truncated,
        )

    def _predict_bounded(self, scores: BoundedScores, truncated: bool) -> Prediction:
        best = scores.label
        if not self._scorer.accepts(best):
            raise ModelError(f"{self._name}: gave an answer that is no label: ask again")
        if not len(scores.lower):
            return Prediction(
                label=self._labels[best],
                confidence=None,
                abstained=self.threshold > 0,
                reason="low_confidence" if self.threshold > 0 else None,
                probabilities={},
                exact=False,
                label_mass=None,
                margin=None,
                entropy=None,
                truncated=truncated,
            )
        unseen = scores.lower < scores.upper
        confidence = float(scores.lower[best])
        shown = np.where(scores.lower > 0, scores.lower, scores.upper)
        spread = entropy(shown / max(shown.sum(), np.finfo(np.float64).tiny))
        shown[best] = confidence
        ahead = max(0.0, confidence - float(np.delete(scores.upper, best).max()))
        reason = self._reason(confidence, ahead)
        return Prediction(
            label=self._labels[best],
            confidence=confidence,
            abstained=reason is not None,
            reason=reason,
            probabilities=self._by_label(shown, best),
            exact=not unseen.any(),
            label_mass=scores.mass,
            margin=ahead,
            entropy=spread,
            truncated=truncated,
        )

    def _reason(self, confidence: float, ahead: float) -> Reason | None:
        """Why the question is left to a person, if it is."""
        if confidence >= self.threshold:
            return None
        second = confidence - ahead
        return "ambiguous" if confidence + second >= self.threshold else "low_confidence"

    def _by_label(self, probabilities: Floats, best: int) -> dict[str, float]:
        order = np.argsort(-probabilities, kind="stable").tolist()
        order.remove(best)  # a bound can be more than what the best label is sure to have
        return {self._labels[i]: float(probabilities[i]) for i in (best, *order)}


_Parts = tuple[Task, Vocabulary, Scorer, LabelTrie, Prompt, str]


def _open_file(path: Path, threads: int | None, verbose: bool, stack: ExitStack) -> _Parts:
    bundle = Bundle.read(path)
    from qcat.backends.llama import LlamaModel, LlamaScorer, default_threads

    model = stack.enter_context(LlamaModel(bundle.path, verbose=verbose))
    prompt, trie = prepare(bundle.task, model, str(path))
    scorer = LlamaScorer(
        model,
        prefix=encode_segments(prompt.prefix, model),
        trie=trie,
        grammar=grammar(bundle.task),
        room=QUESTION_ROOM,
        threads=threads or default_threads(),
    )
    stack.callback(scorer.close)
    return bundle.task, model, scorer, trie, prompt, identity(bundle.header.metadata)


def _open_ollama(name: str, timeout: float | None, verbose: bool, stack: ExitStack) -> _Parts:
    from qcat.backends.llama import LlamaModel
    from qcat.backends.ollama import TIMEOUT, Server
    from qcat.backends.ollama_scorer import OllamaScorer

    server = Server(timeout or TIMEOUT)
    stack.callback(server.close)
    said = server.show(name, verbose=True)
    if said is None:
        server.check()
        raise server.absent(name)
    metadata = said.get("model_info")
    if not isinstance(metadata, dict) or TASK_KEY not in metadata:
        raise ServerError(
            f"{name} on {server.address}: not made by qcat: make one with `qcat deploy DIR`"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="qcat-") as folder:
            path = Path(folder, "vocabulary.gguf")
            write_vocabulary(path, metadata)
            task = Bundle.read(path).task
            vocabulary = stack.enter_context(LlamaModel(path, vocab_only=True, verbose=verbose))
    except (BundleError, ModelError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ServerError(f"{name} on {server.address}: {reason}") from None
    except OSError as error:
        raise ModelError(f"{tempfile.gettempdir()}: {error.strerror}: set TMPDIR") from None
    vocabulary.path = Path(f"{OLLAMA}{name}")  # for messages: the file is gone
    prompt, trie = prepare(task, vocabulary, name)
    scorer = OllamaScorer(
        server,
        name,
        vocabulary=vocabulary,
        prefix=encode_segments(prompt.prefix, vocabulary),
        trie=trie,
        answers=task.answers,
        spellings=metadata["tokenizer.ggml.tokens"],
    )
    stack.callback(scorer.close)
    return task, vocabulary, scorer, trie, prompt, identity(metadata)


def prepare(task: Task, vocabulary: Vocabulary, name: str) -> tuple[Prompt, LabelTrie]:
    """The prompt and label trie of a task in a model's own vocabulary, checked.

    Args:
        task: the task.
        vocabulary: the model's.
        name: the model's, for messages.

    Raises:
        ModelError: a label that the vocabulary cannot spell, or a prompt that cannot be shared.
    """
    prompt = build_prompt(task, vocabulary)
    check_boundary(prompt, vocabulary)
    sequences = encode_answers(task, vocabulary)
    for answer, sequence in zip(task.answers, sequences, strict=True):
        if vocabulary.decode(sequence) != f" {answer}":
            raise ModelError(f"{name}: its vocabulary cannot spell the label {answer!r}: rename it")
    return prompt, LabelTrie.build(sequences, vocabulary.end)
