"""Tiny models, made once a session. Nothing is downloaded, nothing is mocked."""

from __future__ import annotations

import json
import os
import pwd

# Spinning threads make a busy machine many times slower; read when OpenMP loads, so set first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from qcat.task import Task

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "household"
SHARED = Path(os.environ.get("QCAT_SHARED", ROOT.parent / "shared"))
REAL_TOKENIZER = SHARED / "qwen3-tokenizer"

settings.register_profile(
    "qcat",
    deadline=None,  # the machines that run this are noisy
    derandomize=True,  # the same examples every time: a failure is about the change
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("qcat")

needs_real_tokenizer = pytest.mark.skipif(
    not (REAL_TOKENIZER / "tokenizer.json").is_file(),
    reason=f"no Qwen3 tokenizer at {REAL_TOKENIZER} (set QCAT_SHARED)",
)


@dataclass(frozen=True)
class Checkpoint:
    """A tiny base model and, if asked for, an adapter for it."""

    base: Path
    adapter: Path
    model: Any
    """The base in torch, before the adapter."""


def corpus() -> list[str]:
    """Texts to train tokenizers on: the example questions and the words of the prompts."""
    lines = (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()
    task = Task.read(EXAMPLE / "task.toml")
    words = [
        f"{task.instruction}\n\nValid categories:\n- {label}\n\nQuestion: q?\nCategory: {label}"
        for label in task.labels
    ]
    codes = [f" {first}{second}" for first in "ABCDE" for second in "ABCDEFGHIJ"] * 50
    return [json.loads(line)["text"] for line in lines[::8]] + words * 20 + codes


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("QCAT_CACHE", str(folder))
        yield folder


@pytest.fixture
def unprivileged_folder() -> Iterator[Path]:
    """A folder whose permissions are obeyed: root, who may do everything, is someone else here."""
    with tempfile.TemporaryDirectory(prefix="qcat-test-") as folder:
        if os.geteuid() != 0:
            yield Path(folder)
            return
        nobody = pwd.getpwnam("nobody").pw_uid
        os.chown(folder, nobody, -1)
        os.seteuid(nobody)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


@pytest.fixture(scope="session")
def household() -> Task:
    """The example task with its 18 labels."""
    return Task.read(EXAMPLE / "task.toml")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """`make_checkpoint(kind="qwen3", hidden=256, …)`: a random base and adapter, cached."""
    import tiny_model

    @cache
    def make(kind: str = "qwen3", **shape: Any) -> Checkpoint:
        folder = tmp_path_factory.mktemp(kind)
        count = tiny_model.make_tokenizer(folder / "base", corpus(), kind=kind)
        vocabulary = count + -count % 64 + 64  # rows beyond the tokenizer's, as in Qwen3
        model = tiny_model.make_base(folder / "base", kind=kind, vocabulary=vocabulary, **shape)
        again = type(model).from_pretrained(folder / "base")
        tiny_model.make_adapter(folder / "adapter", again, str(folder / "base"))
        return Checkpoint(folder / "base", folder / "adapter", model)

    return make


@pytest.fixture(scope="session")
def make_pair(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Checkpoint],
    household: Task,
) -> Callable[..., tuple[Path, Path]]:
    """`make_pair(kind)`: a Q4_0 base as a GGUF, and an adapter trained on it."""
    import tiny_model
    from export_job import job_of
    from qcat_convert.quantize import quantize
    from qcat_convert.stream import convert

    from qcat.base.checkpoint import base_folder

    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str = "qwen3") -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            checkpoint = make_checkpoint(kind)
            convert(job_of(household, folder / "whole.gguf", None, checkpoint.base))
            quantize(folder / "whole.gguf", folder / "base.gguf", "q4_0", threads=1)
            base = folder / "base.gguf"
            model = type(checkpoint.model).from_pretrained(base_folder(str(base)))
            checkpoint_folder = str(base_folder(str(base)))
            tiny_model.make_adapter(folder / "adapter", model, checkpoint_folder)
            config = folder / "adapter" / "adapter_config.json"
            said = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
            config.write_text(json.dumps(said))
            made[kind] = base, folder / "adapter"
        return made[kind]

    return make


@pytest.fixture(scope="session")
def bundle_file(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Checkpoint]
) -> Callable[..., Path]:
    """`bundle_file(task, kind="qwen3", hidden=64)`: a GGUF made by export, Q8_0, cached."""
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    @cache
    def make(toml: str, kind: str, hidden: int) -> Path:
        task = Task.from_toml(toml)
        target = tmp_path_factory.mktemp("bundle") / "out"
        checkpoint = make_checkpoint(kind, hidden=hidden)
        export(Request(task, target, adapter=checkpoint.adapter, quantization="q8_0"))
        return target / f"{task.name}.gguf"

    return lambda task, kind="qwen3", hidden=64: make(task.to_toml(), kind, hidden)


@pytest.fixture(scope="session")
def house(bundle_file: Callable[..., Path], household: Task) -> Path:
    """A tiny household GGUF with random weights."""
    return bundle_file(household)


@pytest.fixture(scope="session")
def easy_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """A base, a task and easy questions: `(folder, arguments of qcat train without -o)`.

    Of its labels one begins another, so that the end token has to compete.
    """
    import tiny_model

    folder = tmp_path_factory.mktemp("easy")
    words = {"pool": "water", "pool pump": "motor", "fence": "gate", "car": "tires"}
    rows = [
        {"text": f"{shape} the {word} {place}", "label": label, "group": f"{label}-{place}"}
        for label, word in words.items()
        for place in ("here", "there", "in May", "at home", "at last", "again", "today", "now")
        for shape in ("who did", "when was it", "why is", "how much for")
    ]
    lines = ['name = "sorts"', "[labels]", *(f'"{label}" = ""' for label in words), ""]
    (folder / "task.toml").write_text("\n".join(lines))
    (folder / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    texts = [f"{row['text']} {row['label']}" for row in rows]
    count = tiny_model.make_tokenizer(folder / "base", texts, size=600)
    tiny_model.make_base(folder / "base", vocabulary=count, hidden=128)
    more = ("-t", folder / "task.toml", "--base", folder / "base", "--learning-rate", "0.003")
    # Random weights have nothing that other scales could bring out.
    return folder, ("train", folder / "q.jsonl", *more, "--method", "lora", "--epochs", "8")


@pytest.fixture(scope="session")
def easy_run(easy_job: tuple[Path, tuple[Any, ...]]) -> tuple[Path, Any]:
    """A finished run on the easy questions, and what the command said."""
    folder, args = easy_job
    program = Path(sys.executable).with_name("qcat")
    done = subprocess.run(
        [program, *args, "-o", folder / "run"], capture_output=True, text=True, check=True
    )
    return folder / "run", done


@pytest.fixture(scope="session")
def qcat() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command: `qcat("ask", "-m", file, "…", input="…")`."""
    program = Path(sys.executable).with_name("qcat")

    def run(*args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [str(program), *(str(arg) for arg in args)]
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=300, **more
        )

    return run


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `qcat`, but in this process, all of it: every start of another costs seconds."""
    from qcat import cli
    from qcat.workflows import export as pipeline
    from qcat.workflows import retrain

    monkeypatch.setattr(pipeline, "convert_apart", lambda: nullcontext(pipeline.convert_job))
    monkeypatch.setattr(retrain, "convert_apart", lambda: nullcontext(pipeline.convert_job))

    def call(*args: Any) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()  # what fixtures have printed
        status = cli.run([str(arg) for arg in args])
        return subprocess.CompletedProcess(args, status, *capsys.readouterr())

    return call
