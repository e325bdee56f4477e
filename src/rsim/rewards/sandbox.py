"""Running model-written Python against tests, in a sandbox.

Each program runs in its own namespaces (mount, network, process, IPC; user, unless root starts it). It sees a
read-only Python, an empty ``/tmp`` in memory and nothing else, has no network and no socket, is alone among
its processes and starts none, and has limits on processor time, memory, threads and file size, which add up:
one address space and one small folder. When it is over, or out of time, everything
in it is killed at once. Where the kernel does not allow this, the answer is a clear refusal, unless
``unsafe`` says to go on with limits alone.

The model's program and the tests are two processes in two sandboxes; see `rsim.rewards.sandbox_guest` for
why.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rsim.errors import UserError

_log = logging.getLogger(__name__)
_FEW = 4
_VERDICT = 200  # bytes, at most
_GUEST = Path(__file__).with_name("sandbox_guest.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}  # of what runs in a sandbox
_BOUND = ("/usr", "/lib", "/lib64", "/bin")  # read-only, where they exist, beside Python's own prefix

# Builds a new root in memory, moves into it and gives up every capability. Arguments: root, user ("" for the
# present one), "proc" or "", read-only folders, "--", command.
_ENTER = """
set -e
root=$1; user=$2; proc=$3; shift 3
mount -t tmpfs -o size=32m,nr_inodes=4k,mode=755,nosuid,nodev tmpfs "$root"
while [ "$1" != -- ]; do
  if [ -e "$1" ]; then
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1"
  fi
  shift
done
shift
mkdir -p "$root/tmp" "$root/dev" "$root/proc" "$root/old"
mount -t proc proc "$root/proc"
chmod 1777 "$root/tmp"
for device in null zero urandom; do
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
cd "$root"
pivot_root . old
cd /
umount -l /old
[ -n "$proc" ] || umount -l /proc
cd /tmp
exec setpriv $user --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@dataclass(frozen=True)
class Limits:
    """Of each of the two programs; its files lie in a folder of 32 MB."""

    seconds: float = 10.0  # of processor time; a busy machine makes no right program wrong
    patience: float = 6.0  # wall clock to processor time
    memory_mb: int = 512
    processes: int = 16  # threads, where system calls are filtered
    file_mb: int = 16


@dataclass(frozen=True)
class Result:
    """``failure`` is empty when the tests passed."""

    passed: bool
    failure: str = ""


def run_tests(
    candidate: str,
    tests: str,
    *,
    shadowed: tuple[str, ...] = (),
    script: bool = False,
    limits: Limits | None = None,
    unsafe: bool = False,
) -> Result:
    """Runs ``tests`` against the names that ``candidate`` defines.

    Args:
        script: the tests run the whole candidate instead, by ``run_script(text on its standard input)``.
        shadowed: names that the tests take from the candidate although Python has built-ins of the same name.

    Raises:
        UserError: the kernel allows no sandbox here and ``unsafe`` is off.
    """
    limits = limits or Limits()
    if not unsafe and not sandbox_works():
        raise UserError(
            "model-written code cannot be sandboxed here",
            "allow user namespaces, or pass --unsafe to run it anyway",
        )
    for program in (candidate, tests):
        if "\0" in program or _encode(program) is None:
            return Result(False, "not a text")
    to_candidate, to_tests, verdict = os.pipe(), os.pipe(), os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="rsim-") as folder,
        tempfile.TemporaryFile() as a,
        tempfile.TemporaryFile() as b,
    ):
        for file, program in ((a, candidate), (b, tests)):
            file.write(program.encode())
            file.seek(0)
        tested = "script" if script else "candidate"
        started = [
            (tested, "", [a.fileno(), to_candidate[0], to_tests[1]]),
            ("tests", ",".join(shadowed), [b.fileno(), to_tests[0], to_candidate[1], verdict[1]]),
        ]
        guest = _GUEST.read_text(encoding="utf-8")
        guests = [
            start(["-c", guest, role, own, confinement(), *map(str, fds)], folder, role, limits, fds, unsafe)
            for role, own, fds in started
        ]
        try:
            for end in (*to_candidate, *to_tests, verdict[1]):
                os.close(end)
            said, ended = read(verdict[0], limits.patience * limits.seconds, _VERDICT)
        finally:
            os.close(verdict[0])
            for process in guests:
                stop(process)
    if not ended and len(said) < _VERDICT:
        return Result(False, "timeout")
    if said == b"passed":
        return Result(True)
    return Result(False, said.decode("utf-8", "replace") or "crash")


