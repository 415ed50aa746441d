"""What `qcat export --vocab trim` saves and costs, in the exact shape of Qwen3-0.6B.

Random weights and the real vocabulary, as in `shape.py`; three sets of questions, each a task
with an export of its own: the household example, and CLINC150 and Banking77 where the folder `data`
under QCAT_SHARED has them. Three tables: size, cold start and peak memory of the household files,
fresh processes taking turns; the share of test questions that are split into other tokens than with
the whole vocabulary, beside what the first merges alone, without whole words, would give; and the
labels that change with it. Then one line of JSON. The weights are random, so the labels that change
say how far the logits move, not what a trained model would answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from shape import (
    EXAMPLE,
    LOAD_ONLY,
    TOKENIZER,
    alone,
    build,
    first_question,
    machine,
    machine_line,
    need_vocabulary,
    positive,
    spread,
    table,
    work_folder,
)

if TYPE_CHECKING:
    from qcat.task import Task

DATA = TOKENIZER.parent / "data"
SETS = ("household", "clinc150", "banking77")
MERGES = (None, 64_000, 32_000, 16_000)  # None keeps the whole vocabulary
FEW = 8  # questions for the importance matrix, which is not what is measured here


class Questions(NamedTuple):
    """A task with questions."""

    task: Task
    training: list[str]
    test: list[str]


def main() -> None:
    """Build, export, start, compare, print."""
    options = _options()
    need_vocabulary()
    names = [name for name in SETS if name == "household" or (DATA / name).is_dir()]
    found: dict[str, Any] = {"machine": machine(), "layers": options.layers, "quant": options.quant}
    print(machine_line(found["machine"]), flush=True)
    with work_folder(options.work) as work:
        checkpoint = work / f"checkpoint-{options.layers}"
        if not checkpoint.is_dir():
            _say("building random weights")
            alone(build, checkpoint, options.layers)
        files: dict[str, dict[str, Path]] = {}
        for name in names:
            _say(f"exporting for {name}")
            folder = work / f"vocab-{name}-{options.layers}-{options.quant}"
            files[name] = {
                key(merges): alone(export, checkpoint, folder, name, merges, options.quant)
                for merges in MERGES
            }
        _say("starting fresh processes")
        found["cold"] = cold(files["household"], options.starts)
        print("\n" + table(cold_rows(found["cold"])), flush=True)
        found["split"] = {}
        for name in names:
            _say(f"splitting the questions of {name}")
            found["split"][name] = alone(split, name, files[name])
        print("\n" + table(split_rows(found["split"])), flush=True)
        found["labels"] = {}
        for name in names:
            _say(f"asking {name}")
            found["labels"][name] = alone(labels, name, files[name], options.questions)
        print("\n" + table(label_rows(found["labels"])))
    print("\n" + json.dumps(found))


def key(merges: int | None) -> str:
    """A column's name."""
    return "full" if merges is None else f"{merges:,}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep model and exports here and use them again"
    )
    more = {"type": positive, "metavar": "N"}
    parser.add_argument(
        "--starts", default=20, help="of each file and command (default: %(default)s)", **more
    )
    parser.add_argument(
        "--questions", default=50, help="asked of a set and kind (default: %(default)s)", **more
    )
    parser.add_argument("--layers", default=28, help="fewer for a quick trial", **more)
    parser.add_argument("--quant", default="q4_0", help="(default: %(default)s)")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"vocab: {text} …", file=sys.stderr, flush=True)


