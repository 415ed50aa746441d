"""What log-probabilities of twenty tokens say of labels, and what they leave open.

The server is played here by its answers, as they were seen on real ones; `test_ollama.py` asks a
real one.
"""

from __future__ import annotations

import json
import math
from threading import Event, Timer

import pytest

from qcat.backends.ollama_scorer import OllamaScorer
from qcat.encoding.trie import LabelTrie
from qcat.errors import ServerError

# A vocabulary: token id to bytes. 1 holds a half of a character, with which it reads as 2.
PIECES = [
    b"<end>",
    b" pool\xc3",
    b" pool",
    b" pump",
    b" fence",
    b" car",
    b"Q:",
    b" q",
    b" e",
    b"\xc3",
]
END, POOL, PUMP, FENCE, CAR, QUESTION, Q, E = 0, 2, 3, 4, 5, 6, 7, 8
LABELS = {"pool": (POOL,), "pool pump": (POOL, PUMP), "fence": (FENCE,)}


class Vocabulary:
    """Splits a text into the longest pieces."""

    def encode(self, text, *, special):
        data, ids = text.encode(), []
        while data:
            matches = [i for i, piece in enumerate(PIECES) if data.startswith(piece)]
            best = max((i for i in matches if special or i != END), key=lambda i: len(PIECES[i]))
            ids.append(best)
            data = data[len(PIECES[best]) :]
        return ids

    def decode(self, ids):
        return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")

    def piece(self, token):
        return PIECES[token]


class Played:
    """Answers by the end of the prompt, and by whether a schema was sent."""

    address = "http://played"

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def generate(self, model, prompt, **fields):
        assert fields["raw"] is True
        schema = fields.get("format")
        if fields["options"]["num_predict"] == 1 and "logprobs" in fields:
            kind = "probe" if schema else "look"
        else:
            kind = "schema" if schema else "write"
        self.asked.append((prompt, kind))
        answer = self.answers[prompt.removeprefix("Q: q"), kind]
        return answer(schema) if callable(answer) else answer


def seen(*best, **more):
    """An answer that shows these texts and probabilities."""
    entries = [{"token": text, "logprob": math.log(value)} for text, value in best]
    return {"logprobs": [{"top_logprobs": entries}], **more}


def said(text):
    return {"response": text}


def scorer(answers, labels=None):
    labels = labels or LABELS
    spellings = [piece.decode("latin-1") for piece in PIECES]
    return OllamaScorer(
        Played(answers),
        "played",
        vocabulary=Vocabulary(),
        prefix=[QUESTION],
        trie=LabelTrie.build(list(labels.values()), END),
        answers=list(labels),
        spellings=spellings,
    )


FLAT = {"fence": (FENCE,), "car": (CAR,)}


def score(answers, labels=None):
    found = scorer(answers, labels)
    scores = next(found.score([[Q]]))
    return scores, [kind for _, kind in found._server.asked]


def test_known_labels_cost_one_request():
    scores, asked = score({("", "look"): seen((" fence", 0.6), (" car", 0.2), ("x", 0.1))}, FLAT)
    assert scores.lower == pytest.approx([0.75, 0.25])
    assert scores.upper == pytest.approx([0.75, 0.25])
    assert (scores.label, scores.mass, asked) == (0, pytest.approx(0.8), ["look"])


def test_an_unseen_label_has_at_most_what_the_last_one_seen_has():
    scores, asked = score({("", "look"): seen((" car", 0.6), ("x", 0.2), ("y", 0.1))}, FLAT)
    assert scores.label == 1
    assert (scores.lower[1], scores.upper[1]) == pytest.approx((0.6 / 0.7, 1))
    assert (scores.lower[0], scores.upper[0]) == pytest.approx((0, 0.1 / 0.7))
    assert asked == ["look"]


@pytest.mark.parametrize("sure", [1.0, 1.0000001])
def test_sure_of_something_else_is_not_sure_of_the_first_label(sure):
    """The server rounds: nothing is left for the others in its list, which is not quite so."""
    answers = {("", "look"): seen(("\n", sure)), ("", "write"): said(" car")}
    scores, asked = score(answers, FLAT)
    assert (scores.label, asked) == (1, ["look", "write"])
    assert scores.lower.tolist() == [0, 0]
    assert (scores.upper > 0).all()


def test_a_text_that_stands_there_twice_is_a_bound():
    scores, _ = score(
        {("", "look"): seen((" fence", 0.4), (" car", 0.3), (" car", 0.2), ("x", 0.05))}, FLAT
    )
    assert scores.label == 0
    assert scores.lower == pytest.approx([0.4 / 0.7, 0])
    assert scores.upper[1] == pytest.approx(0.3 / 0.7)


def test_half_a_character_may_read_as_a_label():
    """` pool` in the list may be token 1, so that nothing is known of token 2."""
    answers = {
        ("", "look"): seen((" pool", 0.8), (" fence", 0.1)),
        (" pool", "look"): seen(("<end>", 0.9), (" pump", 0.05)),
        ("", "write"): said(" pool"),
    }
    scores, asked = score(answers)
    assert scores.label == 0
    assert scores.lower[0] == 0
    assert scores.upper[0] > 0.8
    assert asked == ["look", "look", "write"]


@pytest.fixture
def whole():
    """A vocabulary without the half character."""
    half, PIECES[1] = PIECES[1], b" pond"
    yield
    PIECES[1] = half


ROOT = seen((" pool", 0.8), (" fence", 0.1), ("x", 0.01))


