"""The examples in docstrings give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
from conftest import ROOT

MODULES = [
    ".".join(path.relative_to(root).with_suffix("").parts)
    for root in (ROOT, ROOT / "convert")
    for path in sorted(root.glob("qcat*/**/*.py"))
    if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, tried = doctest.testmod(import_module(name))
    assert tried
    assert not failed


def test_there_are_examples():
    assert "qcat.classifier" in MODULES
