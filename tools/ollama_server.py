"""A real Ollama server for tests: start, stop, ask over HTTP. `make test-ollama` installs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = ROOT / "build" / "ollama" / "bin" / "ollama"
QCAT = Path(sys.executable).with_name("qcat")


needs_ollama = [
    pytest.mark.ollama,
    pytest.mark.skipif(
        not PROGRAM.is_file(), reason="no Ollama: `make test-ollama` installs it where Go is"
    ),
]
"""A `pytestmark` for what runs where the server is installed."""


class Server(NamedTuple):
    """A running server."""

    environment: dict
    """For programs that are to talk to it."""
    address: str
    process: subprocess.Popen


def free_port():
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def ollama_server(folder, port=None, **settings):
    """A `Server` on a free port of this machine, with its own models; OLLAMA_HOST is set to it."""
    port = port or free_port()
    own = {
        "HOME": str(folder),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(folder / "models"),
        "OLLAMA_NO_CLOUD": "1",
        **settings,
    }
    environment = {**os.environ, **own}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, "serve"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    before = os.environ.get("OLLAMA_HOST")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "the server does not come up"
                time.sleep(0.05)
        os.environ["OLLAMA_HOST"] = own["OLLAMA_HOST"]
        yield Server(environment, own["OLLAMA_HOST"], process)
    finally:
        if before is None:
            os.environ.pop("OLLAMA_HOST", None)
        else:
            os.environ["OLLAMA_HOST"] = before
        with suppress(ProcessLookupError):  # the runners are in its group
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def post(server, path, **body):
    """Status and JSON answer of a request to a server."""
    request = urllib.request.Request(
        f"http://{server.address}{path}", json.dumps({"stream": False, **body}).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def command(server, *args, **more):
    """Run a program with a server's address in its environment."""
    return subprocess.run(
        [str(arg) for arg in args],
        env=server.environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        **more,
    )


def create(server, name, folder):
    """`ollama create` as a user gives it, with a bundle's Modelfile."""
    done = command(server, PROGRAM, "create", name, "-f", folder / "Modelfile")
    assert done.returncode == 0, done.stderr


def get(server, path):
    """The JSON answer of a server."""
    with urllib.request.urlopen(f"http://{server.address}{path}", timeout=60) as answer:
        return json.load(answer)
