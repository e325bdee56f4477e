"""Answers that attack the checker: none scores right, none touches the host, and none changes the verdict on a later answer."""

from __future__ import annotations

import builtins
import json
import os
import socket
import time
from pathlib import Path

import pytest
import sympy
from sympy.parsing import sympy_parser

from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.rewards import sandbox, symbolic
from rsim.rewards.grade import grade
from rsim.rewards.guest.plain import NotPlainError, check_formula, data
from rsim.rewards.sandbox import sandbox_works
from rsim.rewards.symbolic import SymbolicPool
from test_check import fork_of, idle_worker

needs_sandbox = pytest.mark.skipif(not sandbox_works(), reason="this kernel allows no user namespaces")

# Answers by what judges them, read by `studies.attacks` too. PATH becomes a file that must not come into being.
ATTACKS = json.loads(Path(__file__).with_name("attacks.json").read_text(encoding="utf-8"))
GYM: list[tuple[str, str]] = [tuple(pair) for pair in ATTACKS["gym"]]
MATH: list[str] = ATTACKS["math"]


@pytest.fixture(scope="module")
def short_pool():
    pool = SymbolicPool(workers=1, seconds=1.5)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def quickly(short_pool, monkeypatch):
    """Those that only burn time need not burn five seconds each."""
    monkeypatch.setattr("rsim.rewards.grade.shared_pool", lambda: short_pool)


@pytest.fixture(scope="module")
def problems():
    tasks = sorted({task for task, _ in GYM})
    return {task: load_problems(f"gym:{task}", "dev", limit=1)[0] for task in tasks}


def gym_answer(attack: str, problem: Problem, path: Path) -> str:
    known = problem.meta["entry"]["metadata"]
    named = attack.replace("INTEGRAND", known.get("integrand", "")).replace("VARIABLE", known.get("variable", ""))
    return named.replace("PATH", str(path))


@needs_sandbox
@pytest.mark.parametrize(("task", "attack"), GYM, ids=range(len(GYM)))
def test_gym_attacks(task, attack, problems, tmp_path):
    problem = problems[task]
    assert not grade(problem, gym_answer(attack, problem, tmp_path / "touched")).right
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("attack", MATH, ids=range(len(MATH)))
def test_math_attacks(attack, tmp_path):
    assert not grade(Problem("", "x+1", kind="latex"), attack.replace("PATH", str(tmp_path / "touched"))).right
    assert not (tmp_path / "touched").exists()


def test_no_attack_gets_as_far_as_the_sandbox(problems, tmp_path, monkeypatch):
    """Where no sandbox stands, the same answers do no harm either: none of them is run."""
    monkeypatch.setattr(sandbox, "sandbox_works", lambda: False)
    pool = SymbolicPool(workers=1, seconds=2.0)
    for task, attack in GYM:
        answer = gym_answer(attack, problems[task], tmp_path / "touched")
        assert not pool.gym_mark(task, problems[task].meta["entry"], answer, unsafe=True).same, attack
    for attack in MATH:
        if attack == "\udcff":
            continue  # no text at all: `grade` refuses it
        assert not pool.same("$x+1$", attack.replace("PATH", str(tmp_path / "touched"))).same, attack
    assert not (tmp_path / "touched").exists()
    pool.close()


@needs_sandbox
def test_plain_right_answers_of_the_tasks_that_evaluate_are_accepted(problems, short_pool):
    for task in sorted({task for task, _ in GYM[:9]}):
        for problem in load_problems(f"gym:{task}", "train", limit=4):
            if problem.answer:
                assert grade(problem, problem.answer).right, (task, problem.answer)
                assert not grade(problem, f"2*({problem.answer})").right, (task, problem.answer)
    for task, answer in (("puzzle24", "(4 + 2) * (9 - 5)"), ("puzzle24", "4! * (9 - 8) ** 2")):
        assert grade(problems[task], answer).right, answer
    polynomial = {"answer": "x**2 - y**2"}
    pool = short_pool
    assert pool.gym_mark("polynomial_multiplication", polynomial, "-y**2 + x**2").same
    assert not pool.gym_mark("polynomial_multiplication", polynomial, "x**2 + y**2").same
    integral = {"metadata": {"variable": "x", "integrand": "2*x*cos(x**2) + 1/x"}}
    assert pool.gym_mark("intermediate_integration", integral, "sin(x**2) + log(x) + C").same
    assert pool.gym_mark("simple_integration", {"metadata": {"variable": "X", "integrand": "sqrt(X)/2"}}, "X**(3/2)/3 + C").same


