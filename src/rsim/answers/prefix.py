"""Open boxes and code blocks: prompts that end in one, which the answer goes on from, and steps that may not end in one.

What such a prompt leaves open belongs to the answer, although it was injected: the two are read as one text.
"""

from __future__ import annotations

import re

from rsim.answers.extract import boxed

_BOX = "\\boxed{"
_OPENED = re.compile(r"(?:\\boxed\{|```(?:python|py)?\n)\Z")
_FENCE = re.compile(r"^```(\w*)", re.MULTILINE)


def open_prefix(prompt: str) -> str:
    """The box or code block that a prompt opens at its end, or nothing.

    >>> open_prefix("So the answer is \\\\boxed{"), open_prefix("So the answer is:")
    ('\\\\boxed{', '')
    """
    found = _OPENED.search(prompt)
    closes = prompt.count("```") % 2 == 0  # an example's block, say
    return "" if found is None or (found[0] != _BOX and closes) else found[0]


def as_message(prompt: str) -> str:
    """A prompt that is sent as a message of its own: that cannot leave anything open for the answer.

    >>> as_message("So the answer is \\\\boxed{"), as_message("Continuing,")
    ('So the answer is:', 'Continuing,')
    """
    answer_prefix = open_prefix(prompt)
    return f"{prompt.removesuffix(answer_prefix).rstrip().rstrip(':')}:" if answer_prefix else prompt


def answer_text(answer_prefix: str, text: str) -> str:
    """The answer that a model wrote behind the ``answer_prefix`` of its prompt; if it opened its own instead, that alone.

    A code block that is still open when the model ends its turn ends there.

    >>> answer_text("\\\\boxed{", "5}."), answer_text("\\\\boxed{", "It is \\\\boxed{5}."), answer_text("", "5")
    ('\\\\boxed{5}.', 'It is \\\\boxed{5}.', '5')
    """
    if answer_prefix == _BOX:
        own = text.lstrip().startswith(_BOX) or not boxed(answer_prefix + text)
        return text if own else answer_prefix + text
    if not answer_prefix or not text.strip():
        return text
    fence = _FENCE.search(text)  # a closing one names no language
    if fence is None:
        return f"{answer_prefix}{text}\n```"
    return text if fence[1] or not text[: fence.start()].strip() else answer_prefix + text
