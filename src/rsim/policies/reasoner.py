"""The reasoner: a causal LM with its tokenizer, and how a question becomes its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsim.engine.layers import Linear
from rsim.errors import UserError
from rsim.models import prompts, shape
from rsim.rules import PlayRules


@dataclass
class Reasoner:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system_prompt: str = ""

    def save_pretrained(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Model and tokenizer as a folder; ``weights``: in the place of the model's own."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def prompt_ids(self, question: str, day: str = PlayRules.day) -> list[int]:
        """The ids up to and including the opening of the assistant's turn; ``day``: see `PlayRules`."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return self.chat_ids([*system, {"role": "user", "content": question}], day)

    def chat_ids(
        self, messages: list[dict[str, Any]], day: str, *, continues: bool = False, tools: list[Any] | None = None
    ) -> list[int]:
        """`prompt_ids` of a chat whose contents are texts; ``continues``: its last message is the assistant's own, to be gone
        on with; ``tools``: for a template that shows them. Without a chat template each message is a
        paragraph.

        Raises:
            UserError: the template refuses the messages.
        """
        if self.tokenizer.chat_template:
            how = {"add_generation_prompt": not continues, "continue_final_message": continues, "tools": tools}
            return self.injected_ids(prompts.chat_text(self.tokenizer, messages, day, **how))
        paragraphs = "\n\n".join(message["content"] for message in messages)
        return prompts.begin_ids(self.tokenizer, paragraphs + ("" if continues else "\n"))

    def injected_ids(self, text: str) -> list[int]:
        """A strategy prompt or delimiter, tokenised alone."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the output head knows; the tokenizer may have fewer."""
        rows: int = self.model.get_output_embeddings().weight.shape[0]
        return rows

    @property
    def end_ids(self) -> set[int]:
        """Every token that ends a turn. Padding plays no part: an episode's length is recorded, not inferred."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        ends = {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}
        if not ends:
            raise UserError("the reasoner's tokenizer has no end-of-turn token", "set eos_token in its config")
        return ends

    @property
    def head_weight(self) -> torch.Tensor | None:
        """The output head's matrix ``[V, hidden]``, or None where the head is more than a matrix."""
        head = self.model.get_output_embeddings()
        plain = type(head) in (torch.nn.Linear, Linear) and head.bias is None
        plain = plain and shape.scale_and_cap(self.model.config) == (1, None)
        return head.weight if plain else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits ``[..., vocabulary]`` of final hidden states ``[..., hidden]``."""
        return shape.logits(self.model, hidden)
