"""The script that makes the small base (examples/base): how it begins, and its pure parts."""

from __future__ import annotations

import copy
import random

import pytest
import student
import torch
from pretrain import by_length
from texts import Row, frame, noisy, reserved, swap
from tiny_model import make_tokenizer
from torch.nn import functional

from qcat.encoding.tokenization import HubTokenizer

TEXTS = ["the pump hums", "who fixed the fence", "paint the old fence", "the pump was fixed"] * 400


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A student, its tokenizer, and the four targets that it was given as a bag."""
    folder = tmp_path_factory.mktemp("begun")
    size = make_tokenizer(folder, TEXTS, size=300)
    random.seed(0)
    torch.manual_seed(0)
    targets = functional.normalize(torch.randn(4, student.MEANING), dim=-1)
    pieces = functional.normalize(torch.randn(size, student.MEANING), dim=-1)
    model = student.begin(folder, pieces, TEXTS, targets.repeat(400, 1), batch=40).eval()
    return model, HubTokenizer(folder), targets


def test_it_begins_as_a_bag(begun):
    model, tokenizer, targets = begun
    rows = [tokenizer.encode(f" {text}", special=False) for text in TEXTS[:4]]
    weights = model.get_input_embeddings().weight.detach()
    # Each row of them is known up to its length.
    weights = weights / weights[:, :1] * 0.5
    found = student.bag(rows, weights[:, 2:], weights[:, 1] / 0.5)
    assert (found * targets).sum(-1).min() > 0.9  # the bag was learnt
    with torch.inference_mode():
        states = torch.stack(
            [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        )
    assert states[:, : student.SET_ASIDE].abs().max() == 0
    given = functional.normalize(states[:, student.SET_ASIDE :], dim=-1)
    # Not quite the bag: the nearest tokens count a little more, the last one once more.
    assert (given * found).sum(-1).min() > 0.95


def test_its_heads_look_where_they_should(begun):
    model, tokenizer, _ = begun
    model.set_attn_implementation("eager")
    row = (tokenizer.encode(" the pump", special=False) * 150)[:300]
    with torch.inference_mode():
        *context, last = model.model(torch.tensor([row]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer in context:
        assert layer[0, 0, 299].argmax() == 298
        assert layer[0, 1, 299].argmax() == 297
        assert layer[0, :2, 299, -10:].sum(-1).min() > 0.8
    assert last[0, :, 299, -60:].sum(-1).min() > 0.95


def test_all_of_its_attention_can_learn(begun):
    model = copy.deepcopy(begun[0]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):  # what the first layers add is zero until the first step
        optimizer.zero_grad()
        model.model(torch.arange(40)[None]).last_hidden_state[0, -1].square().sum().backward()
        gradients = [layer.self_attn.q_proj.weight.grad for layer in model.model.layers]
        optimizer.step()
    assert all((gradient.abs().amax(1) > 0).all() for gradient in gradients)


def test_a_third_of_the_intents_is_reserved():
    intents = [{"label": f"intent {i % 150:03}"} for i in range(1000)]
    left_out = reserved(intents)
    assert len(left_out) == 50
    assert left_out == reserved(reversed(intents))


def test_texts_are_made_of_texts():
    random.seed(0)
    nouns = ["anvil", "garden hose"]
    assert swap("who fixed it", nouns) in ("who anvil it", "who garden hose it")
    assert swap("so it is", nouns) == "so it is"
    assert "{}" not in frame(nouns)
    assert all(noisy(text) for text in ("?", "a", "When was it?", "so it is indeed") * 50)


def test_batches_by_length_hold_each_row_once():
    given = [Row("x" * (i % 40)) for i in range(1000)]
    batches = by_length(range(1000), given, 32)
    assert sorted(number for batch in batches for number in batch) == list(range(1000))
