"""`Classifier`: questions in, `Prediction`s out. The public interface of qcat.

Independent of the command line. llama.cpp is loaded when a model is opened, not on import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np

from qcat.base.ollama_store import PREFIX
from qcat.calibration.calibration import Calibration
from qcat.calibration.decide import OWN_RULE, check_coverage
from qcat.encoding.prompt import QUESTION_ROOM, clean_question
from qcat.encoding.scoring import Floats
from qcat.errors import ArgumentError, QuestionError, ServerError
from qcat.judge import Judge
from qcat.opening import Opened, open_file, open_served
from qcat.prediction import Prediction
from qcat.task import Task
from qcat.threads import MAX_THREADS

DEFAULT_MODEL = Path(__file__).parent / "models" / "household.gguf"
"""The model that comes with qcat."""
_MAX_CHARS = 20_000  # of a question, before it is tokenized to see how much of it fits
OLLAMA = PREFIX
"""Prefix of the name of a model on an Ollama server."""
WINDOW = 64
"""Number of questions that `ask_many` and `ask_each` process at once. They share forward passes
only with each other."""


class Classifier:
    """A qcat model, ready to answer. Close it, or use it in a `with` statement.

    >>> with Classifier.open() as house:  # the example model; else "house.gguf"
    ...     house.ask("When was the pool pump replaced?").answer
    'pool'
    """

    def __init__(
        self,
        opened: Opened,
        *,
        name: str,
        resources: ExitStack,
        calibration: Calibration,
        coverage: float | None,
        strict: bool,
        rule: str,
    ) -> None:
        self.task, among = opened.encoded.task, opened.among
        if among is not None:
            known = tuple(self.task.labels)
            self.task = self.task.only([known[number] for number in among])
        self.trained = opened.trained
        """Whether the model was trained on these labels, or on a task that has them and others."""
        self.calibration = calibration
        self.coverage = coverage
        self.strict = strict
        self.identity = opened.identity
        """Identifies the model in the log."""
        self.rule = rule
        """Identifies in the log what decides whether it abstains: its own thresholds, or others."""
        self.name = name
        """The name it was opened by: a path, or `ollama:NAME`."""
        self._resources = resources
        self.labels = tuple(self.task.labels)
        """In the order of the task."""
        self._encoded, self._vocabulary = opened.encoded, opened.vocabulary
        self._scorer = opened.scorer
        self._judge = Judge(
            name=name,
            labels=self.labels,
            among=among if among is not None else tuple(range(len(self.labels))),
            trie=opened.encoded.trie,
            calibration=calibration,
            coverage=coverage,
            accepts=opened.scorer.accepts,
        )

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        task: Task | None = None,
        adapter: str | os.PathLike[str] | None = None,
        threshold: float | None = None,
        coverage: float | None = None,
        calibrated: bool = True,
        strict: bool = False,
        threads: int | None = None,
        quick_start: bool = False,
        timeout: float | None = None,
        verbose: bool = False,
    ) -> Self:
        """Load a GGUF made by `qcat export` and evaluate its prompt once, or find it on a server.

        Args:
            model: path of the GGUF file; no other file is needed. None opens the model that comes
                with qcat, for questions about a house (`DEFAULT_MODEL`). `ollama:NAME` is a model
                made by `qcat deploy` on the Ollama server at OLLAMA_HOST. For an adapter file
                (`qcat export --beside`), the base is loaded from its location at export.
            task: what to answer, instead of the task stored in the model. If the model was trained
                on these labels, perhaps with others, it answers among these; otherwise, or if
                descriptions or instruction differ from the training's, it answers without training
                (`trained`), with raw probabilities. `model` may then be any GGUF of a generative
                model, whose own chat template is used. Not for a server.
            adapter: an adapter file, with `model` as its base: a GGUF, or a model on an Ollama
                server that combines both. Without `model`, the same as passing the adapter file as
                `model`. A file that several classifiers of a process have open is in memory once.
            threshold: confidence from 0 to 1 below which a prediction is marked `abstained`, for
                all labels; with 0 the model never abstains, not even on off-topic questions. By
                default the threshold that `qcat calibrate` stored in the model.
            coverage: give each prediction a `prediction_set` that contains the right label with
                this probability, and mark it `abstained` unless the set has exactly one label.
                Cannot be combined with a threshold.
            calibrated: use the calibration stored in the model; otherwise raw probabilities.
            strict: reject a question that is too long instead of cutting its end.
            threads: number of threads, 512 at most; by default $QCAT_THREADS, or the physical cores
                that this process may use (`qcat.threads`). Not for a server, which has its own.
            quick_start: use the weights as they are stored in the file: the model loads faster, but
                each question takes somewhat longer. Useful for a handful of questions.
            timeout: seconds to wait for a server's response, 60 by default. Not for a file.
            verbose: let llama.cpp write its log to stderr.

        Raises:
            BundleError: the file is absent, damaged, or not a qcat GGUF; or its calibration does
                not allow the coverage.
            ModelError: llama.cpp cannot load it, or its vocabulary cannot spell the labels.
            ServerError: the server does not answer, or has no such model made by qcat.
            ArgumentError: an argument is invalid.
        """
        served = isinstance(model, str) and model.startswith(OLLAMA)
        _check_arguments(served, task, threshold, coverage, threads, timeout)
        if model is None:  # an adapter by itself knows its base
            model, adapter = adapter or DEFAULT_MODEL, None
        name = os.fspath(model)
        with ExitStack() as stack:
            if served:
                own = None if adapter is None else Path(adapter)
                opened = open_served(
                    name.removeprefix(OLLAMA),
                    own,
                    calibrated=calibrated,
                    timeout=timeout,
                    verbose=verbose,
                    stack=stack,
                )
            else:
                base = None if adapter is None else Path(name)
                file = Path(name if adapter is None else adapter)
                opened = open_file(
                    file,
                    base,
                    task=task,
                    calibrated=calibrated,
                    threads=threads,
                    quick_start=quick_start,
                    verbose=verbose,
                    stack=stack,
                )
            calibration = opened.calibration
            rule = OWN_RULE if calibrated else "uncalibrated"
            if threshold is not None:
                calibration, rule = calibration.with_threshold(threshold), f"threshold {threshold}"
            if coverage is not None:
                _check_sets(opened, coverage, name)
                rule = f"coverage {coverage}"
            return cls(
                opened,
                name=name,
                resources=stack.pop_all(),
                calibration=calibration,
                coverage=coverage,
                strict=strict,
                rule=rule,
            )

    def ask(self, question: str) -> Prediction:
        """Classify one question.

        Raises:
            QuestionError: the question is empty or not text, or too long under `strict`; or it
                contains the text of a special token, which a server would interpret.
            ServerError: the server does not answer.
        """
        rest, truncated = self._encode(question)
        return self._judge.predict(next(self._scorer.score([rest])), truncated)

    def ask_many(self, questions: Iterable[str]) -> Iterator[Prediction]:
        """Classify many questions, in order, several in one forward pass.

        Questions are read lazily, a few dozen ahead. A different batch shape gives slightly
        different logits, so a probability may differ from that of `ask`: by 0.01 at most on 5,431
        questions (docs/speed.md), and no label changed.

        Raises:
            QuestionError: for the first question that cannot be asked, with its number. It is
                raised when that question is reached, after all earlier answers.
            ServerError: likewise for the first question that the server does not answer, so
                that the caller can continue from there.
            ArgumentError: immediately, if given one text instead of several.
        """
        return self._ask_many(self.ask_each(questions))

    def _ask_many(self, answers: Iterator[Prediction | QuestionError]) -> Iterator[Prediction]:
        number = 1
        try:
            for answer in answers:
                if isinstance(answer, QuestionError):
                    raise QuestionError(f"question {number}: {answer}")
                yield answer
                number += 1
        except ServerError as error:
            raise ServerError(f"question {number}: {error}") from None

    def ask_each(self, questions: Iterable[str]) -> Iterator[Prediction | QuestionError]:
        """Like `ask_many`, but yields the error of a question that cannot be asked in its place."""
        if isinstance(questions, str | bytes):
            raise ArgumentError("a list of questions expected, not one: give [question]")
        return self._ask_each(iter(questions))

    def _ask_each(self, source: Iterator[str]) -> Iterator[Prediction | QuestionError]:
        while window := list(islice(source, WINDOW)):
            encoded = [self._encode_or_error(question) for question in window]
            scores = self._scorer.score([e[0] for e in encoded if not isinstance(e, QuestionError)])
            for entry in encoded:
                if isinstance(entry, QuestionError):
                    yield entry
                else:
                    yield self._judge.predict(next(scores), entry[1])

    def predict(self, texts: Iterable[str]) -> list[str]:
        """The most probable label of each text, as scikit-learn's classifiers return it.

        This never abstains; use `ask_many` for answers that may.

        Raises:
            QuestionError, ServerError, ArgumentError: as `ask_many`.
        """
        return [prediction.label for prediction in self.ask_many(texts)]

    def predict_proba(self, texts: Iterable[str]) -> Floats:
        """Probabilities of the labels, shape (texts, labels), columns in the order of `labels`.

        Raises:
            QuestionError, ArgumentError: as `ask_many`.
            ServerError: likewise; or the server does not return all probabilities.
        """
        rows = []
        for number, prediction in enumerate(self.ask_many(texts), 1):
            if not prediction.exact:
                raise ServerError(
                    f"text {number}: {self.name} does not show the probabilities of all labels: "
                    "open the model's GGUF instead"
                )
            rows.append([prediction.probabilities[label] for label in self.labels])
        return np.array(rows, np.float64).reshape(len(rows), len(self.labels))

    def _encode_or_error(self, question: str) -> tuple[list[int], bool] | QuestionError:
        try:
            return self._encode(question)
        except QuestionError as error:
            return error

    def say(self, question: str, limit: int = 16) -> str:
        """The model's answer without any constraint, for comparison.

        Args:
            question: as in `ask`.
            limit: the most tokens to generate; a GGUF opened from a file generates 64 at most.
        """
        return self._scorer.generate(self._encode(question)[0], limit)

    def count_tokens(self, question: str) -> int:
        """Number of tokens evaluated for a question: its own and those of the words after it.

        Raises:
            QuestionError: as `ask`.
        """
        return len(self._encode(question)[0])

    def close(self) -> None:
        """Free the model, or disconnect from the server. May be called more than once."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, question: str) -> tuple[list[int], bool]:
        """Token ids after the prefix, and whether the question was cut at the end to fit."""
        if not isinstance(question, str):  # such as the NaN of a missing value in pandas
            if question is None:
                raise QuestionError("the question is empty: write one")
            raise QuestionError(f"no text but {type(question).__name__}: write words")
        words = " ".join(question.split())
        text = clean_question(words[:_MAX_CHARS])
        ids, truncated = self._encoded.ids(text), False
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
            # The rest is tokenized again, which may give a different number of tokens.
            pieces.pop()
            kept = (
                b"".join(pieces).decode("utf-8", "ignore").removeprefix(self._encoded.prompt.before)
            )
            ids = self._encoded.ids(kept.rstrip())
        return ids


