"""Model-written code: what is right passes, and every attack fails without harm."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.rewards import sandbox
from rsim.rewards.code import code_blocks
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
def test_programs_run_where_the_environments_python_is_a_copy(tmp_path, monkeypatch):
    """As ``python -m venv --copies`` makes it: nothing of it is in the sandbox."""
    monkeypatch.setattr(sys, "executable", shutil.copy(os.path.realpath(sys.executable), tmp_path / "python"))
    assert run_tests(SUM, TESTS).passed


@needs_sandbox
@pytest.mark.parametrize(("values", "kind"), [
    ("[1, 2.5, None, True, 'é', b'x', (1, (2,)), {1: {2}}, 1j, 10**50, float('inf')]", "plain data"),
    ("__import__('collections').Counter('aab')", "a Counter"), ("frozenset({1})", "a frozenset"), ("range(3)", "a range"),
])  # fmt: skip
def test_values_cross_unchanged(values, kind):
    assert run_tests("def same(v): return v", f"v = {values}\nassert same(v) == v and type(same(v)) is type(v)").passed, kind


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
    assert time.monotonic() - began < 30
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


# --- right programs of every shape; each with tests that it passes ---

RIGHT = {
    "a generator": ("def f():\n    yield 0\n    yield 1\n", "g = f()\nassert next(g) == 0\nassert list(g) == [1]\nassert 1 in f()"),
    "a callback": ("def f(g, v): return [g(x) for x in v]", "seen = []\nf(seen.append, [3])\nassert seen == [3]\nassert f(lambda x: x + 1, [1]) == [2]"),
    "a list changed in place": ("def f(a): a.sort()", "a = [3, 1, 2]\nassert f(a) is None\nassert a == [1, 2, 3]"),
    "what lies inside changed in place": (
        "def f(m, d): m[0][0] = 9; m.append(m[0]); d['s'].add(2); del d['x']; return m",
        "m, d = [[1], [2]], {'s': {1}, 'x': 0}\nassert f(m, d) is m\nassert m == [[9], [2], [9]]\nassert m[2] is m[0]\nassert d == {'s': {1, 2}}",
    ),
    "a callback that changes what it gets": ("def f(g):\n    a = [1]\n    g(a)\n    return a", "assert f(lambda a: a.append(2)) == [1, 2]"),
    "Decimal": ("from decimal import Decimal\ndef f(): return Decimal('1.10')", "from decimal import Decimal\nassert f() == Decimal('1.1')\nassert isinstance(f(), Decimal)"),
    "dates and fractions": (
        "import datetime as d, fractions\ndef f(x): return x + d.timedelta(days=1), fractions.Fraction(1, 3)",
        "import datetime as d, fractions\nassert f(d.date(2020, 2, 28)) == (d.date(2020, 2, 29), fractions.Fraction(1, 3))",
    ),
    "a named tuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f().x == 1\nassert f() == (1, 2)"),
    "an error of its own": (
        "class E(ValueError): pass\ndef f(): raise E('no', 3)",
        "for kind in (E, ValueError):\n    try:\n        f()\n    except kind as e:\n        assert e.args == ('no', 3)\n    else:\n        assert False",
    ),
    "the tests' own error, back through it": (
        "def f(g): return g()",
        "class Mine(Exception): pass\ndef g(): raise Mine('x')\ntry:\n    f(g)\nexcept Mine as e:\n    assert str(e) == 'x'\nelse:\n    assert False",
    ),
    "objects that compare": (
        "class P:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x\n    def __hash__(s): return hash(s.x)\n"
        "    def __add__(s, o): return P(s.x + o.x)\n    def __repr__(s): return f'P({s.x})'\n    def __lt__(s, o): return s.x < o.x\n    def __len__(s): return 0\n",
        "assert P(1) == P(1)\nassert P(1) != P(2)\nassert P(1) + P(2) == P(3)\nassert sorted([P(2), P(1)]) == [P(1), P(2)]\n"
        "assert repr(P(1)) == 'P(1)'\nassert isinstance(P(1), P)\nassert len({P(1), P(1)}) == 1\nassert len(P(1)) == 0\nassert not P(1)",
    ),
    "a context": ("class C:\n    def __enter__(s): return 5\n    def __exit__(s, *a): s.done = True\n", "c = C()\nwith c as x:\n    assert x == 5\nassert c.done"),
    "a data class with annotations as text": ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass D:\n    a: int\n", "assert D(1).a == 1\nassert D(1) == D(1)"),
    "the tests' objects": ("def f(n, m): n.next = m; return n", "class N:\n    next = None\na, b = N(), N()\nassert f(a, b) is a\nassert a.next is b"),
    "standard input and output": (
        "def main():\n    a, b = map(int, input().split())\n    print(a + b)\n",
        "import sys, io\nsys.stdin = io.StringIO('2 3\\n4 5\\n')\nb = io.StringIO()\nsys.stdout = b\nmain()\nmain()\nassert b.getvalue() == '5\\n9\\n'",
    ),
    "threads": ("import threading\ndef f():\n    r = []\n    t = threading.Thread(target=r.append, args=(1,))\n    t.start()\n    t.join()\n    return r", "assert f() == [1]"),
    "asyncio": ("import asyncio\nasync def g(): return 1\ndef f(): return asyncio.run(g())", "assert f() == 1"),
    "a file of its own": ("import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as h:\n        h.write('a')\n        h.seek(0)\n        return h.read()", "assert f() == 'a'"),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name):
    program, tests = RIGHT[name]
    assert run_tests(program, tests) == sandbox.Result(True)
    assert not run_tests("", tests).passed


YES = """
class E:
    def __eq__(s, o): return True
    def __ne__(s, o): return True
    def __sub__(s, o): return 0
    def __lt__(s, o): return True
    def __contains__(s, x): return True
    def __instancecheck__(s, x): return True
    def __iter__(s): return iter([])
    def __getattr__(s, name): return lambda *a: True
