"""Cold start: the reasoner learns the step format from its own wrong but well-formatted episodes.

Answers are not taught: only wrong episodes are kept. Injected tokens are read but carry no loss; worked
examples that helped while sampling are removed before fine-tuning.

``teach = "prompts"`` has the injected prompts and the end of the turn learned as well: the start of a
reasoner that will have no planner. The control ``teach = "strategies"`` (fine-tuning on strategy-labelled
steps) does so with right episodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from rsim.config import Config
from rsim.distributed.shards import unsharded
from rsim.distributed.world import ALONE, World
from rsim.errors import UserError
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner
from rsim.policies.strategies import load_strategies
from rsim.rewards.custom import Reward
from rsim.rewards.programs import runner_for
from rsim.rewards.rewards import checked_as, score_all, well_formatted
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import reasoner_batch


def cold_start(
    config: Config,
    reasoner: Reasoner,
    problems: list[Problem],
    custom: dict[str, Reward],
    world: World = ALONE,
    sync: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], int]:
    """Samples under the random planner, keeps well-formatted episodes, fine-tunes ``reasoner`` in place.

    ``sync`` gives a sampling server the new weights.

    Returns:
        the report (``cold_start/sampled``, ``kept``, ``format_rate``, ``loss_before``, ``loss_after``) and
        how many tokens were sampled.

    Raises:
        UserError: fewer than ``cold_start.minimum`` episodes could be kept, or the token budget is used up.
    """
    settings = config.cold_start
    strategies = load_strategies(config.models.strategies)
    rng = random.Random(f"cold:{config.seed}")
    asked = [rng.choice(problems) for _ in range(settings.episodes)]
    before_each = f"{settings.few_shot}\n\n" if settings.few_shot else ""
    shown = [replace(p, question=before_each + p.question) for p in asked]
    training = AgentSettings(
        temperature=1.0,
        learning_rate=settings.learning_rate,
        checkpointing=config.train.gradient_checkpointing,
        shard=config.parallel.shard,
    )
    head = reasoner.head_weight
    agent = Agent("reasoner", reasoner.model, reasoner.logits, training, head_weight=head, world=world)
    sharded = [agent.sharded] if agent.sharded else []
    planner = random_planner(strategies)
    game = Game(reasoner, planner, config.rollout, runner_for(planner, config.rewards))
    mine = world.block(len(shown))
    with unsharded(sharded):
        episodes = game.play([shown[i] for i in mine], seed=config.seed, keys=[f"cold:{i}" for i in mine])
    for episode in episodes:
        episode.group += mine.start
    scores = world.all_gather(score_all(episodes, strategies, config.rewards, custom))
    episodes = world.all_gather(episodes)
    formatted = _formatted(config, episodes)
    wants_right = settings.teach == "strategies"
    fits = [good and s.correct == wants_right for s, good in zip(scores, formatted, strict=True)]
    kept = [episode for episode, fit in zip(episodes, fits, strict=True) if fit]
    if len(kept) < settings.minimum:
        wanted = "right and" if wants_right else "wrong but"
        raise UserError(
            f"cold start: only {len(kept)} of {len(episodes)} episodes were {wanted} well formatted",
            f"cold_start.minimum = {settings.minimum} are needed: raise cold_start.episodes or give few_shot",
        )
    budget, tokens = config.train.token_budget, sum(e.sampled_tokens for e in episodes)
    if 0 < budget <= tokens:
        remedy = "no step is left: raise it, or lower cold_start.episodes"
        raise UserError(f"train.token_budget = {budget}: the cold start sampled {tokens}", remedy)
    kept = kept[: settings.keep]
    if settings.few_shot:
        plain = {e.problem.question: p for e, p in zip(episodes, asked, strict=True)}
        bare = [plain[e.problem.question] for e in kept]
        prompts = [reasoner.prompt_ids(p.question, config.rollout.day) for p in bare]
        kept = [_with_prompt(e, p, ids) for e, p, ids in zip(kept, bare, prompts, strict=True)]
    if settings.teach != "format":
        kept = [_with_prompts_learned(e, reasoner) for e in kept]
    losses = _fine_tune(config, agent, kept)
    sync()
    report = {
        "cold_start/sampled": float(len(episodes)),
        "cold_start/kept": float(len(kept)),
        "cold_start/format_rate": sum(formatted) / len(formatted),
        "cold_start/loss_before": losses[0],
        "cold_start/loss_after": losses[-1],
    }
    return report, tokens


def _formatted(config: Config, episodes: list[Episode]) -> list[bool]:
    return [
        well_formatted(replace(e, problem=checked_as(e.problem, config.rewards.checker))) for e in episodes
    ]


def _with_prompt(episode: Episode, problem: Problem, prompt: list[int]) -> Episode:
    """The same sampled and injected ids after another prompt: the bare question's, without examples."""
    old = episode.prompt_length
    by = len(prompt) - old
    steps = [replace(s, start=s.start + by, body=s.body + by, end=s.end + by) for s in episode.steps]
    return replace(
        episode,
        problem=problem,
        token_ids=prompt + episode.token_ids[old:],
        prompt_length=len(prompt),
        reasoner_mask=[0] * len(prompt) + episode.reasoner_mask[old:],
        logprobs=[0.0] * len(prompt) + episode.logprobs[old:],
        steps=steps,
    )


def _with_prompts_learned(episode: Episode, reasoner: Reasoner) -> Episode:
    """Everything after the question is to be written by the reasoner itself, up to the end of its turn, but
    for what tools wrote: it would learn to make outputs up."""
    ids = episode.token_ids
    if ids[-1] not in reasoner.end_ids:
        own_end = reasoner.tokenizer.eos_token_id
        ids = [*ids, own_end if own_end is not None else min(reasoner.end_ids)]
    mask = [0] * episode.prompt_length + [1] * (len(ids) - episode.prompt_length)
    for step in episode.steps:
        if step.output and step.before:
            mask[step.body : step.end] = episode.reasoner_mask[step.body : step.end]
        elif step.output:  # behind the prompt
            length = len(reasoner.injected_ids(step.output))
            mask[step.body - length : step.body] = [0] * length
    return replace(episode, token_ids=ids, reasoner_mask=mask, logprobs=[0.0] * len(ids))


def _fine_tune(config: Config, agent: Agent, episodes: list[Episode]) -> list[float]:
    """Cross-entropy on sampled tokens, a step per ``train.questions * group`` episodes; loss of each."""
    settings, train = config.cold_start, config.train
    size, losses = train.questions * train.group, []
    for epoch in range(settings.epochs):
        order = list(range(len(episodes)))
        random.Random(f"cold:{config.seed}:{epoch}").shuffle(order)
        for first in range(0, len(order), size):
            chosen = [episodes[i] for i in order[first : first + size]]
            batch = reasoner_batch(chosen, agent.model.device, agent.precision)
            total, actions = 0.0, float(batch.mask.sum())
            for rows, counts in agent.turns(batch, train.micro_tokens):
                micro = batch.rows(rows)
                loss = -(agent.evaluate(micro).logprobs * micro.mask).sum() / actions * counts
                agent.backward(loss)
                total += float(loss.detach())
            losses.append(agent.world.all_reduce_numbers({"loss": total})["loss"])
            agent.step(settings.learning_rate, train.grad_clip)
    return losses
