"""Programs that a model wrote, run so that they can compute and nothing else.

Each runs in a fresh Python of its own, which gives itself limits of time and memory and then a filter of system calls
(Linux seccomp): what is not on a short list fails as "not permitted". A program may read files (imports need that), use
memory and start threads. It cannot open a socket, write or remove a file, start a process, send a signal, or lift its
limits, whoever it runs as. Where there is no such filter nothing is run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llamero.core import progress
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence

How = Literal["passed", "failed", "denied", "timeout", "memory", "ended", "crashed"]

RUNNER = Path(__file__).with_name("sandboxed.py")
"""The program that fences itself in and runs another."""

PATIENCE = 5.0
"""Wall-clock seconds allowed for each second of processor time: other work goes on beside."""
STARTING = 20.0
"""Wall-clock seconds that Python may take to start on a busy machine, beyond that."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    how: How
    """`passed`; `failed`: it raised; `denied`: what it raised was that something is not permitted; `timeout`, `memory`:
    it wanted more than it may have; `ended`: it stopped before its end; `crashed`: a signal stopped it."""
    said: str = ""
    """The exception, or why."""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.how == "passed"


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 3.0
    """Processor time, rounded up to a whole second."""
    memory_mib: int = 1024
    """Address space."""


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Return what becomes of a program: it passes if it comes to its end without an exception.

    Args:
        program: Python source. It sees the standard library alone, no input, and what it prints is lost.
        limits: What it may use.

    Raises:
        LlameroError: Programs cannot be fenced in on this machine.
    """
    limits = limits or Limits()
    _refuse_unknown_machine()
    token = secrets.token_hex(16)  # known to the runner alone, so that leaving early is not taken for the end
    asked = {"program": program, "token": token, "seconds": limits.seconds, "memory": limits.memory_mib * 2**20}
    asked["machine"] = platform.machine()
    with tempfile.TemporaryDirectory(prefix="llamero-sandbox-") as place, tempfile.TemporaryFile() as given:
        given.write(json.dumps(asked).encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(RUNNER)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=place,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            code = process.wait(STARTING + PATIENCE * math.ceil(limits.seconds))
        except subprocess.TimeoutExpired:
            return Outcome("timeout", "it did not end")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            with process.stdout:
                said = process.stdout.read(65536)  # all that a pipe holds, and nobody is left to write more
    return _outcome(code, said, token)


def _outcome(code: int, said: bytes, token: str) -> Outcome:
    try:
        report = json.loads(said)
    except ValueError:
        report = {}
    if not isinstance(report, dict):
        report = {}
    if "unfenced" in report:
        raise _unfenced(str(report["unfenced"]))
    if report.get("token") == token:
        return Outcome(report["how"], str(report.get("said", "")))
    if code == -signal.SIGXCPU:
        return Outcome("timeout", "it used up its processor time")
    if code < 0:
        return Outcome("crashed", signal.Signals(-code).name)
    return Outcome("ended", f"it ended itself, with {code}")


def run_all(programs: Sequence[str], limits: Limits | None = None, *, workers: int | None = None) -> list[Outcome]:
    """Return what becomes of programs, in their order.

    Args:
        programs: Python sources.
        limits: What each may use.
        workers: How many run at a time; by default one for each processor.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda program: run(program, limits), programs)
        return list(progress.track(found, "run programs", total=len(programs), unit="programs"))


def refuse_unfenced() -> None:
    """Run nothing in particular, to know before hours of work that programs can be fenced in here.

    Raises:
        LlameroError: They cannot.
    """
    outcome = run("import socket\nsocket.socket()")
    if outcome.how != "denied":
        raise _unfenced(f"a socket could be opened ({outcome.how}: {outcome.said})")


def _refuse_unknown_machine() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise _unfenced(f"{sys.platform} on {platform.machine()}")


def _unfenced(why: str) -> LlameroError:
    return LlameroError(
        f"programs cannot be fenced in on this machine: {why}",
        fix="run it on Linux (x86-64 or ARM) where processes may set a seccomp filter, as most containers allow",
    )
