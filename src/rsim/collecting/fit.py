"""From a log to a planner: hidden states, the regression, what it is worth, and the planner's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rsim.answers.extract import plain_text
from rsim.collecting.log import Log
from rsim.collecting.questions import questions
from rsim.collecting.regression import STRAY, Array, Choices, Head, Mask, cross_fitted, fit, fold_of, of_questions
from rsim.collecting.tree import Node, Outcome, Step, Tree, game_arms, trees
from rsim.config import Config, DataConfig
from rsim.errors import UserError
from rsim.evaluation.evaluate import bootstrap_interval
from rsim.game.problem import Problem
from rsim.policies.fitted import FittedFor
from rsim.policies.loading import load_planner
from rsim.policies.planner import Planner, step_ids
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules

_RULE = "rules."
_DEEPEST = 8  # steps that a blind planner tells apart
_SAME = ("model", "weights", "quantisation", "template")  # settings that logs must share to be fitted together


@dataclass(frozen=True)
class Standing:
    """A planner, or a control, on the log's questions: accuracy (strict), its difference to leaving the model alone with the
    paired 95% bootstrap interval, tokens a question, and the share of questions at which it acts."""

    data: str
    name: str
    questions: int
    accuracy: float
    gain: float
    low: float
    high: float
    tokens: float
    acts: float


@dataclass(frozen=True)
class Fitted:
    """``standings``: cross-fitted on the log; ``tested``: on logs that nothing was fitted to or picked on. ``strays``: the
    share of questions, cross-fitted, on which the head comes to prefer a strategy that no arm tried there (it counts
    as wrong); ``tested_strays``: of the test logs' questions."""

    planner: Planner
    head: Head
    standings: list[Standing]
    strays: float
    tested: list[Standing] = field(default_factory=list)
    tested_strays: float = 0.0


def fit_planner(
    logs: list[Log],
    base: str,
    *,
    tests: list[Log] | None = None,
    price: float = 0.0,
    data: DataConfig | None = None,
    on_state: Callable[[int, int], None] = lambda done, of: None,
) -> Fitted:
    """A planner whose head is fitted to what the arms of ``logs`` are worth; the base stays as it is.

    Args:
        tests: logs of the same arms on other questions, on which the finished planner and its controls are read off.
        price: of a thousand tokens, in right answers.
        on_state: called with ``(read, all)`` as the base reads the questions.

    Raises:
        UserError: logs of different models, rules or arms; none of their arms leaves the model alone; a question is not
            in the data any more, or too few were collected.
    """
    first = _same([*logs, *(tests or [])])
    planner = unfitted(base, first)
    choices = read(planner, logs, price, data, on_state)
    if len(choices.trees) < 20:
        raise UserError(f"{len(choices.trees)} questions that all arms have played", "collect 20 at least")
    asked = read(planner, tests, price, data, on_state) if tests else None
    if asked:
        _check_disjoint(choices, asked, _texts([*logs, *(tests or [])], data))
    head = fit(choices, _all_of(choices))
    with torch.no_grad():
        planner.model.score.weight.copy_(torch.tensor(head.weights))
    settings = first.header["settings"]
    planner.fitted_for = FittedFor(**{key: settings[key] for key in _SAME}, system_prompt=first.system_prompt)
    standings, strays = standings_of(choices)
    rows, stray = tested(choices, head, asked) if asked else ([], 0.0)
    return Fitted(planner, head, standings, strays, rows, stray)


def unfitted(base: str, log: Log) -> Planner:
    """A planner of a log's strategies and rules (by which it is read) with a new head."""
    planner = load_planner(base, load_strategies(str(log.folder / "strategies.toml")), seed=0)
    settings = log.header["settings"]
    planner.rules = PlayRules(**{k.removeprefix(_RULE): v for k, v in settings.items() if k.startswith(_RULE)})
    return planner


def _same(logs: list[Log]) -> Log:
    first = logs[0]
    first.records()  # raises where there is no log
    for log in logs[1:]:
        log.records()
        ours, theirs = (one.header["settings"] for one in (first, log))
        other = [key for key in theirs if (key in _SAME or key.startswith(_RULE)) and ours.get(key) != theirs[key]]
        other += ["strategies"] * (ours["strategies"] != theirs["strategies"])
        other += ["system prompt"] * (first.system_prompt != log.system_prompt)
        other += ["arms"] * (game_arms(first) != game_arms(log))
        if other:
            raise UserError(f"{first.folder} and {log.folder} differ in {', '.join(other)}", "fit logs of one model and game")
    return first


