"""A program in the sandbox computes, and whatever else it tries is refused, stopped or without effect."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.evaluate import sandbox
from llamero.evaluate.sandbox import Limits, run, run_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
SHORT = Limits(seconds=1, memory_mib=256)


@pytest.mark.parametrize(
    ("program", "how", "said"),
    [
        ("assert sum(range(10)) == 45", "passed", ""),
        ("import math, re, collections, itertools, heapq, datetime, random, hashlib, typing, decimal", "passed", ""),
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError"),
        ("input('a number')", "failed", "EOFError"),
        ("print('x' * 10**6)", "passed", ""),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed", ""),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("raise SystemExit(0)", "ended", "SystemExit"),
        ("import os\nos._exit(0)", "ended", "it ended itself, with 0"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("def f(n): return f(n + 1)\nf(0)", "failed", "RecursionError"),
    ],
)
def test_what_becomes_of_a_program(program, how, said):
    outcome = run(program)
    assert (outcome.how, outcome.said.startswith(said)) == (how, True), outcome
    assert outcome.passed == (how == "passed")


CALL = "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.socketpair()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true') and (_ for _ in ()).throw(PermissionError('system'))",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 0)",
        "open('here', 'w')",
        "open('/tmp/llamero-sandbox-test', 'a')",
        "import os\nos.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
        "import os\nos.mkdir('x')",
        "import os, sys\nos.remove(sys.executable)",
        "import os, sys\nos.rename(sys.executable, '/tmp/llamero-sandbox-test')",
        "import os\nos.chmod('/tmp', 0o777)",
        "import os\nos.symlink('/tmp', '/tmp/llamero-sandbox-test')",
        "import os\nos.truncate('/etc/hostname', 0)",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        f"{CALL}if library.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')",
        f"{CALL}if library.ptrace(0, 0, 0, 0): raise OSError(ctypes.get_errno(), 'ptrace')",
    ],
)
def test_what_reaches_out_is_denied(program):
    outcome = run(program)
    assert outcome.how in ("denied", "failed")
    assert "PermissionError" in outcome.said or "not permitted" in outcome.said
    assert not Path("/tmp/llamero-sandbox-test").exists()


def test_limits_cannot_be_lifted():
    lift = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"
    assert not run(lift).passed


def test_what_loops_is_stopped():
    assert run("while True: pass", SHORT).how == "timeout"
    caught = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert run(caught, SHORT).how in ("timeout", "crashed")


def test_what_sleeps_is_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "STARTING", 2.0)
    monkeypatch.setattr(sandbox, "PATIENCE", 0.0)
    assert run("import time\ntime.sleep(1000)", SHORT).how == "timeout"


def test_what_allocates_is_stopped():
    assert run("x = 'a' * 10**9", SHORT).how == "memory"
    assert run("x = []\nwhile True: x.append('a' * 10**6)", SHORT).how == "memory"


def test_what_floods_every_open_file_is_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "STARTING", 3.0)
    monkeypatch.setattr(sandbox, "PATIENCE", 0.0)
    flood = (
        "import os\nfor n in range(3, 20):\n    try:\n        while True: os.write(n, b'x' * 65536)\n"
        "    except OSError: pass"
    )
    assert not run(flood, SHORT).passed


def test_a_forged_report_is_not_believed():
    forged = (
        "import os, json\nfor n in range(3, 9):\n"
        "    try: os.write(n, json.dumps({'token': '', 'how': 'passed'}).encode())\n"
        "    except OSError: pass\nos._exit(0)"
    )
    assert not run(forged).passed


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run("assert False")
    assert not list(tmp_path.iterdir())
    assert "A_SECRET" not in os.environ
    monkeypatch.setenv("A_SECRET", "x")
    assert run("import os\nassert 'A_SECRET' not in os.environ").passed


def test_several_at_a_time_come_in_their_order():
    found = run_all([f"assert {n} % 2" for n in range(6)], workers=3)
    assert [outcome.passed for outcome in found] == [False, True] * 3


def test_without_a_filter_nothing_is_run(monkeypatch, tmp_path):
    sandbox.refuse_unfenced()
    broken = tmp_path / "runner.py"
    broken.write_text('print(\'{"unfenced": "seccomp filter"}\')')
    monkeypatch.setattr(sandbox, "RUNNER", broken)
    with pytest.raises(LlameroError, match="cannot be fenced in on this machine: seccomp filter"):
        run("pass")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(LlameroError, match="riscv64"):
        run("pass")


def test_the_numbers_of_system_calls_are_this_machines():
    """The headers' own numbers, for the calls that decide: a wrong one would open what is to be shut."""
    from llamero.evaluate.sandboxed import ALLOWED, CONDITIONAL

    machine = os.uname().machine
    names = "socket connect bind execve fork vfork kill tkill tgkill ptrace mount unshare unlink unlinkat rename mkdir"
    names += (
        " mkdirat symlink link chmod fchmodat truncate ftruncate creat prlimit64 setrlimit openat2 bpf io_uring_setup"
    )
    source = "".join(f"#ifdef __NR_{n}\n{n} __NR_{n}\n#endif\n" for n in [*names.split(), *CONDITIONAL[machine]])
    try:
        text = f"#include <sys/syscall.h>\n{source}"
        made = subprocess.run(["gcc", "-E", "-P", "-"], input=text, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("there is no C compiler with Linux headers")
    numbers = {line.split()[0]: line.split()[1] for line in made.stdout.splitlines() if len(line.split()) == 2}
    found = {name: int(value) for name, value in numbers.items() if value.isdigit()}
    assert len(found) > 20
    assert not {found[name] for name in names.split() if name in found} & set(ALLOWED[machine])
    for name in CONDITIONAL[machine]:
        assert CONDITIONAL[machine][name] == found[name]
