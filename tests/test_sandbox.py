"""Model-written code: what is right passes, and every attack fails without harm."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.rewards import sandbox
from rsim.rewards.grade import check, grade
from rsim.rewards.sandbox import Limits, run_tests, sandbox_works

TESTS = "assert add(2, 3) == 5\nassert add(1, 1) == 2\n"
SUM = "def add(a, b): return a + b\n"
FAST = Limits(seconds=4.0)

needs_sandbox = pytest.mark.skipif(not sandbox_works(), reason="this kernel allows no user namespaces")


@needs_sandbox
def test_right_and_wrong_programs():
    assert run_tests(SUM, TESTS).passed
    assert run_tests("def add(a, b): return a - b", TESTS).failure == "failed: AssertionError"
    assert not run_tests("", TESTS).passed
    assert not run_tests("def add(a, b", TESTS).passed
    assert not run_tests(SUM + "\0", TESTS).passed


@needs_sandbox
@pytest.mark.parametrize(("values", "kind"), [
    ("[1, 2.5, None, True, 'é', b'x', (1, (2,)), {1: {2}}, 1j, 10**50, float('inf')]", "plain data"),
    ("__import__('collections').Counter('aab')", "a Counter"), ("frozenset({1})", "a frozenset"), ("range(3)", "a range"),
])  # fmt: skip
def test_values_cross_unchanged(values, kind):
    assert run_tests(
        "def same(v): return v", f"v = {values}\nassert same(v) == (list(v) if isinstance(v, range) else v)"
    ).passed, kind


@needs_sandbox
def test_objects_and_types_and_errors_cross():
    node = "class Node:\n    def __init__(self, v): self.v = v; self.next = None\ndef length(n): return 0 if n is None else 1 + length(n.next)\n"
    assert run_tests(node, "a = Node(1)\na.next = Node(2)\nassert length(a) == 2\nassert a.next.v == 2").passed
    assert run_tests("def keep(v, t): return [x for x in v if isinstance(x, t)]", "assert keep([1, 'a'], str) == ['a']").passed
    bad = "def f(): raise ValueError('x')"
    assert run_tests(bad, "try:\n    f()\nexcept ValueError:\n    pass\nelse:\n    assert False").passed
    shadow = "def sum(a, b): return a * b"
    assert not run_tests(shadow, "assert sum(2, 3) == 6").passed
    assert run_tests(shadow, "assert sum(2, 3) == 6", shadowed=("sum",)).passed


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "endless loop": "while True:\n    pass",
    "endless loop in the call": "def add(a, b):\n    while True:\n        pass",
    "10 GB": "x = bytearray(10 * 2**30)\n" + SUM,
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)\n" + SUM,
    "any network interface": "import socket\nassert [n for _, n in socket.if_nameindex() if n != 'lo']\n" + SUM,
    "killing the parent": "import os\nos.kill(os.getppid(), 9)\n" + SUM.replace("a + b", "9"),
    "killing everything": "import os\nos.kill(-1, 9)\n" + SUM.replace("a + b", "9"),
    "leaving early": "import os\nos._exit(0)",
    "leaving early in the call": "import os\ndef add(a, b): os._exit(0)",
    "sys.exit": "raise SystemExit(0)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.abs = lambda x: 0\ndef add(a, b): return 9",
    "forged verdict": "import os\nfor i in range(3, 60):\n    try: os.write(i, b'passed\\n')\n    except OSError: pass\ndef add(a, b): return 9",
    "deep recursion": "def add(a, b): return add(a, b)",
    "writing outside": "open('/usr/lib/x', 'w')\n" + SUM,
    "a huge file": "open('/tmp/x', 'wb').write(b'x' * 10**9)\n" + SUM,
    "mounting": "import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0\n" + SUM,
    "endless output in the call": "def add(a, b):\n    while True:\n        print('x' * 10**6)",
    "deleting": "import shutil\nshutil.rmtree('/usr')\n" + SUM,
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_in_time_and_leave_nothing(name):
    began = time.monotonic()
    assert not run_tests(ATTACKS[name], TESTS, limits=FAST).passed
    assert time.monotonic() - began < 15
    deadline = time.monotonic() + 5  # the kernel takes a moment to bury the dead
    while processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes() == []


def processes() -> list[str]:
    """Numbers of live processes that a sandbox started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if b"What runs inside the sandbox" in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


