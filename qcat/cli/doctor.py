"""`qcat doctor`: what this machine offers."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import click

from qcat.errors import QcatError, ServerError
from qcat.install import how_to_install, versions

_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_NO_REPACKING = (
    "left out: llama.cpp is built with AMX, where that crashes; to have it give "
    f"CMAKE_ARGS=\"-DCMAKE_C_FLAGS='{_NO_AMX}' -DCMAKE_CXX_FLAGS='{_NO_AMX}'\" pip install "
    "--force-reinstall --no-deps --no-cache-dir llama-cpp-python"
)
_PACKAGES = ("llama-cpp-python", "numpy", "torch", "transformers", "peft", "gguf", "ollama")


@click.command()
def command() -> None:
    """Show versions, the CPU features compiled in, threads, caches, and whether Ollama is there.

    \b
    Example:
      qcat doctor
    """
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, found or "not installed") for name, found in versions(*_PACKAGES).items()]

    import llama_cpp

    from qcat.backends.llama import capture_log, repacks

    capture_log(verbose=False)
    features = llama_cpp.llama_print_system_info().decode()
    on = [
        part.split("=")[0].split(":")[-1].strip() for part in features.split("|") if "= 1" in part
    ]
    rows += [
        ("llama.cpp", "compiled with " + ", ".join(on)),
        ("repacking", "used" if repacks() else _NO_REPACKING),
        ("threads", _threads()),
        ("cache", _cache()),
        ("hub cache", _hub_cache()),
        ("ollama program", shutil.which("ollama") or "not found"),
        ("ollama server", _ollama()),
    ]
    for name, value in rows:
        click.echo(f"{name:<17} {value}")


def _threads() -> str:
    from qcat.threads import VARIABLE, cores, default_threads

    logical, physical, quota = cores()
    limit = "" if quota is None else f", control group allows {quota:g}"
    said = f"; {VARIABLE} is set" if VARIABLE in os.environ else ""
    try:
        used = default_threads()
    except QcatError as error:
        return str(error)
    return (
        f"{used} used: {physical} physical cores for this process, "
        f"{logical} logical processors in all{limit}{said}"
    )


def _cache() -> str:
    from qcat import cache

    try:
        place = cache.folder()
    except RuntimeError:
        return "none, since there is no home folder: set QCAT_CACHE"
    made = next(path for path in (place, *place.parents, Path()) if path.exists())
    usable = made.is_dir() and os.access(made, os.W_OK | os.X_OK)
    return str(place) if usable else f"{place} cannot be used: each start takes longer"


def _hub_cache() -> str:
    home = os.environ.get("HF_HOME", os.path.join("~", ".cache", "huggingface"))
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub")))


def _ollama() -> str:
    try:
        from qcat.backends.ollama import Server

        server = Server(timeout=1)
        try:
            return f"{server.address} answers: version {server.check()}"
        finally:
            server.close()
    except ModuleNotFoundError:
        return f"not asked: {how_to_install('ollama')}"
    except ServerError as error:
        return str(error)
