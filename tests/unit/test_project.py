"""What holds for the project as a whole: who imports whom, what stays unloaded, stored examples."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT

from qcat.cli import COMMANDS
from qcat.encoding.grammar import grammar
from qcat.encoding.prompt import QUESTION_ROOM, build_prompt
from qcat.errors import TaskError
from qcat.gguf.bundle import Bundle
from qcat.install import DISTRIBUTION, extra_with
from qcat.opening import read_calibration
from qcat.report.modelfile import modelfile
from qcat.shell import quoted
from qcat.task import Task
from qcat.version import __version__

# Which rooms may import which, besides their own. Nothing may import `cli`.
ALLOWED = {
    "core": set(),
    "encoding": {"core"},
    "gguf": {"core"},
    "data": {"core", "encoding"},
    "backends": {"core", "encoding"},
    "calibration": {"core", "encoding"},
    "base": {"core", "encoding", "gguf", "backends"},
    "classifier": {"core", "encoding", "gguf", "base", "backends", "calibration"},
    "monitor": {"core", "encoding", "data", "calibration"},
    "sklearn": {"core", "data", "encoding", "classifier", "training", "workflows"},
    "evaluation": {"core", "encoding", "gguf", "data", "backends", "calibration", "classifier"},
    "report": {"core", "encoding", "calibration", "evaluation", "monitor"},
    "training": {"core", "encoding", "gguf", "data", "base", "evaluation", "report"},
    "qcat_convert": {"core", "encoding", "gguf", "backends", "base"},
}
ALLOWED["workflows"] = {*ALLOWED}
ALLOWED["cli"] = {*ALLOWED}
_CLASSIFIER = ("classifier", "judge", "opening")


def room(module):
    """The room of the architecture that a module lives in; None for what is not ours."""
    top, *rest = module.split(".")
    if top == "qcat_convert":
        return top
    if top != "qcat":
        return None
    if rest and rest[0] in _CLASSIFIER:
        return "classifier"
    if rest == ["__main__"]:
        return "cli"
    return rest[0] if rest and rest[0] in ALLOWED else "core"


def imports(path):
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


SOURCES = sorted([*ROOT.glob("qcat/**/*.py"), *(ROOT / "convert").glob("**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    root = ROOT / "convert" if path.is_relative_to(ROOT / "convert") else ROOT
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    if name == "qcat":
        return  # the public face re-exports the classifier
    for module in imports(path):
        target = room(module)
        if target and target != room(name):
            assert target in ALLOWED[room(name)], f"{name} imports {module}"
        if module.split(".")[0] == "click":
            assert room(name) == "cli", f"{name} imports click"
        if module.split(".")[0] in ("ollama", "httpx"):
            assert name == "qcat.backends.ollama"
        if module.split(".")[0] == "llama_cpp":
            assert name in (
                "qcat.backends.llama",
                "qcat.backends.llama_scorer",
                "qcat.backends.trial",
                "qcat_convert.quantize",
                "qcat.cli.doctor",
            )


def test_asking_loads_neither_torch_nor_transformers(house):
    code = (
        "import sys, qcat\n"
        "assert 'llama_cpp' not in sys.modules\n"
        "with qcat.Classifier.open(sys.argv[1]) as c: c.ask('pool?')\n"
        "sys.argv = ['qcat', 'ask', '-m', sys.argv[1], 'pool?']\n"
        "from qcat.cli import run\n"
        "assert run(None) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'gguf', 'sklearn', 'tokenizers', 'qcat_convert',"
        " 'ollama', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, house], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize("stored", sorted(ROOT.glob("grammars/*.gbnf")), ids=lambda path: path.name)
def test_stored_grammars_are_what_the_code_writes(stored):
    task = Task.read(ROOT / "examples" / stored.stem / "task.toml")
    assert stored.read_text("utf-8") == grammar(task)


@pytest.mark.parametrize(
    "stored", sorted(ROOT.glob("modelfiles/*.Modelfile")), ids=lambda path: path.name
)
def test_stored_modelfiles_are_what_the_code_writes(stored):
    class Qwen3:
        """Knows Qwen3's chat tokens; no more of a vocabulary shows in a Modelfile's text."""

        begin = None

        def encode(self, text, *, special):
            known = special and text in ("<|im_start|>", "<|im_end|>", "<think>")
            return [0] if known else list(text.encode())

    name, _, style = stored.stem.partition(".")
    task = Task.read(ROOT / "examples" / name / "task.toml").replace(style=style or "plain")
    text = modelfile(
        task,
        build_prompt(task, Qwen3()),
        gguf=f"{name}.gguf",
        parameters={
            "temperature": 0,
            "top_k": 1,
            "repeat_penalty": 1,
            "num_predict": 3,
            "num_ctx": 512,
            "stop": ["<|im_end|>"],
        },
    )
    assert stored.read_text("utf-8") == text


# What a command holds as it is: names that `Task` and Ollama allow, and what is quoted already.
PLAIN = {"name", "task.name", "done.name", "made.task.name", "record['task']", "write", "bundle"}


def unquoted(text):
    """What an f-string puts into a command, in backticks or on a line of its own, as it is."""
    said, values = "", []
    for part in text.values:
        if isinstance(part, ast.Constant):
            said += part.value
        else:
            said += f"\0{len(values)}\0"
            values.append(ast.unparse(part.value))
    for command in re.findall(r"`((?:qcat|ollama) [^`]*)|^  ((?:qcat|ollama) .*)", said, re.M):
        for number in re.findall(r"\0(\d+)\0", "".join(command)):
            value = values[int(number)]
            if value not in PLAIN and not value.startswith("quoted("):
                yield value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_to_run_are_quoted_for_the_shell(path):
    tree = ast.parse(path.read_text("utf-8"))
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    assert [value for text in texts for value in unquoted(text)] == []


def test_a_printed_command_can_be_pasted(call, tmp_path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    questions = folder / "my questions.jsonl"
    shutil.copy(EXAMPLE / "questions.jsonl", questions)
    printed = call("init", questions).stdout.splitlines()
    [lint, train] = [shlex.split(line) for line in printed if line.startswith("  qcat ")]
    assert lint[2:] == [str(folder / "task.toml"), str(questions)]
    assert train[2:5] == [str(questions), "-t", str(folder / "task.toml")]


def test_quotes_are_those_of_the_system(monkeypatch):
    assert quoted(Path("plain/path.gguf")) == "plain/path.gguf"
    assert quoted("two words") == "'two words'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert quoted("two words") == '"two words"'


def test_examples_are_stored_at_all():
    assert list(ROOT.glob("grammars/*.gbnf"))
    assert len(list(ROOT.glob("modelfiles/*.Modelfile"))) == 2


def test_version_is_one(qcat):
    assert qcat("--version").stdout == f"qcat, version {__version__}\n"


def test_the_docs_name_every_command():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    assert "make demo" in readme
    assert "make test" in readme
    pages = "".join(path.read_text("utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    for command in COMMANDS:
        assert f"qcat {command}" in pages
    assert str(QUESTION_ROOM) in pages


def test_the_readme_shows_what_the_demo_prints():
    """Labels and reasons to the letter; a probability's last digits depend on the processor."""
    demo = [sys.executable, ROOT / "examples" / "demo.py"]
    done = subprocess.run(demo, capture_output=True, text=True, check=True)
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme[readme.index("```console\nquestion") :].splitlines()[1:]
    rows = done.stdout.splitlines()
    for row, line in zip(rows, shown, strict=False):
        probability = re.compile(r"\b[01]\.\d{3}\b")
        assert probability.sub("#", row) == probability.sub("#", line)
        for one, two in zip(probability.findall(row), probability.findall(line), strict=True):
            assert float(one) == pytest.approx(float(two), abs=0.02)
    assert shown[len(rows)] == "```"


