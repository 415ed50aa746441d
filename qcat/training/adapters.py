"""Which weights are trained, and how they are saved: block scales, or a LoRA adapter.

`scales`: the base's matrices are rounded to Q4_0 before training, and the scale of every block of
32 weights is trained, with norms and biases; the codes stay (PEQA, Kim et al. 2023,
arXiv:2305.14152). An embedding that is separate from the head is rounded but not trained. The
trained weights are exactly what a Q4_0 file holds, so export has nothing to round.
`lora`: low-rank matrices beside the base's own (Hu et al. 2021), by PEFT, merged and rounded at
export. Both are saved as a folder with `adapter_config.json` and `adapter_model.safetensors`.

Imports torch when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from qcat.base.checkpoint import first_line
from qcat.errors import TrainError
from qcat.gguf import q4_0

Method = Literal["scales", "lora"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Attention and MLP modules, by the names that Qwen3, Qwen2.5 and Llama share."""
FILES = ("adapter_model.safetensors", "adapter_config.json")
_EMBEDDING = "embed_tokens"
_ROWS = 256


class ScaledLinear(nn.Module):
    """A linear layer of Q4_0 weights whose scales are trained.

    Args:
        layer: the layer of the base; its matrix is not kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.codes: torch.Tensor
        self.first: torch.Tensor
        scales = q4_0.fit_scales(layer.weight)
        self.register_buffer("first", scales)
        self.register_buffer("codes", q4_0.encode(layer.weight, scales))
        self.change = nn.Parameter(torch.zeros_like(scales))
        """Change of each scale, relative to the initial one."""
        self.bias = layer.bias

    def scales(self) -> torch.Tensor:
        """The current scales, exact in float16; the gradient ignores the rounding."""
        exact = self.first * (1 + self.change)
        return exact + (exact.half().float() - exact).detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ + b."""
        output: torch.Tensor = _ScaledProduct.apply(inputs, self.scales(), self.codes)
        return output if self.bias is None else output + self.bias


class RoundedEmbedding(nn.Module):
    """An embedding of Q4_0 weights, which are not trained.

    Args:
        embedding: the base's embedding; its matrix is not kept.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.codes: torch.Tensor
        self.first: torch.Tensor
        scales = q4_0.fit_scales(embedding.weight)
        self.register_buffer("first", scales)
        self.register_buffer("codes", q4_0.encode(embedding.weight, scales))

    def scales(self) -> torch.Tensor:
        """The initial scales."""
        return self.first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of the given tokens."""
        rows = q4_0.decode(self.codes[ids].flatten(0, -3), self.first[ids].flatten(0, -2))
        return rows.reshape(*ids.shape, -1)


class _ScaledProduct(torch.autograd.Function):
    """x · Wᵀ with W = codes · scales; W is recomputed when needed instead of being stored."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, scales, codes)
        return functional.linear(inputs, q4_0.decode(codes, scales))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        inputs, scales, codes = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).to(scales.dtype)
        inner = inputs.reshape(-1, inputs.shape[-1]).to(scales.dtype)
        to_inputs, to_scales = torch.zeros_like(inner), []
        # A few rows of the matrix at a time, which stay in the processor's cache.
        parts = (torch.split(codes, _ROWS), torch.split(scales, _ROWS), torch.split(rows, _ROWS, 1))
        for code, scale, part in zip(*parts, strict=True):
            to_inputs.addmm_(part, q4_0.decode(code, scale))
            to_scales.append(((part.T @ inner).reshape(code.shape) * code).sum(-1))
        return to_inputs.reshape(inputs.shape).to(inputs.dtype), torch.cat(to_scales), None


def attach_scales(base: Any, train_embeddings: bool) -> Any:
    """Round a base's matrices to Q4_0 and make their scales, the norms and biases trainable.

    Raises:
        TrainError: a matrix has rows that Q4_0 cannot hold.
    """
    for parameter in base.parameters():
        parameter.requires_grad = False
    for name, module in list(base.named_modules()):
        if name.rpartition(".")[2] in LINEAR and isinstance(module, nn.Linear):
            if not q4_0.fits(module.in_features):
                raise TrainError(
                    f"{name} has rows of {module.in_features}, no multiple of {q4_0.BLOCK}, which "
                    "Q4_0 cannot hold: train with --method lora"
                )
            base.set_submodule(name, ScaledLinear(module))
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    # A tied embedding is kept in a more precise type, and a trained one in full precision.
    if not (train_embeddings or embedding.weight.equal(head.weight)):
        base.set_input_embeddings(RoundedEmbedding(embedding))
    for name, parameter in base.named_parameters():
        part = name.rpartition(".")[2]
        small = part == "change" or parameter.ndim == 1
        parameter.requires_grad = small or (train_embeddings and _EMBEDDING in name)
    return base


def attach_lora(
    base: Any, *, rank: int, dropout: float, train_embeddings: bool, folder: Path
) -> Any:
    """A base with a fresh LoRA adapter on attention and MLP; embeddings and head frozen.

    Raises:
        TrainError: PEFT does not support LoRA for it.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=list(LINEAR),
        modules_to_save=[_EMBEDDING] if train_embeddings else None,
        ensure_weight_tying=train_embeddings and base.config.tie_word_embeddings,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise TrainError(f"base {folder}: no LoRA for it: {first_line(error)}") from None


def bare(model: Any) -> Any:
    """The causal language model, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save(model: Any, folder: Path, *, base: str, layers: int | None) -> None:
    """Write the adapter's two files into a folder, each atomically.

    Args:
        model: made by one of the functions above.
        folder: folder of the run.
        base: the base for export: the absolute path of a folder or file, or a hub name.
        layers: how many layers of the base are kept; None for all. Stored in PEFT's own form,
            `layer_replication`.
    """
    stack = None if layers is None else [[0, layers]]
    made = folder / "adapter.partial"
    if hasattr(model, "peft_config"):
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.layer_replication = base, stack
        model.save_pretrained(made, save_embedding_layers=False)
    else:
        _save_scales(
            model,
            made,
            {
                "peft_type": q4_0.PEFT_TYPE,
                "base_model_name_or_path": base,
                "layer_replication": stack,
            },
        )
    for name in FILES:
        os.replace(made / name, folder / name)
    shutil.rmtree(made)


def _save_scales(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Scales before training (they determine the codes) and after; norms and biases in full."""
    from safetensors.torch import save_file

    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, ScaledLinear | RoundedEmbedding):
            tensors[f"{name}.first_scales"] = module.first.half()
            tensors[f"{name}.scales"] = module.scales().detach().half()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(".change"):
            tensors[name] = parameter.detach()
    folder.mkdir(exist_ok=True)
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / FILES[0], metadata={"format": "pt"})
    (folder / FILES[1]).write_text(json.dumps(config, indent=1), "utf-8")
