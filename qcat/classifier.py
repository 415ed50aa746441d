"""`Classifier`: questions in, `Prediction`s out. The public face of qcat.

Knows nothing of the command line. llama.cpp is loaded when a model is opened, not on import.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

import numpy as np

from qcat.bundle import (
    CALIBRATION_KEY,
    TASK_KEY,
    Bundle,
    fingerprint,
    identity,
    is_adapter,
    section,
)
from qcat.errors import (
    BundleError,
    DataError,
    ModelError,
    QuestionError,
    ReviewError,
    ServerError,
)
from qcat.grammar import grammar
from qcat.ollama_store import PREFIX
from qcat.prediction import Prediction
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
    label_log_probabilities,
    temper,
    temper_bounds,
)
from qcat.task import Task
from qcat.threads import MAX_THREADS, default_threads
from qcat.trie import LabelTrie
from qcat.trust.calibration import Calibration
from qcat.trust.decide import check_coverage, decide
from qcat.trust.log import OWN_RULE, PredictionLog
from qcat.vocabulary import write_vocabulary

if TYPE_CHECKING:
    from qcat.trust.review import ReviewQueue

DEFAULT_MODEL = Path(__file__).parent / "models" / "household.gguf"
"""The model that comes with qcat."""
_MAX_CHARS = 20_000  # of a question, before it is tokenized to see how much of it fits
OLLAMA = PREFIX
"""How the name of a model on an Ollama server begins."""
WINDOW = 64
"""Questions that `ask_many` and `ask_each` take at once: they share forward passes with each other,
and with no others."""


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
        parts: _Parts,
        *,
        name: str,
        resources: ExitStack,
        calibration: Calibration,
        coverage: float | None,
        strict: bool,
        review: ReviewQueue | None,
        log: PredictionLog | None,
    ) -> None:
        self.task = parts.task
        self.calibration = calibration
        self.coverage = coverage
        self.strict = strict
        self.identity = parts.identity
        """Which model this is, as the log names it."""
        self.log_error: DataError | None = None
        """Why the last answer is not in the log; None if it is, or if there is no log."""
        self._name, self._resources, self._review, self._log = name, resources, review, log
        self._labels = tuple(parts.task.labels)
        self._vocabulary, self._scorer = parts.vocabulary, parts.scorer
        self._trie, self._prompt = parts.trie, parts.prompt

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        threshold: float | None = None,
        coverage: float | None = None,
        calibrated: bool = True,
        strict: bool = False,
        threads: int | None = None,
        quick_start: bool = False,
        timeout: float | None = None,
        review: str | os.PathLike[str] | Literal[False] | None = None,
        review_hash: bool = False,
        log: str | os.PathLike[str] | None = None,
        log_text: bool = False,
        verbose: bool = False,
    ) -> Self:
        """Load a GGUF made by `qcat export` and evaluate its prompt once, or find it on a server.

        Args:
            model: path of the GGUF file; it needs no other file. None is the model that comes
                with qcat, for questions about a house (`DEFAULT_MODEL`). `ollama:NAME` is a model
                on the Ollama server that OLLAMA_HOST names, made by `qcat deploy`. An adapter's
                file (`qcat export --beside`) brings its base from where it lay at export.
            adapter: an adapter's file, with `model` as its base: the GGUF, or the model on an
                Ollama server that has both. Without `model` it stands for that. A file that
                several classifiers of a process have open is in memory once.
            threshold: confidence under which a prediction is marked `abstained`, from 0 to 1, for
                all labels; 0 for none, nor as off-topic. By default what `qcat calibrate` put
                into the model.
            coverage: give each prediction a `prediction_set` that holds the right label with this
                probability, and mark it `abstained` unless the set has one label. Not with a
                threshold.
            calibrated: use what the model says of its calibration; else its own probabilities.
            strict: refuse a question that is too long instead of cutting its end.
            threads: of computation, 512 at most; by default $QCAT_THREADS, or the physical cores
                that this process may use (`qcat.threads`). Not for a server, which has its own.
            quick_start: leave the weights as they lie in the file: the model is there sooner, and
                each question takes somewhat longer. For a handful of questions.
            timeout: seconds that a server may keep silent, 60 by default. Not for a file.
            review: file of the review queue that questions go to which are left to a person
                (`abstained`). None: as the task says, in the user's data folder; False: none.
            review_hash: keep hashes in the queue and no texts, even if the task would keep them.
            log: file to append each answer to, for `qcat drift`. An answer that cannot be logged
                comes out all the same, with a warning, and `log_error` says why.
            log_text: log the questions too.
            verbose: let llama.cpp write its log to stderr.

        Raises:
            BundleError: the file is absent, damaged, or no qcat GGUF; or its calibration does not
                allow the coverage.
            ModelError: llama.cpp cannot load it, or its vocabulary cannot spell the labels.
            ServerError: the server does not answer, or has no such model made by qcat.
            ReviewError: the review queue cannot be used, or is another task's.
            DataError: the log cannot be opened.
            ValueError: an argument that makes no sense.
        """
        served = isinstance(model, str) and model.startswith(OLLAMA)
        if not 0 <= (threshold or 0) <= 1:
            raise ValueError("threshold from 0 to 1 expected")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads from 1 to {MAX_THREADS} expected")
        if coverage is not None and (threshold is not None or not 0 < coverage < 1):
            raise ValueError("coverage between 0 and 1 expected, and no threshold with it")
        if served and threads is not None:
            raise ValueError("threads are the server's own affair")
        if timeout is not None and not (served and 0 < timeout < float("inf")):
            raise ValueError("timeout expected for an Ollama model only, in seconds, more than 0")
        if model is None:  # an adapter by itself knows its base
            model, adapter = adapter or DEFAULT_MODEL, None
        name = os.fspath(model)
        with ExitStack() as stack:
            if served:
                own = None if adapter is None else Path(adapter)
                parts = _open_ollama(
                    name.removeprefix(OLLAMA), own, calibrated, timeout, verbose, stack
                )
            else:
                base = None if adapter is None else Path(name)
                file = Path(name if adapter is None else adapter)
                parts = _open_file(file, base, calibrated, threads, quick_start, verbose, stack)
            calibration = parts.calibration
            rule = OWN_RULE if calibrated else "uncalibrated"
            if threshold is not None:
                calibration, rule = calibration.with_threshold(threshold), f"threshold {threshold}"
            if coverage is not None:
                check_coverage(calibration, coverage, name)
                rule = f"coverage {coverage}"
            queue = kept = None
            if review is not False and (review is not None or review_hash or parts.task.review):
                from qcat.trust.review import open_for

                queue = stack.enter_context(open_for(parts.task, review, review_hash))
            if log is not None:
                kept = stack.enter_context(
                    PredictionLog(log, model=parts.identity, rule=rule, text=log_text)
                )
            resources = stack.pop_all()
        return cls(
            parts,
            name=name,
            resources=resources,
            calibration=calibration,
            coverage=coverage,
            strict=strict,
            review=queue,
            log=kept,
        )

    def ask(self, question: str) -> Prediction:
        """Classify one question.

        Raises:
            QuestionError: the question is empty, or too long under `strict`; or it holds the text
                of a special token, which a server would obey.
            ServerError: the server does not answer.
            ReviewError: the question is for a person, but the review queue did not take it. The
                error's `prediction` is the answer.
        """
        rest, truncated = self._encode(question)
        prediction = self._predict(next(self._scorer.score([rest])), truncated)
        self._keep(question, prediction)
        self._queue(question, prediction)
        return prediction

    def ask_many(self, questions: Iterable[str]) -> Iterator[Prediction]:
        """Classify many questions, in order, several in one forward pass.

        Reads the questions as it goes, a few dozen ahead. Another batch shape gives slightly
        other logits, so a probability may differ from `ask`'s: by 0.01 at most on 5,431 questions
        (docs/speed.md), with no other label.

        Raises:
            QuestionError: for the first question that cannot be asked, naming its number, when
                its turn comes; the answers before it have been given by then.
            ServerError: likewise for the first question that the server does not answer, so
                that the caller can go on from there.
            ReviewError: the review queue did not take a question; after its answer is given.
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
        except ReviewError as error:
            raise ReviewError(f"question {number - 1}: {error}") from None

    def ask_each(self, questions: Iterable[str]) -> Iterator[Prediction | QuestionError]:
        """As `ask_many`, but a question that cannot be asked gives its error in its place."""
        source = iter(questions)
        while window := list(islice(source, WINDOW)):
            encoded = [self._encode_or_error(question) for question in window]
            scores = self._scorer.score([e[0] for e in encoded if not isinstance(e, QuestionError)])
            for question, entry in zip(window, encoded, strict=True):
                if isinstance(entry, QuestionError):
                    yield entry
                    continue
                prediction = self._predict(next(scores), entry[1])
                self._keep(question, prediction)
                try:
                    self._queue(question, prediction)
                except ReviewError:
                    yield prediction  # the answer first: it is not lost
                    raise
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

    def _queue(self, question: str, prediction: Prediction) -> None:
        """Leave a question to a person, if this is one and there is a queue."""
        if self._review is not None and prediction.abstained:
            try:
                self._review.add(question, prediction)
            except ReviewError as error:
                error.prediction = prediction
                raise

    def _encode_or_error(self, question: str) -> tuple[list[int], bool] | QuestionError:
        try:
            return self._encode(question)
        except QuestionError as error:
            return error

    def say(self, question: str, limit: int = 16) -> str:
        """What the model would answer without any constraint, for comparison.

        Args:
            question: as in `ask`.
            limit: the most tokens to generate. A GGUF opened from a file generates 64 at most.
        """
        return self._scorer.generate(self._encode(question)[0], limit)

    def count_tokens(self, question: str) -> int:
        """Tokens that are evaluated for a question: its own and those of the words after it.

        Raises:
            QuestionError: as `ask`.
        """
        return len(self._encode(question)[0])

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
        logs = label_log_probabilities(self._trie, scores.logits)
        probabilities = temper(logs, self.calibration.temperature)
        # The grammar is the authority: a label that it would not accept cannot come out.
        order = np.argsort(-probabilities, kind="stable")
        best = next((int(i) for i in order if self._scorer.accepts(int(i))), None)
        if best is None:
            raise ModelError(f"{self._name}: its grammar accepts no label: export it again")
        known = (probabilities, probabilities)
        return self._decide(best, known, scores.mass, scores.energy, truncated)

    def _predict_bounded(self, scores: BoundedScores, truncated: bool) -> Prediction:
        best = scores.label
        if not self._scorer.accepts(best):
            raise ModelError(f"{self._name}: gave an answer that is no label: ask again")
        if scores.mass is not None:
            bounds = temper_bounds(scores.lower, scores.upper, self.calibration.temperature)
            return self._decide(best, bounds, scores.mass, None, truncated)
        if self.coverage is not None:
            raise ServerError(
                f"{self._name}: this Ollama gives no probabilities, which sets need: "
                "0.12.11 or later does"
            )
        nothing_known = self.calibration.reason(self._labels[best], 0.0, 0.0, False)
        return Prediction(
            label=self._labels[best],
            confidence=None,
            abstained=nothing_known is not None,
            reason=nothing_known,
            probabilities={},
            exact=False,
            label_mass=None,
            energy=None,
            on_topic=None,
            prediction_set=None,
            margin=None,
            entropy=None,
            truncated=truncated,
        )

    def _decide(
        self,
        best: int,
        bounds: tuple[Floats, Floats],
        mass: float,
        energy: float | None,
        truncated: bool,
    ) -> Prediction:
        return decide(
            self.calibration,
            self._labels,
            best,
            *bounds,
            mass=mass,
            energy=energy,
            truncated=truncated,
            coverage=self.coverage,
        )


