"""A merged model to an F16 or BF16 GGUF, through `gguf.GGUFWriter`, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert.tensors import (
    HEAD,
    Architecture,
    HyperParameters,
    architecture,
    gguf_name,
    gguf_tensor,
    has_token_rows,
    hyper_parameters,
    is_tied,
)
from convert.vocab import Vocabulary
from qcat.bundle import SOURCE_KEY, TASK_KEY
from qcat.errors import ExportError
from qcat.task import Task

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

Precision = Literal["f16", "bf16"]
_F16_MAX = 65504.0


def write_gguf(
    path: Path,
    model: Any,
    vocabulary: Vocabulary,
    *,
    task: Task,
    chat_template: str,
    source: Mapping[str, Any],
    rows: Sequence[int] | None = None,
    precision: Precision = "f16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a merged transformers model with its tokenizer and its task.

    Args:
        path: the file to write.
        model: a causal language model of a known architecture, float32.
        vocabulary: its tokenizer; as many tokens as the embedding has rows, or as `rows`.
        task: goes into the metadata whole, so that the file needs no other.
        chat_template: Jinja, for `tokenizer.chat_template`.
        source: versions and fingerprint of what the file was made from.
        rows: of embedding and head, to keep these only, in this order.
        precision: of matrices; vectors (norms, biases) stay float32.
        progress: called with tensors done and in all.

    Raises:
        ExportError: what cannot be converted, by name.
    """
    from gguf import GGUFWriter

    arch = architecture(model.config)
    params = hyper_parameters(model.config, len(vocabulary.tokens))
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    if is_tied(state):
        state.pop(HEAD, None)
    if rows is not None:
        state = {n: t[list(rows)] if has_token_rows(n) else t for n, t in state.items()}
    writer = GGUFWriter(path, arch.name, use_temp_file=False)
    try:
        _add_hyper_parameters(writer, arch, params)
        _add_vocabulary(writer, vocabulary)
        writer.add_name(task.name)
        writer.add_file_type(1 if precision == "f16" else 32)
        writer.add_chat_template(chat_template)
        writer.add_string(TASK_KEY, json.dumps(task.to_dict(), ensure_ascii=False))
        writer.add_string(SOURCE_KEY, json.dumps(dict(source), ensure_ascii=False))
        _add_tensors(writer, state, arch, params, precision, progress)
    finally:
        writer.close()


def _add_hyper_parameters(writer: GGUFWriter, arch: Architecture, params: HyperParameters) -> None:
    writer.add_context_length(params.context)
    writer.add_embedding_length(params.hidden)
    writer.add_block_count(params.layers)
    writer.add_feed_forward_length(params.intermediate)
    writer.add_head_count(params.heads)
    writer.add_head_count_kv(params.kv_heads)
    writer.add_key_length(params.head_dim)
    writer.add_value_length(params.head_dim)
    writer.add_rope_freq_base(params.rope_theta)
    writer.add_layer_norm_rms_eps(params.rms_eps)
    writer.add_vocab_size(params.vocabulary)
    if arch.interleaved_rope:
        writer.add_rope_dimension_count(params.head_dim)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # GGUF's name for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    # qcat never trains with them, so no runtime may add them.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_tensors(
    writer: GGUFWriter,
    state: Mapping[str, torch.Tensor],
    arch: Architecture,
    params: HyperParameters,
    precision: Precision,
    progress: Callable[[int, int], None],
) -> None:
    """Announce all tensors, then write them one by one, so that one copy at a time is held."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType as Kind

    matrix = (
        (torch.float16, np.float16, Kind.F16)
        if precision == "f16"
        else (torch.bfloat16, np.uint8, Kind.BF16)
    )
    for name, tensor in state.items():
        _, numpy_type, kind = matrix if tensor.ndim > 1 else (None, np.float32, Kind.F32)
        shape = tuple(tensor.shape)
        if kind == Kind.BF16:
            shape = (*shape[:-1], shape[-1] * 2)  # counted in bytes
        count = tensor.numel() * (4 if tensor.ndim == 1 else 2)
        writer.add_tensor_info(
            gguf_name(name, arch), shape, np.dtype(numpy_type), count, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, tensor) in enumerate(state.items(), 1):
        values = gguf_tensor(name, tensor, arch, params)
        if tensor.ndim > 1:
            low, high = (float(extreme) for extreme in values.aminmax())
            if precision == "f16" and max(-low, high) > _F16_MAX:
                raise ExportError(f"tensor {name} does not fit float16: export with bf16")
            values = values.to(matrix[0])
        raw = values.contiguous().view(torch.uint8) if values.dtype == torch.bfloat16 else values
        writer.write_tensor_data(raw.contiguous().numpy())
        progress(done, len(state))
