"""The planner's view of a state as plain text, one fixed template; its version is stored with every planner.

The planner's context is an append-only stream of chunks, each tokenised once, alone, by the planner's own tokenizer::

    Question: {question} | \\nNext strategy: | {strategy}\\n | {step text} | \\nNext strategy: | ...

The classifier head is read at the last token of every ``\\nNext strategy:`` marker. Injected prompts are left out: the
stream names the strategy instead, so that a planner does not depend on the wording of the prompts.

Two controls see less (`Sees`). A *question-only* planner's steps have no text; a *blind* planner's question is empty, and
instead of strategy and text it reads the number of the step. All else, training included, is the same.
"""

from __future__ import annotations

from typing import Literal

Sees = Literal["everything", "question", "number"]

VERSION = "rsim-planner-1"
QUESTION_PREFIX = "Question: "
MARKER = "\nNext strategy:"


def question_chunk(question: str) -> str:
    return QUESTION_PREFIX + question


def number_chunk(step: int) -> str:
    """What a blind planner reads of step ``step``, which counts from 1."""
    return f" {step}\n"


def strategy_chunk(name: str) -> str:
    return f" {name}\n"


def render(question: str, steps: list[tuple[str, str]]) -> str:
    """The whole stream as text, for people; models work on the ids of the chunks.

    >>> render("1+1=?", [("continuation", " 1+1=2")])
    'Question: 1+1=?\\nNext strategy: continuation\\n 1+1=2\\nNext strategy:'
    """
    chunks = [question_chunk(question), MARKER]
    for name, text in steps:
        chunks += [strategy_chunk(name), text, MARKER]
    return "".join(chunks)
