"""The commands in the README and the tutorial are run as they stand there.

Three things differ from what a reader does: the questions are a sample, so that training takes
seconds, with options to match; the README's base, which would be downloaded, is the small one; and
what installs something, or needs a server, is left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT

BASE = ROOT / "examples" / "base" / "model"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"-?\d+\.\d+")
A_LABEL = 22
"""Questions of each label in the sample."""
SMALL_BASE = "--base examples/base/model --epochs 1"


def blocks(document, language):
    text = (ROOT / document).read_text("utf-8")
    return [body for kind, body in BLOCK.findall(text) if kind == language]


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like a clone of the repository, with a sample of the questions."""
    household = tmp_path / "examples" / "household"
    household.mkdir(parents=True)
    (tmp_path / "examples" / "base").mkdir()
    (tmp_path / "examples" / "base" / "model").symlink_to(BASE)
    (tmp_path / "qcat").mkdir()
    (tmp_path / "qcat" / "models").symlink_to(ROOT / "qcat" / "models")
    shutil.copy(EXAMPLE / "off_topic.jsonl", household)
    taken, lines = Counter(), []
    for line in (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines():
        label = json.loads(line)["label"]
        taken[label] += 1
        if taken[label] <= A_LABEL:
            lines.append(line)
    (household / "questions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return tmp_path


def bash(script, folder):
    programs = Path(sys.executable).parent
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def run(script, folder):
    done = bash(f"set -euo pipefail\n{script}", folder)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def altered(script, changes):
    for old, new in changes.items():
        assert old in script, old
        script = script.replace(old, new)
    return script


def test_the_tutorial_can_be_followed(clone):
    scripts = [
        script
        for script in blocks("docs/tutorial.md", "sh")
        if "pip install" not in script and "Qwen/Qwen3-0.6B" not in script
    ]
    script = altered(
        "\n".join(scripts),
        {
            "--epochs 4": "--epochs 1",
            "--quant q4_k_m": "--quant q4_k_m --max-flips 0.5",
            "--max-error 0.1": "--max-error 0.95",
        },
    )
    said = run(script, clone)
    assert "never trained on: accuracy" in said
    assert "TF-IDF" in said
    assert "promise: at most 95.0% of the answers are wrong" in said
    assert (clone / "household" / "household.gguf").is_file()


@pytest.mark.parametrize("block", blocks("docs/tutorial.md", "console"))
def test_the_tutorial_shows_what_is_printed(clone, block):
    """To the letter, but for the last digits of probabilities, which the processor decides."""
    steps = re.split(r"^\$ ", block, flags=re.M)[1:]
    mark = "-- next --"
    script = "\n".join(f"{step.splitlines()[0]}\ns=$?; echo '{mark}'; (exit $s)" for step in steps)
    printed = bash(script, clone).stdout.split(f"{mark}\n")
    for step, said in zip(steps, printed, strict=False):
        shown = step.split("\n", 1)[1]
        if shown.endswith("…\n"):
            shown = shown.removesuffix("…\n")
            said = "".join(said.splitlines(keepends=True)[: shown.count("\n")])
        assert NUMBER.sub("#", said) == NUMBER.sub("#", shown)
        for one, two in zip(NUMBER.findall(said), NUMBER.findall(shown), strict=True):
            assert float(one) == pytest.approx(float(two), abs=0.02)


def test_the_readme_can_be_followed(clone):
    convert = next(text for text in blocks("docs/tutorial.md", "sh") if "csv.DictWriter" in text)
    run(convert, clone)
    [build] = [text for text in blocks("README.md", "sh") if "qcat build" in text]
    [steps] = [text for text in blocks("README.md", "sh") if "qcat train" in text]
    run("qcat init questions.csv", clone)
    run(
        altered(
            steps,
            {
                "qcat deploy house": ": qcat deploy house",
                "-o runs/house ": f"-o runs/house {SMALL_BASE} ",
                "-o house ": "-o house --max-flips 0.5 ",
            },
        ),
        clone,
    )
    [snippet] = blocks("README.md", "python")
    questions = "questions = ['When was the pool pump replaced?', 'who cleans the gutters']\n"
    said = run(f"python - <<'END'\n{questions}{snippet}\nEND", clone)
    assert re.fullmatch(r"(\w+( \w+)?|None) [01]\.\d+\n", said)
    shutil.rmtree(clone / "house")
    said = run(altered(build, {"-o house": f"-o house {SMALL_BASE} --max-flips 0.5"}), clone)
    assert "macro-F1" in said
