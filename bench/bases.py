"""The bases that benchmarks on real weights begin from, by a short name.

A pretrained model's name with `-rotated` is a base that computes the same from weights that lie on
no grid. The residual stream is turned by a random orthogonal matrix, and each norm's weight is
multiplied into the matrices after it (QuaRot, Ashkboos et al. 2024, without its rotations of
activations). What is left of a 4-bit grid in the weights of a dequantized base is gone then, and
outliers are spread out: the nearest to an original checkpoint that can be made of such a file.
Embedding and head are no longer one matrix.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from real_models import MODELS, fetch, folder  # noqa: E402 (it lies beside the examples)

SMALL, ROTATED = "small", "-rotated"
"""The base that comes with qcat; and what a rotated one's name ends with."""
TITLES = {name: model.title.split(",")[0] for name, model in MODELS.items()} | {SMALL: "small base"}
_SEED = 0


def base_of(name: str) -> Path:
    """The base of a name: a GGUF, fetched if need be, or the folder of a checkpoint."""
    if name == SMALL:
        return EXAMPLES / "base" / "model"
    if name.endswith(ROTATED):
        from qcat.base.checkpoint import base_folder

        original = base_folder(str(fetch(name.removesuffix(ROTATED))))
        return rotated(original, folder() / name)
    return fetch(name)


def title(name: str) -> str:
    """What a table calls it."""
    turned = name.endswith(ROTATED)
    return TITLES[name.removesuffix(ROTATED)] + (", rotated" if turned else "")


def rotated(base: Path, target: Path) -> Path:
    """Write the rotated form of a checkpoint (llama, qwen2), in float16, unless it is there.

    Args:
        base: folder of the checkpoint, with its tokenizer.
        target: folder to make.
    """
    import torch
    from torch import nn

    from qcat.base.checkpoint import load_base

    if (target / "config.json").exists():
        return target
    model = load_base(base, torch.float32)
    turn, _ = torch.linalg.qr(
        torch.randn(
            model.config.hidden_size,
            model.config.hidden_size,
            generator=torch.Generator().manual_seed(_SEED),
        )
    )
    with torch.no_grad():
        # Tied until now: the one matrix becomes two.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn)
        _fold(model.model.norm, [model.lm_head], turn)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = [attention.q_proj, attention.k_proj, attention.v_proj]
            _fold(layer.input_layernorm, readers, turn)
            _fold(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], turn)
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight.copy_(turn.T @ writer.weight)
    model.config.tie_word_embeddings = False
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, partial)
    partial.rename(target)
    return target


def _fold(norm: Any, readers: Sequence[Any], turn: Any) -> None:
    """Let layers read the turned stream behind a norm, whose own weight becomes one."""
    for reader in readers:
        reader.weight.copy_((reader.weight * norm.weight) @ turn)
    norm.weight.fill_(1)
