"""A base model from a GGUF file, dequantized once into an ordinary checkpoint in the cache.

People often have only a GGUF of a model, from a download or in Ollama. Training and
merging need the weights as numbers and the tokenizer as `tokenizer.json`; both are rebuilt here
with the `gguf` library. F16, BF16 and Q8_0 files lose next to nothing against the original
checkpoint; files of 4 or 5 bits have lost what quantizing took away, for good.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcat import cache
from qcat.base.gguf_tokenizer import write_tokenizer
from qcat.base.ollama_store import PREFIX, find_model
from qcat.errors import BundleError, ModelError
from qcat.gguf.architecture import (
    ARCHITECTURES,
    EMBEDDING,
    FULL,
    HEAD,
    SLIDING,
    Architecture,
    checkpoint_names,
    interleaved_heads,
    is_norm,
    layer_kinds,
    undo_interleaving,
)
from qcat.gguf.bundle import fingerprint
from qcat.gguf.check import unfit
from qcat.gguf.header import Header, read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SUFFIX = ".gguf"
_BASES = "bases"
"""Folder in the cache folder."""
_CONFIG = "config.json"
_MADE_FROM = "qcat_gguf"
"""Key of config.json: the fingerprint of the file."""
_ROWS = 1 << 22  # numbers dequantized at once
_SAME_HEAD = 0.1  # relative difference up to which head and embedding are one matrix, rounded twice
_FEW_BITS = re.compile(r"I?Q[1-5]_.*")
# Settings that would have to be supported too, or the model would give wrong answers
_UNSUPPORTED = {
    "pooling_type": "it is an embedding model, which writes no text: take one that does",
    "expert_count": "mixtures of experts cannot be trained here",
    "rope.scaling.type": "its rope scaling cannot be converted",
    "rope.scaling.factor": "its rope scaling cannot be converted",
}


def is_gguf(base: str) -> bool:
    """Whether the name of a base stands for a GGUF file, here or in Ollama's store."""
    # A file of any name may be one, as Ollama's are named by their digests.
    named = base.startswith(PREFIX) or base.lower().endswith(SUFFIX)
    return named or Path(base).is_file()


def gguf_file(base: str) -> Path:
    """The GGUF that the name of a base stands for: a path, or `ollama:NAME`.

    Raises:
        ModelError: Ollama's store holds no such model, or no whole one.
    """
    return find_model(base.removeprefix(PREFIX)) if base.startswith(PREFIX) else Path(base)


def gguf_checkpoint(base: str, target: Path | None = None) -> Path:
    """The folder of a checkpoint dequantized from a GGUF; made where it is not there yet.

    Args:
        base: path of the file, or `ollama:NAME`.
        target: the folder to make; by default one in the cache folder, which is used again as
            long as the file is the same.

    Raises:
        ModelError: the file cannot be used as a base, or `target` holds something else; one line
            says why.
    """
    from filelock import FileLock

    path = gguf_file(base)
    try:
        header = read_header(path)
        # In a given folder it is recognised by its contents, so that a copy of the file works.
        digest = fingerprint(path, header, anywhere=target is not None)
    except BundleError as error:
        raise ModelError(f"base {error}") from None
    made = target or cache.folder() / _BASES / f"{path.stem[:40]}-{digest[:16]}"
    if made.exists():
        if target and not _is_made_from(digest, target):
            raise ModelError(
                f"{target}: exists, and is not the checkpoint of {base}: choose another folder"
            )
        return made
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.with_name(f".{made.name}.lock")):
            if not made.exists():
                _make(path, header, made, digest)
    except OSError as error:
        raise ModelError(
            f"{made}: cannot be written: {error.strerror or error}: make room, or name another "
            "cache folder with QCAT_CACHE"
        ) from None
    return made


