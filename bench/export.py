"""Merge, convert and quantize: qcat beside llama.cpp's own converter and quantizer.

Random weights and a random LoRA adapter in the exact shape of Qwen3-0.6B, real vocabulary (see
`shape.py`). llama.cpp starts from the merged checkpoint that PEFT made of base and adapter; qcat
once from that very checkpoint, and once from base and adapter, which it merges itself. Nothing is
proved. They take turns. llama.cpp's converter comes with the source distribution of
llama-cpp-python, which pip fetches unless `--llama-cpp` names a source tree; its quantizer is the
one in the installed llama-cpp-python, called from a bare Python process. Prints a machine line, a
table of times and peak memory, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import shape
from memory import Watch

KINDS = ("q4_0", "q4_k_m")
ROUNDS = 3
QUANTIZE = """
import ctypes, os, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
params.nthread = int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(
    os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), ctypes.byref(params)
))
"""


def main() -> None:
    """Build, export in both ways, print."""
    options = _options()
    shape.need_vocabulary()
    found: dict[str, Any] = {"machine": shape.machine()}
    print(shape.machine_line(found["machine"]), flush=True)
    with shape.work_folder(options.work) as work:
        checkpoint = work / f"checkpoint-{options.layers}"
        if not checkpoint.is_dir():
            _say("building random weights")
            shape.alone(shape.build, checkpoint, options.layers)
        size = (checkpoint / "base" / "model.safetensors").stat().st_size / 1e6
        found["model"] = {"layers": options.layers, "checkpoint_mb": size, **shape.SHAPE}
        source = options.llama_cpp or fetch(work)
        merged = work / f"merged-{options.layers}"
        if not merged.is_dir():
            _say("merging for llama.cpp")
            shape.alone(merge, checkpoint, merged)
        base, adapter, target = checkpoint / "base", checkpoint / "adapter", work / "qcat"
        ways: dict[str, Callable[[str], dict[str, Any]]] = {
            "qcat": lambda kind: shape.alone(qcat, merged, None, target, kind),
            "qcat with adapter": lambda kind: shape.alone(qcat, base, adapter, target, kind),
        }
        if source:
            ways["llama.cpp"] = lambda kind: llama_cpp(source, merged, work / "llama.cpp", kind)
        found["runs"] = {kind: {way: [] for way in ways} for kind in KINDS}
        for number in range(options.rounds):
            for kind in KINDS:
                for way in list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]:
                    _say(f"round {number + 1} of {options.rounds}: {kind} by {way}")
                    found["runs"][kind][way].append(ways[way](kind))
    print("\n" + shape.table(rows(found["runs"], size)))
    if source:
        print("\n" + shape.table(ratios(found["runs"], size)))
    print("\n" + json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep what is built here and use it again; needs 6 GB (default: a temporary folder)",
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="llama.cpp's source tree (default: that of the installed llama-cpp-python, by pip)",
    )
    parser.add_argument(
        "--rounds",
        type=shape.positive,
        default=ROUNDS,
        metavar="N",
        help="times that each way has its turn (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=shape.positive,
        default=28,
        metavar="N",
        help="fewer than %(default)s for a quick trial of this script",
    )
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"export: {text} …", file=sys.stderr, flush=True)


def fetch(work: Path) -> Path | None:
    """llama.cpp's source tree as the installed llama-cpp-python has it; None if pip cannot."""
    version = metadata.version("llama-cpp-python")
    folder = work / f"llama_cpp_python-{version}"
    if not folder.is_dir():
        _say("fetching llama.cpp's converter")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        command += ["llama-cpp-python", "--dest", str(work), f"llama-cpp-python=={version}"]
        if subprocess.run(command).returncode:
            _say("llama.cpp's converter is not to be had: qcat is measured alone")
            return None
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
    return folder / "vendor" / "llama.cpp"


