"""The process behind `rsim.rewards.symbolic`: one third-party library, and forks that judge.

The waiting process imports and warms up the library, reads jobs and passes them on; it never looks into an
answer. A fork of it, ready before its job arrives, closes every file but its own two pipes, takes limits on
(`confine`) and judges one answer; what this changes in it dies with it. It knows neither the job's nonce nor
the pipe that replies go to.

A job is a line, ``NONCE LENGTH``, and LENGTH bytes, a pickle of ours. A reply is a line, ``NONCE VERDICT``; a
verdict is ``same``, ``different`` or why there is none.
"""

from __future__ import annotations

import fractions
import gc
import importlib
import logging
import os
import pickle
import re
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from rsim.rewards.guest import confine, plain

_VERDICT = re.compile(r"same|different|memory|error: \w{1,80}")
_NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf|infinity)(?![a-z])")
_PATIENCE = 12  # wall clock to processor time: the machine may be busy
Judge = Callable[[dict[str, Any]], bool]


def main(library: str, jobs: int, replies: int, memory_mb: int, seconds: float) -> None:
    """Serves jobs from one file descriptor to another until the first is closed.

    Args:
        memory_mb: address space of each process.
        seconds: processor time of one answer.
    """
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    judge = _JUDGES[library]
    importlib.import_module(library)
    plain.guard_sympy()
    plain.guard_evaluation(_PACKAGES[library])
    for job in _WARM_UP[library]:
        judge(job)
    gc.collect()
    gc.freeze()  # so that a fork's collector does not copy what it shares
    confine.for_good(memory_mb)
    os.dup2(0, 2)  # errors of the start went to the host
    os.write(replies, b"ready\n")
    fork = _Fork(judge, seconds)
    with os.fdopen(jobs, "rb") as lines:
        while header := lines.readline():
            nonce, length = header.decode().split()
            verdict = fork.verdict(lines.read(int(length)), _PATIENCE * seconds)
            os.write(replies, f"{nonce} {verdict}\n".encode())
            fork.end()
            fork = _Fork(judge, seconds)


