"""An adapter beside its base on a real Ollama and a real llama-server: answers as here."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from export_job import job_of
from ollama_server import (
    PROGRAM,
    QCAT,
    command,
    create,
    free_port,
    needs_ollama,
    ollama_server,
    post,
)
from qcat_convert.quantize import quantize
from qcat_convert.stream import convert

from qcat import Classifier
from qcat.backends.llama import LlamaModel
from qcat.encoding.encoded import EncodedTask
from qcat.gguf.bundle import Bundle
from qcat.task import Task

pytestmark = needs_ollama
QUESTIONS = ("who did the motor here", "why is the gate today", "how much for the tires", "12 'é'…")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ollama_server(tmp_path_factory.mktemp("server"), OLLAMA_FLASH_ATTENTION="0") as found:
        yield found


@pytest.fixture(scope="module")
def bundle(easy_job, tmp_path_factory):
    """The bundle of an adapter that was trained on a Q8_0 base, and the base."""
    job, args = easy_job
    folder = tmp_path_factory.mktemp("beside")
    task = Task.read(job / "task.toml")
    convert(job_of(task, folder / "whole.gguf", None, job / "base"))
    quantize(folder / "whole.gguf", folder / "base.gguf", "q8_0", threads=1)
    args = [folder / "base.gguf" if arg == job / "base" else arg for arg in args]
    subprocess.run([QCAT, *map(str, args), "-o", folder / "run"], check=True)
    made = [QCAT, "export", folder / "run", "--beside", "-o", folder / "out"]
    subprocess.run(made, check=True)
    return folder / "out", folder / "base.gguf"


def expected_ids(file, base, question):
    task = Bundle.read(file).task
    with LlamaModel(base, vocab_only=True) as model:
        encoded = EncodedTask.served(task, model, "base")
        return [*encoded.prefix, *encoded.ids(question)]


def test_ollama_with_adapter(server, bundle):
    folder, base = bundle
    file = folder / "sorts.gguf"
    create(server, "beside", folder)
    with (
        Classifier.open(file, calibrated=False) as here,
        Classifier.open("ollama:beside", adapter=file, calibrated=False) as there,
    ):
        for question in QUESTIONS:
            status, answer = post(server, "/api/generate", model="beside", prompt=question)
            assert status == 200
            ids = expected_ids(file, base, question)
            assert answer["context"][: len(ids) - 1] == ids[:-1]
            assert answer["response"].startswith(here.say(question, limit=1))
            if question.isascii():  # of the kind that it was trained on
                assert there.ask(question).label == here.ask(question).label
    listed = command(server, PROGRAM, "show", "beside", "--modelfile")
    assert "ADAPTER" in listed.stdout


def test_llama_server_with_lora(bundle):
    folder, base = bundle
    file = folder / "sorts.gguf"
    port = free_port()
    program = PROGRAM.parent.parent / "lib" / "ollama" / "llama-server"
    args = ("-m", base, "--lora", file, "--port", port, "-t", 2, "-c", 1024, "-fa", "off")
    process = subprocess.Popen(
        [str(arg) for arg in (program, *args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        with Classifier.open(file, calibrated=False) as here:
            root = here._encoded.trie.root_branch
            for question in QUESTIONS:
                rest, _ = here._encode(question)
                ours = next(here._scorer.score([rest])).logits[0]
                theirs = asked(port, expected_ids(file, base, question), root.tokens.tolist())
                shift = ours - theirs  # logits here, log-probabilities there
                assert np.ptp(shift) < 0.05
    finally:
        process.terminate()
        process.wait()


def asked(port, ids, tokens):
    """Log-probabilities of some tokens after a prompt."""
    body = {
        "prompt": ids,
        "n_predict": 1,
        "n_probs": 3000,
        "temperature": -1,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        [place] = json.load(answer)["completion_probabilities"]
    known = {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}
    return np.array([known[token] for token in tokens])