class _Parts(NamedTuple):
    """What opening a model gives, wherever it runs."""

    task: Task
    vocabulary: Vocabulary
    scorer: Scorer
    trie: LabelTrie
    prompt: Prompt
    calibration: Calibration
    identity: str


def _open_file(
    path: Path,
    base: Path | None,
    calibrated: bool,
    threads: int | None,
    quick_start: bool,
    verbose: bool,
    stack: ExitStack,
) -> _Parts:
    """Open a model's file, or an adapter's with its base, which is looked for if not named."""
    bundle = Bundle.read(path, remember=True)
    known = fingerprint(bundle.path, bundle.header)
    weights = bundle.path
    if is_adapter(bundle.header):
        from qcat.beside import find_base

        weights, header = find_base(bundle, base)
        known += fingerprint(weights, header)
    elif base is not None:
        raise BundleError(f"{path}: is no adapter: open it by itself")
    from qcat.backends.llama import LlamaScorer, shared_model

    model = stack.enter_context(shared_model(weights, repack=not quick_start, verbose=verbose))
    prompt, trie = prepare(bundle.task, model, str(path))
    scorer = LlamaScorer(
        model,
        prefix=encode_segments(prompt.prefix, model),
        trie=trie,
        grammar=grammar(bundle.task),
        room=QUESTION_ROOM,
        threads=threads or default_threads(),
        fingerprint=known,
        adapter=bundle.path if weights != bundle.path else None,
    )
    stack.callback(scorer.close)
    return _Parts(
        bundle.task,
        model,
        scorer,
        trie,
        prompt,
        read_calibration(bundle) if calibrated else Calibration(),
        identity(bundle.header.metadata),
    )