@needs_sandbox
def test_the_number_of_processes_is_limited():
    bomb = "import os, time\ncount = 0\ntry:\n    while count < 200:\n        if os.fork() == 0:\n            time.sleep(60)\n        count += 1\n"
    bomb += "except OSError:\n    pass\ndef made(): return count\n"
    assert run_tests(bomb, "assert 0 < made() < 20", limits=FAST).passed


@needs_sandbox
def test_printing_gigabytes_costs_nothing_and_harms_nothing():
    assert run_tests("for _ in range(100):\n    print('x' * 10**6)\n" + SUM, TESTS, limits=FAST).passed


@needs_sandbox
def test_the_home_folder_and_the_project_cannot_be_seen(tmp_path):
    (tmp_path / "secret").write_text("s")
    spy = f"import os\ndef see(): return [os.path.exists(p) for p in ({str(tmp_path / 'secret')!r}, {str(Path.cwd())!r}, '/etc/passwd', '/old/usr')]"
    assert run_tests(spy, "assert see() == [False] * 4").passed
    mine = "import os\ndef add(a, b): return a + b if len([p for p in os.listdir('/proc') if p.isdigit()]) <= 4 else 0"
    assert run_tests(mine, TESTS).passed, "it sees its own processes only"


@needs_sandbox
def test_code_problems_through_the_checker():
    problem = Problem("Write add.", TESTS, kind="code")
    block = f"Here:\n```python\n{SUM}```\n"
    assert check(problem, block)[1].right
    assert check(problem, block + block, "strict") == (None, check(problem, "", "strict")[1])
    assert check(problem, block + block, "flexible")[1].right
    assert check(problem, SUM, "flexible")[1].right
    assert not check(problem, "no code", "flexible")[1].right


@needs_sandbox
def test_a_body_or_a_whole_function_completes_a_prompt():
    """A whole function still has the prompt's imports and helpers."""
    prefix = 'from typing import List\n\ndef twice(x): return 2 * x\n\ndef f(v: List[int]) -> List[int]:\n    """Doubles."""\n'
    problem = Problem(
        "q", "assert f([1, 2]) == [2, 4]\nassert twice(2) == 4", kind="code", meta={"prefix": prefix, "entry_point": "f"}
    )
    whole = "def f(v: List[int]) -> List[int]:\n    return [twice(x) for x in v]\n"
    assert grade(problem, whole).right
    assert grade(problem, "    return [twice(x) for x in v]\n").right
    assert not grade(problem, "    pass\n").right
    assert not grade(problem, whole.replace("twice(x)", "x")).right


@needs_sandbox
def test_a_problem_without_a_prompt_to_complete_takes_any_program():
    """MBPP's: an answer that names the function None was a KeyError."""
    problem = Problem("First letter?", "assert first('ab') == 'a'", kind="code")
    assert grade(problem, "# def None\ndef first(text): return text[0]\n").right
    assert not grade(problem, "# def None\ndef first(text): return 1\n").right


def test_the_candidate_gives_only_the_names_that_were_asked_for():
    """Names of its own, even those of built-ins, change nothing in the tests."""
    hijack = "def add(a, b): return 9\nabs = lambda x: 0\nlen = lambda x: 1\nprint = None\n"
    assert not run_tests(hijack, "assert abs(add(2, 3) - 5) < 1\nassert len([1]) == 1").passed


def test_without_namespaces_it_refuses_unless_told(monkeypatch):
    monkeypatch.setattr(sandbox, "sandbox_works", lambda: False)
    with pytest.raises(UserError, match="--unsafe"):
        run_tests(SUM, TESTS)
    assert run_tests(SUM, TESTS, unsafe=True).passed
    assert not run_tests("while True:\n    pass", TESTS, unsafe=True, limits=Limits(seconds=2.0)).passed
