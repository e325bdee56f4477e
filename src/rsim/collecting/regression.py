"""Full-information regression of what every branch is worth, cross-fitted, and the gate that leaves the model alone.

The log holds the outcome of every branch at every state, so nothing has to be explored and no importance weights are
needed. A branch's *advantage*, its utility less the mean of the state's branches, is regressed on the planner's hidden
state. Utility is 1 for a right answer, less ``price`` for a thousand tokens. What a branch is worth that leads to another
choice depends on how that is made: targets are worked out from the last choices to the first. What a branch is worth on
average differs from one choice to the next (to end at once, or behind a program's output): each *level*, the number of steps
made, has constants of its own. The slopes are shared, since the head is one matrix.

Nothing is judged by questions that it was fitted to. The ridge's strength, the gate and the way that a branch goes on come
from folds of the questions, inside of whatever is fitted; `cross_fitted` holds out questions from all of that again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rsim.collecting.tree import Node, Outcome, Tree

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
_FOLDS = 5
_LEVELS = 4
_RIDGES = tuple(10.0**power for power in range(-2, 4))  # penalties, in units of a standardised feature's variance
_SURE, _FLIPS = 0.95, 2000  # of the gate: its level, and how often signs are drawn
_NEVER = 4.0  # how many right answers below the others a branch lies that the log does not know
STRAY = "stray"  # what stands for an arm where a strategy was chosen that none tried
_SHARPNESS = 20.0  # logits per unit of utility: of two branches 5 points apart the better is e times as likely


@dataclass(frozen=True)
class Choices:
    """Every state of some questions; those behind a state come before it.

    ``names`` are the strategies in label order, ``null`` is the null action's label. ``features`` is ``[states, hidden]``,
    ``question`` ``[states]`` an index into ``trees``.
    """

    names: tuple[str, ...]
    null: int
    price: float
    trees: list[Tree]
    nodes: list[Node]
    question: NDArray[np.int64]
    features: Array

    @cached_property
    def known(self) -> Mask:
        """``[states, strategies]``: the branches that the log has."""
        return np.array([[name in node.branches for name in self.names] for node in self.nodes])

    @cached_property
    def level(self) -> NDArray[np.int64]:
        """``[states]``: how many steps were made; from a few on all are one."""
        return np.array([min(len(node.steps), _LEVELS - 1) for node in self.nodes])

    @cached_property
    def is_root(self) -> Mask:
        """``[states]``: the first choice of a question."""
        return np.array([not node.steps for node in self.nodes])

    def utility(self, outcome: Outcome) -> float:
        return outcome.right - self.price * outcome.tokens / 1000

    @cached_property
    def dearest(self) -> int:
        """The most tokens that an arm took on a question."""
        return max(end.tokens for tree in self.trees for end in tree.outcomes.values())

    def followed(self, scores: Array) -> list[Outcome]:
        """What every state comes to where each choice is the best one by ``scores``, ``[states, strategies]``. Of a strategy
        that no arm tried there nobody knows what it comes to: it counts as wrong, and as dear as can be."""
        stray = Outcome(STRAY, False, self.dearest)
        ends: dict[int, Outcome] = {}
        for node, label in zip(self.nodes, scores.argmax(1), strict=True):
            branch = node.branches.get(self.names[label], stray)
            ends[id(node)] = branch if isinstance(branch, Outcome) else ends[id(branch)]
        return [ends[id(node)] for node in self.nodes]

    def utilities(self, scores: Array) -> Array:
        """What each branch is worth, ``[states, strategies]``, if later choices are the best known ones by ``scores``; unknown
        branches: NaN."""
        follows = self.followed(np.where(self.known, scores, -np.inf))
        ends = {id(node): end for node, end in zip(self.nodes, follows, strict=True)}
        found = np.full(scores.shape, np.nan)
        for row, node in enumerate(self.nodes):
            for name, branch in node.branches.items():
                end = branch if isinstance(branch, Outcome) else ends[id(branch)]
                found[row, self.names.index(name)] = self.utility(end)
        return found


@dataclass(frozen=True)
class Head:
    """A planner's head: logits are ``features @ weights.T``, weights ``[strategies, hidden]``.

    ``threshold`` is the predicted gain (utility) that a first choice other than the null action must have; infinite: none
    is taken. ``ridge`` is the penalty's strength.
    """

    weights: Array
    threshold: float
    ridge: float


def cross_fitted(choices: Choices, *, gated: bool = True) -> tuple[list[Outcome], Array]:
    """What each question comes to with a head that was fitted, gate and all, to other folds' questions.

    Returns:
        The outcomes in the order of ``choices.trees``, and the logits ``[states, strategies]`` that led to them.
    """
    scores = np.zeros((len(choices.nodes), len(choices.names)))
    folds = np.array([fold_of(tree, "outer") for tree in choices.trees])
    for fold in range(_FOLDS):
        held_out = (folds == fold)[choices.question]
        scores[held_out] = choices.features[held_out] @ fit(choices, folds != fold, gated=gated).weights.T
    return of_questions(choices, choices.followed(scores)), scores


def of_questions(choices: Choices, ends: list[Outcome]) -> list[Outcome]:
    """Of what every state comes to, that of each question's first state."""
    first = {int(choices.question[row]): ends[row] for row in np.flatnonzero(choices.is_root)}
    return [first[question] for question in range(len(choices.trees))]


