"""The training loop: steps, epochs, checkpoints, and the questions in batches.

Every step seeds its own random numbers, so that a resumed run ends with the same result.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcat.base.checkpoint import first_line
from qcat.data.dataset import Example
from qcat.encoding.trie import LabelTrie
from qcat.errors import TrainError
from qcat.progress import Progress
from qcat.training.objective import Encoded, Scorer
from qcat.training.run_folder import CHECKPOINT
from qcat.training.settings import Settings

_SAVE_SECONDS = 300  # between checkpoints, besides the one at the end of each epoch
_EVALUATED_TOKENS = 4096  # in one forward pass, the prefix counted in each row: the cache's size
_TRAINED_TOKENS = 512  # in one backward pass: their activations take most of the memory
_SCALES_RATE = 3e-3


@dataclass(frozen=True)
class Epoch:
    """Results of the model after an epoch."""

    epoch: int
    """From 1."""
    train_loss: float
    validation_loss: float
    """Mean of -log P(label | question), in nats, whatever the objective."""
    validation_accuracy: float
    validation_macro_f1: float


@dataclass
class _State:
    """Contents of a checkpoint besides the optimizer's state."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the steps of the running epoch."""
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """The adapter's tensors at the best epoch."""


class Loop:
    """The model, the optimizer and the state of the training."""

    def __init__(
        self, model: Any, prefix: list[int], trie: LabelTrie, settings: Settings, target: Path
    ) -> None:
        import torch

        from qcat.training.adapters import bare

        self.device = device()
        self.model = model.to(self.device)
        width = int(model.config.hidden_size)
        # LoRA's best rate is roughly inversely proportional to the width; 2e-4 is used at 1024.
        usual = _SCALES_RATE if settings.method == "scales" else 2e-4 * 1024 / width
        self.rate = settings.rate or usual
        self.settings = settings
        self.prefix_tokens = len(prefix)
        self.scorer = Scorer(bare(model), prefix, trie)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        decay = 0.0 if settings.method == "scales" else 0.01
        self.optimizer = torch.optim.AdamW(self.trained, self.rate, weight_decay=decay)
        self.state = _State()
        self._file = target / CHECKPOINT

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation macro-F1, then loss, from 1."""
        best = max(self.state.history, key=lambda e: (e.validation_macro_f1, -e.validation_loss))
        return best.epoch

    def fit(
        self,
        train: Sequence[Example],
        encode: Callable[[Example], Encoded],
        validation: list[Encoded],
        progress: Progress,
    ) -> None:
        """Train to the end, then load the best epoch's adapter into the model."""
        import torch

        per_epoch = -(-len(train) // self.settings.batch)
        total = per_epoch * self.settings.epochs
        saved = time.monotonic()
        batches: list[list[Encoded]] = []
        while self.state.step < total and not self._should_stop():
            epoch, place = divmod(self.state.step, per_epoch)
            if not batches:
                chance = random.Random(f"{self.settings.seed}-{epoch}")
                thinned = [_thinned(row, self.settings.word_dropout, chance) for row in train]
                batches = _batches(list(map(encode, thinned)), self.settings.batch, chance)
            torch.manual_seed(self.settings.seed * 1_000_003 + self.state.step)
            self.state.losses.append(self._step(batches[place], total))
            self.state.step += 1
            progress("train", self.state.step, total, f"loss {np.mean(self.state.losses):.3f}")
            if place + 1 == per_epoch:
                self._end_epoch(epoch + 1, validation, progress)
                batches = []
            if place + 1 == per_epoch or time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self._set_adapter(self.state.best)

    def evaluate(
        self, questions: list[Encoded], what: str, progress: Progress
    ) -> tuple[float, float, float]:
        """Loss in nats, accuracy and macro-F1."""
        from sklearn.metrics import accuracy_score, f1_score

        self.model.eval()
        found: list[Any] = []
        truth: list[int] = []
        for part in _parts(questions, _EVALUATED_TOKENS, self.prefix_tokens):
            found += list(self.scorer.log_probabilities([item.rest for item in part]))
            truth += [item.label for item in part]
            progress(what, len(found), len(questions), "")
        said = np.argmax(found, axis=1)
        loss = -float(np.mean(np.array(found)[np.arange(len(truth)), truth]))
        macro_f1 = f1_score(truth, said, average="macro", zero_division=0.0)
        return loss, float(accuracy_score(truth, said)), float(macro_f1)

    def save(self) -> None:
        """Write the checkpoint; the old one stays until the new one is complete."""
        import torch

        partial = self._file.with_suffix(".partial")
        state = {
            "step": self.state.step,
            "losses": self.state.losses,
            "history": [asdict(epoch) for epoch in self.state.history],
            "best": self.state.best,
            "adapter": self._adapter(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            torch.save(state, partial)
            os.replace(partial, self._file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            partial.unlink(missing_ok=True)
            raise TrainError(f"{self._file}: cannot be written: {first_line(error)}") from None

    def load(self) -> None:
        """Resume from the checkpoint, if there is one."""
        import torch

        if not self._file.is_file():
            return
        try:
            state = torch.load(self._file, map_location="cpu", weights_only=True)
            self._set_adapter(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            history = [Epoch(**epoch) for epoch in state["history"]]
            self.state = _State(state["step"], state["losses"], history, state["best"])
        except Exception as error:  # a damaged file: pickle and zip errors of many kinds
            raise TrainError(
                f"{self._file}: damaged ({first_line(error)}): delete it to begin again"
            ) from None

    def _step(self, batch: Sequence[Encoded], total: int) -> float:
        import torch

        self.model.train()
        warm_up = max(1, total // 20)
        done = self.state.step
        scale = min((done + 1) / warm_up, (total - done) / max(1, total - warm_up))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * scale
        self.optimizer.zero_grad(set_to_none=True)
        whole = 0.0
        for part in _parts(batch, _TRAINED_TOKENS):
            # On a CPU every new shape would be recompiled for bfloat16, which costs more.
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                loss = self.scorer.loss(part, self.settings.objective) * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            whole += float(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not bool(norm.isfinite()):
            raise TrainError(
                f"{self._file.parent}: the loss is {whole} and its gradient not finite at step "
                f"{done + 1}: lower --learning-rate, and choose another folder"
            )
        self.optimizer.step()
        return whole

    def _end_epoch(self, number: int, validation: list[Encoded], progress: Progress) -> None:
        loss, accuracy, macro_f1 = self.evaluate(validation, "validate", progress)
        train_loss = float(np.mean(self.state.losses))
        self.state.history.append(Epoch(number, train_loss, loss, accuracy, macro_f1))
        self.state.losses = []
        figures = f"loss {train_loss:.3f}, validation loss {loss:.3f}, macro-F1 {macro_f1:.3f}"
        progress("epoch", number, self.settings.epochs, figures)
        if self.best_epoch == number:
            self.state.best = self._adapter()

    def _should_stop(self) -> bool:
        history = self.state.history
        return bool(history) and len(history) - self.best_epoch >= self.settings.patience

    def _adapter(self) -> dict[str, Any]:
        return {
            name: tensor.detach().clone()
            for name, tensor in self.model.named_parameters()
            if tensor.requires_grad
        }

    def _set_adapter(self, tensors: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                if tensor.requires_grad:
                    tensor.copy_(tensors[name])


def _thinned(example: Example, share: float, chance: random.Random) -> Example:
    """The example with about this share of its words left out; at least one word stays."""
    words = example.text.split()
    kept = [word for word in words if chance.random() >= share]
    return replace(example, text=" ".join(kept or words))


def _batches(rows: list[Encoded], size: int, chance: random.Random) -> list[list[Encoded]]:
    """All rows once, in random batches of similar length, so that there is little padding."""
    mixed = chance.sample(rows, len(rows))
    window = 32 * size
    mixed = [
        row
        for start in range(0, len(mixed), window)
        for row in sorted(mixed[start : start + window], key=lambda row: len(row.rest))
    ]
    batches = [mixed[start : start + size] for start in range(0, len(mixed), size)]
    chance.shuffle(batches)
    return batches


def _parts(rows: Sequence[Encoded], tokens: int, prefix: int = 0) -> Iterator[list[Encoded]]:
    """Rows by length, in parts of at most this many tokens with padding, or of one row."""
    part: list[Encoded] = []
    for row in sorted(rows, key=lambda row: len(row.rest)):
        if part and (len(part) + 1) * (prefix + len(row.rest)) > tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def device() -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
