"""The request for an export, and everything derived from it before anything is merged or written.

These are the task as tokens, the GGUF's vocabulary, and the converter's job, as plain data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qcat_convert.gate import Fitted, check_base, check_weights
from qcat_convert.source import fingerprint, locate
from qcat_convert.stream import Job
from qcat_convert.trim import trim, whole_words
from qcat_convert.vocab import Vocabulary, read_vocabulary
from qcat_convert.writer import Precision

from qcat.data.dataset import Example, read_examples
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError
from qcat.evaluation.proof import spread
from qcat.install import versions
from qcat.report.modelfile import chat_template
from qcat.task import Task

PROBES = ("When was it replaced?", "12 'é'…", "ok")
"""Questions for comparing tokens even without data."""
_IMATRIX_QUESTIONS = 512  # more questions change the matrix by less than the quantizer's own noise


@dataclass(frozen=True)
class Request:
    """What to export."""

    task: Task
    target: Path
    """The folder to make; it must not exist."""
    adapter: Path | None = None
    """PEFT folder; None exports the base as it is."""
    base: str | None = None
    """Local folder or hub name; None uses the one named in the adapter."""
    quantization: str | None = None
    """One of `QUANTIZATIONS`, or `AUTO` (see `qcat_convert.quantize`): the fastest of
    `CANDIDATES` on this machine within `max_flips`. None: the default of `kinds_to_make`."""
    precision: Precision = "f16"
    """Of the GGUF that is quantized."""
    merges: int | None = None
    """Trim the vocabulary to this many of its first merges, the words of the texts' language, and
    the tokens that the task and its training questions need; None keeps all tokens."""
    held_out: tuple[Example, ...] = ()
    """Questions for the verification."""
    validation: tuple[Example, ...] = ()
    """Questions for the calibration; they may have been used to choose the epoch."""
    training: tuple[str, ...] = ()
    """Questions (cleaned) for the importance matrix."""
    beside: bool = False
    """Leave the GGUF base unchanged, and write the LoRA adapter as a file beside it."""
    converter: Path | None = None
    """Source tree of llama.cpp, whose converter is used where qcat's does not know the
    architecture."""
    max_flips: float = 0.05
    """The largest share of held-out questions whose label may change."""
    max_mb: float | None = None
    """The largest allowed file, in megabytes; None for no limit."""


def read_request(
    run: Path,
    output: Path,
    *,
    task: str | os.PathLike[str] | None = None,
    base: str | None = None,
    data: str | os.PathLike[str] | None = None,
    train_data: str | os.PathLike[str] | None = None,
    validation_data: str | os.PathLike[str] | None = None,
    quantization: str | None = None,
    beside: bool = False,
    precision: Precision = "f16",
    merges: int | None = None,
    converter: str | os.PathLike[str] | None = None,
    max_flips: float = 0.05,
    max_mb: float | None = None,
) -> Request:
    """What to export; files that are not given are taken from the run.

    Args:
        run: folder that `train` wrote, or one with a PEFT adapter or a checkpoint.
        output: folder to make.
        task: path of the task.toml.
        base: a folder, a hub name, a GGUF file, or `ollama:NAME`; None for the adapter's own base.
        data: held-out questions.
        train_data: the questions it was trained on.
        validation_data: the questions for the calibration.
        quantization: see `Request`.
        beside: see `Request`.
        precision: see `Request`.
        merges: see `Request`.
        converter: see `Request`.
        max_flips: see `Request`.
        max_mb: see `Request`.

    Raises:
        ExportError, TaskError, DataError: the folder holds no finished run, or a file is missing
            or damaged.
    """
    if not run.is_dir():
        raise ExportError(f"{run}: no such folder: name the one that holds the adapter")
    if (run / "plan.json").is_file() and not (run / "run.json").is_file():
        raise ExportError(f"{run}: its training is unfinished: rerun the same `qcat train`")
    has_adapter = (run / "adapter_config.json").is_file()
    if not has_adapter and not (run / "config.json").is_file():
        below = sorted(path.parent for path in run.glob("*/adapter_config.json"))
        raise ExportError(
            f"{run}: holds neither adapter_config.json nor config.json: name "
            + (
                f"one of the folders below that do, such as {below[-1]}"
                if below
                else "the folder that save_pretrained wrote"
            )
        )
    decided = Task.read(Path(task) if task else run / "task.toml")
    held_out = _examples(data, run / "test.jsonl", decided)
    training = _examples(train_data, run / "train.jsonl", decided)
    validation = _examples(validation_data, run / "validation.jsonl", decided)
    return Request(
        task=decided,
        target=output,
        adapter=run if has_adapter else None,
        base=base if has_adapter else base or str(run),
        quantization=quantization,
        beside=beside,
        precision=precision,
        merges=merges,
        converter=Path(converter) if converter else None,
        held_out=tuple(held_out),
        validation=tuple(validation),
        training=tuple(example.text for example in training),
        max_flips=max_flips,
        max_mb=max_mb,
    )


def _examples(named: str | os.PathLike[str] | None, default: Path, task: Task) -> list[Example]:
    path = Path(named) if named else default if default.is_file() else None
    return read_examples(path, task) if path else []


@dataclass(frozen=True)
class Served:
    """The GGUF's vocabulary: the full one, or a trimmed one with its own ids."""

    encoded: EncodedTask
    tokenizer: HubTokenizer
    rows: tuple[int, ...] | None = None
    """The rows of embedding and head to keep; None for all."""
    report: dict[str, Any] | None = None
    """What was trimmed, and how many questions have different tokens as a result."""
    compared: tuple[str, ...] = ()
    """Texts for which tokenizer and file must give the same tokens, besides the held-out questions:
    of a vocabulary that no other program has, or that qcat does not know."""