def f(): return E()
"""


@needs_sandbox
@pytest.mark.parametrize("test", [
    "assert f() == 1", "assert 1 == f()", "assert abs(f() - 1) < 1e-6", "assert f() - 1 == 0", "assert 1 in f()", "assert f() < 1", "assert f() in (1, 2)",
    "assert [f()] == [1]", "assert not f() != 1", "assert isinstance(f(), int)", "assert f() is True", "import math\nassert math.isclose(f(), 1)",
])  # fmt: skip
def test_an_object_that_says_yes_to_all_is_not_asked(test):
    assert not run_tests(YES, test).passed


@needs_sandbox
@pytest.mark.parametrize(("program", "test"), [
    ("import collections\ndef f(): return collections.deque([1, 2])", "assert f() == [1, 2]"), ("def f(): return range(2)", "assert f() == [0, 1]"),
    ("def f(): return (0, 1)", "assert f() == [0, 1]"), ("def f(): return {0: 0, 1: 1}.keys()", "assert f() == [0, 1]"), ("def f(): return '1'", "assert f() == 1"),
    ("def f(): return b'a'", "assert f() == 'a'"), ("def f(): return bytearray(b'a')", "assert f() == [97]"), ("def f():\n    yield 1", "assert f() == [1]"),
])  # fmt: skip
def test_a_value_of_another_type_is_another_value(program, test):
    assert not run_tests(program, test).passed


# What the tests hand over is theirs: each of these would forge the verdict, or read what it must not.
REACH = [
    "g.__globals__", "g.__code__", "g.func_globals", "o._secret", "setattr(o, '_secret', 1)", "o.link", "t.secret", "setattr(t, 'secret', 9)",
    "it.gi_frame", "e('1')", "g.__self__", "setattr(g, '__code__', f.__code__)", "o.method.__func__", "o.method.__globals__",
]  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("reach", REACH)
def test_a_candidate_reads_no_more_of_the_tests_than_they_show(reach):
    tests = (
        "class T:\n    secret = 1\n    _secret = 2\n    def method(self): return 3\n"
        "def gen(): yield 1\nassert f(lambda: 1, T(), T, gen(), eval) == 'refused'\nassert T.secret == 1\n"
    )
    program = f"def f(g, o, t, it, e):\n    try:\n        {reach}\n    except Exception:\n        return 'refused'\n    return 'reached'"
    assert run_tests(program, tests).passed


# Each is refused by an error, or ends the program.
DENIED = {
    "a process": "import os\nos.fork()",
    "a process that shares memory": "import ctypes\nassert ctypes.CDLL(None).syscall(56, 0x100 | 17, 0, 0, 0, 0) > 0",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "a command": "import subprocess\nsubprocess.run(['true'], check=True)",
    "a file in memory": "import os\nos.memfd_create('x')",
    "a shared segment": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
    "AF_VSOCK": "import socket\nsocket.socket(40, 1)",
    "AF_UNIX": "import socket\nsocket.socket(1, 1)",
    "a name space, where it could mount": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",
    "keys": "import ctypes\nassert ctypes.CDLL(None).syscall(248, b'user', b'x', b'y', 1, -1) >= 0",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "another's limits": "import ctypes\nassert ctypes.CDLL(None).prlimit(1, 7, None, None) == 0",
    "x32 calls": "import ctypes\nassert ctypes.CDLL(None).syscall(0x40000000 + 319, b'x', 0) >= 0",
    "more memory": "x = bytearray(600 << 20)",
    "more memory in pieces": "x = [bytearray(1 << 20) for _ in range(600)]",
    "more memory in threads": "import mmap\nx = [mmap.mmap(-1, 100 << 20) for _ in range(6)]",
    "more files": "for i in range(10_000): open(f'/tmp/{i}', 'w')",
    "larger files": "for i in range(9): open(f'/tmp/{i}', 'wb').write(b'x' * (8 << 20))",
    "a lifted limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}  # fmt: skip


@needs_sandbox
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls are filtered on x86-64")
@pytest.mark.parametrize("name", DENIED)
def test_memory_adds_up_and_ways_out_are_shut(name):
    lines = "".join(f"        {line}\n" for line in DENIED[name].splitlines())
    program = f"def f():\n    try:\n{lines}    except (OSError, MemoryError, AssertionError, ValueError):\n        return 'denied'\n    return 'open'"
    assert run_tests(program, "assert f() == 'denied'").passed


def test_a_machine_without_a_filter_says_so_and_allows_few_processes(monkeypatch, caplog):
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    sandbox.confinement.cache_clear()
    assert sandbox.processes(Limits()) == 4
    assert "AF_VSOCK" in caplog.text
    sandbox.confinement.cache_clear()


@needs_sandbox
def test_a_program_that_waits_has_time_and_one_that_computes_has_little():
    assert run_tests(
        "import time\ndef f():\n    time.sleep(2)\n    return 1", "assert f() == 1", limits=Limits(seconds=1.0)
    ).passed
    assert run_tests("import time\ntime.sleep(60)", TESTS, limits=Limits(seconds=0.5, patience=2.0)).failure == "timeout"
    began = time.monotonic()
    assert not run_tests("while True:\n    pass", TESTS, limits=Limits(seconds=1.0, patience=60.0)).passed
    assert time.monotonic() - began < 30, "ended by its processor time"


# --- problems with cases, extra tests, extra inputs ---


def coded(answer: str = "", **meta) -> Problem:
    return Problem("q", answer, kind="code", meta=meta)


@needs_sandbox
def test_cases_of_a_function_and_of_a_solution_class():
    cases = [{"input": [1, 2], "output": 3}, {"input": [[1], [2]], "output": [1, 2]}, {"input": [0.1, 0.2], "output": 0.3}]
    add = "def add(a, b): return a + b\n"
    assert grade(coded(cases=cases, entry_point="add"), add).right
    assert not grade(coded(cases=cases, entry_point="add"), "def add(a, b): return 3").right
    assert not grade(coded(cases=cases[:1], entry_point="add"), "def add(a, b): return 3.0 if a else True").right, (
        "another type"
    )
    solution = "class Solution:\n    def add(self, a, b): return a + b\n"
    assert grade(coded(cases=cases, entry_point="Solution.add"), solution).right
    assert not grade(coded(cases=cases, entry_point="Solution.add"), add).right
    assert not grade(coded(cases=cases, entry_point="Solution.add"), solution.replace("a + b", "b + a")).right


@needs_sandbox
def test_cases_of_a_program_that_reads_and_prints():
    problem = coded(cases=[{"input": "2 3\n", "output": "5\n"}, {"input": "1 1", "output": "2\n0.5"}])
    right = "import sys\nif __name__ == '__main__':\n    v = list(map(int, sys.stdin.buffer.read().split()))\n    print(sum(v))\n    if v[0] == 1: print('0.500  ')\n"
    assert grade(problem, right).right
    assert grade(problem, right + "sys.exit(0)").right
    for wrong in (
        "",
        "print(5)",
        right + "1/0",
        right + "sys.exit(1)",
        right + "print()\nprint(1)",
        "import os\nos.write(1, b'passed')\nos._exit(0)",
        right.replace("0.500", "0.51"),
    ):
        assert not grade(problem, wrong).right, wrong


@needs_sandbox
def test_extra_tests_and_extra_inputs_against_a_reference():
    reference = "def f(a):\n    a.sort()\n    return sum(a) / 3\n"
    problem = coded("assert f([3]) == 1", entry_point="f", reference=reference, extra_inputs=[[[3, 1, 2]], "([4.5, 2],)"])
    assert grade(problem, "def f(x): return sum(x) / 3").right
    assert not grade(problem, "def f(x): return 1").right
    assert not grade(coded("assert f() > 0", extra_tests="assert f() == 1"), "def f(): return 2").right


FENCED = ["```python\nX```", "```python3\nX```", "```Python\nX\n   ```", "```py\nX```", "```\nX```", "~~~python\nX~~~", "````Python title=a\nX````", "  ```python\n  X  ```", "```PYTHON3.11  \r\nX```"]  # fmt: skip


@pytest.mark.parametrize("fenced", FENCED)
def test_fences_of_python(fenced):
    assert code_blocks("So:\n" + fenced.replace("X\n", "X").replace("X", "x = 1\n") + "\nDone.") == ["x = 1\n"]


def test_other_fences_are_none_and_do_not_turn_the_text_inside_out():
    assert code_blocks("```text\nfoo\n```\nNow\n```python\nx = 1\n```\n```sh\nls\n```") == ["x = 1\n"]
    assert code_blocks("```python\nx = 1\n") == []
    assert code_blocks("````\n```\nx\n```\n````") == ["```\nx\n```\n"]
