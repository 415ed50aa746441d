"""Export and latency of qcat in the exact shape of Qwen3-0.6B, beside llama.cpp without qcat.

Random weights and a random LoRA adapter measure time and memory as trained ones do; the vocabulary
is the real one, from the folder `qwen3-tokenizer` under QCAT_SHARED. Every measured part runs in a
fresh process. Prints a machine line, a table for export, one for latency and one line of JSON.
What the model answers is noise: this says nothing of accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from memory import Watch

if TYPE_CHECKING:
    from qcat import Classifier
    from qcat.learn.dataset import Example
    from qcat.task import Task

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "household"
TOKENIZER = Path(os.environ.get("QCAT_SHARED", ROOT.parent / "shared")) / "qwen3-tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QUANTIZATIONS = ("q4_k_m", "q4_0")
ASKED, WARM_UP, COLD_STARTS = 50, 3, 5
WAYS = ("bare", "qcat", "completion")
LOAD_ONLY = """
import sys, llama_cpp
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.n_gpu_layers = 0
sys.exit(not llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params))
"""


def main() -> None:
    """Build, export, ask, print."""
    options = _options()
    if not all((TOKENIZER / name).is_file() for name in TOKENIZER_FILES):
        sys.exit(
            f"real_size: no Qwen3 vocabulary at {TOKENIZER}: "
            "set QCAT_SHARED to the folder that holds qwen3-tokenizer"
        )
    found: dict[str, Any] = {"machine": machine()}
    print(machine_line(found["machine"]), flush=True)
    with _work_folder(options.work) as work:
        checkpoint = work / f"checkpoint-{options.layers}"
        if not checkpoint.is_dir():
            _say("building random weights")
            _alone(build, checkpoint, options.layers)
        found["model"] = {"layers": options.layers, **SHAPE}
        found["export"] = {}
        for kind in QUANTIZATIONS:
            _say(f"exporting {kind}")
            target = work / f"export-{kind}"
            shutil.rmtree(target, ignore_errors=True)
            found["export"][kind] = _alone(export, checkpoint, target, kind, options.questions)
        print("\n" + table(export_rows(found["export"])), flush=True)
        found["latency"] = {}
        for kind in QUANTIZATIONS:
            _say(f"asking {kind}")
            gguf = next((work / f"export-{kind}").glob("*.gguf"))
            found["latency"][kind] = {
                **_alone(latency, gguf, options.rounds),
                "cold_start": cold_start(gguf),
            }
    print("\n" + table(latency_rows(found["latency"])))
    print("\n" + json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep model and exports here and use the model again; needs 5 GB "
        "(default: a temporary folder)",
    )
    parser.add_argument(
        "--questions",
        type=_positive,
        default=12,
        metavar="N",
        help="for the proof, and as many for the importance matrix (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=3,
        metavar="N",
        help=f"times the {ASKED} questions are asked (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=_positive,
        default=28,
        metavar="N",
        help="fewer than %(default)s for a quick trial of this script",
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("1 or more expected")
    return value


@contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="qcat-real-size-") as folder:
        yield Path(folder)


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which shares nothing with this one."""
    # The warnings are of libraries, about their own coming versions.
    with ProcessPoolExecutor(1, get_context("spawn"), warnings.simplefilter, ("ignore",)) as pool:
        return pool.submit(function, *arguments).result()


def _say(text: str) -> None:
    print(f"real_size: {text} …", file=sys.stderr, flush=True)


# The machine


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code; the load is that before anything is run."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "llama_cpp_python": metadata.version("llama-cpp-python"),
    }


