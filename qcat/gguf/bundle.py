"""A GGUF to ask: the checked file, the task stored in it or given for it, and its identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcat.errors import BundleError, TaskError
from qcat.gguf.adapter import check_adapter
from qcat.gguf.check import check_foreign, check_model
from qcat.gguf.header import Header, read_header
from qcat.gguf.sections import REFERENCE_KEY, TASK_KEY, section
from qcat.task import Task

_SAMPLES, _SAMPLE = 64, 4096  # places in the tensor data that a fingerprint reads, bytes at each


@dataclass(frozen=True)
class Bundle:
    """A GGUF: the file, its header and the task stored in it."""

    path: Path
    header: Header
    task: Task
    foreign: bool = False
    """Whether qcat did not make the file: the task was given for it."""

    @classmethod
    def read(cls, path: str | Path, *, remember: bool = False, task: Task | None = None) -> Bundle:
        """Check a file and read its metadata.

        Args:
            path: of the file, or of the folder of a bundle.
            remember: as in `read_header`.
            task: what a file without a task is to answer; None rejects such a file.

        Raises:
            BundleError: the file is absent, not a GGUF, damaged, or contains no usable qcat task.
        """
        file = Path(path)
        if os.path.isdir(file):  # False, without an error, for a name that is not valid for a file
            file = find_gguf(file)
        header = read_header(file, remember=remember)
        if TASK_KEY not in header.metadata:
            if task is not None:
                check_foreign(file, header)
                return cls(file, header, task, foreign=True)
            raise BundleError(
                f"{file}: a GGUF without qcat metadata: make one with `qcat export` (`qcat ask` "
                "and `qcat batch` can give it a --task)"
            )
        if is_adapter(header):
            check_adapter(file, header)
        else:
            check_model(file, header)
        data = section(header, TASK_KEY, file)
        try:
            task = Task.from_dict(data)
            if task.verbalizer == "code" and not task.codes:
                raise TaskError("no codes for the labels")
        except (TaskError, TypeError) as error:
            raise BundleError(f"{file}: metadata {TASK_KEY}: {error}: export it again") from None
        return cls(file, header, task)


def is_adapter(header: Header) -> bool:
    """Whether a file holds an adapter and not a model: it needs a base (`qcat.gguf.adapter`)."""
    return header.metadata.get("general.type") == "adapter"


def identity(metadata: Mapping[str, Any]) -> str:
    """A name for the model in a file's or a server's metadata: its task and twelve hex digits.

    They are a hash of all of qcat's metadata except the reference for drift, which does not affect
    how the model answers. Another training, export or calibration gives another name.
    """
    said = {
        key: value
        for key, value in metadata.items()
        if key.startswith("qcat.") and key != REFERENCE_KEY
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"{json.loads(said[TASK_KEY])['name']}-{digest[:12]}"


def fingerprint(path: Path, header: Header, *, anywhere: bool = False) -> str:
    """A quick fingerprint of a file, in hexadecimal.

    SHA-256 over its header, its size and time of last change, and samples of its tensor data.

    Args:
        path: of the file.
        header: its header.
        anywhere: ignore the time of the last change, so that a copy has the same fingerprint.

    Raises:
        BundleError: the file cannot be read any more.
    """
    try:
        status = os.stat(path)
        changed = "" if anywhere else f" {status.st_mtime_ns}"
        digest = hashlib.sha256(f"{header.digest} {status.st_size}{changed}".encode())
        step = max(_SAMPLE, (status.st_size - header.data_start) // _SAMPLES)
        with path.open("rb") as file:
            for at in range(header.data_start, status.st_size, step):
                file.seek(at)
                digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def find_gguf(folder: Path) -> Path:
    """The GGUF in a bundle. Raises BundleError if there is none, or more than one."""
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(found) != 1:
        raise BundleError(
            f"{folder}: {len(found)} GGUF files there: name the folder that `qcat export` made"
        )
    return found[0]
