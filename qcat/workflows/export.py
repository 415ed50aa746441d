"""Export: runs the steps in a temporary folder beside the target and renames it at the end.

The target is either complete or absent, even if the process is killed. The next export removes
what a killed one left behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from qcat_convert.adapter import ServedBase, served_base, write_adapter
from qcat_convert.apart import apart
from qcat_convert.converter import WholeJob, convert_job
from qcat_convert.quantize import Quantized, quantize
from qcat_convert.source import is_scales
from qcat_convert.stream import Job, Measured, prepare_process

from qcat.backends.llama import LlamaModel
from qcat.data.dataset import Example
from qcat.encoding.agreement import check_questions, check_tokens
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.grammar import grammar
from qcat.errors import DataError, ExportError
from qcat.files import whole_folder
from qcat.gguf.bundle import Bundle
from qcat.gguf.sections import REPORT_KEY, write_sections
from qcat.progress import Count, Progress, silent
from qcat.report.card import model_card
from qcat.report.modelfile import modelfile, parameters, render
from qcat.task import Task
from qcat.threads import default_threads
from qcat.workflows.calibrate import Asked, ask_all, sections, summary
from qcat.workflows.choose import BESIDE, kinds_to_make, within_size
from qcat.workflows.export_job import (
    PROBES,
    Request,
    Served,
    prepare_job,
    read_request,
)
from qcat.workflows.prove import check_flips, prove, report_json
from qcat.workflows.whole_job import find_unknown, for_proof, prepare_whole

Convert = Callable[[Job | WholeJob, Count], Measured]


def export(
    request: Request,
    progress: Progress = silent,
    converter: Callable[[], AbstractContextManager[Convert]] = lambda: nullcontext(convert_job),
) -> dict[str, Any]:
    """Merge, convert, quantize and verify; write a folder with GGUF, Modelfile, grammar and card.

    Args:
        request: what to export.
        progress: called as the work goes on.
        converter: runs the part that needs torch: `convert_job` runs it in this process;
            `convert_apart` starts a separate process at once, whose memory is released before
            the remaining steps.

    Returns:
        The report, as in `report.json`.

    Raises:
        ExportError: the export failed; nothing is left at the target. After too many flips, the
            report is kept beside it as `NAME.report.json`.
    """
    target = request.target
    if target.exists():
        raise ExportError(f"{target}: exists already: remove it or choose another folder")
    scales = request.adapter is not None and is_scales(request.adapter)
    kinds: Sequence[str] = (BESIDE,)
    if not request.beside:
        kinds = kinds_to_make(request.quantization, scales=scales, proved=bool(request.held_out))
    with whole_folder(target, "export", ExportError) as folder:
        return _export_into(folder, request, kinds, progress, converter)


def export_run(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Export what `train` left, or a folder with a PEFT adapter, into a bundle.

    Args:
        run: the folder.
        output: folder to make; it must not exist.
        progress: called as the work goes on.
        options: the arguments of `qcat.workflows.export_job.read_request`.

    Returns:
        The report, as in `report.json`.

    Raises:
        ExportError, TaskError, DataError, ModelError: as `export` and `read_request`.
    """
    return export(read_request(Path(run), Path(output), **options), progress, convert_apart)


def convert_apart() -> AbstractContextManager[Convert]:
    """Run `convert_job` in a separate process."""
    return apart(convert_job, prepare_process)


