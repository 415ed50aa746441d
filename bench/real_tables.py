"""Tables of what `real_weights.py` and `classics.py` measured: Markdown, and one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bases import title
from real_cells import Cell, cells

from qcat.evaluation.metrics import mcnemar

Found = Mapping[str, Mapping[str, Any]]
Rows = list[tuple[str, ...]]
REFERENCE = "epochs 3"
"""The row that the other choices are compared with: they change one thing of it."""


def print_tables(found: Found) -> None:
    """Print a table for each part that has a cell."""
    for heading, make in TABLES.items():
        for name, rows in make(found):
            if len(rows) > 1:
                print(f"\n**{heading}{name}**\n\n{markdown(rows)}")
    print(json.dumps({name: _without_wrong(cell) for name, cell in found.items()}))


def markdown(rows: Rows) -> str:
    """A table, its first row the heading."""
    heading, *rest = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in (heading, ("---",) * len(heading), *rest))


def published(found: Found) -> Iterator[tuple[str, Rows]]:
    """Untrained and trained, names and codes, plain and chat."""
    heading = (
        "", "accuracy, label probabilities", "macro-F1", "free, the same 300", "not a label",
        "label probabilities, the same 300", "label mass, median",
    )  # fmt: skip
    for model, parts in _by_model("published", found).items():
        rows = [heading]
        for cell, result in parts:
            label, free = result["label"], result["free"]
            rows.append(
                (
                    cell.row,
                    f"{label['accuracy']:.3f}",
                    f"{label['macro_f1']:.3f}",
                    f"{free['accuracy']:.3f}",
                    str(free["invalid"]),
                    f"{free['accuracy_of_labels']:.3f}",
                    f"{free['mass']:.3g}",
                )
            )
        yield f", {title(model)}", rows


def defaults(found: Found) -> Iterator[tuple[str, Rows]]:
    """One choice changed at a time; McNemar's test against `REFERENCE`."""
    heading = (
        "", "accuracy (95 %)", "macro-F1", "McNemar p", "calibration error", "best epoch",
        "validation loss, nats", "training, min",
    )  # fmt: skip
    for model, parts in _by_model("defaults", found).items():
        rows = [heading]
        reference = next((r["label"]["wrong"] for c, r in parts if c.row == REFERENCE), None)
        for cell, result in parts:
            label, training = result["label"], result["training"]
            best = training["history"][training["best_epoch"] - 1]
            low, high = label["interval"]
            same = cell.row == REFERENCE or reference is None
            rows.append(
                (
                    cell.row,
                    f"{label['accuracy']:.3f} ({low:.3f} to {high:.3f})",
                    f"{label['macro_f1']:.3f}",
                    "" if same else f"{_alike(label['wrong'], reference or []):.2g}",
                    f"{label['ece_before']:.3f}",
                    f"{training['best_epoch']} of {len(training['history'])}",
                    f"{best['validation_loss']:.3f}",
                    f"{training['seconds'] / 60:.1f}",
                )
            )
        yield f", {title(model)}", rows


def classics(found: Found) -> Iterator[tuple[str, Rows]]:
    """Systems down, data sets across: accuracy and weighted F1."""
    systems: dict[str, dict[str, str]] = {}
    for name, result in found.items():
        if name.startswith("baselines-"):
            for row in result["systems"]:
                told = f"{row['accuracy']:.3f} / {row['weighted_f1']:.3f}"
                systems.setdefault(row["system"], {})[result["data"]] = told
    for cell, result in _measured("classics", found):
        told = f"{result['label']['accuracy']:.3f} / {result['label']['weighted_f1']:.3f}"
        systems.setdefault(title(cell.model), {})[cell.data] = told
    for cell, result in _measured("trust", found):
        told = f"{result['label']['accuracy']:.3f} / {result['label']['weighted_f1']:.3f}"
        systems.setdefault(title(cell.model), {})[cell.data] = told
    sets = sorted({data for row in systems.values() for data in row})
    yield (
        "",
        [
            ("", *sets),
            *((name, *(row.get(data, "") for data in sets)) for name, row in systems.items()),
        ],
    )


