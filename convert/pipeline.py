"""Export: the order of the steps, in a temporary folder beside the target, renamed at the end.

The target is whole or absent, also when the process is killed: what a killed export left behind
is cleared away by the next one.
"""

from __future__ import annotations

import errno
import gc
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from convert.calibrate import Asked, Question, ask_all, sections, summary
from convert.card import model_card
from convert.imatrix import ImportanceMatrix, importance_matrix
from convert.merge import Merged, merge
from convert.modelfile import chat_template, modelfile, parameters
from convert.quantize import quantize
from convert.replay import TorchReplay
from convert.trim import trim, whole_words
from convert.verify import (
    Floats,
    check_questions,
    check_tokens,
    quality,
    replay_gguf,
    replay_torch,
    spread,
)
from convert.vocab import Vocabulary, read_vocabulary
from convert.writer import Precision, write_gguf
from qcat.backends.llama import LlamaModel, default_threads
from qcat.bundle import REPORT_KEY, Bundle, write_sections
from qcat.classifier import prepare
from qcat.errors import DataError, ExportError
from qcat.grammar import grammar
from qcat.prompt import (
    QUESTION_ROOM,
    Prompt,
    build_prompt,
    encode_answers,
    encode_segments,
    with_codes,
)
from qcat.task import Task
from qcat.tokenization import HubTokenizer
from qcat.trie import LabelTrie

Progress = Callable[[str, int, int], None]
"""Called with a step's name, and how much of it is done of how much."""

_IMATRIX_QUESTIONS = 512  # more change the matrix by less than the quantizer's own noise

_PROBES = ("When was it replaced?", "12 'é'…", "ok")  # so that tokens are compared without data too


@dataclass(frozen=True)
class Request:
    """What to export."""

    task: Task
    target: Path
    """The folder to make; it must not exist."""
    adapter: Path | None = None
    """PEFT folder; None exports the base as it is."""
    base: str | None = None
    """Local folder or hub name; None takes the one that the adapter names."""
    quantization: str = "q4_k_m"
    precision: Precision = "f16"
    """Of the GGUF that is quantized."""
    merges: int | None = None
    """Trim the vocabulary to its first so many merges, the words of the texts' language and what
    the task and its training questions need; None keeps all of it."""
    held_out: tuple[tuple[str, int], ...] = ()
    """Questions (cleaned) and right labels for the proof."""
    validation: tuple[Question, ...] = ()
    """For the calibration, cleaned too; they may have helped to choose the epoch."""
    training: tuple[str, ...] = ()
    """Questions (cleaned) for the importance matrix."""
    max_flips: float = 0.02
    """The largest share of held-out questions that may change their label."""


def export(request: Request, progress: Progress = lambda step, done, total: None) -> dict[str, Any]:
    """Merge, convert, quantize, prove; leave a folder with GGUF, Modelfile, grammar and card.

    Returns:
        The report, as in `report.json`.

    Raises:
        ExportError: with nothing left at the target; after too many flips the report is kept
            beside it as `NAME.report.json`.
    """
    target = request.target
    if target.exists():
        raise ExportError(f"{target}: exists already: remove it or choose another folder")
    with _working_folder(target) as folder:
        report = _export_into(folder, request, progress)
        if _flip_share(report) > request.max_flips:
            kept = target.with_name(f"{target.name}.report.json")
            os.replace(folder / "report.json", kept)
            raise ExportError(
                f"{report['proof']['quantized']['flips']} of {report['proof']['questions']} "
                f"labels changed, more than {request.max_flips:.1%}: export with "
                f"{_way_out(request)}; the report, with the accuracies, is {kept}"
            )
        try:
            os.rename(folder, target)
        except OSError as error:
            raise ExportError(f"{target}: cannot be put in place: {error.strerror}") from None
    return report


def _way_out(request: Request) -> str:
    """What may change fewer labels: what is larger, or has a matrix, and was not tried."""
    larger = ["q5_k_m", "q8_0"]
    if request.quantization in larger:
        del larger[: larger.index(request.quantization) + 1]
    ways = ["--vocab full"] if request.merges is not None else []
    if larger:
        ways.append(f"--quant {' or '.join(larger)}")
    if not request.training:
        ways.append("questions for the importance matrix")
    return ", or with ".join([*ways, "a higher --max-flips"])


