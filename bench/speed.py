"""What asking costs beside llama.cpp alone: warm, cold, in batches, with many labels, in memory.

The model has the exact shape of Qwen3-0.6B, random weights and the real vocabulary, from the folder
`qwen3-tokenizer` under QCAT_SHARED; beside it the small model that comes with qcat. Every part runs
in a fresh process, and what is compared takes turns within one run. Prints a machine line, a table
of aims beside what was measured, and one line of JSON. What the large model answers is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import shape
from shape import EXAMPLE, TOKENIZER, table

if TYPE_CHECKING:
    from qcat import Classifier
    from qcat.task import Task

ASKED, WARM_UP = 50, 3
FEW, MANY = 3, 500  # labels
BATCH, TURNS = 64, 20  # questions given at once, and how often
# What a process must do that asks without qcat: import, load, evaluate the question alone.
BARE = """
import ctypes, json, sys, llama_cpp as L
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
params = L.llama_model_default_params()
params.n_gpu_layers = 0
model = L.llama_model_load_from_file(sys.argv[1].encode(), params)
tokens = json.loads(sys.argv[2])
params = L.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.n_threads = params.n_threads_batch = int(sys.argv[3])
context = L.llama_init_from_model(model, params)
array = (L.llama_token * len(tokens))(*tokens)
status = L.llama_decode(context, L.llama_batch_get_one(array, len(tokens)))
logits = L.llama_get_logits_ith(context, -1)
print(max(logits[i] for i in range(100)))
L.llama_free(context)
L.llama_model_free(model)
sys.exit(status)
"""


def main() -> None:
    """Build, measure part by part, print."""
    options = _options()
    shape.need_vocabulary()
    from qcat.backends.llama import repacks

    if not repacks():
        sys.exit("speed: as it comes, llama.cpp crashes when built with AMX: see `qcat doctor`")
    found: dict[str, Any] = {"machine": shape.machine()}
    print(shape.machine_line(found["machine"]), flush=True)
    with shape.work_folder(options.work) as work:
        os.environ["QCAT_CACHE"] = str(work / "cache")
        gguf = model(work, options.layers, options.quant)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "warm": lambda: shape.alone(warm, gguf, options.rounds),
            "labels": lambda: shape.alone(labels, gguf, work),
            "tokens": lambda: shape.alone(prompts, gguf, work),
            "batch": lambda: shape.alone(batches, gguf, options.llama_bench),
            "small": lambda: shape.alone(small),
            "cold": lambda: cold(gguf, options.starts, work),
        }
        for name in options.only or parts:
            print(f"speed: {name} …", file=sys.stderr, flush=True)
            found[name] = parts[name]()
            print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    print("\n" + table(rows(found)))
    if "tokens" in found:
        print("\n" + table(prompt_rows(found["tokens"])))
    print("\n" + json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here (3 GB)")
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick trial")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--rounds", type=int, default=3, help=f"times {ASKED} questions are asked")
    parser.add_argument("--starts", type=int, default=20, help="of cold processes")
    parser.add_argument("--only", action="append", metavar="PART")
    parser.add_argument(
        "--llama-bench",
        type=Path,
        default=shutil.which("llama-bench"),
        metavar="FILE",
        help="llama.cpp's own benchmark; without it nothing is compared with it",
    )
    return parser.parse_args()


def model(work: Path, layers: int, kind: str) -> Path:
    """The GGUF, made by an export without proof unless it is there."""
    target = work / f"speed-{layers}-{kind}"
    if not target.is_dir():
        checkpoint = work / f"checkpoint-{layers}"
        if not checkpoint.is_dir():
            shape.alone(shape.build, checkpoint, layers)
        shape.alone(_export, checkpoint, target, kind)
    return target / "household.gguf"


def _export(checkpoint: Path, target: Path, kind: str) -> None:
    from qcat.task import Task
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    task = Task.read(EXAMPLE / "task.toml")
    adapter, base = checkpoint / "adapter", str(checkpoint / "base")
    export(Request(task, target, adapter=adapter, base=base, quantization=kind))


def questions(count: int) -> list[str]:
    """Household questions, spread over the labels."""
    return [example.text for example in shape.spread(shape.examples(), count)]


# Taking turns


def take_turns(
    ways: dict[str, Callable[[Any], Any]], items: Sequence[Any], rounds: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of every item in every way, in an order that changes from item to item."""
    orders = list(permutations(ways))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for item in items[:WARM_UP]:
        for way in ways.values():
            way(item)
    for number in range(rounds):
        for turn, item in enumerate(items, number):
            for way in orders[turn % len(orders)]:
                start = time.perf_counter()
                ways[way](item)
                times[way].append((time.perf_counter() - start) * 1e3)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    import numpy as np

    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": middle, "low": low, "high": high, "count": len(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Of two ways that took turns: median and quartiles of the ratio, pair by pair."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


