"""`qcat modelfile`: the Ollama Modelfile of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from qcat.encoding.encoded import EncodedTask
from qcat.errors import BundleError
from qcat.gguf.bundle import Bundle, is_adapter


@click.command()
@click.argument("gguf", metavar="FILE.gguf", type=click.Path(path_type=Path))
def command(gguf: Path) -> None:
    """Print the Modelfile for a GGUF made by `qcat export`, as export writes it beside the file.

    \b
    Example:
      qcat modelfile house.gguf > Modelfile && ollama create house -f Modelfile
    """
    bundle = Bundle.read(gguf)
    if is_adapter(bundle.header):
        raise BundleError(f"{gguf}: is an adapter: `qcat export` wrote its Modelfile beside it")
    from qcat.backends.llama import LlamaModel
    from qcat.report.modelfile import modelfile, parameters

    with LlamaModel(gguf, vocab_only=True) as model:
        encoded = EncodedTask.served(bundle.task, model, str(gguf))
        wanted = parameters(encoded, model)
        text = modelfile(bundle.task, encoded.prompt, gguf=gguf.name, parameters=wanted)
    click.echo(text, nl=False)
