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
FULL, SLIDING = "full_attention", "sliding_attention"

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
_SANDWICH_NORMS = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
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
    model_type: str
    """As config.json has it."""
    interleaved_rope: bool = False
    """llama.cpp rotates neighbouring pairs here, Hugging Face halves: q and k are permuted."""
    norm_shift: float = 0
    """What GGUF's norms have more than Hugging Face's, which add it when they run."""
    activation: str = "silu"
    """Of the MLP, as transformers calls it."""
    full_attention: int | None = None
    """Every so many layers one sees all tokens, the others a window; None: all see all."""
    window_rope_theta: float | None = None
    """Of the layers with a window. llama.cpp has it from the architecture, not from the file."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "Qwen3ForCausalLM": Architecture("qwen3", {**_BLOCK, **_QK_NORM}, "qwen3"),
    "Qwen2ForCausalLM": Architecture("qwen2", {**_BLOCK, **_QKV_BIAS}, "qwen2"),
    "LlamaForCausalLM": Architecture("llama", _BLOCK, "llama", interleaved_rope=True),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        {**_BLOCK, **_QK_NORM, **_SANDWICH_NORMS},
        "gemma3_text",
        norm_shift=1,
        activation="gelu_pytorch_tanh",
        full_attention=6,
        window_rope_theta=10000.0,
    ),
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
    window: int | None
    """Tokens that a layer with a window sees; None where there are no such layers."""


def architecture(config: Any) -> Architecture:
    """The entry for a transformers config. Raises ExportError naming an unknown architecture."""
    return named_architecture(config.architectures)


def named_architecture(names: object) -> Architecture:
    """The entry for what config.json has under `architectures`. Raises ExportError as above."""
    name = names[0] if isinstance(names, list) and names else "(none)"
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ExportError(
            f"architecture {name} cannot be converted: {known} can; `qcat export --converter` "
            "exports others with the converter of llama.cpp"
        )
    return ARCHITECTURES[name]


def hyper_parameters(config: Any, vocabulary: int) -> HyperParameters:
    """Read a transformers config (5 or later, which reads both rope notations of config.json).

    Raises:
        ExportError: for a feature that the GGUF would silently lack.
    """
    arch = architecture(config)
    kinds = layer_kinds(arch, config.num_hidden_layers)
    found = list(getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers)
    if found != kinds:
        raise ExportError(
            f"its layers are {', '.join(dict.fromkeys(found))} in an order that llama.cpp does not "
            f"know for {arch.name}: it cannot be converted"
        )
    rope = dict(config.rope_parameters or {})
    if arch.full_attention:
        windowed, rope = dict(rope.get(SLIDING) or {}), dict(rope.get(FULL) or {})
        if windowed != {"rope_type": "default", "rope_theta": arch.window_rope_theta}:
            raise ExportError(
                f"rope of its layers with a window is {windowed}: only a rope_theta of "
                f"{arch.window_rope_theta:g} can be converted"
            )
    if rope.get("rope_type", "default") != "default":
        raise ExportError(f"rope type {rope['rope_type']!r} cannot be converted: only 'default'")
    if "rope_theta" not in rope:
        raise ExportError("config.json names no rope_theta: take it from the model's publisher")
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != arch.activation:
        raise ExportError(
            f"activation {activation!r} cannot be converted: only {arch.activation!r}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "query_pre_attn_scalar", head_dim) != head_dim:
        raise ExportError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}: only the width of a head, "
            f"{head_dim}, can be converted"
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, key, None):
            raise ExportError(f"{key} is on: it cannot be converted")
    return HyperParameters(
        context=config.max_position_embeddings,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rope_theta=float(rope["rope_theta"]),
        rms_eps=float(config.rms_norm_eps),
        vocabulary=vocabulary,
        window=config.sliding_window if SLIDING in kinds else None,
    )


def layer_kinds(arch: Architecture, layers: int) -> list[str]:
    """What each layer sees, as `layer_types` of a config.json says it."""
    every = arch.full_attention or 1
    return [FULL if number % every == 0 else SLIDING for number in range(1, layers + 1)]


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
    if is_norm(name):
        return tensor + arch.norm_shift if arch.norm_shift else tensor
    count = interleaved_heads(name, arch, params.heads, params.kv_heads)
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def is_norm(name: str) -> bool:
    """Whether a tensor is the weight of a norm."""
    return name.endswith("norm.weight")


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
