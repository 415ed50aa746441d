"""Damaged, cut, crafted and misplaced files: one line that names the file, never a crash or a hang.

llama.cpp aborts the process on some of them, so they are opened in another process: this file run
as a script takes one case a line and prints what came of it. A case that kills its process has
that as its outcome; the cases after it go on in a new one.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from apart_cases import run_apart
from conftest import EXAMPLE

from qcat import BundleError, Classifier, QcatError, Task
from qcat.classifier import DEFAULT_MODEL
from qcat.gguf.header import read_header
from qcat.gguf.sections import TASK_KEY

QUESTION = "When was the pool pump replaced?"
TOKENS = "tokenizer.ggml.tokens"
U32, I32, F32, STRING, ARRAY, U64 = 4, 5, 6, 8, 9, 10  # GGUF value types
MOST = 2**64 - 1


def main(house: Path, scratch: Path) -> None:
    """The script: opens the file of each case and asks one question."""
    whole = house.read_bytes()
    for line in sys.stdin:
        case = json.loads(line)
        path = scratch
        if "cut" in case:
            path.write_bytes(whole[: case["cut"]])
        elif "flip" in case:
            at, bits = case["flip"]
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
        else:
            path = Path(case["open"])
        outcome: dict[str, Any]
        try:
            # One thread: more of them spin, and suffer from whatever else the machine does.
            with Classifier.open(path, threads=1) as classifier:
                answer = classifier.ask(QUESTION)
                outcome = {
                    "label": answer.label,
                    "known": answer.label in classifier.task.labels,
                    "sum": sum(answer.probabilities.values()),
                    "mass": answer.label_mass,
                }
        except QcatError as error:
            outcome = {"error": type(error).__name__, "message": str(error), "path": str(path)}
        print(json.dumps(outcome), flush=True)


def complaint(outcome: dict[str, Any], *, may_open: bool = False) -> str:
    """What is wrong with an outcome; empty if nothing is."""
    if "died" in outcome:
        return f"the process died, {outcome['died']}"
    if "error" in outcome:
        message, path = outcome["message"], outcome["path"]
        if path not in message:
            return f"the message does not name the file: {message!r}"
        rest = message.replace(path, "")
        if not rest.isprintable() or len(rest) > 1000:
            return f"the message is not one short printable line: {message!r}"
        return ""
    if not may_open:
        return f"it opens: {outcome}"
    # A NaN fails every comparison.
    if not (outcome["known"] and abs(outcome["sum"] - 1) < 1e-6 and 0 <= outcome["mass"] <= 1):
        return f"it answers nonsense: {outcome}"
    return ""


def complaints(
    cases: Sequence[object], outcomes: Sequence[dict[str, Any]], *, may_open: bool = False
) -> list[str]:
    """One line for each case with a complaint."""
    return [
        f"case {number} {case}: {wrong}"
        for number, (case, outcome) in enumerate(zip(cases, outcomes, strict=True))
        if (wrong := complaint(outcome, may_open=may_open))
    ]


# How files are crafted


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def typed_string(text: str | bytes) -> bytes:
    return struct.pack("<I", STRING) + string(text)


def typed_u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def typed_f32(value: float) -> bytes:
    return struct.pack("<If", F32, value)


def typed_array(kind: int, items: Sequence[bytes] = (), count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count)
    return head + b"".join(items)


def tensor(
    name: bytes = b"token_embd.weight",
    shape: Sequence[int] = (64, 64),
    kind: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    """An entry of the tensor table."""
    dims = struct.pack("<I", len(shape) if n_dims is None else n_dims)
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return string(name) + dims + sizes + struct.pack("<IQ", kind, offset)


def only_metadata(*pairs: bytes, count: int | None = None) -> bytes:
    """A GGUF without tensors that claims `count` pairs of metadata."""
    head = struct.pack("<IQQ", 3, 0, len(pairs) if count is None else count)
    return b"GGUF" + head + b"".join(pairs)


@cache
def pairs_of(path: Path) -> dict[str, bytes | None]:
    """The metadata of a GGUF: for each key its type and value, as the bytes that they are."""
    from gguf import GGUFReader

    return {
        name: b"".join(part.tobytes() for part in field.parts[2:])
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


@cache
def tokens_of(path: Path) -> tuple[bytes, ...]:
    """The vocabulary of a GGUF."""
    from gguf import GGUFReader

    field = GGUFReader(path).fields[TOKENS]
    return tuple(field.parts[index].tobytes() for index in field.data)


def rebuilt(
    path: Path,
    *,
    pairs: dict[str, bytes | None] | None = None,
    tokens: Callable[[list[bytes]], object] | None = None,
    task: dict[str, Any] | None = None,
    more_pairs: int = 0,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    table: bytes | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF with something changed.

    Args:
        path: the GGUF to start from.
        pairs: metadata to add or replace; None drops a key.
        tokens: called with the vocabulary, which it changes.
        task: keys of the task to add or replace; None drops one.
        more_pairs: claimed beyond those there.
        n_pairs: claimed in their place.
        n_tensors: claimed; by default 1 with a `table`, else as many as there were.
        table: the bytes of another tensor table.
        version: of the format.
        alignment: of the tensor data.
    """
    header, whole = read_header(path), path.read_bytes()
    kept = pairs_of(path) | (pairs or {})
    if tokens:
        words = list(tokens_of(path))
        tokens(words)
        kept[TOKENS] = typed_array(STRING, [string(word) for word in words])
    if task:
        data = json.loads(header.metadata[TASK_KEY]) | task
        data = {key: value for key, value in data.items() if value is not None}
        kept[TASK_KEY] = typed_string(json.dumps(data))
    packed = [string(key) + value for key, value in kept.items() if value is not None]
    if n_pairs is None:
        n_pairs = len(packed) + more_pairs
    if n_tensors is None:
        n_tensors = 1 if table else len(header.tensors)
    if table is None:
        table = whole[header.metadata_end : header.table_end]
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs)
    made = head + b"".join(packed) + table
    made += b"\0" * (-len(made) % alignment)
    return made + whole[header.data_start :]


