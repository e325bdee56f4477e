"""Runs a program that a model has written in the middle of its answer, in the sandbox: what did it print?"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import get_args

from rsim.config import RewardsConfig
from rsim.errors import UserError
from rsim.game.tools import Runner, check_tools
from rsim.policies.protocol import AnyPlanner
from rsim.rewards.sandbox import ENVIRONMENT, Limits, confinement, processes, sandbox_works, sandboxed
from rsim.rules import Tool

_MOST = 1 << 16  # bytes of its output that are read; more ends it
_LONGEST_ERROR = 200  # characters
# argv: the file descriptors of the program's text and of the error line, and `confinement`.
_GUEST = """
import os, sys
with os.fdopen(int(sys.argv[1]), encoding="utf-8") as file:
    source = file.read()
confine = {"for_programs": lambda: None}
exec(compile(sys.argv[3], "confine", "exec"), confine)
confine["for_programs"]()
try:
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
except SystemExit:
    pass
except BaseException as error:
    line = (type(error).__name__ + ": " + str(error)).strip().rstrip(":")
    os.write(int(sys.argv[2]), line.encode("utf-8", "replace"))
"""


def runner_for(planner: AnyPlanner | None, rewards: RewardsConfig) -> Runner | None:
    """What runs the programs of a planner's strategies; None where none of them writes any.

    Raises:
        UserError: the kernel allows no sandbox here and ``rewards.unsafe_code`` is off.
    """
    if planner is None or "python" not in planner.strategies.tools.values():
        return None
    if not rewards.unsafe_code and not sandbox_works():
        raise UserError(
            "programs that a model writes cannot be sandboxed here",
            "allow user namespaces, set rewards.unsafe_code, or take strategies without the tool python",
        )
    return partial(run_program, unsafe=rewards.unsafe_code)


def allowed(planner: AnyPlanner, tools: Sequence[str]) -> Runner | None:
    """What runs the programs of its strategies in the sandbox, where ``tools`` name *python*; the calculator
    may always act.

    Raises:
        UserError: a tool that is not known; programs that nobody allowed; no sandbox.
    """
    unknown = set(tools) - set(get_args(Tool))
    if unknown:
        raise UserError(f"--tools {sorted(unknown)[0]}", f"known: {', '.join(get_args(Tool))}")
    runner = runner_for(planner, RewardsConfig()) if "python" in tools else None
    check_tools(planner.strategies, runner)
    return runner


def run_program(program: str, seconds: float = 5.0, *, unsafe: bool = False) -> str:
    """What ``program`` printed; an error, or that its time was over, is one short last line."""
    limits = Limits(seconds=seconds)
    try:
        source = program.encode()
    except UnicodeEncodeError:
        return "SyntaxError: not a text"
    told = os.pipe()
    with tempfile.TemporaryDirectory(prefix="rsim-") as folder, tempfile.TemporaryFile() as file:
        file.write(source)
        file.seek(0)
        guest = _start(folder, [file.fileno(), told[1]], limits, unsafe=unsafe)
        assert guest.stdout is not None
        try:
            os.close(told[1])
            printed, ended = _read(guest.stdout.fileno(), seconds)
        finally:
            os.killpg(
                guest.pid, signal.SIGKILL
            )  # not waited for yet: there is a group, even if all have ended
            status = guest.wait()
            guest.stdout.close()
            error = _read(told[0], 0.0)[0].decode("utf-8", "replace")
            os.close(told[0])
    lines = printed.decode("utf-8", "replace").rstrip("\n")
    if not ended and len(printed) < _MOST:
        error = f"TimeoutError: stopped after {seconds:g} s"
    elif ended and not error and status not in (0, -signal.SIGKILL):
        error = f"the program was ended (status {status})"
    return f"{lines}\n{_one_line(error)}".strip("\n") if error else lines


def _start(folder: str, fds: list[int], limits: Limits, *, unsafe: bool) -> subprocess.Popen[bytes]:
    python = os.path.realpath(sys.executable)
    command = [
        "prlimit",
        f"--cpu={int(limits.seconds) + 1}",
        f"--as={limits.memory_mb << 20}",
        "--core=0",
        "--nofile=64",
    ]
    command += [f"--fsize={limits.file_mb << 20}", *([] if unsafe else [f"--nproc={processes(limits)}"])]
    command += [python, "-I", "-u", "-c", _GUEST, *map(str, fds), confinement()]
    if not unsafe:
        root = os.path.join(folder, "root")
        os.mkdir(root)
        command = sandboxed(command, root, proc=True)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def _read(fd: int, seconds: float) -> tuple[bytes, bool]:
    """What was written, up to `_MOST` bytes, and whether the other end was closed in time."""
    deadline, said = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as ready:
        ready.register(fd, selectors.EVENT_READ)
        while len(said) < _MOST and ready.select(max(0.0, deadline - time.monotonic())):
            part = os.read(fd, _MOST)
            if not part:
                return said, True
            said += part
    return said, False


def _one_line(error: str) -> str:
    """The first line of an error, cut."""
    line = error.splitlines()[0] if error else ""
    return line if len(line) <= _LONGEST_ERROR else line[:_LONGEST_ERROR] + " ..."
