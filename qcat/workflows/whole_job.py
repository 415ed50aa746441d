"""An export of an architecture that qcat does not know, prepared for llama.cpp's converter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qcat_convert.converter import SCRIPT, Located, WholeJob, check_tree, locate_unknown
from qcat_convert.gate import encode_task, tokenizer_of
from qcat_convert.source import fingerprint

from qcat.encoding.agreement import AWKWARD
from qcat.encoding.prompt import clean_question
from qcat.errors import ExportError
from qcat.evaluation.proof import spread
from qcat.report.modelfile import chat_template
from qcat.workflows.export_job import Request, Served, made_from

PROVED = 200
"""Held-out questions to prove such an export by: without a cache, the reference is slow."""


def find_unknown(request: Request) -> Located | None:
    """The base, if llama.cpp's converter was named and qcat's own cannot convert it, else None.

    Raises:
        ExportError, ModelError: what is missing or does not go together, by name.
    """
    if request.converter is None:
        return None
    check_tree(request.converter)
    if request.beside or request.merges is not None:
        raise ExportError("--converter goes with neither --beside nor --vocab trim")
    found = locate_unknown(request.adapter, request.base)
    if found and not request.held_out:
        raise ExportError(
            "--converter needs held-out questions, because the proof is all that is known of such "
            "a file: give them with --data"
        )
    return found


def for_proof(request: Request) -> Request:
    """The request with as many of its held-out questions as are proved."""
    return replace(request, held_out=spread(request.held_out, PROVED))


def prepare_whole(full: Path, request: Request, found: Located) -> tuple[WholeJob, Served]:
    """As `qcat.workflows.export_job.prepare_job`, for a base that `find_unknown` found.

    Raises:
        ExportError, ModelError, TaskError: something is missing or does not fit; names it.
    """
    assert request.converter
    tokenizer = tokenizer_of(found.folder, found.tokenizer_folder)
    context, layers = (
        value if isinstance(value := found.config.get(key), int) else None
        for key in ("max_position_embeddings", "num_hidden_layers")
    )
    encoded = encode_task(found.folder, tokenizer, request.task, context)
    adapter = request.adapter
    job = WholeJob(
        tree=request.converter,
        base=found.base,
        folder=found.folder,
        adapter=adapter,
        tokenizer_folder=found.tokenizer_folder,
        target=full,
        precision=request.precision,
        task=encoded.task,
        chat_template=chat_template(encoded.prompt),
        made_from=made_from(
            found.base,
            adapter,
            "lora" if adapter else None,
            fingerprint(found.folder, adapter),
            converter=f"{request.converter.resolve().name}/{SCRIPT}",
            **({"layers": layers, "base_layers": layers} if layers else {}),
        ),
        prefix=list(encoded.prefix),
        trie=encoded.trie,
        held_out=[encoded.rest(example.text) for example in request.held_out],
    )
    texts = (*map(clean_question, AWKWARD), *request.training)
    return job, Served(encoded, tokenizer, compared=texts)
