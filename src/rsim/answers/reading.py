"""Reads an answer's form (`rsim.answers.forms`) by recursive descent over its tokens (`rsim.answers.notation`)."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from rsim.answers import algebra, units
from rsim.answers.algebra import NoValueError, TooHardError, Value
from rsim.answers.forms import MEMBER, Amount, Based, Form, Items, Relation, Tuple, Word, same
from rsim.answers.notation import Token, UnreadableError, normal, tokens

_LONGEST, _DEEPEST, _LONGEST_NUMBER = 600, 40, 60
_GREEK = frozenset(
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega psi chi eta xi zeta".split()  # noqa: SIM905
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", "≤": "<=", "≥": ">=", "≠": "!="}
_TURNED = {">": "<", ">=": "<="}
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASES = {word: base for base, word in enumerate(_NUMERALS.split())}


def read(text: str) -> Form:
    """The form of an answer.

    Raises:
        UnreadableError: it has none that is known here.
        NoValueError: it divides by zero.
        TooHardError: its normal form would be too large.
    """
    if len(text) > _LONGEST:
        raise UnreadableError
    found = tokens(normal(text))
    if not found:
        raise UnreadableError
    return _Reader(found).whole()


def readable(text: str) -> bool:
    """Whether `read` knows the form of ``text``."""
    try:
        read(text)
    except (UnreadableError, NoValueError, TooHardError):
        return False
    return True


class _Reader:
    """Recursive descent over tokens."""

    def __init__(self, tokens: list[Token], depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise UnreadableError
        self.tokens, self.at, self.depth = tokens, 0, depth

    # Lists, relations and brackets look for their signs outside of all brackets.

    def whole(self) -> Form:
        parts = [part for part in self._split({",", ";"}) if part]
        if not parts:
            raise UnreadableError
        if len(parts) == 1:
            return self._inner(parts[0])._entry()
        entries = [self._inner(part)._entry() for part in parts]
        first = entries[0]
        if isinstance(first, Relation) and first.name and not any(isinstance(e, Relation) for e in entries[1:]):
            return Items((Amount(first.sides[1]), *entries[1:]), first.name)
        return _flat(entries)

    def _inner(self, tokens: list[Token]) -> _Reader:
        return _Reader(tokens, self.depth + 1)

    def _split(self, signs: set[str]) -> list[list[Token]]:
        parts: list[list[Token]] = [[]]
        level = 0
        for token in self.tokens:
            level += _level(token)
            if level == 0 and token.kind in ("sign", "command") and token.text in signs:
                parts.append([])
            else:
                parts[-1].append(token)
        return parts

    def _entry(self) -> Form:
        if not self.tokens:
            raise UnreadableError
        parts = self._split({"\\in"})
        if len(parts) == 2 and len(parts[0]) == 1 and parts[0][0].kind == "letters":
            return Items((self._inner(parts[1])._entry(),), f"{MEMBER}{parts[0][0].text}")
        about = self._split({"\\approx"})
        if len(about) > 1:  # 2/3 ≈ 0.67 says two thirds, x ≈ 11 says 11
            return self._inner(about[1] if _is_name(about[0]) else about[0])._entry()
        ratio = self._split({":"})
        if len(ratio) > 1 and all(ratio):
            return Tuple(":", "", tuple(self._inner(part)._amount() for part in ratio))
        unions = self._split({"\\cup"})
        if len(unions) > 1:
            return _flat([self._inner(part)._entry() for part in unions])
        signs = [t.text for t in self._at_top() if t.text in _RELATIONS and t.kind == "sign"]
        if signs:
            return self._relation([_RELATIONS[sign] for sign in signs])
        is_set = self.tokens[0].text == "\\{" and self._closing(0) == len(self.tokens) - 1
        if not is_set and any(t.text in ("\\pm", "\\mp") for t in self.tokens):
            return self._either()
        return self._bracketed() or self._word() or self._based() or self._amount()

    def _at_top(self) -> list[Token]:
        level, found = 0, []
        for token in self.tokens:
            level += _level(token)
            if level == 0:
                found.append(token)
        return found

    def _relation(self, signs: list[str]) -> Relation | Items | Form:
        parts = self._split(set(_RELATIONS))
        if any(not part for part in parts):
            raise UnreadableError
        if set(signs) == {"="} and all(not _is_name(part) for part in parts[:-1]):
            chain = [self._inner(part)._entry() for part in parts]
            if all(same(one, chain[-1]) for one in chain) and isinstance(chain[-1], Amount) and not chain[-1].value.letters:
                return chain[-1]  # 2 + 3 = 5
        if set(signs) == {"="} and _is_name(parts[0]):
            parts, signs = [parts[0], parts[-1]], ["="]
        if signs == ["="] and _is_name(parts[1]) and not _is_name(parts[0]):
            parts = parts[::-1]
        if signs == ["="] and _is_name(parts[0]):
            right = self._inner(parts[1])._entry()
            if not isinstance(right, Amount) or right.unit:
                return right if not isinstance(right, Items) else replace(right, name=_named(parts[0]))
            return Relation(("=",), (_name_value(parts[0]), right.value))
        sides = [self._inner(part)._amount() for part in parts]
        if any(side.unit for side in sides):
            raise UnreadableError
        values = [side.value for side in sides]
        if signs and all(sign in (*_TURNED,) for sign in signs):
            signs, values = [_TURNED[sign] for sign in reversed(signs)], values[::-1]
        return Relation(tuple(signs), tuple(values))

    def _either(self) -> Items:
        """``a ± b`` is two answers."""
        both = []
        for plus in (True, False):
            signs = {"\\pm": "+" if plus else "-", "\\mp": "-" if plus else "+"}
            changed = [Token("sign", signs[t.text], t.spaced) if t.text in signs else t for t in self.tokens]
            both.append(self._inner(changed)._entry())
        return Items(tuple(both))

    def _bracketed(self) -> Form | None:
        """A tuple, an interval, a set or a matrix, if the whole is one."""
        first, last = self.tokens[0], self.tokens[-1]
        if first.text == "\\begin":
            return self._matrix()
        if first.text == "\\emptyset":
            return Items(())
        if first.text not in _BRACKETS or last.text not in (")", "]", "\\}", "}") or self._closing(0) != len(self.tokens) - 1:
            return None
        inner = self._inner(self.tokens[1:-1])
        parts = inner._split({",", ";"})
        if first.text == "\\{":
            return _flat([self._inner(part)._entry() for part in parts if part])
        if len(parts) == 1:
            return self._inner(parts[0])._entry() if first.text in "({" and last.text in ")}" and parts[0] else None
        if first.text == "{":
            return _flat([self._inner(part)._entry() for part in parts if part])
        if any(not part for part in parts):
            raise UnreadableError
        entries = tuple(self._inner(part)._entry() for part in parts)
        plain = len(entries) > 2 and (first.text, last.text) == ("[", "]")  # no interval
        return Tuple("(", ")", entries) if plain else Tuple(first.text, last.text, entries)

    def _closing(self, opening: int) -> int:
        level = 0
        for place in range(opening, len(self.tokens)):
            level += _level(self.tokens[place])
            if level == 0:
                return place
        return -1

    def _matrix(self) -> Form:
        names = [i for i, t in enumerate(self.tokens) if t.text in ("\\begin", "\\end")]
        if len(names) != 2 or names[0] != 0:
            raise UnreadableError
        begin, end = self._closing(1), names[1]
        if self._closing(end + 1) != len(self.tokens) - 1 or "matrix" not in "".join(t.text for t in self.tokens[1:begin]):
            raise UnreadableError
        rows = _Reader(self.tokens[begin + 1 : end], self.depth + 1)._split({"¶"})
        cells = [_Reader(row, self.depth + 1)._split({"&"}) for row in rows if row]
        if len({len(row) for row in cells}) != 1 or any(not cell for row in cells for cell in row):
            raise UnreadableError
        entries = tuple(self._inner(cell)._entry() for row in cells for cell in row)
        return Tuple(f"m{len(cells[0])}", "", entries)

    def _word(self) -> Word | Amount | None:
        first = self.tokens[0]
        if len(self.tokens) == 1 and first.kind == "words" and len(first.text) == 1 and first.text.isalpha():
            return Amount(algebra.atom(first.text))
        if all(token.kind == "words" for token in self.tokens) or (
            len(self.tokens) > 1 and all(t.kind in ("words", "letters") for t in self.tokens) and self.tokens[0].kind == "words"
        ):
            return Word(" ".join(token.text for token in self.tokens).casefold())
        return None

    def _based(self) -> Based | None:
        """``12_5``, ``203_{10}``; digits above 9 are letters."""
        text = "".join(token.text for token in self.tokens)
        text = re.sub(r"_\{?(?:base)?([a-z]+)\}?$", lambda m: f"_{_BASES.get(m[1], m[1])}", text)
        found = re.fullmatch(r"(-?)([0-9A-F,.]+)_(?:\{(?:base)?(\d+)\}|(\d+))", text)
        digits = found[2].replace(",", "").lstrip("0") if found else ""
        return Based(found[1] + (digits or "0"), int(found[3] or found[4])) if found else None

    # Formulas.

    def _amount(self) -> Amount:
        written, decimals = _decimal(self.tokens)
        currency = ""
        tokens = self.tokens
        signed = tokens[0].text in ("-", "+") and len(tokens) > 1
        if tokens[signed].text in units.CURRENCIES:
            currency, self.tokens = units.CURRENCIES[tokens[signed].text], [*tokens[:signed], *tokens[signed + 1 :]]
        if not self.tokens:
            raise UnreadableError
        value = self._sum()
        rest = self.tokens[self.at :]
        if rest and rest[0].text in units.CURRENCIES and len(rest) == 1:
            return Amount(value, units.CURRENCIES[rest[0].text], written, decimals)
        unit, factor = _unit(rest)
        return Amount(value * algebra.rational(factor), unit or currency, written, decimals)

    def _peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _takes(self, *texts: str) -> str:
        token = self._peek()
        if token is not None and token.text in texts and token.kind in ("sign", "command"):
            self.at += 1
            return token.text
        return ""

    def _sum(self) -> Value:
        sign = self._takes("+", "-")
        total = self._term()
        total = -total if sign == "-" else total
        while sign := self._takes("+", "-"):
            term = self._term()
            total = total - term if sign == "-" else total + term
        return total

    def _term(self) -> Value:
        mixed = self._mixed()
        value = mixed if mixed is not None else self._factor()
        while True:
            token = self._peek()
            if self._takes("*"):
                value = value * (-self._factor() if self._takes("-") else self._factor())
            elif self._takes("/"):
                value = value / (-self._factor() if self._takes("-") else self._factor())
            elif token is not None and self._begins_factor(token):
                if token.kind == "number" and self.at and self.tokens[self.at - 1].kind == "number":
                    raise UnreadableError
                value = value * self._factor()
            else:
                return value

    def _begins_factor(self, token: Token) -> bool:
        if token.kind in ("number", "letters"):
            return True
        return token.text in ("(", "[", "{", "\\frac", "\\sqrt", "\\pi", "\\infty") or token.text[1:] in _GREEK

    def _mixed(self) -> Value | None:
        """``1\\frac{4}{5}`` and ``1 4/5``: a whole number and a part of one."""
        begin = self.at
        whole = self._peek()
        if whole is None or whole.kind != "number" or "." in whole.text:
            return None
        self.at += 1
        following = self._peek()
        if following is not None and following.text == "\\frac":
            part = self._factor().rational
            if part is not None and 0 < part < 1 and following.kind == "command":
                return algebra.rational(Fraction(whole.text.replace(",", "")) + part)
        elif following is not None and following.kind == "number" and following.spaced:
            rest = self.tokens[self.at : self.at + 3]
            if len(rest) == 3 and rest[1].text == "/" and rest[2].kind == "number" and "." not in rest[0].text + rest[2].text:
                self.at += 3
                lower = int(rest[2].text.replace(",", ""))
                if not lower:
                    raise NoValueError
                part = Fraction(int(rest[0].text.replace(",", "")), lower)
                return algebra.rational(Fraction(whole.text.replace(",", "")) + part)
        self.at = begin
        return None

    def _factor(self) -> Value:
        base = self._base()
        while self._takes("^"):
            base = algebra.power(base, self._argument())
        if self._takes("!"):
            raise UnreadableError
        return base

    def _argument(self, *, one_digit: bool = False) -> Value:
        """What follows a ``^``, ``\\frac`` or ``\\sqrt``: a group, or a single digit, letter or command. People write powers
        of two digits without braces; ``\\frac65`` is six fifths."""
        token = self._peek()
        if token is None:
            raise UnreadableError
        if self._takes("-"):
            return -self._argument()
        if one_digit and token.kind == "number" and len(token.text) > 1:
            return self._first_digit(token)
        return self._base()

    def _first_digit(self, token: Token) -> Value:
        rest = Token("number", token.text[1:], False)
        self.tokens = [*self.tokens[: self.at], rest, *self.tokens[self.at + 1 :]]
        if not token.text[0].isdigit() or not token.text[1].isdigit():
            raise UnreadableError
        return algebra.rational(int(token.text[0]))

    def _base(self) -> Value:
        token = self._peek()
        if token is None:
            raise UnreadableError
        if token.text in ("(", "[", "{"):
            end = self._closing(self.at)
            if end < 0 or self.tokens[end].text != _BRACKETS[token.text] or end == self.at + 1:
                raise UnreadableError
            inner = _Reader(self.tokens[self.at + 1 : end], self.depth + 1)
            value = inner._sum()
            if inner._peek() is not None:
                raise UnreadableError(prose=inner._peek().kind == "words")  # type: ignore[union-attr]
            self.at = end + 1
            return value
        self.at += 1
        if token.kind == "number":
            digits = token.text.replace(",", "")
            if len(digits) > _LONGEST_NUMBER:
                raise TooHardError
            return algebra.rational(Fraction(digits))
        if token.kind == "letters" or token.text[1:] in _GREEK:
            return self._variable(token)
        if token.text == "\\pi":
            return algebra.atom("pi")
        if token.text == "\\infty":
            return algebra.atom("infinity")
        if token.text == "\\frac":
            upper = self._argument(one_digit=True)
            return upper / self._argument(one_digit=True)
        if token.text == "\\sqrt":
            return self._root()
        raise UnreadableError(prose=token.kind == "words")

    def _root(self) -> Value:
        degree = 2
        if (token := self._peek()) is not None and token.text == "[":
            end = self._closing(self.at)
            inside = self.tokens[self.at + 1 : end]
            if end < 0 or len(inside) != 1 or not inside[0].text.isdigit() or not 2 <= int(inside[0].text) <= 20:
                raise UnreadableError
            degree, self.at = int(inside[0].text), end + 1
        return algebra.root(self._argument(), degree)

    def _variable(self, token: Token) -> Value:
        name = token.text.lstrip("\\")
        if name in ("i", "e"):
            return algebra.atom(name)
        if self._takes("_"):
            below = self._peek()
            if below is None:
                raise UnreadableError
            if below.text == "{":
                end = self._closing(self.at)
                name += "_" + "".join(t.text for t in self.tokens[self.at + 1 : end])
                self.at = end + 1
            else:
                name += "_" + below.text
                self.at += 1
        while self._takes("'"):
            name += "'"
        if name in ("f", "g", "h") and (following := self._peek()) is not None and following.text == "(":
            end = self._closing(self.at)  # a function's value is no product
            if end != self.at + 2:
                raise UnreadableError
            name, self.at = f"{name}({self.tokens[self.at + 1].text})", end + 1
        return algebra.atom(name)


def _level(token: Token) -> int:
    if token.kind == "number":
        return 0
    return {"(": 1, "[": 1, "{": 1, "\\{": 1, ")": -1, "]": -1, "}": -1, "\\}": -1}.get(token.text, 0)


def _flat(entries: list[Form]) -> Items:
    """A list; what ``±`` made of an entry are entries of its own."""
    parts = [entry.items if isinstance(entry, Items) and not entry.name else (entry,) for entry in entries]
    return Items(tuple(one for part in parts for one in part))


def _is_name(tokens: list[Token]) -> bool:
    """A letter, with or without a subscript or an argument: ``x``, ``a_1``, ``f(x)``."""
    text = "".join(t.text for t in tokens)
    if any(not units.is_plain(t.text) for t in tokens if t.kind == "words"):
        return False  # "not = 5" names nothing
    return re.fullmatch(r"\\?[A-Za-z]+'*(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?", text) is not None and (
        len(re.sub(r"\(.*|_.*|'", "", text)) == 1 or text[0] == "\\" or tokens[0].kind == "words"
    )


def _named(tokens: list[Token]) -> str:
    return "".join(t.text for t in tokens)


def _name_value(tokens: list[Token]) -> Value:
    return algebra.atom(_named(tokens).lstrip("\\").replace("{", "").replace("}", ""))


def _decimal(tokens: list[Token]) -> tuple[int, int]:
    """Of a number that is written as a decimal: the digits that count, and those behind the point."""
    numbers = [t.text for t in tokens if t.kind == "number"]
    if len(numbers) != 1 or "." not in numbers[0] or any(t.text in ("\\frac", "/", "\\sqrt", "^", "\\pi") for t in tokens):
        return 0, 0
    whole, _, behind = numbers[0].replace(",", "").partition(".")
    return len((whole + behind).lstrip("0")), len(behind)


def _unit(tokens: list[Token]) -> tuple[str, Fraction]:
    """What follows a formula: its unit, and the factor of a magnitude (*million*).

    Raises:
        UnreadableError: it is more than that.
    """
    if not tokens:
        return "", Fraction(1)
    if tokens[0].text == "%":
        return ("%", Fraction(1)) if len(tokens) == 1 else _raise(prose=True)
    if tokens[0].kind != "words":
        return _raise(prose=any(t.kind == "words" for t in tokens))
    words = " ".join(t.text for t in tokens)
    found = units.parse(words)
    return found if found is not None else _raise(prose=True)


def _raise(prose: bool) -> tuple[str, Fraction]:
    raise UnreadableError(prose)
