"""How `make_model.py` and the benchmarks train the small base on the household questions."""

from typing import Any

RECIPE: dict[str, Any] = {
    "method": "lora",
    "epochs": 4,
    "batch": 32,
    "rate": 5e-4,
    "rank": 32,
    "train_embeddings": True,
    "word_dropout": 0.15,
}
"""Fields of `qcat.training.settings.Settings`."""