def prepare_job(full: Path, request: Request) -> tuple[Job, Served]:
    """Everything needed to merge, write and serve the model; this does not load torch."""
    source = locate(request.adapter, request.base)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(fingerprint, source.folder, source.adapter)  # takes seconds
        check_weights(source.folder, source.layers)
        fitted = check_base(
            source.folder,
            request.task,
            tokenizer_folder=source.tokenizer_folder,
            rows=source.vocabulary_rows,
        )
        encoded = fitted.encoded
        served, vocabulary = _served(fitted, request)
        # With an adapter of scales, at most the embedding is left to round, separately.
        rounded = not (source.scales or request.beside)
        texts = spread(request.training, _IMATRIX_QUESTIONS) if rounded else ()
        training = [encoded.rest(text) for text in texts]
        held_out = [encoded.rest(example.text) for example in request.held_out]
    job = Job(
        source=source,
        target=full,
        precision=request.precision,
        task=encoded.task,
        vocabulary=vocabulary,
        rows=served.rows,
        chat_template=chat_template(encoded.prompt),
        made_from=made_from(
            source.base,
            source.adapter,
            "scales" if source.scales else "lora" if source.adapter else None,
            hashed.result(),
            layers=source.layers,
            base_layers=source.base_layers,
        ),
        prefix=list(encoded.prefix),
        trie=encoded.trie,
        training=training,
        held_out=held_out,
    )
    return job, served


def _served(fitted: Fitted, request: Request) -> tuple[Served, Vocabulary]:
    """Trim the vocabulary, if requested and if any token can be left out."""
    whole, tokenizer, vocabulary = fitted.encoded, fitted.tokenizer, fitted.vocabulary
    if request.merges is None:
        return Served(whole, tokenizer), vocabulary
    texts = [*PROBES, *request.training]
    needed = {*whole.prefix, *chain(*whole.trie.sequences), *chain(*map(whole.ids, texts))}
    needed |= whole_words(tokenizer, [whole.prompt.text(""), *texts])
    trimmed = trim(tokenizer, needed, request.merges)
    if trimmed is None:
        return Served(whole, tokenizer), vocabulary
    cut = EncodedTask.build(whole.task, trimmed.tokenizer)

    def compared(questions: Sequence[str]) -> dict[str, int]:
        differ = [trimmed.split_otherwise(whole.ids(q), cut.ids(q)) for q in questions]
        return {"questions": len(questions), "split_otherwise": sum(differ)}

    held_out = [example.text for example in request.held_out]
    for question in held_out:
        cut.rest(question)  # fails now and not after the merge, if smaller tokens do not fit
    trained = compared(request.training)
    report = {
        "tokens": len(trimmed.rows),
        "of": len(vocabulary.tokens),
        "merges": request.merges,
        "held_out": compared(held_out),
        "training": trained,
    }
    if (
        trained["split_otherwise"]
        or trimmed.split_otherwise(whole.prefix, cut.prefix)
        or any(map(trimmed.split_otherwise, whole.trie.sequences, cut.trie.sequences))
    ):
        raise ExportError(
            "the trimmed vocabulary spells prompt, labels or training questions otherwise: "
            "export with --vocab full, and please report it with the tokenizer's name"
        )
    kept = read_vocabulary(trimmed.tokenizer, len(trimmed.rows))
    return Served(cut, trimmed.tokenizer, trimmed.rows, report, request.training), kept


def made_from(
    base: str, adapter: Path | None, method: str | None, digest: str, **more: Any
) -> dict[str, Any]:
    """What a GGUF was made from, for its metadata: the names of local folders without their paths.

    Args:
        base: as the user or the adapter named it.
        adapter: its folder, if there is one.
        method: which weights were trained; None for an untrained base.
        digest: fingerprint of the weights.
        more: further entries.
    """
    return {
        "base": Path(base).resolve().name if Path(base).exists() else base,
        "adapter": adapter.resolve().name if adapter else None,
        "method": method,
        "fingerprint": digest,
        **more,
        "versions": versions("llama-cpp-python", "gguf", "torch", "transformers", "peft"),
    }