def machine_line(found: dict[str, Any]) -> str:
    """The machine for a person, in one line."""
    load = " ".join(f"{value:.2f}" for value in found["load"])
    return (
        f"{found['cpu']}, {found['cores']} cores, load average {load}, "
        f"llama-cpp-python {found['llama_cpp_python']}"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# The model


def build(target: Path, layers: int) -> None:
    """Save a random base in bfloat16, as the hub has it, and a random adapter for it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    sys.path.insert(0, str(ROOT / "examples"))
    import tiny_model

    logging.disable_progress_bar()
    partial = target.with_name(f"{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(partial / "base")
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, partial / "base" / name)
    name = str((target / "base").absolute())
    tiny_model.make_adapter(partial / "adapter", model, name, r=16, lora_alpha=16)
    os.rename(partial, target)


# Export


@dataclass
class Step:
    """What one step of an export took."""

    seconds: float = 0.0
    peak_mb: float = 0.0
    """Most resident memory at any moment of the step, of the process and its children together, in
    10^6 bytes, mapped files included."""
    anonymous_mb: float = 0.0
    """The same without mapped files."""


@dataclass
class Steps:
    """Steps of an export in order; each ends where the progress callback says that it is done.

    What happens between two steps counts to the later one, so the seconds add up to the whole.
    """

    watch: Watch
    steps: dict[str, Step] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def progress(self, step: str, done: int, total: int) -> None:
        """To be given to `convert.pipeline.export`."""
        if done == total:
            self.end(step)

    def end(self, name: str) -> None:
        """Count everything since the last step's end to this one."""
        now = time.perf_counter()
        step = self.steps.setdefault(name, Step())
        step.seconds += now - self._since
        peak = self.watch.take()
        step.peak_mb = max(step.peak_mb, peak.resident_mb)
        step.anonymous_mb = max(step.anonymous_mb, peak.anonymous_mb)
        self._since = now


def _peak_mb() -> float:
    """Peak resident memory since the last call, or since the start where it cannot be reset.

    VmHWM is what getrusage gives as ru_maxrss, which the reset takes back too: the whole run's
    peak is therefore the highest step's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    with suppress(OSError):  # where it is not allowed, the peaks only grow from step to step
        Path("/proc/self/clear_refs").write_text("5")
    return peak * 1024 / 1e6


def export(checkpoint: Path, target: Path, kind: str, questions: int) -> dict[str, Any]:
    """Export once, as `qcat export` does, and say what every step took."""
    from convert.pipeline import Request, convert_apart
    from convert.pipeline import export as run_export
    from qcat.task import Task

    task = Task.read(EXAMPLE / "task.toml")
    held_out = spread(_examples()[::2], questions)
    training = spread(_examples()[1::2], questions)
    request = Request(
        task=task,
        target=target,
        adapter=checkpoint / "adapter",
        base=str(checkpoint / "base"),
        quantization=kind,
        held_out=tuple((example.text, example.label) for example in held_out),
        training=tuple(example.text for example in training),
        max_flips=1,  # random weights: nearly any label is as probable as the next
    )
    with Watch() as watch:
        steps = Steps(watch)
        report = run_export(request, steps.progress, convert_apart)
        steps.end("finish")
    return {
        "seconds": sum(step.seconds for step in steps.steps.values()),
        "peak_mb": max(step.peak_mb for step in steps.steps.values()),
        "anonymous_mb": max(step.anonymous_mb for step in steps.steps.values()),
        "file_mb": report["bytes"] / 1e6,
        "steps": {
            name.replace(kind, "quantized"): asdict(step) for name, step in steps.steps.items()
        },
    }


def _examples() -> list[Example]:
    from qcat.learn.dataset import read_examples
    from qcat.task import Task

    return read_examples(EXAMPLE / "questions.jsonl", Task.read(EXAMPLE / "task.toml"))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced: the files are sorted by label."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


# Latency


def latency(gguf: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds a question in three ways, taking turns, in this process."""
    from qcat import Classifier
    from qcat.bundle import Bundle
    from qcat.classifier import prepare
    from qcat.prompt import encode_segments
    from qcat.threads import default_threads

    questions = [example.text for example in spread(_examples(), ASKED)]
    bundle, threads = Bundle.read(gguf), default_threads()
    with Classifier.open(gguf, threads=threads) as house:
        prompt, trie = prepare(bundle.task, house._vocabulary, str(bundle.path))
        if trie.deep_branches:
            sys.exit("real_size: two labels begin with one token: bare is not the same work")
        prefix = encode_segments(prompt.prefix, house._vocabulary)
        rests = {q: encode_segments(prompt.rest(q), house._vocabulary) for q in questions}
        texts = {q: prompt.text(q) for q in questions}
        longest = max(len(sequence) for sequence in trie.sequences)
        labels = dict(zip(trie.first_tokens.tolist(), house.task.labels, strict=True))
        high = Completion(gguf, bundle.task, longest + 1, threads)
        high.check_tokens({texts[q]: prefix + rests[q] for q in questions})
        with bare_llama(house, prefix, trie.first_tokens) as forward:
            ways: dict[str, Callable[[str], str]] = {
                "bare": lambda question: labels[forward(rests[question])],
                "qcat": lambda question: house.ask(question).label,
                "completion": lambda question: high.complete(texts[question]),
            }
            for question in questions[:WARM_UP]:
                for way in ways.values():
                    way(question)
            found = [_round(ways, questions, number) for number in range(rounds)]
    # Random weights spell a label in odd pieces; a trained model takes its own tokens and ends.
    needed = sum(len(sequence) + 1 for sequence in trie.sequences) / len(trie.sequences)
    return {
        "threads": threads,
        "prefix_tokens": len(prefix),
        "question_tokens": median(len(rest) for rest in rests.values()),
        "completion_steps": sum(high.steps) / len(high.steps),
        "completion_steps_trained": needed,
        **_over_rounds(found),
        "rounds": found,
    }


class Completion:
    """llama-cpp-python's high-level interface with a task's grammar, given the full prompt."""

    def __init__(self, gguf: Path, task: Task, max_tokens: int, threads: int) -> None:
        import llama_cpp

        from qcat.grammar import grammar

        self._max_tokens = max_tokens
        self._grammar = llama_cpp.LlamaGrammar.from_string(grammar(task), verbose=False)
        self._llama = llama_cpp.Llama(
            str(gguf), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.steps: list[int] = []
        """Forward passes of each call: one a token, and one for the end unless it was cut."""

    def check_tokens(self, expected: dict[str, list[int]]) -> None:
        """Each text must have the tokens that the two other ways decode."""
        for text, tokens in expected.items():
            if self._llama.tokenize(text.encode(), add_bos=False, special=True) != tokens:
                sys.exit(f"real_size: llama-cpp-python has other tokens for {text[-60:]!r}")

    def complete(self, text: str) -> str:
        """What the model says, less the space around."""
        answer: Any = self._llama.create_completion(
            text, grammar=self._grammar, temperature=0.0, max_tokens=self._max_tokens
        )
        choice = answer["choices"][0]
        ended = choice["finish_reason"] == "stop"
        self.steps.append(answer["usage"]["completion_tokens"] + ended)
        return str(choice["text"]).strip()


@contextmanager
def bare_llama(
    house: Classifier, prefix: Sequence[int], firsts: Any
) -> Iterator[Callable[[Sequence[int]], int]]:
    """One forward pass through llama.cpp's plain calls, which qcat's time is measured against.

    It shares qcat's loaded weights, so that both read the same memory, and has a second context
    made by qcat's own function, so that their settings cannot drift apart.

    Yields:
        A function from the question's tokens to the best of the labels' first tokens.
    """
    import llama_cpp
    import numpy as np

    like = house._scorer._context
    context = house._scorer._open_context(  # tied to its free there
        llama_cpp.llama_n_batch(like),
        llama_cpp.llama_n_seq_max(like),
        llama_cpp.llama_n_threads(like),
    )
    batch = llama_cpp.llama_batch_init(llama_cpp.llama_n_batch(like), 0, 1)
    memory = llama_cpp.llama_get_memory(context)
    shape = (house._vocabulary.n_vocab,)

    def decode(tokens: Sequence[int], start: int, sequence: int) -> Any:
        for at, token in enumerate(tokens):
            batch.token[at] = token
            batch.pos[at] = start + at
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = False
        batch.logits[len(tokens) - 1] = True
        batch.n_tokens = len(tokens)
        if llama_cpp.llama_decode(context, batch):
            sys.exit("real_size: llama.cpp could not evaluate a question")
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(context, len(tokens) - 1), shape
        )

    def forward(tokens: Sequence[int]) -> int:
        llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        row = decode(tokens, len(prefix), 1)
        best = int(firsts[row[firsts].argmax()])
        llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)
        return best

    try:
        decode(prefix, 0, 0)
        yield forward
    finally:
        llama_cpp.llama_batch_free(batch)


