"""Questions as people type them: in capitals, as a telegram, with slips of the keyboard."""

from __future__ import annotations

import random
import re

_SMALL = frozenset(
    re.findall(
        r"\w+",
        """a an the is are was were am be been do does did has have had i my me we our us you your
        it its this that to of for in on at and or with can could should would will please there
        how what when who""",
    )
)
"""Words that a telegram leaves out."""
_WORD = re.compile(r"[\w']+")


def capitals(text: str) -> str:
    """All of it in capitals, without a question mark."""
    return text.upper().rstrip("?. ")


def telegram(text: str) -> str:
    """Its words that carry meaning, in lower case; the text itself if there are fewer than two."""
    words = [word for word in _WORD.findall(text.lower()) if word not in _SMALL]
    return " ".join(words) if len(words) > 1 else text


def slips(text: str, chance: random.Random) -> str:
    """With one or two letters doubled, left out, or swapped with the next one."""
    letters = list(text)
    for _ in range(chance.choice((1, 1, 2))):
        places = [n for n in range(1, len(letters) - 1) if letters[n].isalpha()]
        if not places:
            break
        at = chance.choice(places)
        how = chance.choice(("double", "drop", "swap"))
        if how == "double":
            letters.insert(at, letters[at])
        elif how == "drop":
            del letters[at]
        else:
            letters[at : at + 2] = reversed(letters[at : at + 2])
    return "".join(letters)


def as_typed(text: str, chance: random.Random) -> str:
    """One of the three, at random."""
    how = chance.randrange(3)
    return slips(text, chance) if how == 0 else (capitals, telegram)[how - 1](text)
