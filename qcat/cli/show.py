"""`qcat show`: what a model says of itself, its grammar, its Modelfile."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import click

from qcat.calibration.calibration import Calibration
from qcat.classifier import OLLAMA
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.grammar import grammar
from qcat.errors import BundleError, TaskError
from qcat.gguf.adapter import BASE_KEY
from qcat.gguf.bundle import Bundle, is_adapter
from qcat.gguf.sections import REPORT_KEY, SOURCE_KEY, section
from qcat.opening import read_calibration, read_model
from qcat.report.card import layers_text, vocabulary_line
from qcat.task import Task


@click.command()
@click.argument("source", metavar="MODEL|TASK.toml")
@click.option("--grammar", "as_grammar", is_flag=True, help="The labels as GBNF; of a task too.")
@click.option("--modelfile", "as_modelfile", is_flag=True, help="The Modelfile for Ollama.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def command(source: str, as_grammar: bool, as_modelfile: bool, as_json: bool) -> None:
    """Show the task, the labels, the source, the proof and the confidence that MODEL carries.

    MODEL is a GGUF, the folder of a bundle, or ollama:NAME.

    \b
    Examples:
      qcat show house.gguf
      qcat show task.toml --grammar > labels.gbnf
      qcat show house.gguf --modelfile > Modelfile && ollama create house -f Modelfile
    """
    if as_grammar + as_modelfile + as_json > 1:
        raise click.UsageError("--grammar, --modelfile and --json: give one of them")
    if as_grammar:
        click.echo(_grammar(source), nl=False)
        return
    if source.endswith(".toml"):
        raise click.UsageError("of a task only --grammar can be shown")
    bundle = read_model(source)
    if as_modelfile:
        click.echo(_modelfile(bundle), nl=False)
    else:
        _show(bundle, as_json)


def _grammar(source: str) -> str:
    """The grammar that accepts exactly the task's labels, each after a space."""
    is_model = source.endswith(".gguf") or source.startswith(OLLAMA) or os.path.isdir(source)
    task = read_model(source).task if is_model else Task.read(Path(source))
    if task.verbalizer == "code" and not task.codes:
        raise TaskError(
            f"{source}: codes are chosen for a tokenizer: name the exported model, "
            "or write them under [codes]"
        )
    return grammar(task)


def _modelfile(bundle: Bundle) -> str:
    """The Modelfile as export writes it beside the file."""
    if is_adapter(bundle.header):
        raise BundleError(
            f"{bundle.path}: is an adapter: `qcat export` wrote its Modelfile beside it"
        )
    if str(bundle.path).startswith(OLLAMA):
        raise click.UsageError(
            f"{bundle.path} is on a server: `ollama show --modelfile` prints its Modelfile"
        )
    from qcat.backends.llama import LlamaModel
    from qcat.report.modelfile import modelfile, parameters

    with LlamaModel(bundle.path, vocab_only=True) as model:
        encoded = EncodedTask.served(bundle.task, model, str(bundle.path))
        wanted = parameters(encoded, model)
    return modelfile(bundle.task, encoded.prompt, gguf=bundle.path.name, parameters=wanted)


def _show(bundle: Bundle, as_json: bool) -> None:
    gguf = bundle.path
    metadata, task = bundle.header.metadata, bundle.task
    report = section(bundle.header, REPORT_KEY, gguf)
    known = read_calibration(bundle)
    source = section(bundle.header, SOURCE_KEY, gguf)
    served = str(gguf).startswith(OLLAMA)
    types = Counter(tensor.type for tensor in bundle.header.tensors)
    facts = {
        "file": str(gguf),
        "bytes": None if served else gguf.stat().st_size,
        "architecture": metadata.get("general.architecture"),
        "vocabulary": metadata.get("tokenizer.ggml.tokens"),
        "model": _model(bundle),
        "tensors": dict(types.most_common()),
    }
    if as_json:
        everything = {**facts, "task": task.to_dict(), "source": source, "report": report}
        everything["calibration"] = known.to_dict()
        click.echo(json.dumps(everything, indent=1, ensure_ascii=False))
        return
    rows = _rows(gguf, task, facts, source, report, known)
    for name, value in rows:
        click.echo(f"{name:<12} {value}")
    click.echo("labels")
    for label, description in task.labels.items():
        code = f"{task.codes[label]} = " if task.codes else ""
        click.echo(f"  {code}{label}" + (f": {description}" if description else ""))


