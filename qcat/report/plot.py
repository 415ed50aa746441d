"""Figures to bytes or text: nothing here touches a file, a window or matplotlib's global state.

PNGs stand alone on white. SVGs are for a page: their background is clear, their colours are half
transparent and their text stays text, so that the page can colour it for a dark screen too.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = (0.2, 0.45, 0.9), (0.95, 0.5, 0.1), "#888888"
OPACITY = 0.6  # so that text on any colour can be read on light and on dark


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    target = io.BytesIO()
    _save(figure, target, format="png", dpi=150, facecolor="white")
    return target.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element; `name` makes its ids differ from other figures'."""
    import matplotlib

    target = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        _save(figure, target, format="svg", transparent=True, metadata=metadata)
    text = target.getvalue().decode()
    return text[text.index("<svg") :]


def bare(axes: Axes) -> None:
    """Leave only the left and the lower line of the frame, in grey."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY)


def _save(figure: Figure, target: io.BytesIO, **more: Any) -> None:
    with warnings.catch_warnings():
        # A page has its own fonts; in a PNG a script that matplotlib's lacks shows as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.filterwarnings("ignore", ".*does not support.*", UserWarning)
        figure.savefig(target, bbox_inches="tight", pad_inches=0.1, **more)
