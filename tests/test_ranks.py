"""Several processes train as one does: same metrics, same weights, whatever the number of ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rsim
from forked import Forked
from rsim.config import Config, ParallelConfig, load_config, to_toml
from rsim.distributed.deepspeed import read_settings
from rsim.distributed.world import World, join
from rsim.errors import UserError
from rsim.training import trainer as module
from rsim.training.trainer import Trainer
from tiny import full, metrics_of, stopped_after

CLOSE = 1e-9  # what is left of differences in the order of sums, in float64, after a run of tests


def processes(command: list[str] | str, count: int) -> list[Forked]:
    """The command in ``count`` processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        started.append(Forked(command, os.environ | environment))
    return started


def written(config: Config) -> str:
    """The config's file, beside its run folder."""
    file = config.folder.with_suffix(".toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_toml(config))
    return str(file)


def start(config: Config, count: int, *more: str) -> list[Forked]:
    return processes(["train", written(config), "--json", *more], count)


def end_of(started: list[Forked]) -> list[tuple[str, str]]:
    """What each process wrote to stdout and stderr; all of them end well."""
    try:
        said = [process.communicate(timeout=280) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), said
    return said


def launch(config: Config, count: int, *more: str) -> None:
    """``rsim train`` in ``count`` processes, to their end."""
    said = end_of(start(config, count, *more))
    assert [bool(out) for out, _ in said] == [True] + [False] * (count - 1), "one rank speaks"


def alike(one: dict, other: dict) -> bool:
    """Whether two steps' metrics differ in the order of sums alone, in float64."""
    return all(one[k] == pytest.approx(other[k], abs=CLOSE, rel=CLOSE) for k in one if k != "stage")


def assert_close(a: Config, b: Config) -> None:
    for one, other in zip(metrics_of(a), metrics_of(b), strict=True):
        assert one.keys() == other.keys()
        assert alike(one, other), (one, other)
    for agent in ("reasoner", "planner"):
        weights, others = (
            load_file(next((c.folder / "checkpoints" / "final" / agent).glob("*model.safetensors"))) for c in (a, b)
        )
        assert weights.keys() == others.keys()
        assert all((weights[k] - others[k]).abs().max() < CLOSE for k in weights)


ROUNDS = ("train.num_iterations=2", "train.minibatches=2", "objective.beta=0.05")
SINGLE = ("objective.loss=ppo", "train.micro_tokens=100000")  # micro-batches are bounded by the number of ranks alone
ADAPTERS = ("train.micro_tokens=150", "models.reasoner_lora=4", "models.planner_lora=2")
CASES = {
    2: [("train.micro_tokens=150",), SINGLE, (*ADAPTERS, "parallel.shard=true"),
        (*SINGLE, "parallel.shard=true", "train.gradient_checkpointing=true")],
    3: [ROUNDS, (*ROUNDS, "parallel.shard=true")],
}  # fmt: skip


def each(configs: list[Config]) -> str:
    """A program that trains them one after the other."""
    files = [written(config) for config in configs]
    return f"import rsim\nfrom rsim.config import load_config\nfor file in {files!r}: rsim.train(load_config(file))"


@pytest.mark.parametrize("count", CASES)
def test_ranks_train_as_one_process_does(small, count):
    """All cases in the same processes, one after the other."""
    together = [small(f"together-{i}", *case) for i, case in enumerate(CASES[count])]
    started = processes(each(together), count)
    alone = [small(f"alone-{i}", *(e for e in case if "shard" not in e)) for i, case in enumerate(CASES[count])]
    for config in alone:
        rsim.train(config)
    end_of(started)
    for one, other in zip(alone, together, strict=True):
        assert len(metrics_of(one)) > 4
        assert_close(one, other)


DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def deepspeed_config(tmp_path, stage, **more):
    file = tmp_path / f"zero-{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **more}}))
    return f"parallel.deepspeed={file}"


@DEEPSPEED
@pytest.mark.parametrize("case", [("train.micro_tokens=150",), SINGLE, ROUNDS, ADAPTERS])
def test_deepspeed_trains_as_one_process_does(small, tmp_path, case):
    together = [small(f"together-{stage}", *case, deepspeed_config(tmp_path, stage)) for stage in (1, 2)]
    started = processes(each(together), 2)
    alone = small("alone", *case)
    rsim.train(alone)
    end_of(started)
    for config in together:
        assert_close(alone, config)


@DEEPSPEED
def test_a_run_with_deepspeed_goes_on_where_it_was_with_as_many_processes(small, tmp_path):
    zero = (deepspeed_config(tmp_path, 2), "checkpoint.save_every=1")
    launch(small("whole", *zero), 2)
    launch(small("cut", *zero, "train.steps=2"), 2)
    launch(small("cut", *zero), 2, "--resume", "--force")
    assert_close(small("whole"), small("cut"))
    said = [p.communicate(timeout=280)[1] for p in start(small("cut", *zero, "train.steps=9"), 3, "--resume", "--force")]
    assert any("go on with 2 processes" in text for text in said), said


def test_deepspeeds_config_is_checked_before_anything_starts(tmp_path):
    file = tmp_path / "zero.json"
    for text, why in (('{"zero_optimization": {"stage": 3}}', "stage 3"), ("{", "Expecting"), ("{}", "zero_optimization"),
                      ('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}', "models.dtype")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            read_settings(str(file))
    with pytest.raises(UserError, match="No such file"):
        read_settings(str(tmp_path / "none.json"))
    file.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 64, "gradient_accumulation_steps": 4}')
    settings = read_settings(str(file))
    assert "train_batch_size" not in settings
    assert settings["gradient_accumulation_steps"] == 1


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(small):
    """Interrupted twice, each time another rank, then left alone."""
    extra = ["stages.stage1.steps=8", "stages.stage2.steps=4"]
    alone, together = small("alone", *extra), small("together", *extra)
    rsim.train(alone)
    for told, sent, code, more in ((0, signal.SIGTERM, 0, []), (1, signal.SIGINT, 130, ["--resume"])):
        started, metrics = start(together, 2, *more), together.folder / "metrics.jsonl"
        known = metrics.read_text().count("reward/accuracy") if more else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("reward/accuracy") > known):
            time.sleep(0.02)
        started[told].send_signal(sent)
        said = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [code] * 2, said
    assert len(metrics_of(together)) < len(metrics_of(alone)), "it was stopped before its end"
    launch(together, 2, "--resume")
    assert_close(alone, together)


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=DEEPSPEED), pytest.param(2, marks=DEEPSPEED)])
def test_a_cold_start_is_shared_too(tmp_path, zero):
    """nano-s itself: a model with random weights formats nothing."""
    changes = ["cold_start.episodes=48", "stages.stage1.steps=1", "stages.stage2.steps=1", "train.questions=4", "train.group=4",
               "data.eval_size=8", "data.train_size=64", "train.trackers=[]", "train.micro_tokens=900", "models.dtype=float64"]  # fmt: skip
    alone, together = (load_config("nano", [*changes, f"out={tmp_path / name}"]) for name in ("alone", "together"))
    rsim.train(alone)
    if zero:
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": zero}}))
        together = replace(together, parallel=ParallelConfig(deepspeed=str(tmp_path / "zero.json")))
    launch(together, 2)
    assert metrics_of(alone)[0]["cold_start/kept"] > 4
    assert_close(alone, together)


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_resume_what_one_process_began(small, sharded):
    """Checkpoints are whole, so that what is cut may change."""
    whole, parts = small("whole"), small("parts")
    rsim.train(whole)
    stopped_after(parts, 2)
    parts = replace(parts, parallel=ParallelConfig(shard=sharded))
    launch(parts, 2, "--resume", *(["--force"] if sharded else []))
    assert_close(whole, parts)
    lines = [json.loads(line)["step"] for line in (Path(parts.folder) / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'ray[train]'")
def test_two_workers_of_ray_train_as_one_process_does_also_when_one_dies(small, tmp_path):
    """The first attempt of one worker kills itself in the middle of the run; Ray starts both again."""
    alone, together = (
        small("alone"),
        small("together", "checkpoint.save_every=1", 'rewards.custom=["rewards.py:length", "deadly.py:die_once"]'),
    )
    (tmp_path / "deadly.py").write_text(
        "import os, pathlib, signal\n"
        "def die_once(episode):\n"
        "    flag, begun = pathlib.Path('died'), pathlib.Path('together/checkpoints/step-000002')\n"
        "    if os.environ.get('RANK') == '1' and begun.is_dir() and not flag.exists():\n"
        "        flag.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return 0.0\n"
    )
    rsim.train(alone)
    command = [sys.executable, "-m", "rsim", "train", "together.toml", "--launcher", "ray", "--workers", "2", "--json"]
    together = replace(together, out="together")
    (tmp_path / "together.toml").write_text(to_toml(together))
    environment = os.environ | {"RAY_worker_niceness": "0"}  # on a busy machine Ray's own 15 means minutes
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    together = replace(together, out=str(tmp_path / "together"))
    lines = [{k: v for k, v in r.items() if k != "reward/die_once"} for r in metrics_of(together)]
    assert [r["step"] for r in lines] == [r["step"] for r in metrics_of(alone)]
    assert json.loads(done.stdout.splitlines()[-1])["eval/accuracy"] == lines[-1]["eval/accuracy"]
    for one, other in zip(metrics_of(alone), lines, strict=True):
        assert alike(one, other), (one, other)


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=full)])
def test_a_rank_keeps_a_piece_of_every_layer(tmp_path, torchrun):
    """What each of two ranks holds of nano-s and of its moments outside rollouts."""
    program = (
        "import torch\n"
        "from rsim.policies.loading import load_reasoner\n"
        "from rsim.training.agent import Agent, AgentSettings\n"
        "from rsim.distributed.world import join\n"
        "from rsim.distributed.shards import unsharded\n"
        "world, r = join(cpu=True), load_reasoner('nano-s')\n"
        "total = sum(p.numel() for p in r.model.model.layers.parameters())\n"
        "settings = AgentSettings(temperature=1, learning_rate=1e-3, shard=True)\n"
        "agent = Agent('reasoner', r.model, r.logits, settings, world=world)\n"
        "def held(): return sum(getattr(p, '_local_tensor', p).numel() for p in r.model.model.layers.parameters())\n"
        "for p in agent.parameters: p.grad = torch.zeros_like(p)\n"
        "agent.step(0.0, 1.0)\n"
        "moments = [s['exp_avg'] for p, s in agent.optimizer.state.items()]\n"
        "with unsharded([agent.sharded]), torch.no_grad():\n"
        "    r.model.base_model(torch.tensor([[1, 2]]))\n"
        "    together = held()\n"
        "assert together == total and held() * 2 == total, (held(), together, total)\n"
        "cut = sum(m.to_local().numel() for m in moments if hasattr(m, 'to_local'))\n"
        "assert cut * 2 == total, (cut, total)\n"
    )
    if not torchrun:
        end_of(processes(program, 2))
        return
    (tmp_path / "pieces.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(tmp_path / "pieces.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_one_process_has_nothing_to_cut_for(small):
    with pytest.raises(UserError, match=r"parallel\.shard"):
        Trainer(small("run", "parallel.shard=true"))
    with pytest.raises(UserError, match=r"parallel\.deepspeed"):
        Trainer(small("run", 'parallel.deepspeed="zero.json"'))
    with pytest.raises(UserError, match="either DeepSpeed"):
        small("run", "parallel.shard=true", 'parallel.deepspeed="zero.json"')


def test_what_accelerate_is_told_and_rsim_does_not_do_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"parallel\.shard = true"):
        join(cpu=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"parallel\.deepspeed = FILE"):
        join(cpu=True)


def test_more_ranks_than_questions_are_refused(small, monkeypatch):
    monkeypatch.setattr(module, "join", lambda cpu: World(0, 5))
    with pytest.raises(UserError, match=r"train\.questions = 4"):
        Trainer(small("run"))


@pytest.mark.parametrize(("size", "count"), [(5, 2), (7, 3), (3, 3), (8, 1)])
def test_shares_and_blocks_cover_everything_once(size, count):
    worlds = [World(i, count) for i in range(count)]
    assert [i for r in worlds for i in r.block(size)] == list(range(size))
    assert sorted(x for r in worlds for x in r.share(list(range(size)))) == list(range(size))