def describe(base: str) -> str:
    """Describes a GGUF base in a line for the user: its types, and what they mean."""
    try:
        header = read_header(gguf_file(base))
    except BundleError as error:
        raise ModelError(f"base {error}") from None
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
    types = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda i: -i[1]))
    lossy = any(_FEW_BITS.fullmatch(kind) for kind in counts)
    return f"{types}: " + (
        "a model that was quantized to few bits; what that cost is not won back"
        if lossy
        else "next to nothing is lost against the original checkpoint"
    )


def _is_made_from(digest: str, folder: Path) -> bool:
    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get(_MADE_FROM) == digest


def _make(path: Path, header: Header, target: Path, digest: str) -> None:
    """Write the checkpoint into a folder beside the target, and rename it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        source = _Source.read(path, header)
        rows = int(source.tensors[EMBEDDING].shape[1])
        write_tokenizer(path, source.metadata, rows, folder)
        tied = source.write_weights(folder)
        config = source.config(tied) | {_MADE_FROM: digest}
        (folder / _CONFIG).write_text(json.dumps(config, indent=1), "utf-8")
        folder.chmod(0o755)
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Source:
    """A GGUF as read by the `gguf` library, checked to be usable as a base."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]
    """`gguf.ReaderTensor` by its Hugging Face name."""
    kind: str
    """As `architectures` of a config.json names it."""

    @classmethod
    def read(cls, path: Path, header: Header) -> _Source:
        from gguf import GGUFReader

        found = header.metadata.get("general.architecture")
        kinds = {arch.name: kind for kind, arch in ARCHITECTURES.items()}
        if found not in kinds:
            raise ModelError(
                f"base {path}: architecture {found!r} cannot be trained: {', '.join(kinds)} can"
            )
        unsupported = dict(_UNSUPPORTED)
        if not ARCHITECTURES[kinds[found]].full_attention:
            unsupported["attention.sliding_window"] = "sliding windows cannot be converted there"
        for key, why in unsupported.items():
            value = header.metadata.get(f"{found}.{key}")
            if value not in (None, "none", 0):
                raise ModelError(f"base {path}: {why} ({found}.{key} is {value!r})")
        if reason := unfit(header):
            raise ModelError(f"base {path}: cannot be used: {reason}")
        reader = GGUFReader(path)
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        source = cls(path, metadata, {}, kinds[found])
        names = checkpoint_names(source.architecture, source.number("block_count"))
        tensors = {}
        for tensor in reader.tensors:
            if tensor.name not in names:
                raise source.cannot(f"tensor {tensor.name[:60]!r} is not one of a {found} model")
            tensors[names[tensor.name]] = tensor
        for name in names.values():
            if name not in tensors and name != HEAD:
                raise source.cannot(f"tensor {name} is absent: the file is no whole model")
        return cls(path, metadata, tensors, kinds[found])

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.kind]

    def cannot(self, why: str) -> ModelError:
        return ModelError(f"base {self.path}: cannot be used: {why}")

    def number(self, key: str, default: Any = None) -> Any:
        """A hyper-parameter. Raises ModelError if it is absent and has no default."""
        value = self.metadata.get(f"{self.architecture.name}.{key}", default)
        if value is None:
            raise self.cannot(f"metadata {self.architecture.name}.{key} is absent")
        return value

    def config(self, tied: bool) -> dict[str, Any]:
        """What `config.json` says."""
        heads, hidden = self.number("attention.head_count"), self.number("embedding_length")
        token = {
            role: self.metadata.get(f"tokenizer.ggml.{name}_token_id")
            for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        return {
            "architectures": [self.kind],
            "model_type": self.architecture.model_type,
            "hidden_size": hidden,
            "num_hidden_layers": self.number("block_count"),
            "intermediate_size": self.number("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "head_dim": self.number("attention.key_length", hidden // heads),
            "max_position_embeddings": self.number("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "vocab_size": int(self.tensors[EMBEDDING].shape[1]),
            "tie_word_embeddings": tied,
            "torch_dtype": "float16",
            **{f"{role}_token_id": number for role, number in token.items()},
            **self._attention(hidden // heads),
        }

    def _attention(self, width: int) -> dict[str, Any]:
        """What `config.json` says of rotary embeddings, windows and the activation."""
        arch = self.architecture
        theta = self.number("rope.freq_base")
        if not arch.full_attention:
            return {"rope_theta": theta, "hidden_act": arch.activation}
        return {
            "hidden_activation": arch.activation,
            "query_pre_attn_scalar": self.number("attention.key_length", width),
            "sliding_window": self.number("attention.sliding_window"),
            "layer_types": layer_kinds(arch, self.number("block_count")),
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": theta},
                SLIDING: {"rope_type": "default", "rope_theta": arch.window_rope_theta},
            },
        }

    def write_weights(self, folder: Path) -> bool:
        """Write the tensors, a file for each layer and one for the rest; whether head is tied."""
        from safetensors.numpy import save_file

        left_out = self._rounded_twice()
        files: dict[str, list[str]] = {}
        for name in self.tensors:
            layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
            if name != left_out:
                files.setdefault(f"model-{layer}.safetensors", []).append(name)
        weight_map: dict[str, str] = {}
        for file, names in files.items():
            stored = {self._stored_name(name, left_out): self._numbers(name) for name in names}
            save_file(stored, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(stored, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        return HEAD not in weight_map

    def _rounded_twice(self) -> str | None:
        """The coarser of head and embedding where they are one matrix, stored at two precisions."""
        import numpy as np

        if HEAD not in self.tensors:
            return None
        embedding, head = self.tensors[EMBEDDING], self.tensors[HEAD]
        if list(embedding.shape) != list(head.shape):
            return None
        difference = size = 0.0
        for one, two in zip(self._chunks(EMBEDDING), self._chunks(HEAD), strict=True):
            difference += float(np.square(one - two).sum())
            size += float(np.square(two).sum())
        if difference > _SAME_HEAD**2 * size:
            return None
        return EMBEDDING if head.n_bytes >= embedding.n_bytes else HEAD

    @staticmethod
    def _stored_name(name: str, left_out: str | None) -> str:
        return EMBEDDING if name == HEAD and left_out == EMBEDDING else name

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        """A tensor as the checkpoint has it: float16 where that loses nothing, else float32."""
        import numpy as np

        tensor = self.tensors[name]
        shape = [int(n) for n in reversed(tensor.shape)]
        exact = tensor.tensor_type.name in ("F32", "BF16")
        parts = []
        for chunk in self._chunks(name):
            if not np.isfinite(chunk).all():
                raise self.cannot(f"tensor {tensor.name} holds infinite or undefined numbers")
            fits = not exact and np.abs(chunk).max(initial=0) <= np.finfo(np.float16).max
            parts.append(chunk.astype(np.float16) if fits else chunk)
        # concatenate widens to float32 if one chunk had to stay so
        values = np.concatenate(parts).reshape(shape)
        heads = interleaved_heads(
            name,
            self.architecture,
            self.number("attention.head_count"),
            self.number("attention.head_count_kv", self.number("attention.head_count")),
        )
        if self.architecture.norm_shift and is_norm(name):
            shifted: npt.NDArray[Any] = values.astype(np.float32) - self.architecture.norm_shift
            return shifted
        return undo_interleaving(values, heads) if heads else values

    def _chunks(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """A tensor's numbers, some rows at a time."""
        import numpy as np
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, _ROWS // int(tensor.shape[0]))
        for start in range(0, len(rows), step):
            try:
                values = dequantize(rows[start : start + step], tensor.tensor_type)
            except NotImplementedError:
                raise self.cannot(
                    f"tensor {tensor.name} has type {tensor.tensor_type.name}, which the gguf "
                    "library cannot dequantize: take a file of another quantization"
                ) from None
            yield np.asarray(values, np.float32)
