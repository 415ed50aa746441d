"""Q4_0 weights in torch, as in a GGUF, so that the trained weights are the served ones.

In Q4_0 each 32 neighbours of a row form a block with one scale in float16; each of the 32 is a
whole number from -8 to 7, its code, times that scale. ggml's own quantizer takes the scale from the
block's largest number; here it is the one with the least squared error, which matters the more
where the weights lie on another grid already. Format: `block_q4_0` in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32
"""Neighbours in a row that share a scale."""
PEFT_TYPE = "QCAT_SCALES"
"""What `adapter_config.json` calls an adapter of scales (`qcat train --method scales`)."""
LOWEST, HIGHEST = -8, 7
"""Of the codes."""
_PARTS = [step / 20 for step in range(13, 23)]  # of the scale that the largest number would have
_CHUNK = 1 << 15  # blocks looked at together: 4 MB in float32, which stay in the cache


def fits(columns: int) -> bool:
    """Whether rows of so many numbers can be held as Q4_0."""
    return columns % BLOCK == 0


def fit_scales(weight: torch.Tensor) -> torch.Tensor:
    """The scale of each block that leaves the least squared error, found by trying.

    For given codes q of a block b the best scale is ⟨b, q⟩ / ⟨q, q⟩, which leaves an error of
    ⟨b, b⟩ - ⟨b, q⟩² / ⟨q, q⟩; codes are those of scales around the one that ggml takes.

    Args:
        weight: shape (rows, columns), the columns a multiple of `BLOCK`.

    Returns:
        Shape (rows, columns / BLOCK), float32, each exact in float16. A scale may be negative.
    """
    import torch

    found = [_fit(blocks) for blocks in torch.split(weight.detach().reshape(-1, BLOCK), _CHUNK)]
    scales = torch.cat(found).reshape(weight.shape[0], -1)
    return scales.half().float()


def _fit(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    blocks = blocks.float()
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    best = torch.full((len(blocks),), -1.0, device=blocks.device)
    scales = torch.zeros_like(best)
    for part in (sign * part for part in _PARTS for sign in (1, -1)):
        codes = _codes(blocks, extreme * (part / LOWEST))
        product, square = (blocks * codes).sum(1), codes.square().sum(1)
        scale = torch.where(square > 0, product / square, 0.0)
        better = scale * product > best
        best = torch.where(better, scale * product, best)
        scales = torch.where(better, scale, scales)
    return scales


def encode(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest codes under given scales, int8, shape (rows, columns / BLOCK, BLOCK).

    Args:
        weight: shape (rows, columns).
        scales: shape (rows, columns / BLOCK).
    """
    import torch

    blocks = torch.split(weight.detach().reshape(-1, BLOCK), _CHUNK)
    pairs = zip(blocks, torch.split(scales.reshape(-1, 1), _CHUNK), strict=True)
    codes = torch.cat([_codes(part.float(), scale).to(torch.int8) for part, scale in pairs])
    return codes.reshape(*scales.shape, BLOCK)


def _codes(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (blocks * inverse).round_().clamp_(LOWEST, HIGHEST)


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights that codes and scales stand for, float32, shape (rows, columns)."""
    # Multiplied in place: the product of two types is several times as slow.
    return codes.float().mul_(scales.unsqueeze(-1)).reshape(codes.shape[0], -1)


def pack(codes: torch.Tensor, scales: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in a GGUF: of each block the scale, then its codes, two a byte.

    The low four bits of byte i are code i plus 8, the high four bits code i + 16 plus 8.
    """
    import torch

    blocks = torch.split(codes.reshape(-1, BLOCK), _CHUNK)
    parts = zip(blocks, torch.split(scales.reshape(-1), _CHUNK), strict=True)
    for some, scale in parts:
        shifted = (some - LOWEST).to(torch.uint8)
        nibbles = shifted[:, : BLOCK // 2] | (shifted[:, BLOCK // 2 :] << 4)
        heads = scale.half().unsqueeze(1).contiguous().view(torch.uint8)
        yield torch.cat([heads, nibbles], 1).numpy().data