def test_what_stands_in_for_eval_reads_data_only():
    assert data(" [[1, -2.5], ('a', None), {1: {2}}] ") == [[1, -2.5], ("a", None), {1: {2}}]
    assert data("((0x1f + 2) << 1) - 3") == 63
    for text in (
        "x",
        "f(1)",
        "[].append",
        "[1][0]",
        "[i for i in (1,)]",
        "lambda: 1",
        "1 if 1 else 2",
        "f'{1}'",
        "2**9",
        "(y := 1)",
        "*[1],",
        "",
        "1;2",
        5,
    ):
        with pytest.raises(NotPlainError):
            data(text)


@pytest.mark.parametrize(
    "formula",
    [
        "2*x + sin(y)**2",
        "exp(-x)/3 + C",
        "sqrt(2)*pi*I",
        "f(x) + 5!",
        "erf(x) - log(x, 2)",
        "Piecewise((x, x > 0), (1, y < 2))",
        "0.5*E",
    ],
)
def test_formulas_reach_sympy(formula):
    check_formula(*as_code(formula), {})


@pytest.mark.parametrize(
    "formula",
    [
        "x.y",
        "x[0]",
        "integrate(x)",
        "Integral(x, x)",
        "eval(x)",
        "S(1)",
        "sin('x')",
        "sympify('x')",
        "Symbol('x', real=True)",
        "f(g='x')",
        "exec",
        "x.__class__",
        "(lambda: 1)()",
        "[i for i in x]",
        "Lambda(x, x)",
        "print(1)",
        "Symbol",
        "sin(cos)",
        "__import__",
        "__import__('os')",
        "sin(*x)",
        "(sin)(x)(1)",
        "x if y else z",
        "'a' + 'b'",
        "open(x)",
        "Function('f').x",
        "Float(f('1'))",
        "preview(x)",
        "plot(x)",
        "Symbol(f'{x}')",
    ],
)
def test_nothing_else_reaches_sympy(formula):
    with pytest.raises(NotPlainError):
        check_formula(*as_code(formula), {})


def as_code(formula):
    """What sympy's parser would evaluate, and what names mean there."""
    names = dict(vars(sympy)) | vars(builtins)
    return sympy_parser.stringify_expr(formula, {}, names, sympy_parser.standard_transformations), names


# --- the second wall: a verifier that does run its answers ---

RUNS_ANSWERS = """
import sys
sys.path += sys.argv[1].split(":")
from rsim.rewards.guest import verifier
def judge(request):
    if request["answer"] == "right":
        return True
    exec(request["answer"], {"judge": judge, "verifier": verifier})
    return False
verifier._JUDGES["math_verify"] = judge
verifier._WARM_UP["math_verify"] = []
verifier.main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
"""
# Each raises an error that tells what it was denied, or harms only itself.
CODE = {
    "a host's file": "open('PATH', 'w')",
    "a file of the sandbox": "open('/tmp/x', 'w')",
    "a shell": "import os\nassert os.system('true') == 0",
    "a fork": "import os\nos.fork()",
    "a program": "import os\nos.execv('/bin/true', ['true'])",
    "the host's password file": "open('/etc/passwd')",
    "a network connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "a socket of any kind": "import socket\nsocket.socket(40, 1)",
    "another process": "import os, signal\nos.kill(1, signal.SIGKILL)",
    "its parent's memory": "open('/proc/1/mem', 'rb')",
    "the project": "open('REPOSITORY')",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "mounting": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "a name space": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "memory without a limit": "x = bytearray(8 << 30)",
    "a file in memory": "import os\nos.memfd_create('x')",
    "more rights": "import os\nos.setuid(0)",
    "a lifted limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
}


@pytest.fixture
def runs_answers(monkeypatch):
    monkeypatch.setattr(symbolic, "_MAIN", RUNS_ANSWERS)
    pool = SymbolicPool(workers=1, seconds=2.0)
    yield pool
    pool.close()


@needs_sandbox
def test_code_that_did_run_would_reach_nothing(runs_answers, tmp_path):
    assert runs_answers.same("", "assert 1 + 1 == 2").failure == "", "code is run here"
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, attack in CODE.items():
            answer = attack.replace("PATH", str(tmp_path / "touched")).replace("PORT", str(server.getsockname()[1]))
            outcome = runs_answers.same("", answer.replace("REPOSITORY", __file__))
            assert not outcome.same, name
            assert outcome.failure.startswith(("error", "crash", "memory")), (name, outcome)
    assert not (tmp_path / "touched").exists()


