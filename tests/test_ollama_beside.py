"""An adapter beside its base on a real Ollama and a real llama-server: answers as here."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from ollama_server import PROGRAM, command, create, free_port, needs_ollama, ollama_server, post

from convert.pipeline import Request, export
from qcat import Classifier
from qcat.backends.llama import LlamaModel
from qcat.bundle import Bundle
from qcat.classifier import prepare
from qcat.prompt import encode_segments

pytestmark = needs_ollama
QUESTIONS = ("When was the pool pump replaced?", "who fixed the gate", "12 'é'…", "ok")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ollama_server(tmp_path_factory.mktemp("server"), OLLAMA_FLASH_ATTENTION="0") as found:
        yield found


@pytest.fixture(scope="module")
def bundle(make_pair, household, tmp_path_factory):
    """The adapter's bundle, and its base."""
    base, adapter = make_pair()
    target = tmp_path_factory.mktemp("beside") / "out"
    export(Request(household, target, adapter=adapter, beside=True))
    return target, base


def expected_ids(file, base, question):
    task = Bundle.read(file).task
    with LlamaModel(base, vocab_only=True) as model:
        prompt, _ = prepare(task, model, "base")
        return encode_segments((*prompt.prefix, *prompt.rest(question)), model)


def test_ollama_with_adapter(server, bundle):
    folder, base = bundle
    file = folder / "household.gguf"
    create(server, "beside", folder)
    for question in QUESTIONS:
        body = {"model": "beside", "prompt": question, "stream": False}
        answer = post(server, "/api/generate", body)
        ids = expected_ids(file, base, question)
        assert answer["context"][: len(ids) - 1] == ids[:-1]
    with (
        Classifier.open(file, calibrated=False) as here,
        Classifier.open("ollama:beside", adapter=file, calibrated=False) as there,
    ):
        for question in QUESTIONS:
            ours, theirs = here.ask(question), there.ask(question)
            assert theirs.label == ours.label or ours.margin < 0.02
    listed = command(server, PROGRAM, "show", "beside", "--modelfile")
    assert "ADAPTER" in listed.stdout


def test_llama_server_with_lora(bundle):
    folder, base = bundle
    file = folder / "household.gguf"
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
            root = here._trie.root_branch
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
