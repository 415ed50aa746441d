"""What goes wrong with a real Ollama server: one clear line, exit 1, nothing half made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import EXAMPLE
from ollama_server import QCAT, command, create, free_port, get, needs_ollama, ollama_server, post

from qcat import Classifier
from qcat.classifier import DEFAULT_MODEL
from qcat.errors import ServerError

pytestmark = needs_ollama


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The model that comes with qcat, as a folder that `qcat deploy` takes."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copy(DEFAULT_MODEL, folder)
    text = subprocess.run(
        [QCAT, "show", DEFAULT_MODEL, "--modelfile"], capture_output=True, check=True
    )
    (folder / "Modelfile").write_bytes(text.stdout)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    """A server with the model `house`."""
    folder = tmp_path_factory.mktemp("faults")
    with ollama_server(folder, OLLAMA_FLASH_ATTENTION="0") as found:
        done = command(found, QCAT, "deploy", bundle, "--name", "house")
        assert done.returncode == 0, done.stderr
        yield found


def one_line(done, *parts):
    """Assert that a command failed as it should; its message holds all parts."""
    assert done.returncode == 1, done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("qcat: error: ")
    for part in parts:
        assert part in lines[0], lines[0]


def names(server):
    return sorted(model["name"] for model in get(server, "/api/tags")["models"])


def questions(count):
    lines = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:: len(lines) // count][:count]]


def test_no_server(server, bundle, tmp_path, make_checkpoint):
    nowhere = server._replace(
        environment={**server.environment, "OLLAMA_HOST": f"127.0.0.1:{free_port()}"}
    )
    adapter = make_checkpoint().adapter
    for args in (
        ("ask", "-m", "ollama:house", "q"),
        ("deploy", bundle),
        ("export", adapter, "-o", tmp_path / "out", "--ollama", "x", "-t", EXAMPLE / "task.toml"),
    ):
        one_line(command(nowhere, QCAT, *args), "no Ollama server there", "`ollama serve`")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(server):
    done = command(server, QCAT, "ask", "-m", "ollama:absent", "q")
    one_line(done, "absent: no such model on http://127.0.0.1:", "qcat deploy DIR --name absent")


@pytest.mark.parametrize("name", ["a b", "../up", "x" * 200, "é", "a:b:c", "-"])
def test_a_name_that_ollama_refuses(name, server, bundle):
    before = names(server)
    one_line(command(server, QCAT, "deploy", bundle, f"--name={name}"), server.address)
    assert names(server) == before


@pytest.mark.parametrize("kind", ["foreign", "other task"])
def test_another_model_under_that_name(kind, server, bundle, bundle_file, household, tmp_path):
    if kind == "foreign":
        gguf = (bundle / "household.gguf").read_bytes().replace(b"qcat.task", b"gone.task")
        (tmp_path / "foreign.gguf").write_bytes(gguf)
        (tmp_path / "Modelfile").write_text("FROM ./foreign.gguf\n")
        create(server, "taken", tmp_path)
        done = command(server, QCAT, "ask", "-m", "ollama:taken", "q")
        one_line(done, "taken on http://", "not made by qcat")
    else:
        create(server, "taken", bundle_file(household.replace(name="another")).parent)
    before = post(server, "/api/show", model="taken")
    done = command(server, QCAT, "deploy", bundle, "--name", "taken")
    one_line(done, "taken on http://", "another model", "--name")
    assert post(server, "/api/show", model="taken") == before


def test_killed_in_the_middle_and_gone_on(bundle, tmp_path):
    asked = questions(200)
    port = free_port()
    settings = {"port": port, "OLLAMA_FLASH_ATTENTION": "0"}
    with ollama_server(tmp_path / "own", **settings) as server:
        create(server, "house", bundle)
        with Classifier.open("ollama:house") as house:
            whole = [p.label for p in house.ask_many(asked)]
            given = []

            def ask_and_kill():
                for answer in house.ask_many(asked):
                    given.append(answer.label)
                    if len(given) == 30:
                        os.killpg(server.process.pid, signal.SIGKILL)

            with pytest.raises(ServerError, match=r"^question \d+: http://127") as broken:
                ask_and_kill()
        assert 30 <= len(given) < 200
        assert str(broken.value).startswith(f"question {len(given) + 1}: ")
    with (
        ollama_server(tmp_path / "own", **settings),
        Classifier.open("ollama:house") as house,
    ):
        given += [p.label for p in house.ask_many(asked[len(given) :])]
    assert given == whole


def test_the_command_says_where_to_go_on(bundle, tmp_path):
    asked = questions(400)
    with ollama_server(tmp_path / "own") as server:
        create(server, "house", bundle)
        with subprocess.Popen(
            [QCAT, "ask", "-m", "ollama:house", "-"],
            env=server.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            process.stdin.write("\n".join(asked))
            process.stdin.close()
            first = process.stdout.readline()
            os.killpg(server.process.pid, signal.SIGKILL)
            rest, errors = process.stdout.read(), process.stderr.read()
    count = len((first + rest).splitlines())
    assert process.returncode == 1
    assert errors.startswith(f"qcat: error: question {count + 1}: http://")
    assert len(errors.splitlines()) == 1


def test_a_server_past_the_timeout(server):
    """Stopped, not dead: it takes connections and says nothing."""
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = command(server, QCAT, "ask", "-m", "ollama:house", "--timeout", 1, "q")
        assert time.monotonic() - began < 20
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
    one_line(done, "no answer within 1 s")
    assert command(server, QCAT, "ask", "-m", "ollama:house", "pool?").stdout == "pool\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted: root only")
def test_a_full_disk(bundle, tmp_path):
    disk = tmp_path / "own" / "models"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "qcat-test", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with ollama_server(tmp_path / "own") as server:
            done = command(server, QCAT, "deploy", bundle, "--name", "house")
            one_line(done, "no space left", "make room")
            assert names(server) == []
            assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) < 1e5
            subprocess.run(["mount", "-o", "remount,size=99m", disk], check=True)
            done = command(server, QCAT, "deploy", bundle, "--name", "house")
            assert done.returncode == 0, done.stderr
            assert names(server) == ["house:latest"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def older(server):
    """The real server behind a proxy that knows nothing of logprobs, as before Ollama 0.12.11."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = {k: v for k, v in body.items() if k not in ("logprobs", "top_logprobs")}
            url = f"http://{server.address}{self.path}"
            with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as answer:
                data = answer.read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=proxy.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{proxy.server_port}"
    yield server._replace(
        address=address, environment={**server.environment, "OLLAMA_HOST": address}
    )
    proxy.shutdown()
    proxy.server_close()


def test_a_server_without_logprobs_gives_labels_alone(older, household, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", older.address)
    with Classifier.open("ollama:house", threshold=0.5) as house:
        answers = list(house.ask_many(questions(20)))
    for p in answers:
        assert p.label in household.labels
        assert (p.confidence, p.label_mass, p.margin, p.entropy) == (None,) * 4
        assert (p.probabilities, p.exact) == ({}, False)
        assert p.abstained  # nothing is known, so nothing is over a threshold
    done = command(older, QCAT, "ask", "-m", "ollama:house", "When was the pool pump replaced?")
    assert done.stdout == "pool\n"
    assert done.stderr.startswith("qcat: warning: this Ollama gives no probabilities")
    done = command(older, QCAT, "ask", "-m", "ollama:house", "--json", "pool?")
    assert json.loads(done.stdout)["confidence"] is None
