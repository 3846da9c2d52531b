"""The program inside the sandbox: limits itself, filters its own system calls, then runs what it was given.

It is started by `sandbox.run` with Python's standard library alone and imports nothing of this project.
"""

import ctypes
import errno
import json
import math
import os
import resource
import struct
import sys

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH numbers (linux/audit.h)."""

ALLOWED = {
    "x86_64": (
        *(0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 27, 28, 32, 33, 35, 39, 60, 63),
        *(79, 89, 96, 97, 98, 100, 102, 104, 107, 108, 131, 158, 186, 201, 202, 204, 217, 218, 228, 229, 230),
        *(231, 262, 267, 269, 270, 271, 273, 291, 293, 318, 332, 334, 439, 449),
    ),
    "aarch64": (
        *(17, 20, 22, 23, 48, 57, 59, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 96, 98, 99, 101),
        *(113, 114, 115, 123, 124, 132, 134, 135, 139, 153, 160, 163, 165, 169, 172, 174, 175, 176, 177, 178),
        *(214, 215, 216, 222, 226, 232, 233, 278, 291, 293, 439, 449),
    ),
}
"""System calls that neither write outside of memory and open files nor reach another process, by number.

read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 readv writev
access select sched_yield mremap mincore madvise dup dup2 nanosleep getpid exit uname getcwd readlink gettimeofday
getrlimit getrusage times get*id sigaltstack arch_prctl gettid time futex sched_getaffinity getdents64
set_tid_address clock_* exit_group newfstatat readlinkat faccessat pselect6 ppoll set_robust_list epoll_create1 pipe2
getrandom statx rseq faccessat2 futex_waitv
"""

CONDITIONAL = {
    "x86_64": {"open": 2, "openat": 257, "clone": 56, "clone3": 435, "ioctl": 16, "fcntl": 72},
    "aarch64": {"openat": 56, "clone": 220, "clone3": 435, "ioctl": 29, "fcntl": 25},
}
"""System calls of which it depends on their arguments."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
THREAD = 0x00010000  # CLONE_THREAD
HARMLESS = {"ioctl": (0x5401, 0x5451), "fcntl": (0, 1, 2, 3, 1030)}
"""Commands that only ask, or copy a file's number.

TCGETS, FIOCLEX; F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. With others of `fcntl` a program would choose a
process that is sent a signal.
"""

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # classic BPF
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # seccomp's answers
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def instruction(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    """Return a BPF instruction; `yes` and `no` are how many to skip after a comparison."""
    return struct.pack("<HBBI", code, yes, no, k)


def answer(value: int) -> bytes:
    """Return the instruction that ends with an answer."""
    return instruction(RETURN, value)


def rule(number: int, argument: int, then: list[bytes]) -> list[bytes]:
    """Return what decides a call by the low half of one of its arguments."""
    body = [instruction(LOAD, ARGUMENTS + 8 * argument), *then]
    return [instruction(EQUAL, number, 0, len(body)), *body]


def filtering(machine: str) -> bytes:
    """Return the filter for a machine (Linux, Documentation/userspace-api/seccomp_filter.rst)."""
    refuse, allow = answer(REFUSE | errno.EPERM), answer(ALLOW)
    program = [
        instruction(LOAD, ARCHITECTURE),
        instruction(EQUAL, ARCHITECTURES[machine], 1, 0),
        answer(KILL),
        instruction(LOAD, NUMBER),
    ]
    for number in ALLOWED[machine]:
        program += [instruction(EQUAL, number, 0, 1), allow]
    numbers = CONDITIONAL[machine]
    for name, argument in (("open", 1), ("openat", 2)):
        if name in numbers:
            program += rule(numbers[name], argument, [instruction(ANY_BIT, WRITING, 0, 1), refuse, allow])
    program += rule(numbers["clone"], 0, [instruction(ANY_BIT, THREAD, 0, 1), allow, refuse])
    # its flags lie in memory, where no filter sees them; without it the C library uses clone
    program += [instruction(EQUAL, numbers["clone3"], 0, 1), answer(REFUSE | errno.ENOSYS)]
    for name, commands in HARMLESS.items():
        known = [part for command in commands for part in (instruction(EQUAL, command, 0, 1), allow)]
        program += rule(numbers[name], 1, [*known, refuse])
    return b"".join([*program, refuse])


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def fence(machine: str) -> None:
    """Filter the system calls of this process from now on; an OSError says why it cannot be."""
    library = ctypes.CDLL(None, use_errno=True)
    code = filtering(machine)
    no_new_privileges, set_filter, by_filter = 38, 22, 2
    if library.prctl(no_new_privileges, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no new privileges")
    if library.prctl(set_filter, by_filter, ctypes.byref(Program(len(code) // 8, code)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter")


def limit(seconds: float, memory: int) -> None:
    """Limit processor time and memory; nothing may be written to a file and no core is dumped."""
    whole = math.ceil(seconds) + math.ceil(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK):
        resource.setrlimit(kind, (0, 0))


def outcome(program: str) -> tuple[str, str]:
    """Return how a program went, and what it said."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except MemoryError:
        return "memory", "MemoryError"
    except PermissionError as error:
        return "denied", f"PermissionError: {error}"[:500]
    except SystemExit as error:
        return "ended", f"SystemExit: {error}"[:500]
    except BaseException as error:  # whatever a program raises is what became of it
        return "failed", f"{type(error).__name__}: {error}"[:500]
    return "passed", ""


def main() -> None:
    """Read what to do, fence this process in, do it, and say what became of it."""
    asked = json.load(sys.stdin)
    report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        limit(asked["seconds"], asked["memory"])
        fence(asked["machine"])
    except (OSError, ValueError) as error:
        os.write(report, json.dumps({"unfenced": str(error)}).encode())
        return
    how, said = outcome(asked["program"])
    os.write(report, json.dumps({"token": asked["token"], "how": how, "said": said}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
