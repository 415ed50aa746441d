"""Training settings: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcat.training.adapters import Method
    from qcat.training.objective import Objective

EPOCHS = 3
"""Passes over the training questions by default; how it was chosen: docs/benchmarks.md."""


@dataclass(frozen=True)
class Settings:
    """Training settings. Everything else follows the defaults of the LoRA paper and PEFT."""

    base: str
    """Local folder or hub name."""
    objective: Objective = "answer"
    epochs: int = EPOCHS
    """At most; training stops early if validation macro-F1 has not improved for `patience`."""
    batch: int = 8
    """Questions per step."""
    rate: float | None = None
    """Peak learning rate; by default 3e-3 for scales, where it is relative to each of them, and for
    LoRA 2e-4 for a model 1024 wide, more for narrower ones."""
    rank: int = 16
    """Rank of the LoRA matrices; alpha is twice the rank."""
    dropout: float = 0.05
    """Dropout on LoRA's input."""
    method: Method = "scales"
    """Which weights are trained (`qcat.training.adapters`)."""
    train_embeddings: bool = False
    """Also train the token embeddings, and save them in full: useful for a small base."""
    word_dropout: float = 0.0
    """Share of each training question's words to drop, redrawn each epoch (Iyyer et al. 2015)."""
    patience: int = 2
    """Epochs without a better validation score before training stops."""
    seed: int = 0
    layers: int | None = None
    """How many layers of the base to keep, from the bottom; None keeps all. The final norm and the
    head stay, and the adapter learns to compensate for the missing layers."""
