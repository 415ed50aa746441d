"""What the benchmarks share: the exact shape of Qwen3-0.6B with random weights, and the machine.

Random weights and a random LoRA adapter measure time and memory as trained ones do; the vocabulary
is the real one, from the folder `qwen3-tokenizer` under QCAT_SHARED.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import Watch

if TYPE_CHECKING:
    from qcat.data.dataset import Example

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
LOAD_ONLY = """
import sys, llama_cpp
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.n_gpu_layers = 0
sys.exit(not llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params))
"""


def positive(text: str) -> int:
    """A number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("1 or more expected")
    return value


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="qcat-real-size-") as folder:
        yield Path(folder)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which shares nothing with this one."""
    # The warnings are of libraries, about their own coming versions.
    with ProcessPoolExecutor(1, get_context("spawn"), warnings.simplefilter, ("ignore",)) as pool:
        return pool.submit(function, *arguments).result()


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code; the load is that before anything is run."""
    from qcat.workflows.measure import processor

    return {
        "cpu": processor(),
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


def need_vocabulary() -> None:
    """End the program if the real vocabulary is not there."""
    if not all((TOKENIZER / name).is_file() for name in TOKENIZER_FILES):
        sys.exit(
            f"{Path(sys.argv[0]).stem}: no Qwen3 vocabulary at {TOKENIZER}: "
            "set QCAT_SHARED to the folder that holds qwen3-tokenizer"
        )


def build(target: Path, layers: int) -> None:
    """Save a random base in bfloat16, as the hub has it, and a random adapter for it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    sys.path.insert(0, str(ROOT / "tools"))
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
        """To be given to `qcat.workflows.export.export`."""
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


def peak_mb() -> float:
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
    from qcat.task import Task
    from qcat.workflows.export import convert_apart
    from qcat.workflows.export import export as run_export
    from qcat.workflows.export_job import Request

    task = Task.read(EXAMPLE / "task.toml")
    held_out = spread(examples()[::2], questions)
    training = spread(examples()[1::2], questions)
    request = Request(
        task=task,
        target=target,
        adapter=checkpoint / "adapter",
        base=str(checkpoint / "base"),
        quantization=kind,
        held_out=tuple(held_out),
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


def examples() -> list[Example]:
    from qcat.data.dataset import read_examples
    from qcat.task import Task

    return read_examples(EXAMPLE / "questions.jsonl", Task.read(EXAMPLE / "task.toml"))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced: the files are sorted by label."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def first_question() -> str:
    with (EXAMPLE / "questions.jsonl").open(encoding="utf-8") as file:
        return str(json.loads(file.readline())["text"])


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