def _export_into(
    folder: Path,
    request: Request,
    kinds: Sequence[str],
    progress: Progress,
    converter: Callable[[], AbstractContextManager[Convert]],
) -> dict[str, Any]:
    trials_folder = folder / "trials"  # so that it cannot collide with the bundle's files
    trials_folder.mkdir()
    full = trials_folder / f"full.{request.precision}.gguf"
    unknown = find_unknown(request)
    if unknown:
        request = for_proof(request)
    with converter() as run:
        job, served = (
            prepare_whole(full, request, unknown) if unknown else prepare_job(full, request)
        )
        measured = run(job, partial(progress, "merge and convert"))
    task = served.encoded.task
    gguf = folder / f"{task.name}.gguf"
    base = served_base(job.source, folder) if request.beside and isinstance(job, Job) else None
    text, special = _modelfile(full, gguf.name, served, request, base)

    files, made = _quantize(full, kinds, job, measured, base, progress)
    files = within_size(files, request.max_mb)
    proof, trials = None, None
    kind = next(iter(files))
    if measured.reference is not None:
        proof, trials, kind = prove(
            full, files, served.encoded, measured.reference, request, progress, base and base.path
        )
        proof["special_in_ollama"] = special
    os.replace(files[kind], gguf)
    shutil.rmtree(trials_folder)

    report: dict[str, Any] = {
        "task": task.name,
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
        check_flips(report, request)
    _finish(folder, gguf, task, report, text, request, progress)
    return report


def _quantize(
    full: Path,
    kinds: Sequence[str],
    job: Job | WholeJob,
    measured: Measured,
    base: ServedBase | None,
    progress: Progress,
) -> tuple[dict[str, Path], dict[str, Quantized]]:
    """Make the files to choose from; with a base, the only file is an adapter beside it."""
    files = {kind: full.with_name(f"{kind}.gguf") for kind in kinds}
    made = {}
    progress("quantize", 0, len(files))
    for kind, path in files.items():
        if base and isinstance(job, Job):
            made[kind] = write_adapter(
                path, job.source, base=base.file, task=job.task, made_from=job.made_from
            )
        else:
            threads = default_threads()
            made[kind] = quantize(full, path, kind, imatrix=measured.imatrix, threads=threads)
        progress("quantize", len(made), len(files))
    return files, made


def _finish(
    folder: Path,
    gguf: Path,
    task: Task,
    report: dict[str, Any],
    modelfile: str,
    request: Request,
    progress: Progress,
) -> None:
    """Calibrate, complete the report, and write the files beside the GGUF."""
    learned: dict[str, dict[str, Any]] = {}
    if request.validation:
        report["calibration"], learned = _calibrate(gguf, request, progress)
    write_sections(gguf, {REPORT_KEY: report, **learned})
    report["bytes"] = gguf.stat().st_size
    texts = {
        "Modelfile": modelfile,
        "labels.gbnf": grammar(task),
        "task.toml": task.to_toml(),
        "report.json": report_json(report),
        "MODEL_CARD.md": model_card(task, report, gguf.name),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")


def _modelfile(
    full: Path, gguf: str, served: Served, request: Request, base: ServedBase | None
) -> tuple[str, int]:
    """The checked Modelfile, and how many questions spell a special token."""
    encoded = served.encoded
    with LlamaModel(base.path if base else full, vocab_only=True) as model:
        runtime = EncodedTask.served(Bundle.read(full).task, model, str(full))
        if _spelled(runtime) != _spelled(encoded):
            raise ExportError(
                "llama.cpp spells the labels otherwise than the tokenizer does: "
                "please report it with the tokenizer's name"
            )
        text = modelfile(
            encoded.task,
            encoded.prompt,
            gguf=gguf,
            parameters=parameters(runtime, model),
            base=base.in_ollama if base else None,
        )
        check_questions(encoded.prompt, served.tokenizer, model, served.compared)
        questions = [*PROBES, *(example.text for example in request.held_out)]
        special = check_tokens(
            encoded.prompt, served.tokenizer, model, partial(render, text), questions
        )
        return text, special


def _spelled(encoded: EncodedTask) -> tuple[Any, ...]:
    return encoded.prompt, encoded.trie.sequences, encoded.trie.end


def _calibrate(
    gguf: Path, request: Request, progress: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Calibrate the file on the validation questions; return its report and metadata."""

    def ask(questions: Sequence[Example], step: str) -> Asked:
        return ask_all(gguf, questions, partial(progress, step))

    asked = ask(request.validation, "calibrate")
    try:
        fitted = asked.fit()
    except DataError as error:
        return {"refused": str(error)}, {}
    held_out = ask(request.held_out, "measure confidence") if request.held_out else None
    return summary(fitted, asked, held_out), sections(fitted.calibration, asked)
