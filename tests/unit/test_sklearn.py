"""The scikit-learn estimator: fits, predicts, can be cloned, cross-validated and pickled."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks

from qcat.errors import ArgumentError, QuestionError, TaskError
from qcat.sklearn import QcatClassifier


@pytest.fixture(scope="module")
def questions(easy_job):
    rows = [json.loads(line) for line in (easy_job[0] / "q.jsonl").read_text("utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Each start of another process costs seconds."""
    from contextlib import nullcontext

    from qcat.workflows import export as pipeline

    monkeypatch.setattr(pipeline, "convert_apart", lambda: nullcontext(pipeline.convert_job))


@pytest.fixture
def estimator(easy_job):
    base = str(easy_job[0] / "base")
    return QcatClassifier(base, method="lora", learning_rate=0.003, epochs=6)


def test_fits_predicts_and_is_pickled(estimator, questions):
    texts, labels = questions
    with pytest.raises(NotFittedError):
        estimator.predict(texts)
    assert estimator.fit(texts, labels) is estimator
    assert list(estimator.classes_) == sorted(set(labels))
    shares = estimator.predict_proba(texts[:7])
    assert shares.shape == (7, 4)
    np.testing.assert_allclose(shares.sum(1), 1)
    answers = estimator.predict(texts)
    assert set(answers) <= set(labels)
    assert estimator.score(texts, labels) == np.mean(answers == np.array(labels)) > 0.8
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.predict_proba(texts[:7]), shares)
    assert not hasattr(clone(estimator), "gguf_")


def test_is_cross_validated_and_searched(estimator, questions):
    texts, labels = np.array(questions[0][::2]), np.array(questions[1][::2])
    scores = cross_val_score(estimator.set_params(epochs=1), texts, labels, cv=2)
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()
    search = GridSearchCV(estimator, {"learning_rate": [1e-3, 3e-3]}, cv=2, refit=False)
    search.fit(texts, labels)
    assert len(search.cv_results_["params"]) == 2


def test_classes_may_be_numbers(estimator, questions):
    texts, labels = questions
    order = sorted(set(labels))
    numbers = [order.index(label) * 10 for label in labels]
    estimator.set_params(epochs=1, descriptions={0: "a car", 10: "a fence"}).fit(texts, numbers)
    assert list(estimator.classes_) == [0, 10, 20, 30]
    assert estimator.predict(texts[:2]).dtype == estimator.classes_.dtype


@pytest.mark.parametrize(
    ("texts", "labels", "error", "problem"),
    [
        ([1.0, 2.0], ["a", "b"], ArgumentError, "texts expected"),
        ("one text", ["a"], ArgumentError, "texts expected"),
        (["a"], ["a", "b"], ArgumentError, "1 texts, but 2 classes"),
        (["a", "b"], ["x", "x"], TaskError, "labels: 1 given"),
        (["a", " "], ["x", "y"], QuestionError, "empty"),
    ],
)
def test_bad_input(estimator, texts, labels, error, problem):
    with pytest.raises(error, match=problem):
        estimator.fit(texts, labels)


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable",
        "check_no_attributes_set_in_init",
        "check_get_params_invariance",
        "check_set_params",
        "check_parameters_default_constructible",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
    ],
)
def test_scikit_learns_own_checks(check):
    """Those that give no numbers: `check_estimator` passes over all others for texts by itself."""
    getattr(estimator_checks, check)("QcatClassifier", QcatClassifier("none"))


@pytest.mark.filterwarnings("ignore:.*Can't test estimator")
def test_check_estimator_finds_nothing():
    results = estimator_checks.check_estimator(QcatClassifier("none"), on_fail=None)
    assert {result["status"] for result in results} == {"passed"}
