"""One question through Ollama and through qcat, in the exact shape of Qwen3-0.6B, side by side.

One warmed server (`make test-ollama` installs it), as it is started by default, and fresh
questions for every way of asking, since the server answers a prompt that it has seen from its
cache. Random weights measure time as trained ones do, but for one thing: a trained model puts its
labels among the best twenty tokens. So the embedding of the labels' first tokens is lengthened
along a direction that every state has. What the model answers is noise: this says nothing of
accuracy.

Needs the real vocabulary, in the folder `qwen3-tokenizer` under QCAT_SHARED, and
`pip install ollama-classifier`. Prints a machine line, a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from shape import (
    EXAMPLE,
    ROOT,
    build,
    machine,
    machine_line,
    need_vocabulary,
    spread,
    table,
)

sys.path.remove(str(Path(__file__).resolve().parent))  # or `import ollama` would find this file

TURNS = 10
IN_A_ROW = 2  # measured in each turn, after one that brings the processor back to the work
SLOW = ("generate", "classify")  # these run long enough: one a turn, without such a start
LAYERS = 28


def main() -> None:
    """Build, export, deploy, ask in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep the model here and use it again (3 GB)"
    )
    work = parser.parse_args().work
    sys.path.insert(0, str(ROOT / "tools"))
    from ollama_server import PROGRAM, ollama_server

    if not PROGRAM.is_file():
        sys.exit("bench/ollama: no Ollama: `make test-ollama` installs it")
    need_vocabulary()
    found: dict[str, Any] = {
        "machine": machine(),
        "ollama_classifier": metadata.version("ollama-classifier"),
    }
    print(machine_line(found["machine"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="qcat-bench-") as folder:
        bundle = model(work or Path(folder))
        with ollama_server(Path(folder) / "server") as server:
            found["server"] = _version(server.address)
            found.update(measure(bundle, server.address))
    print("\n" + table(rows(found)))
    print("\n" + json.dumps(found))


def model(work: Path) -> Path:
    """A bundle of random weights that puts the labels first; made where it is not there yet."""
    target = work / "ollama-dist"
    if target.is_dir():
        return target
    from transformers import AutoModelForCausalLM

    from qcat.encoding.prompt import encode_answers
    from qcat.encoding.tokenization import HubTokenizer
    from qcat.task import Task
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "ollama-checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    build(checkpoint, LAYERS)
    base = checkpoint / "base"
    task = Task.read(EXAMPLE / "task.toml")
    network = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    rows = network.get_input_embeddings().weight.data
    rows[:, 0] = 1.0
    rows[[answer[0] for answer in encode_answers(task, HubTokenizer(base))], 0] = 2.0
    network.save_pretrained(base)
    del network
    questions = _questions(12)
    export(
        Request(
            task=task,
            target=target,
            base=str(base),
            training=tuple(questions),
            max_flips=1,
        )
    )
    shutil.rmtree(checkpoint)
    return target


def measure(bundle: Path, address: str) -> dict[str, Any]:
    """Milliseconds a question in each way, in turns; every question is asked once only."""
    import ollama
    from ollama_classifier import LLMClassifier
    from ollama_classifier.backends import OllamaBackend

    from qcat import Classifier
    from qcat.task import Task
    from qcat.workflows.deploy import deploy

    deploy(bundle, "house", timeout=600)
    labels = list(Task.read(EXAMPLE / "task.toml").labels)
    client = ollama.Client()
    other = LLMClassifier(OllamaBackend("house", host=f"http://{address}"))
    schema = {"type": "string", "enum": labels}
    with (
        Classifier.open(bundle / "household.gguf") as here,
        Classifier.open("ollama:house") as there,
    ):
        # A trained model writes a label and stops: two tokens.
        ways: dict[str, Callable[[str], Any]] = {
            "local": here.ask,
            "backend": there.ask,
            "plain": lambda q: client.generate("house", q, options={"num_predict": 2}),
            "enum": lambda q: client.generate(
                "house", q, format=schema, options={"num_predict": 30}
            ),
            "generate": lambda q: other.generate(q, labels),
            "classify": lambda q: other.classify(q, labels),
        }
        fresh = iter(_questions((1 + TURNS) * len(ways) * (1 + IN_A_ROW)))
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + TURNS):
            names = list(ways)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                for number in range(1 if name in SLOW else 1 + IN_A_ROW):
                    question = next(fresh)
                    began = time.perf_counter()
                    ways[name](question)
                    if turn and (number or name in SLOW):  # the first turn warms up
                        taken[name].append(1e3 * (time.perf_counter() - began))
            print(f"bench/ollama: turn {turn} of {TURNS} …", file=sys.stderr, flush=True)
    medians = {name: median(times) for name, times in taken.items()}
    return {
        "median_ms": medians,
        "quartiles_ms": {name: quantiles(times, n=4)[::2] for name, times in taken.items()},
        "enum_to_local": medians["enum"] / medians["local"],
        "classify_to_local": medians["classify"] / medians["local"],
    }


def _questions(count: int) -> list[str]:
    lines = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    return spread(texts, count)


def _version(address: str) -> str:
    from urllib.request import urlopen

    with urlopen(f"http://{address}/api/version", timeout=5) as answer:
        return str(json.load(answer)["version"])


NAMES = {
    "local": "qcat, llama backend (in this process)",
    "backend": "qcat, ollama backend",
    "plain": "Ollama, plain generate",
    "enum": "Ollama, format enum",
    "generate": "ollama-classifier, generate",
    "classify": "ollama-classifier, classify",
}


def rows(found: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Ways down; median, quartiles and how many times the local runtime's median."""
    local = found["median_ms"]["local"]
    return [
        ("one question, ms", "median", "quartiles", "× local"),
        *(
            (
                text,
                f"{found['median_ms'][name]:.1f}",
                "{:.1f} - {:.1f}".format(*found["quartiles_ms"][name]),
                f"{found['median_ms'][name] / local:.1f}",
            )
            for name, text in NAMES.items()
        ),
    ]


if __name__ == "__main__":
    main()
