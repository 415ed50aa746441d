"""The Jinja2 templates of reports, which lie in `templates`."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def template(name: str, *, html: bool) -> Any:
    """A `jinja2.Template`.

    Args:
        name: of its file.
        html: escape what is put into it; Markdown shows labels as task.toml has them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qcat.report"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=html,
    )
    environment.filters["printable"] = printable
    return environment.get_template(name)


def printable(text: str) -> str:
    """The text with what cannot be encoded (a lone surrogate in a file's name) replaced."""
    return text.encode("utf-8", "replace").decode()
