"""The model card: `report.json` as a page for people. Pure text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcat.calibration.reliability import FIGURES
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
    """`MODEL_CARD.md` for an exported bundle."""
    source, trimmed = report["source"], "vocabulary" in report
    lines = [
        f"# {task.name}",
        "",
        f"Puts a question into one of {len(task.labels)} categories. {report['quantization']} "
        f"GGUF, {report['bytes'] / 1e6:.1f} MB, made by qcat {source['versions']['qcat']}.",
        "",
        "```sh",
        f'qcat ask -m {gguf} "…"',
        f"ollama create {task.name} -f Modelfile",
        "```",
        "",
        "## Categories",
        "",
        *(f"- {label}: {text}" if text else f"- {label}" for label, text in task.labels.items()),
        "",
        "## Where it comes from",
        "",
        f"- base: {source['base']}",
        f"- adapter: {source['adapter'] or 'none'}",
        f"- layers: {layers_text(source)}",
        f"- SHA-256 of the source weights: `{source['fingerprint']}`",
        "- made with " + ", ".join(f"{name} {v}" for name, v in source["versions"].items()),
        "- importance matrix: "
        + (
            f"from {report['imatrix_questions']} questions"
            if report["imatrix_questions"]
            else "none"
        ),
        *([f"- vocabulary: {vocabulary_line(report['vocabulary'])}"] if trimmed else []),
        "- tensors: " + ", ".join(f"{n} {kind}" for kind, n in report["tensors"].items()),
    ]
    if report["fallbacks"]:
        lines.append(
            "- quantized otherwise because of their row length: "
            + ", ".join(f"{n} as {kind}" for kind, n in report["fallbacks"].items())
        )
    lines += ["", "## Confidence", "", *_confidence(report.get("calibration"))]
    lines += ["", "## Proof", ""]
    if not report.get("proof"):
        lines.append("Not proved: no held-out questions were given at export.")
        return "\n".join([*lines, ""])
    lines += _markdown(quality_rows(report))
    lines += [
        "",
        "Flips are questions that get another label than from the merged model; KL is the "
        "divergence of the label distributions from its, in nats. "
        f"{'In the kept tokens training' if trimmed else 'Training'} prompt, runtime "
        f"prompt and Modelfile gave the same tokens for all {report['proof']['questions']} "
        "questions.",
    ]
    if "choice" in report:
        lines += [
            "",
            "The quantization was chosen as the fastest on the machine of the export that changes "
            f"at most {report['max_flips']:.1%} of the labels (median time, files taking turns):",
            "",
            *_markdown(choice_rows(report)),
            "",
        ]
    if report["proof"]["special_in_ollama"]:
        lines.append(
            f"{report['proof']['special_in_ollama']} of them spell a special token, which Ollama "
            "reads as one; qcat reads it as text."
        )
    return "\n".join([*lines, ""])


def layers_text(source: Mapping[str, Any]) -> str:
    """How many layers of its base a model has."""
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


def _confidence(found: Mapping[str, Any] | None) -> list[str]:
    if found is None or "after" not in found:
        reason = found["refused"] if found else "no validation questions were given at export"
        return [f"Not calibrated: {reason}."]
    lines = [f"{calibration_line(found)[0].upper()}{calibration_line(found)[1:]}."]
    if found["refused"]:
        lines.append(f"Not scaled: {found['refused']}.")
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    for key, name in FIGURES.items():
        rows.append((name, *(f"{found[when][key]:.3f}" for when in ("before", "after"))))
    after = found["after"]
    bins = [("questions", "mean confidence", "answered right")]
    for b in after["bins"]:
        bins.append((str(b["questions"]), f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}"))
    lines += ["", *_markdown(rows), ""]
    lines += [
        f"Measured on {after['questions']} questions ({found['measured_on']}). Reliability after, "
        "questions of like confidence by row:",
        "",
        *_markdown(bins),
    ]
    return lines


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{'---|' * len(rows[0])}", *body]
