"""Scores from an Ollama server: bounds of label probabilities from its best twenty tokens.

Prompts are sent raw, as qcat builds them; the model's TEMPLATE, which `ollama run` uses, is not
used here. The form of the server's answers was taken from its sources (llm/llama_server.go, and
llama.cpp's tools/server/server-context.cpp) and checked on 0.32.15.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from qcat.backends.ollama import STRANGER, Server
from qcat.encoding.prompt import Vocabulary
from qcat.encoding.scoring import BoundedScores, contenders, label_bounds, share_bounds
from qcat.encoding.trie import Branch, LabelTrie
from qcat.errors import ServerError

TOP_LOGPROBS = 20
"""The largest number that Ollama returns."""
_PARALLEL = 4  # requests in flight: the server queues what it does not run at once
_WALK = 1e-3  # a branch through which fewer answers than this can pass is not examined
_ROUNDING = 1e-5  # possible error of the server's float32 sum over the vocabulary


class _Seen(NamedTuple):
    """The server's result for one position."""

    known: Mapping[str, float]
    """Token text to probability, for texts that occur once."""
    doubtful: Mapping[str, float]
    """Token text to the largest probability of one such token, for texts that occur repeatedly."""
    end: float | None
    """Probability of the end token, if the model chose it."""
    rest: float
    """Upper bound of the probability of a token that is not among the best."""


class _Workers:
    """A few threads that, unlike an executor's, do not keep the process from exiting."""

    def __init__(self, count: int, closed: Callable[[], ServerError]) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._count, self._closed, self._open = count, closed, True
        for _ in range(count):
            Thread(target=self._work, name="qcat-ollama", daemon=True).start()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Results in order. If the iterator is abandoned, work that has not started is skipped."""
        if not self._open:
            raise self._closed()
        futures: list[Future[Any]] = [Future() for _ in items]
        for future, item in zip(futures, items, strict=True):
            self._jobs.put((future, partial(function, item)))
        try:
            for future in futures:
                while True:
                    try:
                        yield future.result(timeout=1)
                        break
                    except TimeoutError:
                        if not self._open:
                            raise self._closed() from None
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Start no more work. May be called more than once."""
        if self._open:
            self._open = False
            for _ in range(self._count):
                self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            future, call = job
            if not self._open or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