def _round(
    ways: dict[str, Callable[[str], str]], questions: Sequence[str], number: int
) -> dict[str, Any]:
    """Every question in every way, in an order that changes from question to question."""
    import numpy as np

    orders = list(permutations(WAYS))  # all six, so that each follows each other equally often
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    answers: dict[str, list[str]] = {way: [] for way in WAYS}
    for turn, question in enumerate(questions, number):
        for way in orders[turn % len(orders)]:
            start = time.perf_counter()
            answer = ways[way](question)
            times[way].append((time.perf_counter() - start) * 1e3)
            answers[way].append(answer)
    medians = {way: median(found) for way, found in times.items()}
    pairs = list(zip(times["qcat"], times["bare"], strict=True))
    return {
        "median_ms": medians,
        "p95_ms": {way: float(np.percentile(found, 95)) for way, found in times.items()},
        "qcat_to_bare": medians["qcat"] / medians["bare"],
        "qcat_to_bare_each": median(qcat / bare for qcat, bare in pairs),
        "qcat_less_bare_ms": median(qcat - bare for qcat, bare in pairs),
        "completion_to_qcat": medians["completion"] / medians["qcat"],
        "same_label": {
            way: sum(a == b for a, b in zip(answers[way], answers["qcat"], strict=True))
            for way in WAYS
        },
    }