# Parts


class Completion:
    """llama-cpp-python's high-level interface with a task's grammar, given the full prompt."""

    def __init__(self, gguf: Path, task: Task, max_tokens: int, threads: int) -> None:
        import llama_cpp

        from qcat.encoding.grammar import grammar

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
                sys.exit(f"speed: llama-cpp-python has other tokens for {text[-60:]!r}")

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
    row = (house._vocabulary.n_vocab,)

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
            sys.exit("speed: llama.cpp could not evaluate a question")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, len(tokens) - 1), row)

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


@contextmanager
def opened(gguf: Path) -> Iterator[tuple[Any, Any, Any]]:
    """A classifier, a bare forward pass on its weights, and the tokens of a question."""
    from qcat import Classifier

    with Classifier.open(gguf) as classifier:
        prefix = list(classifier._encoded.prefix)
        firsts = classifier._encoded.trie.first_tokens

        def rest(question: str) -> list[int]:
            return classifier._encoded.ids(question)

        with bare_llama(classifier, prefix, firsts) as forward:
            yield classifier, forward, rest


def warm(gguf: Path, rounds: int) -> dict[str, Any]:
    """`ask`, the bare forward pass, and create_completion under a LlamaGrammar."""
    from qcat.gguf.bundle import Bundle
    from qcat.threads import default_threads

    asked = questions(ASKED)
    task = Bundle.read(gguf).task
    with opened(gguf) as (classifier, forward, rest):
        rests = {question: rest(question) for question in asked}
        texts = {question: classifier._encoded.prompt.text(question) for question in asked}
        longest = max(len(sequence) for sequence in classifier._encoded.trie.sequences)
        high = Completion(gguf, task, longest + 1, default_threads())
        prefix = list(classifier._encoded.prefix)
        high.check_tokens({texts[question]: prefix + rests[question] for question in asked})
        times = take_turns(
            {
                "bare": lambda question: forward(rests[question]),
                "ask": classifier.ask,
                "completion": lambda question: high.complete(texts[question]),
            },
            asked,
            rounds,
        )
    return {
        "ms": {way: spread(values) for way, values in times.items()},
        "tokens": median(len(rest) for rest in rests.values()),
        "ask / bare": ratio(times["ask"], times["bare"]),
        "completion / ask": ratio(times["completion"], times["ask"]),
        "completion's passes": sum(high.steps) / len(high.steps),
    }


def labels(gguf: Path, work: Path) -> dict[str, Any]:
    """`ask` over the bare pass with few and with many labels, whose first tokens all differ."""
    from qcat import Classifier

    with Classifier.open(gguf) as classifier:
        words = single_words(classifier._vocabulary, MANY)
    found: dict[str, Any] = {}
    for count in (FEW, MANY):
        path = with_task(gguf, work, labels=dict.fromkeys(words[:count], ""))
        with opened(path) as (classifier, forward, rest):
            assert not classifier._encoded.trie.deep_branches
            rests = {question: rest(question) for question in questions(ASKED)}
            times = take_turns(
                {"bare": lambda q, rests=rests: forward(rests[q]), "ask": classifier.ask},
                list(rests),
            )
        found[str(count)] = {
            "ms": {way: spread(values) for way, values in times.items()},
            "ask / bare": ratio(times["ask"], times["bare"]),
        }
        path.unlink()
    few, many = (found[str(count)]["ask / bare"]["median"] for count in (FEW, MANY))
    return {**found, "growth beyond the prompt": many / few - 1}


