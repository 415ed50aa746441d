"""An evaluation as one self-contained web page: no script, no network, light and dark.

Labels, questions and answers are a user's text, or a model's: all of it is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from qcat.calibration.reliability import UNSCALED, reliability_rows
from qcat.evaluation.results import Evaluation, off_topic_rows
from qcat.report.figures import confusion_svg, mass_svg
from qcat.report.trust_figures import reliability_svg

_MAX_ROWS = 50
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --good: #3373e6; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .4rem; text-align: left; }
th { white-space: nowrap; }
td { overflow-wrap: break-word; max-width: 24rem; }
td:first-child { min-width: 6rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
.bar { background: linear-gradient(var(--good), var(--good)) left bottom / 0 no-repeat; }
.note { opacity: .75; font-size: .9rem; }
.scroll svg { display: block; height: auto; }
.scroll svg text { fill: currentColor !important; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_report(evaluation: Evaluation) -> str:
    """The page's whole text."""
    title = f"{Path(evaluation.model).name} on {Path(evaluation.data).name}"
    parts = [
        f"<h1>{_escaped(title)}</h1>",
        *_summary(evaluation),
        *_confusion(evaluation),
        *_labels(evaluation),
        *_mistakes(evaluation),
        *_invalid(evaluation),
        *_comparison(evaluation),
        *_confidence(evaluation),
        *_off_topic(evaluation),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def _summary(found: Evaluation) -> Iterable[str]:
    groups = f" in {found.bootstrap.units} groups" if found.bootstrap.unit == "group" else ""
    decode = ", decoded free, without any constraint" if found.decode == "free" else ""
    yield (
        f"<p>Task {_escaped(found.task)}: {found.questions} questions{groups}, "
        f"{len(found.confusion.labels)} labels{decode}.</p>"
    )
    if found.truncated:
        yield f"<p>{found.truncated} questions were too long and were cut.</p>"
    yield _table(
        ("", "accuracy", "macro-F1", "weighted F1"),
        [
            (name, str(q.accuracy), str(q.macro_f1), str(q.weighted_f1))
            for name, q in found.systems()
        ],
    )
    yield f'<p class="note">{_escaped(str(found.bootstrap))}</p>'
    if found.baseline:
        yield (
            f'<p class="note">The baseline learned from {found.baseline.train_questions} '
            f"questions of {_escaped(Path(found.baseline.train_data).name)}.</p>"
        )
    yield _table(
        ("", "value"),
        [
            ("latency, median", f"{found.latency.median_ms:.1f} ms"),
            ("latency, 95th percentile", f"{found.latency.p95_ms:.1f} ms"),
            ("label mass, median", f"{found.label_mass.median:.4f}"),
            ("label mass, 5th percentile", f"{found.label_mass.p5:.4f}"),
            ("label mass, least", f"{found.label_mass.least:.4f}"),
        ],
    )
    yield (
        f'<p class="note">Latency: {found.latency.questions} questions, one at a time, after '
        f"{found.latency.warm_up} to warm up. Label mass: the share of the model’s next-token "
        "probability that falls on labels at all.</p>"
    )


def _confusion(found: Evaluation) -> Iterable[str]:
    yield "<h2>Confusion matrix</h2>"
    yield f'<div class="scroll">{confusion_svg(found.confusion)}</div>'
    yield '<p class="note">Labels that occur; colour by share of the right label’s questions.</p>'


def _labels(found: Evaluation) -> Iterable[str]:
    yield "<h2>By label</h2>"
    head = "".join(
        f'<th class="number">{name}</th>' for name in ("precision", "recall", "F1", "support")
    )
    yield f'<div class="scroll"><table>\n<tr><th>label</th>{head}</tr>'
    for row in found.per_label:
        bar = f'class="number bar" style="background-size: {row.f1:.0%} 3px"'
        yield (
            f"<tr><td>{_escaped(row.label)}</td>"
            f'<td class="number">{row.precision:.3f}</td><td class="number">{row.recall:.3f}</td>'
            f'<td {bar}>{row.f1:.3f}</td><td class="number">{row.support}</td></tr>'
        )
    yield "</table></div>"


def _mistakes(found: Evaluation) -> Iterable[str]:
    yield "<h2>Most confident mistakes</h2>"
    if not found.mistakes:
        yield "<p>None.</p>"
        return
    yield _table(
        ("question", "right label", "answer", "confidence"),
        [(a.text, a.truth, a.answer or "", f"{a.confidence:.3f}") for a in found.mistakes],
    )


def _invalid(found: Evaluation) -> Iterable[str]:
    if found.invalid is None:
        return
    yield "<h2>Answers that are no label</h2>"
    yield f"<p>{found.invalid} of {found.questions}, counted as wrong.</p>"
    rows = [(a.text, a.truth, a.said or "") for a in found.answers if a.answer is None]
    yield from _cut_table(("question", "right label", "what the model said"), rows)


def _comparison(found: Evaluation) -> Iterable[str]:
    compared = found.comparison
    if compared is None:
        return
    yield f"<h2>Against {_escaped(compared.model)}</h2>"
    yield (
        f"<p>{len(compared.flips)} of {found.questions} questions changed their label: "
        f"{compared.fixed} fixed (wrong there, right here), {compared.broken} broken. "
        f"McNemar’s exact test: p = {compared.p_value:.3g}, "
        "taking the questions as independent.</p>"
    )
    rows = [(f.text, f.truth, _answer(f.other), _answer(f.this)) for f in compared.flips]
    yield from _cut_table(("question", "right label", "there", "here"), rows)


def _confidence(found: Evaluation) -> Iterable[str]:
    known, left = found.confidence, found.abstaining
    before = None if known.temperature == 1 else known.before
    yield "<h2>Confidence</h2>"
    head, *rows = reliability_rows(known.after, before)
    yield _table(head, rows)
    state = (
        f"calibrated, temperature {known.temperature:.2f}"
        if before
        else UNSCALED
        if known.calibrated
        else "not calibrated"
    )
    yield f'<div class="scroll">{reliability_svg(known.after, before)}</div>'
    yield (
        f'<p class="note">The model is {state}. Each point is the questions of like confidence, '
        "its size their number; on the line the confidence is right.</p>"
    )
    if left.reasons:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.reasons.items())
        yield (
            f"<p>Left to a person: {reasons}; {left.errors} of {left.answered} answered are "
            "wrong.</p>"
        )


