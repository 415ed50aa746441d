"""The review queue as one self-contained web page: no network, one script allowed by its policy.

Questions and labels are untrusted text: the page reads them from JSON and shows them only as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qcat.monitor.review import LABEL_KEYS, NONE, Entry
from qcat.monitor.review_import import FORMAT


def review_page(task: str, labels: Sequence[str], entries: Sequence[Entry]) -> str:
    """The complete HTML of the page.

    Args:
        task: the task's name.
        labels: the task's labels, in order.
        entries: the questions to answer, each with its text.
    """
    style, script = (
        Path(__file__).with_name(f"review_page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = {
        "format": FORMAT,
        "task": task,
        "labels": list(labels),
        "keys": LABEL_KEYS,
        "none": NONE,
        "entries": [
            {
                "hash": entry.hash,
                "text": entry.text,
                "seen": entry.seen,
                "reason": entry.reason,
                "top": entry.top or [(entry.label, None)],
            }
            for entry in entries
        ],
    }
    # "<" could end the element, or begin a comment in it.
    embedded = json.dumps(data).replace("<", "\\u003c")
    title = escape(f"Review: {task}".encode("utf-8", "replace").decode())
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>",
            f"<header><h1>{title}</h1><progress></progress>",
            '<p id="progress" role="status"></p></header>',
            "<noscript><p>This page needs JavaScript: allow it for this file.</p></noscript>",
            '<main hidden>\n<p id="question" dir="auto"></p>\n<p id="note"></p>',
            '<div id="top"></div>',
            '<input id="search" type="search" placeholder="Search the labels (/)"',
            'aria-label="Search the labels" autocomplete="off">',
            '<div id="labels"></div>\n</main>',
            '<p id="end" hidden></p>',
            '<footer><button id="none">None of these<kbd>n</kbd></button>',
            '<button id="skip">Skip<kbd>s</kbd></button>',
            '<button id="undo">Undo<kbd>u</kbd></button>',
            '<button id="save">Save answers</button></footer>',
            '<p id="how">Save the answers into a file, and bring them back with '
            "<code>qcat review import FILE</code>. This browser keeps them too.</p>",
            f'<script type="application/json" id="data">{embedded}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _source(text: str) -> str:
    """The source expression for an inline style or script in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