def single_words(vocabulary: Any, count: int) -> list[str]:
    """Words that are one token each after a space."""
    pieces = (vocabulary.piece(token) for token in range(vocabulary.n_vocab))
    words = [p.decode()[1:] for p in pieces if re.fullmatch(rb" [a-z]{4,9}", p)]
    return words[:: len(words) // count][:count]


def with_task(gguf: Path, work: Path, **changes: Any) -> Path:
    """A copy of a GGUF whose task has other labels, words or style."""
    from qcat.encoding.prompt import with_codes
    from qcat.encoding.tokenization import HubTokenizer
    from qcat.gguf.bundle import Bundle
    from qcat.gguf.sections import TASK_KEY, write_sections

    task = Bundle.read(gguf).task.replace(**changes)
    path = work / "other.gguf"
    shutil.copyfile(gguf, path)
    write_sections(path, {TASK_KEY: with_codes(task, HubTokenizer(TOKENIZER)).to_dict()})
    return path


PROMPTS: dict[str, dict[str, str]] = {
    "plain, name, Category:": {"answer": "Category"},
    "plain, name, line break": {"answer": ""},
    "plain, code, Category:": {"answer": "Category", "verbalizer": "code"},
    "plain, code, line break": {"answer": "", "verbalizer": "code"},
    "chat, name": {"style": "chat"},
    "chat, code": {"style": "chat", "verbalizer": "code"},
}


def prompts(gguf: Path, work: Path) -> dict[str, Any]:
    """Tokens and latency of each way to word the prompt; one context each, taking turns."""
    from contextlib import ExitStack

    from qcat import Classifier

    asked = questions(ASKED)
    with ExitStack() as stack:
        ways, tokens, prefixes = {}, {}, {}
        for name, changes in PROMPTS.items():
            path = with_task(gguf, work, **changes)
            classifier = stack.enter_context(Classifier.open(path))
            path.unlink()  # it stays mapped
            ways[name] = classifier.ask
            tokens[name] = median(classifier.count_tokens(question) for question in asked)
            prefixes[name] = classifier._scorer._n_prefix
        # all orders of six ways would be many: each starts a turn in its turn
        times: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        for turn, question in enumerate(asked * 2):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                ways[name](question)
                times[name].append((time.perf_counter() - start) * 1e3)
    first = times[names[0]]
    return {
        name: {
            "prefix tokens": prefixes[name],
            "question tokens": tokens[name],
            "ms": spread(times[name]),
            "of the first": ratio(times[name], first),
        }
        for name in names
    }


def batches(gguf: Path, program: Path | None) -> dict[str, Any]:
    """The same questions one by one and several at a time, and llama-bench, taking turns."""
    from qcat import Classifier
    from qcat.backends.llama_scorer import PASS_TOKENS

    groups = [questions(TURNS * BATCH)[at::TURNS] for at in range(TURNS)]
    found: dict[str, list[float]] = {}
    with Classifier.open(gguf) as classifier:
        tokens = {id(group): sum(map(classifier.count_tokens, group)) for group in groups}
        ways = {
            "one by one": lambda group: [classifier.ask(question) for question in group],
            "together": lambda group: list(classifier.ask_many(group)),
        }
        if program:
            ways["llama-bench"] = lambda _: found.setdefault("llama-bench", []).append(
                llama_bench(program, gguf, PASS_TOKENS)
            )
        times = take_turns(ways, groups)
    for way in ("one by one", "together"):
        found[way] = [
            1e3 * tokens[id(group)] / taken for group, taken in zip(groups, times[way], strict=True)
        ]
    bench = found.get("llama-bench", [])[WARM_UP:]
    return {
        "tokens a second": {way: spread(values) for way, values in found.items()},
        "together / one by one": ratio(found["together"], found["one by one"]),
        **({"together / llama-bench": ratio(found["together"], bench)} if bench else {}),
    }


def llama_bench(program: Path, gguf: Path, size: int) -> float:
    """Prompt tokens a second of llama-bench, as it comes: it may use flash attention."""
    from qcat.threads import default_threads

    command = [str(program), "-m", str(gguf), "-t", str(default_threads()), "-n", "0", "-r", "5"]
    command += ["-p", str(size), "-o", "json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return median(json.loads(said)[0]["samples_ts"])


def small() -> dict[str, Any]:
    """`ask` with the model that comes with qcat, and its forward pass alone."""
    from qcat.classifier import DEFAULT_MODEL

    asked = questions(200)
    with opened(DEFAULT_MODEL) as (classifier, forward, rest):
        rests = {question: rest(question) for question in asked}
        times = take_turns(
            {"bare": lambda question: forward(rests[question]), "ask": classifier.ask}, asked, 3
        )
        many: dict[str, list[float]] = take_turns(
            {
                "one by one": lambda group: [classifier.ask(question) for question in group],
                "together": lambda group: list(classifier.ask_many(group)),
            },
            [asked[at::20] for at in range(20)],
        )
    return {
        "ms": {way: spread(values) for way, values in times.items()},
        "ask / bare": ratio(times["ask"], times["bare"]),
        "one by one / together": ratio(many["one by one"], many["together"]),
    }


def cold(gguf: Path, starts: int, work: Path) -> dict[str, Any]:
    """Fresh processes, taking turns: bare, `qcat ask` with a warm cache folder and without one."""
    from qcat.backends.llama import LlamaModel
    from qcat.encoding.prompt import build_prompt, encode_segments
    from qcat.gguf.bundle import Bundle
    from qcat.threads import default_threads

    question = questions(1)[0]
    with LlamaModel(gguf, vocab_only=True) as vocabulary:
        prompt = build_prompt(Bundle.read(gguf).task, vocabulary)
        tokens = encode_segments(prompt.rest(question), vocabulary)
    ask = [str(Path(sys.executable).with_name("qcat")), "ask", "-m", str(gguf), question]
    bare = [sys.executable, "-c", BARE, str(gguf), json.dumps(tokens), str(default_threads())]
    seconds: dict[str, list[float]] = {"bare": [], "ask": [], "ask, no cache": []}
    peaks: dict[str, list[float]] = {way: [] for way in seconds}
    for turn in range(1 + starts):
        for way in list(seconds)[turn % 3 :] + list(seconds)[: turn % 3]:
            environment = dict(os.environ)
            if way == "ask, no cache":
                environment["QCAT_CACHE"] = "/dev/null"
            start = time.perf_counter()
            process = subprocess.Popen(
                bare if way == "bare" else ask, stdout=subprocess.DEVNULL, env=environment
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            taken = time.perf_counter() - start
            if process.returncode not in (0, 3):
                sys.exit(f"speed: {way} failed")
            if turn:  # the first brings the files into memory
                seconds[way].append(taken)
                peaks[way].append(used.ru_maxrss * 1024 / 1e6)
    return {
        "seconds": {way: spread(values) for way, values in seconds.items()},
        "ask / bare": ratio(seconds["ask"], seconds["bare"]),
        "no cache / bare": ratio(seconds["ask, no cache"], seconds["bare"]),
        "peak MB": {way: max(values) for way, values in peaks.items()},
        "file MB": gguf.stat().st_size / 1e6,
    }


# Tables


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """An aim, what was measured, and the quartiles."""
    made: list[tuple[str, ...]] = [("", "aim", "measured", "quartiles", "")]

    def add(name: str, aim: str, value: float, kept: bool, quartiles: Any = None) -> None:
        range_ = f"{quartiles['low']:.3f} to {quartiles['high']:.3f}" if quartiles else ""
        made.append((name, aim, f"{value:.3f}", range_, "" if kept else "missed"))

    def at_most(name: str, limit: float, of: dict[str, float]) -> None:
        add(name, f"<= {limit}", of["median"], of["median"] <= limit, of)

    def at_least(name: str, limit: float, of: dict[str, float]) -> None:
        add(name, f">= {limit}", of["median"], of["median"] >= limit, of)

    if one := found.get("warm"):
        at_most("warm: ask / bare forward pass", 1.03, one["ask / bare"])
        at_least("warm: create_completion / ask", 4, one["completion / ask"])
    if one := found.get("labels"):
        grown = one["growth beyond the prompt"]
        add(f"{FEW} to {MANY} labels, beyond the prompt", "< 0.1", grown, grown < 0.1)
    if one := found.get("cold"):
        at_most("cold: qcat ask / bare process", 1.15, one["ask / bare"])
        over = one["peak MB"]["ask"] - one["file MB"]
        add("memory over the file, MB", "<= 150", over, over <= 150)
    if one := found.get("small"):
        at_most("small model: ask, ms", 3, one["ms"]["ask"])
    if one := found.get("batch"):
        at_least("batch: ask_many / one by one", 1.6, one["together / one by one"])
        if "together / llama-bench" in one:
            at_least("batch: tokens/s over llama-bench", 0.95, one["together / llama-bench"])
    return made


def prompt_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What the words of the prompt cost."""
    head = ("prompt", "prefix tokens", "question tokens", "ms", "of the first")
    return [
        head,
        *(
            (
                name,
                f"{row['prefix tokens']}",
                f"{row['question tokens']:g}",
                f"{row['ms']['median']:.1f}",
                f"{row['of the first']['median']:.3f}",
            )
            for name, row in found.items()
        ),
    ]


if __name__ == "__main__":
    main()