def fit(choices: Choices, questions: Mask, *, gated: bool = True) -> Head:
    """A head for the questions that a mask ``[questions]`` names."""
    rows = np.flatnonzero(questions[choices.question])
    folds = np.array([fold_of(tree, "inner") for tree in choices.trees])[choices.question][rows]
    scale, level = _Scale.of(choices.features[rows]), choices.level[rows]
    x, known = scale.apply(choices.features[rows]), choices.known
    compared = known[rows] & (known[rows].sum(1, keepdims=True) > 1)  # where there is one branch, nothing is chosen
    scores, ridge = np.zeros(known.shape), _RIDGES[-1]
    for _ in range(1 + max(len(choices.nodes[row].steps) for row in rows)):  # each time one more level is settled
        targets = _advantages(choices, scores)[rows]
        guesses = {ridge: _held_out(x, targets, compared, ridge, folds, level) for ridge in _RIDGES}
        ridge = min(_RIDGES, key=lambda r: float((((guesses[r] - targets) ** 2)[compared]).sum()))
        scores[rows] = guesses[ridge]
    weights, constants = _ridge(x, _advantages(choices, scores)[rows], compared, ridge, level)
    threshold = _threshold(choices, scores, questions) if gated else 0.0
    everywhere = np.ones_like(compared)
    for strength, what in ((-_NEVER, ~known), (min(threshold, _NEVER), _at_null(choices))):
        slopes, offsets = _ridge(x, what[rows].astype(float), everywhere, _RIDGES[0], level)
        weights, constants = weights + strength * slopes, constants + strength * offsets
    if np.isinf(threshold):  # no slope is left, which could choose something else on questions unlike these
        weights, constants = np.zeros_like(weights), np.zeros_like(constants)
        constants[:, choices.null] = _NEVER
    return Head(_SHARPNESS * scale.unscaled(weights, constants, choices.features[rows], level), threshold, ridge)


def fold_of(tree: Tree, use: str) -> int:
    """A question's fold; its id decides."""
    return int.from_bytes(hashlib.sha256(f"{use} {tree.data} {tree.id}".encode()).digest()[:4], "big") % _FOLDS


def _at_null(choices: Choices) -> Mask:
    """``[states, strategies]``: the null action at a first choice, to which the threshold is added."""
    found = np.zeros((len(choices.nodes), len(choices.names)), dtype=bool)
    found[choices.is_root, choices.null] = True
    return found


def _advantages(choices: Choices, scores: Array) -> Array:
    """Utilities less their state's mean, ``[states, strategies]``; unknown branches: 0."""
    utilities = choices.utilities(scores)
    found: Array = np.nan_to_num(utilities - np.nanmean(utilities, 1, keepdims=True))
    return found


def _threshold(choices: Choices, scores: Array, questions: Mask) -> float:
    """The gate: of the thresholds from 0 up, the one with the greatest lower bound of the mean gain over leaving the model
    alone, on questions that the scores were not fitted to; infinite where no bound is above 0. See `lower_bounds`."""
    roots = np.flatnonzero(choices.is_root & questions[choices.question])
    utilities, known = choices.utilities(scores)[roots], choices.known[roots]
    guesses = np.where(known, scores[roots], -np.inf)
    others = guesses.copy()
    others[:, choices.null] = -np.inf
    best = others.argmax(1)
    predicted = others.max(1) - guesses[:, choices.null]
    gained = utilities[np.arange(len(roots)), best] - utilities[:, choices.null]
    thresholds = np.unique(np.maximum(0.0, [0.0, *np.quantile(predicted, np.linspace(0, 0.95, 20))]))
    # Where tokens cost, most gains are small and sure, and the rare loss of a right answer may not have been seen yet.
    unseen = [-1.0 - choices.price * choices.dearest / 1000] if choices.price else []
    bounds = lower_bounds(gained * (predicted > thresholds[:, None]), unseen)
    return float(thresholds[bounds.argmax()]) if bounds.max() > 0 else np.inf


