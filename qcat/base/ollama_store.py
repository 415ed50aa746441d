"""Where Ollama keeps a model's GGUF on this machine, read from its manifests without a server.

Layout (Ollama's `types/model/name.go` and `manifest`): `manifests/HOST/NAMESPACE/MODEL/TAG` is JSON
with layers, and each layer's file is `blobs/sha256-DIGEST`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcat.errors import ModelError

PREFIX = "ollama:"
"""How the name of a model in Ollama begins."""
_MODEL = "application/vnd.ollama.image.model"
_ADAPTER = "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SYSTEM_STORES = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models")


def stores() -> list[Path]:
    """Folders where Ollama may keep models: $OLLAMA_MODELS, the user's, the system service's."""
    if named := os.environ.get("OLLAMA_MODELS"):
        return [Path(named)]
    return [Path.home() / ".ollama" / "models", *map(Path, _SYSTEM_STORES)]


def find_model(name: str) -> Path:
    """The GGUF of a model in Ollama's store on this machine.

    Args:
        name: as for `ollama run`: `qwen3:0.6b`, `user/model`, `host/user/model:tag`.

    Raises:
        ModelError: there is no such model, or it is not one GGUF file.
    """
    parts = _manifest_parts(name)
    searched = stores()
    for store in searched:
        manifest = store.joinpath("manifests", *parts)
        try:
            layers = json.loads(manifest.read_text("utf-8"))["layers"]
            blobs = list(_blobs(layers, store))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ModelError(f"{manifest}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{manifest}: is not what Ollama writes: `ollama pull` it") from None
        if len(blobs) != 1:
            raise ModelError(
                f"{PREFIX}{name}: is not one GGUF file in Ollama ({len(blobs)} model and adapter "
                "files): take the model that it was made from"
            )
        if not blobs[0].is_file():
            raise ModelError(f"{blobs[0]}: no such file: `ollama pull {name}` brings it back")
        return blobs[0]
    places = ", ".join(map(str, searched))
    raise ModelError(
        f"{PREFIX}{name}: no such model in Ollama's store here ({places}): `ollama pull {name}`, "
        "or set OLLAMA_MODELS to where the server keeps its models"
    )


def _manifest_parts(name: str) -> list[str]:
    path, _, tag = name.partition(":") if "/" not in name.rpartition(":")[2] else (name, "", "")
    parts = path.split("/")
    defaults = ["registry.ollama.ai", "library"]
    parts = [*defaults[: max(0, 3 - len(parts))], *parts, tag or "latest"]
    if len(parts) != 4 or not all(map(_PART.fullmatch, parts)):
        raise ModelError(f"{PREFIX}{name}: is no name of an Ollama model, such as qwen3:0.6b")
    return parts


def _blobs(layers: list[dict[str, Any]], store: Path) -> Iterator[Path]:
    for layer in layers:
        if layer["mediaType"] in (_MODEL, _ADAPTER):
            digest = _DIGEST.fullmatch(layer["digest"])
            if digest is None:
                raise ValueError
            yield store / "blobs" / f"sha256-{digest[1]}"