def read(name: str) -> Questions:
    """A set of questions with its task; what is trained on and what is not."""
    from qcat.data.dataset import read_examples
    from qcat.data.split import split_examples
    from qcat.task import Task

    if name == "household":
        task = Task.read(EXAMPLE / "task.toml")
        parts = split_examples(read_examples(EXAMPLE / "questions.jsonl", task), task, seed=0)
        return Questions(task, [e.text for e in parts.train], [e.text for e in parts.test])
    rows = {
        part: [json.loads(line) for line in (DATA / name / f"{part}.jsonl").open(encoding="utf-8")]
        for part in ("train", "test")
    }
    labels = sorted({row["label"].replace("_", " ") for row in rows["train"]})
    texts = {part: [row["text"] for row in found] for part, found in rows.items()}
    return Questions(Task(name, dict.fromkeys(labels, "")), texts["train"], texts["test"])


def export(checkpoint: Path, folder: Path, name: str, merges: int | None, quant: str) -> Path:
    """Export unless it is there; the GGUF."""
    from qcat.encoding.prompt import clean_question
    from qcat.workflows import export_job as pipeline

    found = read(name)
    target = folder / key(merges)
    if not target.is_dir():
        pipeline._IMATRIX_QUESTIONS = FEW
        pipeline.export(
            pipeline.Request(
                task=found.task,
                target=target,
                adapter=checkpoint / "adapter",
                base=str(checkpoint / "base"),
                quantization=quant,
                merges=merges,
                training=tuple(map(clean_question, found.training)),
            )
        )
    return target / f"{found.task.name}.gguf"