TRUST = {
    "accuracy": "accuracy",
    "temperature": "temperature",
    "calibration error before": "ece before",
    "calibration error after": "ece after",
    "what chance alone would show": "ece by chance",
    **{
        f"at most {promised:.0%} wrong: {what}": f"{key} {promised}"
        for promised in (0.02, 0.05, 0.1)
        for what, key in (
            ("divisions of 100 that kept it", "kept"),
            ("answered", "answered"),
            ("wrong of these", "error"),
        )
    },
    "sets at 0.95: hold the truth": "covered 0.95",
    "sets at 0.95: labels, mean": "size 0.95",
    **{
        f"off-topic AUROC, {signal}": f"AUROC {signal}"
        for signal in ("top probability", "label mass", "energy", "on-topic score", "TF-IDF")
    },
    "called off-topic, of the list": "called off, on",
    "called off-topic, of the others": "called off, off",
}
"""What a row is called, and what `trust.py` calls it."""


def trust(found: Found) -> Iterator[tuple[str, Rows]]:
    """What the confidence is worth."""
    measured = list(_measured("trust", found))
    rows: Rows = [("", *(f"{title(cell.model)}, {cell.data}" for cell, _ in measured))]
    for name, key in TRUST.items():
        figures = [result["trust"][key] for _, result in measured]
        places = 0 if key.startswith("kept") else 3
        rows.append((name, *("" if f is None or f != f else f"{f:.{places}f}" for f in figures)))
    for place, part in enumerate(("10th percentile", "median", "90th percentile")):
        figures = [result["label"]["wrong_confidence"][place] for _, result in measured]
        rows.append((f"confidence of wrong answers, {part}", *(f"{f:.2f}" for f in figures)))
    if measured:
        yield "", rows


def smaller(found: Found) -> Iterator[tuple[str, Rows]]:
    """Fewer tokens, fewer layers."""
    for model, parts in _by_model("smaller", found).items():
        rows: Rows = [("", "accuracy", "macro-F1", "MB", "ms a question")]
        for cell, result in parts:
            label = result["label"]
            rows.append(
                (
                    cell.row,
                    f"{label['accuracy']:.3f}",
                    f"{label['macro_f1']:.3f}",
                    f"{result['export']['mb']:.0f}",
                    f"{label['ms']:.1f}",
                )
            )
        yield f", {title(model)}", rows


def costs(found: Found) -> Iterator[tuple[str, Rows]]:
    """Time and memory of a training, with its export and its file."""
    rows: Rows = [
        (
            "base, questions, cell", "questions a second", "training, min", "peak, MB",
            "export, s", "peak, MB", "file, MB", "ask, ms",
        )
    ]  # fmt: skip
    for cell in cells():
        result = found.get(cell.name, {})
        if "training" not in result:
            continue
        training, export = result["training"], result["export"]
        asked = training["questions"] * len(training["history"])
        rows.append(
            (
                f"{title(cell.model)}, {cell.data}, {cell.row}",
                f"{asked / training['seconds']:.1f}",
                f"{training['seconds'] / 60:.1f}",
                f"{training['peak_mb']:.0f}",
                f"{export['seconds']:.0f}",
                f"{export['peak_mb']:.0f}",
                f"{export['mb']:.0f}",
                f"{result['label']['ms']:.1f}",
            )
        )
    yield "", rows


TABLES = {
    "The published experiment": published,
    "Choices": defaults,
    "Against the classics: accuracy / weighted F1": classics,
    "Trust": trust,
    "Smaller": smaller,
    "Time and memory": costs,
}


def _measured(part: str, found: Found) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    yield from ((c, found[c.name]) for c in cells() if c.table == part and c.name in found)


def _by_model(part: str, found: Found) -> dict[str, list[tuple[Cell, Mapping[str, Any]]]]:
    rows: dict[str, list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, result in _measured(part, found):
        rows.setdefault(cell.model, []).append((cell, result))
    return rows


def _alike(wrong: Sequence[int], others: Sequence[int]) -> float:
    return mcnemar(len({*others} - {*wrong}), len({*wrong} - {*others}))


def _without_wrong(cell: Mapping[str, Any]) -> dict[str, Any]:
    if "label" not in cell:
        return dict(cell)
    return cell | {"label": {k: v for k, v in cell["label"].items() if k != "wrong"}}
