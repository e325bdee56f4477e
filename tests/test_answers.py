"""The numeric checker: known cases, properties, and texts that are meant to hurt."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsim.answers.extract import boxed, extract, parse_number
from rsim.game.problem import Problem
from rsim.rewards.grade import grade


def same_answer(answer: str, gold: str, kind: str) -> bool:
    return grade(Problem("", gold, kind=kind), answer).right


@pytest.mark.parametrize(("text", "expected"), [
    ("1,200", "1200"), ("$1,200.00", "1200"), ("1{,}200", "1200"), ("1200 dollars", "1200"), ("-3", "-3"), ("$-3", "-3"),
    ("-$3", "-3"), ("- 3", "-3"), ("−3", "-3"), (r"\$18", "18"), ("$18$", "18"), ("50%", "50"), (r"50\%", "50"),
    (r"\frac{1}{2}", "1/2"), (r"-\dfrac{6}{8}", "-3/4"), ("1 3/4", "7/4"), ("0.50", "1/2"), (".5", "1/2"), ("7.", "7"),
    ("x = 12", "12"), (r"12\text{ cm}", "12"), ("3 km/h", "3"), ("(5)", "5"), ("60 degrees", "60"), ("1/2 cup", "1/2"),
])  # fmt: skip
def test_numbers_are_read(text, expected):
    assert parse_number(text) == Fraction(expected)


@pytest.mark.parametrize(
    "text", ["", " ", "-", "--5", "x+1", "eggs", "5 or 6", "5/0", "1,2", "10:30", "1e400", "1" * 100, "7" * 10**6, "\0"]
)
def test_what_is_no_number_is_refused(text):
    assert parse_number(text) is None


@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_an_integer(n):
    sign, digits = ("-" if n < 0 else ""), f"{abs(n):,}"
    for text in (
        str(n),
        f"{n:,}",
        f"{n}.0",
        f"{n} apples",
        f"{sign}${digits}",
        f"${sign}{digits}",
        f"{n}%",
        f"x={n}",
        f"{2 * n}/2",
    ):
        assert parse_number(text) == n, text
        assert same_answer(text, str(n), "numeric")
        assert not same_answer(text, str(n + 1), "numeric")


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4))
def test_fractions(f):
    assert parse_number(f"{f.numerator}/{f.denominator}") == f
    sign = "-" if f < 0 else ""
    assert parse_number(f"{sign}\\frac{{{abs(f.numerator)}}}{{{f.denominator}}}") == f


@settings(deadline=None)
@given(st.text(max_size=300))
def test_no_text_makes_the_checker_fail(text):
    for mode in ("strict", "flexible"):
        answer = extract(text, mode)
        assert answer is None or same_answer(answer, "5", "numeric") in (True, False)
    same_answer(text, text, "text")


@given(st.text(alphabet="ab{}\\ 12", max_size=60))
def test_boxes_are_balanced_and_lie_in_the_text(text):
    for content in boxed(text + "\\boxed{3}"):
        plain = content.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert content in text + "\\boxed{3}"
        assert plain.count("{") == plain.count("}")


def test_strict_wants_exactly_one_box():
    assert extract(r"\boxed{7}", "strict") == "7"
    assert extract(r"\boxed{7} then \boxed{7}", "strict") is None
    assert extract("the answer is 7", "strict") is None
    assert extract(r"\boxed{}", "strict") is None
    assert extract(r"\boxed{7", "strict") is None


def test_flexible_takes_the_last():
    assert extract(r"\boxed{7} then \boxed{8}", "flexible") == "8"
    assert extract("3 + 4 = 7.", "flexible") == "7"
    assert extract("costs $1,234.50!", "flexible") == "1,234.50"
    assert extract("nothing", "flexible") is None


def test_nested_braces():
    assert boxed(r"so \boxed{\frac{1}{2}} and \boxed{\text{a} \} b}") == [r"\frac{1}{2}", r"\text{a} \} b"]


def test_text_checker():
    assert same_answer("  Paris. ", "paris", "text")
    assert not same_answer("Paris, France", "paris", "text")
    assert not same_answer("", "", "text")
    assert same_answer("B", "b", "numeric"), "gold that is no number is compared as text first"


@pytest.mark.parametrize(("answer", "gold"), [
    ("708", "$708"), ("$(31.5)", "-31.5"), (r"\$6,577", "6,577"), ("6577", "6,577"), ("67", "67%"), (r"67\%", "67%"), ("0", "$ 0"),
    ("19", "INR19"), ("S$1.75 billion", "1.75"), ("$ (20.0)", "(20)"), ("2.6 million", "$2.6 million"), ("13 years", "13"),
    (r"\text{6.14 per cent}", "6.14%"), (".5", "0.5"),
])  # fmt: skip
def test_amounts_are_compared_as_tables_write_them(answer, gold):
    assert same_answer(answer, gold, "text")
    assert same_answer(gold, answer, "text")


@pytest.mark.parametrize(("answer", "gold"), [
    ("494", "(494)"), ("2018 due to lower sales", "2018"), ("2.6 million", "2.6 billion"), ("007", "7"), ("0.67", "67%"),
    ("2018 and 2019", "2018"), ("1,2", "12"), ("12,34", "1234"), ("(5", "-5"), ("13 years", "13 months"), ("", "0"), ("-", "0"),
])  # fmt: skip
def test_what_is_not_the_same_amount(answer, gold):
    assert not same_answer(answer, gold, "text")
    assert not same_answer(gold, answer, "text")


@given(st.integers(-(10**12), 10**12), st.integers(1, 9))
def test_another_amount_is_never_the_same(n, by):
    ways = [str(n), f"{n:,}", f"({-n:,})" if n < 0 else f"${n:,}", f"{n} million"]
    for answer in ways:
        assert all(same_answer(answer, gold, "text") for gold in ways)
        assert not same_answer(answer, f"{n + by:,}", "text")


@pytest.mark.parametrize("text", [
    "\\boxed{" * 200_000, "{" * 10**6, "\\boxed{" + "{" * 10**6, "\\boxed{1}" * 100_000, "1," * 500_000, "1" * 10**6,
    "9/" * 300_000, " " * 10**6 + "5", "\\" * 10**6,
])  # fmt: skip
def test_hostile_texts_take_linear_time(text):
    began = time.process_time()
    for mode in ("strict", "flexible"):
        answer = extract(text, mode)
        assert answer is None or not same_answer(answer, "5", "numeric") or text.endswith("5")
    assert not same_answer(text[-19_000:], "5", "text") or text.endswith("5")
    assert time.process_time() - began < 2
