"""A model on an Ollama server: log-probabilities of the next token, and constrained answers.

The only importer of `ollama`. Prompts are sent raw, as qcat builds them: the model's TEMPLATE,
which serves `ollama run`, plays no part here. What the server answers was read in its sources and
seen on 0.32.15 (server/routes.go, llm/llama_server.go).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
import numpy as np

from qcat.errors import ServerError
from qcat.scoring import BoundedScores, contenders, label_bounds
from qcat.trie import Branch, LabelTrie

try:
    import ollama  # which makes a client on import
except ValueError as error:
    raise ServerError(f"OLLAMA_HOST is no address ({error}): write it as 127.0.0.1:11434") from None

TOP_LOGPROBS = 20
"""The most that Ollama gives."""
KEEP_ALIVE = "10m"
"""How long the server keeps the model loaded after a question."""
TIMEOUT = 60.0
"""Seconds that a request may take; loading a model is part of the first."""
_PARALLEL = 4  # requests under way: what the server does not run at once it queues
_RETRIES = (0.2, 1.0)  # seconds to wait before asking again
_WALK = 1e-3  # a branch that fewer answers than this can come through is not looked into
_CHUNK = 1 << 20
Progress = Callable[[str, int, int], None]


class Vocabulary(Protocol):
    """Tokens as llama.cpp spells them."""

    def encode(self, text: str, *, special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> bytes: ...


class _Client(ollama.Client):
    """The official client, and requests with fields that it has no arguments for."""

    def send(self, method: str, path: str, **content: Any) -> Any:
        return self._request_raw(method, path, **content)  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        return str(self._client.base_url).rstrip("/")


class Server:
    """An Ollama server. Every failure is one `ServerError`; asks are tried again where it helps.

    Args:
        timeout: seconds that a request may take.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self._client = _Client(timeout=httpx.Timeout(timeout, connect=min(timeout, 5)))
        self._timeout = timeout
        self.address = self._client.address

    def close(self) -> None:
        """Close the connections. Harmless a second time."""
        self._client.close()  # type: ignore[no-untyped-call]

    def version(self) -> str:
        """The server's version. Raises ServerError if none answers."""
        return str(self._json("GET", "/api/version").get("version"))

    def show(self, model: str, *, verbose: bool = False) -> dict[str, Any] | None:
        """What the server says of a model, or None if it has no such model.

        Args:
            model: its name.
            verbose: with the whole vocabulary.
        """
        try:
            return self._json("POST", "/api/show", {"model": model, "verbose": verbose})
        except _AbsentError:
            return None

    def generate(self, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
        """One answer, not streamed. `fields` go into the request as they are."""
        body = {
            "model": model,
            "prompt": prompt,
            "stream": False,
            "think": False,
            "truncate": False,
            "keep_alive": KEEP_ALIVE,
            **fields,
        }
        try:
            return self._json("POST", "/api/generate", body, again=True)
        except _AbsentError:
            raise self.absent(model) from None

    def absent(self, model: str) -> ServerError:
        """The error for a model that is not there."""
        return ServerError(
            f"{model}: no such model on {self.address}: "
            f"create it with `qcat deploy DIR --name {model}`"
        )

    def create(
        self,
        model: str,
        gguf: Path,
        *,
        template: str,
        parameters: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        """Upload a GGUF and make a model of it; a model of that name is replaced."""
        size = gguf.stat().st_size
        digest = sha256()
        for chunk in _chunks(gguf, lambda done: progress("checksum", done, size)):
            digest.update(chunk)
        blob = f"sha256:{digest.hexdigest()}"
        with self._errors():
            try:
                self._client.send("HEAD", f"/api/blobs/{blob}")
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise
                upload = _chunks(gguf, lambda done: progress("upload", done, size))
                self._client.send("POST", f"/api/blobs/{blob}", content=upload)
            steps = self._client.create(
                model,
                files={gguf.name: blob},
                template=template,
                parameters=parameters,
                stream=True,
            )
            for step in steps:  # an error after the first line comes as a line, not a status
                progress("create", int(step.status == "success"), 1)

    def copy(self, source: str, target: str) -> None:
        """Give a model a second name; a model of that name is replaced."""
        with self._errors():
            self._client.copy(source, target)

    def delete(self, model: str) -> None:
        """Remove a model; harmless if there is none."""
        with self._errors():
            try:
                self._client.delete(model)
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, again: bool = False
    ) -> dict[str, Any]:
        """The answer to a request. `again`: it changes nothing, so it may be sent twice."""
        with self._errors():
            for wait in (*_RETRIES, None) if again else (None,):
                try:
                    data = self._client.send(method, path, json=body).json()
                    break
                except (ollama.ResponseError, httpx.TransportError) as error:
                    if wait is None or not _passing(error):
                        raise
                    time.sleep(wait)
        if not isinstance(data, dict):
            raise ServerError(f"{self.address}: answers, but not as Ollama does: see OLLAMA_HOST")
        return data

    def _errors(self) -> _Errors:
        return _Errors(self.address, self._timeout)


class _AbsentError(ServerError):
    """The model is not there."""


class _Errors:
    """Turns the client's errors into one line each."""

    def __init__(self, address: str, timeout: float) -> None:
        self._address, self._timeout = address, timeout

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        at = self._address
        if isinstance(error, ollama.ResponseError):
            said = " ".join(error.error.split())[:300] or f"status {error.status_code}"
            if error.status_code == httpx.codes.NOT_FOUND:
                raise _AbsentError(f"{at}: {said}") from None
            if "no space left" in said:
                raise ServerError(f"{at}: no space left on the server's disk: make room") from None
            raise ServerError(f"{at}: Ollama refuses: {said}") from None
        if isinstance(error, httpx.TimeoutException) and not isinstance(
            error, httpx.ConnectTimeout
        ):
            raise ServerError(
                f"{at}: no answer within {self._timeout:g} s: the server is busy or too slow: "
                "try again, or allow more time"
            ) from None
        if isinstance(error, ConnectionError | httpx.ConnectTimeout):
            raise ServerError(
                f"{at}: no Ollama server there: start it with `ollama serve`, or set OLLAMA_HOST"
            ) from None
        if isinstance(error, httpx.HTTPError):
            raise ServerError(f"{at}: the connection broke off: is the server running?") from None
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise ServerError(f"{at}: answers, but not as Ollama does: see OLLAMA_HOST") from None


def _passing(error: Exception) -> bool:
    """Whether an error may be gone the next moment: a dropped connection, or a full queue."""
    if isinstance(error, ollama.ResponseError):
        return error.status_code == httpx.codes.SERVICE_UNAVAILABLE
    return isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)


