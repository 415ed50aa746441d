"""How the small base is trained on the household questions, as `make_model.sh` does it."""

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
