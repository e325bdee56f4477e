"""vLLM servers that Ray starts, with a stand-in in the place of vLLM."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import rsim
from rsim.config import load_config, to_toml
from rsim.distributed.ray_cluster import export
from rsim.engine import vllm
from rsim.engine.vllm_replicas import Server, urls
from rsim.errors import UserError
from rsim.runs.folder import records
from standin_vllm import StandIn

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'ray[train]'")
STANDIN = f"{sys.executable} {Path(__file__).with_name('served_standin.py')} {{folder}} {{host}} {{port}}"


@pytest.fixture
def exported(base_folder, tmp_path):
    export(str(base_folder), tmp_path / "exported")
    return str(tmp_path / "exported")


def test_a_server_that_died_is_started_again(exported, tmp_path):
    server = Server(STANDIN, exported, str(tmp_path / "log"), host="127.0.0.1")
    first = server.url()
    assert httpx.get(f"{first}/v1/models").json()["data"][0]["id"] == "rsim"
    assert server.url() == first, "it runs: nothing is started"
    process = server.process
    assert process is not None
    process.kill()
    process.wait()
    again = server.url()
    assert httpx.get(f"{again}/health").status_code == 200
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{again}/health")
    assert (tmp_path / "log").read_text().count("a stand-in for vLLM") == 2


def test_a_server_ends_with_the_process_that_started_it(exported, tmp_path):
    program = (
        "import sys, time\n"
        "from rsim.engine.vllm_replicas import Server\n"
        f"print(Server({STANDIN!r}, {exported!r}, {str(tmp_path / 'log')!r}, host='127.0.0.1').url(), flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        assert httpx.get(f"{address}/health").status_code == 200
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{address}/health", timeout=1)
        except httpx.TransportError:
            return
        time.sleep(0.1)
    pytest.fail("the server is still there")


@pytest.mark.parametrize(
    ("command", "seconds", "told"),
    [(f"{sys.executable} -c 'raise SystemExit(7)'", 30.0, "ended with 7"), ("sleep 100", 1.0, "did not answer within 1 s")],
)
def test_a_server_that_does_not_come_up_is_one_line(tmp_path, command, seconds, told):
    with pytest.raises(UserError, match=f"{told}.*log"):
        Server(command, "", str(tmp_path / "log"), host="127.0.0.1", seconds=seconds).url()


def test_replicas_that_no_one_started_and_bad_numbers_are_one_line(monkeypatch):
    def unknown(name: str) -> None:
        raise ValueError(name)

    for ray in (
        None,
        SimpleNamespace(is_initialized=lambda: False),
        SimpleNamespace(is_initialized=lambda: True, get_actor=unknown),
    ):
        monkeypatch.setitem(sys.modules, "ray", ray)
        with pytest.raises(UserError, match="--launcher ray"):
            urls("ray:2")
    for wrong in ("ray:", "ray:0", "ray:two"):
        with pytest.raises(UserError, match="ray:N"):
            urls(wrong)
    assert urls("http://a, http://b") == ["http://a", "http://b"]


@needs_ray
def test_a_run_over_a_replica_equals_one_over_a_server_also_when_the_replica_dies(
    base_folder, reasoner, tmp_path, monkeypatch
):  # fmt: skip
    """Its server is killed in the middle of the run: Ray starts the worker again, and that the server, with the weights of the
    checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deadly.py").write_text(
        "import pathlib, subprocess\n"
        "def share(episode):\n"
        "    return sum(episode.token_ids) % 7 / 7\n"
        "def die_once(episode):\n"
        "    flag, begun = pathlib.Path('died'), pathlib.Path('there/checkpoints/step-000002')\n"
        "    if begun.is_dir() and not flag.exists():\n"
        "        flag.touch()\n"
        f"        subprocess.run(['pkill', '-9', '-f', '^[^ ]*python[^ ]* [^ ]*served_standin.py {tmp_path}'], check=True)\n"
        "    return 0.0\n"
    )

    def config(out: str, *more: str) -> rsim.Config:
        return load_config("nano", [
            f'out="{out}"', f'models.reasoner="{base_folder}"', f'models.planner="{base_folder}"', "cold_start.episodes=0",
            'rollout.engine="vllm"', "train.questions=2", "train.group=4", "train.eval_every=4", "checkpoint.save_every=1",
            "train.trackers=[]", "train.steps=4", "rollout.max_steps=3", "rollout.step_tokens=10", "rollout.max_tokens=64",
            "rollout.answer_tokens=6", "data.eval_size=4", "train.reasoner_lr=3e-3", "models.dtype=float64",
            'rewards.custom=["deadly.py:share", "deadly.py:die_once"]', *more,
        ])  # fmt: skip

    there = config("there", 'rollout.vllm_url="ray:1"', f"rollout.vllm_command={json.dumps(STANDIN)}")
    (tmp_path / "there.toml").write_text(to_toml(there))
    command = [sys.executable, "-m", "rsim", "train", "there.toml", "--launcher", "ray", "--json"]
    environment = os.environ | {"RAY_worker_niceness": "0"}  # on a busy machine Ray's own 15 means minutes
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert (tmp_path / "there" / "replicas" / "model-0.log").read_text().count("a stand-in for vLLM") == 2
    assert not (tmp_path / "there" / "replicas" / "model").exists()
    server = StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer)
    monkeypatch.setattr("rsim.engine.vllm.VllmServer", partial(vllm.VllmServer, transport=server))
    rsim.train(config("alone"))
    alone, over = (list(records(tmp_path / name)) for name in ("alone", "there"))
    assert [r["step"] for r in alone] == [r["step"] for r in over]
    for one, other in zip(alone, over, strict=True):
        assert all(one[k] == pytest.approx(other[k], abs=1e-9, rel=1e-9) for k in one if k != "stage" and "second" not in k)