def cold(files: dict[str, Path], starts: int) -> dict[str, dict[str, float]]:
    """Medians over fresh processes: of one that only loads the model, and of `qcat ask`."""
    program = Path(sys.executable).with_name("qcat")
    commands = {
        (column, what): command
        for column, file in files.items()
        for what, command in (
            ("load", [sys.executable, "-c", LOAD_ONLY, str(file)]),
            ("ask", [str(program), "ask", "-m", str(file), first_question()]),
        )
    }
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {each: [] for each in commands}
    for turn in range(1 + starts):
        for each, command in commands.items():
            taken = _run(command)
            if turn:  # the first brings the file into the page cache
                runs[each].append(taken)
    return {
        column: {
            "file_mb": files[column].stat().st_size / 1e6,
            **{f"{what}_s": median(s for s, _ in runs[column, what]) for what in ("load", "ask")},
            "load_s_low": min(s for s, _ in runs[column, "load"]),
            "load_s_high": max(s for s, _ in runs[column, "load"]),
            **{f"{what}_mb": median(m for _, m in runs[column, what]) for what in ("load", "ask")},
        }
        for column in files
    }


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and most resident memory, in 10^6 bytes, of a program."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"vocab: failed with status {process.returncode}: {' '.join(command[:3])}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def split(name: str, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Tokens kept, and test questions whose tokens are others, of each file by its own tokens."""
    alone = {key(merges): _alone_merges(name, merges) for merges in MERGES if merges is not None}
    pieces = {column: _pieces(name, file) for column, file in files.items()}
    rows = {}
    for column, (size, found) in pieces.items():
        pairs = list(zip(pieces["full"][1], found, strict=True))
        if any(b"".join(one) != b"".join(other) for one, other in pairs):
            sys.exit(f"vocab: {files[column]} spells other text")
        rows[column] = {
            "tokens": size,
            "questions": len(found),
            "otherwise": sum(one != other for one, other in pairs),
            "tokens_a_question": sum(map(len, found)) / len(found),
            **alone.get(column, {}),
        }
    return rows


def _pieces(name: str, file: Path) -> tuple[int, list[list[bytes]]]:
    """How many tokens a GGUF has, and what it splits the test questions into."""
    from qcat.backends.llama import LlamaModel
    from qcat.encoding.prompt import build_prompt, clean_question, encode_segments

    found = read(name)
    with LlamaModel(file, vocab_only=True) as model:
        prompt = build_prompt(found.task, model)
        ids = [encode_segments(prompt.rest(clean_question(q)), model) for q in found.test]
        return model.n_vocab, [[model.piece(token) for token in question] for question in ids]


def _alone_merges(name: str, merges: int) -> dict[str, int]:
    """The same for the first merges alone, without the language's whole words."""
    from qcat_convert.trim import trim

    from qcat.encoding.prompt import build_prompt, clean_question, encode_answers, encode_segments
    from qcat.encoding.tokenization import HubTokenizer

    found, tokenizer = read(name), HubTokenizer(TOKENIZER)
    prompt = build_prompt(found.task, tokenizer)

    def ids(question: str) -> list[int]:
        return encode_segments(prompt.rest(clean_question(question)), tokenizer)

    needed = {
        *encode_segments(prompt.prefix, tokenizer),
        *(token for answer in encode_answers(found.task, tokenizer) for token in answer),
        *(token for question in found.training for token in ids(question)),
    }
    trimmed = trim(tokenizer, needed, merges)
    assert trimmed
    kept = set(trimmed.rows)
    return {
        "alone_tokens": len(kept),
        "alone_otherwise": sum(not kept.issuperset(ids(question)) for question in found.test),
    }


def labels(name: str, files: dict[str, Path], count: int) -> dict[str, dict[str, int]]:
    """Test questions with another label than from the whole vocabulary, by how they are split."""
    from qcat import Classifier

    test = read(name).test
    whole = _pieces(name, files["full"])[1]
    rows = {}
    with Classifier.open(files["full"]) as full:
        for column, file in files.items():
            if column == "full":
                continue
            pairs = zip(test, whole, _pieces(name, file)[1], strict=True)
            kinds: dict[str, list[str]] = {"same": [], "otherwise": []}
            for question, one, other in pairs:
                kinds["same" if one == other else "otherwise"].append(question)
            rows[column] = {}
            with Classifier.open(file) as trimmed:
                for kind, questions in kinds.items():
                    asked = spread(questions, count)
                    differ = sum(full.ask(q).label != trimmed.ask(q).label for q in asked)
                    rows[column] |= {f"{kind}_asked": len(asked), f"{kind}_flips": differ}
    return rows


# Tables


def cold_rows(found: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Figures down, vocabularies across."""
    lines = (
        ("file, MB", "file_mb", ".1f"),
        ("load alone, s", "load_s", ".3f"),
        ("  fastest", "load_s_low", ".3f"),
        ("  slowest", "load_s_high", ".3f"),
        ("load alone, peak MB", "load_mb", ".0f"),
        ("qcat ask, s", "ask_s", ".3f"),
        ("qcat ask, peak MB", "ask_mb", ".0f"),
    )
    rows = [
        (name, *(format(column[figure], shape) for column in found.values()))
        for name, figure, shape in lines
    ]
    return [("merges", *found), *rows]


def split_rows(found: dict[str, dict[str, dict[str, float]]]) -> list[tuple[str, ...]]:
    """Sets and vocabularies down."""
    rows = [("split", "merges", "tokens", "otherwise", "tokens a question", "alone", "otherwise")]
    for name, columns in found.items():
        for column, row in columns.items():
            alone = ("", "")
            if "alone_tokens" in row:
                share = row["alone_otherwise"] / row["questions"]
                alone = f"{row['alone_tokens']:.0f}", f"{share:.1%}"
            share = row["otherwise"] / row["questions"]
            cells = f"{row['tokens']:.0f}", f"{share:.1%}", f"{row['tokens_a_question']:.2f}"
            rows.append((name, column, *cells, *alone))
    return rows


def label_rows(found: dict[str, dict[str, dict[str, int]]]) -> list[tuple[str, ...]]:
    """Sets and vocabularies down."""
    rows: list[tuple[str, ...]] = [("labels changed", "merges", "split as before", "otherwise")]
    for name, columns in found.items():
        for column, row in columns.items():
            cells = (f"{row[f'{k}_flips']} of {row[f'{k}_asked']}" for k in ("same", "otherwise"))
            rows.append((name, column, *cells))
    return rows


if __name__ == "__main__":
    main()
