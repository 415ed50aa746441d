"""The folder of a run during training: locked, with a plan, and never with two runs in it.

`plan.json` describes the training, so that only the same training is resumed. `run.json` is written
last and marks the run as complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcat.base.checkpoint import first_line
from qcat.data.split import Split
from qcat.errors import TrainError
from qcat.files import locked
from qcat.task import Task

CHECKPOINT = "checkpoint.pt"
DEPTHS = "depths"
"""Temporary folder of the runs at several depths (`qcat.training.depth`)."""
_TRANSIENT = ("plan.json", "plan.partial", CHECKPOINT, "checkpoint.partial")


@contextmanager
def run_folder(
    target: Path, settings: Mapping[str, Any], task: Task, split: Split
) -> Iterator[bool]:
    """Lock the folder of a run, and write its plan and its split.

    Args:
        target: the folder; created if it does not exist.
        settings: settings of the training, as JSON values.
        task: as the user gave it.
        split: its questions.

    Yields:
        Whether an unfinished run with the same settings, task and questions was found.

    Raises:
        TrainError: the folder holds something else or cannot be written; or memory is too small.
    """
    import torch
    from safetensors import SafetensorError

    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{target}: {error.strerror or error}: choose another folder") from None
    busy = "another training is writing it"
    with locked(target / ".lock", target=target, busy=busy, error=TrainError):
        try:
            yield _begin(target, settings, task, split)
        except (OSError, SafetensorError) as error:
            written = getattr(error, "filename", None)  # None if safetensors or torch wrote it
            if written is not None and target not in Path(written).parents:
                raise  # of a file that is only read: those were checked before
            raise TrainError(
                f"{target}: cannot be written: {first_line(error)}: rerun the command when it can"
            ) from None
        except torch.OutOfMemoryError:
            raise TrainError(
                f"{target}: not enough memory for a step: lower --batch-size, in another folder"
            ) from None


def _begin(target: Path, settings: Mapping[str, Any], task: Task, split: Split) -> bool:
    """Write the plan and the split; return whether there is a run to resume."""
    if (target / "run.json").exists():
        clear(target)  # it may have been killed during its last steps
        raise TrainError(f"{target}: holds a finished run: remove it or choose another folder")
    plan = target / "plan.json"
    wanted = {
        "settings": dict(settings),
        "task": task.to_toml(),
        "questions": {
            part: [[example.text, example.label] for example in examples]
            for part, examples in vars(split).items()
            if examples
        },
    }
    begun = (target / CHECKPOINT).exists() or any(
        (folder / name).exists()
        for folder in target.glob(f"{DEPTHS}/*")
        for name in (CHECKPOINT, "run.json")
    )
    if begun and (not plan.exists() or json.loads(plan.read_text("utf-8")) != wanted):
        raise TrainError(
            f"{target}: holds an unfinished run of other data, task or settings: "
            "remove it or choose another folder"
        )
    ours = {".lock", *_TRANSIENT, *(f"{part}.jsonl" for part in wanted["questions"])}
    if not plan.exists() and {path.name for path in target.iterdir()} - ours:
        raise TrainError(f"{target}: is not empty: choose another folder")
    write_json(plan, wanted)
    split.write(target, task)
    return begun


def clear(target: Path) -> None:
    """Remove the files that are needed only until a run is finished."""
    for name in _TRANSIENT:
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / DEPTHS, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False), "utf-8")
    os.replace(partial, path)
