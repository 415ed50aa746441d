"""One pass over a model's weights: merge, write the GGUF, and run questions through it in torch.

Each layer is read once, merged, written, used and released, so that only one is in memory.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcat.encoding.scoring import Floats
from qcat.encoding.trie import LabelTrie
from qcat.gguf.architecture import EMBEDDING, HEAD
from qcat.progress import Count, uncounted
from qcat.task import Task
from qcat.threads import default_threads
from qcat_convert.decoder import OneLayer
from qcat_convert.imatrix import Importance, ImportanceMatrix
from qcat_convert.merge import Merger
from qcat_convert.replay import Replay, label_distributions
from qcat_convert.source import Source
from qcat_convert.vocab import Vocabulary
from qcat_convert.writer import GGUFFile, Precision


@dataclass(frozen=True)
class Job:
    """Instructions for converting a model, as plain data, so that another process can do it."""

    source: Source
    target: Path
    """The GGUF to write."""
    precision: Precision
    task: Task
    vocabulary: Vocabulary
    """Of the GGUF."""
    rows: tuple[int, ...] | None
    """Of embedding and head, ascending, that the GGUF keeps; None for all. What is measured here is
    the whole model."""
    chat_template: str
    made_from: dict[str, Any]
    """As `GGUFFile` takes it for its source."""
    prefix: list[int]
    """Token ids of the prompt up to the question, like those below in the whole vocabulary."""
    trie: LabelTrie
    training: list[list[int]]
    """Token ids after the prefix of the questions for the importance matrix."""
    held_out: list[list[int]]
    """Likewise of those for the proof."""


@dataclass(frozen=True)
class Measured:
    """Results of the merged model in torch."""

    imatrix: ImportanceMatrix | None
    """None without training questions."""
    reference: Floats | None
    """Label log-probabilities of the held-out questions, shape (questions, labels); None without
    such questions."""


def prepare_process() -> None:
    """Import what `convert` needs, which takes seconds, and let torch have as many threads."""
    import peft
    import torch
    import transformers

    _ = (peft.PeftModel, transformers.AutoModelForCausalLM)  # they load what they need when named
    torch.set_num_threads(default_threads())


def convert(job: Job, progress: Count = uncounted) -> Measured:
    """Merge and write a model, and measure on the way.

    The importance matrix counts the prefix once and each question's own tokens once: what the
    runtime evaluates.

    Args:
        job: what to do.
        progress: called with layers done and in all.

    Raises:
        ExportError, ModelError: something cannot be merged or converted; names it.
    """
    merger = Merger(job.source)
    importance = Importance(merger.architecture)
    training = Replay(job.prefix, job.training)
    held_out = Replay(job.prefix, job.held_out, [b.path for b in job.trie.deep_branches])
    replays = []
    if job.training:
        replays.append(training)
    if job.held_out:
        replays.append(held_out)
    one = OneLayer(merger.config)
    count = merger.config.num_hidden_layers
    progress(0, count)
    with GGUFFile(
        job.target,
        merger.config,
        merger.shapes,
        job.vocabulary,
        task=job.task,
        chat_template=job.chat_template,
        source=job.made_from,
        rows=job.rows,
        precision=job.precision,
        quantized=merger.quantized,
    ) as gguf:
        gguf.add(EMBEDDING, merger.blocks.get(EMBEDDING, merger.embedding()))
        for replay in replays:
            replay.start(merger.embedding(), merger.embedding_scale)
        for number, layer in enumerate(merger.layers()):
            name = f"model.layers.{number}"
            for inner, tensor in layer.state_dict().items():
                full = f"{name}.{inner}"
                gguf.add(full, merger.blocks.get(full, tensor))
            for replay in replays:
                if replay is training:
                    with importance.watching(layer, name):
                        replay.step(one, layer)
                else:
                    replay.step(one, layer)
            _give_back()
            progress(number + 1, count)
        norm = merger.norm()
        gguf.add("model.norm.weight", norm.weight)
        if not merger.tied:
            gguf.add(HEAD, merger.head())
    imatrix = reference = None
    if job.training:
        head = EMBEDDING if merger.tied else HEAD
        importance.add(head, training.prefix_end(norm))
        importance.add(head, training.ends(norm))
        imatrix = importance.matrix()
    if job.held_out:
        reference = label_distributions(held_out, job.trie, norm, merger.head())
    return Measured(imatrix, reference)


def _give_back() -> None:
    """Return freed memory to the system; glibc would keep most of the layers' memory."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
