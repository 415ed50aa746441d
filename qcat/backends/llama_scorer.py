"""A task's prefix evaluated in llama.cpp, and logits at the trie's branches for each question."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from qcat import cache
from qcat.backends.forks import Guards, is_fork, new_lock
from qcat.backends.llama import Batch, LlamaModel
from qcat.encoding.scoring import Scores, label_energy, label_mass
from qcat.encoding.trie import Branch, LabelTrie
from qcat.errors import ModelError

MAX_BATCH = 16
"""Questions in one forward pass."""
_FEW = 4
"""Questions, or branches, in one pass of a model that keeps a state for each: megabytes each."""
PASS_TOKENS = 128
"""Tokens in one forward pass, unless one question has more. With more, the weights are read less
often, but each token attends to the cells of all the others: bench/speed.py."""
_MAX_DEEP = 64  # branches below the root in one forward pass
_DEEP_CELLS = 256  # KV cells for them
_FREE_TOKENS = 64  # KV cells for unconstrained generation
_UBATCH = 128  # tokens that llama.cpp computes at once: more costs memory and gains nothing here

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class LlamaScorer:
    """A context with a task's prefix evaluated, which scores questions against a label trie.

    Sequence 0 holds the prefix; questions and branches share its KV cells (`llama_memory_seq_cp`
    on a unified cache copies nothing). One lock makes it safe, not parallel, across threads.

    Args:
        model: the loaded model; it must outlive the scorer.
        prefix: token ids of the prompt up to the question.
        trie: the label language.
        grammar: the same language as GBNF.
        room: the largest number of tokens of one question and the words after it.
        threads: number of threads; a fork of this process computes with one.
        fingerprint: of the model file, and of the adapter file; if given, the evaluated prefix is
            kept in the user's cache folder for later use.
        adapter: a LoRA adapter's GGUF to apply to the weights, checked by
            `qcat.gguf.adapter.check_adapter`.

    Raises:
        ModelError: the context cannot be created, or llama.cpp rejects the grammar.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        prefix: Sequence[int],
        trie: LabelTrie,
        grammar: str,
        room: int,
        threads: int,
        fingerprint: str | None = None,
        adapter: Path | None = None,
    ) -> None:
        self._model, self._trie, self._room = model, trie, room
        self._prefix, self._threads, self._fingerprint = list(prefix), threads, fingerprint
        self._n_prefix = len(prefix)
        self._lock = new_lock(Guards.CONTEXT)  # not the model's, which others may use too
        self._stack, self._context_stack = ExitStack(), ExitStack()
        deep = trie.deep_branches
        paths = [len(branch.path) for branch in deep]
        self._max_batch, self._max_deep = MAX_BATCH, min(_MAX_DEEP, MAX_BATCH * len(deep))
        if model.keeps_state:
            self._max_batch, self._max_deep = _FEW, min(_FEW, self._max_deep)
        self._n_sequences = 1 + self._max_batch + self._max_deep
        self._deep_cells = max(min(_DEEP_CELLS, MAX_BATCH * sum(paths)), *paths, 0)
        self._most_tokens = room + _FREE_TOKENS
        cells = self._cells(self._most_tokens)
        if cells > model.n_ctx_train:
            raise ModelError(
                f"{model.path}: the prompt needs {cells} tokens, the model has room for "
                f"{model.n_ctx_train}: shorten the labels' descriptions"
            )
        self._batch = Batch(cells)
        self._accepted: dict[int, bool] = {}
        try:
            with self._lock:
                self._load(grammar, adapter)
        except BaseException:
            self.close()
            raise

    def _load(self, grammar: str, adapter: Path | None) -> None:
        model = self._model
        self._grammar = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if not self._grammar:
            raise ModelError(f"{model.path}: llama.cpp refuses the labels' grammar")
        self._stack.callback(llama_cpp.llama_sampler_free, self._grammar)
        self._adapter = None
        if adapter:
            self._adapter = model.load_adapter(adapter)
            self._stack.callback(llama_cpp.llama_adapter_lora_free, self._adapter)
        self._begin(min(PASS_TOKENS, self._most_tokens))

    def _cells(self, tokens: int) -> int:
        """KV cells for the prefix, this many question tokens, and the branches after them."""
        return self._n_prefix + tokens + self._deep_cells

    def _begin(self, tokens: int) -> None:
        """Create a context with room for this many tokens, replacing a smaller one."""
        self._context = None  # even if there is not enough memory for another
        self._context_stack.close()
        cells = self._cells(tokens)
        self._context = self._open_context(cells, self._n_sequences, self._threads)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._n_tokens = tokens
        self._put_prefix()

    def _open_context(self, cells: int, n_sequences: int, threads: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = cells
        params.n_ubatch = min(_UBATCH, cells)
        params.n_seq_max = n_sequences
        params.n_outputs_max = n_sequences
        params.kv_unified = True
        # On the CPU flash attention adds in float16: its noise affects the third digit of a
        # probability.
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model.handle, params)
        if not context:
            raise ModelError(
                f"{self._model.path}: not enough memory for a context of {cells} tokens"
            )
        self._context_stack.callback(llama_cpp.llama_free, context)
        if self._adapter:
            one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            if llama_cpp.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(1.0)):
                raise ModelError(f"{self._model.path}: llama.cpp cannot use the adapter")
        return context

    def _put_prefix(self) -> None:
        """Fill sequence 0: from the cache folder in milliseconds, else by evaluating the tokens."""
        prefix, fingerprint = self._prefix, self._fingerprint
        settings = (
            llama_cpp.__version__,
            llama_cpp.llama_print_system_info(),  # compilation options change the last digits
            llama_cpp.llama_n_ubatch(self._context),
            self._model.repacked,  # other instructions change the last digits
            prefix,
        )
        key = f"prefix {fingerprint} {settings}".encode()
        if fingerprint and self._restore(cache.load(key), len(prefix)):
            return
        self._batch.add(prefix, 0, 0, output=False)
        self._decode()
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        if fingerprint and size <= cache.MAX_CONTENT:
            state = (ctypes.c_uint8 * size)()
            if llama_cpp.llama_state_seq_get_data(self._context, state, size, 0) == size:
                cache.save(key, memoryview(state).cast("B"))

    def _restore(self, saved: memoryview | None, n_prefix: int) -> bool:
        if saved is None:
            return False
        state = (ctypes.c_uint8 * len(saved)).from_buffer(saved)
        used = llama_cpp.llama_state_seq_set_data(self._context, state, len(saved), 0)
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, 0)
        if used == len(saved) and last == n_prefix - 1:
            return True
        llama_cpp.llama_memory_seq_rm(self._memory, 0, -1, -1)
        return False

    def score(self, rests: Sequence[Sequence[int]]) -> Iterator[Scores]:
        """Logits at every branch, for each question in turn.

        Questions share a forward pass, up to `MAX_BATCH` of them (fewer if the model keeps a state
        for each) and `PASS_TOKENS` tokens; a
        longer question gets its own pass. A pass is run when its first result is requested, so
        abandoning the iterator early costs nothing more.

        Args:
            rests: for each question the token ids after the prefix, at most `room` of them.
        """
        group: list[Sequence[int]] = []
        size = 0
        for rest in rests:
            if len(rest) > self._room:
                raise ModelError(f"a question of {len(rest)} tokens, room for {self._room}")
            if group and (len(group) == self._max_batch or size + len(rest) > PASS_TOKENS):
                yield from self._score_group(group)
                group, size = [], 0
            group.append(rest)
            size += len(rest)
        if group:
            yield from self._score_group(group)

    def _make_room(self, tokens: int) -> None:
        """Make room for this many tokens; the initial context suits usual questions."""
        if tokens > self._n_tokens:
            self._begin(self._most_tokens)

    def _score_group(self, group: list[Sequence[int]]) -> list[Scores]:
        with self._lock:
            self._check_open()
            self._make_room(sum(map(len, group)))
            try:
                ends = [
                    self._extend(0, 1 + number, self._n_prefix, rest)
                    for number, rest in enumerate(group)
                ]
                self._decode()
                found: list[Scores] = []
                for at in ends:
                    row = self._row(at)
                    root = self._trie.root_branch
                    logits = [self._finite(row[root.tokens])] if root else []
                    first = self._trie.first_tokens
                    found.append(Scores(logits, label_mass(row, first), label_energy(row, first)))
                self._score_deep(group, found)
            finally:
                self._forget()
            return found

    def _score_deep(self, group: list[Sequence[int]], found: list[Scores]) -> None:
        """Evaluate the branches below the root for all questions, as many at once as fit."""
        jobs = (
            (number, branch) for number in range(len(group)) for branch in self._trie.deep_branches
        )
        for chunk in self._deep_chunks(jobs):
            rows = [
                self._extend(
                    1 + number,
                    1 + self._max_batch + slot,
                    self._n_prefix + len(group[number]),
                    branch.path,
                )
                for slot, (number, branch) in enumerate(chunk)
            ]
            self._decode()
            for at, (number, branch) in zip(rows, chunk, strict=True):
                found[number].logits.append(self._finite(self._row(at)[branch.tokens]))
            for slot in range(len(chunk)):
                llama_cpp.llama_memory_seq_rm(self._memory, 1 + self._max_batch + slot, -1, -1)

    def _deep_chunks(
        self, jobs: Iterator[tuple[int, Branch]]
    ) -> Iterator[list[tuple[int, Branch]]]:
        waiting = next(jobs, None)
        while waiting is not None:
            chunk: list[tuple[int, Branch]] = []
            cells = self._deep_cells
            while waiting and len(chunk) < self._max_deep and len(waiting[1].path) <= cells:
                chunk.append(waiting)
                cells -= len(waiting[1].path)
                waiting = next(jobs, None)
            yield chunk

    def accepts(self, label: int) -> bool:
        """Whether llama.cpp's own grammar sampler accepts a label, token by token.

        At every step the sampler masks only the trie's candidates. The result is the same as over
        the whole vocabulary, without its cost. It is computed once per label.
        """
        if label not in self._accepted:
            self._accepted[label] = self._ask_grammar(label)
        return self._accepted[label]

    def _ask_grammar(self, label: int) -> bool:
        with self._lock:
            self._check_open()
            sampler = llama_cpp.llama_sampler_clone(self._grammar)
            try:
                sequence = self._trie.sequences[label]
                for depth in range(len(sequence) + 1):
                    token = sequence[depth] if depth < len(sequence) else self._trie.end
                    if token not in self._allowed(sampler, self._trie.children[sequence[:depth]]):
                        return False
                    llama_cpp.llama_sampler_accept(sampler, token)
            finally:
                llama_cpp.llama_sampler_free(sampler)
            return True

    def spells(self, _ids: Sequence[int]) -> bool:
        """Whether the model receives exactly these token ids: always true here."""
        return True

    @staticmethod
    def _allowed(sampler: Any, candidates: Sequence[int]) -> npt.NDArray[np.int32]:
        data = np.zeros(len(candidates), _CANDIDATE)
        data["id"] = candidates
        array = llama_cpp.llama_token_data_array(
            data=data.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        return np.asarray(data["id"][np.isfinite(data["logit"])])

    def generate(self, rest: Sequence[int], limit: int) -> str:
        """The model's unconstrained answer, decoded greedily, up to `limit` tokens."""
        limit = min(limit, _FREE_TOKENS)
        with self._lock:
            self._check_open()
            self._make_room(len(rest) + limit)
            said: list[int] = []
            try:
                at = self._extend(0, 1, self._n_prefix, rest)
                position = self._n_prefix + len(rest)
                for _ in range(limit):
                    self._decode()
                    token = int(self._row(at).argmax())
                    if self._model.ends(token):
                        break
                    said.append(token)
                    at = self._batch.add([token], position, 1, output=True)
                    position += 1
            finally:
                self._forget()
            return self._model.decode(said)

    def _extend(self, source: int, target: int, position: int, tokens: Sequence[int]) -> int:
        """Let sequence `target` share `source`, add tokens to it; return the last one's index."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        return self._batch.add(tokens, position, target, output=True)

    def _decode(self) -> None:
        self._batch.native.n_tokens = self._batch.size
        self._batch.size = 0
        if is_fork():
            llama_cpp.llama_set_n_threads(self._context, 1, 1)
        status = llama_cpp.llama_decode(self._context, self._batch.native)
        if status:
            raise ModelError(f"{self._model.path}: llama.cpp could not evaluate it ({status})")

    def _row(self, at: int) -> npt.NDArray[np.float32]:
        """Logits of the whole vocabulary at a batch index: a view, valid until the next decode."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, at)
        row = np.ctypeslib.as_array(pointer, (self._model.n_vocab,))
        self._finite(row.max())  # which propagates a NaN from anywhere in the row
        return row

    def _finite(self, values: Any) -> Any:
        if not np.isfinite(values).all():
            raise ModelError(
                f"{self._model.path}: the model answers no numbers: its weights are bad"
            )
        return values

    def _forget(self) -> None:
        """Drop every sequence except the prefix, and clear the batch."""
        self._batch.size = 0
        llama_cpp.llama_memory_seq_keep(self._memory, 0)

    def _check_open(self) -> None:
        if self._context is None:
            raise ModelError(f"{self._model.path}: the classifier is closed: open it again")

    def close(self) -> None:
        """Free the context. May be called more than once."""
        with self._lock:
            self._context_stack.close()
            self._stack.close()
            self._context = None