def _model(bundle: Bundle) -> str:
    """What kind of file it is."""
    metadata = bundle.header.metadata
    if is_adapter(bundle.header):
        base = section(bundle.header, BASE_KEY, bundle.path).get("path")
        return f"a LoRA adapter beside {base}"
    return f"{metadata.get('tokenizer.ggml.tokens')} tokens in the vocabulary"


def _rows(
    gguf: Path,
    task: Task,
    facts: dict[str, Any],
    source: dict[str, Any],
    report: dict[str, Any],
    known: Calibration,
) -> list[tuple[str, str]]:
    tensors = ", ".join(f"{count} {kind}" for kind, count in facts["tensors"].items())
    size = "" if facts["bytes"] is None else f" ({facts['bytes'] / 1e6:.1f} MB)"
    versions = _field(gguf, source, "versions", kind=dict) if "versions" in source else {}
    rows = [
        ("file", f"{gguf}{size}"),
        ("model", f"{facts['architecture']}, {facts['model']}"),
        *([("tensors", tensors)] if tensors else []),
        (
            "task",
            f"{task.name}: {len(task.labels)} labels, {task.style} style, by {task.verbalizer}",
        ),
        ("source", f"{source.get('base')} with adapter {source.get('adapter')}"),
    ]
    if "layers" in source:
        _check_numbers(gguf, source, "layers", "base_layers")
        rows.append(("layers", layers_text(source)))
    rows.append(("fingerprint", str(source.get("fingerprint"))))
    rows.append(("made with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if "vocabulary" in report:
        found = _field(gguf, report, "vocabulary", kind=dict)
        _check_numbers(gguf, found, "tokens", "of", "merges")
        for part in ("held_out", "training"):
            asked = _field(gguf, found, part, kind=dict)
            _check_numbers(gguf, asked, "split_otherwise", "questions")
        rows.append(("vocabulary", vocabulary_line(found)))
    rows.append(("proof", _proof(gguf, report)))
    rows.append(("confidence", _confidence(known)))
    return rows


def _proof(gguf: Path, report: dict[str, Any]) -> str:
    if not report.get("proof"):
        return "none: no held-out questions were given at export"
    proof = _field(gguf, report, "proof", kind=dict)
    quantized = _field(gguf, proof, "quantized", kind=dict)
    _check_numbers(gguf, proof, "questions")
    _check_numbers(gguf, quantized, "accuracy", "macro_f1", "flips")
    return (
        f"{proof['questions']} held-out questions: accuracy {quantized['accuracy']:.3f}, "
        f"macro-F1 {quantized['macro_f1']:.3f}, {quantized['flips']} flips from the merged model"
    )


def _check_numbers(gguf: Path, data: dict[str, Any], *keys: str) -> None:
    for key in keys:
        _field(gguf, data, key, kind=(int, float))


def _field(gguf: Path, data: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """A field of what export wrote into a file, which may be a stranger's."""
    if not isinstance(data.get(key), kind):
        raise BundleError(
            f"{gguf}: its report or source is not what `qcat export` writes ({key!r}): export it "
            "again"
        )
    return data[key]


def _confidence(known: Calibration) -> str:
    if not known.questions:
        return "not calibrated"
    parts = [f"temperature {known.temperature:.2f}, from {known.questions} questions"]
    if known.label_thresholds:
        parts.append("thresholds by label")
    elif known.threshold is not None:
        parts.append(f"threshold {known.threshold:.4f}")
    if known.promise:
        parts.append(
            f"at most {known.promise.max_error:.1%} of the answers wrong, with "
            f"{known.promise.level:.0%} confidence"
        )
    if not known.gate:
        parts.append("answers what is off-topic too")
    return "; ".join(parts)
