"""Calibration: its arithmetic against scikit-learn's, its promises over many draws, the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from qcat import Classifier
from qcat.calibration.calibration import Calibration, Conformal, OnTopic, Promise, log_odds
from qcat.calibration.decide import check_coverage, decide, recalibrated
from qcat.calibration.fit import fit_on_topic, fit_temperature
from qcat.calibration.reliability import detection, reliability
from qcat.calibration.thresholds import (
    error_bound,
    needed,
    promise_threshold,
    risk_coverage,
)
from qcat.classifier import DEFAULT_MODEL
from qcat.data.dataset import read_examples
from qcat.data.split import split_examples
from qcat.encoding.scoring import entropy, label_energy, label_mass, temper, temper_bounds
from qcat.errors import BundleError, DataError
from qcat.gguf.header import read_header
from qcat.gguf.sections import CALIBRATION_KEY, REFERENCE_KEY, section, write_sections
from qcat.report.confidence_figures import reliability_png, reliability_svg, risk_coverage_png
from qcat.workflows.calibrate import Asked, carry_threshold

LABELS = ("pool", "fence", "car", "roof", "door")


def draw(seed, count, labels=5, sharp=1.0):
    """Logits of a model, and truths drawn from what it believes when they are divided by `sharp`.

    Its right temperature is therefore `sharp`.
    """
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 3, (count, labels))
    believed = temper(logits, sharp)
    truth = np.array([chance.choice(labels, p=row) for row in believed])
    return np.log(temper(logits, 1.0)), truth


# --- temperature ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharp", [0.5, 1.0, 2.0])
def test_temperature_is_the_one_the_truth_was_drawn_with(sharp):
    inside = 0
    for seed in range(20):
        found = fit_temperature(*draw(seed, 600, sharp=sharp))
        assert found.is_known
        inside += found.low <= sharp <= found.high
    assert inside >= 17  # of 20 intervals with 95 %


def test_temperature_is_scikit_learns():
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):
        """Says the logits that it is given."""

        classes_ = np.arange(5)

        def fit(self, rows, truth):
            return self

        def decision_function(self, rows):
            return rows

        def predict(self, rows):
            return rows.argmax(1)

        def __sklearn_is_fitted__(self):
            return True

    logs, truth = draw(1, 500, sharp=1.7)
    theirs = CalibratedClassifierCV(FrozenEstimator(Given()), method="temperature", ensemble=False)
    theirs.fit(logs, truth)
    ours = temper(logs, fit_temperature(logs, truth).value)
    assert ours == pytest.approx(theirs.predict_proba(logs), abs=1e-3)


def test_temperature_is_not_known_from_few_or_easy_questions():
    assert not fit_temperature(*draw(0, 12)).is_known
    right = np.tile(np.log([0.9, 0.025, 0.025, 0.025, 0.025]), (300, 1))
    assert not fit_temperature(right, np.zeros(300, int)).is_known  # no mistake to learn from


def test_a_right_label_of_probability_zero_does_no_harm():
    logs, truth = draw(0, 300)
    logs[0, truth[0]] = -2000.0
    found = fit_temperature(logs, truth)
    assert found.value > 5  # one such mistake outweighs all else


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=9), st.floats(0.05, 20))
def test_temper_keeps_the_order_and_is_undone_by_its_inverse(logits, temperature):
    logs = np.log(temper(logits, 1.0))
    there = temper(logs, temperature)
    assert there.sum() == pytest.approx(1)
    assert (np.diff(there[np.argsort(logs, kind="stable")]) >= -1e-12).all()
    if there.min() > 1e-200:
        assert temper(np.log(there), 1 / temperature) == pytest.approx(np.exp(logs), abs=1e-6)


@given(
    st.lists(st.floats(0.001, 1), min_size=2, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.floats(0.2, 5),
    st.floats(1, 4),
)
def test_tempered_bounds_hold_what_tempering_the_truth_gives(odds, known, temperature, loose):
    truth = np.array(odds) / sum(odds)
    sure = np.array(known[: len(odds)])
    lower = np.where(sure, truth, truth / loose)
    upper = np.where(sure, truth, np.minimum(1, truth * loose))
    low, high = temper_bounds(lower, upper, temperature)
    exact = temper(np.log(truth), temperature)
    assert (low <= exact + 1e-12).all()
    assert (exact <= high + 1e-12).all()
    if sure.all():
        assert low.tolist() == high.tolist()


# --- reliability ------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    # Confidence 0.85 right three times of four, 0.55 right once of two.
    rows = [[0.85, 0.15]] * 4 + [[0.45, 0.55]] * 2
    found = reliability(np.array(rows), np.array([0, 0, 0, 1, 1, 0]))
    assert found.ece == pytest.approx((4 * 0.10 + 2 * 0.05) / 6)
    assert [(b.questions, b.accuracy) for b in found.bins] == [(2, 0.5), (4, 0.75)]
    squares = [2 * 0.15**2] * 3 + [2 * 0.85**2] + [2 * 0.45**2] + [2 * 0.55**2]
    assert found.brier == pytest.approx(np.mean(squares))
    assert found.log_loss == pytest.approx(-np.log([0.85, 0.85, 0.85, 0.15, 0.55, 0.45]).mean())


def test_adaptive_bins_hold_equally_many():
    logs, truth = draw(3, 1000)
    shares = np.exp(logs)
    found = reliability(shares, truth)
    order = np.argsort(shares.max(1))
    right = shares.argmax(1) == truth
    gaps = [
        abs(right[part].mean() - shares.max(1)[part].mean()) for part in np.array_split(order, 10)
    ]
    assert found.adaptive_ece == pytest.approx(np.mean(gaps), abs=2e-3)
    assert found.ece < 0.05  # the truth was drawn from these shares


def test_all_of_one_confidence():
    found = reliability(np.full((10, 2), 0.5), np.array([0, 1] * 5))
    assert (found.ece, found.adaptive_ece) == (0, 0)


def test_detection_by_hand():
    found = detection([3, 4, 5, 6], [1, 2, 3.5])
    assert found.auroc == pytest.approx(11 / 12)
    assert found.fpr == pytest.approx(1 / 3)  # to pass 3 too, as 95 % of four asks


def test_figures_are_pictures():
    logs, truth = draw(2, 300)
    found = reliability(np.exp(logs), truth)
    assert reliability_png(found, None).startswith(b"\x89PNG")
    assert reliability_svg(found, found).count("<svg") == 1
    curve = risk_coverage(np.exp(logs).max(1), np.exp(logs).argmax(1) == truth, 300)
    for chosen in (None, 0.0, 0.5, 1.0):
        assert risk_coverage_png(curve, chosen).startswith(b"\x89PNG")


# --- thresholds -------------------------------------------------------------------------------


def test_error_bound_is_clopper_and_pearsons():
    for errors, answered in ((0, 100), (3, 200), (50, 100)):
        assert error_bound(errors, answered, 0.95) == pytest.approx(
            beta.ppf(0.95, errors + 1, answered - errors)
        )
    assert error_bound(5, 5, 0.95) == 1
    assert error_bound(0, 0, 0.95) == 1
    assert error_bound(0, needed(0.02, 0.95), 1 - 0.05 / 8) <= 0.02
    assert error_bound(0, needed(0.02, 0.95) - 1, 1 - 0.05 / 8) > 0.02


def test_risk_and_coverage_by_hand():
    curve = risk_coverage(np.array([0.9, 0.5, 0.9, 0.7]), np.array([True, False, True, False]), 5)
    assert curve.thresholds.tolist() == [0.9, 0.7, 0.5]
    assert curve.coverage.tolist() == [0.4, 0.6, 0.8]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 3, 1 / 2])


def simulated(seed, count):
    """Confidences of a calibrated model and whether it was right; a tenth are ties."""
    chance = np.random.default_rng(seed)
    confidence = chance.beta(12, 1, count)
    confidence[::10] = np.round(confidence[::10], 1)
    return confidence, chance.random(count) < confidence


def test_no_promise_where_none_is_true():
    """Every threshold has an error just above the limit; only chance can let one pass."""
    made = 0
    for seed in range(600):
        chance = np.random.default_rng(seed)
        confidence, right = chance.random(800), chance.random(800) > 0.0501
        try:
            promise_threshold(
                Calibration(), ["x"] * 800, confidence, right, np.ones(800, bool), max_error=0.05
            )
        except DataError:
            continue
        made += 1
    assert made <= 30  # 5 % of 600; with a bound for each threshold alone it would be 60 or so


def test_the_promise_is_kept():
    max_error = 0.05
    sure, right = simulated(0, 400_000)  # of which the true error above any threshold is read
    broken = answered = 0
    for seed in range(1, 301):
        confidence, ok = simulated(seed, 800)
        try:
            found = promise_threshold(
                Calibration(), ["x"] * 800, confidence, ok, np.ones(800, bool), max_error=max_error
            )
        except DataError:
            continue  # no promise, none broken
        above = sure >= found.threshold
        broken += (~right[above]).mean() > max_error
        answered += above.mean()
        assert found.promise.answered == (confidence >= found.threshold).sum()
        assert found.promise.errors == (~ok[confidence >= found.threshold]).sum()
    assert broken <= 15  # 5 % of 300 draws
    assert answered / 300 > 0.2  # and yet it is of use


def test_labels_with_enough_questions_get_thresholds_of_their_own():
    confidence, _ = simulated(5, 9000)
    labels = np.array(["easy", "hard", "rare"])[np.r_[[0] * 4450, [1] * 4450, [2] * 100]]
    chance = np.random.default_rng(6)
    right = chance.random(9000) < np.where(labels == "easy", 0.999, confidence)
    found = promise_threshold(
        Calibration(),
        labels.tolist(),
        confidence,
        right,
        np.ones(9000, bool),
        max_error=0.03,
        by_label=True,
    )
    assert set(found.label_thresholds) == {"easy", "hard"}
    assert found.label_thresholds["easy"] < 0.01 < found.label_thresholds["hard"]
    together = promise_threshold(
        Calibration(),
        labels.tolist(),
        confidence,
        right,
        np.ones(9000, bool),
        max_error=0.03,
    )
    assert not together.label_thresholds
    assert found.reason("easy", 0.5, 0.1, False) is None
    assert found.reason("hard", 0.5, 0.1, False) == "low_confidence"


def test_what_can_be_promised_is_said():
    confidence, right = simulated(3, 300)
    asked = (Calibration(), ["x"] * 300, confidence, right, np.ones(300, bool))
    with pytest.raises(DataError, match=r"0\.\d+ can; or give more questions") as refused:
        promise_threshold(*asked, max_error=0.01)
    possible = float(str(refused.value).split("all right): ")[1].split(" can")[0])
    assert promise_threshold(*asked, max_error=possible).promise
    with pytest.raises(DataError):
        promise_threshold(*asked, max_error=possible - 0.01)


def test_no_promise_from_too_few_or_bad_answers():
    with pytest.raises(DataError, match="cannot be promised from 50 questions"):
        promise_threshold(
            Calibration(), ["x"] * 50, np.ones(50), np.ones(50, bool), np.ones(50, bool),
            max_error=0.02,
        )  # fmt: skip
    confidence, _ = simulated(1, 900)
    with pytest.raises(DataError, match=r"all right\): give more questions"):
        promise_threshold(
            Calibration(), ["x"] * 900, confidence, np.zeros(900, bool), np.ones(900, bool),
            max_error=0.1,
        )  # fmt: skip


# --- sets and off-topic -----------------------------------------------------------------------


def test_sets_hold_the_truth_as_often_as_they_say():
    """Split-conformal coverage over 400 draws: what is left out is at most what was asked for."""
    coverage, held, size = 0.9, [], []
    for seed in range(400):
        logs, truth = draw(seed, 300, sharp=1.6)  # a model that is too sure of itself
        shares = np.exp(logs)
        topic = np.random.default_rng(seed).normal(size=300)
        right = shares[np.arange(300), truth]
        sets = Conformal(*(tuple(np.sort(x[:200])) for x in (right, topic, topic)))
        inside = shares[200:] >= sets.least(coverage)
        inside &= (topic[200:] >= sets.gate(coverage, energy=True))[:, None]
        held.append(inside[np.arange(100), truth[200:]].mean())
        size.append(inside.sum(1).mean())
    # Its expectation is from 0.9 up; a tenth of 400 means of 100 has a deviation of 0.0015.
    assert 0.897 <= np.mean(held) <= 0.93
    assert np.mean(size) < 4  # of five labels


@pytest.mark.parametrize("gap", [3.0, 8.0, 24.0, 40.0])
def test_sets_of_a_very_sure_model_hold_the_truth(gap):
    """Through `fit`, whose scores are rounded: those near 1 must not be rounded up."""

    def asked(seed):
        chance = np.random.default_rng(seed)
        truth = chance.integers(0, 5, 400)
        logits = chance.normal(0, 1, (400, 5))
        logits[np.arange(400), truth] += gap
        shares = temper(logits, 1.0)
        mass = 1 / (1 + np.exp(-chance.normal(4, 1, 400)))
        energy = chance.normal(12, 2, 400)
        raw = [
            decide(
                Calibration(), LABELS, int(row.argmax()), row, row,
                mass=float(m), energy=float(e), truncated=False,
            )
            for row, m, e in zip(shares, mass, energy, strict=True)
        ]  # fmt: skip
        return Asked(LABELS, tuple(raw), truth, (None,) * 400)

    known, new = asked(0).fit().calibration, asked(1)
    sets = [
        decide(
            known, LABELS, int(row.argmax()), row, row, mass=p.label_mass, energy=p.energy,
            truncated=False, coverage=0.95,
        ).prediction_set
        for row, p in zip(new.probabilities(known.temperature), new.predictions, strict=True)
    ]  # fmt: skip
    held = np.mean([LABELS[t] in found for t, found in zip(new.truth, sets, strict=True)])
    assert held >= 0.92  # 0.95 less what 400 questions of each can differ by


def test_one_question_of_each_group_counts_for_a_promise():
    logs, truth = draw(0, 6)
    raw = tuple(
        decide(
            Calibration(), LABELS, int(row.argmax()), row, row,
            mass=0.9, energy=1.0, truncated=False,
        )
        for row in np.exp(logs)
    )  # fmt: skip
    groups = ("a", None, "a", "b", None, "b")
    kept = Asked(LABELS, raw, truth, groups).one_of_each()
    assert sorted(map(str, kept.groups)) == ["None", "None", "a", "b"]
    assert kept.predictions == tuple(p for p in raw if p in kept.predictions)  # in their order


def test_a_threshold_of_one_answers_nothing():
    known = Calibration(threshold=0.5, label_thresholds={"pool": 1.0})
    assert decided([1.0, 0, 0, 0, 0], known).reason == "ambiguous"
    assert decided([0, 1.0, 0, 0, 0], known).reason is None


def test_too_few_questions_for_a_coverage():
    scores = tuple(np.linspace(0.1, 0.9, 50))
    sets = Conformal(scores, scores, scores)
    known = Calibration(questions=50, conformal=sets)
    check_coverage(known, 0.95, "m")
    with pytest.raises(BundleError, match="124 questions or more, and it has one on 50"):
        check_coverage(known, 0.99, "m")
    with pytest.raises(BundleError, match="one on none"):
        check_coverage(Calibration(), 0.95, "m")
    assert sets.gate(0.95, energy=True) == -math.inf  # one in a hundred is not known from fifty


TOPIC = OnTopic(2.0, 1.0, 10.0, 2.0, threshold=-1.5, mass_threshold=-1.6)


def test_the_on_topic_score_by_hand():
    mass = 1 / (1 + math.exp(-3.0))  # log-odds 3
    assert TOPIC.score(mass, 12.0) == pytest.approx((1 + 1) / 2)
    assert TOPIC.score(mass, None) == pytest.approx(1)
    assert TOPIC.is_off(-1.55, 9.0)
    assert not TOPIC.is_off(-1.55, None)
    assert log_odds(0.0) > -30
    assert log_odds(1.0) < 20


def test_one_in_twenty_of_the_list_is_called_off_topic():
    chance = np.random.default_rng(0)
    masses = 1 / (1 + np.exp(-chance.normal(4, 1.5, 1000)))
    energies = chance.normal(13, 2, 1000)
    gate = fit_on_topic(masses, energies)
    for energy in (energies, [None] * 1000):
        scores = [gate.score(m, e) for m, e in zip(masses, energy, strict=True)]
        assert np.mean(scores) == pytest.approx(0, abs=1e-9)
        assert sum(map(gate.is_off, scores, energy)) in range(45, 51)


def test_energy_and_mass_are_of_the_same_softmax():
    row = np.random.default_rng(0).normal(0, 4, 1000).astype(np.float32)
    first = np.array([3, 17, 400], np.int32)
    whole = label_energy(row, np.arange(1000, dtype=np.int32))
    assert label_mass(row, first) == pytest.approx(np.exp(label_energy(row, first) - whole))


# --- decisions --------------------------------------------------------------------------------


def decided(shares, calibration, *, mass=0.9, energy=11.0, coverage=None, upper=None):
    lower = np.array(shares, float)
    return decide(
        calibration,
        LABELS,
        int(lower.argmax()),
        lower,
        lower if upper is None else np.array(upper, float),
        mass=mass,
        energy=energy,
        truncated=False,
        coverage=coverage,
    )


def test_why_a_question_is_left_to_a_person():
    known = Calibration(threshold=0.7, label_thresholds={"fence": 0.2}, on_topic=TOPIC)
    assert decided([0.8, 0.1, 0.05, 0.03, 0.02], known).reason is None
    assert decided([0.5, 0.3, 0.1, 0.05, 0.05], known).reason == "ambiguous"
    assert decided([0.4, 0.2, 0.2, 0.1, 0.1], known).reason == "low_confidence"
    assert decided([0.2, 0.4, 0.2, 0.1, 0.1], known).reason is None  # fence needs less
    assert decided([0.99, 0.01, 0, 0, 0], known, mass=0.1, energy=5.0).reason == "off_topic"
    assert decided([0.99, 0.01, 0, 0, 0], known, mass=0.1, energy=None).reason == "off_topic"
    bold = known.with_threshold(0)
    assert decided([0.2, 0.2, 0.2, 0.2, 0.2], bold, mass=0.1, energy=5.0).reason is None
    assert decided([0.2, 0.2, 0.2, 0.2, 0.2], bold, mass=0.1, energy=5.0).on_topic < -1.5


def test_sets_by_hand():
    steps = np.linspace(0.005, 1, 200)
    known = Calibration(
        conformal=Conformal(*map(tuple, (steps, steps - 3, steps - 3))), on_topic=TOPIC
    )
    # 0.2 may be missed: 0.16 by a label, so rank 32 of 200; 0.04 as off-topic, so rank 8
    sure = decided([0.8, 0.155, 0.045, 0, 0], known, coverage=0.8)
    assert (sure.prediction_set, sure.reason) == (("pool",), None)
    both = decided([0.6, 0.17, 0.165, 0.065, 0], known, coverage=0.8)
    assert both.prediction_set == ("pool", "fence", "car")
    assert both.reason == "ambiguous"
    none = decided([0.8, 0.2, 0, 0, 0], known, coverage=0.8, mass=0.05, energy=4.0)
    assert (none.prediction_set, none.reason, none.label) == ((), "off_topic", "pool")
    # What a server leaves open may be in the set.
    open_ = decided([0.8, 0, 0, 0, 0], known, coverage=0.8, upper=[0.8, 0.2, 0.1, 0, 0])
    assert open_.prediction_set == ("pool", "fence")
    assert not open_.exact


def test_recalibrated_is_what_the_classifier_says(house_copy):
    with Classifier.open(house_copy, calibrated=False) as raw:
        before = raw.ask("who fixed the gate latch")
    with Classifier.open(house_copy) as house:
        after = house.ask("who fixed the gate latch")
        again = recalibrated(before, house.calibration, tuple(house.task.labels))
        assert house.calibration.temperature != 1
    assert (again.label, again.reason) == (after.label, after.reason)
    assert again.on_topic == pytest.approx(after.on_topic)
    assert [*again.probabilities] == [*after.probabilities]
    assert list(again.probabilities.values()) == pytest.approx(list(after.probabilities.values()))
    assert again.entropy == pytest.approx(after.entropy)
    shares = np.array(list(after.probabilities.values()))
    assert after.entropy == pytest.approx(entropy(shares))
    assert before.on_topic is None


# --- what a file may hold ---------------------------------------------------------------------

FULL = Calibration(
    questions=200,
    temperature=0.8,
    temperature_interval=(0.7, 0.9),
    threshold=0.75,
    label_thresholds={"pool": 0.5},
    promise=Promise(0.02, 0.95, 300, 200, 1),
    on_topic=TOPIC,
    conformal=Conformal((0.1, 0.2), (-1.0, 0.5), (-2.0, 1.0)),
)


def test_what_is_written_is_read_back():
    answers_all = replace(FULL, threshold=0.0)  # a promise that every answer keeps
    for known in (FULL, answers_all, Calibration(), *map(FULL.with_threshold, (0, 0.3, 1))):
        data = json.loads(json.dumps(known.to_dict()))
        assert Calibration.from_dict(data, LABELS) == known
    assert Calibration.from_dict({}, LABELS) == Calibration()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FULL.to_dict())), JSON, st.data())
def test_a_hostile_section_is_refused_or_sound(key, value, data):
    section = FULL.to_dict() | {key: value}
    if isinstance(FULL.to_dict()[key], dict) and data.draw(st.booleans()):
        inner = FULL.to_dict()[key]
        section[key] = inner | {data.draw(st.sampled_from(sorted(inner))): value}
    try:
        found = Calibration.from_dict(section, LABELS)
    except ValueError:
        return
    assert found.threshold is None or 0 <= found.threshold <= 1
    answer = decided([0.6, 0.2, 0.1, 0.05, 0.05], found)
    assert answer.label == "pool"
    assert answer.on_topic is None or math.isfinite(answer.on_topic)
    json.dumps(found.to_dict(), allow_nan=False)


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    """Validation and test questions of the shipped model, as files in a folder."""
    folder = tmp_path_factory.mktemp("held_out")
    with Classifier.open() as house:
        task = house.task
    examples = read_examples(EXAMPLE / "questions.jsonl", task)
    split_examples(examples, task, seed=0).write(folder, task)
    return folder


@pytest.fixture
def house_copy(tmp_path):
    """The shipped model, to be changed."""
    path = tmp_path / "house.gguf"
    path.write_bytes(DEFAULT_MODEL.read_bytes())
    return path


def known_of(model):
    return section(read_header(model), CALIBRATION_KEY, model)


def test_calibrate_then_promise_then_ask(qcat, house_copy, held_out, tmp_path):
    done = qcat("calibrate", house_copy, held_out / "validation.jsonl", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    after = found["reliability"]["after"]
    assert after["ece"] <= 0.03
    assert after["log_loss"] <= found["reliability"]["before"]["log_loss"]
    assert found["off_topic"] / found["questions"] == pytest.approx(0.05, abs=0.01)

    curve = tmp_path / "curve.png"
    done = qcat(
        "calibrate", house_copy, held_out / "test.jsonl", "--max-error", "0.1", "--plot", curve
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "promise: at most 10.0% of the answers are wrong, with 95% confidence" in done.stdout
    assert curve.read_bytes().startswith(b"\x89PNG")
    known = known_of(house_copy)
    shown = qcat("show", house_copy).stdout
    assert f"threshold {known['threshold']:.4f}; at most 10.0% of the answers wrong" in shown
    promise = known["promise"]
    assert promise["errors"] / promise["answered"] < 0.1
    assert promise["questions"] < 818  # one of each group
    assert known["temperature"] == found["calibration"]["temperature"]  # it was not fitted anew

    rows = (held_out / "test.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    asked = qcat("ask", "-m", house_copy, "--json", "-", input="\n".join(texts))
    assert asked.returncode == 3
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    # Batches of another shape than one question move a confidence across the line now and then.
    threshold, off = known["threshold"], known["on_topic"]["threshold"]
    above = [a["confidence"] >= threshold and a["on_topic"] >= off for a in answers]
    assert [not a["abstained"] for a in answers] == above
    assert sum(above) > promise["answered"]  # of one question a group
    assert {a["reason"] for a in answers} == {None, "off_topic", "ambiguous", "low_confidence"}

    evaluated = json.loads(qcat("eval", house_copy, held_out / "test.jsonl", "--json").stdout)
    assert evaluated["confidence"]["temperature"] == known["temperature"]
    assert evaluated["abstaining"]["answered"] == pytest.approx(sum(above), abs=3)
    report = qcat("eval", house_copy, held_out / "test.jsonl", "--html", tmp_path / "r.html")
    assert f"calibrated, temperature {known['temperature']:.2f}" in report.stdout
    assert "abstained: " in report.stdout
    assert "<h2>Confidence</h2>" in (tmp_path / "r.html").read_text()


def test_thresholds_by_hand(qcat, house_copy, held_out):
    assert qcat("calibrate", house_copy, "--threshold", "0.9").stdout.endswith("for all labels\n")
    assert known_of(house_copy)["threshold"] == 0.9
    done = qcat("calibrate", house_copy, held_out / "test.jsonl", "--threshold", "0.5")
    assert "threshold 0.5000" in done.stdout
    question = "What is the capital of Mongolia?"
    assert qcat("ask", "-m", house_copy, question).returncode == 3
    assert qcat("ask", "-m", house_copy, "--threshold", "0", question).returncode == 0
    assert qcat("calibrate", house_copy, "--threshold", "0").returncode == 0
    assert qcat("ask", "-m", house_copy, question).returncode == 0
    assert qcat("calibrate", house_copy, "--threshold", "0.5").returncode == 0
    assert qcat("ask", "-m", house_copy, question).returncode == 3
    reference = section(read_header(house_copy), REFERENCE_KEY, house_copy)
    assert reference["rule"] is None  # what it would leave to a person is not known
    few = held_out / "sixty.jsonl"
    few.write_text("\n".join((held_out / "test.jsonl").read_text().splitlines()[:60]))
    assert qcat("calibrate", house_copy, few, "--threshold", "0.6").returncode == 0
    again = section(read_header(house_copy), REFERENCE_KEY, house_copy)
    assert again["questions"] == reference["questions"]
    done = qcat("calibrate", house_copy, held_out / "validation.jsonl")
    assert "threshold was of its old confidence and is gone" in done.stderr
    assert known_of(house_copy)["threshold"] is None


def test_sets_through_the_command(qcat, house_copy, held_out):
    assert qcat("calibrate", house_copy, held_out / "validation.jsonl").returncode == 0
    rows = [json.loads(line) for line in (held_out / "test.jsonl").read_text().splitlines()]
    done = qcat(
        "ask", "-m", house_copy, "--set", "-", input="".join(f"{r['text']}\n" for r in rows)
    )
    assert done.returncode == 3
    sets = [line.split("\t") for line in done.stdout.splitlines()]
    held = [row["label"] in found for row, found in zip(rows, sets, strict=True)]
    assert np.mean(held) >= 0.93  # 0.95 less two deviations of 818 questions
    assert {len(found) for found in sets} >= {1, 2, 3}
    one = qcat("ask", "-m", house_copy, "--set", "When was the pool pump replaced?")
    assert (one.returncode, one.stdout) == (0, "pool\n")
    for more in (("--threshold", "0.5"), ("--top", "2"), ("--decode", "free")):
        assert qcat("ask", "-m", house_copy, "--set", *more, "x").returncode == 2
    assert qcat("ask", "-m", house_copy, "--coverage", "0.9", "x").returncode == 2


def test_bad_input_is_one_line(qcat, house, house_copy, held_out, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((held_out / "test.jsonl").read_text().splitlines()[:20]))
    before = house_copy.read_bytes()
    for args, said in (
        ((few,), "20 questions say nothing of the confidence: give 50 or more"),
        ((held_out / "test.jsonl", "--max-error", "0.001"), "cannot be promised"),
        ((tmp_path / "none.jsonl",), "No such file"),
        ((held_out / "test.jsonl", "--max-error", "0.1", "--plot", tmp_path), "is a folder"),
    ):
        done = qcat("calibrate", house_copy, *args)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
        assert house_copy.read_bytes() == before
    for args in (
        (),
        (held_out / "test.jsonl", "--max-error", "0.1", "--threshold", "0.5"),
        (held_out / "test.jsonl", "--by-label"),
        ("--threshold", "0.5", "--plot", "x.png"),
    ):
        assert qcat("calibrate", house_copy, *args).returncode == 2
    done = qcat("ask", "-m", house, "--set", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has one on none: `qcat calibrate` it" in done.stderr
    done = qcat("calibrate", house, held_out / "test.jsonl", "--max-error", "0.1")
    assert "is not calibrated: first give `qcat calibrate" in done.stderr


def test_a_damaged_section_is_one_line(qcat, house_copy, held_out):
    write_sections(house_copy, {CALIBRATION_KEY: FULL.to_dict() | {"temperature": "hot"}})
    done = qcat("ask", "-m", house_copy, "x")
    assert done.returncode == 1
    assert "qcat.calibration has no sensible number under 'temperature'" in done.stderr
    write_sections(house_copy, {CALIBRATION_KEY: {"version": 99}})
    assert "of another version of qcat" in qcat("ask", "-m", house_copy, "x").stderr
    done = qcat("calibrate", house_copy, held_out / "test.jsonl", "--max-error", "0.1")
    assert "of another version of qcat" in done.stderr
    assert qcat("calibrate", house_copy, held_out / "validation.jsonl").returncode == 0
    assert qcat("ask", "-m", house_copy, "When was the pool pump replaced?").stdout == "pool\n"


def test_export_calibrates(qcat, easy_run, tmp_path):
    run, _ = easy_run
    done = qcat("export", run, "-o", tmp_path / "out", "--quant", "q8_0", "--max-flips", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # Twenty validation questions: too few, and the report says so.
    assert "questions say nothing of the confidence" in report["calibration"]["refused"]
    assert "qcat: warning: not calibrated: " in done.stderr
    assert "Not calibrated: " in (tmp_path / "out" / "MODEL_CARD.md").read_text()
    done = qcat(
        "export", run, "-o", tmp_path / "more", "--quant", "q8_0", "--max-flips", "1",
        "--validation-data", run / "train.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "more" / "report.json").read_text())["calibration"]
    assert report["measured_on"] == "held-out questions"
    assert {"before", "after", "temperature"} <= set(report)
    model = tmp_path / "more" / "sorts.gguf"
    assert known_of(model)["questions"] == report["questions"]
    card = (tmp_path / "more" / "MODEL_CARD.md").read_text()
    assert "| expected calibration error |" in card
    assert "| questions | mean confidence | answered right |" in card
    with Classifier.open(model, coverage=0.9) as sorts:
        assert sorts.ask("who did the water here").prediction_set is not None


def test_a_new_model_gets_the_old_ones_threshold(house_copy, held_out):
    with Classifier.open() as house:
        task = house.task
    examples = read_examples(held_out / "test.jsonl", task)
    questions = examples

    def carry(**old):
        return carry_threshold(house_copy, replace(FULL, **old), questions, lambda *_: None)

    assert carry(label_thresholds={}, promise=None).threshold == 0.75
    assert known_of(house_copy)["threshold"] == 0.75
    nothing = carry(threshold=None, label_thresholds={}, promise=None)
    assert nothing.threshold is None
    assert known_of(house_copy)["threshold"] is None  # what was carried before is gone
    # A promise that all answers kept is a promise all the same.
    kept = carry(threshold=None, label_thresholds={}, promise=Promise(0.1, 0.9, 1, 1, 0))
    assert kept.promise.max_error == 0.1
    assert kept.promise.level == 0.9
    assert kept.promise.errors / kept.promise.answered < 0.1
    assert kept.temperature != FULL.temperature  # that is the new model's own
    assert known_of(house_copy)["threshold"] == kept.threshold
    before = house_copy.read_bytes()
    with pytest.raises(DataError, match="cannot be promised"):
        carry(promise=Promise(0.001, 0.95, 1, 1, 0))
    assert house_copy.read_bytes() == before


def test_arguments_that_make_no_sense(house):
    for wrong in ({"coverage": 1.0}, {"coverage": 0.9, "threshold": 0.5}, {"threshold": 1.5}):
        with pytest.raises(ValueError, match="expected"):
            Classifier.open(house, **wrong)
