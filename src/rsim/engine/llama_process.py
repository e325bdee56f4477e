"""Starts llama.cpp's server, built by ``studies/llama_server.sh``: a process of one thread for each core."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsim.engine.process import start_server, stop_server
from rsim.errors import UserError

_SECONDS = 300.0  # until it has loaded the model
# A slot has its own cache and no other (none is saved when it changes hands). Weights that are not repacked give a
# sampled token the same logits whatever is sampled beside it, and are no slower.
_SETTINGS = "--threads 1 --threads-batch 1 --no-kv-unified --cache-ram 0 --no-ui --no-repack"


def server_program() -> Path:
    """``$RSIM_LLAMA_SERVER``, or where ``studies/llama_server.sh`` puts the program. It may not be there."""
    cache = Path(os.environ.get("RSIM_CACHE") or Path.home() / ".cache" / "rsim")
    return Path(os.environ.get("RSIM_LLAMA_SERVER") or cache / "llama" / "llama-server")


@contextmanager
def llama_servers(
    model: Path,
    log: Path,
    *,
    slots: int,
    context: int,
    cores: tuple[int, ...] = (),
    more: tuple[str, ...] = (),
) -> Iterator[str]:
    """Servers of the GGUF file ``model`` while the block lasts.

    Two servers of one thread, each pinned to a core, sample more than one of two threads, which wait for each
    other. Their addresses come as ``rollout.llama_url`` takes them.

    Args:
        log: the file that their output is added to.
        slots: sequences at a time, of each server.
        context: tokens of one slot: the longest question and ``rollout.max_tokens``, and one more.
        cores: one server pinned to each of these CPU cores; none: one server, not pinned.
        more: further arguments of the server.

    Raises:
        UserError: the program is not there, or a server does not start.
    """
    program = server_program()
    if not program.is_file():
        raise UserError(
            f"no llama.cpp server at {program}",
            "build it with studies/llama_server.sh, or set $RSIM_LLAMA_SERVER",
        )
    words = [str(program), "--model", str(model), "--host", "{host}", "--port", "{port}", *_SETTINGS.split()]
    words += ["--parallel", str(slots), "--ctx-size", str(slots * context), *more]
    running: list[subprocess.Popen[bytes]] = []
    addresses = []
    try:
        for pin in [["taskset", "-c", str(core)] for core in cores] or [[]]:
            process, address = start_server("llama.cpp", [*pin, *words], "127.0.0.1", log, seconds=_SECONDS)
            running.append(process)
            addresses.append(address)
        yield ",".join(addresses)
    finally:
        for process in running:
            stop_server(process)
