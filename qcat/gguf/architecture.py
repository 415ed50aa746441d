"""Tensor names and hyper-parameters of Hugging Face and GGUF, one entry an architecture.

Names follow llama.cpp's `gguf-py/gguf/constants.py`. A tensor without a name here is an error:
one left out would make a model that answers nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcat.errors import ExportError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_GLOBAL = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_QK_NORM = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
_QKV_BIAS = {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Architecture:
    """How one `architectures` entry of a config.json is written as GGUF."""

    name: str
    """GGUF's `general.architecture`."""
    block: Mapping[str, str]
    """Names within a layer."""
    interleaved_rope: bool = False
    """llama.cpp rotates neighbouring pairs here, Hugging Face halves: q and k are permuted."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "Qwen3ForCausalLM": Architecture("qwen3", {**_BLOCK, **_QK_NORM}),
    "Qwen2ForCausalLM": Architecture("qwen2", {**_BLOCK, **_QKV_BIAS}),
    "LlamaForCausalLM": Architecture("llama", _BLOCK, interleaved_rope=True),
}


@dataclass(frozen=True)
class HyperParameters:
    """What llama.cpp must know of a model beside its tensors."""

    context: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rms_eps: float
    vocabulary: int


def architecture(config: Any) -> Architecture:
    """The entry for a transformers config. Raises ExportError naming an unknown architecture."""
    return named_architecture(config.architectures)


def named_architecture(names: object) -> Architecture:
    """The entry for what config.json has under `architectures`. Raises ExportError as above."""
    name = names[0] if isinstance(names, list) and names else "(none)"
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ExportError(f"architecture {name} cannot be converted: {known} can")
    return ARCHITECTURES[name]


def hyper_parameters(config: Any, vocabulary: int) -> HyperParameters:
    """Read a transformers config (5 or later, which reads both rope notations of config.json).

    Raises:
        ExportError: for a feature that the GGUF would silently lack.
    """
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise ExportError(f"rope type {rope['rope_type']!r} cannot be converted: only 'default'")
    if "rope_theta" not in rope:
        raise ExportError("config.json names no rope_theta: take it from the model's publisher")
    if config.hidden_act != "silu":
        raise ExportError(f"activation {config.hidden_act!r} cannot be converted: only 'silu'")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ExportError("sliding-window attention cannot be converted: use_sliding_window is on")
    return HyperParameters(
        context=config.max_position_embeddings,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        rope_theta=float(rope["rope_theta"]),
        rms_eps=float(config.rms_norm_eps),
        vocabulary=vocabulary,
    )


def gguf_name(name: str, arch: Architecture) -> str:
    """The GGUF name of a Hugging Face tensor. Raises ExportError for one that has none."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in arch.block:
        return f"blk.{layer[1]}.{arch.block[layer[2]]}"
    raise ExportError(f"tensor {name} has no place in a {arch.name} GGUF: it cannot be converted")


def checkpoint_names(arch: Architecture, layers: int) -> dict[str, str]:
    """Hugging Face tensor names by their GGUF names, for a model of so many layers."""
    blocks = {
        f"blk.{layer}.{there}": f"model.layers.{layer}.{here}"
        for layer in range(layers)
        for here, there in arch.block.items()
    }
    return {there: here for here, there in _GLOBAL.items()} | blocks


def gguf_tensor(
    name: str, tensor: torch.Tensor, arch: Architecture, params: HyperParameters
) -> torch.Tensor:
    """The tensor as llama.cpp lays it out, same shape."""
    count = interleaved_heads(name, arch, params.heads, params.kv_heads)
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def undo_interleaving(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """A tensor as Hugging Face lays it out, from llama.cpp's: what `gguf_tensor` did, undone."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(values.shape)


def interleaved_heads(name: str, arch: Architecture, heads: int, kv_heads: int) -> int | None:
    """Heads of a tensor whose rows the two formats order differently; None for the others."""
    if not arch.interleaved_rope:
        return None
    return {"q_proj.weight": heads, "k_proj.weight": kv_heads}.get(".".join(name.split(".")[-2:]))