def _over_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median over rounds of every number, in the same nesting."""
    first = rounds[0]
    return {
        key: _over_rounds([found[key] for found in rounds])
        if isinstance(value, dict)
        else median(found[key] for found in rounds)
        for key, value in first.items()
    }


def cold_start(gguf: Path) -> dict[str, Any]:
    """Seconds of fresh processes, taking turns: one that only loads, and `qcat ask`."""
    question = _first_question()
    commands = {
        "load": [sys.executable, "-c", LOAD_ONLY, str(gguf)],
        "ask": [str(Path(sys.executable).with_name("qcat")), "ask", "-m", str(gguf), question],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(1 + COLD_STARTS):
        for name, command in commands.items():
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            taken = time.perf_counter() - start
            if done.returncode:
                sys.exit(f"real_size: {command[0]} failed: {done.stderr.strip()[-500:]}")
            if turn:  # the first brings the files into the page cache
                seconds[name].append(taken)
    return {f"{name}_seconds": median(found) for name, found in seconds.items()}


def _first_question() -> str:
    with (EXAMPLE / "questions.jsonl").open(encoding="utf-8") as file:
        return str(json.loads(file.readline())["text"])


# Tables


def export_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Steps down, seconds and peak memory of each quantization across."""
    head = ("export", *(text for kind in found for text in (f"{kind} s", "peak MB")))
    names = next(iter(found.values()))["steps"]
    rows = [
        (name, *(cell for run in found.values() for cell in _cells(run["steps"][name])))
        for name in names
    ]
    whole = ("whole", *(cell for run in found.values() for cell in _cells(run)))
    size = ("file, MB", *(cell for run in found.values() for cell in (f"{run['file_mb']:.1f}", "")))
    return [head, *rows, whole, size]


def _cells(step: dict[str, Any]) -> tuple[str, str]:
    return f"{step['seconds']:.1f}", f"{step['peak_mb']:.0f}"


def latency_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Ways down, median and p95 of each quantization across; then the ratios."""
    runs = list(found.values())
    rows: list[tuple[str, ...]] = [
        ("ms a question", *(text for kind in found for text in (f"{kind} median", "p95")))
    ]
    for way in WAYS:
        cells = ((f"{run['median_ms'][way]:.1f}", f"{run['p95_ms'][way]:.1f}") for run in runs)
        rows.append((way, *(cell for pair in cells for cell in pair)))
    single: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("qcat / bare, aim < 1.05", lambda run: f"{run['qcat_to_bare']:.3f}"),
        ("qcat / bare, each question", lambda run: f"{run['qcat_to_bare_each']:.3f}"),
        ("qcat - bare, each question", lambda run: f"{run['qcat_less_bare_ms']:.2f}"),
        ("completion / qcat, aim > 3", lambda run: f"{run['completion_to_qcat']:.2f}"),
        ("completion's forward passes", lambda run: f"{run['completion_steps']:.2f}"),
        ("the same if trained", lambda run: f"{run['completion_steps_trained']:.2f}"),
        (f"bare's label is qcat's, of {ASKED}", lambda run: f"{run['same_label']['bare']:.0f}"),
        ("cold start, load only, s", lambda run: f"{run['cold_start']['load_seconds']:.2f}"),
        ("cold start, qcat ask, s", lambda run: f"{run['cold_start']['ask_seconds']:.2f}"),
    ]
    rows += [(name, *(c for run in runs for c in (shown(run), ""))) for name, shown in single]
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    main()
