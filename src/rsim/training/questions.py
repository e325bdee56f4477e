"""Which questions a run trains on, and in which order."""

from __future__ import annotations

import hashlib
import json
import math
import random
from functools import lru_cache

from rsim.config import Config, TrainConfig
from rsim.data.leaks import shared_questions
from rsim.data.load import endless, load_problems, with_replay
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.policies.planner import Planner
from rsim.policies.reasoner import Reasoner


def load_questions(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out questions.

    Raises:
        UserError: a data set is not there, or smaller than a step.
    """
    data, seed = config.data, config.seed

    def load(source: str, split: str, limit: int, seed: int) -> list[Problem]:
        return load_problems(
            source, split, data_dir=data.data_dir, limit=limit, seed=seed, columns=data.columns
        )

    training = load(data.train, "train", data.train_size, seed)
    earlier = [load(source, "train", data.train_size, seed) for source in data.replay]
    training = with_replay(training, earlier, data.replay_share, seed) if earlier else training
    check_enough(config, training)
    return training, load(data.eval, data.eval_split, data.eval_size, 0)


def fingerprint(problems: list[Problem]) -> str:
    """Of questions and answers in their order: a run that goes on draws by their places."""
    texts = json.dumps([(problem.id, problem.question, problem.answer) for problem in problems])
    return hashlib.sha256(texts.encode()).hexdigest()


def require_same(before: str | None, now: str, force: bool) -> None:
    """Raises `UserError` where a run that goes on draws from others than ``before`` (None: not known)."""
    if before not in (None, now) and not force:
        raise UserError(
            "--resume: the training questions are not those of the run", "bring them back, or pass --force"
        )


def leaked(config: Config, training: list[Problem], held_out: list[Problem]) -> list[str]:
    """A line that says so where held-out questions are trained on. What is made on the spot is not looked at:
    its splits have none in common."""
    if all(map(endless, (config.data.train, config.data.eval, *config.data.replay))):
        return []
    count = len(shared_questions(training, held_out))
    whole = f"{count} of the {len(held_out)} held-out questions are trained on too"
    return [f"{whole}: held-out accuracy is not that of unseen questions"] if count else []


def check_enough(config: Config, problems: list[Problem]) -> None:
    """Raises `UserError` where there are fewer than a step's questions."""
    if len(problems) < config.train.questions:
        remedy = f"the data has {len(problems)} questions to train on"
        raise UserError(f"train.questions = {config.train.questions}", remedy)


def without_long(config: Config, reader: Reasoner | Planner | None, problems: list[Problem]) -> list[Problem]:
    """The training questions that ``data.max_question_tokens`` of ``reader`` allow.

    Raises:
        UserError: fewer than a step's are left; or ``reader`` is a planner (before an upstream) that
            cannot read one: it would be paid for, and nothing learned.
    """
    longest = config.data.max_question_tokens
    kept = problems
    if longest and reader is not None:
        encode = reader.tokenizer.encode
        kept = [p for p in problems if len(encode(p.question, add_special_tokens=False)) <= longest]
        check_enough(config, kept)
    if isinstance(reader, Planner):
        most = max(len(reader.opening(p.question)) for p in kept)
        if most > reader.context:
            problem = f"a question of {most} tokens exceeds the planner's context of {reader.context}"
            raise UserError(problem, "leave long questions out (data.max_question_tokens)")
    return kept


def questions_of_step(problems: list[Problem], seed: int, step: int, count: int) -> list[Problem]:
    """The questions of one step: a walk through a permutation that is new in every epoch, a function of its
    arguments. An epoch's last, incomplete batch is filled from the next epoch."""
    picked = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(problems))
        picked.append(problems[_permutation(len(problems), seed, epoch)[place]])
    return picked


def affordable(train: TrainConfig, sampled: int, a_question: float, at_least: int) -> int:
    """How many of a step's questions the token budget allows: the steps that are left share it evenly, so
    that it is met closely and by no tiny step.

    Args:
        sampled: tokens so far.
        a_question: tokens that the last step sampled for each of its questions; 0: none was played.
        at_least: one for each rank.

    Returns:
        ``train.questions`` at most; 0 where less than a twentieth of a step is left.
    """
    if not train.token_budget or not a_question:
        return 0 if 0 < train.token_budget <= sampled else train.questions
    steps = (train.token_budget - sampled) / (train.questions * a_question)
    if steps < 0.05:
        return 0
    return max(at_least, round(train.questions * steps / math.ceil(steps)))


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"epoch:{seed}:{epoch}").shuffle(order)
    return order
