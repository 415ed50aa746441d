"""What an adapter beside its base costs a question, by its rank and the modules that it is on.

    python bench/beside.py build/four_bits/runs/smollm2-household-lora

takes a finished run of `qcat train --method lora` on a GGUF base (`four_bits.py train` makes such
ones). A lower rank is the best approximation of the trained product (truncated singular value
decomposition), fewer modules are the others left out. All files, and the base without an adapter
under the same prompt, take turns. Prints a table and one line of JSON; measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qcat.cli.output import Bars, table
from qcat.data.dataset import read_examples
from qcat.evaluation.proof import replay_gguf

ATTENTION, MLP = "self_attn", "mlp"
BARE = "base alone"
FORMS = {
    "rank 16": (16, ""),
    "rank 8": (8, ""),
    "rank 4": (4, ""),
    "rank 2": (2, ""),
    "rank 16, attention": (16, ATTENTION),
    "rank 16, MLP": (16, MLP),
}
"""Rank, and what the names of the modules hold."""


def main() -> None:
    """Make the files, ask them in turns, print."""
    from qcat.evaluation.proof import quality
    from qcat.task import Task
    from qcat.workflows.choose import try_all
    from qcat.workflows.export_job import Request, prepare_job

    warnings.simplefilter("ignore")
    options = _options()
    task = Task.read(options.run / "task.toml")
    examples = read_examples(options.run / "validation.jsonl", task)[: options.questions]
    truth = [example.label for example in examples]
    with tempfile.TemporaryDirectory() as work:
        job, served = prepare_job(Path(work, "unused"), Request(task, Path(work), options.run))
        files, base = _files(job, options.run, Path(work), served.encoded.task)
        rests = [served.encoded.rest(example.text) for example in examples]

        def ask(path: Path, rows: Sequence[int]) -> Any:
            asked = [rests[row] for row in rows]
            return replay_gguf(path, served.encoded, asked, base=None if path == base else base)

        shape = np.zeros((len(truth), len(task.labels)))
        with Bars() as bars:
            trials, found = try_all(files, ask, shape, truth, partial(bars.show, "ask"))
        rows = [
            {
                "form": trial.kind,
                "mb": trial.bytes / 1e6,
                "ms": trial.median_ms,
                **quality(found[trial.kind], found["rank 16"], truth).to_dict(),
            }
            for trial in trials
        ]
    heading = ("", "MB", "ms", "accuracy", "flips", "mean KL")
    cells = [
        (r["form"], f"{r['mb']:.1f}", f"{r['ms']:.1f}", f"{r['accuracy']:.3f}", str(r["flips"]),
         f"{r['kl_mean']:.2g}")
        for r in rows
    ]  # fmt: skip
    print("\n".join(table([heading, *cells])))
    print(json.dumps({"run": options.run.name, "questions": len(truth), "rows": rows}))


def _files(job: Any, run: Path, work: Path, task: Any) -> tuple[dict[str, Path], Path]:
    """The GGUF of each form, the base first; and the base."""
    from qcat_convert.adapter import served_base, write_adapter

    base = served_base(job.source, work)
    files = {BARE: base.path}
    for number, (form, (rank, modules)) in enumerate(FORMS.items()):
        folder = work / f"adapter-{number}"
        _reduced(run, folder, rank, modules)
        files[form] = work / f"{number}.gguf"
        source = replace(job.source, adapter=folder)
        write_adapter(files[form], source, base=base.file, task=task, made_from={})
    return files, base.path


def _reduced(run: Path, folder: Path, rank: int, modules: str) -> None:
    """A copy of a LoRA adapter of a lower rank, on fewer modules."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    config = json.loads((run / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(run / "adapter_model.safetensors")
    reduced = {}
    for name, a in tensors.items():
        if not name.endswith("lora_A.weight") or modules not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        # B A = Q R A, and R A is small: its decomposition is that of the whole product.
        q, r = torch.linalg.qr(tensors[other])
        u, s, v = torch.linalg.svd(r @ a, full_matrices=False)
        root = s[:rank].sqrt()
        reduced[name] = (root[:, None] * v[:rank]).contiguous()
        reduced[other] = (q @ u[:, :rank] * root).contiguous()
    config["lora_alpha"] *= rank / config["r"]  # alpha / rank stays
    config["r"] = rank
    save_file(reduced, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
