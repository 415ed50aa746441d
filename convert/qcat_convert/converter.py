"""llama.cpp's own converter, for architectures that qcat's does not know.

The user names a llama.cpp source tree. The merged model is saved as a checkpoint, the tree's
`convert_hf_to_gguf.py` makes a GGUF of it, and qcat adds its metadata. Nothing is known here of
the architecture: the whole model is in memory, in float32, and the reference for the proof is the
model's ordinary forward pass over whole prompts, without any cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any, ClassVar

import numpy as np

from qcat.base.checkpoint import base_folder, first_line
from qcat.encoding.scoring import Floats, label_log_probabilities
from qcat.encoding.trie import LabelTrie
from qcat.errors import ExportError, ModelError
from qcat.files import read_json
from qcat.gguf.architecture import ARCHITECTURES
from qcat.gguf.sections import SOURCE_KEY, TASK_KEY, write_metadata
from qcat.progress import Count, uncounted
from qcat.task import Task
from qcat_convert.merge import attach, changed
from qcat_convert.peft_adapter import kept_layers, read_adapter_config
from qcat_convert.stream import Job, Measured, convert
from qcat_convert.writer import Precision

SCRIPT = "convert_hf_to_gguf.py"
_TOLERANCE = 1e-3  # of the largest logit: what float32 may change
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                    "merges.txt", "chat_template*", "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class WholeJob:
    """Instructions for converting a model with llama.cpp's converter, as plain data."""

    tree: Path
    """The llama.cpp source tree."""
    folder: Path
    """Of the base."""
    adapter: Path | None
    tokenizer_folder: Path
    target: Path
    """The GGUF to write."""
    precision: Precision
    task: Task
    chat_template: str
    made_from: dict[str, Any]
    prefix: list[int]
    """Token ids of the prompt up to the question."""
    trie: LabelTrie
    held_out: list[list[int]]
    """Token ids after the prefix of the questions for the proof."""
    training: ClassVar[Sequence[list[int]]] = ()
    """As a `Job` has it; there is no importance matrix here."""


def is_known(folder: Path) -> bool:
    """Whether qcat's own converter knows the architecture of a checkpoint's folder.

    Raises:
        ModelError: its config.json is absent or damaged.
    """
    names = _config(folder).get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in ARCHITECTURES


def whole_layers(folder: Path) -> int | None:
    """How many layers a checkpoint's config.json says it has; None if it does not say."""
    count = _text_config(_config(folder)).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def _config(folder: Path) -> dict[str, Any]:
    advice = "save the model with save_pretrained"
    return read_json(folder / "config.json", error=ModelError, advice=advice)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model: of its own in a model that sees pictures."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def locate_whole(adapter: Path | None, base: str | None) -> tuple[Path, Path]:
    """The folders of a base and of the tokenizer.

    Args:
        adapter: folder that PEFT's `save_pretrained` wrote; None exports the base as it is.
        base: local folder or hub name; None uses the one named in the adapter.

    Raises:
        ExportError, ModelError: something is missing, unsupported or damaged; names it.
    """
    config = read_adapter_config(adapter) if adapter else {}
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ExportError(f"{adapter}: names no base model: give one with --base")
    if kept_layers(config):
        raise ExportError(f"{adapter}: is for some of its base's layers: --converter exports all")
    folder = base_folder(base)
    if adapter and (adapter / "tokenizer.json").is_file():
        return folder, adapter
    return folder, folder


def check_tree(tree: Path) -> None:
    """Check that a folder is a llama.cpp source tree. Raises ExportError if not."""
    if not (tree / SCRIPT).is_file():
        raise ExportError(
            f"{tree}: holds no {SCRIPT}: name the folder of llama.cpp's source, such as "
            "vendor/llama.cpp in llama-cpp-python's source distribution"
        )


def convert_job(job: Job | WholeJob, progress: Count = uncounted) -> Measured:
    """Convert with qcat's converter or with llama.cpp's, as the job says."""
    return convert(job, progress) if isinstance(job, Job) else convert_whole(job, progress)


