"""Where the weights lie and how precise they are, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rsim.config import Config
from rsim.errors import UserError, first_line


@dataclass(frozen=True)
class Device:
    """``name`` is torch's, ``dtype`` float32 or bfloat16; ``reason`` says both in words."""

    name: str
    dtype: str
    reason: str


def choose_device(config: Config, local_rank: int = 0) -> Device:
    """What ``models.device`` and ``models.dtype`` mean on this machine, for its process number ``local_rank``.

    ``auto`` takes the GPU where there is one, and bfloat16 where all that is trained are adapters on a GPU that computes in it.

    >>> choose_device(Config()).dtype
    'float32'
    """
    models = config.models
    device = torch_device(models.device)
    if models.device == "auto" and device.type == "cuda" and local_rank:
        device = torch.device("cuda", local_rank)
    if models.device != "auto":
        why = "as models.device says"
    else:
        why = "torch sees no GPU" if device.type == "cpu" else "the GPU that torch sees"
    dtype, because = _precision(config, device)
    return Device(str(device), dtype, f"{device} ({why}), {dtype} ({because})")


def allow_tf32(device: Device) -> None:
    """Lets a GPU multiply float32 matrices in TF32 (10 bits of mantissa, several times float32's speed)."""
    if device.name.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True


def _precision(config: Config, device: torch.device) -> tuple[str, str]:
    if config.models.dtype != "auto":
        return config.models.dtype, "as models.dtype says"
    if device.type != "cuda":
        return "float32", "other precisions are slow on a CPU" if device.type == "cpu" else "rsim's bfloat16 is CUDA's alone"
    if config.trained_whole:
        agents = " and the ".join(config.trained_whole)
        return "float32", f"all weights of the {agents} are trained, and small steps vanish in bfloat16"
    if not torch.cuda.is_bf16_supported():
        return "float32", "this GPU does not compute in bfloat16"
    return "bfloat16", "the weights are frozen below their adapters"


def torch_device(name: str) -> torch.device:
    """``auto`` means the GPU where there is one, CUDA's or Apple's.

    Raises:
        UserError: torch knows no such device.
    """
    if name == "auto":
        apple = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else apple)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such name; a backend that torch was built without
        raise UserError(f"models.device = {name!r}: {first_line(error)}", "use auto, cpu, cuda, cuda:N or mps") from error


def precise(values: torch.Tensor) -> torch.Tensor:
    """``values`` in float32, or in float64 where they are: what probabilities are computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
