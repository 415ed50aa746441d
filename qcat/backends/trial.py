"""A first try of a model that qcat did not make, in a process of its own.

llama.cpp ends the process on some files, and a check of the header cannot foresee all of them for
every architecture. So such a file is loaded, and one token evaluated, where that does no harm. This
is done once for a file: what passed is remembered in the user's cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp

from qcat import cache
from qcat.backends.llama import Batch, LlamaModel
from qcat.child import run_module
from qcat.errors import ModelError

_FAILED = 3  # exit status: llama.cpp said no, in the line on stderr
_TOKENS = 32
_SECONDS = 600.0


def try_model(path: Path, fingerprint: str) -> None:
    """Load a model and evaluate a token, unless this was done before.

    Args:
        path: of the GGUF.
        fingerprint: of the file.

    Raises:
        ModelError: llama.cpp rejects it, or crashes on it.
    """
    key = f"tried {fingerprint} {llama_cpp.__version__}".encode()
    if cache.load(key) is not None:
        return
    try:
        done = run_module(__name__, os.fsencode(path.absolute()), seconds=_SECONDS)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path}: llama.cpp does not load it in {_SECONDS:g} s") from None
    if done is None:
        return
    said = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == _FAILED:
        raise ModelError(said)
    if done.returncode:
        # A signal, which a shell and Windows tell in a number above 127.
        crashed = done.returncode < 0 or done.returncode > 127
        what = (
            f"crashes on it ({done.returncode})" if crashed else f"cannot be tried ({said[:200]})"
        )
        raise ModelError(
            f"{path}: llama.cpp {llama_cpp.__version__} {what}: the file is damaged, of a kind "
            "that this version cannot run, or too large for the memory"
        )
    cache.save(key, b"1")


def _evaluate(model: LlamaModel) -> None:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = _TOKENS
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model.handle, params)
    if not context:
        raise ModelError(f"{model.path}: llama.cpp cannot run it")
    batch = Batch(1)
    batch.add([model.end], 0, 0, output=True)
    batch.native.n_tokens = 1
    status = llama_cpp.llama_decode(context, batch.native)
    llama_cpp.llama_free(context)
    if status:
        raise ModelError(f"{model.path}: llama.cpp could not evaluate it ({status})")


def main() -> int:
    """Load the file that stdin names, and evaluate a token."""
    try:
        with LlamaModel(Path(os.fsdecode(sys.stdin.buffer.read())), repack=False) as model:
            _evaluate(model)
    except ModelError as error:
        print(error, file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