def read(
    planner: Planner,
    logs: list[Log],
    price: float = 0.0,
    data: DataConfig | None = None,
    on_state: Callable[[int, int], None] = lambda done, of: None,
) -> Choices:
    """The questions of ``logs`` as the planner sees them; raises as `fit_planner`."""
    known = [tree for log in logs for tree in trees(log)]
    twice = [key for key, count in Counter((tree.data, tree.id) for tree in known).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} questions are in two logs ({twice[0][1]}, ...)", "give each question once")
    return choices_of(planner, known, _texts(logs, data), price, on_state)


def _texts(logs: list[Log], data: DataConfig | None) -> dict[tuple[str, str], str]:
    """The questions' texts, by data and id."""
    return {(log.header["settings"]["data"], p.id): p.question for log in logs for p in _asked(log, data)}


def _check_disjoint(choices: Choices, asked: Choices, texts: dict[tuple[str, str], str]) -> None:
    """Raises `UserError` where a question of the test logs was fitted to, under whatever name."""
    fitted = {plain_text(texts[tree.data, tree.id]) for tree in choices.trees}
    shared = [tree.id for tree in asked.trees if plain_text(texts[tree.data, tree.id]) in fitted]
    if shared:
        problem = f"{len(shared)} questions are in both logs ({', '.join(shared[:3])}, ...)"
        raise UserError(problem, "test on others than those that are fitted to (rsim collect --exclude)")


def _asked(log: Log, data: DataConfig | None) -> list[Problem]:
    settings, config = log.header["settings"], Config(data=data or DataConfig())
    return questions(settings["data"], settings["split"], config=config)


def choices_of(
    planner: Planner,
    known: list[Tree],
    texts: dict[tuple[str, str], str],
    price: float,
    on_state: Callable[[int, int], None] = lambda done, of: None,
) -> Choices:
    """The states of some questions with the planner's hidden states; ``texts``: of the questions, by data and id.

    Raises:
        UserError: no arm leaves the model alone, or a question's text is not there.
    """
    nodes, owner, features = [], [], []
    for number, tree in enumerate(known):
        if (tree.data, tree.id) not in texts:
            raise UserError(f"question {tree.id} is not in {tree.data}", "give the data that the log was collected on")
        own = list(tree.root.walk())
        nodes += own
        owner += [number] * len(own)
        features.append(_hidden(planner, texts[tree.data, tree.id], own))
        on_state(number + 1, len(known))
    names = planner.strategies.names
    null = [names.index(name) for name in known[0].root.branches if names.index(name) in planner.strategies.unlimited]
    if not null:
        raise UserError(
            "no arm begins with the null action", 'add an arm whose strategy is unlimited, e.g. sequence = ["alone"]'
        )
    return Choices(names, null[0], price, known, nodes, np.array(owner), np.concatenate(features))


def _hidden(planner: Planner, question: str, nodes: list[Node]) -> Array:
    """``[nodes, hidden]``; a state behind another is read together with it."""
    found: dict[tuple[Step, ...], torch.Tensor] = {}
    for node in sorted(nodes, key=lambda node: -len(node.steps)):
        if node.steps not in found:
            ids = planner.opening(question)
            positions = [len(ids) - 1]
            for number, (name, text) in enumerate(node.steps, 1):
                ids = ids + step_ids(planner, number, name, text)
                positions.append(len(ids) - 1)
            found |= {node.steps[:depth]: state for depth, state in enumerate(planner.states([(ids, positions)]))}
    hidden: Array = torch.stack([found[node.steps] for node in nodes]).cpu().double().numpy()
    return hidden


# --- what it is worth ---


def standings_of(choices: Choices) -> tuple[list[Standing], float]:
    """The fitted planner, cross-fitted, beside leaving the model alone, every arm, the best arm (of all sets and of each set;
    picked on the other folds), planners that see less, and any arm right; by data set, then over all."""
    planned, _ = cross_fitted(choices)
    ends = {
        "best arm": best_arm(choices, by_set=False),
        "best arm of each set": best_arm(choices, by_set=True),
        "blind planner": cross_fitted(blind(choices))[0],
        "question-only planner": cross_fitted(flat(choices))[0],
        "planner without gate": cross_fitted(choices, gated=False)[0],
        "planner": planned,
    }
    return _standings(choices, ends), _strays(planned)


