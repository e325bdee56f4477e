"""vLLM servers that Ray starts: ``rollout.vllm_url = "ray:4"`` is four of them, somewhere on the cluster.

Each is a process under an actor of its own, which starts it again if it died; so does Ray with an actor whose node is gone. Who
samples asks the actors for their servers' addresses (`urls`), and hands its weights over as to any other server.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsim.engine.process import start_server, stop_server
from rsim.errors import UserError, first_line

SCHEME = "ray:"
_NAME = "rsim-vllm-{}"
_RESTARTS = 3
_SECONDS = 900.0  # until a server answers: it loads the model and compiles


def replica_count(url: str) -> int:
    """How many replicas ``rollout.vllm_url`` asks for; 0: it names servers that run already.

    >>> replica_count("ray:4"), replica_count("http://127.0.0.1:8000")
    (4, 0)

    Raises:
        UserError: no number follows.
    """
    if not url.startswith(SCHEME):
        return 0
    number = url.removeprefix(SCHEME)
    if not (number.isdigit() and int(number) > 0):
        raise UserError(f"rollout.vllm_url = {url!r}", "write ray:N for N servers, or the addresses of running ones")
    return int(number)


class Server:
    """A vLLM server as a process below this one."""

    def __init__(self, command: str, model: str, log: str, *, host: str = "", seconds: float = _SECONDS) -> None:
        """``command`` has ``{folder}``, ``{host}`` and ``{port}``; ``log`` is the file that the server's output goes to.

        ``host``: the address to listen on; by default that of this node in the cluster.
        """
        self.command, self.model, self.log, self.host, self.seconds = command, model, log, host, seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def url(self) -> str:
        """The address, once the server answers there; it is started if it does not run.

        Raises:
            UserError: it ends, or does not answer in time.
        """
        if self.process is None or self.process.poll() is not None:
            self._start()
        return self.address

    def stop(self) -> None:
        if self.process is not None:
            stop_server(self.process)

    def _start(self) -> None:
        blanks = {"folder": self.model, "host": "{host}", "port": "{port}"}  # the last two are filled in when it starts
        words = [word.format(**blanks) for word in shlex.split(self.command)]
        self.process, self.address = start_server(
            "vLLM",
            words,
            self.host or _node_address(),
            Path(self.log),
            seconds=self.seconds,
            environment={"VLLM_SERVER_DEV_MODE": "1"},
        )


@contextmanager
def replicas(count: int, command: str, model: Path, *, others: int) -> Iterator[None]:
    """``count`` servers of the folder ``model`` on the cluster that Ray is connected to, all answering, while the block lasts.

    Each takes a GPU where the cluster has any, else a CPU. The folder must lie where all nodes see it under the same path; the
    servers' output goes beside it.

    Args:
        others: how many more processes will want a GPU or CPU each.

    Raises:
        UserError: the cluster has too few of them; a server does not start.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    if resources.get(kind, 0) < count + others:
        raise UserError(
            f"rollout.vllm_url = {SCHEME}{count}, and {others} workers", f"the cluster has {resources.get(kind, 0):.0f} {kind}s"
        )
    needs = {"num_cpus": int(kind == "CPU"), "num_gpus": int(kind == "GPU")}
    remote = ray.remote(**needs, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(Server)
    folder = model.resolve()
    actors: list[Any] = [
        remote.options(name=_NAME.format(i)).remote(command, str(folder), str(folder.with_name(f"{folder.name}-{i}.log")))
        for i in range(count)
    ]
    try:
        try:
            ray.get([actor.url.remote() for actor in actors])
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                raise error.cause from error
            raise UserError(f"a vLLM server did not start: {first_line(error)}") from error
        yield
    finally:
        ray.wait([actor.stop.remote() for actor in actors], num_returns=count, timeout=60)
        for actor in actors:
            ray.kill(actor)


def urls(url: str) -> list[str]:
    """The servers that ``rollout.vllm_url`` names; replicas that do not run are started again.

    Raises:
        UserError: replicas are asked for where no one has started any.
    """
    count = replica_count(url)
    if not count:
        return [one.strip() for one in url.split(",")]
    missing = UserError(f"rollout.vllm_url = {url!r}", "Ray starts them, for rsim train --launcher ray: else name servers")
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        raise missing
    try:
        actors = [ray.get_actor(_NAME.format(i)) for i in range(count)]
    except ValueError as error:  # no actor of that name
        raise missing from error
    found: list[str] = ray.get([actor.url.remote() for actor in actors])
    return found


def _node_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