def drop_letters(tokens: list[bytes]) -> None:
    """Leave a vocabulary without the token of a single `z` or `Z`, and whatever holds one."""
    for number, token in enumerate(tokens):
        if b"z" in token.lower():
            tokens[number] = b"[NONE%d]" % number


# The files: by name their bytes, or what `rebuilt` is to change. None of them may open.

NO_GGUF: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"G",
    "the magic alone": b"GGUF",
    "another magic": b"gguf" + bytes(1000),
    "a zip archive": b"PK\x03\x04" + bytes(1000),
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zeros": bytes(10_000),
    "random bytes": random.Random(1).randbytes(100_000),
    "random bytes after the magic": b"GGUF" + random.Random(2).randbytes(100_000),
    "random bytes after the version": b"GGUF\3\0\0\0" + random.Random(3).randbytes(100_000),
    "2**63 pairs, none there": only_metadata(count=2**63),
    "a key of 2**64 - 1 bytes": only_metadata(struct.pack("<Q", MOST) + b"key"),
    "a key of 2**63 bytes": only_metadata(struct.pack("<Q", 2**63) + b"key"),
    "a key of 2**64 - 8 bytes": only_metadata(struct.pack("<Q", 2**64 - 8) + b"key"),
    "a key that is not UTF-8": only_metadata(string(b"\xff\xfe") + typed_u32(1)),
    "a string of 2**64 - 1 bytes": only_metadata(string("key") + struct.pack("<IQ", STRING, MOST)),
    "a value of type 13": only_metadata(string("key") + struct.pack("<II", 13, 0)),
    "a value of type 2**32 - 1": only_metadata(string("key") + struct.pack("<II", 2**32 - 1, 0)),
    "no tensors": only_metadata(string("key") + typed_u32(1)),
}

