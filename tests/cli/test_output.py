"""What commands say of long work where there is no terminal."""

from __future__ import annotations

import time

import pytest

from qcat.cli.output import Bars


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_a_minute(clock, capsys):
    bars = Bars()
    for done in range(1, 8):
        clock[0] += 10
        bars.show("train", done, 1000, f"loss {done}.0")
    assert capsys.readouterr().err.splitlines() == [
        "train 3 of 1000, about 2 h 46 min left: loss 3.0",
        "train 6 of 1000, about 2 h 46 min left: loss 6.0",
    ]


def test_every_epoch_has_a_line_and_what_is_quick_has_none(clock, capsys):
    bars = Bars()
    bars.show("quantize", 1, 2)
    bars.show("14 of 28 layers: epoch", 1, 5, "loss 1.000")
    bars.show("train", 2, 5)
    clock[0] += 31
    bars.show("train", 5, 5)
    assert capsys.readouterr().err.splitlines() == [
        "14 of 28 layers: epoch 1 of 5: loss 1.000",
        "train 5 of 5",
    ]
