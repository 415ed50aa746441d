"""What is no text where a question should be, as in a column of pandas: an error in its place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat import ArgumentError, Classifier, Prediction, QuestionError

NO_TEXT = {
    "nan": (math.nan, "no text but float: write words"),
    "numpy's nan": (np.float64("nan"), "no text but float64: write words"),
    "None": (None, "the question is empty: write one"),
    "a number": (7, "no text but int: write words"),
    "a truth": (True, "no text but bool: write words"),
    "bytes": (b"who?", "no text but bytes: write words"),
    "a list": (["who?"], "no text but list: write words"),
}


@pytest.fixture(scope="module")
def classifier(house):
    with Classifier.open(house) as opened:
        yield opened


@pytest.mark.parametrize("case", list(NO_TEXT))
def test_it_gives_its_error_in_its_place(classifier, case):
    value, said = NO_TEXT[case]
    first, second, third = classifier.ask_each(["who?", value, "when?"])
    assert isinstance(first, Prediction)
    assert isinstance(third, Prediction)
    assert isinstance(second, QuestionError)
    assert str(second) == said
    answers = classifier.ask_many(["who?", value, "when?"])
    assert next(answers) == first
    with pytest.raises(QuestionError, match=f"^question 2: {said}$"):
        next(answers)
    for ask in (classifier.predict, classifier.predict_proba):
        with pytest.raises(QuestionError, match=r"^question 2: "):
            ask(["who?", value])
    for ask_one in (classifier.ask, classifier.say, classifier.count_tokens):
        with pytest.raises(QuestionError, match=f"^{said}$"):
            ask_one(value)


@pytest.mark.parametrize("text", ["who?", "", b"who?"])
def test_one_text_for_several_is_refused_at_once(classifier, text):
    for ask in (classifier.ask_many, classifier.ask_each, classifier.predict):
        with pytest.raises(ArgumentError, match="a list of questions expected, not one"):
            ask(text)


def test_texts_of_numpy_are_texts(classifier):
    assert len(classifier.predict(np.array(["who?", "when?"]))) == 2
    assert len(classifier.predict(np.array(["who?", "when?"], dtype=object))) == 2


VALUES = st.text(max_size=5) | st.binary(max_size=3) | st.none() | st.integers() | st.floats()


@given(st.lists(VALUES, max_size=5))
def test_any_values_are_answered_one_by_one(classifier, values):
    answers = list(classifier.ask_each(values))
    assert len(answers) == len(values)
    for value, answer in zip(values, answers, strict=True):
        if not isinstance(value, str):
            assert isinstance(answer, QuestionError)
