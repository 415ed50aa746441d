"""`qcat doctor`: what this machine offers."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

import click

from qcat.errors import ServerError

_PACKAGES = ("qcat", "llama-cpp-python", "numpy", "torch", "transformers", "peft", "gguf", "ollama")


@click.command()
def command() -> None:
    """Show versions, the CPU features compiled in, threads, caches, and whether Ollama is there.

    \b
    Example:
      qcat doctor
    """
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in _PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        rows.append((package, version))

    import llama_cpp

    from qcat.backends.llama import capture_log, default_threads

    capture_log(verbose=False)
    features = llama_cpp.llama_print_system_info().decode()
    on = [
        part.split("=")[0].split(":")[-1].strip() for part in features.split("|") if "= 1" in part
    ]
    rows += [
        ("llama.cpp", "compiled with " + ", ".join(on)),
        ("threads", f"{default_threads()} used of {os.cpu_count()} logical processors"),
        ("hub cache", _hub_cache()),
        ("ollama program", shutil.which("ollama") or "not found"),
        ("ollama server", _ollama()),
    ]
    for name, value in rows:
        click.echo(f"{name:<17} {value}")


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
        return "not asked: pip install -e '.[ollama]' in qcat's clone"
    except ServerError as error:
        return str(error)
