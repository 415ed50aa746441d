"""Time and memory of a training step in the exact shape of Qwen3-0.6B, batch 8, on the CPU.

Random weights, the real vocabulary (the folder `qwen3-tokenizer` under QCAT_SHARED), the example
task. A step is measured as `qcat train` does it, the prefix evaluated once a batch, and beside it
with every row whole, as trainers usually do it: same model, same batches, taking turns. Prints a
table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from shape import TOKENIZER, alone, build, machine, machine_line, peak_mb

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "household"
BATCH = 8


def main() -> None:
    """Build, train a few steps, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the weights here")
    parser.add_argument("--steps", type=int, default=5, help="of each kind (default: %(default)s)")
    options = parser.parse_args()
    if not (TOKENIZER / "tokenizer.json").is_file():
        sys.exit(f"train_size: no Qwen3 vocabulary at {TOKENIZER}: set QCAT_SHARED")
    found: dict[str, Any] = {"machine": machine()}
    print(machine_line(found["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = (options.work or Path(temporary)) / "checkpoint-28"
        if not checkpoint.is_dir():
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            alone(build, checkpoint, 28)
        for shared in (True, False):
            found["shared" if shared else "whole"] = alone(steps, checkpoint, shared, 2)
        turns = alone(both, checkpoint, options.steps)
    found["turns"] = turns
    print(f"{'batch of 8':24}{'s a step':>10}{'peak MB':>10}")
    for name, text in (("shared", "prefix once a batch"), ("whole", "every row whole")):
        print(f"{text:24}{turns[name]:10.2f}{found[name]['peak_mb']:10.0f}")
    print(f"whole / shared: {turns['whole'] / turns['shared']:.2f}")
    print(json.dumps(found))


def steps(checkpoint: Path, shared: bool, count: int) -> dict[str, Any]:
    """Peak memory of a process that loads the model and trains a few steps one way."""
    run, batches, whole = _setup(checkpoint)
    for batch in batches[:count]:
        _step(run, batch, None if shared else whole)
    return {"peak_mb": peak_mb()}


def both(checkpoint: Path, count: int) -> dict[str, float]:
    """Median seconds of a step each way, taking turns, after one of each to warm up."""
    run, batches, whole = _setup(checkpoint)
    taken: dict[str, list[float]] = {"shared": [], "whole": []}
    for number, batch in enumerate(batches[: count + 1]):
        for name, other in (("shared", None), ("whole", whole)):
            start = time.perf_counter()
            _step(run, batch, other)
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def _setup(checkpoint: Path) -> tuple[Any, list[Any], Any]:
    warnings.simplefilter("ignore")
    from qcat.data.dataset import read_examples
    from qcat.encoding.encoded import EncodedTask
    from qcat.encoding.tokenization import HubTokenizer
    from qcat.task import Task
    from qcat.training.loop import Loop, _batches
    from qcat.training.objective import Scorer
    from qcat.training.settings import Settings
    from qcat.training.train import _adapted, _encode

    task = Task.read(EXAMPLE / "task.toml")
    encoded = EncodedTask.build(task, HubTokenizer(checkpoint / "base"))
    prefix, trie = list(encoded.prefix), encoded.trie
    settings = Settings(base=str(checkpoint / "base"), method="lora", batch=BATCH)
    model = _adapted(checkpoint / "base", settings)
    run = Loop(model, prefix, trie, settings, checkpoint)
    rows = [
        _encode(example, encoded)
        for example in read_examples(EXAMPLE / "questions.jsonl", task)[::10]
    ]
    # The prefix in every row, after one token that both ways share.
    whole = Scorer(model.get_base_model(), prefix[:1], trie)
    return run, _batches(rows, BATCH, random.Random(0)), (whole, prefix[1:])


def _step(run: Any, batch: Any, whole: Any) -> None:
    from qcat.training.objective import Encoded

    scorer = run.scorer
    try:
        if whole:
            run.scorer, prefix = whole
            batch = [Encoded((*prefix, *item.rest), item.label) for item in batch]
        run._step(batch, 1000)
    finally:
        run.scorer = scorer


if __name__ == "__main__":
    main()
