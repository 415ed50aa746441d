"""A task as a model's tokens: prompt, prefix, label trie and grammar, built in one place.

Training, export and the runtimes all build it, each with its own tokenizer, and the boundary
between prefix and question is checked for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from qcat.encoding.grammar import grammar
from qcat.encoding.prompt import (
    QUESTION_ROOM,
    Prompt,
    Tokenizer,
    Vocabulary,
    build_prompt,
    check_boundary,
    encode_answers,
    encode_segments,
    with_codes,
)
from qcat.encoding.trie import LabelTrie
from qcat.errors import DataError, ModelError
from qcat.task import Task


@dataclass(frozen=True)
class EncodedTask:
    """A task in the tokens of one tokenizer."""

    task: Task
    """With a code for each label, if it uses codes."""
    tokenizer: Tokenizer
    prompt: Prompt
    prefix: tuple[int, ...]
    """Token ids of the prompt up to the question."""
    trie: LabelTrie

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer: Tokenizer,
        prompt: Prompt | None = None,
        end: int | None = None,
    ) -> Self:
        """Encode a task.

        Args:
            task: the task.
            tokenizer: the model's.
            prompt: what to put the question into, for a task with codes, if it uses them; by
                default the prompt that qcat trains on.
            end: the token that ends an answer; by default the tokenizer's end token.

        Raises:
            ModelError: the prompt cannot be split at the question, a label has no tokens of its
                own, or the vocabulary lacks the tokens of the chat style.
            TaskError: the task answers in codes for which the vocabulary has no tokens.
        """
        task = with_codes(task, tokenizer)
        prompt = prompt or build_prompt(task, tokenizer)
        check_boundary(prompt, tokenizer)
        prefix = tuple(encode_segments(prompt.prefix, tokenizer))
        end = tokenizer.end if end is None else end
        trie = LabelTrie.build(encode_answers(task, tokenizer), end)
        return cls(task, tokenizer, prompt, prefix, trie)

    @classmethod
    def served(
        cls,
        task: Task,
        vocabulary: Vocabulary,
        name: str,
        prompt: Prompt | None = None,
        end: int | None = None,
    ) -> Self:
        """Like `build`, for a model that answers: it must also be able to spell the labels.

        Args:
            task: the task.
            vocabulary: the model's vocabulary.
            name: name of the model, for messages.
            prompt, end: as for `build`.

        Raises:
            ModelError: as `build`; or a label is decoded with another spelling.
        """
        encoded = cls.build(task, vocabulary, prompt, end)
        for answer, sequence in zip(encoded.task.answers, encoded.trie.sequences, strict=True):
            if vocabulary.decode(sequence) != f" {answer}":
                raise ModelError(
                    f"{name}: its vocabulary cannot spell the label {answer!r}: rename it"
                )
        return encoded

    @property
    def grammar(self) -> str:
        """The labels as GBNF."""
        return grammar(self.task)

    def ids(self, question: str) -> list[int]:
        """Token ids after the prefix, for a question cleaned by `clean_question`."""
        return encode_segments(self.prompt.rest(question), self.tokenizer)

    def rest(self, question: str) -> list[int]:
        """As `ids`. Raises DataError for a question of more than `QUESTION_ROOM` tokens."""
        ids = self.ids(question)
        if len(ids) > QUESTION_ROOM:
            raise DataError(
                f"question {question[:60]!r}…: {len(ids)} tokens, "
                f"room for {QUESTION_ROOM}: shorten it"
            )
        return ids
