"""Which extras install which libraries, and which versions are installed."""

from __future__ import annotations

from importlib import metadata

from qcat.version import __version__

DISTRIBUTION = "qcat-llm"
_EXTRAS = {
    "httpx": "ollama",
    "matplotlib": "eval",
    "ollama": "ollama",
    "pyarrow": "parquet",
    "scipy": "eval",
    "sentence_transformers": "embeddings",
    "sklearn": "eval",
}


def extra_with(library: str) -> str:
    """The extra that installs a library, by its import name; `train` installs all others."""
    return _EXTRAS.get(library, "train")


def how_to_install(extra: str) -> str:
    """The command that installs an extra, from the registry and in a clone."""
    return f'pip install "{DISTRIBUTION}[{extra}]", or in a clone pip install -e ".[{extra}]"'


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of qcat and of other distributions; None if not installed."""
    found: dict[str, str | None] = {"qcat": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
