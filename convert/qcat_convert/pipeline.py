"""Export: the order of the steps, in a temporary folder beside the target, renamed at the end.

The target is whole or absent, also when the process is killed: what a killed export left behind
is cleared away by the next one.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qcat.backends.llama import LlamaModel
from qcat.bundle import REPORT_KEY, Bundle, write_sections
from qcat.classifier import prepare
from qcat.errors import DataError, ExportError
from qcat.files import write_whole
from qcat.grammar import grammar
from qcat.install import versions
from qcat.prompt import (
    QUESTION_ROOM,
    Prompt,
    build_prompt,
    encode_answers,
    encode_segments,
    with_codes,
)
from qcat.task import Task
from qcat.threads import default_threads
from qcat.tokenization import HubTokenizer
from qcat.trie import LabelTrie
from qcat_convert.adapter import ServedBase, served_base, write_adapter
from qcat_convert.apart import apart
from qcat_convert.calibrate import Asked, Question, ask_all, sections, summary
from qcat_convert.card import model_card
from qcat_convert.choose import BESIDE, Trial, choose, kinds_to_make, try_all, within_size
from qcat_convert.merge import Source, fingerprint, is_scales, locate
from qcat_convert.modelfile import chat_template, modelfile, parameters
from qcat_convert.quantize import AUTO, CANDIDATES, quantize
from qcat_convert.stream import Job, Measured, convert, prepare_process
from qcat_convert.trim import trim, whole_words
from qcat_convert.verify import (
    Floats,
    Replayed,
    check_questions,
    check_tokens,
    quality,
    replay_gguf,
    spread,
)
from qcat_convert.vocab import Vocabulary, read_vocabulary
from qcat_convert.writer import Precision

Progress = Callable[[str, int, int], None]
"""Called with a step's name, and how much of it is done of how much."""

Convert = Callable[[Job, Callable[[int, int], None]], Measured]

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
    quantization: str | None = None
    """One of `QUANTIZATIONS`, or `AUTO` (see `qcat_convert.quantize`): the fastest here of
    `CANDIDATES` that changes no more labels than `max_flips`. None: what `kinds_to_make` says."""
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
    beside: bool = False
    """Leave the base as it is, a GGUF, and write the LoRA adapter as a file beside it."""
    max_flips: float = 0.05
    """The largest share of held-out questions that may change their label."""
    max_mb: float | None = None
    """The largest file that may be made, in megabytes; None for any size."""


def export(
    request: Request,
    progress: Progress = lambda step, done, total: None,
    converter: Callable[[], AbstractContextManager[Convert]] = lambda: nullcontext(convert),
) -> dict[str, Any]:
    """Merge, convert, quantize, prove; leave a folder with GGUF, Modelfile, grammar and card.

    Args:
        request: what to export.
        progress: called as the work goes on.
        converter: opens what does the part that needs torch: `convert` itself here; with
            `convert_apart` a process of its own, which begins at once and whose memory is given
            back before the rest.

    Returns:
        The report, as in `report.json`.

    Raises:
        ExportError: with nothing left at the target; after too many flips the report is kept
            beside it as `NAME.report.json`.
    """
    target = request.target
    if target.exists():
        raise ExportError(f"{target}: exists already: remove it or choose another folder")
    scales = request.adapter is not None and is_scales(request.adapter)
    kinds: Sequence[str] = (BESIDE,)
    if not request.beside:
        kinds = kinds_to_make(request.quantization, scales=scales, proved=bool(request.held_out))
    with _working_folder(target) as folder:
        report = _export_into(folder, request, kinds, progress, converter)
        try:
            os.rename(folder, target)
        except OSError as error:
            raise ExportError(f"{target}: cannot be put in place: {error.strerror}") from None
    return report


def convert_apart() -> AbstractContextManager[Convert]:
    """`convert` in a process of its own."""
    return apart(convert, prepare_process)


def _way_out(request: Request, report: Mapping[str, Any]) -> str:
    """What may lose less, and was not tried."""
    ways = []
    if request.merges is not None and report["proof"]["f16"]["flips"]:
        ways.append("--vocab full")
    if report["source"]["method"] != "scales":
        if request.quantization not in (None, AUTO):
            ways.append(f"--quant {AUTO}, which measures {', '.join(CANDIDATES)}")
        if not request.training:
            ways.append("questions for the importance matrix")
    if request.max_mb is not None:
        ways.append("a higher --max-mb")
    return ", or with ".join([*ways, "a higher --max-flips"])


