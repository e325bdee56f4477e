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
# What a model's program may do beside that in its own folder, with threads and with pipes: no new program or
# process (its memory is one address space), no socket but a pair, no memory outside (memfd, shared segments).
_PROGRAMS = """
    open 2, select 23, msync 26, mincore 27, pwrite64 18, writev 20, pipe 22, dup 32, dup2 33, pause 34,
    alarm 37, sendto 44, recvfrom 45, sendmsg 46, recvmsg 47, shutdown 48, getsockname 51, getpeername 52,
    socketpair 53, setsockopt 54, getsockopt 55, wait4 61, flock 73, fsync 74, fdatasync 75, truncate 76,
    ftruncate 77, getdents 78, chdir 80, fchdir 81, rename 82, mkdir 83, rmdir 84, creat 85, unlink 87,
    chmod 90, fchmod 91, umask 95, getpgrp 111, getgroups 115, getresuid 118, getresgid 120, getpgid 121,
    getsid 124, rt_sigpending 127, rt_sigtimedwait 128, rt_sigsuspend 130, statfs 137, fstatfs 138,
    getpriority 140, sched_getparam 143, sched_getscheduler 145, set_tid_address 218, fadvise64 221,
    epoll_create 213, epoll_wait 232, epoll_ctl 233, openat 257, mkdirat 258, unlinkat 263, renameat 264,
    readlinkat 267, fchmodat 268, faccessat 269, pselect6 270, ppoll 271, utimensat 280, epoll_pwait 281,
    fallocate 285, eventfd2 290, epoll_create1 291, dup3 292, pipe2 293, preadv 295, pwritev 296, getcpu 309,
    renameat2 316, membarrier 324, copy_file_range 326, faccessat2 439
"""
_CLONE, _CLONE3, _PRLIMIT, _THREAD = 56, 435, 302, 0x10000
_X86_64, _ERRNO, _KILL, _ALLOW, _EPERM, _ENOSYS = 0xC000003E, 0x00050000, 0x80000000, 0x7FFF0000, 1, 38
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in what the kernel shows the filter
_FIRST_ARGUMENT, _THIRD_ARGUMENT = 16, 32

# What else is allowed, up to the line that allows; the line before it refuses. A jump skips so many lines.
_FOR_ANSWERS = [
    (_EQUAL, 0, 2, _OPENAT),
    (_LOAD, 0, 0, _THIRD_ARGUMENT),
    (_ANY_BIT, 0, 1, _WRITES),
    (_RETURN, 0, 0, _ERRNO | _EPERM),
    (_RETURN, 0, 0, _ALLOW),
]
_FOR_PROGRAMS = [
    (_EQUAL, 0, 1, _CLONE3),  # its flags cannot be seen; the C library then takes clone
    (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    (_EQUAL, 0, 2, _CLONE),
    (_LOAD, 0, 0, _FIRST_ARGUMENT),
    (_ANY_BIT, 4, 3, _THREAD),
    (_EQUAL, 0, 2, _PRLIMIT),
    (_LOAD, 0, 0, _FIRST_ARGUMENT),
    (_EQUAL, 1, 0, 0),  # its own limits, not another's
    (_RETURN, 0, 0, _ERRNO | _EPERM),
    (_RETURN, 0, 0, _ALLOW),
]


def _filter(calls: str, rest: list[tuple[int, int, int, int]]) -> bytes:
    """Classic BPF: kill what is no x86-64 call, allow the list, and ``rest`` for what is not in it."""
    numbers = sorted(int(call.split()[1]) for call in calls.split(","))
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    end = len(numbers) + len(rest) - 2
    lines += [(_EQUAL, end - i, 0, number) for i, number in enumerate(numbers)]  # to the last line
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, *rest])


_programs = [_filter(_ALLOWED, _FOR_ANSWERS), _filter(f"{_ALLOWED}, {_PROGRAMS}", _FOR_PROGRAMS)]
_buffers = [ctypes.create_string_buffer(program) for program in _programs]
_headers = [
    ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    for program, buffer in zip(_programs, _buffers, strict=True)
]
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


def for_answers(seconds: float) -> None:
    """For a process that judges an answer: no file and no process of its own, few system calls, and so many
    seconds of processor time from now; then the kernel ends it, as nothing handles the signal.

    System calls are limited on x86-64 Linux with seccomp; elsewhere the rest must do.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if sys.platform == "linux":
        _prctl(_PARENT_DIED, signal.SIGKILL)
    if sys.platform == "linux" and platform.machine() == "x86_64":
        _prctl(_SECCOMP, _BY_FILTER, ctypes.addressof(_headers[0]))


def hidden() -> None:
    """Memory that others may not look into."""
    _prctl(_DUMPABLE, 0)


def for_programs() -> None:
    """For a process that runs a model's program: no other program, process or socket, and no memory beside
    its address space and its files.

    Raises:
        OSError: the kernel or the machine has no such filter.
    """
    _prctl(_NO_NEW_PRIVS, 1)
    if platform.machine() != "x86_64" or _prctl(_SECCOMP, _BY_FILTER, ctypes.addressof(_headers[1])):
        raise OSError("no filter of system calls")