def merge(checkpoint: Path, target: Path) -> None:
    """Save base and adapter as one checkpoint in bfloat16, as people do it by hand."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(checkpoint / "adapter")).merge_and_unload()
    partial = target.with_name(f"{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    for name in shape.TOKENIZER_FILES:
        shutil.copyfile(shape.TOKENIZER / name, partial / name)
    partial.rename(target)


def qcat(base: Path, adapter: Path | None, target: Path, kind: str) -> dict[str, Any]:
    """Export as `qcat export` does it without questions."""
    from qcat.task import Task
    from qcat.workflows.export import convert_apart, export
    from qcat.workflows.export_job import Request

    shutil.rmtree(target, ignore_errors=True)
    request = Request(
        task=Task.read(shape.EXAMPLE / "task.toml"),
        target=target,
        adapter=adapter,
        base=str(base),
        quantization=kind,
    )
    with Watch() as watch:
        steps = shape.Steps(watch)
        export(request, steps.progress, convert_apart)
        steps.end("finish")
    return _whole({name: asdict(step) for name, step in steps.steps.items()})


def llama_cpp(source: Path, merged: Path, target: Path, kind: str) -> dict[str, Any]:
    """Convert and quantize with llama.cpp's own programs."""
    from qcat.threads import default_threads

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    # The converter imports this before it sees that the vocabulary is of another kind.
    (target / "sentencepiece.py").write_text("class SentencePieceProcessor: ...\n")
    full, small = target / "full.gguf", target / "small.gguf"
    converter = [source / "convert_hf_to_gguf.py", merged, "--outtype", "f16", "--outfile", full]
    quantizer = ["-c", QUANTIZE, full, small, kind, default_threads()]
    steps = {}
    for name, command in (("convert", converter), ("quantize", quantizer)):
        with Watch(itself=False) as watch:
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(target)},
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                sys.exit(f"export: llama.cpp could not {name}: {done.stderr.strip()[-1000:]}")
            peak = watch.take()
        steps[name] = asdict(shape.Step(seconds, peak.resident_mb, peak.anonymous_mb))
    shutil.rmtree(target)
    return _whole(steps)


def _whole(steps: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Steps, and what they make together."""
    return {
        "seconds": sum(step["seconds"] for step in steps.values()),
        **{key: max(s[key] for s in steps.values()) for key in ("peak_mb", "anonymous_mb")},
        "steps": steps,
    }


def rows(runs: dict[str, Any], checkpoint_mb: float) -> list[tuple[str, ...]]:
    """Steps of each way down; median seconds and the highest peaks across."""
    head = ("", "s", "peak MB", "× bf16", "anonymous MB", "× bf16")
    found: list[tuple[str, ...]] = [head]
    for kind, ways in runs.items():
        for way, turns in ways.items():
            for name in turns[0]["steps"]:
                steps = [turn["steps"][name] for turn in turns]
                found.append((f"{kind} {way}: {name}", *_cells(steps, checkpoint_mb)))
            found.append((f"{kind} {way}: whole", *_cells(turns, checkpoint_mb)))
    return found


def _cells(turns: list[dict[str, Any]], checkpoint_mb: float) -> tuple[str, ...]:
    peaks = [max(turn[key] for turn in turns) for key in ("peak_mb", "anonymous_mb")]
    memory = [cell for p in peaks for cell in (f"{p:.0f}", f"{p / checkpoint_mb:.2f}")]
    return (f"{median(turn['seconds'] for turn in turns):.1f}", *memory)


def ratios(runs: dict[str, Any], checkpoint_mb: float) -> list[tuple[str, ...]]:
    """The two aims, and the time of what qcat does beside."""
    found: list[tuple[str, ...]] = [("", *runs)]
    aims = {"qcat": "time, qcat / llama.cpp, aim ≤ 1", "qcat with adapter": "the same, merging"}
    for way, name in aims.items():
        times = (
            median(turn["seconds"] for turn in ways[way])
            / median(turn["seconds"] for turn in ways["llama.cpp"])
            for ways in runs.values()
        )
        found.append((name, *(f"{time:.2f}" for time in times)))
    peaks = (max(t["peak_mb"] for t in ways["qcat with adapter"]) for ways in runs.values())
    ours = (f"{peak / checkpoint_mb:.2f}" for peak in peaks)
    return [*found, ("peak memory, merging / bf16 checkpoint, aim ≤ 1.5", *ours)]


if __name__ == "__main__":
    main()
