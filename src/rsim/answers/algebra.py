"""Exact arithmetic for answers: polynomials with rational coefficients over letters, pi, e, i and roots.

Two values that are made of these alone are equal exactly when their normal forms are, so that nothing has to be simplified.
Whatever else there is (a quotient by a sum, a power with a letter in its exponent) becomes an *opaque* factor that is named by
its own normal form: equal forms are equal values then, and unequal ones may be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

Monomial = tuple[tuple[str, int], ...]  # atoms with their exponents, sorted
_MOST_TERMS, _MOST_DIGITS, _LARGEST_POWER, _LARGEST_RADICAND = 200, 400, 200, 10**10
OPAQUE = "?"  # what the name of an opaque factor begins with
_ROOT = "root"  # "root2:3" is the square root of 3


class NoValueError(ValueError):
    """The expression has no value: a division by zero."""


class TooHardError(ValueError):
    """The expression is out of this module's reach."""


@dataclass(frozen=True)
class Value:
    """A sum of monomials with their coefficients, none of which is 0."""

    terms: tuple[tuple[Monomial, Fraction], ...]

    @classmethod
    def of(cls, terms: Iterable[tuple[Monomial, Fraction]]) -> Value:
        found: dict[Monomial, Fraction] = {}
        for monomial, coefficient in terms:
            found[monomial] = found.get(monomial, Fraction(0)) + coefficient
        kept = sorted((m, c) for m, c in found.items() if c)
        if len(kept) > _MOST_TERMS or any(_digits(c) > _MOST_DIGITS for _, c in kept):
            raise TooHardError
        return cls(tuple(kept))

    @property
    def rational(self) -> Fraction | None:
        """Its value if it is a rational number."""
        if not self.terms:
            return Fraction(0)
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def atoms(self) -> set[str]:
        return {atom for monomial, _ in self.terms for atom, _ in monomial}

    @property
    def exact(self) -> bool:
        """Whether another normal form means another value."""
        return not any(atom.startswith(OPAQUE) for atom in self.atoms)

    @property
    def letters(self) -> set[str]:
        """Its variables; an opaque factor counts as one."""
        return {atom for atom in self.atoms if not atom.startswith(_ROOT) and atom not in ("pi", "e", "i")}

    def number(self) -> float | None:
        """Its value as a float, if it is a real number of a float's size."""
        try:
            return self._number()
        except OverflowError:
            return None

    def _number(self) -> float | None:
        total = 0.0
        for monomial, coefficient in self.terms:
            factor = float(coefficient)
            for atom, exponent in monomial:
                base = _size(atom)
                if base is None:
                    return None
                factor *= base**exponent
            total += factor
        return total

    def __add__(self, other: Value) -> Value:
        return Value.of((*self.terms, *other.terms))

    def __neg__(self) -> Value:
        return Value(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: Value) -> Value:
        return self + -other

    def __mul__(self, other: Value) -> Value:
        if len(self.terms) * len(other.terms) > _MOST_TERMS**2 // 4:
            raise TooHardError
        return Value.of(_product(a, b) for a in self.terms for b in other.terms)

    def __truediv__(self, other: Value) -> Value:
        return self * inverse(other)


def rational(value: Fraction | int) -> Value:
    return Value.of([((), Fraction(value))])


def atom(name: str) -> Value:
    return Value.of([(((name, 1),), Fraction(1))])


def inverse(value: Value) -> Value:
    """Raises `NoValueError` for 0."""
    if not value.terms:
        raise NoValueError
    if len(value.terms) == 1:
        (monomial, coefficient) = value.terms[0]
        return Value.of([_reduced(((name, -exponent) for name, exponent in monomial), 1 / coefficient)])
    conjugate = _conjugate(value)
    if conjugate is not None:
        return conjugate * inverse(value * conjugate)
    scale = value.terms[0][1]  # of two sums that differ by a factor the opaque names are the same
    return rational(1 / scale) * atom(f"{OPAQUE}1/({show(value * rational(1 / scale))})")