def _off_topic(found: Evaluation) -> Iterable[str]:
    off = found.off_topic
    if off is None:
        return
    yield "<h2>Questions off the list</h2>"
    head, *rows = off_topic_rows(off)
    yield _table(head, rows)
    yield (
        f'<p class="note">{off.questions} questions of {_escaped(Path(off.data).name)}. AUROC: how '
        "often a question on the list has more than one off it; 0.5 tells nothing. FPR95: share "
        "off the list that passes where 95 % of the list’s do. Called off-topic: "
        f"{off.caught} of these, and {off.false_alarms} questions of the list.</p>"
    )
    masses = [answer.label_mass for answer in found.answers]
    yield f'<div class="scroll">{mass_svg(masses, off.masses)}</div>'


def _cut_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    if rows:
        yield _table(head, rows[:_MAX_ROWS])
    if len(rows) > _MAX_ROWS:
        yield f'<p class="note">The first {_MAX_ROWS} of {len(rows)}.</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{_escaped(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n{body}\n</table></div>'


def _answer(label: str | None) -> str:
    return "(no label)" if label is None else label


def _escaped(text: str) -> str:
    """Text fit for a page: escaped, and what cannot be encoded (an odd file name) replaced."""
    return escape(text.encode("utf-8", "replace").decode())