def _tried(report: Mapping[str, Any]) -> str:
    if "choice" not in report:
        return ""
    kinds = ", ".join(trial["kind"] for trial in report["choice"])
    return f"none of {kinds} changes few enough labels; with {report['quantization']} "


def _check_flips(report: Mapping[str, Any], request: Request) -> None:
    """Refuse too many flips before more work is done; the report is kept beside the target."""
    proof = report["proof"]
    flips, questions = proof["quantized"]["flips"], proof["questions"]
    if flips / questions <= request.max_flips:
        return
    kept = request.target.with_name(f"{request.target.name}.report.json")
    write_whole(kept, _json(report).encode())
    before, after = (proof[form]["accuracy"] for form in ("merged", "quantized"))
    raise ExportError(
        f"{_tried(report)}{flips} of {questions} labels changed, more than "
        f"{request.max_flips:.1%}, and accuracy went from {before:.3f} to {after:.3f}: export with "
        f"{_way_out(request, report)}; or train with --method scales, which has nothing to lose; "
        f"the report is {kept}"
    )


def _json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False)


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

    def replay(
        self,
        path: Path,
        rests: Sequence[Sequence[int]],
        *,
        base: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Replayed:
        """Ask a GGUF what `rest` gives; with a `base` it is an adapter that lies beside it."""
        return replay_gguf(
            path,
            task=self.task,
            prefix=self.prefix,
            trie=self.trie,
            rests=rests,
            threads=default_threads(),
            base=base,
            progress=progress,
        )


@dataclass(frozen=True)
class _Served:
    """The vocabulary that the GGUF has: the whole one, or a trimmed one with ids of its own."""

    setup: _Setup
    vocabulary: Vocabulary
    rows: tuple[int, ...] | None = None
    """Of embedding and head that are kept; None for all."""
    report: dict[str, Any] | None = None
    """What was trimmed, and how many questions have other tokens for it."""


def _export_into(
    folder: Path,
    request: Request,
    kinds: Sequence[str],
    progress: Progress,
    converter: Callable[[], AbstractContextManager[Convert]],
) -> dict[str, Any]:
    trials_folder = folder / "trials"  # apart from the bundle's files, which a task may name so too
    trials_folder.mkdir()
    full = trials_folder / f"full.{request.precision}.gguf"
    with converter() as run:
        job, served = prepare_job(full, request)
        measured = run(job, lambda done, total: progress("merge and convert", done, total))
    setup = served.setup
    gguf = folder / f"{setup.task.name}.gguf"
    base = served_base(job.source, folder) if request.beside else None
    text, special = _modelfile(full, gguf.name, served, request, base)

    files = {kind: trials_folder / f"{kind}.gguf" for kind in kinds}
    progress("quantize", 0, len(files))
    made = {}
    for kind, path in files.items():
        if base:
            made[kind] = write_adapter(
                path, job.source, base=base.file, task=setup.task, made_from=job.made_from
            )
        else:
            threads = default_threads()
            made[kind] = quantize(full, path, kind, imatrix=measured.imatrix, threads=threads)
        progress("quantize", len(made), len(files))
    files = within_size(files, request.max_mb)
    proof, trials = None, None
    kind = next(iter(files))
    if measured.reference is not None:
        proof, trials, kind = _prove(
            full, files, setup, measured.reference, request, progress, base and base.path
        )
        proof["special_in_ollama"] = special
    os.replace(files[kind], gguf)
    shutil.rmtree(trials_folder)

    report: dict[str, Any] = {
        "task": setup.task.name,
        "quantization": kind,
        "precision": request.precision,
        "max_flips": request.max_flips,
        "source": job.made_from,
        "imatrix_questions": len(job.training),
        "tensors": made[kind].types,
        "fallbacks": made[kind].fallbacks,
    }
    if served.report:
        report["vocabulary"] = served.report
    if trials:
        report["choice"] = [trial.to_dict() for trial in trials]
    if proof:
        report["proof"] = proof
        _check_flips(report, request)
    learned: dict[str, dict[str, Any]] = {}
    if request.validation:
        report["calibration"], learned = _calibrate(gguf, request, progress)
    write_sections(gguf, {REPORT_KEY: report, **learned})
    report["bytes"] = gguf.stat().st_size
    (folder / "Modelfile").write_text(text, "utf-8")
    (folder / "labels.gbnf").write_text(grammar(setup.task), "utf-8")
    (folder / "task.toml").write_text(setup.task.to_toml(), "utf-8")
    (folder / "report.json").write_text(_json(report), "utf-8")
    card = model_card(setup.task, report, gguf.name)
    (folder / "MODEL_CARD.md").write_text(card, "utf-8")
    return report


def prepare_job(full: Path, request: Request) -> tuple[Job, _Served]:
    """All that is needed to merge and write the model, and what serves it; none takes torch."""
    source = locate(request.adapter, request.base)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(fingerprint, source.folder, source.adapter)  # seconds of work
        tokenizer = HubTokenizer(source.tokenizer_folder)
        vocabulary = read_vocabulary(tokenizer, source.vocabulary_rows)
        setup = _Setup.of(with_codes(request.task, tokenizer), tokenizer)
        served = _served(setup, vocabulary, request)
        # Of an adapter of scales nothing is left to round but the embedding, by itself.
        rounded = not (source.scales or request.beside)
        texts = spread(request.training, _IMATRIX_QUESTIONS) if rounded else ()
        training = [setup.rest(text) for text in texts]
        held_out = [setup.rest(text) for text, _ in request.held_out]
    job = Job(
        source=source,
        target=full,
        precision=request.precision,
        task=setup.task,
        vocabulary=served.vocabulary,
        rows=served.rows,
        chat_template=chat_template(setup.prompt),
        made_from=_made_from(source, hashed.result()),
        prefix=setup.prefix,
        trie=setup.trie,
        training=training,
        held_out=held_out,
    )
    return job, served


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

    held_out = [question for question, _ in request.held_out]
    for question in held_out:
        cut.rest(question)  # now, not after the merge, if smaller tokens do not fit
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
    return _Served(cut, kept, trimmed.rows, report)


def _modelfile(
    full: Path, gguf: str, served: _Served, request: Request, base: ServedBase | None
) -> tuple[str, int]:
    """The Modelfile, its tokens checked; and how many questions spell a special token."""
    setup = served.setup
    with LlamaModel(base.path if base else full, vocab_only=True) as model:
        prompt, trie = prepare(Bundle.read(full).task, model, str(full))
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
            parameters=parameters(setup.prompt, setup.trie, model),
            base=base.in_ollama if base else None,
        )
        if served.rows is not None:  # no other program has these tokens: look at all there is
            check_questions(setup.prompt, setup.tokenizer, model, request.training)
        questions = [*_PROBES, *(question for question, _ in request.held_out)]
        return text, check_tokens(setup.prompt, setup.tokenizer, model, text, questions)