@needs_sandbox
def test_code_that_did_run_would_not_change_the_next_verdict(runs_answers):
    """It may ruin its own fork, whose verdict is its own; the next answer has another, and the pipe of replies is out of reach."""
    first = runs_answers.same("", "pass")
    assert not first.same
    assert first.failure == ""
    worker = idle_worker(runs_answers)
    for attack in (
        "verifier._math_verify = verifier._JUDGES['math_verify'] = lambda r: True",
        "judge.__code__ = (lambda request: True).__code__",
        "import os\nfor i in range(64):\n    try:\n        os.write(i, b'same\\n' * 40)\n    except OSError:\n        pass",
        "import os\nos._exit(0)",
        "import os\nfor i in range(64):\n    try:\n        os.close(i)\n    except OSError:\n        pass",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import builtins\nbuiltins.exec = lambda *a: None",
        "while True:\n    pass",
        "import time\nimport signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nraise SystemExit",
    ):
        runs_answers.same("", attack)
        wrong = runs_answers.same("", "pass")
        assert (wrong.same, wrong.failure) == (False, ""), attack
        assert runs_answers.same("", "right").same, attack
    assert worker.process.poll() is None, "all this in one worker"


@needs_sandbox
def test_the_worker_has_few_system_calls_and_no_privileges(runs_answers):
    look = "import os\nassert os.listdir('/proc') == [] and os.listdir('/') and 'home' not in os.listdir('/'), 1\nassert os.getpid() != 1\nassert os.environ.get('HOME') is None"
    assert runs_answers.same("", look).failure == ""
    worker = idle_worker(runs_answers)
    wanted = ["NoNewPrivs:\t1", "CapEff:\t0000000000000000"] + ["Seccomp:\t2"] * (os.uname().machine == "x86_64")
    deadline = time.monotonic() + 10  # the fork for the next answer takes a moment to get ready
    while missing := [line for line in wanted if line not in fork_status(worker.process.pid)]:
        assert time.monotonic() < deadline, missing


def fork_status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{fork_of(pid)}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return []


def test_without_namespaces_gym_answers_are_refused_and_latex_is_not(problems, monkeypatch):
    monkeypatch.setattr(sandbox, "sandbox_works", lambda: False)
    with pytest.raises(UserError, match="unsafe_code"):
        grade(problems["chain_sum"], "1")
    pool = SymbolicPool(workers=1)
    assert pool.same("$x+1$", "$1+x$").same
    assert pool.gym_mark("chain_sum", problems["chain_sum"].meta["entry"], problems["chain_sum"].answer, unsafe=True).same
    pool.close()


# --- code that forges the verdict ---

TESTS = 'assert decode(encode("abc")) == "abc"\nassert encode("abc") == "bcd"\n'


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS["code"])
def test_code_attacks(name, tmp_path):
    answer = ATTACKS["code"][name].replace("PATH", str(tmp_path / "touched"))
    assert not grade(Problem("", TESTS, kind="code"), answer).right
    assert not (tmp_path / "touched").exists()


needs_data = pytest.mark.skipif(not Path(os.environ.get("RSIM_DATA", "../shared/data")).is_dir(), reason="needs the data sets")


@needs_sandbox
@needs_data
def test_helpers_and_modules_of_the_tests_are_their_own(monkeypatch):
    monkeypatch.setenv("RSIM_DATA", os.environ.get("RSIM_DATA", "../shared/data"))
    human, mbpp = ({p.id: p for p in load_problems(name, split)} for name, split in (("humaneval", "test"), ("mbpp", "dev")))
    for problem, answer in (
        (human["HumanEval/32"], "def poly(xs, x): return 0.0\ndef find_zero(xs): return 1.0\n"),
        (human["HumanEval/38"], "def encode_cyclic(s): return s\ndef decode_cyclic(s): return s\n"),
        (human["HumanEval/50"], "def encode_shift(s): return s\ndef decode_shift(s): return s\n"),
        (mbpp["mbpp-596"], "class sys:\n    def getsizeof(v): return 1\ndef tuple_size(t): return 1\n"),
    ):
        assert not grade(problem, answer).right, problem.id
        assert grade(problem, problem.meta["reference"]).right, problem.id
