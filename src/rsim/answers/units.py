"""Units and magnitudes behind a number: ``cents``, ``miles per hour``, ``cm^2``, ``million``."""

from __future__ import annotations

import re
from fractions import Fraction

CURRENCIES = {"§": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
MAGNITUDES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_WORDS = (
    "mm:millimeter cm:centimeter dm:decimeter km:kilometer kg:kilogram mg:milligram ml:milliliter mL:milliliter "
    "ft:foot feet:foot in:inch lb:pound lbs:pound oz:ounce mi:mile yd:yard hr:hour hrs:hour min:minute mins:minute "
    "sec:second secs:second deg:degree rad:radian USD:dollar am:a.m. pm:p.m. a.m:a.m. p.m:p.m. percent:% pct:% "
    "percentage:% men:man women:woman children:child people:person metre:meter litre:liter m:meter g:gram s:second "
    "L:liter h:hour units: unit:"
)
_SHORT = dict(pair.split(":") for pair in _WORDS.split()) | {"mph": "mile per hour", "kmh": "kilometer per hour"}
_BARE = frozenset(_SHORT) - {"in", "m", "g", "s", "L", "h"}  # of two letters and more, also without \text
# Behind a number these make another number, a sentence or a doubt of it.
_NO_UNITS = (
    "not no nor never wrong false incorrect is isn't are was but and or if than minus plus times over by more less fewer "
    "greater half halves third thirds quarter quarters fourths fifths sixths eighths tenth tenths hundredth hundredths "
    "thousandth thousandths squared cubed factorial choose mod modulo base pi it the this that to from between root sqrt"
)
_NO_UNIT = frozenset(_NO_UNITS.split())
_CENTS = {("cent", "dollar"): Fraction(1, 100), ("dollar", "cent"): Fraction(100)}
_PRODUCT = re.compile(r"(?=[a-z]{2,4}\Z)a?b?c?d?e?f?g?h?i?j?k?l?m?n?o?p?q?r?s?t?u?v?w?x?y?z?\Z")


def is_product(run: str) -> bool:
    """Whether letters that stand together are a product of variables (``xy``, ``abc``) and no word."""
    if run in _BARE or run.lower() in MAGNITUDES:
        return False
    return len(run) == 2 or (len(run) == 3 and _PRODUCT.match(run) is not None)


def is_plain(words: str) -> bool:
    """None of them denies, compares or counts."""
    return not any(word.lower().rstrip(".") in _NO_UNIT for word in words.split())


def parse(words: str) -> tuple[str, Fraction] | None:
    """A unit and the factor of a magnitude before it; None where the words are none.

    >>> parse("million dollars"), parse("miles per hour") == parse("mph"), parse("or so, I think")
    (('dollar', Fraction(1000000, 1)), True, None)
    """
    text = words.replace("²", "^2").replace("³", "^3").replace("{", "").replace("}", "").strip().rstrip(".")
    text = re.sub(r"\s*([/^])\s*", r"\1", text).replace("/", " per ")
    if re.fullmatch(r"[A-Za-z\s.^23-]{1,60}", text) is None:
        return None
    if not is_plain(text):
        return None
    factor = Fraction(1)
    shown: list[str] = []
    power = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    pending = ""
    for word in text.split():
        if word.lower() in MAGNITUDES and not shown:
            factor *= MAGNITUDES[word.lower()]
        elif word.lower() in power:
            pending = "^" + power[word.lower()]
        elif word.lower() == "of":
            continue
        else:
            shown.append(_singular(word.partition("^")[0]) + (("^" + word.partition("^")[2]) if "^" in word else pending))
            pending = ""
    if len(shown) > 6:
        return None
    return " ".join(w for w in shown if w), factor


def _singular(word: str) -> str:
    word = word.rstrip(".")
    if word in _SHORT or word.lower() in _SHORT:
        return _SHORT.get(word, _SHORT.get(word.lower(), ""))
    word = word.lower()
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def converted(unit: str, to: str) -> Fraction | None:
    """The factor from one unit to another, where both are known; None: they do not agree."""
    return _CENTS.get((unit, to))