def _flip_share(report: Mapping[str, Any]) -> float:
    proof = report.get("proof")
    return proof["quantized"]["flips"] / proof["questions"] if proof else 0.0


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, with older ones of killed exports removed.

    A lock, freed by the system when its process dies, keeps two exports to one target apart.
    """
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = target.parent.resolve()
        lock = FileLock(parent / f".{target.name}.export.lock", blocking=False)
        lock.acquire()
    except Timeout:
        raise ExportError(f"{target}: another export is writing it: wait for it") from None
    except OSError as error:
        raise ExportError(f"{target}: {error.strerror or error}: choose another folder") from None
    prefix = f".{target.name}.export-"
    folder = None
    try:
        for stale in parent.glob(f"{glob.escape(prefix)}????????"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(f"{target}: the disk is full: make room") from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@dataclass(frozen=True)
class _Setup:
    """What the steps share, once the tokenizer is known."""

    task: Task
    """With codes chosen, if it uses them."""
    tokenizer: HubTokenizer
    prompt: Prompt
    prefix: list[int]
    trie: LabelTrie

    @classmethod
    def of(cls, task: Task, tokenizer: HubTokenizer) -> _Setup:
        """The prompt and the labels of a task in the tokens of a tokenizer."""
        prompt = build_prompt(task, tokenizer)
        return cls(
            task=task,
            tokenizer=tokenizer,
            prompt=prompt,
            prefix=encode_segments(prompt.prefix, tokenizer),
            trie=LabelTrie.build(encode_answers(task, tokenizer), tokenizer.end),
        )

    def ids(self, question: str) -> list[int]:
        """Token ids after the prefix."""
        return encode_segments(self.prompt.rest(question), self.tokenizer)

    def rest(self, question: str) -> list[int]:
        """Token ids after the prefix. Raises DataError for a question that does not fit."""
        ids = self.ids(question)
        if len(ids) > QUESTION_ROOM:
            raise DataError(
                f"question {question[:60]!r}…: {len(ids)} tokens, "
                f"room for {QUESTION_ROOM}: shorten it"
            )
        return ids


@dataclass(frozen=True)
class _Served:
    """The vocabulary that the GGUF has: the whole one, or a trimmed one with ids of its own."""

    setup: _Setup
    vocabulary: Vocabulary
    rows: tuple[int, ...] | None = None
    """Of embedding and head that are kept; None for all."""
    report: dict[str, Any] | None = None
    """What was trimmed, and how many questions have other tokens for it."""


@dataclass(frozen=True)
class _Measured:
    """What the merged model in torch was needed for, so that it can go before quantizing."""

    served: _Served
    source: dict[str, Any]
    imatrix: ImportanceMatrix | None
    reference: Floats | None
    """Label log-probabilities of the held-out questions, shape (questions, labels)."""


def _export_into(folder: Path, request: Request, progress: Progress) -> dict[str, Any]:
    full = folder / f"full.{request.precision}.gguf"
    measured = _convert_and_measure(full, request, progress)
    gc.collect()  # the torch model is gone: the quantizer is the next to need memory
    setup = measured.served.setup
    gguf = folder / f"{setup.task.name}.gguf"
    text, special = _modelfile(full, gguf.name, measured.served, request)

    progress("quantize", 0, 1)
    made = quantize(
        full, gguf, request.quantization, imatrix=measured.imatrix, threads=default_threads()
    )
    progress("quantize", 1, 1)

    report: dict[str, Any] = {
        "task": setup.task.name,
        "quantization": request.quantization,
        "precision": request.precision,
        "max_flips": request.max_flips,
        "source": measured.source,
        "imatrix_questions": min(len(request.training), _IMATRIX_QUESTIONS),
        "tensors": made.types,
        "fallbacks": made.fallbacks,
    }
    if measured.served.report:
        report["vocabulary"] = measured.served.report
    if measured.reference is not None:
        report["proof"] = {
            **_prove(full, gguf, setup, measured.reference, request, progress),
            "special_in_ollama": special,
        }
    full.unlink()
    learned: dict[str, dict[str, Any]] = {}
    if request.validation:
        report["calibration"], learned = _calibrate(gguf, request, progress)
    write_sections(gguf, {REPORT_KEY: report, **learned})
    report["bytes"] = gguf.stat().st_size
    (folder / "Modelfile").write_text(text, "utf-8")
    (folder / "labels.gbnf").write_text(grammar(setup.task), "utf-8")
    (folder / "task.toml").write_text(setup.task.to_toml(), "utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    card = model_card(setup.task, report, gguf.name)
    (folder / "MODEL_CARD.md").write_text(card, "utf-8")
    return report


def _convert_and_measure(full: Path, request: Request, progress: Progress) -> _Measured:
    """Everything that needs the model in torch: merge, write the GGUF, matrix, reference."""
    progress("merge", 0, 1)
    merged = merge(request.adapter, request.base)
    progress("merge", 1, 1)

    tokenizer = HubTokenizer(merged.tokenizer_folder)
    vocabulary = read_vocabulary(tokenizer, merged.vocabulary_rows)
    setup = _Setup.of(with_codes(request.task, tokenizer), tokenizer)
    served = _served(setup, vocabulary, request)
    training = [setup.rest(question) for question in spread(request.training, _IMATRIX_QUESTIONS)]
    held_out = [setup.rest(question) for question, _ in request.held_out]
    source = _source(request, merged)
    write_gguf(
        full,
        merged.model,
        served.vocabulary,
        task=setup.task,
        chat_template=chat_template(setup.prompt),
        source=source,
        rows=served.rows,
        precision=request.precision,
        progress=lambda done, total: progress("convert", done, total),
    )
    imatrix = reference = None
    if training or held_out:
        replay = TorchReplay(merged.model, setup.prefix, setup.trie)
        if training:
            imatrix = importance_matrix(
                replay, training, lambda done, total: progress("importance matrix", done, total)
            )
        if held_out:
            reference = replay_torch(
                replay,
                setup.trie,
                held_out,
                lambda done, total: progress("prove merged", done, total),
            )
    return _Measured(served, source, imatrix, reference)


def _served(whole: _Setup, vocabulary: Vocabulary, request: Request) -> _Served:
    """Trim the vocabulary, if that is wanted and there is something to leave out."""
    if request.merges is None:
        return _Served(whole, vocabulary)
    texts = [*_PROBES, *request.training]
    needed = {*whole.prefix, *chain(*whole.trie.sequences), *chain(*map(whole.ids, texts))}
    needed |= whole_words(whole.tokenizer, [whole.prompt.text(""), *texts])
    trimmed = trim(whole.tokenizer, needed, request.merges)
    if trimmed is None:
        return _Served(whole, vocabulary)
    cut = _Setup.of(whole.task, trimmed.tokenizer)

    def compared(questions: Sequence[str]) -> dict[str, int]:
        differ = [trimmed.split_otherwise(whole.ids(q), cut.ids(q)) for q in questions]
        return {"questions": len(questions), "split_otherwise": sum(differ)}

    report = {
        "tokens": len(trimmed.rows),
        "of": len(vocabulary.tokens),
        "merges": request.merges,
        "held_out": compared([question for question, _ in request.held_out]),
        "training": compared(request.training),
    }
    kept = read_vocabulary(trimmed.tokenizer, len(trimmed.rows))
    return _Served(cut, kept, trimmed.rows, report)


def _modelfile(full: Path, gguf: str, written: _Served, request: Request) -> tuple[str, int]:
    """The Modelfile, its tokens checked; and how many questions spell a special token."""
    setup = written.setup
    with LlamaModel(full, vocab_only=True) as served:
        prompt, trie = prepare(Bundle.read(full).task, served, str(full))
        if (prompt, trie.sequences, trie.end) != (
            setup.prompt,
            setup.trie.sequences,
            setup.trie.end,
        ):
            raise ExportError(
                "llama.cpp spells the labels otherwise than the tokenizer does: "
                "please report it with the tokenizer's name"
            )
        text = modelfile(
            setup.task,
            setup.prompt,
            gguf=gguf,
            parameters=parameters(setup.prompt, setup.trie, served),
        )
        if written.rows is not None:  # no other program has these tokens: look at all there is
            check_questions(setup.prompt, setup.tokenizer, served, request.training)
        questions = [*_PROBES, *(question for question, _ in request.held_out)]
        return text, check_tokens(setup.prompt, setup.tokenizer, served, text, questions)


def _prove(
    full: Path,
    gguf: Path,
    setup: _Setup,
    reference: Floats,
    request: Request,
    progress: Progress,
) -> dict[str, Any]:
    truth = [label for _, label in request.held_out]
    rests = [setup.rest(question) for question, _ in request.held_out]

    def of_file(path: Path, step: str) -> dict[str, Any]:
        found = replay_gguf(
            path,
            task=setup.task,
            prefix=setup.prefix,
            trie=setup.trie,
            rests=rests,
            threads=default_threads(),
            progress=lambda done, total: progress(f"prove {step}", done, total),
        )
        return quality(found, reference, truth).to_dict()

    return {
        "questions": len(rests),
        "merged": quality(reference, reference, truth).to_dict(),
        "f16": of_file(full, request.precision),
        "quantized": of_file(gguf, request.quantization),
    }


def _calibrate(
    gguf: Path, request: Request, progress: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Calibrate the file on the validation questions: what the report says, what goes inside."""

    def ask(questions: Sequence[Question], step: str) -> Asked:
        return ask_all(gguf, questions, lambda done, total: progress(step, done, total))

    asked = ask(request.validation, "calibrate")
    try:
        fitted = asked.fit()
    except DataError as error:
        return {"refused": str(error)}, {}
    others = [Question(text, label) for text, label in request.held_out]
    held_out = ask(others, "measure confidence") if others else None
    return summary(fitted, asked, held_out), sections(fitted.calibration, asked)


def _source(request: Request, merged: Merged) -> dict[str, Any]:
    packages = ("qcat", "llama-cpp-python", "gguf", "torch", "transformers", "peft")
    return {
        "base": Path(merged.base).resolve().name if Path(merged.base).is_dir() else merged.base,
        "adapter": request.adapter.resolve().name if request.adapter else None,
        "fingerprint": merged.fingerprint,
        "versions": {package: metadata.version(package) for package in packages},
    }
