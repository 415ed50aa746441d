"""What the terminal shows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable

from qcat.calibration.reliability import UNSCALED, reliability_rows
from qcat.cli.output import ROWS, more, shown, table
from qcat.evaluation.results import Comparison, Confusion, Evaluation, OffTopic, off_topic_rows

_MATRIX_LABELS = 10  # up to which the terminal shows the whole confusion matrix


def evaluation_text(found: Evaluation) -> str:
    """An evaluation as text: blocks of lines with a blank line between them."""
    return "\n\n".join("\n".join(block) for block in _blocks(found))


def _blocks(found: Evaluation) -> Iterable[Iterable[str]]:
    groups = f" in {found.bootstrap.units} groups" if found.bootstrap.unit == "group" else ""
    head = [f"{found.questions} questions{groups}, {len(found.per_label)} labels"]
    if found.truncated:
        head.append(f"{found.truncated} questions were too long and were cut")
    if found.inexact:
        head.append(
            f"{found.inexact} answers have bounds for some probabilities, as Ollama shows the best "
            "tokens only: figures of confidence are approximate"
        )
    yield head
    rows: list[tuple[str, ...]] = [("", "accuracy", "macro-F1", "weighted F1")]
    for name, quality in found.systems():
        figures = (quality.accuracy, quality.macro_f1, quality.weighted_f1)
        rows.append((name, *map(str, figures)))
    yield [*table(rows), str(found.bootstrap)]
    if found.invalid is not None:
        yield _invalid(found)
    yield table(
        [
            ("label", "precision", "recall", "F1", "support"),
            *(
                (r.label, f"{r.precision:.3f}", f"{r.recall:.3f}", f"{r.f1:.3f}", str(r.support))
                for r in found.per_label
            ),
        ]
    )
    yield _confusion(found.confusion)
    if found.mistakes:
        yield [
            "most confident mistakes",
            *table(
                [
                    ("", "right", "answer", "question"),
                    *(
                        (f"{m.confidence:.3f}", m.truth, str(m.answer), shown(m.text))
                        for m in found.mistakes
                    ),
                ]
            ),
        ]
    if found.comparison:
        yield _comparison(found.comparison)
    if found.off_topic:
        yield _off_topic(found.off_topic)
    yield _confidence(found)
    mass, latency = found.label_mass, found.latency
    yield [
        f"label mass: median {mass.median:.4f}, 5th percentile {mass.p5:.4f}, "
        f"least {mass.least:.4f}",
        f"latency: median {latency.median_ms:.1f} ms, 95th percentile {latency.p95_ms:.1f} ms "
        f"({latency.questions} questions, one at a time, after {latency.warm_up} to warm up)",
    ]


def _invalid(found: Evaluation) -> Iterable[str]:
    yield f"{found.invalid} of {found.questions} free answers are no label: counted as wrong"
    rows = [(a.truth, repr(a.said), shown(a.text)) for a in found.answers if a.answer is None]
    if rows:
        yield from table([("right", "said", "question"), *rows[:ROWS]])
        yield from more(rows)


def _confusion(confusion: Confusion) -> Iterable[str]:
    used = confusion.used()
    if len(used.labels) <= _MATRIX_LABELS:
        yield "confusion matrix: right labels by row, answers by column"
        columns = [str(number) for number in range(1, len(used.labels) + 1)]
        rows = [("", *columns)]
        for number, label, counts in zip(columns, used.labels, used.matrix, strict=True):
            rows.append((f"{number} {label}", *(str(count) if count else "." for count in counts)))
        yield from table(rows)
    elif pairs := confusion.pairs():
        yield "most confused"
        yield from table([(str(n), f"{truth} → {answer}") for truth, answer, n in pairs[:ROWS]])
        yield from more(pairs, "pairs")


def _comparison(compared: Comparison) -> Iterable[str]:
    yield (
        f"against {compared.model}: {len(compared.flips)} labels changed, {compared.fixed} fixed "
        f"(wrong there, right here), {compared.broken} broken"
    )
    yield f"McNemar's exact test: p = {compared.p_value:.3g}, taking the questions as independent"
    if compared.flips:
        rows = [
            (flip.truth, flip.other or "(no label)", flip.this or "(no label)", shown(flip.text))
            for flip in compared.flips
        ]
        yield from table([("right", "there", "here", "question"), *rows[:ROWS]])
        yield from more(rows)


def _off_topic(off: OffTopic) -> Iterable[str]:
    yield f"{off.questions} questions off the list, {off.data}"
    yield from table(off_topic_rows(off))
    yield (f"called off-topic: {off.caught} of these, and {off.false_alarms} questions of the list")


def _confidence(found: Evaluation) -> Iterable[str]:
    known, left = found.confidence, found.abstaining
    if known.temperature == 1:
        yield f"confidence: {UNSCALED if known.calibrated else 'not calibrated'}"
        yield from table(reliability_rows(known.after, None))
    else:
        yield f"confidence: calibrated, temperature {known.temperature:.2f}"
        yield from table(reliability_rows(known.after, known.before))
    if left.reasons:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.reasons.items())
        yield f"abstained: {reasons}; {left.errors} of {left.answered} answered are wrong"
