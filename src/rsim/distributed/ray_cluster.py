"""The Ray cluster that training is spread over, and the vLLM servers that it runs for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsim.config import Config
from rsim.engine.vllm import save_untied
from rsim.engine.vllm_replicas import replica_count, replicas
from rsim.errors import UserError
from rsim.policies.loading import load_reasoner


def connect() -> Any:
    """The module ray, connected to the cluster that ``RAY_ADDRESS`` names, or to one on this machine alone.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--launcher ray needs the package ray", "pip install 'ray[train]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    return ray


@contextmanager
def served(config: Config, folder: Path, *, others: int) -> Iterator[None]:
    """Runs the vLLM servers that the config asks Ray for, if any: of ``models.reasoner``, exported into ``folder``, which also
    gets their output. Needs `connect`.

    Args:
        others: how many processes will work beside them.

    Raises:
        UserError: as `replicas` does.
    """
    rules = config.rollout
    count = replica_count(rules.vllm_url) if rules.engine == "vllm" else 0
    if not count:
        yield
        return
    model = folder / "model"
    export(config.models.reasoner, model)
    try:
        with replicas(count, rules.vllm_command, model, others=others):
            yield
    finally:
        shutil.rmtree(model)


def export(source: str, folder: Path) -> None:
    """Writes the reasoner ``source`` as a folder that a vLLM server can serve and be trained through."""
    reasoner = load_reasoner(source, device="cpu")
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_untied(reasoner.model, folder)
    reasoner.tokenizer.save_pretrained(folder)
