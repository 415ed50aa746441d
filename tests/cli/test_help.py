"""The help of every command is what the reference shows."""

from __future__ import annotations

import pytest
from cli_reference import PAGE, commands, page

from qcat.cli import cli

ALL = dict(commands(cli, "qcat"))


def test_the_reference_is_what_the_program_prints(monkeypatch):
    for name in ("QCAT_MODEL", "QCAT_REVIEW"):
        monkeypatch.delenv(name, raising=False)
    assert PAGE.read_text("utf-8") == page(), "run python tools/cli_reference.py"


@pytest.mark.parametrize("name", [name for name in ALL if name != "qcat"])
def test_every_command_has_an_example(name):
    assert "Example" in (ALL[name].help or "")


def test_help_through_the_command(qcat):
    done = qcat("build", "--help")
    assert done.returncode == 0
    assert "qcat build questions.csv -o house" in done.stdout