def tested(choices: Choices, head: Head, asked: Choices) -> tuple[list[Standing], float]:
    """The same on the questions of ``asked``, with what was fitted to, and picked on, those of ``choices``."""
    assert flat(asked).names == flat(choices).names
    best = {data: _worthiest(choices, [t for t in choices.trees if data in ("", t.data)]) for data in _sets(choices)}
    ends = {
        "best arm": [tree.outcomes[best[""]] for tree in asked.trees],
        "best arm of each set": [tree.outcomes[best.get(tree.data, best[""])] for tree in asked.trees],
        "blind planner": played(blind(asked), fit(blind(choices), _all_of(choices))),
        "question-only planner": played(flat(asked), fit(flat(choices), _all_of(choices))),
        "planner without gate": played(asked, fit(choices, _all_of(choices), gated=False)),
        "planner": played(asked, head),
    }
    return _standings(asked, ends), _strays(ends["planner"])


def _strays(ends: list[Outcome]) -> float:
    return float(np.mean([end.arm == STRAY for end in ends]))


def played(asked: Choices, head: Head) -> list[Outcome]:
    """What each question of ``asked`` comes to under a head."""
    return of_questions(asked, asked.followed(asked.features @ head.weights.T))


def _all_of(choices: Choices) -> Mask:
    return np.ones(len(choices.trees), dtype=bool)


def _sets(choices: Choices) -> list[str]:
    """The data sets' names, after the empty one, which stands for all of them."""
    return ["", *dict.fromkeys(tree.data for tree in choices.trees)]


def _standings(choices: Choices, ends: dict[str, list[Outcome]]) -> list[Standing]:
    arms = {name: [tree.outcomes[name] for tree in choices.trees] for name in choices.trees[0].outcomes}
    null = arms[null_arm(choices)]
    any_right = [min(t.outcomes.values(), key=lambda o: (not o.right, o.tokens)) for t in choices.trees]
    sets = _sets(choices)[1:]
    found = []
    for data in [*sets, "all sets"] if len(sets) > 1 else sets:
        of = [i for i, tree in enumerate(choices.trees) if data in (tree.data, "all sets")]
        rows = arms | ends | {"any arm right": any_right}
        found += [_standing(data, name, [(row[i], null[i]) for i in of]) for name, row in rows.items()]
    return found


def null_arm(choices: Choices) -> str:
    """The arm that leaves the model alone, wherever it stands in the log."""
    end = choices.trees[0].root.branches[choices.names[choices.null]]
    assert isinstance(end, Outcome)
    return end.arm


def _standing(data: str, name: str, pairs: list[tuple[Outcome, Outcome]]) -> Standing:
    gains = [float(end.right) - float(alone.right) for end, alone in pairs]
    low, high = bootstrap_interval(gains)
    right, tokens = np.mean([end.right for end, _ in pairs]), np.mean([end.tokens for end, _ in pairs])
    acts = np.mean([end.arm != alone.arm for end, alone in pairs])
    return Standing(data, name, len(pairs), float(right), float(np.mean(gains)), low, high, float(tokens), float(acts))


def best_arm(choices: Choices, *, by_set: bool) -> list[Outcome]:
    """Each question's outcome under the arm of the greatest utility on the other folds' questions (of its set)."""
    folds = [fold_of(tree, "outer") for tree in choices.trees]
    names: dict[tuple[int, str], str] = {}
    for fold, data in {(fold, tree.data) for fold, tree in zip(folds, choices.trees, strict=True)}:
        others = [
            tree for own, tree in zip(folds, choices.trees, strict=True) if own != fold and (not by_set or tree.data == data)
        ]
        names[fold, data] = _worthiest(choices, others)
    return [tree.outcomes[names[fold, tree.data]] for fold, tree in zip(folds, choices.trees, strict=True)]


def _worthiest(choices: Choices, among: list[Tree]) -> str:
    """The arm of the greatest utility on some questions; the first of equals."""
    worth = {arm: sum(choices.utility(t.outcomes[arm]) for t in among) for arm in choices.trees[0].outcomes}
    return max(worth, key=lambda arm: worth[arm])


def blind(choices: Choices) -> Choices:
    """The same choices, of which a planner sees the number of the step alone."""
    depths = np.array([len(node.steps) for node in choices.nodes])
    return replace(choices, features=np.eye(1 + _DEEPEST)[np.minimum(depths, _DEEPEST)])


def flat(choices: Choices) -> Choices:
    """The same questions with one choice each: an arm, by the question alone. Logs may hold the arms in any order."""
    roots = np.flatnonzero(choices.is_root)
    roots = roots[np.argsort(choices.question[roots])]
    names = tuple(sorted(choices.trees[0].outcomes))
    nodes = [Node((), dict(tree.outcomes)) for tree in choices.trees]
    null = names.index(null_arm(choices))
    question = np.arange(len(nodes))
    return replace(choices, names=names, null=null, nodes=nodes, question=question, features=choices.features[roots])