def _open_ollama(
    name: str,
    adapter: Path | None,
    calibrated: bool,
    timeout: float | None,
    verbose: bool,
    stack: ExitStack,
) -> _Parts:
    import tempfile

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
    if adapter is not None and isinstance(metadata, dict):
        # The server tells of the base alone.
        own = Bundle.read(adapter).header.metadata
        metadata |= {key: value for key, value in own.items() if key.startswith("qcat.")}
    if not isinstance(metadata, dict) or TASK_KEY not in metadata:
        raise ServerError(
            f"{name} on {server.address}: not made by qcat: make one with `qcat deploy DIR`"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="qcat-") as folder:
            path = Path(folder, "vocabulary.gguf")
            write_vocabulary(path, metadata)
            bundle = Bundle.read(path)
            task = bundle.task
            calibration = read_calibration(bundle) if calibrated else Calibration()
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
    # Of its own: probabilities that are bounds are not to be compared with exact ones.
    said_by = f"{identity(metadata)}-ollama"
    return _Parts(task, vocabulary, scorer, trie, prompt, calibration, said_by)


def read_calibration(bundle: Bundle) -> Calibration:
    """What a bundle says of its calibration.

    Raises:
        BundleError: something that qcat does not write.
    """
    data = section(bundle.header, CALIBRATION_KEY, bundle.path)
    try:
        return Calibration.from_dict(data, tuple(bundle.task.labels))
    except ValueError as error:
        raise BundleError(
            f"{bundle.path}: metadata {CALIBRATION_KEY} {error}: run `qcat calibrate` again"
        ) from None


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
