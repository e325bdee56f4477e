"""Means and intervals over seeds and questions."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import numpy as np

from studies.workbench import Measured

# Student's t, two-sided 95%, by degrees of freedom from 1 on; the last stands for all that are more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and questions with its 95% interval, and the mean of each seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]


def estimate(measured: list[Measured]) -> Estimate:
    """Accuracy over seeds (one evaluation each) that were asked the same questions; its interval ends at 0 and 1."""
    found = crossed(np.stack([m.right for m in measured]).astype(float))
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def difference(a: list[Measured], b: list[Measured]) -> Estimate:
    """Accuracy of ``a`` minus that of ``b``, paired by seed and question; a single evaluation stands for every seed."""
    left, right = (np.stack([m.right for m in side]).astype(float) for side in (a, b))
    return crossed(left - right)


def crossed(outcomes: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean over ``outcomes [seeds, questions]`` with the wider, at either end, of two 95% intervals: the percentiles of a
    bootstrap that resamples seeds and questions independently, and Student's t over the seeds' means (two seeds or more).

    >>> crossed(np.ones((3, 10)))
    Estimate(mean=1.0, low=1.0, high=1.0, seeds=(1.0, 1.0, 1.0))
    """
    rng = np.random.default_rng(seed)
    seeds, questions = outcomes.shape
    # How often each seed and each question is drawn: the resample's mean is a bilinear form of the two.
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, resamples)
    of_questions = rng.multinomial(questions, [1 / questions] * questions, resamples)
    means = np.einsum("rs,sq,rq->r", of_seeds, outcomes, of_questions, optimize=True) / (seeds * questions)
    low, high = np.percentile(means, [2.5, 97.5])
    per_seed = tuple(float(v) for v in outcomes.mean(1))
    mean = float(outcomes.mean())
    if seeds > 1:
        half = _T[min(seeds - 1, len(_T)) - 1] * statistics.stdev(per_seed) / math.sqrt(seeds)
        low, high = min(low, mean - half), max(high, mean + half)
    return Estimate(mean, float(low), float(high), per_seed)
