"""The model card: `report.json` as a page for people, and for the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcat.calibration.reliability import FIGURES
from qcat.report.templating import template
from qcat.task import Task

FORMS = {"merged": "merged (torch, float32)", "f16": "GGUF before quantizing", "quantized": "GGUF"}


def quality_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The proof's table, heading first, as text cells."""
    count = report["proof"]["questions"]
    rows: list[tuple[str, ...]] = [
        ("model", "accuracy", "macro-F1", "flips", "mean KL", "largest KL")
    ]
    for form, name in FORMS.items():
        found = report["proof"][form]
        shown = report["quantization"] if form == "quantized" else None
        if shown == "beside":
            shown, name = None, "GGUF base as it is, adapter beside it"
        rows.append(
            (
                f"{shown} {name}" if shown else name,
                f"{found['accuracy']:.3f}",
                f"{found['macro_f1']:.3f}",
                f"{found['flips']} of {count}",
                f"{found['kl_mean']:.2g}",
                f"{found['kl_max']:.2g}",
            )
        )
    return rows


def choice_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of `--quant auto`, heading first, as text cells."""
    rows: list[tuple[str, ...]] = [
        ("quantization", "MB", "ms a question", "flips", "accuracy", "mean KL", "")
    ]
    for trial in report["choice"]:
        rows.append(
            (
                trial["kind"],
                f"{trial['bytes'] / 1e6:.1f}",
                f"{trial['median_ms']:.1f}",
                f"{trial['flips']} of {report['proof']['questions']}",
                f"{trial['accuracy']:.3f}",
                f"{trial['kl_mean']:.2g}",
                "kept" if trial["kind"] == report["quantization"] else "",
            )
        )
    return rows


def model_card(task: Task, report: Mapping[str, Any], gguf: str) -> str:
    """`MODEL_CARD.md` for an exported bundle, with the header that the Hugging Face hub reads.

    Args:
        task: what the model decides.
        report: as in `report.json`, with the size of the file.
        gguf: the file's name.
    """
    source, calibration = report["source"], report.get("calibration")
    proof = report.get("proof")
    calibrated = calibration is not None and "after" in calibration
    if calibration is None:
        calibration = {"refused": "no validation questions were given at export"}
    vocabulary = report.get("vocabulary")
    text: str = template("model_card.md.j2", html=False).render(
        header=_hub_header(task, report),
        table=lambda rows: "\n".join(_markdown(rows)),
        pairs=lambda items: ", ".join(f"{name} {value}" for name, value in items.items()),
        counts=_counts,
        task=task,
        report=report,
        source=source,
        gguf=gguf,
        layers=layers_text(source),
        vocabulary=vocabulary_line(vocabulary) if vocabulary else None,
        calibration=calibration,
        reason=None if calibrated else calibration["refused"],
        calibration_line=_capitalized(calibration_line(calibration)) if calibrated else None,
        figures=_figures(calibration) if calibrated else None,
        bins=_bins(calibration["after"]) if calibrated else None,
        proof=proof,
        quality=quality_rows(report) if proof else None,
        choices=choice_rows(report) if proof and "choice" in report else None,
    )
    return text


def _hub_header(task: Task, report: Mapping[str, Any]) -> str:
    """The card's metadata as YAML: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import EvalResult, ModelCardData

    base = report["source"]["base"]
    proof = report.get("proof")
    figures = proof["quantized"] if proof else {}
    data = ModelCardData(
        # A hub name is owner/name; a folder's or a file's name means nothing there.
        base_model=base if _is_hub_name(base) else None,
        # The adapter's is the user's to choose, the base's is that of the base.
        license="other",
        license_name="that-of-the-base-model",
        library_name="qcat",
        pipeline_tag="text-classification",
        tags=["gguf", "llama.cpp", "ollama"],
        model_name=task.name if proof else None,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=task.name,
                dataset_name=f"{task.name}, {proof['questions']} held-out questions",
                metric_type=kind,
                metric_value=round(figures[key], 4),
            )
            for kind, key in (("accuracy", "accuracy"), ("f1", "macro_f1"))
        ]
        if proof
        else None,
    )
    return str(data.to_yaml()).strip()


def layers_text(source: Mapping[str, Any]) -> str:
    """How many layers of its base a model has; all if nothing is recorded."""
    if "layers" not in source:
        return "all of the base"
    kept, whole = source["layers"], source["base_layers"]
    if kept == whole:
        return f"all {whole} of the base"
    return f"the first {kept} of the base's {whole}"


def vocabulary_line(found: Mapping[str, Any]) -> str:
    """The report's trimmed vocabulary in one line."""
    parts = ", ".join(
        f"{found[key]['split_otherwise']} of {found[key]['questions']} {name} questions"
        for key, name in (("held_out", "held-out"), ("training", "training"))
    )
    return (
        f"{found['tokens']:,} of {found['of']:,} tokens kept, with the first {found['merges']:,} "
        f"merges; split otherwise for it: {parts}"
    )


def calibration_line(found: Mapping[str, Any]) -> str:
    """The report's calibration in one line."""
    low, high = found["temperature_interval"]
    before, after = found["before"], found["after"]
    return (
        f"temperature {found['temperature']:.2f} (95 %: {low:.2f}–{high:.2f}) from "
        f"{found['questions']} validation questions; expected calibration error "
        f"{before['ece']:.3f} before, {after['ece']:.3f} after"
    )


def _is_hub_name(base: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not base.lower().endswith(".gguf")


def _counts(numbers: Mapping[str, int], between: str = " ") -> str:
    return ", ".join(f"{count}{between}{kind}" for kind, count in numbers.items())


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _figures(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    for key, name in FIGURES.items():
        rows.append((name, *(f"{found[when][key]:.3f}" for when in ("before", "after"))))
    return rows


def _bins(after: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("questions", "mean confidence", "answered right")]
    for one in after["bins"]:
        rows.append((str(one["questions"]), f"{one['confidence']:.3f}", f"{one['accuracy']:.3f}"))
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{'---|' * len(rows[0])}", *body]
