"""What the checker takes for an answer and what it does not: one line for each way to say it, and properties of the kinds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsim.game.problem import Problem
from rsim.rewards.grade import check, grade

# gold ;; answer (a list of numbers was once read as a decimal: 1.2 was right for 1,2, and 2,1 was wrong)
SAME = r"""
1,-2 ;; -2,1
0,1 ;; 1, 0
3,5,7 ;; 7,5,3
2,-2 ;; \pm 2
1,2 ;; 1 \text{ and } 2
1,-2 ;; \{1,-2\}
1,-2 ;; x=1 \text{ or } x=-2
1,-2 ;; x = 1, x = -2
x=1, x=-2 ;; 1,-2
1,2,3 ;; 3;2;1
5 ;; |5|
5 ;; 5/1
5 ;; 5.0
5 ;; 5.
5 ;; +5
5 ;; {5}
5 ;; (5)
5 ;; \boxed{5}
5 ;; \text{5}
5 ;; $5$
5 ;; 5\text{ cm}^2
5 ;; 5 cm^2
5 ;; 5\,\mathrm{kg}
5 ;; 5 \text{ m/s}
5 ;; 5 apples
5 ;; x = 5
5 ;; n=5
5 ;; 5 = x
5 ;; \text{The answer is } 5
5 ;; 2+3=5
5 ;; 2+3
5 ;; 10/2
5\text{ cm}^2 ;; 5\text{ square centimeters}
5\text{ hours} ;; 5\text{ hr}
3\text{ feet} ;; 3\text{ ft}
\$5 ;; 5\text{ dollars}
5\% ;; 5
5\% ;; 0.05
9\text{ a.m.} ;; 9 \text{ am}
8\!:\!34 \text{ p.m.} ;; 8:34\text{ PM}
3+4i ;; 4i+3
2x ;; x \cdot 2
2x ;; x*2
2ab ;; 2ba
12_5 ;; 12_{5}
12_5 ;; 12_{\text{five}}
A5_{12} ;; A5_{12}
y = 3 ;; 3
3 ;; y = 3
y=2x+1 ;; y=1+2x
y=2x+1 ;; 2x+1
y=2x+1 ;; 2x - y + 1 = 0
f(x)=2x+1 ;; 2x+1
(100,101) ;; (100,101)
[1,2) ;; [1,2)
(1,2) ;; (1.0, \frac{4}{2})
(-\infty,2)\cup(3,\infty) ;; (3,\infty)\cup(-\infty,2)
(-\infty,2) ;; (-∞,2)
(-\infty,2) ;; x<2
[1,2) ;; 1 \le x < 2
x \in [1,2) ;; [1,2)
\frac{1}{5120} ;; 0.0001953125
1/3 ;; 0.3333
2/3 ;; 0.6667
\pi ;; 3.1416
\sqrt{2} ;; \sqrt2
\frac65 ;; \dfrac{6}{5}
\frac65 ;; 1\frac15
\frac65 ;; 1.2
\frac65 ;; 6/5
\frac65 ;; \frac{6}{5}
\frac65 ;; \tfrac65
-\frac12 ;; \frac{-1}{2}
-\frac12 ;; \frac{1}{-2}
-\frac12 ;; -1/2
8\pi ;; 8pi
8\pi ;; 8*pi
8\pi ;; 8π
-\frac{\pi}{6} ;; -pi/6
\sqrt{3}/2 ;; sqrt(3)/2
\sqrt{3}/2 ;; √3/2
\frac{1}{\sqrt2} ;; \frac{\sqrt2}{2}
\frac{1}{1+\sqrt2} ;; \sqrt2-1
\sqrt{3+2\sqrt2} ;; 1+\sqrt2
\sqrt[3]{16} ;; 2\sqrt[3]{2}
x^2-1 ;; (x-1)(x+1)
\frac{x^2-1}{x-1} ;; x+1
\frac{1}{x}+\frac{1}{y} ;; \frac{x+y}{xy}
\frac{1}{x+1}+\frac{1}{x} ;; \frac{2x+1}{x(x+1)}
x^{n+1} ;; x \cdot x^n
2^{n+1} ;; 2\cdot 2^n
\sin^2 x ;; 1-\cos^2 x
\tan x ;; \frac{\sin x}{\cos x}
\ln 8 ;; 3\ln 2
\log_2 8 ;; 3
\binom{5}{2} ;; 10
5! ;; 120
1\frac12 ;; \frac32
1\frac12 ;; 1.5
1\frac12 ;; 1 1/2
1.5\times10^3 ;; 1500
1500 ;; 1.5\times 10^{3}
1500 ;; 1.5 \cdot 10^3
1500 ;; 1.5e3
1500 ;; 1,500
1500 ;; 1 500
1500 ;; 1{,}500
1500 ;; 1\,500
1500000 ;; 1.5 million
90^\circ ;; 90
90^\circ ;; 90 degrees
90^\circ ;; 90°
1 \pm \sqrt{19} ;; 1+\sqrt{19}, 1-\sqrt{19}
\pm 2 ;; 2,-2
\{1,2\} ;; \{2,1\}
\{(1,2),(3,4)\} ;; (3,4),(1,2)
\begin{pmatrix}1\\2\end{pmatrix} ;; \begin{bmatrix}1\\2\end{bmatrix}
\begin{pmatrix}1/2\\2\end{pmatrix} ;; \begin{pmatrix}0.5\\2\end{pmatrix}
2:3 ;; 2:3
x>2 ;; 2<x
x>2 ;; (2,\infty)
2x+3y=6 ;; 4x+6y=12
2x+3y=6 ;; 6=3y+2x
x^2+y^2=4 ;; y^2 = 4-x^2
\text{Monday} ;; Monday
\text{Monday} ;; \textbf{monday}
\text{(E)} ;; E
\text{(E)} ;; (E)
x^2 ;; x²
\emptyset ;; \varnothing
2007 + \frac\pi 2 ;; \frac\pi2+2007
\text{C, F, H} ;; H, C, F
3\sqrt{13} ;; \sqrt{117}
7 ;; 7,
0 ;; -0
0 ;; \frac{0}{5}
\frac{3}{4} ;; 0.75
\frac{3}{4} ;; 75\%
10 ;; 10_{10}
10 ;; 10^{\circ}
10 ;; 010
10 ;; 10 %
"""
DIFFERENT = r"""
1,-2 ;; 1
0,1 ;; 0.1
1,2 ;; 1.2
-3,1 ;; -3.1
1,2,3 ;; 1,2
1,2,3 ;; 1,2,3,4
1,2,3 ;; 1,2,2
1,2,2 ;; 1,1,2
5 ;; not 5
5 ;; it isn't 5
5 ;; \text{not} = 5
5 ;; \text{not } \approx 5
5 ;; \text{not } 5
5 ;; either 4 or 5
5 ;; maybe 5
5 ;; 5 is wrong
5 ;; \neq 5
5 ;; x \neq 5
5 ;; > 5
5 ;; x > 5
5 ;; at least 5
5 ;; less than 5
5 ;; 5 or more
5 ;; 5 + x
5 ;; 5x
5 ;; 5 thousand
5 ;; 5 hundredths
5 ;; 5 dozen
5 ;; 5 half
5 ;; 5 squared
5 ;; 5!
5 ;; 5\pi
5 ;; 5e
5 ;; 5^2
5 ;; 5_8
5 ;; \sqrt{5}
5 ;; --5
5 ;; -5
5 ;; 4...5
5 ;; 4-5
5 ;; 4=5
5 ;; 5=4
5\text{ cm} ;; 5\text{ m}
5\text{ cm} ;; 5\text{ cm}^2
5\text{ hours} ;; 5\text{ minutes}
3\text{ feet} ;; 3\text{ inches}
\$5 ;; 5\text{ cents}
\$5 ;; \text{\euro}5
5\% ;; 0.5
9\text{ a.m.} ;; 9\text{ p.m.}
8:34 \text{ p.m.} ;; 8:34 \text{ a.m.}
8:34 \text{ p.m.} ;; 8:35 \text{ p.m.}
2k ;; 2
2k ;; 2m
2 ;; 2k
-2i ;; -2
-2i ;; 2i
3+4i ;; 3-4i
3+4i ;; 3+4j
2x ;; 2y
12_5 ;; 12_6
12_5 ;; 13_5
A5_{12} ;; A5_{11}
A5_{12} ;; A6_{12}
110_2 ;; 6
y = 3 ;; x = 3
y=2x+1 ;; y=2x+2
y=2x+1 ;; x=2y+1
f(x)=2x+1 ;; g(x)=2x+1
(100,101) ;; 100101
(100,101) ;; (101,100)
(100,101) ;; [100,101]
(1,2) ;; [1,2]
[1,2) ;; (1,2]
(1,2) ;; 2,1
(1,2,3) ;; (1,2)
(1,2) ;; (1,2,0)
(-\infty,2)\cup(3,\infty) ;; (-\infty,2]\cup(3,\infty)
(-\infty,2)\cup(3,\infty) ;; (-\infty,2)
(-\infty,2)\cup(3,\infty) ;; (-\infty,2)\cap(3,\infty)
(-\infty,2) ;; x \le 2
[1,2) ;; 1 < x < 2
\frac{1}{5120} ;; 0.0002
\frac{1}{5120} ;; 0
\frac{1}{10^{10}} ;; \frac{1}{10^{9}}
10^{-10} ;; 10^{-11}
2^{-30} ;; 0
\frac{1}{20!} ;; \frac{1}{21!}
\frac{1}{2004!} ;; \frac{1}{4004!}
\frac{1}{2004!} ;; 0
e^{-30} ;; e^{-31}
e^{-30} ;; 0
\frac{\pi}{10^8} ;; 0
\sqrt{2}\cdot 10^{-9} ;; 0
\sin 10^{-9} ;; 0
1/3 ;; 0.333
2/3 ;; 0.6666
2/3 ;; 0.67
\pi ;; 3.14
\pi ;; \frac{22}{7}
\sqrt2 ;; 1.41
\frac65 ;; \frac56
\frac{12}{5} ;; \frac125
-\frac12 ;; \dfrac{1}{2}
8\pi ;; 8
8\pi ;; 8p
-\frac{\pi}{6} ;; pi/6
\sqrt{3+2\sqrt2} ;; 1-\sqrt2
\frac{1}{x+1} ;; \frac{1}{x+2}
2^{n+1} ;; 2^n
\sin x ;; \cos x
\log_2 8 ;; 4
5! ;; 121
|x| ;; x
1\frac12 ;; \frac12
1500 ;; 1.5\times 10^4
1500 ;; 1, 500
1500 ;; 15,00
90^\circ ;; 90\text{ radians}
1 \pm \sqrt{19} ;; 1+\sqrt{19}
\pm 2 ;; 2
2 ;; \pm 2
\{1,2\} ;; [1,2]
(1,2),(3,4) ;; (2,1),(3,4)
(1,2),(3,4) ;; (1,2)
\begin{pmatrix}1\\2\end{pmatrix} ;; \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ;; \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} ;; \begin{pmatrix}1 & 2 \\ 3 & 5\end{pmatrix}
\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} ;; \begin{pmatrix}1 & 3 \\ 2 & 4\end{pmatrix}
2:3 ;; 3:2
x>2 ;; x<2
x>2 ;; x\ge2
x>2 ;; y>2
2x+3y=6 ;; 2x+3y=7
\text{Monday} ;; Tuesday
\text{Monday} ;; not Monday
\text{Monday} ;; Monday or Tuesday
\text{(E)} ;; D
E ;; E'
E ;; e
f' ;; f
x_1 ;; x_2
a_1 ;; a
\alpha ;; \beta
x^2 ;; x_2
x^{12} ;; x^{1}2
\emptyset ;; 0
\infty ;; -\infty
\text{C, F, H} ;; C, F
3\sqrt{13} ;; 3\sqrt{14}
3\sqrt{13} ;; 3
4 ;; 4\sqrt2
-x^2 ;; (-x)^2
a/bc ;; a/(bc)
7 ;; 7\text{ or }8
7 ;; 7; 8
7 ;; \frac{7}{0}
0 ;; \frac{0}{0}
0 ;; 10^{-20}
0 ;; 0.00001
\frac{3}{4} ;; 3:4
10 ;; 10'
10 ;; x10
10 ;; \text{ten}
10 ;; 1 0
10 ;; 1,0
10 ;; 9.99999999
1000001 ;; 1000000.0
100000000001 ;; 100000000000
123456.7891 ;; 123456.7892
"""


def pairs(lines: str) -> list[tuple[str, ...]]:
    return [tuple(line.split(" ;; ")) for line in lines.strip().splitlines()]


def right(gold: str, answer: str, kind: str = "latex") -> bool:
    verdict = check(Problem("", gold, kind=kind), f"So it is \\boxed{{{answer}}}.")[1]
    return verdict.right


def kinds(gold: str) -> list[str]:
    return ["latex", "numeric"] if re.fullmatch(r"-?\d+(?:\.\d+)?", gold) else ["latex"]


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_the_same_in_other_words(gold, answer):
    assert all(right(gold, answer, kind) for kind in kinds(gold))


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_not_the_same(gold, answer):
    assert not any(right(gold, answer, kind) for kind in kinds(gold))


NUMBERS = st.lists(st.integers(-999, 999), min_size=2, max_size=6, unique=True)


@given(NUMBERS, st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_list_is_its_entries_in_any_order(numbers, random):
    gold = ", ".join(map(str, numbers))
    mixed = random.sample(numbers, len(numbers))
    for answer in (", ".join(map(str, mixed)), " and ".join(map(str, mixed)), r"\{" + ",\\, ".join(map(str, mixed)) + r"\}"):
        assert right(gold, answer)
    assert not right(gold, ", ".join(map(str, mixed[1:])))
    assert not right(gold, ", ".join(map(str, [*mixed, 1000])))
    assert not right(gold, ", ".join(map(str, [mixed[0] + 1000, *mixed[1:]])))
    assert not right(gold, str(mixed[-1]))


@given(NUMBERS, st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_tuple_is_its_entries_in_their_order(numbers, random):
    gold = f"({', '.join(map(str, numbers))})"
    assert right(gold, f"\\left( {', '.join(map(str, numbers))} \\right)")
    mixed = random.sample(numbers, len(numbers))
    assert right(gold, f"({', '.join(map(str, mixed))})") is (mixed == numbers)
    assert not right(gold, "".join(map(str, numbers)).replace("-", ""))
    assert not right(gold, f"[{', '.join(map(str, numbers))}]") or len(numbers) > 2


@given(st.integers(1, 10**6), st.sampled_from("abcdfghjklmnopqrstuvwxyz"), st.sampled_from(["latex", "numeric"]))
@settings(max_examples=80, deadline=None)
def test_a_letter_is_no_unit(number, letter, kind):
    assert not right(str(number), f"{number}{letter}", kind)
    assert not right(f"{number}{letter}", str(number), kind)
    assert right(f"{number}{letter}", f"{letter} \\cdot {number}")
    other = "w" if letter != "w" else "v"
    assert not right(f"{number}{letter}", f"{number}{other}")
    assert not right(f"{letter} = {number}", f"{other} = {number}")
    assert right(f"{letter} = {number}", str(number))


@given(st.integers(1, 6**6), st.integers(7, 16), st.integers(7, 16))
@settings(max_examples=60, deadline=None)
def test_digits_count_in_their_base(number, base, other):
    digits, left = "", number
    while left:
        digits, left = str(left % 6) + digits, left // 6
    assert right(f"{digits}_{base}", f"{digits}_{{{base}}}")
    assert right(f"{digits}_{base}", f"{digits}_{{{other}}}") is (base == other)


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_small_numbers_are_not_nothing(power, other):
    assert right(f"10^{{-{power}}}", f"\\frac{{1}}{{10^{{{other}}}}}") is (power == other)
    assert not right(f"\\frac{{1}}{{{power} \\cdot 10^9}}", "0.0000")


@given(st.integers(-999, 999), st.integers(1, 999))
@settings(max_examples=80, deadline=None)
def test_every_way_to_write_a_fraction(upper, lower):
    sign = "-" if upper < 0 else ""
    for kind in ("latex", "numeric"):
        for answer in (f"\\frac{{{upper}}}{{{lower}}}", f"{sign}\\dfrac{{{abs(upper)}}}{{{lower}}}", f"({upper})/({lower})"):
            assert right(f"{upper}/{lower}", answer, kind)
            assert not right(f"{upper + 1}/{lower}", answer, kind)
            assert not right(f"{upper}/{lower}", f"\\text{{not }} {answer}", kind)


@given(st.integers(2, 200), st.sampled_from(["", "not ", "either 3 or ", "at least ", "more than ", "less than ", "maybe "]))
@settings(max_examples=60, deadline=None)
def test_no_answer_is_picked_out_of_a_sentence(number, before):
    for kind in ("latex", "numeric"):
        assert right(str(number), f"{before}{number}", kind) is (before == "")


OPTIONS = ["5", "a red one", "$910", ".1001"]


@pytest.mark.parametrize(
    "answer",
    ["A", "(A)", "A.", "A)", "A) 5", "A. 5", "(A) 5", r"\textbf{(A)}\ 5", "Option A", "The answer is A", r"\text{A}", "5"],
)
def test_the_letter_of_a_choice(answer):
    for gold in "ABCD":
        assert grade(Problem("", gold, kind="choice", meta={"options": OPTIONS}), answer).right is (gold == "A")


@pytest.mark.parametrize(
    "answer", ["(A) a red one", "(A) $910", "(A) .1001", "A or B", "A, B", "(A) or (B)", "E", "not A", "A5", ""]
)
def test_a_letter_with_other_words_is_no_choice(answer):
    assert not grade(Problem("", "A", kind="choice", meta={"options": OPTIONS}), answer).right


def test_the_pronoun_is_no_option():
    problem = Problem("", "I", kind="choice", meta={})
    assert not check(problem, "So I think that a dog did it", "flexible")[1].right
    assert check(problem, "So the answer is (I)", "flexible")[1].right


@pytest.mark.parametrize(
    ("text", "gold"), [("so x = −5", "-5"), (r"that is \frac{3}{4} of it", "3/4"), ("about -3/4", "-0.75"), ("8pi", "8")]
)
def test_numbers_in_flexible_reading(text, gold):
    assert check(Problem("", gold), text, "flexible")[1].right is (text != "8pi")