def convert_whole(job: WholeJob, progress: Count = uncounted) -> Measured:
    """Merge a model, convert it, and run the held-out questions through it in torch.

    Args:
        job: what to do.
        progress: called with questions done and in all.

    Raises:
        ExportError, ModelError: something cannot be merged or converted; names it.
    """
    model = _merged(job)
    with TemporaryDirectory(prefix="checkpoint-", dir=job.target.parent) as work:
        checkpoint = Path(work)
        _save(model, job, checkpoint)
        _run_script(job, checkpoint)
    write_metadata(
        job.target,
        {
            TASK_KEY: json.dumps(job.task.to_dict(), ensure_ascii=False),
            SOURCE_KEY: json.dumps(job.made_from, ensure_ascii=False),
            "tokenizer.chat_template": job.chat_template,
            "general.name": job.task.name,
            # qcat never trains with them, so no runtime may add them.
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.add_eos_token": False,
        },
    )
    if not job.held_out:
        return Measured(None, None)
    return Measured(None, label_distributions(model, job.prefix, job.trie, job.held_out, progress))


def label_distributions(
    model: Any,
    prefix: Sequence[int],
    trie: LabelTrie,
    rests: Sequence[Sequence[int]],
    progress: Count = uncounted,
) -> Floats:
    """Label log-probabilities by ordinary forward passes, shape (questions, labels).

    Args:
        model: a transformers causal language model.
        prefix: token ids of the prompt up to the question.
        trie: the label language.
        rests: token ids after the prefix, for each question.
        progress: called with questions done and in all.
    """
    import torch

    paths = [branch.path for branch in trie.branches]
    longest = [p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)] or [()]
    rows = []
    for done, rest in enumerate(rests, 1):
        logits: dict[tuple[int, ...], Any] = {}
        for path in longest:
            ids = torch.tensor([[*prefix, *rest, *path]])
            with torch.inference_mode():
                found = model(ids, use_cache=False, logits_to_keep=len(path) + 1).logits[0]
            for depth in range(len(path) + 1):
                logits[path[:depth]] = found[depth].float().numpy()
        row = [logits[branch.path][branch.tokens] for branch in trie.branches]
        rows.append(label_log_probabilities(trie, row))
        progress(done, len(rests))
    return np.stack(rows)


def _merged(job: WholeJob) -> Any:
    """The whole model in float32, the adapter merged into it; checked that this changed nothing."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    tqdm.set_lock(RLock())  # its own is between processes, and remains when this one is killed
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, adapter = job.folder, job.adapter
    try:
        # Code in the folder is never run.
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"base {folder}: transformers cannot load it ({first_line(error)}): upgrade it, or "
            "download the model again"
        ) from None
    if getattr(model.config, "quantization_config", None):
        raise ModelError(f"base {folder}: is quantized: start from the unquantized base")
    if adapter is None:
        return model.eval()
    tuned = attach(model, adapter, str(folder)).eval()
    ids = torch.tensor([job.prefix])
    with torch.inference_mode():
        before = tuned(ids, use_cache=False).logits
        if not bool(before.isfinite().all()):
            raise ExportError(f"adapter {adapter}: the model answers no numbers: train it again")
        model = tuned.merge_and_unload().eval()
        after = model(ids, use_cache=False).logits
    if not float((after - before).abs().max()) <= _TOLERANCE * float(before.abs().max()):
        raise changed(adapter)
    return model


def _save(model: Any, job: WholeJob, checkpoint: Path) -> None:
    """Save the merged model with the base's own config.json, from which the converter reads."""
    model.save_pretrained(checkpoint)
    config = _config(job.folder)
    _text_config(config)["vocab_size"] = model.config.get_text_config().vocab_size
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    for pattern in _TOKENIZER_FILES:
        for path in job.tokenizer_folder.glob(pattern):
            shutil.copy(path, checkpoint)


def _run_script(job: WholeJob, checkpoint: Path) -> None:
    # transformers drops the layers for speculative decoding, so the converter must not expect them.
    for option in ("--no-mtp", None):
        said = _run_once(job, checkpoint, [option] if option else [])
        if not said:
            return
        if "--no-" not in said:  # it complains of something else than the option
            break
    raise ExportError(
        f"{job.tree / SCRIPT}: cannot convert the model ({said[:200]}): try a newer llama.cpp"
    )


def _run_once(job: WholeJob, checkpoint: Path, options: Sequence[str]) -> str:
    """Run the script; what it says last if it fails, else nothing."""
    command: list[Any] = [sys.executable, job.tree / SCRIPT, checkpoint, "--outfile", job.target]
    done = subprocess.run(
        [*command, "--outtype", job.precision, *options],
        env={**os.environ, "PYTHONPATH": str(job.tree / "gguf-py"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0 and job.target.is_file():
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1]