def _encode(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def start(
    arguments: list[str],
    folder: str,
    name: str,
    limits: Limits,
    fds: list[int],
    unsafe: bool,
    stdout: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Python with ``arguments``, under ``limits`` and, unless ``unsafe``, in a sandbox ``folder/name``."""
    sizes = f"--as={limits.memory_mb << 20}", f"--fsize={limits.file_mb << 20}", "--core=0", "--nofile=64"
    # With --unsafe it would count all of the user's processes.
    counts = [] if unsafe else [f"--nproc={processes(limits)}"]
    python = interpreter(), "-I"
    command = ["prlimit", f"--cpu={int(limits.seconds) + 1}", *sizes, *counts, *python, *arguments]
    if not unsafe:
        root = os.path.join(folder, name)
        os.mkdir(root)
        command = sandboxed(command, root, proc=True)
    null = subprocess.DEVNULL
    return subprocess.Popen(
        command,
        stdin=null,
        stdout=stdout,
        stderr=null,
        pass_fds=fds,
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def stop(guest: subprocess.Popen[bytes]) -> int:
    """Kills everything in a sandbox; returns what its first process ended with."""
    os.killpg(guest.pid, signal.SIGKILL)  # not waited for yet: there is a group, even if all in it have ended
    return guest.wait()


def interpreter() -> str:
    """Python as it was installed: an environment's own may be a copy, which a sandbox does not see."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined, no-any-return]  # as venv has it


def sandboxed(
    command: list[str], root: str, places: tuple[str, ...] = (), *, proc: bool = False
) -> list[str]:
    """``command``, to be run in a sandbox.

    Args:
        root: an empty folder; it can be deleted once the command runs.
        places: folders that the command may read, beside the system's and Python's own.
        proc: whether it sees ``/proc``, with its own processes alone.
    """
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *own_user, "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    seen = [*_BOUND, sys.base_prefix, *places]
    return [*unshare, "sh", "-c", _ENTER, "sh", root, _user(), "proc" if proc else "", *seen, "--", *command]


_users = itertools.count()


def _user() -> str:
    """Limits on processes do not bind root: started by root, each sandbox gets a user number that nobody else
    has."""
    if os.geteuid() != 0:
        return ""
    number = 1_000_000 + os.getpid() % 50_000 * 20_000 + next(_users) % 20_000
    return f"--reuid={number} --regid={number} --clear-groups"


@functools.cache
def sandbox_works() -> bool:
    """Whether this kernel and machine can build the sandbox; tried once, for real."""
    if any(shutil.which(tool) is None for tool in ("unshare", "setpriv", "pivot_root", "prlimit", "mount")):
        return False
    with tempfile.TemporaryDirectory(prefix="rsim-") as root:
        command = sandboxed(["true"], root, proc=True)
        return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0


@functools.cache
def confinement() -> str:
    """The text of `rsim.rewards.guest.confine`, for what runs in a sandbox; empty, and said once, where
    system calls cannot be filtered."""
    text = _GUEST.with_name("guest").joinpath("confine.py").read_text(encoding="utf-8")
    trial = [sys.executable, "-I", "-c", f"{text}\nfor_programs()"]
    if subprocess.run(trial, capture_output=True, check=False, timeout=30).returncode == 0:
        return text
    _log.warning(
        "this machine cannot filter system calls (seccomp on x86-64): a program that a model wrote may have "
        "%d processes, each with memory of its own, memory that counts nowhere, and AF_VSOCK sockets",
        _FEW,
    )
    return ""


def processes(limits: Limits) -> int:
    """How many a program may have: threads of one address space; or few, as each has memory of its own."""
    return limits.processes if confinement() else _FEW


def read(fd: int, seconds: float, most: int) -> tuple[bytes, bool]:
    """What was written, up to ``most`` bytes, and whether the other end was closed in time."""
    deadline, said = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as ready:
        ready.register(fd, selectors.EVENT_READ)
        while len(said) < most and ready.select(max(0.0, deadline - time.monotonic())):
            part = os.read(fd, most)
            if not part:
                return said, True
            said += part
    return said, False