class OllamaScorer:
    """Scores questions against a label trie, using a server's next-token probabilities.

    The server returns the twenty best log-probabilities of the whole vocabulary, so a label beyond
    them has only an upper bound. If the bounds do not decide, the model is asked to write one.

    Args:
        server: the server.
        model: name of the model there.
        vocabulary: the model's own.
        prefix: token ids of the prompt up to the question.
        trie: the label language.
        answers: what the model writes for each label, without the leading space.
        spellings: the vocabulary as a GGUF stores it, a text of byte symbols for each token.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        *,
        vocabulary: Vocabulary,
        prefix: Sequence[int],
        trie: LabelTrie,
        answers: Sequence[str],
        spellings: Sequence[str],
    ) -> None:
        self._server, self._name, self._vocabulary, self._trie = server, model, vocabulary, trie
        self._prefix = vocabulary.decode(prefix)
        self._answers = tuple(answers)
        self._numbers = {answer: number for number, answer in enumerate(answers)}
        # In JSON a label may take more tokens than alone, but never more than its bytes.
        self._longest = max(len(json.dumps(f" {a}", ensure_ascii=False).encode()) for a in answers)
        self._texts = self._token_texts(spellings)
        self._end = vocabulary.decode([trie.end])
        self._silent = False  # whether the server gives no log-probabilities
        if not self.spells(prefix):
            raise ServerError(
                f"{model}: its prompt holds the text of a special token, which Ollama would obey: "
                "take it out of the task"
            )
        self._workers = _Workers(
            _PARALLEL, lambda: ServerError(f"{model}: the classifier is closed: open it again")
        )

    def _token_texts(self, spellings: Sequence[str]) -> dict[int, str]:
        """Text by token, for the trie's tokens that a text in an answer identifies uniquely.

        The server cuts a token's bytes to whole characters, so a token that ends in part of a
        character looks like the token without that part.
        """
        wanted: dict[str, int] = {}
        tokens = {int(token) for branch in self._trie.branches for token in branch.tokens}
        tokens |= {int(token) for token in self._trie.first_tokens}
        for token in tokens - {self._trie.end}:
            text = _whole(self._vocabulary.piece(token))
            if text is not None:
                wanted[text] = token
        beginnings = tuple(spellings[token] for token in wanted.values())
        for token, spelling in enumerate(spellings):
            if spelling.startswith(beginnings):
                piece = self._vocabulary.piece(token)
                if _whole(piece) is None:
                    wanted.pop(piece.decode("utf-8", "ignore"), None)
        return {token: text for text, token in wanted.items()}

    def score(self, rests: Sequence[Sequence[int]]) -> Iterator[BoundedScores]:
        """Bounds and answer for each question in turn, with a few requests in flight.

        Args:
            rests: for each question the token ids after the prefix, such that `spells` holds.

        Raises:
            ServerError: when a question that got no answer is reached.
        """
        yield from self._workers.map(self._score, rests)

    def accepts(self, label: int) -> bool:
        """Whether a label may be returned: here only the list itself restricts it."""
        return 0 <= label < len(self._answers)

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether the server, which gets text and interprets special tokens, gets these ids."""
        return self._vocabulary.encode(self._vocabulary.decode(ids), special=True) == list(ids)

    def generate(self, rest: Sequence[int], limit: int) -> str:
        """The model's unconstrained answer, decoded greedily, up to `limit` tokens."""
        prompt = self._prefix + self._vocabulary.decode(rest)
        return str(self._call(prompt, num_predict=limit).get("response", ""))

    def close(self) -> None:
        """Send no more requests, and wait for none. May be called more than once."""
        self._workers.close()

    def _score(self, rest: Sequence[int]) -> BoundedScores:
        prompt = self._prefix + self._vocabulary.decode(rest)
        root = self._look(prompt)
        if root is None:
            nothing = np.zeros(0)
            everyone = range(len(self._answers))
            return BoundedScores(nothing, nothing, None, self._settle(prompt, everyone))
        children = []
        reach = np.ones(len(self._trie.branches))  # the largest share that can pass through each
        for number, branch in enumerate(self._trie.branches):
            seen: _Seen | None = None
            if not branch.path:
                seen = root
            elif reach[number] >= _WALK and self.spells([*rest, *branch.path]):
                seen = self._look(prompt + self._vocabulary.decode(branch.path))
            children.append(self._children(branch, seen))
            _, shares = share_bounds(*children[number])
            inner = branch.to_branches
            reach[inner.targets] = reach[number] * shares[inner.places]
        possible = contenders(self._trie, children)
        best = possible[0] if len(possible) == 1 else self._settle(prompt, possible)
        return BoundedScores(*label_bounds(self._trie, children), self._mass(root), best)

    def _look(self, prompt: str) -> _Seen | None:
        """The next token's probabilities; None if this version of Ollama returns none."""
        if self._silent:
            return None
        fields: dict[str, Any] = {"num_predict": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        answer = self._call(prompt, **fields)
        found, ended = answer.get("logprobs"), False
        if not found:
            # Ollama drops them if the best token has no text: the end token, or part of a
            # character. Under a schema it must write a quote, and returns them.
            ended = answer.get("done_reason") == "stop"
            found = self._call(prompt, format=self._schema([0]), **fields).get("logprobs")
        if not found:
            self._silent = True
            return None
        try:
            best = [(str(e["token"]), math.exp(e["logprob"])) for e in found[0]["top_logprobs"]]
            best.sort(key=lambda entry: -entry[1])
            least = best[-1][1]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            raise ServerError(f"{self._server.address}: {STRANGER}") from None
        outside = max(_ROUNDING, 1 - sum(value for _, value in best))
        # Whatever token ends the text ends the answer; a trained model has one for it.
        end = best.pop(0)[1] if ended and best[0][0] == "" else None
        texts = [text for text, _ in best]
        known = {text: value for text, value in best if text and texts.count(text) == 1}
        doubtful: dict[str, float] = {}
        for text, value in best:
            if text not in known:
                doubtful[text] = max(value, doubtful.get(text, 0.0))
        return _Seen(known, doubtful, end, min(least, outside) or outside)

    def _children(self, branch: Branch, seen: _Seen | None) -> tuple[Any, Any]:
        """Lower and upper bound of the probability of each child of a branch; None if unknown."""
        if seen is None:
            return np.zeros(len(branch.tokens)), np.ones(len(branch.tokens))
        bounds = [self._child(int(token), seen) for token in branch.tokens]
        low, high = zip(*bounds, strict=True)
        return low, high

    def _child(self, token: int, seen: _Seen) -> tuple[float, float]:
        if token == self._trie.end:
            # llama-server returns it as empty text, Ollama's engines before 0.30 as its own text.
            known = seen.known.get(self._end, seen.end)
            if known is not None:
                return known, known
            return 0.0, max(seen.rest, seen.doubtful.get("", 0.0))
        text = self._texts.get(token)
        if text is None:
            return 0.0, 1.0  # it may be in the answer under another token's text
        if text in seen.known:
            return seen.known[text], seen.known[text]
        return 0.0, max(seen.rest, seen.doubtful.get(text, 0.0))

    def _mass(self, root: _Seen) -> float:
        texts = (self._texts.get(int(token)) for token in self._trie.first_tokens)
        return min(1.0, sum(root.known.get(text, 0.0) for text in texts if text is not None))

    def _settle(self, prompt: str, labels: Sequence[int]) -> int:
        """The one of some labels that the model writes, first freely, then under a schema.

        A model writes a label in quotes much less reliably than bare, as it was trained. The schema
        therefore comes second, and with the space that the label's tokens begin with.
        """
        longest = max(len(sequence) for sequence in self._trie.sequences)
        said = self._call(prompt, num_predict=longest + 1).get("response")
        number = self._numbers.get(str(said).strip())
        if number not in labels:
            said = self._call(prompt, format=self._schema(labels), num_predict=self._longest).get(
                "response"
            )
            try:
                number = self._numbers.get(json.loads(str(said)).strip())
            except (ValueError, AttributeError):
                number = None
        if number not in labels or number is None:
            raise ServerError(
                f"{self._name}: answered {str(said)[:60]!r} where a schema allows only labels: "
                "see that Ollama is 0.5 or later, and ask again"
            )
        return number

    def _schema(self, labels: Sequence[int]) -> dict[str, Any]:
        return {"type": "string", "enum": [f" {self._answers[label]}" for label in labels]}

    def _call(self, prompt: str, num_predict: int, **fields: Any) -> dict[str, Any]:
        options = {"num_predict": num_predict, "temperature": 0, "repeat_penalty": 1}
        return self._server.generate(self._name, prompt, raw=True, options=options, **fields)


def _whole(piece: bytes) -> str | None:
    """The text of a token; None if it contains part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
