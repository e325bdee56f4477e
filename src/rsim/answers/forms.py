"""What an answer says, as a typed value: a number or formula with its unit, a list, a tuple, an equation, a word.

`rsim.answers.reading` reads them. `same` compares two: True, False, or None where algebra has to decide that there is no
normal form for. The rules are those a strict marker would use: a list is a list, in any order; a tuple is ordered; a letter
is no unit; of two units both must agree; a name on the left of an equation counts where both have one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from rsim.answers import algebra, units
from rsim.answers.algebra import Value

MEMBER = "in "  # the name of the one item of ``x \\in A``


@dataclass(frozen=True)
class Amount:
    """A number or formula with its unit, if it has one. Of a plain decimal ``written`` digits count, ``decimals`` of all stand
    behind the point."""

    value: Value
    unit: str = ""
    written: int = 0
    decimals: int = 0


@dataclass(frozen=True)
class Based:
    """Digits to a base: ``12_5``."""

    digits: str
    base: int


@dataclass(frozen=True)
class Word:
    text: str


@dataclass(frozen=True)
class Items:
    """A bare list or a set: in any order. ``name``: what stands before the first of ``a = 4, -8``."""

    items: tuple[Form, ...]
    name: str = ""


@dataclass(frozen=True)
class Tuple:
    """Ordered, in its brackets: ``(``, ``[``, or ``m2`` for a matrix of two columns."""

    opening: str
    closing: str
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Relation:
    """Formulas with what stands between them: ``=``, ``<``, ``<=``, ``!=``, all turned so that they point to the right."""

    signs: tuple[str, ...]
    sides: tuple[Value, ...]

    @property
    def name(self) -> str:
        """The letter that an equation names its right side with, if it is of that kind."""
        if self.signs != ("=",) or len(self.sides[0].terms) != 1:
            return ""
        (monomial, coefficient), letters = self.sides[0].terms[0], self.sides[0].letters
        return monomial[0][0] if coefficient == 1 and len(letters) == 1 and sum(n for _, n in monomial) == 1 else ""


Form = Amount | Based | Word | Items | Tuple | Relation


# --- comparing ---


def same(gold: Form, given: Form, tolerance: float = 0.0) -> bool | None:
    """Whether ``given`` is the answer ``gold``; None: it takes algebra to tell.

    Args:
        tolerance: of real numbers, relative to gold.
    """
    members = [form.name if isinstance(form, Items) and form.name.startswith(MEMBER) else "" for form in (gold, given)]
    if any(members):
        if all(members) and members[0] != members[1]:
            return False
        gold, given = (
            form.items[0] if name and isinstance(form, Items) else form
            for name, form in zip(members, (gold, given), strict=True)
        )
    if isinstance(gold, Relation) and gold.name and not isinstance(given, Relation | Items):
        return same(Amount(gold.sides[1]), given, tolerance)
    if isinstance(given, Relation) and given.name and isinstance(gold, Amount):
        return same(gold, Amount(given.sides[1]), tolerance) if given.name not in gold.value.letters else None
    if isinstance(gold, Amount) and isinstance(given, Amount):
        return _same_amounts(gold, given, tolerance)
    if isinstance(gold, Items) or isinstance(given, Items):
        return _same_items(gold, given)
    if type(gold) is not type(given):
        return _mixed(gold, given)
    if isinstance(gold, Tuple) and isinstance(given, Tuple):
        if (gold.opening, gold.closing, len(gold.items)) != (given.opening, given.closing, len(given.items)):
            return False
        return _all([same(a, b) for a, b in zip(gold.items, given.items, strict=True)])
    if isinstance(gold, Relation) and isinstance(given, Relation):
        return _same_relations(gold, given)
    return gold == given


def _mixed(gold: Form, given: Form) -> bool | None:
    """Two forms of different kinds; a number to a base may be told without it."""
    for one, other in ((gold, given), (given, gold)):
        if isinstance(one, Relation) and isinstance(other, Tuple):
            interval = _interval(one)
            return interval is not None and same(interval, other)
        if isinstance(one, Based) and isinstance(other, Amount):
            if one.base == 10:
                return other.value.rational == Fraction(one.digits)
            digits = other.value.rational
            return one is gold and digits is not None and str(digits) == one.digits and not other.unit
    return False


def _interval(relation: Relation) -> Tuple | None:
    """What ``1 < x <= 2`` or ``x < 2`` says of a letter."""
    signs, sides = relation.signs, [Amount(side) for side in relation.sides]
    named = [
        value.rational is None and len(value.terms) == 1 and value.letters == {value.terms[0][0][0][0]}
        for value in relation.sides
    ]
    far = algebra.atom("infinity")
    if not set(signs) <= {"<", "<="}:
        return None
    if len(signs) == 2 and named == [False, True, False]:
        return Tuple("[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")", (sides[0], sides[2]))
    if len(signs) == 1 and named[0]:
        return Tuple("(", "]" if signs[0] == "<=" else ")", (Amount(-far), sides[1]))
    if len(signs) == 1 and named[1]:
        return Tuple("[" if signs[0] == "<=" else "(", ")", (sides[0], Amount(far)))
    return None


def _all(verdicts: list[bool | None]) -> bool | None:
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _same_amounts(gold: Amount, given: Amount, tolerance: float) -> bool | None:
    if gold.unit and given.unit and gold.unit != given.unit:
        factor = units.converted(given.unit, gold.unit)
        return False if factor is None else _same_values(gold, _times(given, factor), tolerance)
    found = _same_values(gold, given, tolerance)
    if found or "%" not in (gold.unit, given.unit) or gold.unit == given.unit:
        return found
    return _same_values(gold, _times(given, Fraction(1, 100) if given.unit == "%" else Fraction(100)), tolerance)


def _times(amount: Amount, factor: Fraction) -> Amount:
    return replace(amount, value=amount.value * algebra.rational(factor))


def _same_values(gold: Amount, given: Amount, tolerance: float) -> bool | None:
    if gold.value == given.value or _rounded(gold, given) or _rounded(given, gold):
        return True
    ours, theirs = gold.value.number(), given.value.number()
    if tolerance and ours is not None and theirs is not None and abs(ours - theirs) <= abs(ours) * tolerance:
        return True
    return False if gold.value.exact and given.value.exact else None


def _rounded(exact: Amount, decimal: Amount) -> bool:
    """Whether a decimal of four digits or more is the other one, rounded to its last place."""
    shown = decimal.value.rational
    if decimal.written < 4 or shown is None:
        return False
    number = exact.value.rational
    if number is None:
        real, near = exact.value.number(), decimal.value.number()
        return real is not None and near is not None and abs(real - near) <= 0.5000001 * 10.0**-decimal.decimals
    return abs(number - shown) <= Fraction(1, 2 * 10**decimal.decimals)


def _same_items(gold: Form, given: Form) -> bool | None:
    """Lists: every entry of one is an entry of the other. A tuple has to have the list's order."""
    ours, theirs = _entries(gold), _entries(given)
    names = {n for n in (_name(gold), _name(given)) if n}
    if len(names) > 1:
        return False
    if len(ours) != len(theirs):
        return False
    if isinstance(gold, Tuple) or isinstance(given, Tuple):
        if {gold.opening for gold in (gold, given) if isinstance(gold, Tuple)} != {"("}:
            return False
        return _all([same(a, b) for a, b in zip(ours, theirs, strict=True)])
    left, unsure = list(theirs), False
    for one in ours:
        verdicts = [same(one, other) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _entries(form: Form) -> tuple[Form, ...]:
    return form.items if isinstance(form, Items | Tuple) else (form,)


def _name(form: Form) -> str:
    """The one name that a list's entries have on their left, if they have."""
    if isinstance(form, Relation):
        return form.name
    if not isinstance(form, Items):
        return ""
    names = {entry.name for entry in form.items if isinstance(entry, Relation)} | ({form.name} - {""})
    return names.pop() if len(names) == 1 else ""


def _same_relations(gold: Relation, given: Relation) -> bool | None:
    if gold == given or ((gold.signs, gold.sides) == (given.signs[::-1], given.sides[::-1]) and set(gold.signs) <= {"=", "!="}):
        return True
    if gold.name and given.name:
        return same(Amount(gold.sides[1]), Amount(given.sides[1])) if gold.name == given.name else False
    if len(gold.signs) != 1 or gold.signs != given.signs:
        pairs = list(zip(gold.sides, given.sides, strict=False))
        known = gold.signs == given.signs and all(a.exact and b.exact for a, b in pairs)
        return False if known or gold.signs != given.signs else None
    ours, theirs = (side[0] - side[1] for side in (gold.sides, given.sides))
    if not ours.terms or not theirs.terms:
        return ours == theirs
    factor = theirs.terms[0][1] / ours.terms[0][1]
    if ours * algebra.rational(factor) == theirs:
        return factor > 0 or gold.signs[0] in ("=", "!=")
    return False if ours.exact and theirs.exact and (ours.letters != theirs.letters or len(ours.letters) == 1) else None
