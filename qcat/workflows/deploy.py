"""Deploys a bundle to an Ollama server and verifies it there before it gets its final name.

The model is created under a temporary name, asked questions and compared. Only then does it get the
requested name, so that an earlier model stays in place until the new one is known to be correct.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcat.backends.llama import LlamaModel
from qcat.backends.ollama import Server
from qcat.classifier import OLLAMA, Classifier
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import QUESTION_ROOM, Prompt, clean_question, encode_segments
from qcat.errors import BundleError, ExportError, ServerError
from qcat.evaluation.proof import spread
from qcat.gguf.bundle import Bundle, find_gguf, is_adapter
from qcat.gguf.sections import TASK_KEY
from qcat.progress import Progress, silent
from qcat.report.modelfile import go_template, modelfile, parameters
from qcat.shell import quoted
from qcat.task import Task

NEAR_TIE = 0.1
"""Margin below which a label may differ: Ollama's attention rounds differently (docs/ollama.md)."""
MAX_QUESTIONS = 100
_TRIAL = "qcat-trial-"
_AWKWARD = (
    "When was it replaced?",
    "12 'é'… \"{{ .Prompt }}\" {% x %} \\n",
    "ok",
    "水泵什么时候换的？",
    "a\u200db 🏊‍♀️ !",
)


@dataclass(frozen=True)
class Deployment:
    """What was verified on the server."""

    name: str
    address: str
    questions: int
    """Number of questions asked there and here; each got the training prompt, token for token."""
    near_ties: int
    """Questions with a different label there, whose two best labels are close here."""
    unspoken: int
    """Questions that the model does not answer with a label if unconstrained (`ollama run`)."""


@dataclass(frozen=True)
class _Bundle:
    gguf: Path
    task: Task
    prompt: Prompt
    template: str
    parameters: dict[str, Any]


def check_server(name: str, task: Task, timeout: float) -> None:
    """Check that a server answers, and that a model of this task may have the name.

    Raises:
        ServerError: no server answers, it rejects the name, or the name belongs to another model.
    """
    server = Server(timeout)
    try:
        _check_name(server, name, task)
    finally:
        server.close()


def deploy(
    folder: Path,
    name: str | None = None,
    *,
    questions: Sequence[str] = (),
    timeout: float,
    progress: Progress = silent,
) -> Deployment:
    """Make an Ollama model from a bundle, and verify it.

    Args:
        folder: a bundle that `qcat export` wrote.
        name: name of the model; the task's name if None.
        questions: questions for the verification, of which at most `MAX_QUESTIONS` are asked; if
            there are none, they are made up from the labels.
        timeout: seconds to wait for the server's response.
        progress: called with a step's name, how much of it is done, and the total.

    Raises:
        BundleError: the folder holds no bundle, or its Modelfile does not belong to the GGUF.
        ExportError: the verification failed. The server is then unchanged.
        ServerError: the server does not answer, or rejects a request. It is then unchanged.
    """
    bundle = _read(folder)
    name = name or bundle.task.name
    server = Server(timeout)
    trial = f"{_TRIAL}{bundle.task.name[:40]}-{secrets.token_hex(4)}"  # two may run at once
    try:
        _check_name(server, name, bundle.task)
        files = {bundle.gguf.name: server.upload(bundle.gguf, progress)}
        try:
            server.create(trial, files, bundle.template, bundle.parameters)
            with LlamaModel(bundle.gguf, vocab_only=True) as model:
                asked = _sample(questions, bundle, model)
                unspoken = _prove_prompts(server, trial, bundle, model, asked, progress)
            near_ties = _prove_labels(trial, bundle, asked, timeout, progress)
            _check_name(server, name, bundle.task)
            server.create(name, files, bundle.template, bundle.parameters)
        finally:
            _forget(server, trial)
    finally:
        server.close()
    return Deployment(name, server.address, len(asked), near_ties, unspoken)


def _read(folder: Path) -> _Bundle:
    """The GGUF of a bundle, after checking that the Modelfile beside it belongs to it."""
    gguf = find_gguf(folder)
    bundle = Bundle.read(gguf)
    task = bundle.task
    if is_adapter(bundle.header):
        raise BundleError(
            f"{gguf}: is an adapter beside its base: give `ollama create {task.name} -f "
            f"{quoted(folder / 'Modelfile')}`, and ask it with `qcat ask -m ollama:{task.name} "
            f"--adapter {quoted(gguf)}`"
        )
    with LlamaModel(gguf, vocab_only=True) as model:
        encoded = EncodedTask.served(task, model, str(gguf))
        wanted = parameters(encoded, model)
    prompt = encoded.prompt
    text = modelfile(task, prompt, gguf=gguf.name, parameters=wanted)
    file = folder / "Modelfile"
    write = f"qcat show {quoted(gguf)} --modelfile > {quoted(file)}"
    try:
        stored = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror}: write it with `{write}`") from None
    if stored != text.encode():
        raise BundleError(
            f"{file}: not what qcat writes for {gguf.name}: write it anew with "
            f"`{write}`, or give it to `ollama create` yourself"
        )
    return _Bundle(gguf, task, prompt, go_template(prompt), wanted)


