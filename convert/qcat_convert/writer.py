"""A merged model to an F16 or BF16 GGUF, through `gguf.GGUFWriter`, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self

from qcat.errors import ExportError
from qcat.gguf.architecture import (
    EMBEDDING,
    HEAD,
    Architecture,
    HyperParameters,
    architecture,
    gguf_name,
    gguf_tensor,
    hyper_parameters,
)
from qcat.gguf.q4_0 import pack
from qcat.gguf.sections import SOURCE_KEY, TASK_KEY
from qcat.task import Task
from qcat_convert.scales import Blocks
from qcat_convert.vocab import Vocabulary
from qcat_convert.weights import Rows, Shape

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

Precision = Literal["f16", "bf16"]
_BY_TOKEN = (EMBEDDING, HEAD)
_SIZES = {"f32": 4, "f16": 2, "bf16": 2, "q4_0": 18 / 32}  # bytes a number


class GGUFFile:
    """A GGUF of a merged model, begun with its metadata; then tensors are added one by one.

    Args:
        path: the file to write.
        config: the model's transformers configuration.
        shapes: of all tensors by their Hugging Face names, in the order they will be added.
        vocabulary: its tokenizer; as many tokens as the embedding has rows, or as `rows`.
        task: goes into the metadata whole, so that the file needs no other.
        chat_template: Jinja, for `tokenizer.chat_template`.
        source: versions and fingerprint of what the file was made from.
        rows: of embedding and head, ascending, to keep these only; None keeps all.
        precision: of matrices; vectors (norms, biases) stay float32.
        quantized: names of the tensors that come as `Blocks`, and are written as Q4_0.

    Raises:
        ExportError: what cannot be converted, by name.
    """

    def __init__(
        self,
        path: Path,
        config: Any,
        shapes: Mapping[str, Shape],
        vocabulary: Vocabulary,
        *,
        task: Task,
        chat_template: str,
        source: Mapping[str, Any],
        rows: Sequence[int] | None = None,
        precision: Precision = "f16",
        quantized: Collection[str] = (),
    ) -> None:
        from gguf import GGUFWriter

        self._arch = architecture(config)
        self._params = hyper_parameters(config, len(vocabulary.tokens))
        self._precision = precision
        self._rows, self._quantized = rows, quantized
        self._shapes = {name: self._kept(name, shape) for name, shape in shapes.items()}
        self._expected = iter(self._shapes)
        self._writer = GGUFWriter(path, self._arch.name, use_temp_file=False)
        try:
            _add_hyper_parameters(self._writer, self._arch, self._params)
            _add_vocabulary(self._writer, vocabulary)
            self._writer.add_name(task.name)
            self._writer.add_file_type(1 if precision == "f16" else 32)
            self._writer.add_chat_template(chat_template)
            self._writer.add_string(TASK_KEY, json.dumps(task.to_dict(), ensure_ascii=False))
            self._writer.add_string(SOURCE_KEY, json.dumps(dict(source), ensure_ascii=False))
            for name, shape in self._shapes.items():
                self._announce(name, shape)
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()
        except BaseException:
            self._writer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, name: str, values: torch.Tensor | Rows | Blocks) -> None:
        """Write the next tensor.

        Args:
            name: its Hugging Face name.
            values: its numbers, in any floating type, or in Q4_0 for a tensor announced so; of
                `Rows` those to keep are taken.

        Raises:
            ExportError: they are not all finite, or do not fit the precision; or it is another
                tensor's turn, since gguf would write the numbers under that one's name.
        """
        if (turn := next(self._expected, None)) != name:
            raise ExportError(f"tensor {name} came where {turn} was due: please report it")
        # The writer asks of a tensor no more than its size and that it can write itself.
        stored: Any = _Stored(self._bytes(name), self._parts(name, values))
        self._writer.write_tensor_data(stored)

    def _parts(self, name: str, values: torch.Tensor | Rows | Blocks) -> Iterator[memoryview]:
        """The bytes of a tensor, as llama.cpp lays it out."""
        if isinstance(values, Blocks):
            if self._rows is not None and name in _BY_TOKEN:
                values = values.take(self._rows)
            rows, blocks, size = values.codes.shape
            flat = gguf_tensor(
                name, values.codes.reshape(rows, blocks * size), self._arch, self._params
            )
            scales = gguf_tensor(name, values.scales, self._arch, self._params)
            return pack(flat.reshape(rows, blocks, size), scales)
        if isinstance(values, Rows):
            chunks = values.chunks(self._rows)
        else:
            chunks = iter((gguf_tensor(name, values, self._arch, self._params),))
        return (self._converted(name, chunk) for chunk in chunks)

    def _bytes(self, name: str) -> int:
        return int(math.prod(self._shapes[name]) * _SIZES[self._kind(name)])

    def _kept(self, name: str, shape: Shape) -> Shape:
        if self._rows is None or name not in _BY_TOKEN:
            return shape
        return (len(self._rows), *shape[1:])

    def _announce(self, name: str, shape: Shape) -> None:
        import numpy as np
        from gguf import GGMLQuantizationType

        kind, size = self._kind(name), self._bytes(name)
        if kind in ("bf16", "q4_0"):
            shape = (*shape[:-1], int(shape[-1] * _SIZES[kind]))  # counted in bytes
        dtype = np.dtype({"f32": np.float32, "f16": np.float16}.get(kind, np.uint8))
        raw_type = GGMLQuantizationType[kind.upper()]
        self._writer.add_tensor_info(
            gguf_name(name, self._arch), shape, dtype, size, raw_dtype=raw_type
        )

    def _kind(self, name: str) -> str:
        if name in self._quantized:
            return "q4_0"
        return self._precision if len(self._shapes[name]) > 1 else "f32"

    def _converted(self, name: str, values: torch.Tensor) -> memoryview:
        import torch

        kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        found = values.to(kinds[self._kind(name)]).contiguous()
        # aminmax hands on a NaN and, unlike isfinite, makes no copy
        if not all(bool(extreme.isfinite()) for extreme in found.aminmax()):
            if all(bool(extreme.isfinite()) for extreme in values.aminmax()):
                raise ExportError(f"tensor {name} does not fit float16: export with bf16")
            raise ExportError(f"merged tensor {name} holds infinite or undefined numbers")
        return found.view(torch.uint8).numpy().data


def write_vocabulary_file(path: Path, arch: Architecture, vocabulary: Vocabulary) -> None:
    """Write a GGUF with a vocabulary and no model, to see how llama.cpp splits words with it."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch.name)
    try:
        _add_vocabulary(writer, vocabulary)
        writer.add_tensor("none", np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


class _Stored:
    """Numbers as they will be in the file, made while they are written."""

    def __init__(self, nbytes: int, chunks: Iterator[memoryview]) -> None:
        self.nbytes = nbytes
        self._chunks = chunks

    def tofile(self, file: BinaryIO) -> None:
        for chunk in self._chunks:
            file.write(chunk)


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
    if params.window is not None:
        writer.add_sliding_window(params.window)
    if arch.interleaved_rope:
        writer.add_rope_dimension_count(params.head_dim)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    # qcat never trains with them, so no runtime may add them.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
