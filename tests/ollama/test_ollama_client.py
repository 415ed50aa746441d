"""Whatever answers at OLLAMA_HOST, and however it fails: one `ServerError`, sent again or not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from qcat.backends.ollama import Server
from qcat.classifier import Classifier
from qcat.errors import ServerError

ANSWER = (200, json.dumps({"response": "pool"}).encode())


class Impostor(ThreadingHTTPServer):
    """Gives scripted answers: `(status, body)`, "drop", "hang", "short"; the last one for ever."""

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests = list(script), []


class Handler(BaseHTTPRequestHandler):
    def do_any(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        script = self.server.script
        step = script.pop(0) if len(script) > 1 else script[0]
        if step == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if step == "hang":
            time.sleep(1.5)
            return
        status, body = (200, b'{"respo') if step == "short" else step
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(body) + 99 * (step == "short")))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    do_GET = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def impostor(monkeypatch):
    """`impostor(*script)`: a running one, to which OLLAMA_HOST points; asked again at once."""
    monkeypatch.setattr("qcat.backends.ollama._RETRIES", (0.01, 0.01))
    running = []

    def start(*script):
        server = Impostor(*script)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


STRANGERS = {
    "web server": (404, b"<html>404 Not Found</html>"),
    "other API": (400, b'{"error": {"message": "no", "type": "x"}}'),
    "list": (500, b"[]"),
    "text": (502, b'"bad gateway"'),
    "null": (500, b"null"),
    "empty": (200, b""),
    "html": (200, b"<html>"),
    "array": (200, b"[1]"),
    "bytes": (200, b"\xff\xfe"),
    "deep": (200, b"[" * 100_000),
    "redirects": (302, b""),
}


CALLS = {
    "generate": lambda server: server.generate("m", "p"),
    "show": lambda server: server.show("m"),
    "check": lambda server: server.check(),
    "delete": lambda server: server.delete("m"),
}


@pytest.mark.parametrize(
    ("name", "call"),
    # of a deletion that went well the status is all that is read
    [
        (n, c)
        for n, (status, _) in STRANGERS.items()
        for c in CALLS
        if (status, c) != (200, "delete")
    ],
)
def test_a_stranger_gets_one_line(name, call, impostor):
    impostor(STRANGERS[name])
    server = Server(2)
    with pytest.raises(ServerError, match="http://127") as caught:
        CALLS[call](server)
    assert "\n" not in str(caught.value)
    server.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]\n",
        b'{"status": 5}\n',
        b'{"error": {"message": "x"}}\n',
        b'{"error": "disk"}\n',
        b'{"status": "parsing GGUF"}\n',
        b"<html>\n",
    ],
)
def test_a_create_that_breaks_off_is_no_success(body, impostor):
    impostor((200, body))
    server = Server(2)
    with pytest.raises(ServerError):
        server.create("m", {}, "", {})
    server.close()


def test_what_is_not_there_cannot_be_sent(impostor, tmp_path):
    running = impostor((200, b""))
    server = Server(2)
    with pytest.raises(ServerError, match=r"absent\.gguf: No such file"):
        server.upload(tmp_path / "absent.gguf", lambda *_: None)
    assert running.requests == []
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    seen = []
    digest = server.upload(tmp_path / "m.gguf", lambda *step: seen.append(step))
    assert digest.startswith("sha256:")
    assert running.requests == [f"HEAD /api/blobs/{digest}"]  # it has the file: nothing is sent
    assert seen == [("checksum", 4, 4)]
    server.close()


@pytest.mark.parametrize("fault", ["drop", (503, b'{"error": "server busy"}')])
def test_what_passes_is_asked_again(fault, impostor):
    running = impostor(fault, fault, ANSWER)
    server = Server(2)
    assert server.generate("m", "p") == {"response": "pool"}
    assert len(running.requests) == 3
    server.close()


@pytest.mark.parametrize("fault", ["drop", "short", (503, b'{"error": "server busy"}')])
def test_but_not_for_ever(fault, impostor):
    running = impostor(fault)
    server = Server(2)
    with pytest.raises(ServerError, match="http://127"):
        server.generate("m", "p")
    assert len(running.requests) == 3
    server.close()


@pytest.mark.parametrize("fault", ["hang", (500, b'{"error": "out of memory"}')])
def test_what_asking_again_makes_worse_is_not(fault, impostor):
    running = impostor(fault)
    server = Server(0.3)
    with pytest.raises(ServerError, match=r"no answer within 0\.3 s|out of memory"):
        server.generate("m", "p")
    assert len(running.requests) == 1
    server.close()


def test_what_changes_something_is_sent_once(impostor):
    running = impostor("drop")
    server = Server(2)
    with pytest.raises(ServerError, match="broke off"):
        server.delete("m")
    assert len(running.requests) == 1
    server.close()


def test_a_name_that_cannot_be_sent(impostor):
    impostor(ANSWER)
    with pytest.raises(ServerError, match="choose another name"):
        Classifier.open("ollama:\udcff")


def test_a_closed_server_says_so(impostor):
    impostor(ANSWER)
    server = Server(2)
    server.close()
    server.close()
    with pytest.raises(ServerError, match="closed"):
        server.generate("m", "p")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OLLAMA_HOST", "127.0.0.1:99999"),
        ("OLLAMA_HOST", "http://[::1"),
        ("OLLAMA_HOST", "http://x..y"),
        ("OLLAMA_HOST", "x" * 80),
        ("OLLAMA_HOST", "http://é.."),
        ("OLLAMA_HOST", "ftp://x"),
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("ALL_PROXY", "foo://x"),
    ],
)
def test_addresses_that_are_none(name, value, qcat):
    import os

    environment = {**os.environ, "OLLAMA_HOST": "127.0.0.1:1", name: value}
    done = qcat("ask", "-m", "ollama:house", "q", env=environment)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "unexpected" not in done.stderr
    assert "OLLAMA_HOST" in done.stderr


def test_a_proxy_is_not_for_this_machine(impostor, monkeypatch):
    impostor(ANSWER)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server = Server(2)
    assert server.generate("m", "p") == {"response": "pool"}
    server.close()


@pytest.mark.parametrize(
    "info",
    [None, [], {}, {"qcat.task": "{}"}, {"qcat.task": 3}, {"qcat.task": "{}", "general.x": 1}],
)
def test_a_model_that_is_none_of_ours(info, impostor):
    impostor((200, json.dumps({"model_info": info}).encode()))
    with pytest.raises(ServerError, match=r"^house on http://127"):
        Classifier.open("ollama:house")


def test_arguments_that_make_no_sense():
    for more in ({"threads": 2}, {"timeout": 0}, {"timeout": float("nan")}):
        with pytest.raises(ValueError, match=r"expected|own affair"):
            Classifier.open("ollama:house", **more)
    with pytest.raises(ValueError, match="for an Ollama model only"):
        Classifier.open(timeout=3)


class Lasting(Handler):
    """Keeps a connection open, and notes which one each request came on."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self.client_address)
        self.send_response(200)
        self.send_header("Content-Length", str(len(ANSWER[1])))
        self.end_headers()
        self.wfile.write(ANSWER[1])


def test_a_fork_does_not_use_its_parents_connection(impostor):
    """Two processes on one connection would read each other's answers."""
    server = impostor(ANSWER)
    server.RequestHandlerClass = Lasting
    program = (
        "import os\n"
        "from qcat.backends.ollama import Server\n"
        "server = Server(5)\n"
        "server.generate('m', 'p')\n"
        "child = os.fork()\n"
        "server.generate('m', 'p')\n"
        "if not child: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "server.generate('m', 'p')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) == 4
    assert sorted(map(server.requests.count, set(server.requests))) == [1, 3]
