"""Memory: what was used at most, and what was freed given back to the system."""

from __future__ import annotations

import ctypes
import platform

import torch

from rsim.models.device import Device


def release_freed() -> None:
    """Has the C library return to the system what it keeps of freed memory (``malloc_trim``; glibc alone has
    it).

    Every step's tensors have other sizes, so freed pieces come to lie between used ones, and a process that
    holds no more tensors than hours ago is larger all the same. Takes milliseconds; afterwards the pages that
    are needed again are fetched again, so it is called at checkpoints and not at every step.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_on_gpu(device: Device) -> dict[str, float]:
    """``gpu_memory_gib``, the peak so far; nothing on a CPU."""
    if not device.name.startswith("cuda"):
        return {}
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device.name) / 2**30}
