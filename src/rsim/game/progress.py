"""Who hears of the episodes that have ended, for progress bars: one listener, by default nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnEpisode = Callable[[int, int], None]  # how many have ended, of how many that are played together

_listeners: list[OnEpisode] = []


def ended(done: int, of: int) -> None:
    """Says that one more has ended."""
    if _listeners:
        _listeners[-1](done, of)


@contextmanager
def heard_by(listener: OnEpisode) -> Iterator[None]:
    """Lets ``listener`` hear of them meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