def power(base: Value, exponent: Value) -> Value:
    """``base ** exponent``."""
    times = exponent.rational
    if times is None or abs(times.numerator) > _LARGEST_POWER:
        if base.rational == 1:
            return base
        return atom(f"{OPAQUE}({show(base)})^({show(exponent)})")
    if times.denominator > 1:
        return power(root(base, times.denominator), rational(times.numerator))
    if times < 0:
        return power(inverse(base), rational(-times))
    if times > 12 and len(base.terms) > 1:
        raise TooHardError
    result, square, left = rational(1), base, int(times)
    while left:
        result = result * square if left & 1 else result
        left >>= 1
        square = square * square if left else square
    return result


def root(value: Value, degree: int) -> Value:
    """The real ``degree``-th root; that of a negative number, if the degree is even, is imaginary."""
    number = value.rational
    if number is None or degree > 20 or max(abs(number.numerator), number.denominator) > _LARGEST_RADICAND:
        return atom(f"{OPAQUE}root{degree}({show(value)})")
    if number < 0:
        if degree % 2:
            return -root(-value, degree)
        return atom("i") * root(-value, 2) if degree == 2 else atom(f"{OPAQUE}root{degree}({show(value)})")
    # The root of p/q is that of p * q**(degree-1), divided by q.
    inside = number.numerator * number.denominator ** (degree - 1)
    outside, rest = _split(inside, degree)
    shown = rational(Fraction(outside, number.denominator))
    if rest == 1:
        return shown
    return shown * atom(f"{_ROOT}{degree}:{rest}") if degree == 2 else shown * atom(f"{OPAQUE}{_ROOT}{degree}:{rest}")


def show(value: Value) -> str:
    """The normal form as text."""
    return "+".join(f"{c}" + "".join(f"*{name}^{n}" for name, n in m) for m, c in value.terms) or "0"


def _digits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length()) // 3


def _size(name: str) -> float | None:
    if name in ("pi", "e"):
        return math.pi if name == "pi" else math.e
    found = re.fullmatch(rf"\{OPAQUE}?{_ROOT}(\d+):(\d+)", name)
    if found:
        return float(int(found[2]) ** (1 / int(found[1])))
    return None


def _product(a: tuple[Monomial, Fraction], b: tuple[Monomial, Fraction]) -> tuple[Monomial, Fraction]:
    return _reduced((*a[0], *b[0]), a[1] * b[1])


def _reduced(factors: Iterable[tuple[str, int]], coefficient: Fraction) -> tuple[Monomial, Fraction]:
    """A monomial in which i and square roots have exponent 0 or 1 and one square root at most is left."""
    exponents: dict[str, int] = {}
    radicand = 1
    for name, exponent in factors:
        if name == "i":
            exponents["i"] = exponents.get("i", 0) + exponent
        elif name.startswith(f"{_ROOT}2:"):
            inside = int(name.partition(":")[2])
            coefficient *= Fraction(inside) ** (exponent // 2)
            if exponent % 2:
                outside, radicand = _split(radicand * inside, 2)
                coefficient *= outside
        else:
            exponents[name] = exponents.get(name, 0) + exponent
    turns = exponents.pop("i", 0) % 4
    if turns >= 2:
        coefficient = -coefficient
    if turns % 2:
        exponents["i"] = 1
    if radicand > 1:
        exponents[f"{_ROOT}2:{radicand}"] = 1
    return tuple(sorted((name, n) for name, n in exponents.items() if n)), coefficient


def _split(number: int, degree: int) -> tuple[int, int]:
    """``(a, b)`` with ``number = a**degree * b`` and the largest ``a``, up to a size that takes no time."""
    if number > _LARGEST_RADICAND**2:
        raise TooHardError
    outside, factor = 1, 2
    while factor**degree <= number and factor < 100_000:
        while number % factor**degree == 0:
            number //= factor**degree
            outside *= factor
        factor += 1
    return outside, number


def _conjugate(value: Value) -> Value | None:
    """For ``a + b*sqrt(n)`` and ``a + b*i``, ``a - b*...``: the product of both is rational."""
    special = {name for name in value.atoms if name == "i" or name.startswith(f"{_ROOT}2:")}
    if len(value.terms) != 2 or value.atoms != special or len(special) > 2:
        return None
    (first, a), (second, b) = value.terms
    return Value.of([(first, a), (second, -b)])
