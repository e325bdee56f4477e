"""New strategies for a cluster of failures, written by an LLM behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import httpx

from rsim.discovery.failures import Cluster, as_text
from rsim.errors import UserError, first_line
from rsim.policies.strategies import Strategy, StrategySet, parse_strategy

_ASKED = """A planner picks one of these strategies before each step of a reasoner's solution and injects its prompt:

{known}

In {count} of {total} solutions this went wrong: {title}. Examples:

{examples}

Propose one new strategy, different from those above, whose prompt would make the reasoner avoid this. Reply with JSON only:
{{"name": "one-or-two-words", "description": "what the step does", "prompts": ["words that open the step", "another wording"], \
"keywords": ["words that show it was followed"]}}"""
_TRIES = 3


def propose(
    strategies: StrategySet, cluster: Cluster, total: int, *, url: str, model: str, client: httpx.Client | None = None
) -> Strategy:
    """Asks ``model`` at ``url`` for a strategy, three times at most, until what it writes is one.

    The key is ``$RSIM_UPSTREAM_API_KEY``.

    Raises:
        UserError: the server does not answer; nothing that it wrote was a new strategy.
    """
    known = "\n".join(f"- {s.name}: {s.description} Prompt: {s.prompts[0]!r}" for s in strategies.strategies)
    examples = "\n\n".join(as_text(e) for e in cluster.examples)
    question = _ASKED.format(known=known, count=cluster.count, total=total, title=cluster.title, examples=examples)
    messages = [{"role": "user", "content": question}]
    headers = (
        {"Authorization": f"Bearer {os.environ['RSIM_UPSTREAM_API_KEY']}"} if "RSIM_UPSTREAM_API_KEY" in os.environ else {}
    )
    client = client or httpx.Client(timeout=600)
    why = ""
    for attempt in range(_TRIES):
        body = {"model": model, "messages": messages, "temperature": 0.7 if attempt else 0.0, "max_tokens": 400}
        try:
            reply = client.post(f"{url.rstrip('/')}/chat/completions", json=body, headers=headers)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise UserError(f"{url} does not answer: {first_line(error)}", "check --upstream and --model") from error
        try:
            written = reply.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{url} does not answer as OpenAI's API does", "check --upstream") from error
        try:
            return _parsed(written, strategies)
        except (UserError, ValueError) as error:
            why = first_line(error)
    raise UserError(f"{model} wrote no strategy in {_TRIES} tries: {why}", "try another model, or write the file by hand")


def _parsed(written: str, strategies: StrategySet) -> Strategy:
    """The strategy in an LLM's reply, held to the same rules as a user's file."""
    found = re.search(r"\{.*\}", written, re.DOTALL)
    if found is None:
        raise ValueError("there is no JSON object in the reply")
    fields = json.loads(found.group())
    if not isinstance(fields, dict):
        raise ValueError("the reply is no JSON object")
    name = re.sub(r"[^a-z0-9]+", "-", str(fields.get("name", "")).lower()).strip("-")
    if name in strategies.names:
        raise ValueError(f"{name!r} is there already")
    strategy = parse_strategy(Path("the reply"), {**fields, "name": name})
    if "" in strategy.prompts:
        raise ValueError("it has an empty prompt")
    if strategy.tool:
        raise ValueError("it has a tool, which a strategy is given by people")
    return strategy
