"""Opens a model: from its GGUF with llama.cpp in this process, or on an Ollama server.

In both cases the model is checked, its task is encoded in its own vocabulary, and a scorer is made.
Independent of predictions.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qcat.base.beside import find_base
from qcat.base.ollama_store import PREFIX
from qcat.calibration.calibration import Calibration
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import (
    QUESTION_ROOM,
    Prompt,
    Segment,
    Vocabulary,
    build_prompt,
    with_codes,
)
from qcat.encoding.scoring import BoundedScores, Scores
from qcat.errors import BundleError, ModelError, ServerError
from qcat.gguf.bundle import Bundle, fingerprint, identity, is_adapter
from qcat.gguf.header import Header
from qcat.gguf.sections import CALIBRATION_KEY, TASK_KEY, section
from qcat.gguf.vocabulary import write_vocabulary
from qcat.task import DEFAULT_INSTRUCTION, Task
from qcat.threads import default_threads

if TYPE_CHECKING:
    from qcat.backends.llama import LlamaModel


class Scorer(Protocol):
    """A backend: scores questions, given as token ids after the prompt's prefix."""

    def score(self, rests: Sequence[Sequence[int]]) -> Iterator[Scores | BoundedScores]: ...
    def accepts(self, label: int) -> bool: ...
    def spells(self, ids: Sequence[int]) -> bool: ...
    def generate(self, rest: Sequence[int], limit: int) -> str: ...


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be asked, whichever backend runs it."""

    encoded: EncodedTask
    vocabulary: Vocabulary
    scorer: Scorer
    calibration: Calibration
    identity: str
    """Identifies the model in a log."""
    among: tuple[int, ...] | None = None
    """The labels that may be answered, by their numbers in the task; None for all of them."""
    trained: bool = True
    """Whether the model was trained on the task, or on one with more labels."""


def open_file(
    path: Path,
    base: Path | None,
    *,
    task: Task | None,
    calibrated: bool,
    threads: int | None,
    quick_start: bool,
    verbose: bool,
    stack: ExitStack,
) -> Opened:
    """Open a model file, or an adapter file with its base.

    Args:
        path: path of the GGUF.
        base: base of an adapter; None looks for it at its location at export.
        task: the task to answer, on any generative model; None for the one stored in the file.
        calibrated: use the calibration stored in the file.
        threads: number of threads; None for the physical cores.
        quick_start: use the weights as they are stored in the file.
        verbose: let llama.cpp write its log to stderr.
        stack: closes everything that was opened.

    Raises:
        BundleError, ModelError: the file, or its base, cannot be used.
    """
    from qcat.backends.llama import shared_model
    from qcat.backends.llama_scorer import LlamaScorer

    bundle = Bundle.read(path, remember=True, task=task)
    files = fingerprint(bundle.path, bundle.header)
    weights = bundle.path
    if is_adapter(bundle.header):
        weights, header = find_base(bundle, base)
        files += fingerprint(weights, header)
    elif base is not None:
        raise BundleError(f"{path}: is no adapter: open it by itself")
    if bundle.foreign:
        from qcat.backends.trial import try_model

        try_model(weights, files)
    model = stack.enter_context(shared_model(weights, repack=not quick_start, verbose=verbose))
    encoded, among, trained = _encoded(bundle, task or bundle.task, model)
    scorer = LlamaScorer(
        model,
        prefix=encoded.prefix,
        trie=encoded.trie,
        grammar=encoded.grammar,
        room=QUESTION_ROOM,
        threads=threads or default_threads(),
        fingerprint=files,
        adapter=bundle.path if weights != bundle.path else None,
    )
    stack.callback(scorer.close)
    usable = trained and calibrated
    return Opened(
        encoded=encoded,
        vocabulary=model,
        scorer=scorer,
        calibration=read_calibration(bundle) if usable else Calibration(),
        identity=_identity(bundle, files, encoded.task, trained, among),
        among=among,
        trained=trained,
    )


def _identity(
    bundle: Bundle, files: str, task: Task, trained: bool, among: tuple[int, ...] | None
) -> str:
    """As `identity`; where another task than the file's is answered, that task counts too."""
    own = identity(bundle.header.metadata) if trained else f"{files} {task.to_toml()}"
    if trained and among is None:
        return own
    return f"{task.name}-{hashlib.sha256(f'{own} {among}'.encode()).hexdigest()[:12]}"


def _encoded(
    bundle: Bundle, task: Task, model: LlamaModel
) -> tuple[EncodedTask, tuple[int, ...] | None, bool]:
    """A task in a model's tokens; which of its labels count, and whether it was trained on it."""
    name, own = str(bundle.path), bundle.task
    if bundle.foreign:
        task = with_codes(task, model)
        prompt = _foreign_prompt(task, bundle.header, model)
        return EncodedTask.served(task, model, name, prompt, model.turn_end), None, False
    if (among := _among(task, own)) is not None:
        all_in_order = among == tuple(range(len(own.labels)))
        return EncodedTask.served(own, model, name), None if all_in_order else among, True
    return EncodedTask.served(task.replace(style=own.style), model, name), None, False


def _among(task: Task, own: Task) -> tuple[int, ...] | None:
    """The numbers of a task's labels in the one that a model was trained on.

    None if it is another task: another label, or another description or instruction, than those of
    the training. What is left at its default says nothing.
    """
    if task.instruction not in (DEFAULT_INSTRUCTION, own.instruction):
        return None
    numbers = {label: number for number, label in enumerate(own.labels)}
    found = []
    for label, description in task.labels.items():
        spelled = own.spelled(label)
        if spelled is None or description not in ("", own.labels[spelled]):
            return None
        found.append(numbers[spelled])
    return tuple(found)


