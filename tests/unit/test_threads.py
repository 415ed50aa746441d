"""The default number of threads: what affinity, control groups and the variable say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qcat import Classifier, QcatError, threads
from qcat.threads import MAX_THREADS, Cores, cores, default_threads, wait_briefly


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """`groups(lines, **files)`: a machine whose control groups are these."""
    monkeypatch.delenv("QCAT_THREADS", raising=False)
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(threads, "_OWN_CGROUPS", tmp_path / "own")

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/../gone\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "250000", "cpu/job/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "3:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("3:cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
        ("0::/\n", {"cpu.max": "what is this"}, None),
        ("0::/\n", {"cpu.max": "100 0"}, None),
        ("", {}, None),
    ],
)
def test_control_groups(groups, own, files, quota):
    groups(own, files)
    assert cores().quota == quota


@pytest.mark.parametrize(
    ("physical", "quota", "expected"),
    [(8, None, 8), (8, 3.9, 3), (2, 16.0, 2), (4, 0.5, 1), (1, None, 1), (2048, None, MAX_THREADS)],
)
def test_the_least_of_cores_and_quota(monkeypatch, physical, quota, expected):
    monkeypatch.delenv("QCAT_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: Cores(2 * physical, physical, quota))
    assert default_threads() == expected


def test_two_threads_of_a_core_count_once(tmp_path, monkeypatch):
    for cpu in os.sched_getaffinity(0):
        path = tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text("0-63\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    assert cores().physical == 1


def test_affinity():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from qcat.threads import default_threads; print(default_threads())"
    )
    clean = {key: value for key, value in os.environ.items() if key != "QCAT_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout == "1\n"


def test_the_variable_decides(monkeypatch, qcat):
    monkeypatch.setenv("QCAT_THREADS", "7")
    assert default_threads() == 7
    done = qcat("doctor")
    assert "7 used" in done.stdout
    assert "QCAT_THREADS is set" in done.stdout


@pytest.mark.parametrize(
    "value",
    ["0", "-1", "two", "1.5", "²", "513", "100000", "9" * 5000, "x" * 5000],
    ids=lambda value: value[:9],
)
def test_a_bad_variable_is_an_error(monkeypatch, qcat, value):
    monkeypatch.setenv("QCAT_THREADS", value)
    with pytest.raises(QcatError, match=r"QCAT_THREADS.* from 1 to 512") as caught:
        default_threads()
    assert len(str(caught.value)) < 150
    done = qcat("ask", "x")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("count", [0, -1, MAX_THREADS + 1, 10**9, 2**64])
def test_threads_that_ggml_cannot_have_are_refused(house, count):
    with pytest.raises(ValueError, match="threads from 1 to 512"):
        Classifier.open(house, threads=count)


@pytest.mark.parametrize("command", ["ask", "batch"])
def test_the_option_has_the_same_bounds(call, tmp_path, command):
    more = ["x"] if command == "ask" else [tmp_path / "in.csv", "-o", tmp_path / "out.csv"]
    for count in ("0", "513", "1000000", "9" * 5000):
        assert call(command, "--threads", count, *more).returncode == 2


def test_as_many_as_there_may_be(house):
    with Classifier.open(house, threads=MAX_THREADS) as classifier:
        assert classifier.ask("x").label


def test_the_doctor_says_what_is_wrong_in_its_row(monkeypatch, call):
    def no_user(_uid):
        raise KeyError

    monkeypatch.setenv("QCAT_THREADS", "two")
    for name in ("QCAT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_user)
    done = call("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line[:17].strip(): line[18:] for line in done.stdout.splitlines()}
    assert rows["threads"].startswith("QCAT_THREADS='two': a number from 1")
    assert rows["cache"].startswith("none, since there is no home folder")
    assert "ollama server" in rows


def test_the_doctor_says_that_the_cache_cannot_be_used(monkeypatch, call, tmp_path):
    (tmp_path / "file").touch()
    for place, usable in (("file", False), ("file/in", False), ("new/one", True), ("", True)):
        monkeypatch.setenv("QCAT_CACHE", str(tmp_path / place))
        said = call("doctor").stdout
        assert f"{tmp_path / place}\n" in said or not usable
        assert ("cannot be used: each start takes longer" in said) is not usable


@pytest.mark.parametrize("possible", [True, False])
def test_the_doctor_says_whether_weights_are_laid_out_anew(monkeypatch, call, possible):
    monkeypatch.setattr("qcat.backends.llama.repacks", lambda: possible)
    lines = call("doctor").stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("repacking"))
    assert lines[at - 1].startswith("llama.cpp ")
    said = lines[at].split(maxsplit=1)[1]
    assert said == "used" if possible else "-mno-amx-tile" in said


@pytest.mark.parametrize(
    ("before", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_as_the_user_says_or_else_briefly(before, spins, monkeypatch):
    environment = dict(before)
    monkeypatch.setattr(os, "environ", environment)
    wait_briefly()
    assert environment.get("GOMP_SPINCOUNT") == spins