@pytest.mark.usefixtures("whole")
def test_the_end_that_was_chosen_is_known():
    """llama-server shows no text for it, and Ollama then drops the list but under a schema."""
    answers = {
        ("", "look"): ROOT,
        (" pool", "look"): {"done_reason": "stop"},
        (" pool", "probe"): seen(("", 0.7), (" pump", 0.2), ("", 0.05), ("x", 0.01)),
    }
    scores, asked = score(answers)
    shares = [0.8 / 0.9 * 7 / 9, 0.8 / 0.9 * 2 / 9, 0.1 / 0.9]
    assert scores.lower == pytest.approx(shares)
    assert scores.upper == pytest.approx(shares)
    assert (scores.label, asked) == (0, ["look", "look", "probe"])


@pytest.mark.usefixtures("whole")
def test_half_a_character_that_was_chosen_is_not_the_end():
    answers = {
        ("", "look"): ROOT,
        (" pool", "look"): {"done_reason": "length"},
        (" pool", "probe"): seen(("", 0.7), (" pump", 0.2), ("x", 0.01)),
        ("", "write"): said(" pool pump"),
    }
    scores, asked = score(answers)
    assert scores.lower[0] == 0
    assert scores.upper[0] > 0.6
    assert (scores.label, asked[-1]) == (1, "write")


@pytest.mark.usefixtures("whole")
def test_older_engines_spell_the_end():
    answers = {
        ("", "look"): ROOT,
        (" pool", "look"): seen(("<end>", 0.6), (" pump", 0.3), ("x", 0.01)),
    }
    scores, _ = score(answers)
    shares = [0.8 / 0.9 * 2 / 3, 0.8 / 0.9 / 3, 0.1 / 0.9]
    assert scores.lower == pytest.approx(shares)
    assert scores.upper == pytest.approx(shares)


@pytest.mark.usefixtures("whole")
def test_an_end_that_was_not_chosen_is_a_bound():
    answers = {
        ("", "look"): ROOT,
        (" pool", "look"): seen((" pump", 0.6), ("", 0.2), ("x", 0.01)),
    }
    scores, _ = score(answers)
    assert scores.label == 1
    assert scores.lower[:2] == pytest.approx([0, 0.8 / 0.9 * 0.75])
    assert scores.upper[:2] == pytest.approx([0.8 / 0.9 * 0.25, 0.8 / 0.9])


@pytest.mark.usefixtures("whole")
def test_a_branch_that_nothing_comes_to_is_not_walked():
    answers = {("", "look"): seen((" fence", 0.9), (" pool", 0.0005), ("x", 1e-5))}
    scores, asked = score(answers)
    assert (scores.label, asked) == (2, ["look"])
    assert scores.lower[0] == 0
    assert scores.upper[0] < 1e-3


def test_what_is_open_the_model_writes_and_only_among_what_is_open():
    def schema(sent):
        assert sent == {"type": "string", "enum": [" fence", " car"]}
        return said(json.dumps(" car"))

    answers = {
        ("", "look"): seen(("x", 0.5), ("y", 0.2)),
        ("", "write"): said(" I think it is a car"),
        ("", "schema"): schema,
    }
    scores, asked = score(answers, FLAT)
    assert (scores.label, asked) == (1, ["look", "write", "schema"])


@pytest.mark.parametrize("nonsense", ['"bike"', '" ca', "3", "[]", "", None])
def test_no_label_is_invented(nonsense):
    answers = {
        ("", "look"): seen(("x", 0.5), ("y", 0.2)),
        ("", "write"): said(nonsense),
        ("", "schema"): said(nonsense),
    }
    with pytest.raises(ServerError, match="only labels"):
        score(answers, FLAT)


def test_a_server_that_shows_nothing_is_probed_once():
    answers = {
        ("", "look"): said(" car"),
        ("", "probe"): said('"'),
        ("", "write"): said(" car"),
    }
    found = scorer(answers, FLAT)
    for _ in range(3):
        scores = next(found.score([[Q]]))
        assert (scores.label, scores.mass, len(scores.lower)) == (1, None, 0)
    kinds = [kind for _, kind in found._server.asked]
    assert kinds == ["look", "probe", "write", "write", "write"]


@pytest.mark.parametrize(
    "logprobs", [[{}], [3], [{"top_logprobs": []}], [{"top_logprobs": [{"token": "x"}]}]]
)
def test_a_foreign_answer_is_named(logprobs):
    with pytest.raises(ServerError, match="not as Ollama does"):
        score({("", "look"): {"logprobs": logprobs}}, FLAT)


def test_a_prompt_with_a_special_token_is_refused():
    with pytest.raises(ServerError, match="special token"):
        OllamaScorer(
            Played({}),
            "played",
            vocabulary=NoSpecial(),
            prefix=[QUESTION],
            trie=LabelTrie.build(list(FLAT.values()), END),
            answers=list(FLAT),
            spellings=[""] * len(PIECES),
        )


class NoSpecial(Vocabulary):
    """Reads every text as the end token."""

    def encode(self, text, *, special):
        return [END]


def test_closed_while_an_answer_is_awaited():
    held = Event()

    def hold(_):
        held.wait(30)
        return seen((" car", 0.9))

    found = scorer({("", "look"): hold}, FLAT)
    waiting = found.score([[Q]] * 9)
    Timer(0.2, found.close).start()
    with pytest.raises(ServerError, match="is closed"):
        next(waiting)
    held.set()
    with pytest.raises(ServerError, match="is closed"):
        next(found.score([[Q]]))


def test_what_was_given_up_is_not_asked():
    held = Event()

    def hold(_):
        held.wait(30)
        return seen((" car", 0.9))

    first = seen((" fence", 0.9))
    answers = {("", "look"): first, (" e", "look"): hold}
    found = scorer(answers, FLAT)
    results = found.score([[Q], *([[Q, E]] * 50)])
    assert next(results).label == 0
    results.close()
    held.set()
    found.close()
    assert len(found._server.asked) < 10