def _chunks(path: Path, progress: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
            done += len(chunk)
            progress(done)


class _Seen(NamedTuple):
    """Log-probabilities that the server gave for one position."""

    by_text: Mapping[str, float]
    """Token text to probability, of texts that stand for one token only."""
    end: float | None
    """Probability of the end token, where the model chose it."""
    blank: float
    """The most probability that a token which the server shows as no text can have."""
    rest: float
    """The most probability that a token which is not among the best can have."""


class OllamaScorer:
    """Scores questions against a label trie by what a server gives of the next token.

    The server gives the twenty best log-probabilities of the whole vocabulary, so a label beyond
    them has an upper bound only. What bounds cannot decide the model is made to write.

    Args:
        server: where the model is.
        model: its name there.
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
        # In JSON a label may take more tokens than bare, but never more than bytes.
        self._longest = max(len(json.dumps(f" {a}", ensure_ascii=False).encode()) for a in answers)
        self._texts = self._token_texts(spellings)
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="qcat-ollama")

    def _token_texts(self, spellings: Sequence[str]) -> dict[int, str]:
        """Text by token, for the trie's tokens that a text in an answer can stand for alone.

        The server cuts a token's bytes to whole characters, so one that ends in a part of a
        character reads as the token without that part.
        """
        wanted: dict[str, int] = {}
        tokens = {int(token) for branch in self._trie.branches for token in branch.tokens}
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
        """Bounds and answer for each question in turn, a few requests under way at once.

        Args:
            rests: for each question the token ids after the prefix, such that `spells` holds.

        Raises:
            ServerError: when the turn comes of a question that got no answer.
        """
        tasks = [self._pool.submit(self._score, list(rest)) for rest in rests]
        try:
            for task in tasks:
                yield task.result()
        finally:
            for task in tasks:
                task.cancel()

    def accepts(self, label: int) -> bool:
        """Whether a label may come out: there is no grammar here but the list itself."""
        return 0 <= label < len(self._answers)

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether the server, which gets text and obeys special tokens in it, reads these ids."""
        return self._vocabulary.encode(self._vocabulary.decode(ids), special=True) == list(ids)

    def generate(self, rest: Sequence[int], limit: int) -> str:
        """What the model says without any constraint, greedily, up to `limit` tokens."""
        prompt = self._prefix + self._vocabulary.decode(rest)
        return str(self._call(prompt, num_predict=limit).get("response", ""))

    def close(self) -> None:
        """Give up what is under way and close the connections. Harmless a second time."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._server.close()

    def _score(self, rest: list[int]) -> BoundedScores:
        prompt = self._prefix + self._vocabulary.decode(rest)
        root = self._look(prompt)
        if root is None:
            nothing = np.zeros(0)
            everyone = range(len(self._answers))
            return BoundedScores(nothing, nothing, None, self._settle(prompt, everyone))
        children = [self._unknown(branch) for branch in self._trie.branches]
        for number, branch in enumerate(self._trie.branches):
            if branch.path:
                _, upper = label_bounds(self._trie, children)
                within = [i for i, s in enumerate(self._trie.sequences) if _begins(s, branch.path)]
                if upper[within].max() < _WALK or not self.spells([*rest, *branch.path]):
                    continue
                seen = self._look(prompt + self._vocabulary.decode(branch.path))
            else:
                seen = root
            if seen is not None:
                children[number] = self._children(branch, seen)
        possible = contenders(self._trie, children)
        best = possible[0] if len(possible) == 1 else self._settle(prompt, possible)
        return BoundedScores(*label_bounds(self._trie, children), self._mass(root), best)

    def _look(self, prompt: str) -> _Seen | None:
        """The next token's probabilities; None from an Ollama that gives none."""
        fields: dict[str, Any] = {"num_predict": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        answer = self._call(prompt, **fields)
        found, ended = answer.get("logprobs"), False
        if not found:
            # Ollama drops them where the best token has no text: the end token, or a part of a
            # character. Under a schema it must write a quote, and gives what was there before.
            ended = answer.get("done_reason") == "stop"
            found = self._call(prompt, format=self._schema([0]), **fields).get("logprobs")
        if not found:
            return None
        try:
            best = [(str(e["token"]), math.exp(e["logprob"])) for e in found[0]["top_logprobs"]]
            least = min(value for _, value in best)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            raise ServerError(f"{self._server.address}: its logprobs are not as Ollama's") from None
        best.sort(key=lambda entry: -entry[1])
        end = best.pop(0)[1] if ended and best[0][0] == "" else None
        texts = [text for text, _ in best]
        rest = min(least, max(0.0, 1 - sum(value for _, value in best) - (end or 0)))
        return _Seen(
            by_text={text: value for text, value in best if text and texts.count(text) == 1},
            end=end,
            blank=max([rest, *(value for text, value in best if text == "")]),
            rest=rest,
        )

    def _children(self, branch: Branch, seen: _Seen) -> tuple[Any, Any]:
        """The least and the most probability of each child of a branch."""
        bounds = []
        for token in branch.tokens:
            text = self._texts.get(int(token))
            if int(token) == self._trie.end:
                bounds.append((seen.end, seen.end) if seen.end is not None else (0.0, seen.blank))
            elif text is None:
                bounds.append((0.0, 1.0))  # it may be in the answer under another's text
            elif text in seen.by_text:
                bounds.append((seen.by_text[text], seen.by_text[text]))
            else:
                bounds.append((0.0, seen.rest))
        low, high = zip(*bounds, strict=True)
        return low, high

    @staticmethod
    def _unknown(branch: Branch) -> tuple[Any, Any]:
        return np.zeros(len(branch.tokens)), np.ones(len(branch.tokens))

    def _mass(self, root: _Seen) -> float:
        texts = {_whole(self._vocabulary.piece(int(t))) for t in self._trie.first_tokens}
        return min(1.0, sum(v for text, v in root.by_text.items() if text in texts))

    def _settle(self, prompt: str, labels: Sequence[int]) -> int:
        """The one of some labels that the model writes: freely, or where a schema allows no other.

        A model writes a label in quotes far worse than bare, as it was trained: so that comes
        second, and with the space that its tokens begin with.
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
                f"{self._name}: answered {str(said)[:60]!r} where only labels are allowed: "
                "it needs Ollama 0.5 or later"
            )
        return number

    def _schema(self, labels: Sequence[int]) -> dict[str, Any]:
        return {"type": "string", "enum": [f" {self._answers[label]}" for label in labels]}

    def _call(self, prompt: str, num_predict: int, **fields: Any) -> dict[str, Any]:
        options = {"num_predict": num_predict, "temperature": 0, "repeat_penalty": 1}
        return self._server.generate(self._name, prompt, raw=True, options=options, **fields)


def _whole(piece: bytes) -> str | None:
    """The text of a token, None if it holds a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _begins(sequence: Sequence[int], path: Sequence[int]) -> bool:
    return tuple(sequence[: len(path)]) == tuple(path)
