"""What Windows lacks or does otherwise, simulated: open files stay, a lock is of bytes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import apart_functions
import pytest
from like_windows import forbid_moving_open_files
from qcat_convert.apart import apart

from qcat import files
from qcat.classifier import DEFAULT_MODEL
from qcat.errors import DataError, ExportError
from qcat.gguf.bundle import Bundle
from qcat.opening import read_calibration
from qcat.workflows.journal import Answer, Journal

ANSWER = Answer("pool", 0.5, False, None, False, None)


def test_batch_removes_its_journal(tmp_path, call, monkeypatch):
    (tmp_path / "q.csv").write_text("text\nthe pool is green\n")
    forbid_moving_open_files(monkeypatch)
    assert call("batch", tmp_path / "q.csv", "-o", tmp_path / "out.csv").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"q.csv", "out.csv"}


def test_a_journal_is_removed_where_it_was_to_be(tmp_path, monkeypatch):
    forbid_moving_open_files(monkeypatch)
    with Journal.open(tmp_path / "empty") as journal:
        journal.begin({})
    with Journal.open(tmp_path / "kept") as journal:
        journal.begin({})
        journal.add(ANSWER)

    def no_locks(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("qcat.workflows.journal.lock_open_file", no_locks)
    with pytest.raises(DataError, match="cannot be locked"):
        Journal.open(tmp_path / "unlockable")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_lock_between_processes_leaves_no_file(tmp_path, monkeypatch):
    forbid_moving_open_files(monkeypatch)
    with files.locked(tmp_path / "lock", target=tmp_path, busy="busy", error=DataError):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir())


def test_calibrate_replaces_the_model(tmp_path, call, monkeypatch):
    model = tmp_path / "house.gguf"
    shutil.copy(DEFAULT_MODEL, model)
    forbid_moving_open_files(monkeypatch)
    done = call("calibrate", model, "--threshold", "0.25")
    assert done.returncode == 0, done.stderr
    assert read_calibration(Bundle.read(model)).threshold == 0.25


def test_a_lock_keeps_nobody_from_reading(tmp_path, monkeypatch):
    """A byte that is locked there can be read by nobody else, this process included."""
    locked = []

    def locking(descriptor, mode, count):
        locked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(files.sys, "platform", "win32")
    with Journal.open(tmp_path / "journal") as journal:
        journal.begin({})
        journal.add(ANSWER)
        assert list(journal.answers()) == [ANSWER]
    assert locked == [(0x7FFF_FFF0, 2, 1)]


def test_the_end_of_a_process_is_told_without_signals(monkeypatch):
    few = SimpleNamespace(signal=signal.signal, SIGINT=signal.SIGINT, SIG_IGN=signal.SIG_IGN)
    monkeypatch.setattr("qcat_convert.apart.signal", few)
    with (
        apart(apart_functions.doubled, apart_functions.ended) as call,
        pytest.raises(ExportError, match=r"ended from outside \(status 3\): rerun the command"),
    ):
        call(1, print)


@pytest.mark.parametrize(("system", "shown"), [("linux", rb"\u30d7"), ("win32", "\u30d7".encode())])
def test_no_text_is_too_much_for_a_code_page(system, shown):
    program = (
        "import sys\n"
        "from qcat import cli\n"
        f"sys.platform = {system!r}\n"
        "cli.run = lambda _: print('\\u30d7')\n"
        "cli.main()\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown
