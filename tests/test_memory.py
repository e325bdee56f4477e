"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform

import psutil
import pytest

from rsim.training.memory import release_freed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can be asked for it")
def test_freed_pieces_below_a_used_one_are_returned() -> None:
    pieces = [b"x" * 100_000 for _ in range(1000)]  # under the 128 KiB from which glibc maps each alone
    held = psutil.Process().memory_info().rss
    pieces[:-1] = []  # the last one, above all others, is still used
    release_freed()
    assert held - psutil.Process().memory_info().rss > 50_000_000
    assert len(pieces) == 1
