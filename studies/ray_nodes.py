"""Two Ray nodes in network namespaces of their own train as one process does, also when a worker or the head is killed.

    python -m studies.ray_nodes [--steps 20] [--seed 0] [--record]

Needs root, ``ip`` (iproute2) and ray[train]. A virtual cable joins the namespaces; each node has one CPU, so that each gets one
of the two workers (nano-s, 16 questions of 8 episodes a step, a checkpoint every second step). Three runs: one left alone;
one whose worker on the second node is killed (Ray starts both again); one in which the head is killed, and with it the
cluster: a new one is started and the run asked to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studies.ledger import record, row
from studies.workload import show

_HEAD, _OTHER = "rsim-a", "rsim-b"
_ADDRESS = {_HEAD: "10.87.0.1", _OTHER: "10.87.0.2"}
_PORT = 6399
_PATIENCE = 900  # seconds for a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write results/ray_nodes.json and its page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _namespaces():
        rows = measure(Path(folder), args.steps, args.seed)
    show(rows)
    if args.record:
        record("ray_nodes", 7, "Two Ray nodes against one process", rows)


def measure(place: Path, steps: int, seed: int) -> list[dict[str, Any]]:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(_train(place / "alone", steps, seed), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    with _cluster():
        _finish(_driver(place / "together", steps, seed))
        driver = _driver(place / "worker", steps, seed)
        _wait_for(place / "worker" / "checkpoints" / "step-000004", driver)
        _kill(_worker_on(_OTHER))
        _finish(driver)
    with _cluster() as nodes:
        driver = _driver(place / "head", steps, seed)
        _wait_for(place / "head" / "checkpoints" / "step-000004", driver)
        for pid in _pids(_HEAD):
            _kill(pid)
        for node in nodes:
            node.kill()
        driver.kill()
        driver.wait()
    with _cluster():
        _finish(_driver(place / "head", steps, seed, "--resume"))
    expected = _losses(place / "alone")
    rows = []
    for folder, what in (
        ("together", "two nodes, left alone"),
        ("worker", "two nodes, a worker killed"),
        ("head", "two nodes, the head killed, then resumed"),
    ):
        found = _losses(place / folder)
        assert len(found) == len(expected) == steps, f"{folder}: {len(found)} of {steps} steps"
        for agent in ("planner", "reasoner"):
            apart = max(abs(a[agent] - b[agent]) for a, b in zip(expected, found, strict=True))
            rows.append(row(f"{what}, {steps} steps: largest difference of the {agent}'s loss from one process's", apart,
                            goal="at most 1e-05", met=apart <= 1e-5, seeds=[seed]))  # fmt: skip
    return rows


def _train(folder: Path, steps: int, seed: int, *more: str) -> list[str]:
    changes = [f"out={folder}", f"stages.stage1.steps={steps // 2}", f"stages.stage2.steps={steps - steps // 2}",
               "train.questions=16", "train.group=8", "train.eval_every=0", "train.save_every=2", "data.eval_size=8",
               "train.trackers=[]", f"seed={seed}"]  # fmt: skip
    return [sys.executable, "-m", "rsim", "train", "nano", *(part for c in changes for part in ("--set", c)), *more]


@contextmanager
def _namespaces() -> Iterator[None]:
    """Two network namespaces, each with one end of a virtual cable."""
    ends = {_HEAD: "rsim-va", _OTHER: "rsim-vb"}
    commands = [f"ip netns add {n}" for n in ends]
    commands.append(f"ip link add {ends[_HEAD]} type veth peer name {ends[_OTHER]}")
    for name, end in ends.items():
        commands += [f"ip link set {end} netns {name}", f"ip -n {name} addr add {_ADDRESS[name]}/24 dev {end}",
                     f"ip -n {name} link set {end} up", f"ip -n {name} link set lo up"]  # fmt: skip
    for name in ends:  # left behind by one that was killed
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        yield
    finally:
        for name in ends:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _inside(
    name: str, command: list[str], variables: dict[str, str] | None = None, **more: Any
) -> subprocess.Popen[str]:  # fmt: skip
    """Starts a command in a namespace; gloo is told which end of the cable is its own."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "rsim-va" if name == _HEAD else "rsim-vb", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "disabled",  # nobody else is on this network
    } | (variables or {})  # fmt: skip
    whole = ["ip", "netns", "exec", name, *command]
    return subprocess.Popen(whole, text=True, env=environment, start_new_session=True, **more)


@contextmanager
def _cluster() -> Iterator[list[subprocess.Popen[str]]]:
    """A head and one more node, one CPU each."""
    ray = str(Path(sys.executable).with_name("ray"))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    started = [ray, "start", "--head", f"--port={_PORT}", f"--node-ip-address={_ADDRESS[_HEAD]}", "--include-dashboard=false"]
    nodes = [_inside(_HEAD, [*started, *common], **quiet)]
    time.sleep(10)
    joining = [ray, "start", f"--address={_ADDRESS[_HEAD]}:{_PORT}", f"--node-ip-address={_ADDRESS[_OTHER]}"]
    nodes.append(_inside(_OTHER, [*joining, *common], **quiet))
    time.sleep(10)
    try:
        yield nodes
    finally:
        for name in (_OTHER, _HEAD):
            for pid in _pids(name):
                _kill(pid)
        for node in nodes:
            node.wait()


def _driver(folder: Path, steps: int, seed: int, *more: str) -> subprocess.Popen[str]:
    command = _train(folder, steps, seed, "--launcher", "ray", "--workers", "2", "--json", *more)
    address = {"RAY_ADDRESS": f"{_ADDRESS[_HEAD]}:{_PORT}"}
    return _inside(_HEAD, command, address, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(driver: subprocess.Popen[str]) -> None:
    _, err = driver.communicate(timeout=_PATIENCE)
    if driver.returncode:
        raise SystemExit(f"the run failed: {err[-2000:]}")


def _wait_for(path: Path, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not path.is_dir():
        if time.monotonic() > deadline or driver.poll() is not None:
            raise SystemExit(
                f"{path.name} was not reached: {driver.communicate()[1][-2000:] if driver.poll() is not None else ''}"
            )
        time.sleep(0.05)


def _pids(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _worker_on(name: str) -> int:
    """The process of the node that trains."""
    for pid in _pids(name):
        if b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise SystemExit(f"no worker of the run on node {name}")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it went with another one
        return


def _losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{agent: r.get(f"{agent}/loss", 0.0) for agent in ("planner", "reasoner")} for r in lines if "accuracy" in r]


if __name__ == "__main__":
    main()
