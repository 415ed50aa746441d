"""The cache folder: it may save work, and whatever is in it, it may do nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat import Classifier, cache
from qcat.gguf import header as headers
from qcat.gguf.bundle import Bundle, fingerprint
from qcat.gguf.header import Length, read_header

QUESTIONS = ["When was the pool pump replaced?", "x", "who fixed the gate latch " * 9]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place = tmp_path / "cache"
    monkeypatch.setenv("QCAT_CACHE", str(place))
    return place


def answers(model):
    with Classifier.open(model) as house:
        return [house.ask(question).to_dict() for question in QUESTIONS]


def entries(folder):
    return sorted(folder.glob("*.qcat"))


def whole(content):
    """A file that `load` takes."""
    return b"qcat cache 1\n" + hashlib.sha256(content).digest() + content


def test_what_is_saved_is_loaded(folder):
    assert cache.load(b"a") is None
    cache.save(b"a", b"one")
    cache.save(b"b", b"")
    cache.save(b"a", b"two")
    assert (cache.load(b"a"), cache.load(b"b"), cache.load(b"c")) == (b"two", b"", None)
    assert len(entries(folder)) == 2
    assert folder.stat().st_mode & 0o077 == 0


@given(st.binary(max_size=200))
def test_garbage_is_not_loaded(garbage):
    cache.save(b"garbage", b"good")
    cache._path(b"garbage").write_bytes(garbage)
    assert cache.load(b"garbage") is None
    cache.save(b"garbage", b"good")
    assert cache.load(b"garbage") == b"good"


@given(st.integers(0, 60), st.integers(1, 255))
def test_one_changed_byte_is_noticed(at, change):
    cache.save(b"byte", b"a text of some length")
    path = cache._path(b"byte")
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= change
    path.write_bytes(data)
    assert cache.load(b"byte") is None


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_left_alone(folder, make):
    folder.mkdir()
    make(cache._path(b"odd"))
    assert cache.load(b"odd") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_not_loaded(folder):
    cache.save(b"a", b"one")
    os.chown(cache._path(b"a"), 12345, 12345)
    assert cache.load(b"a") is None


def test_number_and_size_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 4)
    monkeypatch.setattr(cache, "MAX_BYTES", 1000)
    monkeypatch.setattr(cache, "MAX_CONTENT", 1000 - len(whole(b"")))
    for number in range(4):
        cache.save(b"%d" % number, b"x")
        os.utime(cache._path(b"%d" % number), (number, number))
    assert cache.load(b"0") == b"x"  # which makes 1 the one used longest ago
    cache.save(b"new", b"x" * 100)
    assert [cache.load(b"%d" % n) for n in range(4)] == [b"x", None, b"x", b"x"]
    cache.save(b"large", b"x" * 900)
    assert cache.load(b"large") is not None
    assert sum(path.stat().st_size for path in entries(folder)) <= 1000
    cache.save(b"too large", b"x" * 2000)
    assert cache.load(b"too large") is None
    assert cache.load(b"large") is not None
    cache.save(b"largest", b"x" * cache.MAX_CONTENT)
    assert cache.load(b"largest") is not None
    cache.save(b"too large", b"x" * (cache.MAX_CONTENT + 1))
    assert cache.load(b"too large") is None
    assert cache.load(b"largest") is not None


def test_a_header_recalled_is_the_header_read(folder, house, monkeypatch):
    monkeypatch.setattr(headers, "_LARGE", 0)
    read = read_header(house, remember=True)
    assert len(entries(folder)) == 1
    monkeypatch.setattr(headers, "_parse", None)  # it is not read a second time
    recalled = read_header(house)
    assert recalled == read
    for key, value in read.metadata.items():
        assert type(recalled.metadata[key]) is type(value)
    assert any(isinstance(value, Length) for value in recalled.metadata.values())
    assert all(isinstance(tensor, headers.Tensor) for tensor in recalled.tensors)


def test_a_changed_header_is_read_again(folder, house, tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "_LARGE", 0)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(house.read_bytes())
    before, status = read_header(copy, remember=True), copy.stat()
    data = bytearray(copy.read_bytes())
    at = data.index(b"token_embd")
    data[at : at + 10] = b"token_embx"
    copy.write_bytes(data)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = read_header(copy)
    assert any(tensor.name.startswith("token_embx") for tensor in after.tensors)
    assert after.digest != before.digest


def test_only_a_file_that_is_opened_to_be_asked_is_remembered(folder, house, monkeypatch):
    monkeypatch.setattr(headers, "_LARGE", 0)
    read_header(house)
    Bundle.read(house)
    assert not folder.exists()
    saved = []
    monkeypatch.setattr(cache, "save", lambda key, content: saved.append(key[:6]))
    answers(house)
    assert saved == [b"header", b"prefix"]


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: {},
        lambda fields: [],
        lambda fields: 3,
        lambda fields: fields | {"more": 1},
        lambda fields: fields | {"table_end": "x"},
        lambda fields: fields | {"metadata": [1]},
        lambda fields: fields | {"metadata": {"key": []}},
        lambda fields: fields | {"tensors": [1]},
        lambda fields: fields | {"tensors": [["name"]]},
        lambda fields: {key: value for key, value in fields.items() if key != "digest"},
        lambda fields: {key: value for key, value in fields.items() if key != "n_metadata"},
        lambda fields: None,
    ],
)
def test_a_header_that_another_qcat_remembered_is_read_again(folder, house, monkeypatch, change):
    """Files with a right checksum over something that is no header of this qcat."""
    monkeypatch.setattr(headers, "_LARGE", 0)
    read = read_header(house, remember=True)
    (entry,) = entries(folder)
    fields = change(json.loads(entry.read_bytes()[len(whole(b"")) :]))
    entry.write_bytes(whole(b"no JSON \xff" if fields is None else json.dumps(fields).encode()))
    assert read_header(house) == read


def test_a_folder_whose_name_is_no_text(folder, tmp_path, qcat, house):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system has no such names")
    copy = Path(os.fsdecode(place), "house.gguf")
    copy.write_bytes(house.read_bytes())
    assert answers(copy) == answers(house)
    done = qcat("ask", "-m", copy, QUESTIONS[0])
    assert (done.stderr, done.returncode) == ("", 0)


def test_fingerprints_tell_tensor_data_apart(house, tmp_path):
    one, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    data = bytearray(house.read_bytes())
    one.write_bytes(data)
    data[-8192:] = bytes(byte ^ 1 for byte in data[-8192:])  # more than lies between two samples
    other.write_bytes(data)
    os.utime(one, (5, 5))
    os.utime(other, (5, 5))
    same = read_header(one)
    assert same == read_header(other)
    assert fingerprint(one, same) != fingerprint(other, same)


@pytest.mark.parametrize("kind", ["shipped", "tiny"])
def test_a_restored_prefix_is_the_evaluated_one(folder, house, kind):
    model = house if kind == "tiny" else None
    evaluated = answers(model)
    (entry,) = entries(folder)
    written = entry.stat().st_mtime_ns
    os.utime(entry, (5, 5))
    assert answers(model) == evaluated  # to the last bit
    assert entry.stat().st_mtime_ns >= written  # it was used …
    assert entries(folder) == [entry]  # … and not written anew


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: b"",
        lambda state: b"garbage",
        lambda state: state[:-1],
        lambda state: state[: len(state) // 2],
        lambda state: state + b"more",
        lambda state: bytes(len(state)),
        lambda state: b"\xff" * len(state),
        lambda state: state[:8] + b"\xff" * 8 + state[16:],
    ],
)
def test_a_state_that_llama_cpp_refuses_is_written_anew(folder, house, spoil):
    """Files with a right checksum over something that is no state of this context."""
    expected = answers(house)
    (entry,) = entries(folder)
    good = entry.read_bytes()
    entry.write_bytes(whole(spoil(good[len(whole(b"")) :])))
    assert answers(house) == expected
    assert entry.read_bytes() == good


def test_another_task_has_its_own_prefix(folder, house, bundle_file, household):
    other = household.replace(instruction="Put it into one of these.")
    answers(house)
    answers(bundle_file(other))
    assert len(entries(folder)) == 2


def test_ten_at_once_on_a_cold_cache(folder, qcat):
    with ThreadPoolExecutor(10) as pool:
        done = list(pool.map(lambda _: qcat("ask", "--json", QUESTIONS[0]), range(10)))
    assert {d.returncode for d in done} == {0}
    assert {d.stderr for d in done} == {""}
    assert {json.loads(d.stdout)["label"] for d in done} == {"pool"}
    assert len({d.stdout for d in done}) == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("spoil", ["absent", "a file", "read-only", "garbage", "other files"])
def test_the_folder_may_be_anything(qcat, tmp_path, spoil):
    place = tmp_path / "cache"
    run = {**os.environ, "QCAT_CACHE": str(place)}
    if spoil == "a file":
        place.write_text("x")
    elif spoil == "read-only":
        if os.geteuid() == 0:
            place = Path("/proc/sys")  # which lets not even root write
            run["QCAT_CACHE"] = str(place)
        else:
            place.mkdir(mode=0o500)
    elif spoil == "garbage":
        qcat("ask", "x", env=run)
        for entry in entries(place):
            entry.write_bytes(os.urandom(10_000))
    elif spoil == "other files":
        place.mkdir()
        for number in range(50):
            (place / f"{number}.txt").write_text("mine")
    done = qcat("ask", QUESTIONS[0], env=run)
    assert (done.stdout, done.stderr, done.returncode) == ("pool\n", "", 0)
    if spoil == "other files":
        assert len(list(place.glob("*.txt"))) == 50


def test_a_full_disk_is_no_error(folder):
    program = Path(sys.executable).with_name("qcat")
    done = subprocess.run(
        [program, "ask", QUESTIONS[0]],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert (done.stdout, done.stderr, done.returncode) == ("pool\n", "", 0)
    assert list(folder.iterdir()) == []  # no half-written file either