CHANGED: dict[str, dict[str, Any]] = {
    # the first bytes
    "version 0": {"version": 0},
    "version 1": {"version": 1},
    "version 4": {"version": 4},
    "version 2**32 - 1": {"version": 2**32 - 1},
    "big endian": {"version": 3 << 24},
    "no pairs": {"n_pairs": 0},
    "one pair too few": {"more_pairs": -1},
    "one pair too many": {"more_pairs": 1},
    "2**63 pairs": {"n_pairs": 2**63},
    "2**64 - 1 pairs": {"n_pairs": MOST},
    "one tensor too few": {"n_tensors": 23},
    "one tensor too many": {"n_tensors": 25},
    "2**63 tensors": {"n_tensors": 2**63},
    "2**64 - 1 tensors": {"n_tensors": MOST},
    # the tensor table
    "a tensor of no dimensions": {"table": tensor(n_dims=0)},
    "a tensor of 5 dimensions": {"table": tensor(shape=[2] * 5)},
    "a tensor of 2**32 - 1 dimensions": {"table": tensor(n_dims=2**32 - 1)},
    "an empty tensor": {"table": tensor(shape=(0, 64))},
    "a tensor larger than memory": {"table": tensor(shape=(2**63, 2**63))},
    "a tensor whose size wraps around": {"table": tensor(shape=(2**32, 2**32, 2**32, 4))},
    "a tensor beyond the end": {"table": tensor(offset=2**40)},
    "a tensor at 2**64 - 32": {"table": tensor(offset=2**64 - 32)},
    "a tensor off the alignment": {"table": tensor(offset=1)},
    "a tensor name of 2**64 - 1 bytes": {"table": struct.pack("<Q", MOST) + b"name"},
    "a tensor name that is not UTF-8": {"table": tensor(name=b"\xff")},
    "a tensor name with line breaks": {"table": tensor(name=b"one\ntwo\x1b[31m", n_dims=0)},
    "a tensor name longer than ggml's": {"table": tensor(name=b"n" * 200, shape=(64,))},
    "a damaged tensor with a very long name": {"table": tensor(name=b"n" * 9000, n_dims=0)},
    "a tensor twice": {"table": tensor() * 2, "n_tensors": 2},
    "a tensor that no model has": {"table": tensor(name=b"something.else")},
    **{
        f"a tensor of type {kind}": {"table": tensor(kind=kind)}
        for kind in (4, 5, 31, 64, 2**31, 2**32 - 1)
    },
    # metadata in general
    "an array of arrays": {"pairs": {"key": typed_array(ARRAY, [typed_array(U32)[4:]])}},
    "an array of unknown things": {"pairs": {"key": typed_array(77, [bytes(8)])}},
    "an array of 2**64 - 1 numbers": {"pairs": {"key": typed_array(U32, count=MOST)}},
    "an array of 2**61 long numbers": {"pairs": {"key": typed_array(U64, count=2**61)}},
    "an array of 2**64 - 1 strings": {"pairs": {"key": typed_array(STRING, count=MOST)}},
    "an array with a string of 2**64 - 1 bytes": {
        "pairs": {"key": typed_array(STRING, [struct.pack("<Q", MOST)])}
    },
    "an array whose lengths wrap around": {
        "pairs": {"key": typed_array(STRING, [struct.pack("<Q", 2**64 - 8)] * 9)}
    },
    "a key twice": {
        "pairs": {"key": typed_u32(1) + string("key") + typed_u32(1)}, "more_pairs": 1,
    },
    **{
        f"alignment {value}": {"pairs": {"general.alignment": typed_u32(value)}}
        for value in (0, 1, 7, 24, 96, 2**31, 2**32 - 1)
    },
    "alignment 8": {"pairs": {"general.alignment": typed_u32(8)}, "alignment": 8},
    "alignment as text": {"pairs": {"general.alignment": typed_string("3\n2")}},
    "alignment as an array": {"pairs": {"general.alignment": typed_array(U32, [bytes(4)] * 32)}},
    "alignment as a long number": {
        "pairs": {"general.alignment": struct.pack("<IQ", U64, 32)}
    },
    # the model
    "no architecture": {"pairs": {"general.architecture": None}},
    "an unknown architecture": {"pairs": {"general.architecture": typed_string("qwen\n33")}},
    "another architecture": {"pairs": {"general.architecture": typed_string("gemma2")}},
    "an architecture that is a number": {"pairs": {"general.architecture": typed_u32(3)}},
    "no context length": {"pairs": {"qwen3.context_length": None}},
    "context length 0": {"pairs": {"qwen3.context_length": typed_u32(0)}},
    "context length 100": {"pairs": {"qwen3.context_length": typed_u32(100)}},
    "no embedding": {"pairs": {"qwen3.embedding_length": typed_u32(0)}},
    "no heads": {"pairs": {"qwen3.attention.head_count": typed_u32(0)}},
    "no KV heads": {"pairs": {"qwen3.attention.head_count_kv": typed_u32(0)}},
    **{
        f"{value} layers": {"pairs": {"qwen3.block_count": typed_u32(value)}}
        for value in (0, 1, 3, 513, 2**31, 2**32 - 1)
    },
    **{
        f"epsilon {value}": {
            "pairs": {"qwen3.attention.layer_norm_rms_epsilon": typed_f32(value)}
        }
        for value in (-1.0, float("nan"))
    },
    "a rotation of another width than the heads": {
        "pairs": {"qwen3.rope.dimension_count": typed_u32(64)}
    },
    "values of another width than the keys": {
        "pairs": {"qwen3.attention.value_length": typed_u32(64)}
    },
    "an unknown rope scaling": {"pairs": {"qwen3.rope.scaling.type": typed_string("x")}},
    "experts": {"pairs": {"qwen3.expert_count": typed_u32(2)}},
    "experts in use": {"pairs": {"qwen3.expert_used_count": typed_u32(2)}},
    "groups of experts": {"pairs": {"qwen3.expert_group_count": typed_u32(2)}},
    "layers that predict ahead": {"pairs": {"qwen3.nextn_predict_layers": typed_u32(3)}},
    # the vocabulary
    "no tokens": {"pairs": {TOKENS: None}},
    "an empty vocabulary": {"tokens": list.clear},
    "one token too few": {"tokens": list.pop},
    "one token too many": {"tokens": lambda tokens: tokens.append(b"more")},
    "one token twice": {"tokens": lambda tokens: tokens.__setitem__(7, tokens[8])},
    "an empty token": {"tokens": lambda tokens: tokens.__setitem__(7, b"")},
    "one token twice up to a NUL": {
        "tokens": lambda tokens: tokens.__setitem__(7, tokens[8] + b"\0more")
    },
    "tokens that are numbers": {"pairs": {TOKENS: typed_array(U32, [bytes(4)] * 2176)}},
    "tokens that are long numbers": {
        "pairs": {TOKENS: typed_array(U64, [struct.pack("<Q", MOST)] * 2176)}
    },
    "one token twice, and a key that denies it": {
        "tokens": lambda tokens: tokens.__setitem__(7, tokens[8]),
        "pairs": {f"{TOKENS}: distinct": typed_u32(2176)},
    },
    "tokens that are one number": {"pairs": {TOKENS: typed_u32(2176)}},
    "too few token types": {
        "pairs": {"tokenizer.ggml.token_type": typed_array(I32, [b"\1\0\0\0"] * 3)}
    },
    "token types that are strings": {
        "pairs": {"tokenizer.ggml.token_type": typed_array(STRING, [string("a")] * 2176)}
    },
    "no merges": {"pairs": {"tokenizer.ggml.merges": None}},
    "merges that are numbers": {
        "pairs": {"tokenizer.ggml.merges": typed_array(U32, [bytes(4)] * 3)}
    },
    "no kind of tokenizer": {"pairs": {"tokenizer.ggml.model": None}},
    **{
        f"a tokenizer of kind {kind!r}": {"pairs": {"tokenizer.ggml.model": typed_string(kind)}}
        for kind in ("", "none", "bert", "t5", "llama", "rwkv", "test")
    },
    "an unknown pre-tokenizer": {"pairs": {"tokenizer.ggml.pre": typed_string("qwen\n2")}},
    "a label that the vocabulary cannot spell": {
        "tokens": drop_letters, "task": {"labels": {"zoo": "", "pool": ""}},
    },
    # the task
    "no task": {"pairs": {TASK_KEY: None}},
    "a task that is a number": {"pairs": {TASK_KEY: typed_u32(5)}},
    "a task that is an array": {"pairs": {TASK_KEY: typed_array(STRING, [string("{}")] * 3)}},
    **{
        f"a task that reads {text[:20]!r}": {"pairs": {TASK_KEY: typed_string(text)}}
        for text in (
            b"", b"{", b"nothing", b"null", b"[]", b"1", b'"text"', b"{}", b"\xff\xfe{}", b"\0",
            b"NaN", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000,
        )
    },
    **{
        f"a task with {key[:30]} {json.dumps(value)[:30]}": {"task": {key: value}}
        for key, values in {
            "name": (None, 1, [], {}, "", "a/b", "A", "a" * 65, "a\n"),
            "labels": (
                None, 1, "text", [], ["a", "b"], {}, {"a": ""}, {"a": 1, "b": 2},
                {"a": None, "b": None}, {"a": [], "b": []}, {"a": "", "A": ""},
                {"a": "", "": ""}, {"a": "", "b\nc": ""}, {"a": "", "\ud800": ""},
                {"a": "", "\0": ""}, {"a": "", "b" * 201: ""},
                {f"label {number}": "" for number in range(501)},
                {f"label {number} {'word ' * 38}": "" for number in range(300)},  # too long
            ),
            "instruction": (1, [], {}, "", False, "\ud800", "a\0b", "word " * 9000),
            "question": (1, [], "", "a\nb", "\x1b"),
            "answer": (1, {}, "a\u2028b", "word " * 300),
            "style": (1, [], {}, "", "Chat"),
            "verbalizer": (1, [], "", "codes", "code"),
            "review": (1, [], "", True, "/etc/passwd"),
            "codes": (1, "text", ["AA"], {"pool": "AA"}, {"pool": 1}, {"no label": "AA"}),
            "more": (1, "text", {"a": {}}),
            "m\n" + "m" * 2000: (1,),
        }.items()
        for value in values
    },
}  # fmt: skip


