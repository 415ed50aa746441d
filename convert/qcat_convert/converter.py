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
from threading import RLock
from typing import Any, ClassVar

import numpy as np

from qcat.base.checkpoint import base_folder, first_line, load_model, parse_config
from qcat.encoding.scoring import Floats, label_log_probabilities
from qcat.encoding.trie import LabelTrie
from qcat.errors import ExportError, ModelError
from qcat.files import read_json
from qcat.gguf.architecture import ARCHITECTURES
from qcat.gguf.check import OTHER_TOKENIZERS
from qcat.gguf.header import read_header
from qcat.gguf.sections import SOURCE_KEY, TASK_KEY, write_metadata
from qcat.progress import Count, uncounted
from qcat.task import Task
from qcat_convert.merge import attach, changed
from qcat_convert.peft_adapter import embedding_rows, kept_layers
from qcat_convert.source import folder_of_tokenizer, named_base
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
    base: str
    """Its name, for messages."""
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


@dataclass(frozen=True)
class Located:
    """A base and an adapter on disk, of an architecture that qcat does not know."""

    base: str
    """As the user or the adapter named it."""
    folder: Path
    """Of the base."""
    tokenizer_folder: Path
    """The adapter's folder if it has a tokenizer of its own, else the base's."""
    config: dict[str, Any]
    """The part of config.json that describes the language model."""


def locate_unknown(adapter: Path | None, base: str | None) -> Located | None:
    """A base whose architecture qcat's own converter does not know; None if it does.

    Args:
        adapter: folder that PEFT's `save_pretrained` wrote; None exports the base as it is.
        base: local folder or hub name; None uses the one named in the adapter.

    Raises:
        ExportError, ModelError: something is missing, unsupported or damaged; names it.
    """
    said, base = named_base(adapter, base)
    folder = base_folder(base)
    config = _config(folder)
    names = config.get("architectures")
    if isinstance(names, list) and names and names[0] in ARCHITECTURES:
        return None
    if kept_layers(said):
        raise ExportError(f"{adapter}: is for some of its base's layers: --converter exports all")
    return Located(base, folder, folder_of_tokenizer(folder, adapter), _text_config(config))


def _config(folder: Path) -> dict[str, Any]:
    advice = "save the model with save_pretrained"
    return read_json(folder / "config.json", error=ModelError, advice=advice)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model: of its own in a model that sees pictures."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


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
    reference = None
    if job.held_out:
        reference = label_distributions(model, job.prefix, job.trie, job.held_out, progress)
    checkpoint = job.target.with_name("checkpoint")
    _save(model, job, checkpoint)
    del model  # the converter needs memory too
    _run_script(job, checkpoint)
    shutil.rmtree(checkpoint)
    _check_tokenizer(job)
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
    return Measured(None, reference)


def _check_tokenizer(job: WholeJob) -> None:
    found = read_header(job.target).metadata.get("tokenizer.ggml.model")
    if found not in OTHER_TOKENIZERS:
        raise ExportError(
            f"base {job.folder}: its tokenizer ({found}) cannot be used: byte-level BPE and "
            "SentencePiece can"
        )


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

    tqdm.set_lock(RLock())  # its own is between processes, and remains when this one is killed
    folder, adapter = job.folder, job.adapter
    model: Any = load_model(folder, parse_config(folder), torch.float32).eval()
    if adapter is None:
        return model
    rows = embedding_rows(adapter)
    if rows and rows != model.get_input_embeddings().num_embeddings:  # it has added tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    tuned = attach(model, adapter, job.base).eval()
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
    from safetensors import SafetensorError

    try:
        model.save_pretrained(checkpoint)
    except SafetensorError as error:
        raise ExportError(
            f"{checkpoint}: cannot be written ({first_line(error)}): make room: the whole model in "
            "float32 is saved there for a while"
        ) from None
    config = _config(job.folder)
    text, head = _text_config(config), model.get_output_embeddings()
    text["vocab_size"] = model.get_input_embeddings().num_embeddings
    tied = head.weight is model.get_input_embeddings().weight
    text["tie_word_embeddings"] = config["tie_word_embeddings"] = tied
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    for folder in (job.folder, job.tokenizer_folder):  # the adapter may bring a part of them
        for pattern in _TOKENIZER_FILES:
            for path in folder.glob(pattern):
                shutil.copy(path, checkpoint)


def _run_script(job: WholeJob, checkpoint: Path) -> None:
    # transformers drops the layers for speculative decoding, so the converter must not expect them.
    script = job.tree / SCRIPT
    for options in (["--no-mtp"], []):
        status, said = _run_once(job, checkpoint, options)
        if status == 0 and job.target.is_file():
            return
        if "--no-" not in said:  # it complains of something else than the option
            break
    if status < 0:
        raise ExportError(f"{script}: was ended from outside ({status}): was there enough memory?")
    if "No space left" in said:
        raise ExportError(f"{job.target}: the disk is full: make room")
    advice = "try a newer llama.cpp"
    if "ModuleNotFoundError" in said:
        advice = f"install what {job.tree / 'requirements'} lists for it"
    raise ExportError(f"{script}: cannot convert the model ({said[:200]}): {advice}")


def _run_once(job: WholeJob, checkpoint: Path, options: Sequence[str]) -> tuple[int, str]:
    """Run the script; its exit status, and what it says last."""
    command: list[Any] = [sys.executable, job.tree / SCRIPT, checkpoint, "--outfile", job.target]
    done = subprocess.run(
        [*command, "--outtype", job.precision, *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, (lines or ["no reason given"])[-1]
