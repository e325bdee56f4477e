"""Text from tokens as they come, for streams."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of one step. Each call decodes the last few tokens alone, whatever the step's length.

    A token may hold a part of a character only, and how a token is written may depend on the one before it: so text is handed
    out once it can change no more, and decoded together with the tokens before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.context, self.read = 0, 0  # tokens before `read` are told; those from `context` on are decoded with what follows
        self.told = 0  # characters

    def add(self, tokens: list[int]) -> str:
        """What ``tokens``, all of the step so far, add to the text."""
        before = self._text(tokens[self.context : self.read])
        now = self._text(tokens[self.context :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.context, self.read = self.read, len(tokens)
        delta = now[len(before) :]
        self.told += len(delta)
        return delta

    def finish(self, tokens: list[int]) -> tuple[str, str]:
        """What was not told yet, and the text of the whole step."""
        text = self._text(tokens)
        return text[self.told :], text

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