def crafted(house: Path, name: str) -> bytes:
    return NO_GGUF[name] if name in NO_GGUF else rebuilt(house, **CHANGED[name])


@pytest.fixture(scope="module")
def apart(
    house: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[object]], list[Any]]:
    """Outcomes of cases, opened in another process."""
    scratch = tmp_path_factory.mktemp("hostile") / "scratch.gguf"
    return lambda cases: run_apart(__file__, [house, scratch], cases)


@pytest.fixture(scope="module")
def outcomes(
    house: Path,
    apart: Callable[[Sequence[object]], list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The outcome of every crafted file, by its name."""
    folder = tmp_path_factory.mktemp("crafted")
    cases = []
    for number, name in enumerate((*NO_GGUF, *CHANGED)):
        path = folder / f"{number}.gguf"
        path.write_bytes(crafted(house, name))
        cases.append({"open": str(path)})
    return dict(zip((*NO_GGUF, *CHANGED), apart(cases), strict=True))


def test_what_is_crafted_differs_only_where_it_is_meant_to(house, apart, tmp_path):
    path = tmp_path / "same.gguf"
    path.write_bytes(rebuilt(house))
    assert path.read_bytes() == house.read_bytes()
    path.write_bytes(rebuilt(house, pairs={"key": typed_u32(1)}, task={"answer": "Kind"}))
    cases = [{"open": str(path)}]
    found = apart(cases)
    assert not complaints(cases, found, may_open=True)
    assert found[0]["known"]


@pytest.mark.parametrize("name", [*NO_GGUF, *CHANGED])
def test_a_crafted_file_is_refused(outcomes, name):
    assert not complaint(outcomes[name])


def test_a_file_cut_anywhere_is_refused(house, apart):
    from gguf import GGUFReader

    data_start, tensors = read_header(house).data_start, GGUFReader(house).tensors
    starts = [tensor.data_offset for tensor in tensors]
    ends = [tensor.data_offset + tensor.n_bytes for tensor in tensors]
    cuts = set(range(0, data_start + 64, 64))
    cuts |= {at + by for at in (*starts, *ends) for by in (-64, -1, 0, 1, 64)}
    cases = [{"cut": at} for at in sorted(cuts) if at < max(ends)]
    assert len(cases) > 1100
    outcomes = apart(cases)
    assert not complaints(cases, outcomes)
    assert {outcome["error"] for outcome in outcomes} == {"BundleError"}  # not left to llama.cpp


def test_a_flipped_byte_in_the_header_is_refused_or_harmless(house, apart):
    header, chance = read_header(house), random.Random(4)
    vocabulary = pairs_of(house)[TOKENS]
    first = house.read_bytes().index(vocabulary)
    # Two thirds outside the vocabulary: it is nearly all of the header and nearly all alike.
    spans = [(4, header.data_start), (4, first), (header.metadata_end, header.table_end)]
    cases = [
        {"flip": [chance.randrange(*spans[number % 3]), chance.randrange(1, 256)]}
        for number in range(600)
    ]
    found = apart(cases)
    assert not complaints(cases, found, may_open=True)
    refused = sum("error" in outcome for outcome in found)
    assert 100 < refused < 600


def test_a_flipped_byte_in_the_weights_never_gives_nonsense(house, apart):
    header, size, chance = read_header(house), house.stat().st_size, random.Random(5)
    cases = [
        {"flip": [chance.randrange(header.data_start, size), 1 << chance.randrange(8)]}
        for _ in range(300)
    ]
    assert not complaints(cases, apart(cases), may_open=True)


@pytest.fixture(scope="module")
def four_layers(
    make_checkpoint: Callable[..., Any], household: Task, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Qwen2 with as many layers as heads."""
    from qcat.workflows.export import export
    from qcat.workflows.export_job import Request

    target = tmp_path_factory.mktemp("four") / "out"
    adapter = make_checkpoint("qwen2", hidden=64, layers=4).adapter
    export(Request(household, target, adapter=adapter, quantization="q8_0"))
    return target / "household.gguf"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", typed_u32(2)),
        ("attention.head_count", typed_array(U32, [struct.pack("<I", 2)] * 4)),  # one a layer
        ("attention.key_length", typed_u32(8)),
    ],
    ids=["heads", "heads by layer", "width"],
)
def test_heads_that_do_not_fit_the_weights_are_refused(four_layers, apart, tmp_path, key, value):
    # Unlike qwen3, llama.cpp's qwen2 does not compare them when it loads.
    path = tmp_path / "heads.gguf"
    path.write_bytes(rebuilt(four_layers, pairs={f"qwen2.{key}": value}))
    cases = [{"open": str(path)}]
    assert not complaints(cases, apart(cases))


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        (b"\x00\x7e", {"pool": "", "car": ""}),  # NaN as float16, in a row that is no label's
        (b"\x00\x7e", {"pool": "", "pool b": "", "car": ""}),  # in the end token's, below the root
        (b"\x00\x7c", {"pool": "", "car": ""}),  # infinity
    ],
)
def test_weights_that_give_no_numbers_are_refused(house, apart, tmp_path, scale, labels):
    path = tmp_path / "no_numbers.gguf"
    path.write_bytes(rebuilt(house, task={"labels": labels}))
    header = read_header(path)
    embedding = next(entry for entry in header.tensors if entry.name == "token_embd.weight")
    row = embedding.shape[0] // 32 * 34  # bytes in Q8_0: a scale before each 32 numbers
    at = header.data_start + embedding.offset + tokens_of(house).index(b"<|im_end|>") * row
    with path.open("r+b") as file:
        file.seek(at)
        file.write(scale)
    cases = [{"open": str(path)}]
    assert not complaints(cases, apart(cases))


