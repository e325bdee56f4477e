"""The one error that commands turn into a single line and exit code 2."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import urlsplit


class UserError(Exception):
    """Something that the user can put right: ``problem`` names the field or file, ``remedy`` says what to do."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}: {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def of_a_disk(error: Exception) -> bool:
    """Whether it may say that a file cannot be written: torch says so by a `RuntimeError`, safetensors by an error of its own,
    tokenizers by a bare `Exception`."""
    own = type(error) is Exception or type(error).__name__ == "SafetensorError"
    return own or isinstance(error, (OSError, RuntimeError))


def check_url(where: str, url: str) -> None:
    """Raises `UserError`, naming ``where`` it was given, if ``url`` is no address of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # a bad port is a ValueError
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{where} {url}", "give a base URL, e.g. http://127.0.0.1:8080/v1")


def key_from(variable: str) -> str:
    """The key in an environment variable, without the blank space around it; "" where there is none.

    Raises:
        UserError: no header can hold it. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"${variable} holds a line break or a character outside ASCII", "a key has neither: set it again")
    return key


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for a name that is not known.

    >>> did_you_mean("stesp", ["steps", "seed"]), did_you_mean("x", ["steps", "seed"])
    ("did you mean 'steps'? known: steps, seed", 'known: steps, seed')
    """
    near = get_close_matches(name, known := list(known), n=1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}known: {', '.join(known)}"
