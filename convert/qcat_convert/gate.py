"""Checks before any work starts whether a base can be trained for a task and exported.

Lint, training and export use the same checks, so that nothing fails after hours that could have
been rejected at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qcat.backends.llama import LlamaModel
from qcat.base.checkpoint import load_config, read_config
from qcat.encoding.agreement import check_questions, check_texts
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import QUESTION_ROOM
from qcat.encoding.tokenization import HubTokenizer
from qcat.errors import ExportError, ModelError, TaskError
from qcat.gguf.architecture import (
    EMBEDDING,
    HEAD,
    Architecture,
    checkpoint_names,
    hyper_parameters,
    named_architecture,
)
from qcat.task import Task
from qcat_convert.merge import Merger
from qcat_convert.source import locate
from qcat_convert.vocab import Vocabulary, read_vocabulary
from qcat_convert.weights import Checkpoint
from qcat_convert.writer import write_vocabulary_file

_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")  # old checkpoints store it; it follows
_QUANTIZED = (".scales", ".biases", ".qweight", ".qzeros", ".weight_scale", ".absmax")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Fitted:
    """A task in the tokens of a base, and the base's vocabulary for a GGUF."""

    architecture: Architecture
    encoded: EncodedTask
    tokenizer: HubTokenizer
    vocabulary: Vocabulary


def check_base(
    folder: Path,
    task: Task,
    *,
    tokenizer_folder: Path | None = None,
    rows: int | None = None,
) -> Fitted:
    """Check that a task can be encoded in a base's tokens in the same way as by llama.cpp.

    Args:
        folder: folder of the checkpoint; its weights need not exist.
        task: the task.
        tokenizer_folder: folder of the tokenizer, if an adapter has its own.
        rows: rows of the embedding, if an adapter has its own.

    Raises:
        ModelError, ExportError, TaskError: something does not fit; names it.
    """
    config = read_config(folder)
    tokenizer = tokenizer_of(folder, tokenizer_folder or folder)
    vocabulary = read_vocabulary(tokenizer, rows or config["vocab_size"])
    encoded = encode_task(folder, tokenizer, task, config["max_position_embeddings"])
    return Fitted(named_architecture(config["architectures"]), encoded, tokenizer, vocabulary)


def tokenizer_of(folder: Path, tokenizer_folder: Path) -> HubTokenizer:
    """The tokenizer of a base, or the one that an adapter brings, checked to extend the base's.

    Raises:
        ModelError: it cannot be read, or an adapter lies in the base's folder.
        ExportError: it is another model's.
    """
    leftover = folder / "adapter_config.json"
    if leftover.exists():
        raise ModelError(
            f"{leftover}: an adapter lies beside the model, and transformers would apply it in "
            "training alone: remove it, or merge it into the model first"
        )
    tokenizer = HubTokenizer(tokenizer_folder)
    if tokenizer_folder != folder and (folder / "tokenizer.json").is_file():
        lost = HubTokenizer(folder).tokens().items() - tokenizer.tokens().items()
        if lost:
            raise ExportError(
                f"{tokenizer.folder}: brings the tokenizer of another model than the base "
                f"{folder} ({len(lost)} tokens have other ids): remove it, or name the right base "
                "with --base"
            )
    return tokenizer


def encode_task(
    folder: Path, tokenizer: HubTokenizer, task: Task, context: int | None
) -> EncodedTask:
    """A task in a base's tokens, checked to spell no special token and to fit the context.

    Args:
        folder: of the base, for messages.
        tokenizer: its tokenizer.
        task: the task.
        context: tokens that the base has room for; None if unknown.

    Raises:
        TaskError, ModelError: something does not fit; names it.
    """
    encoded = EncodedTask.build(task, tokenizer)
    for text, known in (*encoded.prompt.prefix, *encoded.prompt.rest("?")):
        if not known and tokenizer.encode(text, special=True) != tokenizer.encode(
            text, special=False
        ):
            raise TaskError(
                f"task {encoded.task.name!r}: its text spells a special token, such as "
                "<|im_end|>, which Ollama would read as one: write labels, descriptions and "
                "instruction without it"
            )
    if context is not None and len(encoded.prefix) + QUESTION_ROOM > context:
        raise ModelError(
            f"base {folder}: has a context of {context} tokens, and the prompt takes "
            f"{len(encoded.prefix)} with {QUESTION_ROOM} for the question: shorten the "
            "instruction and the descriptions, or take a base with a longer context"
        )
    return encoded


def check_splitting(fitted: Fitted, texts: Sequence[str]) -> None:
    """Check that llama.cpp splits texts in the same way as the tokenizer used for training.

    Args:
        fitted: result of `check_base`.
        texts: cleaned questions.

    Raises:
        ExportError: at the first text where they differ, with both ids.
    """
    with TemporaryDirectory(prefix="qcat-") as folder:
        path = Path(folder, "vocabulary.gguf")
        write_vocabulary_file(path, fitted.architecture, fitted.vocabulary)
        with LlamaModel(path, vocab_only=True) as served:
            prompt = fitted.encoded.prompt
            words = [segment.text for segment in prompt.prefix if not segment.special]
            check_texts("training", fitted.tokenizer, served, words)
            check_questions(prompt, fitted.tokenizer, served, texts)


def check_config(folder: Path, layers: int | None = None) -> None:
    """Check that a checkpoint's configuration can be written as GGUF. Imports transformers.

    Raises:
        ModelError, ExportError: something cannot be written; names it.
    """
    config = load_config(folder, layers)
    hyper_parameters(config, config.vocab_size)


def check_weights(folder: Path, layers: int | None = None) -> None:
    """Check that a checkpoint has the tensors of its architecture, and no others.

    transformers ignores tensors for which it has no place, so the model would be a different one.

    Args:
        folder: folder of the checkpoint.
        layers: how many layers to keep, whose tensors are checked; None for all.

    Raises:
        ModelError: a tensor is missing, or has no place; or a file is damaged.
    """
    config = read_config(folder)
    arch, checkpoint = named_architecture(config["architectures"]), Checkpoint(folder)
    layers = layers or config["num_hidden_layers"]
    expected = set(checkpoint_names(arch, layers).values())
    optional = {EMBEDDING, HEAD}  # one is enough where they are tied, which `Merger` looks into
    absent = sorted(expected - optional - checkpoint.shapes.keys())
    odd = sorted(
        name
        for name in checkpoint.shapes.keys() - expected
        if not _COMPUTED.fullmatch(name) and not _is_above(name, layers)
    )
    if not odd and not absent:
        return
    if any(name.endswith(_QUANTIZED) for name in odd):
        raise ModelError(f"base {folder}: is quantized: start from the unquantized base")
    if absent and odd:
        what = f"stores {odd[0]} where {absent[0]} is expected"
    elif absent:
        what = f"lacks {absent[0]} ({len(absent)} such tensors)"
    else:
        what = f"stores {odd[0]} ({len(odd)} such tensors), which has no place in a {arch.name}"
    raise ModelError(
        f"base {folder}: {what}: save the causal language model, without "
        "wrappers, with save_pretrained"
    )


def check_shapes(folder: Path, layers: int | None = None) -> None:
    """Check that a checkpoint's tensors have the shapes of its configuration. Imports torch.

    Raises:
        ModelError: a tensor has another shape.
    """
    source = locate(None, str(folder))
    Merger(replace(source, layers=layers or source.layers))


def _is_above(name: str, layers: int) -> bool:
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= layers
