"""A small Qwen3 that is a bag of words before it has seen a prompt, and can become more.

A transformer with random weights must first learn to average what it reads. This one begins there:
two components of each token's embedding are set aside, a constant and the token's weight, and the
last layer's attention reads only these. Its heads average the embeddings of the last twenty or so
tokens, by weight; two heads of each other layer look one and two tokens back (Elhage et al. 2021),
and what those layers add is zero at first (Zhang et al. 2019, Fixup). The embeddings and weights
are trained as such a bag before, which costs next to nothing (Arora et al. 2017; Tulkens and van
Dongen 2024, model2vec).
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from qcat.encoding.tokenization import HubTokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
SET_ASIDE = 2
"""Components of an embedding that hold no meaning: the constant, the token's weight."""
MEANING = SHAPE["hidden_size"] - SET_ASIDE
_CONSTANT = 0.5
_BY_WEIGHT, _BY_PLACE = 8.0, 13.2  # how sharply the average tells tokens apart
_WINDOW, _SLOW = range(9, 18), 31  # rotary pairs: half as much 18 tokens back; as good as none
_NOISE = 0.005  # where query and key are both zero, both would stay so for ever
_EPOCHS, _RATE = 6, 3e-3  # of the bag


def begin(
    folder: Path,
    pieces: torch.Tensor,
    texts: Sequence[str],
    targets: torch.Tensor,
    batch: int = 512,
) -> Any:
    """The student for the tokenizer in a folder, trained as a bag.

    Args:
        folder: holds `tokenizer.json`.
        pieces: unit vectors (tokens, MEANING), what each token means by itself.
        texts: to learn the bag from, with their `targets` (texts, MEANING).
        batch: texts a step.
    """
    tokenizer = HubTokenizer(folder)
    meaning, weight = trained_bag(tokenizer, pieces, texts, targets, batch)
    config = Qwen3Config(
        vocab_size=len(meaning), bos_token_id=None, eos_token_id=tokenizer.end, **SHAPE
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        aside = _CONSTANT * torch.stack([torch.ones_like(weight), weight], dim=1)
        rows = torch.cat([aside, meaning], dim=1)
        # The first norm takes the length out again; as rows of the head they are unit vectors.
        rows /= meaning.norm(dim=-1, keepdim=True)
        model.get_input_embeddings().weight.copy_(rows)
        model.model.norm.weight[:SET_ASIDE] = 0
        *context, last = model.model.layers
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for layer in context:
            _look_back(layer.self_attn, head=0, back=1)
            _look_back(layer.self_attn, head=1, back=2)
        _average(last.self_attn)
    return model


def trained_bag(
    tokenizer: HubTokenizer, pieces: torch.Tensor, texts: Sequence[str], targets: torch.Tensor,
    batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Meanings (tokens, MEANING), weights (tokens,) in ±0.5: their bags are near the targets."""
    meaning = torch.nn.Parameter(pieces.clone())
    weight = torch.nn.Parameter(torch.zeros(len(pieces)))
    optimizer = torch.optim.Adam([meaning, weight], _RATE)
    rows = [tokenizer.encode(f" {text}", special=False) for text in texts]
    steps = _EPOCHS * (len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, steps, pct_start=0.1, cycle_momentum=False
    )
    bar = tqdm(range(steps), file=sys.stderr, mininterval=20, desc="bag")
    order: list[int] = []
    mean = 0.0
    for step in bar:
        if len(order) < batch:
            order = random.sample(range(len(rows)), len(rows))
        window, order = order[:batch], order[batch:]
        found = bag([rows[i] for i in window], meaning, _bounded(weight))
        loss = distance(found, targets[window].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = loss.item() if not step else 0.99 * mean + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
    return meaning.detach(), _bounded(weight.detach())


def bag(rows: Sequence[Sequence[int]], meaning: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Unit vectors (rows, MEANING): what the last layer's attention adds at first.

    But for the places of the tokens, and without a prompt.
    """
    flat = torch.tensor([token for row in rows for token in row])
    owner = torch.repeat_interleave(
        torch.arange(len(rows)), torch.tensor([len(row) for row in rows])
    )
    vectors, weights = meaning[flat], weight[flat]
    # The norm before attention, and the key's, which holds constant and weight at one length.
    length = (_CONSTANT**2 * (1 + weights**2) + vectors.square().sum(-1)).sqrt()
    logits = (_BY_PLACE + _BY_WEIGHT * weights) / (1 + weights**2).sqrt()
    scale = (logits - _BY_PLACE).exp() / length
    summed = torch.zeros(len(rows), vectors.shape[1]).index_add(0, owner, vectors * scale[:, None])
    return functional.normalize(summed, dim=-1)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far unit vectors (rows, MEANING) are from the teacher's, alone and to each other."""
    near = 1 - (found * wanted).sum(-1).mean()
    alike = functional.mse_loss(found @ found.T, wanted @ wanted.T)
    return near + 10 * alike


def _bounded(weight: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.tanh(weight)


def _look_back(attention: Any, head: int, back: int) -> None:
    """Make a head look so many tokens back.

    With the constant alone in query and key, their product is √head_dim times the mean, over the
    rotary pairs used (Su et al. 2021), of cos(frequency × (tokens between them - back)).
    """
    size = attention.head_dim
    pairs = range(10)
    _quieten(attention, head, pairs)
    for pair in pairs:
        angle = SHAPE["rope_parameters"]["rope_theta"] ** (-2 * pair / size) * back
        attention.k_proj.weight[head * size + pair, 0] = 1
        attention.q_proj.weight[head * size + pair, 0] = math.cos(angle)
        attention.q_proj.weight[head * size + pair + size // 2, 0] = -math.sin(angle)


def _average(attention: Any) -> None:
    """Make all heads average what is near, by weight, and pass it on as it is."""
    size, width = attention.head_dim, SHAPE["hidden_size"]
    pairs = [*_WINDOW, _SLOW]
    near = len(_WINDOW)
    for head in range(SHAPE["num_attention_heads"]):
        _quieten(attention, head, pairs)
        for pair in pairs:
            attention.q_proj.weight[head * size + pair, 0] = 1
        for pair in _WINDOW:
            attention.k_proj.weight[head * size + pair, 0] = 1 / math.sqrt(near)
        attention.k_proj.weight[head * size + _SLOW, 1] = 1
    # Query and key come out of their norms √size long; the product is divided by √size.
    gain = math.sqrt(len(pairs) / size)
    attention.q_norm.weight[list(_WINDOW)] = _BY_PLACE / math.sqrt(near) * gain
    attention.q_norm.weight[_SLOW] = _BY_WEIGHT * gain
    for projection in (attention.v_proj, attention.o_proj):
        projection.weight.copy_(torch.eye(width))
        projection.weight[:SET_ASIDE] = 0


def _quieten(attention: Any, head: int, pairs: Sequence[int]) -> None:
    """No query; of the key next to nothing, and nothing at all in the pairs to be set."""
    size = attention.head_dim
    rows = slice(head * size, (head + 1) * size)
    attention.q_proj.weight[rows] = 0
    attention.k_proj.weight[rows].normal_(std=_NOISE)
    for pair in pairs:
        attention.k_proj.weight[[head * size + pair, head * size + pair + size // 2]] = 0
