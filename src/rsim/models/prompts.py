"""Text to ids as a prompt begins, and chats to text by the tokenizer's template."""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rsim.errors import UserError, first_line

if TYPE_CHECKING:  # it takes seconds to import, and who reads data does not need it
    from transformers import PreTrainedTokenizerBase


def plain_text(content: Any, where: str) -> str:
    """What a message says, whose ``content`` is a text or a list of parts that are texts.

    Raises:
        UserError: there is something else in it, which a model of text cannot read; it names ``where``.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        raise UserError(f"{where}: a message's content must be a text, or a list of parts that are texts")
    return "\n".join(part["text"] for part in parts)


def check_length(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> None:
    """Raises `UserError` for a text that exceeds ``context`` tokens however it is tokenised, which takes long to find out."""
    if len(text) > context and len(text) > context * max(map(len, tokenizer.get_vocab())):
        raise UserError(f"a prompt of {len(text)} characters exceeds the model's context of {context} tokens")


def begin_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of ``text`` behind what the tokenizer puts before a text; what it would append (an end token) is left out."""
    ids: list[int] = tokenizer.encode(text)
    own: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not own:
        return [i for i in ids if i != tokenizer.eos_token_id]
    for before in range(len(ids) - len(own) + 1):
        if ids[before : before + len(own)] == own:
            return ids[: before + len(own)]
    return ids


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], day: str, **how: Any) -> str:
    """The template's text; where the template asks for the date it is ``day`` (YYYY-MM-DD), so that a prompt is the same
    tomorrow. ``how``: arguments of ``apply_chat_template``.

    Raises:
        UserError: the template refuses the messages (a system role, two turns of the same role), or leaves the system's or a
            user's text out.
    """
    try:
        template = _TODAY.sub(lambda asked: repr(date.fromisoformat(day).strftime(asked[2])), tokenizer.get_chat_template())
        if re.search(r"strftime_now(?!\s+is\b)", template):
            raise UserError("the model's chat template asks for the date in a form of its own making", "write it out")
        # Once more with texts that stand nowhere else: a short one may be a part of another, or of the template's own words.
        marked = [m | {"content": f"rsim-{n}-marks"} for n, m in enumerate(messages)]
        text, shown = (
            str(tokenizer.apply_chat_template(m, chat_template=template, tokenize=False, **how)) for m in (messages, marked)
        )
    except _FAULTS as error:
        raise UserError(f"the model's chat template refuses the messages ({first_line(error)})", _REMEDY) from error
    for message, mark in zip(messages, marked, strict=True):  # (of earlier turns of the assistant some leave the thinking out)
        said = message["content"].strip()
        lost = mark["content"] not in shown or (message["role"] != "tool" and said not in text)  # some write results as JSON
        if message["role"] != "assistant" and said and lost:
            raise UserError(f"the model's chat template leaves the {message['role']} text out", _REMEDY)
    return text


# Templates are programs: these are their own faults. ValueError: also named templates without a default.
_FAULTS = (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
_TODAY = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
_REMEDY = "put the system text (models.system_prompt) before the question, alternate user and assistant"
