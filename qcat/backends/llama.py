"""llama.cpp in this process: its log, a model's tokens and weights, and models that are shared.

The low-level interface is used because the high-level one keeps every position's logits and sorts
the vocabulary in Python. Every handle is paired with its free function where it is acquired.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import llama_cpp
import numpy as np

from qcat.backends.forks import Guards, new_lock, opening
from qcat.errors import ModelError

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUES = 3, 4, 5  # ggml_log_level in ggml.h

_log_lines: list[str] = []
_log_level = 0
_verbose = False


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _data: object) -> None:
    global _log_level
    if _verbose:
        os.write(2, text)
    if level != _LOG_CONTINUES:
        _log_level = level
    if _log_level in (_LOG_WARN, _LOG_ERROR):
        _log_lines.append(text.decode("utf-8", "replace"))
        del _log_lines[:-10_000]


def capture_log(*, verbose: bool | None = None) -> list[str]:
    """Keep llama.cpp's messages off the terminal unless `verbose`; return its last warnings.

    With None, messages go where they went before.

    llama.cpp has one logger per process: this replaces it for other users of llama_cpp as well.
    """
    global _verbose
    _verbose = _verbose if verbose is None else verbose
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    _log_lines.clear()
    return _log_lines


def repacks() -> bool:
    """Whether llama.cpp can safely repack weights here.

    If it was compiled for a processor with AMX, it repacks for AMX first, which cannot be disabled
    separately at run time. GCC drops the stores to the tile configuration that is then loaded, and
    the process crashes: https://github.com/ggml-org/llama.cpp/issues/20824 and pull request 26954.
    """
    return b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()


class LlamaModel:
    """One GGUF opened in llama.cpp: its vocabulary and, unless `vocab_only`, its weights.

    The file must have passed `qcat.gguf.check.check_model`, because llama.cpp can abort on others.

    Args:
        path: path of the file.
        vocab_only: do not load the weights.
        repack: repack the weights for the processor's widest instructions. Without it the file's
            own pages are used directly: the model loads faster, but each question takes longer.
            No effect if `repacks` is false.
        verbose: let llama.cpp write its log to stderr.

    Raises:
        ModelError: if llama.cpp rejects the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        vocab_only: bool = False,
        repack: bool = True,
        verbose: bool = False,
    ) -> None:
        log = capture_log(verbose=verbose)
        self.path, self.repacked = path, repack and repacks()
        self.lock = new_lock(Guards.MODEL)  # of everything that a `close` elsewhere would break
        self._stack = ExitStack()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        params.use_extra_bufts = self.repacked
        # Repacked weights are read in full: if also mapped, they would be in memory twice.
        none, mapped = llama_cpp.LLAMA_LOAD_MODE_NONE, llama_cpp.LLAMA_LOAD_MODE_MMAP
        params.load_mode = none if self.repacked else mapped
        with opening:
            self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            reason = next((line for line in log if ":" in line), "no reason given")
            reason = " ".join(reason.split())[:200]
            raise ModelError(f"{path}: llama.cpp cannot load it ({reason}): export it again")
        self._stack.callback(llama_cpp.llama_model_free, self.handle)
        self._vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self.handle)
        self.end: int = llama_cpp.llama_vocab_eos(self._vocab)
        turn = llama_cpp.llama_vocab_eot(self._vocab)
        self.turn_end: int = turn if turn >= 0 else self.end
        """What ends a turn of a chat, which may be another token than the end of a text."""
        self.keeps_state = bool(
            llama_cpp.llama_model_is_recurrent(self.handle)
            or llama_cpp.llama_model_is_hybrid(self.handle)
        )
        """Whether it sums up what it has read in a state, beside or instead of attention."""
        bos = llama_cpp.llama_vocab_bos(self._vocab)
        self.bos = self.decode([bos]) if bos >= 0 else None
        """The token that begins a text, if there is one, as text."""
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        """Whether the model expects it, by its file."""
        sentencepiece = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_SPM
        self.begin = self.bos if sentencepiece else None
        if not 0 <= self.end < self.n_vocab:
            self.close()
            raise ModelError(f"{path}: the vocabulary has no end token: export it again")

    @property
    def vocab(self) -> Any:
        """The native vocabulary handle. Raises ModelError after `close`."""
        if self.handle is None:
            raise ModelError(f"{self.path}: the model is closed: open it again")
        return self._vocab

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, without a begin or end token."""
        data = text.encode()
        room = len(data) + 1  # a token holds at least one byte
        ids = (llama_cpp.llama_token * room)()
        with self.lock:
            count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, False, special)
        if count < 0:
            raise ModelError(f"{self.path}: llama.cpp cannot tokenize {text[:40]!r}")
        return ids[:count]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens shown; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.piece(token) for token in ids).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """The bytes that one token stands for."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            with self.lock:
                count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, room, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def ends(self, token: int) -> bool:
        """Whether a token ends the answer."""
        with self.lock:
            return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def load_adapter(self, path: Path) -> Any:
        """The native handle of a LoRA adapter, to be freed before the model.

        Args:
            path: of the adapter's GGUF, checked by `qcat.gguf.adapter.check_adapter`.

        Raises:
            ModelError: llama.cpp rejects it.
        """
        log = capture_log()
        adapter = llama_cpp.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not adapter:
            reason = next((line for line in reversed(log) if "fail" in line), "no reason given")
            raise ModelError(
                f"{path}: llama.cpp cannot use it beside {self.path} "
                f"({' '.join(reason.split())[:200]}): export it again"
            )
        return adapter

    def close(self) -> None:
        """Free the model. May be called more than once."""
        with self.lock:
            self._stack.close()
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Shared:
    """A model that one or more classifiers of this process have open."""

    model: LlamaModel
    users: int = 0


_shared: dict[tuple[str, int, bool], _Shared] = {}


@contextmanager
def shared_model(path: Path, *, repack: bool, verbose: bool) -> Iterator[LlamaModel]:
    """A `LlamaModel` that is in memory once per process, however many tasks use it.

    It is freed when its last user closes it. Raises the errors of `LlamaModel`.
    """
    key = (os.path.realpath(path), os.stat(path).st_mtime_ns, repack and repacks())
    with opening:
        if key not in _shared:
            _shared[key] = _Shared(LlamaModel(path, repack=repack, verbose=verbose))
        shared = _shared[key]
        shared.users += 1
    try:
        yield shared.model
    finally:
        with opening:
            shared.users -= 1
            if not shared.users:
                del _shared[key]
                shared.model.close()


class Batch:
    """A `llama_batch` over our own arrays, made once: each token belongs to one sequence."""

    def __init__(self, room: int) -> None:
        self.size = 0
        self._tokens, self._positions, self._sequences = np.zeros((3, room), np.int32)
        self._outputs = np.zeros(room, np.int8)
        self._counts = np.ones(room, np.int32)
        # one pointer a token, to its place in the array of sequences
        places = self._sequences.ctypes.data + self._sequences.itemsize * np.arange(room)
        self._pointers = places.astype(np.uintp)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.native = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(int32),
            pos=self._positions.ctypes.data_as(int32),
            n_seq_id=self._counts.ctypes.data_as(int32),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def add(self, tokens: Sequence[int], position: int, sequence: int, *, output: bool) -> int:
        """Add a sequence's next tokens, from a position on; return the index of the last one.

        Args:
            output: whether the logits after the last one are wanted.
        """
        start, end = self.size, self.size + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = range(position, position + len(tokens))
        self._sequences[start:end] = sequence
        self._outputs[start:end] = False
        self._outputs[end - 1] = output
        self.size = end
        return end - 1