def lower_bounds(gains: Array, unseen: Sequence[float] = ()) -> Array:
    """One-sided 95% lower bounds of mean gains, ``[thresholds]``, that hold for all thresholds together.

    If a rule gains nothing, each gain may as well have the other sign: the greatest sum over all thresholds, in units of its
    own standard deviation, that such signs give in 5% of 2000 draws is what must be exceeded. Where gains are 1, 0 and -1 this
    is exact for any number of questions (a sign test, of the best of several rules).

    Args:
        gains: ``[thresholds, questions]``; 0 where the model is left alone.
        unseen: gains that are added to those that were observed.
    """
    count = gains.shape[1]
    gains = np.hstack([gains, np.tile(unseen, (len(gains), 1))])
    length = np.maximum(np.sqrt((gains**2).sum(1)), 1e-12)
    signs = 2.0 * np.random.default_rng(0).integers(0, 2, (_FLIPS, gains.shape[1])) - 1.0
    greatest = (signs @ (gains / length[:, None]).T).max(1)
    found: Array = (gains.sum(1) - np.quantile(greatest, _SURE, method="higher") * length) / count
    return found


# --- ridge regression ---


@dataclass(frozen=True)
class _Scale:
    """Standardised features."""

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, features: Array) -> _Scale:
        return cls(features.mean(0), features.std(0) + 1e-6)

    def apply(self, features: Array) -> Array:
        return (features - self.mean) / self.deviation

    def unscaled(self, weights: Array, constants: Array, features: Array, level: NDArray[np.int64]) -> Array:
        """``[strategies, hidden]`` for features as they are. A stock classifier's head has no bias: a level's constants
        are told by the direction that is nearest to 1 on this level's ``features`` and to 0 on the others'."""
        gram = features.T @ features
        there = (level[:, None] == np.arange(_LEVELS)).astype(float)
        told = np.linalg.solve(gram + 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram)), features.T @ there)
        slopes = weights / self.deviation
        found: Array = slopes + (constants - slopes @ self.mean).T @ told.T
        return found


def _held_out(x: Array, targets: Array, used: Mask, ridge: float, folds: NDArray[np.int64], level: NDArray[np.int64]) -> Array:
    """Predictions ``[states, strategies]``, each by what was fitted to the other folds."""
    guesses = np.zeros_like(targets)
    for fold in np.unique(folds):
        own, others = folds == fold, folds != fold
        weights, constants = _ridge(x[others], targets[others], used[others], ridge, level[others])
        guesses[own] = x[own] @ weights.T + constants[level[own]]
    return guesses


def _ridge(x: Array, targets: Array, used: Mask, ridge: float, level: NDArray[np.int64]) -> tuple[Array, Array]:
    """Slopes ``[strategies, hidden]`` and constants ``[levels, strategies]``, fitted where a strategy is ``used``; else 0."""
    slopes, constants = np.zeros((targets.shape[1], x.shape[1])), np.zeros((_LEVELS, targets.shape[1]))
    for where in {column.tobytes(): column for column in used.T}.values():
        if not where.any():
            continue
        labels = np.flatnonzero((used == where[:, None]).all(0))
        xs, ys, of = x[where], targets[where][:, labels], level[where]
        there = (of[:, None] == np.arange(_LEVELS)) / np.maximum(np.bincount(of, minlength=_LEVELS), 1)
        middle, mean = there.T @ xs, there.T @ ys  # of each level
        centred, wanted = xs - middle[of], ys - mean[of]
        penalty = ridge * len(xs) * np.eye(x.shape[1])
        slopes[labels] = np.linalg.solve(centred.T @ centred + penalty, centred.T @ wanted).T
        constants[:, labels] = mean - middle @ slopes[labels].T
    return slopes, constants
