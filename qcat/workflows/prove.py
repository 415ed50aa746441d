"""Verifies an export: which file is kept, and whether it changes few enough labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qcat_convert.quantize import AUTO, CANDIDATES

from qcat.encoding.encoded import EncodedTask
from qcat.encoding.scoring import Floats
from qcat.errors import ExportError
from qcat.evaluation.proof import Replayed, quality, replay_gguf
from qcat.files import write_whole
from qcat.progress import Progress
from qcat.workflows.choose import Trial, choose, try_all
from qcat.workflows.export_job import Request


def prove(
    full: Path,
    files: Mapping[str, Path],
    encoded: EncodedTask,
    reference: Floats,
    request: Request,
    progress: Progress,
    base: Path | None,
) -> tuple[dict[str, Any], list[Trial] | None, str]:
    """Ask the held-out questions, and choose one if there are several quantized files.

    Args:
        full: the unquantized GGUF.
        files: the quantized files by their kind.
        encoded: the task in the files' tokens.
        reference: label log-probabilities of the merged model in torch, shape (questions, labels).
        request: what is exported, with the questions.
        progress: called as the work goes on.
        base: the base of the files, if they are adapters.

    Returns:
        The verification's results; if there are several files, the results of each; and the kind
        to keep.
    """
    truth = [example.label for example in request.held_out]
    rests = [encoded.rest(example.text) for example in request.held_out]

    def ask_each(path: Path, step: str) -> Floats:
        beside = base if path != full else None
        count = partial(progress, f"prove {step}")
        return replay_gguf(path, encoded, rests, base=beside, progress=count).log_probabilities

    def ask_some(path: Path, rows: Sequence[int]) -> Replayed:
        return replay_gguf(path, encoded, [rests[row] for row in rows])

    f16 = ask_each(full, request.precision)
    trials = None
    if len(files) > 1:
        trials, answers = try_all(files, ask_some, reference, truth, partial(progress, "choose"))
        kind = choose(trials, len(rests), request.max_flips).kind
        quantized = answers[kind]
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


def check_flips(report: Mapping[str, Any], request: Request) -> None:
    """Fail on too many flips before more work is done; the report is kept beside the target."""
    proof = report["proof"]
    flips, questions = proof["quantized"]["flips"], proof["questions"]
    if flips / questions <= request.max_flips:
        return
    kept = request.target.with_name(f"{request.target.name}.report.json")
    write_whole(kept, report_json(report).encode())
    before, after = (proof[form]["accuracy"] for form in ("merged", "quantized"))
    raise ExportError(
        f"{_tried(report)}{flips} of {questions} labels changed, more than "
        f"{request.max_flips:.1%}, and accuracy went from {before:.3f} to {after:.3f}: export with "
        f"{_way_out(request, report)}; the report is {kept}"
    )


def _way_out(request: Request, report: Mapping[str, Any]) -> str:
    """Options that may lose less and were not tried."""
    ways, foreign = [], "converter" in report["source"]
    if request.merges is not None and report["proof"]["f16"]["flips"]:
        ways.append("--vocab full")
    if report["source"]["method"] != "scales":
        if request.quantization not in (None, AUTO):
            ways.append(f"--quant {AUTO}, which measures {', '.join(CANDIDATES)}")
        if not (request.training or foreign):
            ways.append("questions for the importance matrix")
    if request.max_mb is not None:
        ways.append("a higher --max-mb")
    text = ", or with ".join([*ways, "a higher --max-flips"])
    if foreign:
        return text
    return f"{text}; or train with --method scales, which has nothing to lose"


def _tried(report: Mapping[str, Any]) -> str:
    if "choice" not in report:
        return ""
    kinds = ", ".join(trial["kind"] for trial in report["choice"])
    return f"none of {kinds} changes few enough labels; with {report['quantization']} "


def report_json(report: Mapping[str, Any]) -> str:
    """The report in the form of `report.json`."""
    return json.dumps(report, indent=1, ensure_ascii=False)
