"""How many threads to compute with.

llama.cpp's threads spin while they wait: one thread more than there are free cores costs several
times as much as one thread fewer. The default is therefore the number of physical cores that this
process may use on Linux, and the number of logical processors elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qcat.errors import QcatError

VARIABLE = "QCAT_THREADS"
MAX_THREADS = 512
"""ggml's GGML_MAX_N_THREADS: with more threads the process aborts."""
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


class Cores(NamedTuple):
    """The processors available for computation."""

    logical: int
    """Processors of the machine, two a core where it has hyper-threading."""
    physical: int
    """Cores among those that the process's affinity allows."""
    quota: float | None
    """Processor time that the control group allows, in processors, if it is limited."""


def wait_briefly() -> None:
    """Let GNU OpenMP's threads spin only briefly while they wait, unless the user has set this.

    Spinning threads take cores from other processes, but threads that sleep at once are slow on an
    otherwise idle machine. A training step of SmolLM2-135M on two cores took, on an idle machine
    and next to one busy process: 1.5 and 6.8 s with OpenMP's defaults, 1.8 and 3.1 s with this
    setting, 2.9 and 2.6 s with OMP_WAIT_POLICY=passive. OpenMP reads the setting when it is
    loaded: call this before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def default_threads() -> int:
    """$QCAT_THREADS, or as many threads as `cores` allows, from 1 to `MAX_THREADS`.

    Raises:
        QcatError: the variable is not a number from 1 to `MAX_THREADS`.
    """
    if named := os.environ.get(VARIABLE):
        # `int` rejects a number with thousands of digits.
        count = int(named) if named.isascii() and named.isdigit() and len(named) < 10 else 0
        if not 1 <= count <= MAX_THREADS:
            raise QcatError(
                f"{VARIABLE}={named[:40]!r}: a number from 1 to {MAX_THREADS} expected: "
                "mend or unset it"
            )
        return count
    found = cores()
    room = found.physical if found.quota is None else min(found.physical, int(found.quota))
    return max(1, min(room, MAX_THREADS))


def cores() -> Cores:
    """Read affinity, topology and control groups (version 2 and 1); Linux, else `os.cpu_count`."""
    logical = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return Cores(logical, logical, None)
    physical = set()
    for cpu in os.sched_getaffinity(0):
        try:
            physical.add((_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            physical.add(str(cpu))
    return Cores(logical, len(physical), min(_quotas(), default=None))


def _quotas() -> Iterator[float]:
    """The limits of the process's control groups and of all their parents."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root = _CGROUPS
        elif "cpu" in controllers.split(","):
            root = _CGROUPS / "cpu"
        else:
            continue
        place = root / name.lstrip("/")
        # In a container the path may refer to the host's tree: then only the root exists.
        for group in (place, *place.parents):
            if (quota := _quota(group)) is not None:
                yield quota
            if group == root:
                break


def _quota(group: Path) -> float | None:
    """Microseconds of processor time in a period; "max" or a negative number is no limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None