def _foreign_prompt(task: Task, header: Header, model: LlamaModel) -> Prompt:
    """The prompt for a model that qcat did not make: its own chat template, if it has one."""
    from qcat.encoding.template import TEMPLATE_KEY, template_prompt

    template = header.metadata.get(TEMPLATE_KEY)
    begin = model.bos if model.adds_bos else None
    if not isinstance(template, str):
        if task.style == "chat":
            raise ModelError(
                f'{model.path}: has no chat template: write style = "plain" in the task'
            )
        return build_prompt(task, model, begin)
    special = {"bos_token": model.bos or "", "eos_token": model.decode([model.end])}
    try:
        prompt = template_prompt(task, template, special)
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from None
    if begin and not prompt.prefix[0].text.startswith(begin):
        return replace(prompt, prefix=(Segment(begin, True), *prompt.prefix))
    return prompt


def open_served(
    name: str,
    adapter: Path | None,
    *,
    calibrated: bool,
    timeout: float | None,
    verbose: bool,
    stack: ExitStack,
) -> Opened:
    """Find a model on the Ollama server that OLLAMA_HOST names.

    Args:
        name: name of the model there.
        adapter: the adapter file that the model was made with, because the server only gives
            information about the base.
        calibrated: use the calibration stored in the model.
        timeout: seconds to wait for the server's response.
        verbose: let llama.cpp, which tokenizes here, write its log to stderr.
        stack: closes everything that was opened.

    Raises:
        ServerError: the server does not answer, or has no such model made by qcat.
        ModelError, BundleError: the model cannot be used.
    """
    from qcat.backends.llama import LlamaModel
    from qcat.backends.ollama import TIMEOUT, Server
    from qcat.backends.ollama_scorer import OllamaScorer

    server = Server(timeout or TIMEOUT)
    stack.callback(server.close)
    metadata = _metadata(server, name, adapter)
    with _vocabulary_file(metadata, f"{name} on {server.address}") as path:
        bundle = Bundle.read(path)
        calibration = read_calibration(bundle) if calibrated else Calibration()
        vocabulary = stack.enter_context(LlamaModel(path, vocab_only=True, verbose=verbose))
    vocabulary.path = Path(f"{PREFIX}{name}")  # for messages: the file is gone
    encoded = EncodedTask.served(bundle.task, vocabulary, name)
    scorer = OllamaScorer(
        server,
        name,
        vocabulary=vocabulary,
        prefix=encoded.prefix,
        trie=encoded.trie,
        answers=encoded.task.answers,
        spellings=metadata["tokenizer.ggml.tokens"],
    )
    stack.callback(scorer.close)
    # A separate identity: bounds of probabilities must not be compared with exact ones.
    return Opened(encoded, vocabulary, scorer, calibration, f"{identity(metadata)}-ollama")


def read_model(model: str | os.PathLike[str]) -> Bundle:
    """The metadata of a model, wherever it is stored.

    Args:
        model: a GGUF, the folder of a bundle, or `ollama:NAME` for a model on the Ollama server
            that OLLAMA_HOST names. The latter has metadata but no tensors, and its name is used as
            the path.

    Raises:
        BundleError: the file is absent, damaged, or not a qcat GGUF.
        ServerError: the server does not answer, or has no such model made by qcat.
    """
    name = os.fspath(model)
    if not name.startswith(PREFIX):
        return Bundle.read(name)
    from qcat.backends.ollama import Server

    server = Server()
    try:
        metadata = _metadata(server, name.removeprefix(PREFIX), None)
    finally:
        server.close()
    with _vocabulary_file(metadata, f"{name} on {server.address}") as path:
        bundle = Bundle.read(path)
    header = replace(bundle.header, tensors=())
    return replace(bundle, path=Path(name), header=header)


@contextmanager
def _vocabulary_file(metadata: Mapping[str, Any], name: str) -> Iterator[Path]:
    """A model's metadata from a server as a temporary GGUF.

    Raises:
        ServerError: something is wrong with the metadata; names the model.
        ModelError: the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="qcat-") as folder:
            path = Path(folder, "vocabulary.gguf")
            write_vocabulary(path, metadata)
            yield path
    except (BundleError, ModelError) as error:
        raise ServerError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from None
    except OSError as error:
        raise ModelError(f"{tempfile.gettempdir()}: {error.strerror}: set TMPDIR") from None


def _metadata(server: Any, name: str, adapter: Path | None) -> dict[str, Any]:
    """A server's metadata of a model made by qcat, or those of the given adapter."""
    response = server.show(name, verbose=True)
    if response is None:
        server.check()
        raise server.absent(name)
    metadata = response.get("model_info")
    if adapter is not None and isinstance(metadata, dict):
        own = Bundle.read(adapter).header.metadata
        metadata |= {key: value for key, value in own.items() if key.startswith("qcat.")}
    if not isinstance(metadata, dict) or TASK_KEY not in metadata:
        raise ServerError(
            f"{name} on {server.address}: not made by qcat: make one with `qcat deploy DIR`"
        )
    return metadata


def read_calibration(bundle: Bundle) -> Calibration:
    """The calibration stored in a bundle.

    Raises:
        BundleError: it is not in a form that qcat writes.
    """
    data = section(bundle.header, CALIBRATION_KEY, bundle.path)
    try:
        return Calibration.from_dict(data, tuple(bundle.task.labels))
    except ValueError as error:
        raise BundleError(
            f"{bundle.path}: metadata {CALIBRATION_KEY} {error}: run `qcat calibrate` again"
        ) from None
