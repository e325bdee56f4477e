"""The learned planner: a stock sequence classifier over the strategy set, read at markers of an append-only id stream."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rsim import rules_file
from rsim.engine.decoder import Decoder
from rsim.engine.sampling import choose
from rsim.errors import UserError, first_line
from rsim.models import adapters, shape
from rsim.models.device import precise
from rsim.models.prompts import begin_ids
from rsim.models.weights import check_model, resolve
from rsim.policies import fitted, template
from rsim.policies.fitted import FittedFor
from rsim.policies.protocol import Decision
from rsim.policies.strategies import StrategySet, load_strategies, to_toml
from rsim.rules import PlayRules

log = logging.getLogger("rsim")

_STRATEGIES = "strategies.toml"  # in a planner's folder
_RULES = "rules.toml"  # beside it: the rules that it was trained under
_FITTED = "fitted_for.json"  # and, of a planner that was fitted to a log, whose
_CONFIG = "planner_config.json"  # in an adapter's: beside it, a config.json would pass for a whole model's


@dataclass
class Planner:
    """A classifier whose labels are the strategy names, in order, with its tokenizer.

    The checkpoint is an ordinary ``AutoModelForSequenceClassification`` folder; ``config.rsim_template`` holds the version
    of the text template and ``config.id2label`` the strategy set.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    strategies: StrategySet
    rules: PlayRules | None = None  # that it was trained under
    fitted_for: FittedFor | None = None  # the model whose log it was fitted to, if it was
    _chunks: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, strategies: StrategySet | None = None, *, merge: bool = True, **how: Any
    ) -> Planner:
        """Loads a saved planner from a folder or the hub, by default with the strategies that it was saved with.

        Args:
            merge: of an adapter's folder: into the base's weights; False: to be trained further.
            how: arguments of transformers' ``from_pretrained``.

        Raises:
            UserError: the folder is no planner, or was trained on another strategy set or template.
        """
        check_model(source)
        base = adapters.base_of(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForSequenceClassification.from_pretrained(
                source if base is None else resolve(base), config=planner_config(source), **how
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a planner from {source}", first_line(error)) from error
        if base is not None and merge:
            model = adapters.merged(model, source)
        elif base is not None:
            adapters.resume(model, source)
        if strategies is None:
            file = cached_file(str(source), _STRATEGIES, _raise_exceptions_for_missing_entries=False)
            if file is None:
                raise UserError(f"{source} holds no {_STRATEGIES}", "pass the strategies that it was trained with")
            strategies = load_strategies(file)
        check_labels(model.config, strategies, str(source))
        file = cached_file(str(source), _FITTED, _raise_exceptions_for_missing_entries=False)
        return cls(model, tokenizer, strategies, saved_rules(source), fitted.from_json(Path(file)) if file else None)

    def save_pretrained(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes a folder that `from_pretrained` reads; ``weights``: in the place of the model's own."""
        self.model.save_pretrained(folder, state_dict=weights)
        if adapters.base_of(folder) is not None:
            config = self.model.config.to_dict()
            config.pop("quantization_config", None)  # how the base was read, not what it is
            (Path(folder) / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / _STRATEGIES).write_text(to_toml(self.strategies), encoding="utf-8")
        if self.rules is not None:
            (Path(folder) / _RULES).write_text(rules_file.to_toml(self.rules), encoding="utf-8")
        if self.fitted_for is not None:
            (Path(folder) / _FITTED).write_text(fitted.to_json(self.fitted_for), encoding="utf-8")

    def check_model(self, model: str, system_prompt: str | None = None) -> None:
        """Warns where it was fitted for another model than ``model``, or behind another system prompt."""
        if self.fitted_for is not None:
            self.fitted_for.warn(model, system_prompt)

    def chunk(self, text: str) -> list[int]:
        """The ids of one chunk of the stream, tokenised alone and remembered."""
        if text not in self._chunks:
            self._chunks[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._chunks[text]

    @property
    def sees(self) -> template.Sees:
        """What it reads of a play: everything, or what a control may see; a trained planner keeps to it."""
        found: template.Sees = getattr(self.model.config, "rsim_sees", "everything")
        return found

    @property
    def parameters(self) -> int:
        return int(self.model.num_parameters())

    @property
    def context(self) -> int:
        return shape.context(self.model.config)

    def opening(self, question: str) -> list[int]:
        """The stream up to the first decision."""
        shown = "" if self.sees == "number" else question
        return begin_ids(self.tokenizer, template.question_chunk(shown)) + self.chunk(template.MARKER)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Strategy logits ``[..., strategies]`` of final hidden states ``[..., hidden]``."""
        return shape.logits(self.model, hidden)

    @torch.no_grad()
    def states(self, streams: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """The final hidden states ``[decisions, hidden]`` at which it decides in ``streams``: the ids of an episode, and the
        positions of the decisions among them. `logits` reads them."""
        found = []
        for ids, positions in streams:
            short = [p for p in positions if p < (shape.first_range(self.model.config) or sys.maxsize)]
            for part in (short, positions[len(short) :]):
                if part:  # as far as the last of them: longrope goes by the length of a pass
                    read = torch.tensor([ids[: part[-1] + 1]], device=self.model.device)
                    found.append(self.model.base_model(read).last_hidden_state[0, part])
        return torch.cat(found)

    def begin(self, slots: int) -> LearnedSession:
        return LearnedSession(self, slots)

    def wrap(self, target: Any, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> Any:
        """Any LLM with this planner: see `rsim.serving.wrap.wrap`."""
        from rsim.serving.wrap import wrap

        return wrap(self, target, tokenizer, **options)


class ModelPlanner(Protocol):
    """What a session asks of a planner that reads its stream with a model."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def sees(self) -> template.Sees: ...
    @property
    def rules(self) -> PlayRules | None: ...
    def chunk(self, text: str) -> list[int]: ...
    def opening(self, question: str) -> list[int]: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def step_ids(planner: ModelPlanner, step: int, strategy: str, text: str) -> list[int]:
    """The ids of step ``step`` (from 1) in the stream, up to the next decision."""
    if planner.sees != "everything":
        shown = template.number_chunk(step) if planner.sees == "number" else template.strategy_chunk(strategy)
        return planner.chunk(shown) + planner.chunk(template.MARKER)
    # A step's text is not remembered like the fixed chunks: it hardly ever comes twice.
    body: list[int] = planner.tokenizer.encode(text, add_special_tokens=False)
    return planner.chunk(template.strategy_chunk(strategy)) + body + planner.chunk(template.MARKER)


class LearnedSession:
    """Incremental: each chunk of the stream goes through the model once."""

    def __init__(self, planner: ModelPlanner, slots: int) -> None:
        self.planner = planner
        self.decoder = Decoder(planner.model, slots, capacity=256)
        self.pending: list[list[int]] = [[] for _ in range(slots)]  # ids that the model has not read yet
        self.stream: list[list[int]] = [[] for _ in range(slots)]  # ids that it has read
        self.steps = [0] * slots

    def start(self, slots: list[int], questions: list[str], openings: list[list[int] | None] | None = None) -> None:
        known = dict(zip(questions, openings or (), strict=False))
        opened = {q: known.get(q) or self.planner.opening(q) for q in set(questions)}
        begun = [opened[q] for q in questions]
        for slot, ids, pending in zip(slots, begun, self.decoder.start(slots, begun), strict=True):
            self.pending[slot], self.stream[slot], self.steps[slot] = pending, ids[: len(ids) - len(pending)], 0

    @torch.no_grad()
    def decide(self, slots: list[int], uniforms: list[float], temperature: float) -> list[Decision]:
        hidden = self.decoder.append(slots, [self.pending[s] for s in slots])
        logits = precise(self.planner.logits(hidden))
        actions, logprobs = choose(logits, temperature, torch.tensor(uniforms, device=logits.device))
        probabilities = torch.softmax(logits / (temperature or 1.0), -1).tolist()
        decisions = []
        for slot, action, logprob, row in zip(slots, actions.tolist(), logprobs.tolist(), probabilities, strict=True):
            self.stream[slot] = self.stream[slot] + self.pending[slot]
            self.pending[slot] = []
            decisions.append(Decision(len(self.stream[slot]) - 1, action, logprob, row))
        return decisions

    def observe(self, slot: int, strategy: str, text: str) -> None:
        self.steps[slot] += 1
        self.pending[slot] = self.pending[slot] + step_ids(self.planner, self.steps[slot], strategy, text)

    def ids(self, slot: int) -> list[int]:
        return self.stream[slot]

    def length(self, slot: int) -> int:
        return len(self.stream[slot]) + len(self.pending[slot])

    def reads(self, slot: int) -> bool:
        return self.length(slot) <= shape.context(self.planner.model.config)


def saved_rules(source: str | Path) -> PlayRules | None:
    """The rules that a planner was saved with. One from before rules were saved has none: a warning says what is assumed.

    Raises:
        UserError: the file is not what `rsim.rules_file.to_toml` writes.
    """
    file = cached_file(str(source), _RULES, _raise_exceptions_for_missing_entries=False)
    if file is None:
        assumed = ", ".join(f"{name} = {getattr(PlayRules, name)!r}" for name in rules_file.RULE_FIELDS)
        log.warning("%s holds no %s: unless other rules are given it plays by the defaults (%s)", source, _RULES, assumed)
        return None
    return rules_file.from_toml(Path(file).read_text(encoding="utf-8-sig"), str(file))


def planner_config(source: str | Path) -> Any:
    """The config of a planner, or of the base of a new one."""
    adapter = adapters.base_of(source) is not None
    return AutoConfig.from_pretrained(Path(source) / _CONFIG if adapter else source)


def name_tokens(chunk: Callable[[str], list[int]], strategies: StrategySet) -> list[int]:
    """The first token of each strategy's name as the stream has it: where a causal LM says which one comes next.

    Raises:
        UserError: two names begin with the same token.
    """
    first = [chunk(template.strategy_chunk(name))[0] for name in strategies.names]
    if len(set(first)) < len(first):
        raise UserError("two strategy names begin with the same token", "rename one of them")
    return first


def check_labels(config: Any, strategies: StrategySet, source: str) -> None:
    labels = tuple(config.id2label[i] for i in sorted(config.id2label))
    if labels != strategies.names:
        raise UserError(
            f"planner {source} chooses among [{', '.join(labels)}] but the strategy set is [{', '.join(strategies.names)}]",
            "pass the strategies that it was trained with",
        )
    version = getattr(config, "rsim_template", None)
    if version != template.VERSION:
        raise UserError(f"planner {source} reads template {version!r}, this version writes {template.VERSION!r}")
