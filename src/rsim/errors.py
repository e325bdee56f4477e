"""The one error that commands turn into a single line and exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right: ``problem`` names the field or file, ``remedy`` says what to do."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}: {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
