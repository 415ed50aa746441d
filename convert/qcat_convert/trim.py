"""A tokenizer cut down to the tokens that a language and a task need.

Kept are the first merges with what they make, the tokens that the caller needs, single bytes, and
all added tokens, the special ones among them. Ids are numbered anew, in their old order.
`whole_words` says which tokens a language needs. Knows nothing of models.

Theorem. If all tokens that the whole tokenizer makes of a text are kept, the cut one makes the
same of it.

Proof. Both cut the text into the same words, since that is done by rule and by the added tokens,
and these are all kept. Within a word BPE merges the adjacent pair of the best rank, leftmost
first, until no pair has a rank. Let t be a token that is left at the end. No pair that reaches over
an end of t was ever merged, and the best pair of the word is, where it lies within t, the best
within t: so the merges within t are those that BPE makes of the characters of t by themselves. Call
them the chain of t. With a token its whole chain is kept (`trim` sees to that), so every merge
that the whole tokenizer makes in this word is kept. At each of its steps the pair that it merges is
the best of all pairs with a rank, thus also the best of those whose merge is kept, and the cut
tokenizer merges it too; at the end no pair is left that has a rank, kept or not. ∎

For other texts the cut tokenizer spells the same characters in more, smaller tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

from qcat.encoding.tokenization import HubTokenizer, is_sentencepiece
from qcat.errors import ExportError

DEFAULT_MERGES = 16_000
_ROLES = ("eos_token", "bos_token", "pad_token")

Pair = tuple[str, str]


@dataclass(frozen=True)
class Trimmed:
    """A tokenizer cut down, and what it was cut from."""

    tokenizer: HubTokenizer
    """With ids from 0 on, without gaps."""
    rows: tuple[int, ...]
    """For each of its ids the id in the whole tokenizer: the rows of embedding and head to keep."""
    spellings: Mapping[int, str]
    """Of the whole tokenizer's tokens, by id."""

    def split_otherwise(self, whole: Sequence[int], cut: Sequence[int]) -> bool:
        """Whether a text has other tokens than under the whole tokenizer.

        Args:
            whole: its ids under the whole tokenizer.
            cut: its ids under this one.

        Raises:
            ExportError: the two do not spell the same text.
        """
        found = [self.rows[token] for token in cut]
        if found == list(whole):
            return False
        before, after = ("".join(map(self.spellings.__getitem__, ids)) for ids in (whole, found))
        if before != after:
            raise ExportError(
                f"the trimmed vocabulary spells {after[:60]!r} for {before[:60]!r}: please report "
                "it with the tokenizer's name, and export with --vocab full"
            )
        return True


def trim(tokenizer: HubTokenizer, needed: Iterable[int], merges: int) -> Trimmed | None:
    """Cut a tokenizer down.

    Args:
        tokenizer: one that `qcat_convert.vocab.read_vocabulary` takes.
        needed: ids to keep in any case.
        merges: how many of the first merges to keep.

    Returns:
        None if nothing would be left out.

    Raises:
        ExportError: a tokenizer of SentencePiece. llama.cpp gives it scores in the place of merges,
            and the theorem says nothing of those.
    """
    if is_sentencepiece(tokenizer.spec):
        raise ExportError(
            f"{tokenizer.folder / 'tokenizer.json'}: a vocabulary of SentencePiece cannot be "
            "trimmed: export with --vocab full"
        )
    model = tokenizer.spec["model"]
    vocabulary: dict[str, int] = model["vocab"]
    added = tokenizer.spec["added_tokens"]
    pairs = [_pair(merge) for merge in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    by_id = {number: token for token, number in vocabulary.items()}

    roles = [tokenizer.token_id(role) for role in _ROLES]
    wanted = {by_id[number] for number in (*needed, *roles) if number in by_id}
    for left, right in pairs[:merges]:
        wanted |= {left, right, left + right}
    kept_ranks = {*range(min(merges, len(pairs)))}
    for token in wanted:
        kept_ranks.update(_chain(token, ranks))
    kept_pairs = [pairs[rank] for rank in sorted(kept_ranks)]
    wanted.update(left + right for left, right in kept_pairs)
    wanted.update(
        token for token in vocabulary if len(token) == 1 or token == model.get("unk_token")
    )

    by_id |= {token["id"]: token["content"] for token in added}
    rows = tuple(sorted({*(token["id"] for token in added), *(vocabulary[t] for t in wanted)}))
    if len(rows) == len(by_id):
        return None
    numbers = {old: new for new, old in enumerate(rows)}
    spec = {
        **tokenizer.spec,
        "added_tokens": [{**token, "id": numbers[token["id"]]} for token in added],
        "post_processor": None,  # it may name ids, and only adds tokens that are never asked for
        "model": {
            **model,
            "vocab": {t: numbers[old] for t, old in vocabulary.items() if old in numbers},
            "merges": kept_pairs,
        },
    }
    return Trimmed(HubTokenizer(tokenizer.folder, spec), rows, by_id)


def whole_words(tokenizer: HubTokenizer, texts: Iterable[str]) -> set[int]:
    """Ids of a space and letters, none but the first a capital: words, of which questions consist.

    Qwen3's merges go by how often they were seen in code too: of its 36,700 English words so
    written 12,400 are among the first 32,000.

    Args:
        tokenizer: as for `trim`.
        texts: of the task, in its language: a word has no letters but theirs and a to z.
    """
    from tokenizers.decoders import ByteLevel

    letters = {*ascii_lowercase, *"".join(texts).lower()}
    decoder, found = ByteLevel(), set()
    for token, number in tokenizer.spec["model"]["vocab"].items():
        word = decoder.decode([token])
        is_word = word[:1] == " " and word[1:].isalpha() and word[2:] == word[2:].lower()
        if is_word and letters.issuperset(word[1:].lower()):
            found.add(number)
    return found


def _pair(merge: Any) -> Pair:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _chain(token: str, ranks: Mapping[Pair, int]) -> list[int]:
    """Ranks of the merges that BPE makes of a token's characters; none if it does not get there."""
    parts, chain = list(token), []
    while len(parts) > 1:
        rank, at = min(
            (ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts))
        )
        if rank == len(ranks):
            return []
        chain.append(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return chain
