"""The short texts that the small base is pretrained on, and what is known of them.

Questions of CLINC150 and Banking77, WordNet's glosses and words, things said about homes
(`home.txt`, written by a language model, CC0), and new texts made of those: the last two have no
labels, they are only shown to the teacher.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcat.encoding.prompt import clean_question

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
# WordNet's lexicographer files of what people own, do, eat, grow and keep:
# act, animal, artifact, food, phenomenon, plant, substance.
CONCRETE = (4, 5, 6, 13, 19, 20, 27)
RARE_TOO = (4, 6, 13)


@dataclass(frozen=True)
class Row:
    """A text, what to call it if that is known, and the label set that the name is from."""

    text: str
    name: str | None = None
    source: str = ""


def reserved(rows: Iterable[dict[str, str]]) -> set[str]:
    """The third of CLINC150's intents that the base never sees: every third in order of name."""
    return set(sorted({row["label"] for row in rows})[::3])


def clinc(folder: Path) -> list[Row]:
    """CLINC150's training questions, those of the reserved intents left out."""
    rows = _jsonl(folder / "train.jsonl")
    left_out = reserved(rows)
    return [
        Row(row["text"], row["label"].replace("_", " "), "clinc")
        for row in rows
        if row["label"] not in left_out
    ]


def banking(folder: Path) -> list[Row]:
    """Banking77's training questions."""
    rows = _jsonl(folder / "train.jsonl")
    return [Row(row["text"], row["label"].replace("_", " ").lower(), "banking") for row in rows]


def _jsonl(path: Path) -> list[dict[str, str]]:
    """Rows of `text` and `label` (words joined by underscores)."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def wordnet(folder: Path) -> tuple[list[Row], list[Row], list[str]]:
    """Glosses with their word, example sentences among them; sets of synonyms; common nouns.

    Words that WordNet's own tagged texts do not use are taken only of acts, artifacts and food.
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
            if not any(tagged) and not (concrete and int(parts[1]) in RARE_TOO):
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