def test_doctor(qcat):
    done = qcat("doctor")
    assert done.returncode == 0
    rows = dict(
        re.split(r"\s{2,}|\s(?=\S+$)", line, maxsplit=1) for line in done.stdout.splitlines()
    )
    assert rows["qcat"] == __version__
    assert rows["threads"].split()[0].isdigit()
    for name in ("llama.cpp", "hub cache", "ollama server"):
        assert name in done.stdout


def test_python_m_qcat_is_the_command(qcat, tmp_path):
    for args in (["--help"], ["--version"], ["ask", "--help"], ["no-such"], ["show", "no.gguf"]):
        command = [sys.executable, "-m", "qcat", *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        there = qcat(*args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (there.returncode, there.stdout)
        assert done.stderr == there.stderr


def test_grammar_of_a_task_file(qcat):
    done = qcat("show", EXAMPLE / "task.toml", "--grammar")
    assert done.stdout == grammar(Task.read(EXAMPLE / "task.toml"))


def test_grammar_needs_codes(qcat, tmp_path):
    text = (EXAMPLE / "task.toml").read_text("utf-8").replace('"name"\n\n', '"code"\n\n')
    (tmp_path / "task.toml").write_text(text, "utf-8")
    done = qcat("show", tmp_path / "task.toml", "--grammar")
    assert done.returncode == 1
    assert "codes are chosen for a tokenizer" in done.stderr
    with pytest.raises(TaskError, match="no codes yet"):
        grammar(Task.read(tmp_path / "task.toml"))


def test_debug_shows_the_traceback(qcat, tmp_path):
    import os

    done = qcat("show", tmp_path / "no.gguf", env={**os.environ, "QCAT_DEBUG": "1"})
    assert "Traceback" in done.stderr
    assert "BundleError" in done.stderr


def test_asking_needs_nothing_that_only_posix_has(house, tmp_path):
    """As far as a Linux machine can show it: without the modules and names that Windows lacks."""
    code = (
        "import os, signal, sys\n"
        "sys.modules |= dict.fromkeys(['fcntl', 'termios', 'resource', 'pwd', 'grp'])\n"
        "for name in ('O_CLOEXEC', 'O_NONBLOCK', 'geteuid', 'sched_getaffinity', 'wait4',"
        " 'fork', 'register_at_fork'):\n"
        "    delattr(os, name)\n"
        "del signal.SIGWINCH\n"
        "from importlib import import_module\n"
        "from qcat.cli import COMMANDS, run\n"
        "for name in COMMANDS: import_module(f'qcat.cli.{name}')\n"
        "model, log, queue = sys.argv[1:]\n"
        "ask = ['ask', '-m', model, '--threshold', '1', '--log', log, '--review', queue]\n"
        "assert run([*ask, 'pool?']) == 3\n"
        "assert run(['show', model]) == 0\n"
    )
    files = [house, tmp_path / "log", tmp_path / "queue.db"]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_size for path in files)


# Packaging


def test_the_wheel_brings_two_packages_and_no_others(tmp_path):
    """A module named `convert`, say, would shadow a user's own."""
    from hatchling.builders.wheel import WheelBuilder

    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"qcat", "qcat_convert", f"qcat_llm-{__version__}.dist-info"}


