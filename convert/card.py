"""The model card: `report.json` as a page for people. Pure text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def model_card(task: Task, report: Mapping[str, Any], gguf: str) -> str:
    """`MODEL_CARD.md` for an exported bundle."""
    source = report["source"]
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
        f"- SHA-256 of the source weights: `{source['fingerprint']}`",
        "- made with " + ", ".join(f"{name} {v}" for name, v in source["versions"].items()),
        "- importance matrix: "
        + (
            f"from {report['imatrix_questions']} questions"
            if report["imatrix_questions"]
            else "none"
        ),
        "- tensors: " + ", ".join(f"{n} {kind}" for kind, n in report["tensors"].items()),
    ]
    if report["fallbacks"]:
        lines.append(
            "- quantized otherwise because of their row length: "
            + ", ".join(f"{n} as {kind}" for kind, n in report["fallbacks"].items())
        )
    lines += ["", "## Proof", ""]
    if not report.get("proof"):
        lines.append("Not proved: no held-out questions were given at export.")
        return "\n".join([*lines, ""])
    head, *rows = quality_rows(report)
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        "Flips are questions that get another label than from the merged model; KL is the "
        "divergence of the label distributions from its, in nats. Training prompt, runtime "
        f"prompt and Modelfile gave the same tokens for all {report['proof']['questions']} "
        "questions.",
    ]
    if report["proof"]["special_in_ollama"]:
        lines.append(
            f"{report['proof']['special_in_ollama']} of them spell a special token, which Ollama "
            "reads as one; qcat reads it as text."
        )
    return "\n".join([*lines, ""])