def _check_name(server: Server, name: str, task: Task) -> None:
    server.check()
    if name.startswith(_TRIAL):
        raise ServerError(f"{name}: qcat tries models under such names: choose another --name")
    there = server.show(name)
    if there is None:
        return
    try:
        found = json.loads(there["model_info"][TASK_KEY])["name"]
    except (KeyError, TypeError, ValueError):
        found = None
    if found != task.name:
        raise ServerError(
            f"{name} on {server.address} is another model: choose another --name, or give "
            f"`ollama rm {name}` first"
        )


def _sample(questions: Sequence[str], bundle: _Bundle, model: LlamaModel) -> list[str]:
    """Questions for the verification, evenly spaced over those given.

    Questions that are too long or contain the text of a special token are left out, because only
    qcat itself handles them as in training.
    """
    given = questions or [f"What about the {label}?" for label in bundle.task.labels]
    kept = []
    for question in map(clean_question, (*_AWKWARD, *spread(given, MAX_QUESTIONS))):
        rest = bundle.prompt.rest(question)
        ids = encode_segments(rest, model)
        text = "".join(segment.text for segment in rest)
        if len(ids) <= QUESTION_ROOM and model.encode(text, special=True) == ids:
            kept.append(question)
    return kept


def _prove_prompts(
    server: Server,
    name: str,
    bundle: _Bundle,
    model: LlamaModel,
    questions: Sequence[str],
    progress: Progress,
) -> int:
    """Compare the server's prompt for each question with the training prompt.

    Returns:
        For how many questions the model, unconstrained, answers with something other than a label.
    """
    said = server.show(name) or {}
    if said.get("capabilities", ["completion"]) != ["completion"]:
        raise ExportError(
            f"{name}: Ollama takes it for a model that can {', '.join(said['capabilities'])}, "
            "and would use another prompt: please report it with the version of Ollama"
        )
    unspoken = 0
    for number, question in enumerate(questions, 1):
        expected = encode_segments((*bundle.prompt.prefix, *bundle.prompt.rest(question)), model)
        debug = server.generate(name, question, _debug_render_only=True).get("_debug_info")
        answer = server.generate(name, question)
        # The server returns the token ids of prompt and answer as one sequence: the last token
        # of the prompt may be merged with the first of the answer.
        read = answer.get("context")
        rendered = (debug or {}).get("rendered_template")
        if rendered is None and read is None:
            raise ExportError(
                f"{server.address}: shows neither prompt nor tokens: nothing can be proved: "
                "use Ollama 0.12 or later"
            )
        if (rendered is not None and model.encode(rendered, special=True) != expected) or (
            read is not None and read[: len(expected) - 1] != expected[:-1]
        ):
            raise ExportError(
                f"{server.address}: Ollama's prompt for {question[:60]!r} is not the one of "
                "the training: please report it with the version of Ollama"
            )
        labelled = str(answer.get("response", "")).strip() in bundle.task.answers
        unspoken += not labelled and question not in _AWKWARD
        progress("prove prompts", number, len(questions))
    return unspoken


def _prove_labels(
    name: str, bundle: _Bundle, questions: Sequence[str], timeout: float, progress: Progress
) -> int:
    """Compare the labels with those of the GGUF here; return how many near ties differ."""
    near_ties, allowed = 0, max(2, len(questions) // 10)
    with (
        Classifier.open(bundle.gguf) as here,
        Classifier.open(f"{OLLAMA}{name}", timeout=timeout) as there,
    ):
        answers = zip(questions, map(here.ask, questions), there.ask_many(questions), strict=True)
        for number, (question, own, other) in enumerate(answers, 1):
            if own.label != other.label:
                near_ties += 1
                if (own.margin or 0) > NEAR_TIE:
                    why = (
                        "which computes otherwise: see its GPU, attention and cache settings"
                        if other.exact
                        else "which shows twenty tokens only: train with --objective answer, so "
                        "that the labels are among them"
                    )
                    raise ExportError(
                        f"{question[:60]!r}: {own.label!r} here, {other.label!r} in Ollama, {why}"
                    )
                if near_ties > allowed:
                    raise ExportError(
                        f"{near_ties} of {len(questions)} labels differ, all nearly even: the "
                        "model is not sure of anything: train it longer, on more questions, or "
                        "with --objective answer"
                    )
            progress("prove labels", number, len(questions))
    return near_ties


def _forget(server: Server, name: str) -> None:
    """Remove the trial model; if the server is gone, the model stays until `ollama rm`."""
    try:
        server.delete(name)
    except ServerError:
        return