def _prove(
    full: Path,
    files: Mapping[str, Path],
    setup: _Setup,
    reference: Floats,
    request: Request,
    progress: Progress,
    base: Path | None,
) -> tuple[dict[str, Any], list[Trial] | None, str]:
    """The proof; if there are several quantized files, how each did; and the one to keep."""
    truth = [label for _, label in request.held_out]
    rests = [setup.rest(question) for question, _ in request.held_out]

    def ask_each(path: Path, step: str) -> Floats:
        def told(done: int, total: int) -> None:
            progress(f"prove {step}", done, total)

        beside = base if path != full else None
        return setup.replay(path, rests, base=beside, progress=told).log_probabilities

    def ask_some(path: Path, rows: Sequence[int]) -> Replayed:
        return setup.replay(path, [rests[row] for row in rows])

    f16 = ask_each(full, request.precision)
    trials = None
    if len(files) > 1:
        trials, found = try_all(
            files, ask_some, reference, truth, lambda done, total: progress("choose", done, total)
        )
        kind = choose(trials, len(rests), request.max_flips).kind
        quantized = found[kind]
    else:
        [(kind, path)] = files.items()
        quantized = ask_each(path, kind)
    proof = {
        "questions": len(rests),
        "merged": quality(reference, reference, truth).to_dict(),
        "f16": quality(f16, reference, truth).to_dict(),
        "quantized": quality(quantized, reference, truth).to_dict(),
    }
    return proof, trials, kind


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


def _made_from(source: Source, digest: str) -> dict[str, Any]:
    packages = ("llama-cpp-python", "gguf", "torch", "transformers", "peft")
    return {
        "base": Path(source.base).resolve().name if Path(source.base).is_dir() else source.base,
        "adapter": source.adapter.resolve().name if source.adapter else None,
        "layers": source.layers,
        "base_layers": source.base_layers,
        "method": "scales" if source.scales else "lora" if source.adapter else None,
        "fingerprint": digest,
        "versions": versions(*packages),
    }