class _Fork:
    """A child that waits for a job."""

    def __init__(self, judge: Judge, seconds: float) -> None:
        job, verdict = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _judge_one(judge, job[0], verdict[1], seconds)
        os.close(job[0])
        os.close(verdict[1])
        self.job, self.said = job[1], verdict[0]

    def verdict(self, job: bytes, seconds: float) -> str:
        """What the child says of ``job`` within ``seconds``, or how it ended: ``timeout`` or ``crash``."""
        deadline = time.monotonic() + seconds
        unsent = len(job).to_bytes(8, "big") + job
        try:
            while unsent:
                unsent = unsent[os.write(self.job, unsent) :]
        except BrokenPipeError:
            return "crash"
        said = b""
        while b"\n" not in said and len(said) < 200:
            if not select.select([self.said], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return "timeout"
            part = os.read(self.said, 200)
            if not part:
                status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
                return (
                    "timeout" if status and status.si_status in (signal.SIGPROF, signal.SIGXCPU) else "crash"
                )
            said += part
        text = said.decode("utf-8", "replace").removesuffix("\n")
        return text if _VERDICT.fullmatch(text) else "crash"

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet, so the number is its own
        os.waitpid(self.pid, 0)
        os.close(self.job)
        os.close(self.said)


def _judge_one(judge: Judge, jobs: int, verdicts: int, seconds: float) -> None:
    """The child's whole life."""
    low, high = sorted((jobs, verdicts))
    for first, end in ((3, low), (low + 1, high), (high + 1, 1 << 16)):
        os.closerange(first, end)
    confine.for_answers(seconds)
    with os.fdopen(jobs, "rb") as lines:
        length = lines.read(8)
        if not length:  # no job comes any more
            os._exit(0)
        request = pickle.loads(lines.read(int.from_bytes(length, "big")))
    try:
        said = "same" if judge(request) else "different"
    except MemoryError:
        said = "memory"
    except BaseException as error:  # they raise nearly anything on malformed answers: fail closed, say so
        said = f"error: {type(error).__name__}"
    os.write(verdicts, said.encode() + b"\n")
    os._exit(0)


def _math_verify(request: dict[str, Any]) -> bool:
    import math_verify  # type: ignore[import-untyped,unused-ignore]

    both = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    gold, given = (
        math_verify.parse(request[key], extraction_config=both, parsing_timeout=None, raise_on_error=True)
        for key in ("gold", "answer")
    )
    same: bool = math_verify.verify(
        gold, given, timeout_seconds=None, raise_on_error=True, **request["options"]
    )
    return same


def _gym(request: dict[str, Any]) -> bool:
    """Full marks only: these verifiers give wrong answers a part; and no more than `_may_be_right` allows."""
    from reasoning_gym.factory import get_score_answer_fn  # type: ignore[import-untyped,unused-ignore]

    if not _may_be_right(request["task"], request["answer"], str(request["entry"].get("answer") or "")):
        return False
    mark: float = get_score_answer_fn(request["task"])(request["answer"], request["entry"])
    return mark > 0.99


def _may_be_right(task: str, answer: str, gold: str) -> bool:
    """False for what some verifiers take although it is wrong: nothing, no number, any word for a truth, the
    first digits of a probability."""
    said = answer.strip().casefold()
    if not said:
        return not gold.strip()
    if _NO_NUMBER.search(said) and not _NO_NUMBER.search(gold.casefold()):
        return False
    if task == "game_of_life_halting":
        return said == gold.casefold()
    if task == "coin_flip":
        given, wanted = (float(fractions.Fraction(text.replace(",", ""))) for text in (said, gold))
        return abs(given - wanted) <= min(1e-4, 0.01 * wanted)
    return True


_JUDGES: dict[str, Judge] = {"math_verify": _math_verify, "reasoning_gym": _gym}
_PACKAGES = {"math_verify": ("math_verify", "latex2sympy2_extended"), "reasoning_gym": ("reasoning_gym",)}

# What is parsed and compared once before the first fork need not be learnt again in each: parser tables,
# caches, imports.
_LATEX = r"""
$x+1$ ; $1+x$
$\frac{1}{2}$ ; $0.5$
$\dfrac{3}{4}x$ ; $\frac34 x$
$\sqrt{8}$ ; $2\sqrt{2}$
$\sqrt[3]{2}$ ; $2^{1/3}$
$\pi$ ; $3\pi/2$
$\left(1,2\right)$ ; $(2,1)$
$\{1,2\}$ ; $\{2,1\}$
$[0,1)$ ; $(0,1]$
$(-\infty,2)\cup(3,\infty)$ ; $(-\infty,2]$
$\begin{pmatrix}1\\2\end{pmatrix}$ ; $\begin{pmatrix}1&0\\0&1\end{pmatrix}$
$x^2-1$ ; $(x-1)(x+1)$
$y=2x+3$ ; $2x+3$
$1,-2$ ; $-2,1$
$90^\circ$ ; $90$
$\text{Monday}$ ; $\text{(A)}$
$10\%$ ; $0.1$
$10,000$ ; $12_5$
$\binom{5}{2}$ ; $10!$
$2+3i$ ; $-i$
$\sin x\cos(2x)$ ; $\tan\theta$
$e^{x}\ln 2$ ; $\log_2 8$
$x\le 3$ ; $x>2$
$|x-1|$ ; $f(x)$
$\frac{\sqrt{3}}{2}a\cdot b$ ; $a\times b\div c$
$x_1$ ; $\alpha_{2}$
$3x^2 - 5x + 7$ ; $7-5x+3x^{2}$
$\frac{x+2}{7}$ ; $\frac{1}{2\sqrt{5}+1}$
12 apples ; the answer is 5.5
1/2 ; x = 3 or x = 5
$\boxed{4}$ ; -7
$\frac{-1 + \sqrt{13}}{2}$ ; $\frac{1\pm\sqrt{19}}{2}$
$2^{10}$ ; $1.5e3$
"""
_WARM_UP: dict[str, list[dict[str, Any]]] = {
    "math_verify": [
        {"gold": gold, "answer": answer, "options": {"float_rounding": 6}}
        for gold, _, answer in (line.partition(" ; ") for line in _LATEX.strip().splitlines())
    ],
    "reasoning_gym": [
        {"task": "polynomial_multiplication", "entry": {"answer": "2*x**2 - 1"}, "answer": "2*x**2 + sqrt(x)"}
    ],
}
