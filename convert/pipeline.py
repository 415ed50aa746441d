"""Export: the order of the steps, in a temporary folder beside the target, renamed at the end.

The target is whole or absent, also when the process is killed: what a killed export left behind
is cleared away by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from convert.card import model_card
from convert.imatrix import importance_matrix
from convert.merge import Merged, merge
from convert.modelfile import chat_template, modelfile
from convert.quantize import quantize
from convert.replay import TorchReplay
from convert.verify import check_tokens, quality, replay_gguf, replay_torch
from convert.vocab import read_vocabulary
from convert.writer import Precision, write_gguf
from qcat.backends.llama import LlamaModel, default_threads
from qcat.bundle import REPORT_KEY, Bundle, write_section
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
    held_out: tuple[tuple[str, int], ...] = ()
    """Questions (cleaned) and right labels for the proof."""
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
                f"labels changed, more than {request.max_flips:.1%}: try --quant q5_k_m or q8_0, "
                f"or questions for the importance matrix; the report is {kept}"
            )
        try:
            os.rename(folder, target)
        except OSError as error:
            raise ExportError(f"{target}: cannot be put in place: {error.strerror}") from None
    return report


def _flip_share(report: Mapping[str, Any]) -> float:
    proof = report.get("proof")
    return proof["quantized"]["flips"] / proof["questions"] if proof else 0.0


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, with older ones of killed exports removed.

    A lock, freed by the system when its process dies, keeps two exports to one target apart.
    """
    from filelock import FileLock, Timeout

    target = target.absolute()
    name = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"qcat-{os.getuid()}-{name}.lock", blocking=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            for stale in target.parent.glob(f".{target.name}.export-*"):
                shutil.rmtree(stale, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.export-", dir=target.parent))
            try:
                folder.chmod(0o755)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        raise ExportError(f"{target}: another export is writing it: wait for it") from None
    except OSError as error:
        raise ExportError(
            f"{error.filename or target}: {error.strerror or error}: "
            "make room, or choose another folder"
        ) from None


def _export_into(folder: Path, request: Request, progress: Progress) -> dict[str, Any]:
    threads = default_threads()

    progress("merge", 0, 1)
    merged = merge(request.adapter, request.base)
    progress("merge", 1, 1)

    tokenizer = HubTokenizer(merged.tokenizer_folder)
    vocabulary = read_vocabulary(tokenizer, merged.vocabulary_rows)
    task = with_codes(request.task, tokenizer)
    prompt = build_prompt(task, tokenizer)
    prefix = encode_segments(prompt.prefix, tokenizer)
    trie = LabelTrie.build(encode_answers(task, tokenizer), tokenizer.end)
    source = _source(request, merged)

    gguf = folder / f"{task.name}.gguf"
    full = folder / f"{task.name}.{request.precision}.gguf"
    write_gguf(
        full,
        merged.model,
        vocabulary,
        task=task,
        chat_template=chat_template(prompt),
        source=source,
        precision=request.precision,
        progress=lambda done, total: progress("convert", done, total),
    )
    replay = (
        TorchReplay(merged.model, prefix, trie) if request.training or request.held_out else None
    )
    chosen = _spread(request.training, _IMATRIX_QUESTIONS)
    imatrix = (
        importance_matrix(
            replay,
            [_rest(prompt, tokenizer, question) for question in chosen],
            lambda done, total: progress("importance matrix", done, total),
        )
        if replay and chosen
        else None
    )
    progress("quantize", 0, 1)
    made = quantize(full, gguf, request.quantization, imatrix=imatrix, threads=threads)
    progress("quantize", 1, 1)

    with LlamaModel(gguf, vocab_only=True) as served:
        prepare(Bundle.read(gguf), served)
        end = served.decode([tokenizer.end])
        text = modelfile(
            task,
            prompt,
            gguf=gguf.name,
            n_prefix=len(prefix),
            n_answer=max(len(sequence) for sequence in trie.sequences),
            end=end,
        )
        special = check_tokens(
            prompt, tokenizer, served, text, [question for question, _ in request.held_out]
        )
    (folder / "Modelfile").write_text(text, "utf-8")
    (folder / "labels.gbnf").write_text(grammar(task), "utf-8")
    (folder / "task.toml").write_text(task.to_toml(), "utf-8")

    report: dict[str, Any] = {
        "task": task.name,
        "quantization": request.quantization,
        "source": source,
        "imatrix_questions": len(chosen),
        "tensors": made.types,
        "fallbacks": made.fallbacks,
    }
    if replay and request.held_out:
        report["proof"] = _prove(
            request, replay, task, prompt, tokenizer, trie, full, gguf, progress
        )
        report["proof"]["special_in_ollama"] = special
    full.unlink()
    write_section(gguf, REPORT_KEY, report)
    report["bytes"] = gguf.stat().st_size
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    (folder / "MODEL_CARD.md").write_text(model_card(task, report, gguf.name), "utf-8")
    return report


def _prove(
    request: Request,
    replay: TorchReplay,
    task: Task,
    prompt: Prompt,
    tokenizer: HubTokenizer,
    trie: LabelTrie,
    full: Path,
    gguf: Path,
    progress: Progress,
) -> dict[str, Any]:
    truth = [label for _, label in request.held_out]
    rests = [_rest(prompt, tokenizer, question) for question, _ in request.held_out]
    reference = replay_torch(
        replay, trie, rests, lambda done, total: progress("prove merged", done, total)
    )

    def of_file(path: Path, step: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return replay_gguf(
            path,
            task=task,
            prefix=encode_segments(prompt.prefix, tokenizer),
            trie=trie,
            rests=rests,
            threads=default_threads(),
            progress=lambda done, total: progress(step, done, total),
        )

    return {
        "questions": len(rests),
        "merged": quality(reference, reference, truth).to_dict(),
        "f16": quality(of_file(full, "prove f16"), reference, truth).to_dict(),
        "quantized": quality(
            of_file(gguf, f"prove {request.quantization}"), reference, truth
        ).to_dict(),
    }


def _rest(prompt: Prompt, tokenizer: HubTokenizer, question: str) -> list[int]:
    ids = encode_segments(prompt.rest(question), tokenizer)
    if len(ids) > QUESTION_ROOM:
        raise DataError(
            f"question {question[:60]!r}…: {len(ids)} tokens, room for {QUESTION_ROOM}: shorten it"
        )
    return ids


def _spread(questions: tuple[str, ...], most: int) -> tuple[str, ...]:
    """At most `most` of the questions, evenly spaced, so that sorted files give all labels."""
    step = max(1.0, len(questions) / most)
    return tuple(questions[int(i * step)] for i in range(min(most, len(questions))))


def _source(request: Request, merged: Merged) -> dict[str, Any]:
    packages = ("qcat", "llama-cpp-python", "gguf", "torch", "transformers", "peft")
    return {
        "base": Path(merged.base).name if Path(merged.base).is_dir() else merged.base,
        "adapter": request.adapter.name if request.adapter else None,
        "fingerprint": merged.fingerprint,
        "versions": {package: metadata.version(package) for package in packages},
    }