def test_a_bundles_folder_is_a_model_too(qcat, house, tmp_path):
    folder = tmp_path / "house"
    folder.mkdir()
    shutil.copy(house, folder / "house.gguf")
    question = "who fixed the gate?"
    asked = [qcat("ask", "-m", model, "--json", question) for model in (folder, house)]
    assert asked[0].stdout == asked[1].stdout
    assert qcat("show", folder, "--grammar").stdout == qcat("show", house, "--grammar").stdout
    assert qcat("calibrate", folder, "--threshold", "0.5").returncode == 0
    assert read_calibration(Bundle.read(folder)).threshold == 0.5
    assert "0 GGUF files there" in qcat("ask", "-m", tmp_path, question).stderr


def test_a_users_own_convert_module_changes_nothing(qcat, house, tmp_path):
    (tmp_path / "convert.py").write_text("raise SystemExit('taken')\n")
    script = "import convert_other, qcat.report.modelfile, qcat"
    (tmp_path / "convert_other.py").write_text("")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert qcat("show", house, "--modelfile", cwd=tmp_path).returncode == 0


def test_extras_are_what_libraries_ask_for():
    """A library that is absent is named with an extra that brings it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert project["name"] == DISTRIBUTION
    distributions = {"sklearn": "scikit-learn"}
    for library in (
        "sklearn",
        "scipy",
        "matplotlib",
        "pyarrow",
        "ollama",
        "httpx",
        "torch",
        "peft",
    ):
        wanted = distributions.get(library, library)
        brought = [re.match(r"[\w-]+", line)[0] for line in extras[extra_with(library)]]
        assert wanted in brought
    assert not {"torch", "transformers", "peft"} & {
        re.match(r"[\w-]+", line)[0] for line in [*project["dependencies"], *extras["eval"]]
    }
