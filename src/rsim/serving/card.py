"""A planner as a folder that is ready for a model hub: weights, tokenizer, strategies and a generated model card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rsim.config import Config
from rsim.errors import UserError
from rsim.models.weights import written_whole
from rsim.policies.planner import Planner
from rsim.policies.strategies import StrategySet
from rsim.runs.checkpoints import identity, step_of
from rsim.runs.folder import records
from rsim.runs.locate import locate

_CARD = """\
---
license: {licence}
base_model: {base}
library_name: transformers
pipeline_tag: text-classification
tags: [rsim, reasoning, planner]
---

# {name}

A planner: before every step of another LLM's chain of thought it chooses one of the strategies below, whose prompt \
is injected. Made with [rsim](https://arxiv.org/abs/2512.08300).

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from rsim import Planner

planner = Planner.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("any/model")
with planner.wrap(model, AutoTokenizer.from_pretrained("any/model")) as planned:
    print(planned.generate("A question").text)
```

In front of any OpenAI-compatible server: `rsim serve --planner {repo} --upstream http://127.0.0.1:8080/v1`, then ask for
the model `NAME-rsim`.

## Strategies

| strategy | what for | prompts |
|---|---|---|
{strategies}

## Training

Base `{base}`, reasoner `{reasoner}`, data `{data}`; {stages}; {questions} questions x {group} episodes a step; {rewards}; \
seed {seed}. \
{versions}. Source commit {commit}.

## Results

{results}

## Limits

The planner was trained with the reasoner and on the tasks named above; with other reasoners and tasks its worth has to be
measured (`rsim eval --planner`, with controls). It chooses among these strategies and no others. It reads the question
and the steps so far as text; it does not see images, tools or earlier turns of a chat.
"""


def hub_folder(run: str, target: Path, *, repo: str, licence: str) -> Path:
    """Writes a run's planner and its card to ``target``.

    Raises:
        UserError: ``run`` has no trained planner, or ``target`` exists already.
    """
    config, checkpoint = locate(run, [])
    folder = checkpoint / "planner" if checkpoint else None
    if checkpoint is None or folder is None or not folder.is_dir():
        raise UserError(f"{run} has no trained planner", "name a run or a checkpoint that has one")
    if target.exists():
        raise UserError(f"{target} exists already", "name a new folder")
    planner = Planner.from_pretrained(folder)
    card = _card(config, planner.strategies, checkpoint, repo, licence)
    with written_whole(target, "make room, or name another folder") as draft:
        planner.save_pretrained(draft)  # an adapter is merged into its base
        (draft / "README.md").write_text(card, encoding="utf-8")
    return target


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads a folder to the Hugging Face hub (logged in by ``hf auth login`` or ``$HF_TOKEN``); returns its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Planner trained with rsim"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"cannot push to {repo}", str(error).strip().splitlines()[0]) from error


def _card(config: Config, strategies: StrategySet, checkpoint: Path, repo: str, licence: str) -> str:
    run = checkpoint.parent.parent
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    up = config.upstream
    rows = [f"| {s.name} | {s.description} | {' / '.join(s.prompts)} |" for s in strategies.strategies]
    return _CARD.format(
        licence=licence,
        base=config.models.planner,
        name=repo.rpartition("/")[2],
        repo=repo,
        strategies="\n".join(rows),
        reasoner=f"{up.model} (behind a server: text only, approximate)" if up.url else config.models.reasoner,
        data=", ".join((config.data.train, *config.data.replay)),
        stages=_taken(checkpoint),
        questions=config.train.questions,
        group=config.train.group,
        rewards=_rewards(config),
        seed=config.seed,
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        commit=facts["git_commit"][:12],
        results="\n".join(_results(run, checkpoint)),
    )


def _taken(checkpoint: Path) -> str:
    """The steps that led to a checkpoint, as the run's metrics have them."""
    last = step_of(checkpoint)
    taken = {r["step"]: r["lambda"] for r in records(checkpoint.parent.parent) if "lambda" in r and r["step"] <= last}
    counts = Counter(taken.values())
    return ", ".join(f"{count} steps at lambda {value:g}" for value, count in counts.items()) or "no steps"


def _rewards(config: Config) -> str:
    """The weights that are not 0, and the user's own functions."""
    weights = {name: getattr(config.rewards, name) for name in ("accuracy", "format", "follow", "terminal", "penalty")}
    shown = [f"{name} {weight:g}" for name, weight in weights.items() if weight]
    own = [spec.rpartition(":")[2] for spec in config.rewards.custom]
    return "rewards " + ", ".join(shown + [f"custom `{name}`" for name in own])


def _results(run: Path, checkpoint: Path) -> list[str]:
    """A table of evaluations of these weights where the run has one, else of others, which it says; else the held-out curve up
    to the checkpoint."""
    places = [run, run / "eval", run / f"eval-{checkpoint.name}"]
    tables = [json.loads(file.read_text(encoding="utf-8")) for p in places if (file := p / "table.json").is_file()]
    if tables:
        pushed = identity(checkpoint)
        own: list[dict[str, Any]] = [t for t in tables if pushed["weights"] and t.get("weights") == pushed["weights"]]
        shown = (own or tables)[0]
        theirs = shown.get("checkpoint", "a checkpoint that the table does not name")
        of = "these weights" if own else f"{theirs}, not of these weights ({pushed['checkpoint']})"
        row = "| {name} | {accuracy:.1%} | {low:.1%} to {high:.1%} | {tokens_per_question:.0f} |"
        rows = [row.format(**r) for r in shown["rows"]]
        return [
            f"{shown['title']}. Results of {of}.",
            "",
            "| | accuracy | 95% interval | tokens / question |",
            "|---|---|---|---|",
            *rows,
        ]
    evaluated = [r for r in records(run) if "eval/accuracy" in r and r["step"] <= step_of(checkpoint)]
    if not evaluated:
        return ["Not evaluated."]
    first, last = evaluated[0], evaluated[-1]
    gain = f"{first['eval/accuracy']:.1%} after step {first['step']}, {last['eval/accuracy']:.1%} after step {last['step']}"
    return [f"Held-out accuracy {gain} (greedy)."]
