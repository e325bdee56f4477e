"""Runs a program that a model has written in the middle of its answer, in the sandbox: what did it print?"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import get_args

from rsim.config import RewardsConfig
from rsim.errors import UserError
from rsim.game.tools import Runner, check_tools
from rsim.policies.protocol import AnyPlanner
from rsim.rewards.sandbox import Limits, confinement, read, sandbox_works, start, stop
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
        fds = [file.fileno(), told[1]]
        arguments = ["-u", "-c", _GUEST, *map(str, fds), confinement()]
        guest = start(arguments, folder, "root", limits, fds, unsafe, stdout=subprocess.PIPE)
        assert guest.stdout is not None
        try:
            os.close(told[1])
            printed, ended = read(guest.stdout.fileno(), seconds, _MOST)
        finally:
            status = stop(guest)
            guest.stdout.close()
            error = read(told[0], 0.0, _MOST)[0].decode("utf-8", "replace")
            os.close(told[0])
    lines = printed.decode("utf-8", "replace").rstrip("\n")
    if not ended and len(printed) < _MOST:
        error = f"TimeoutError: stopped after {seconds:g} s"
    elif ended and not error and status not in (0, -signal.SIGKILL):
        error = f"the program was ended (status {status})"
    return f"{lines}\n{_one_line(error)}".strip("\n") if error else lines


def _one_line(error: str) -> str:
    """The first line of an error, cut."""
    line = error.splitlines()[0] if error else ""
    return line if len(line) <= _LONGEST_ERROR else line[:_LONGEST_ERROR] + " ..."
