"""An evaluation as one self-contained web page: no script, no network, light and dark.

Labels, questions and answers are a user's text, or a model's: the template escapes all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcat.calibration.reliability import UNSCALED, reliability_rows
from qcat.evaluation.results import Evaluation, off_topic_rows
from qcat.report.confidence_figures import reliability_svg
from qcat.report.figures import confusion_svg, mass_svg
from qcat.report.templating import printable, template

_MAX_ROWS = 50


def html_report(evaluation: Evaluation) -> str:
    """The page's whole text."""
    found = evaluation
    known = found.confidence
    before = None if known.temperature == 1 else known.before
    masses = [answer.label_mass for answer in found.answers]
    off = found.off_topic
    text: str = template("evaluation.html.j2", html=True).render(
        found=found,
        title=printable(f"{Path(found.model).name} on {Path(found.data).name}"),
        most=_MAX_ROWS,
        systems=[
            (printable(name), str(q.accuracy), str(q.macro_f1), str(q.weighted_f1))
            for name, q in found.systems()
        ],
        figures=_figures(found),
        baseline_file=_file_name(found.baselines[0].train_data) if found.baselines else None,
        confusion_svg=confusion_svg(found.confusion),
        mistakes=[
            _row(a.text, a.truth, a.answer or "", f"{a.confidence:.3f}") for a in found.mistakes
        ],
        invalid=[_row(a.text, a.truth, a.said or "") for a in found.answers if a.answer is None],
        flips=[
            _row(f.text, f.truth, f.other or "(no label)", f.this or "(no label)")
            for f in (found.comparison.flips if found.comparison else ())
        ],
        reliability=reliability_rows(known.after, before),
        reliability_svg=reliability_svg(known.after, before),
        state=_state(found, calibrated=before is not None),
        abstained=", ".join(f"{n} {reason}" for reason, n in found.abstaining.reasons.items()),
        off_topic=off_topic_rows(off) if off else None,
        off_topic_file=_file_name(off.data) if off else None,
        mass_svg=mass_svg(masses, off.masses) if off else None,
    )
    return text


def _figures(found: Evaluation) -> list[tuple[str, str]]:
    return [
        ("latency, median", f"{found.latency.median_ms:.1f} ms"),
        ("latency, 95th percentile", f"{found.latency.p95_ms:.1f} ms"),
        ("label mass, median", f"{found.label_mass.median:.4f}"),
        ("label mass, 5th percentile", f"{found.label_mass.p5:.4f}"),
        ("label mass, least", f"{found.label_mass.least:.4f}"),
    ]


def _state(found: Evaluation, *, calibrated: bool) -> str:
    if calibrated:
        return f"calibrated, temperature {found.confidence.temperature:.2f}"
    return UNSCALED if found.confidence.calibrated else "not calibrated"


def _file_name(path: str) -> str:
    return printable(Path(path).name)


def _row(*cells: Any) -> tuple[str, ...]:
    return tuple(map(printable, cells))