def _check_sets(opened: Opened, coverage: float, name: str) -> None:
    """Assert that an open model can give prediction sets. Raises ArgumentError, BundleError."""
    if not opened.trained:
        raise ArgumentError(
            "coverage expected for a task that the model was trained on: without training nothing "
            "is known of its errors"
        )
    check_coverage(opened.calibration, coverage, name)


def _check_arguments(
    served: bool,
    task: Task | None,
    threshold: float | None,
    coverage: float | None,
    threads: int | None,
    timeout: float | None,
) -> None:
    """Those of `Classifier.open`. Raises ArgumentError: one that makes no sense."""
    if not 0 <= (threshold or 0) <= 1:
        raise ArgumentError("threshold from 0 to 1 expected")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ArgumentError(f"threads from 1 to {MAX_THREADS} expected")
    if coverage is not None and (threshold is not None or not 0 < coverage < 1):
        raise ArgumentError("coverage between 0 and 1 expected, and no threshold with it")
    if task is not None and not isinstance(task, Task):
        raise ArgumentError(f"a qcat.Task expected, not {type(task).__name__}: use Task.read(path)")
    if served and task is not None:
        raise ArgumentError("a task expected for a file only: a model on a server has its own")
    if served and threads is not None:
        raise ArgumentError("threads are the server's own affair")
    if timeout is not None and not (served and 0 < timeout < float("inf")):
        raise ArgumentError("timeout expected for an Ollama model only, in seconds, more than 0")
