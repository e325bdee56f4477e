"""What shapes a step that the model in this process samples: top-p, a grammar that its text keeps to, log-probs that are asked
for. The grammars are llguidance's (``pip install 'rsim-rl[structured]'``).

A schema's answer is JSON without blank space. Near the end of its tokens it is closed as soon as the schema allows: an answer
that is cut would be none.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rsim.errors import UserError
from rsim.serving.play import Asked

CALL, CALLED = "<tool_call>", "</tool_call>"
_CLOSING = 48  # tokens before the limit, from which on an answer is brought to its end
_COMPACT = {"whitespace_flexible": False}


def text_form(asked: Asked) -> str:
    """The grammar that an answer has to keep to, in llguidance's notation; "" if there is none.

    Raises:
        UserError: a ``response_format`` or ``tool_choice`` of another form.
    """
    form = asked.form or {}
    schema = form["json_schema"].get("schema") if isinstance(form.get("json_schema"), dict) else None
    schema = {"type": "object"} if form.get("type") == "json_object" else schema
    if form and not isinstance(schema, dict):
        raise UserError("response_format must be a json_object, or a json_schema with its schema")
    answer = "TEXT" if schema is None else f"%json {json.dumps(schema | {'x-guidance': _COMPACT})}"
    if asked.tools:
        return _calls(asked.tools, asked.tool_choice, answer)
    return "" if schema is None else f"start: {answer}\n"


def _calls(tools: list[dict[str, Any]], choice: Any, answer: str) -> str:
    """``answer``: what may stand in the place of a call."""
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, dict):
        named = choice.get("function")
        functions = [f for f in functions if isinstance(named, dict) and f["name"] == named.get("name")]
    if not functions or not (choice in (None, "auto", "required") or isinstance(choice, dict)):
        raise UserError("tool_choice must be auto, none, required or one of the tools")
    parts = [{"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}} for f in functions]
    closed = {"type": "object", "required": ["name", "arguments"], "additionalProperties": False}
    calls = [closed | {"properties": properties} for properties in parts]
    call = f'"{CALL}" json "{CALLED}"'
    start = f"{call} | answer" if choice in (None, "auto") else call
    called = json.dumps({"anyOf": calls, "x-guidance": _COMPACT})
    return f"start: {start}\nanswer: {answer}\nTEXT: /[^<](.|\\n)*/\njson: %json {called}\n"


def read_call(text: str) -> tuple[str, str] | None:
    """The name and the arguments (JSON) of a call that an answer is; None: it is a text, or was cut."""
    if not (text.startswith(CALL) and text.endswith(CALLED)):
        return None
    call = json.loads(text[len(CALL) : -len(CALLED)])
    return call["name"], json.dumps(call["arguments"])


class Grammars:
    """Of one model's tokens. Made once: it takes a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, ends: set[int]) -> None:
        """
        Raises:
            UserError: llguidance is not installed.
        """
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise UserError("formats and tools need llguidance", "pip install 'rsim-rl[structured]'") from error
        self.tokenizer = from_tokenizer(tokenizer, size, sorted(ends))
        pieces = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))])
        closing = [
            {i for i, piece in enumerate(pieces) if piece and not set(piece) - set(kind)} for kind in ('"', '"}]', ',"}]')
        ]
        # In this order: within a text a bracket is text.
        self.closing = [torch.tensor([i in kind for i in range(size)]) for kind in (ends, *closing)]

    def matcher(self, form: str) -> Any:
        """
        Raises:
            UserError: there is no such grammar.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, form, log_level=0)
        if matcher.is_error():
            raise UserError(f"the schema cannot be obeyed ({matcher.get_error().splitlines()[0]})")
        return matcher


class Shape:
    """Of one step: bends its logits before a token is drawn, and keeps the log-probs of what was."""

    def __init__(self, temperature: float, top_p: float, limit: int, top: int | None, grammars: Grammars | None, matcher: Any):
        """``top``: how many log-probs to keep beside each token's own; None: none at all."""
        self.temperature, self.top_p, self.limit, self.top = temperature, top_p, limit, top
        self.grammars, self.matcher = grammars, matcher
        self.row = torch.empty(0)  # log-probs of the next token, before they are bent
        self.consumed = 0  # tokens that the matcher has read: a forward pass may be tried again
        self.kept: list[tuple[int, float, list[tuple[int, float]]]] = []

    @property
    def bends(self) -> bool:
        """Whether it does anything."""
        return self.top_p < 1 or self.top is not None or self.matcher is not None

    def __call__(self, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """
        Args:
            logits: ``[v]`` of the next token.
            tokens: of the step so far.
        """
        self.keep(tokens)
        if self.top is not None:
            self.row = logits.float().log_softmax(-1)
        if self.matcher is not None:
            logits = logits.masked_fill(~self._allowed(tokens).to(logits.device), -torch.inf)
        if self.top_p < 1 and self.temperature > 0:
            values, order = (logits.float() / self.temperature).softmax(-1).sort(descending=True)
            beyond = values.cumsum(-1) - values >= self.top_p  # the first that reaches it stays
            beyond[0] = False  # a top_p that float32 takes for 0 leaves one
            logits = logits.index_fill(0, order[beyond], -torch.inf)
        return logits

    def keep(self, tokens: list[int]) -> None:
        """The log-probs of the last of a step's tokens, once it is known."""
        if self.top is not None and len(self.kept) < len(tokens):
            values, ids = self.row.topk(self.top)
            best = list(zip(ids.tolist(), values.tolist(), strict=True))
            self.kept.append((tokens[-1], float(self.row[tokens[-1]]), best))

    def _allowed(self, tokens: list[int]) -> torch.Tensor:
        if len(tokens) > self.consumed:
            self.consumed = len(tokens)
            self.matcher.consume_token(tokens[-1])
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        size = len(self.grammars.closing[0])  # type: ignore[union-attr]
        allowed = (bits[:, None] >> torch.arange(8) & 1).flatten()[:size].bool()
        if self.limit - len(tokens) <= min(_CLOSING, self.limit // 2):
            for closing in self.grammars.closing:  # type: ignore[union-attr]
                if (allowed & closing).any():
                    return allowed & closing
        return allowed
