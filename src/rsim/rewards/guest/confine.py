"""Limits that a process puts on itself, for good: no new privileges, no memory shown to others, few system
calls."""

from __future__ import annotations

import ctypes
import platform
import resource
import signal
import struct
import sys

# What reading, computing and ending need, with x86-64's numbers; openat is allowed apart, for reading only.
_ALLOWED = """
    read 0, write 1, close 3, stat 4, fstat 5, lstat 6, poll 7, lseek 8, mmap 9, mprotect 10, munmap 11,
    brk 12, rt_sigaction 13, rt_sigprocmask 14, rt_sigreturn 15, ioctl 16, pread64 17, readv 19,
    access 21, sched_yield 24, mremap 25, madvise 28, nanosleep 35, getitimer 36, setitimer 38,
    getpid 39, exit 60, uname 63, fcntl 72, getcwd 79, readlink 89, gettimeofday 96, getrlimit 97,
    getrusage 98, sysinfo 99, times 100, getuid 102, getgid 104, geteuid 107, getegid 108, getppid 110,
    sigaltstack 131, gettid 186, time 201, futex 202, sched_getaffinity 204, getdents64 217,
    restart_syscall 219, clock_gettime 228, clock_getres 229, clock_nanosleep 230, exit_group 231,
    newfstatat 262, set_robust_list 273, getrandom 318, statx 332, rseq 334
"""
_OPENAT, _WRITES = (
    257,
    0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000,
)  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE's own bit
_X86_64, _ERRNO, _KILL, _ALLOW, _EPERM = 0xC000003E, 0x00050000, 0x80000000, 0x7FFF0000, 1
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _THIRD_ARGUMENT = 0, 4, 32  # offsets in what the kernel shows the filter


def _filter() -> bytes:
    """Classic BPF: kill what is no x86-64 call, allow the list, refuse the rest with EPERM."""
    numbers = sorted(int(call.split()[1]) for call in _ALLOWED.split(","))
    count = len(numbers)
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    lines += [(_EQUAL, count - i + 3, 0, number) for i, number in enumerate(numbers)]  # to the last line
    lines += [
        (_EQUAL, 0, 2, _OPENAT),
        (_LOAD, 0, 0, _THIRD_ARGUMENT),
        (_ANY_BIT, 0, 1, _WRITES),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


_program = _filter()
_buffer = ctypes.create_string_buffer(_program)
_header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(_program) // 8, ctypes.addressof(_buffer)))
_NO_NEW_PRIVS, _DUMPABLE, _PARENT_DIED, _SECCOMP, _BY_FILTER = 38, 4, 1, 22, 2


def _prctl(what: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return int(ctypes.CDLL(None).prctl(ctypes.c_int(what), *padded))


def for_good(memory_mb: int) -> None:
    """For the process that waits for answers: no new privileges, an end when its parent ends, memory that
    others may not look into, and so much address space of it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _prctl(_NO_NEW_PRIVS, 1)
        _prctl(_DUMPABLE, 0)
        _prctl(_PARENT_DIED, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def for_answers(seconds: float, count: int) -> None:
    """For a process that judges ``count`` answers: no file and no process of its own, few system calls.

    System calls are limited on x86-64 Linux with seccomp; elsewhere the rest must do.
    """
    most = (int(seconds) + 1) * count
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if sys.platform == "linux":
        _prctl(_PARENT_DIED, signal.SIGKILL)
    if sys.platform == "linux" and platform.machine() == "x86_64":
        _prctl(_SECCOMP, _BY_FILTER, ctypes.addressof(_header))


def next_answer(seconds: float) -> None:
    """``seconds`` of processor time from now; then the kernel ends the process, as nothing handles the
    signal."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
