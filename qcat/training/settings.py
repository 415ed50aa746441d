"""How to train: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcat.training.adapters import Method
    from qcat.training.objective import Objective


@dataclass(frozen=True)
class Settings:
    """How to train. What is not named here is as in the LoRA paper's and PEFT's defaults."""

    base: str
    """Local folder or hub name."""
    objective: Objective = "answer"
    epochs: int = 5
    """At most: training stops early when validation macro-F1 has not risen for `patience`."""
    batch: int = 8
    """Questions a step."""
    rate: float | None = None
    """Peak learning rate; by default 3e-3 for scales, where it is relative to each of them, and for
    LoRA 2e-4 for a model 1024 wide, more for narrower ones."""
    rank: int = 16
    """Of the LoRA matrices; alpha is twice the rank."""
    dropout: float = 0.05
    """On LoRA's input."""
    method: Method = "scales"
    """What is trained (`qcat.training.adapters`)."""
    train_embeddings: bool = False
    """Train the token embeddings too, and save them whole: worth it for a small base."""
    word_dropout: float = 0.0
    """Share of each training question's words left out, others every epoch (Iyyer et al. 2015)."""
    patience: int = 2
    """Epochs without a better validation score before training stops."""
    seed: int = 0
    layers: int | None = None
    """How many of the base's to keep, from the bottom; None keeps all. The final norm and the head
    stay, and the adapter learns to do with what is left."""
