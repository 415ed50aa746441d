"""An Ollama server over HTTP, through the official client. The only importer of `ollama`.

Every failure is one `ServerError`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from qcat.errors import ServerError
from qcat.progress import Progress
from qcat.shell import quoted

try:
    import ollama  # which makes a client on import
except ModuleNotFoundError:
    raise
except (ImportError, ValueError, httpx.InvalidURL) as error:
    raise ServerError(
        f"OLLAMA_HOST or a proxy variable is no address ({error}): write 127.0.0.1:11434"
    ) from None

KEEP_ALIVE = "10m"
"""How long a server keeps the model loaded after a question, whatever OLLAMA_KEEP_ALIVE says."""
TIMEOUT = 60.0
"""Seconds to wait for a response; loading a model is part of the first request."""
_LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
_RETRIES = (0.2, 1.0)  # seconds to wait before a retry
_CHUNK = 1 << 20
STRANGER = "answers, but not as Ollama does: see that OLLAMA_HOST is right"
"""Message for a server that is not Ollama."""


class _Client(ollama.Client):
    """The official client, plus requests with fields for which it has no arguments."""

    def send(self, method: str, path: str, **content: Any) -> Any:
        return self._request_raw(method, path, **content)  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        return str(self._client.base_url).rstrip("/")

    @property
    def is_local(self) -> bool:
        return self._client.base_url.host in _LOCAL


class Server:
    """An Ollama server. Every failure is one `ServerError`; requests are retried where it helps.

    Args:
        timeout: seconds to wait for the response to a request.

    Raises:
        ServerError: OLLAMA_HOST is not a valid address.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._connected, self._process = self._connect(), os.getpid()
        self.address = self._connected.address

    def _connect(self) -> _Client:
        limit = httpx.Timeout(self._timeout, connect=min(self._timeout, 5))
        with _Errors("OLLAMA_HOST", self._timeout):
            client = _Client(timeout=limit)
            if client.is_local:  # a proxy is for others, as in Ollama's own client
                client = _Client(timeout=limit, trust_env=False)
        return client

    @property
    def _client(self) -> _Client:
        """The connections. A fork makes its own: on these it could get its parent's answers."""
        if self._process != os.getpid():
            self._connected, self._process = self._connect(), os.getpid()
        return self._connected

    def close(self) -> None:
        """Close the connections. May be called more than once."""
        self._client.close()  # type: ignore[no-untyped-call]

    def check(self) -> str:
        """Check that an Ollama server answers; return its version. Raises ServerError."""
        version = self._json("GET", "/api/version").get("version")
        if not isinstance(version, str):
            raise ServerError(f"{self.address}: {STRANGER}")
        return version

    def show(self, model: str, *, verbose: bool = False) -> dict[str, Any] | None:
        """The server's information about a model, or None if it has no such model.

        Args:
            model: its name.
            verbose: include the whole vocabulary.
        """
        try:
            return self._json("POST", "/api/show", {"model": model, "verbose": verbose})
        except _AbsentError:
            return None

    def generate(self, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
        """One answer, not streamed. `fields` are added to the request unchanged."""
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
        """The error for a model that does not exist on the server."""
        return ServerError(
            f"{model}: no such model on {self.address}: "
            f"create it with `qcat deploy DIR --name {quoted(model)}`"
        )

    def upload(self, gguf: Path, progress: Progress) -> str:
        """Upload a file, unless the server has it already; return its digest."""
        with self._errors():
            size = gguf.stat().st_size
            digest = sha256()
            for chunk in _chunks(gguf, lambda done: progress("checksum", done, size)):
                digest.update(chunk)
            blob = f"sha256:{digest.hexdigest()}"
            try:
                self._client.send("HEAD", f"/api/blobs/{blob}")
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise
                content = _chunks(gguf, lambda done: progress("upload", done, size))
                self._client.send("POST", f"/api/blobs/{blob}", content=content)
            return blob

    def create(
        self, model: str, files: Mapping[str, str], template: str, parameters: Mapping[str, Any]
    ) -> None:
        """Create a model; an existing one with that name is replaced.

        Args:
            model: its name.
            files: file names and the digests that `upload` gave for them.
            template: value of the Modelfile's TEMPLATE.
            parameters: values of the Modelfile's PARAMETER lines.
        """
        status = None
        with self._errors():
            for step in self._client.create(
                model, files=dict(files), template=template, parameters=parameters, stream=True
            ):  # an error after the first line arrives as a line, not as a status
                status = step.status
        if status != "success":
            raise ServerError(f"{self.address}: stopped before the model was made: try again")

    def delete(self, model: str) -> None:
        """Remove a model, if it exists."""
        try:
            with self._errors():
                self._client.delete(model)
        except _AbsentError:
            return

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, again: bool = False
    ) -> dict[str, Any]:
        """The answer to a request. `again`: it changes nothing, so it may be retried."""
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
            raise ServerError(f"{self.address}: {STRANGER}")
        return data

    def _errors(self) -> _Errors:
        return _Errors(self.address, self._timeout)


class _AbsentError(ServerError):
    """The model does not exist."""


class _Errors:
    """Turns the client's errors into one line each."""

    def __init__(self, address: str, timeout: float) -> None:
        self._address, self._timeout = address, timeout

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        at = self._address
        match error:
            case ollama.ResponseError():
                said = " ".join(str(error.error).split())[:300] or f"status {error.status_code}"
                if error.status_code == httpx.codes.NOT_FOUND:
                    if "model" in said and "not found" in said:
                        raise _AbsentError(f"{at}: {said}") from None
                    raise ServerError(f"{at}: {STRANGER}") from None
                if "no space left" in said:
                    raise ServerError(
                        f"{at}: no space left on the server's disk: make room"
                    ) from None
                raise ServerError(f"{at}: Ollama refuses, see its log: {said}") from None
            case ConnectionError() | httpx.ConnectTimeout():
                cause = error.__context__ or error
                raise ServerError(
                    f"{at}: no Ollama server there ({cause}): start it with `ollama serve`, "
                    "or set OLLAMA_HOST"
                ) from None
            case httpx.TimeoutException():
                raise ServerError(
                    f"{at}: no answer within {self._timeout:g} s: the server is busy or too slow: "
                    "try again, or allow more time"
                ) from None
            case httpx.InvalidURL() | httpx.UnsupportedProtocol():
                raise ServerError(f"{at}: is no address: set OLLAMA_HOST anew") from None
            case httpx.NetworkError() | httpx.RemoteProtocolError():
                raise ServerError(
                    f"{at}: the connection broke off: see whether the server is running"
                ) from None
            case OSError():
                raise ServerError(f"{error.filename}: {error.strerror}: see the file") from None
            case UnicodeEncodeError():
                raise ServerError(
                    f"{at}: {error.object[:40]!r} cannot be sent: choose another name"
                ) from None
            case RuntimeError() if not isinstance(error, RecursionError | httpx.StreamError):
                raise ServerError(f"{at}: the connection is closed: open it again") from None
            # Errors that the client may raise if the server is not Ollama.
            case (
                httpx.HTTPError()
                | httpx.StreamError()
                | ValueError()
                | TypeError()
                | AttributeError()
                | RecursionError()
            ):
                raise ServerError(f"{at}: {STRANGER}") from None


def _passing(error: Exception) -> bool:
    """Whether an error may be temporary: a dropped connection, or a full queue."""
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
