"""Parquet files, and the names of labels that Hugging Face's `datasets` writes as numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcat.charset import HEAD, foreign
from qcat.data.columns import check_names
from qcat.data.opened import opened
from qcat.errors import DataError


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that reads small parts at a time.

    Raises:
        DataError: the file cannot be read, is not Parquet, or has a name twice; also for errors
            raised within the block.
    """
    import pyarrow
    import pyarrow.parquet

    with opened(path) as file:
        head = file.read(HEAD)
        if not head.startswith(b"PAR1") and (what := foreign(head)):
            raise DataError(f"{path}: {what}")
        file.seek(0)
        try:
            # Without a buffer a whole column of a row group would be read at once.
            table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False)
            check_names(str(path), table.schema_arrow.names)
            yield table
        except (pyarrow.ArrowException, ValueError) as error:
            reason = (str(error).splitlines() or ["it is damaged"])[0]
            raise DataError(f"{path}: not a Parquet file: {reason}") from None


def class_names(schema: Any) -> dict[str, list[str]]:
    """For each column of whole numbers that stand for names, the names.

    Args:
        schema: the `pyarrow.Schema` of a file; its metadata has them under `huggingface`.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and isinstance(feature.get("names"), list)
            and all(isinstance(name, str) for name in feature["names"])
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # not written by `datasets`