def test_places_that_are_no_files_are_refused(house, apart, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    paths = [
        *(tmp_path / f"{name}.gguf" for name in ("folder", "fifo", "loop", "gone", "missing")),
        tmp_path / "text.gguf" / "under a file.gguf",
        tmp_path / ("long" * 100),
        tmp_path / "long" / ("/long" * 2000),
        "/dev/null",
        "/dev/zero",
        "/dev/tty",
        ".",
        "\udcff.gguf",
    ]
    cases = [{"open": str(path)} for path in paths]
    assert not complaints(cases, apart(cases))


@pytest.mark.parametrize("name", ["a\0b.gguf", "\ud800.gguf"])
def test_an_impossible_path_is_refused(apart, name):
    [outcome] = apart([{"open": name}])
    assert "error" in outcome


def test_a_file_without_permission_is_refused(unprivileged_folder):
    path = unprivileged_folder / "secret.gguf"
    path.write_bytes(DEFAULT_MODEL.read_bytes())
    path.chmod(0)
    with pytest.raises(BundleError, match="cannot be read: Permission denied"):
        Classifier.open(path)


def test_a_model_that_qcat_did_not_make_is_refused(house, apart, tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "qwen3")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    import numpy as np

    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [outcome] = apart([{"open": str(path)}])
    assert not complaint(outcome)
    assert "without qcat metadata" in outcome["message"]


TOLD = {
    "ask": ("empty", "random bytes", "2**63 pairs", "no task", "a task that reads b'[]'"),
    "lint": (
        "empty", "random bytes", "an unknown architecture", "no kind of tokenizer",
        "one token twice", "an empty token", "one token twice up to a NUL",
    ),
    **dict.fromkeys(
        ("show", "show --grammar", "show --modelfile"), ("empty", "a task that reads b'[]'")
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", list(TOLD))
def test_the_command_says_one_line(qcat, house, tmp_path, command):
    path = tmp_path / "hostile.gguf"
    args = {"ask": ["-m", path, QUESTION], "lint": [EXAMPLE / "task.toml", "-m", path]}
    for name in TOLD[command]:
        path.write_bytes(crafted(house, name))
        done = qcat(*command.split(), *args.get(command, [path]))
        assert (done.returncode, done.stdout) == (1, ""), name
        assert done.stderr.startswith(f"qcat: error: {path}: "), name
        assert done.stderr.count("\n") == 1, name
        assert "unexpected" not in done.stderr, name


@pytest.mark.parametrize(
    "pairs",
    [
        {"qcat.source": typed_string('{"versions": []}')},
        {"qcat.report": typed_string('{"proof": [1]}')},
        {"qcat.report": typed_string('{"proof": {"questions": 1}}')},
        {"qcat.source": typed_string('{"layers": "two", "base_layers": 3}')},
        {"qcat.report": typed_string('{"vocabulary": {"tokens": 1, "of": 2, "merges": 3}}')},
        {"qcat.source": typed_string(r'{"base": "\ud800"}')},
    ],
)
def test_show_refuses_other_sections_that_are_wrong(qcat, house, tmp_path, pairs):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(rebuilt(house, pairs=pairs))
    done = qcat("show", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"qcat: error: {path}: ")
    assert "export it again" in done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
