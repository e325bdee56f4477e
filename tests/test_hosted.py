"""``rsim train --upstream``: a planner is trained for a reasoner behind a server that gives and takes text alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rsim.cli.main import main
from rsim.config import Config, load_config
from rsim.errors import UserError
from rsim.evaluation import upstream as played
from rsim.evaluation.loading import load_game
from rsim.policies.planner import Planner
from rsim.training import hosted
from rsim.training.trainer import Trainer
from serving import serving

STRATEGIES = """
[[strategy]]
name = "continuation"
prompts = ["Go on."]
repeat_free = true

[[strategy]]
name = "validation"
prompts = ["Check it."]

[[strategy]]
name = "termination"
prompts = ["Answer now."]
"""
HERE = ("accuracy", "planner/return", "length/sampled", "length/injected", "length/steps", "strategy/validation")


class Upstream:
    """Answers what was asked for where it was told to check first, else something else; ``breaks_at``: a request that it
    refuses, and all after it."""

    def __init__(self, breaks_at: int = 0, counts: bool = True) -> None:
        self.breaks_at, self.counts, self.requests, self.breaks_off = breaks_at, counts, 0, 0
        self.questions: list[str] = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", lambda: {"data": [{"id": "m"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests += 1
        if self.breaks_at and self.requests >= self.breaks_at:
            return JSONResponse({"error": {"message": "out of credit"}}, 402)
        said = [m["content"] for m in body["messages"]]
        tokens = sum(3 + len(text.split()) for text in said)
        if not body.get("stream"):
            return JSONResponse({"choices": [], "usage": {"prompt_tokens": tokens} if self.counts else None})
        if body["temperature"] > 0 and len(said) == 1:
            self.questions.append(said[0].split("\n\n")[0])
        asked_for = said[0].split("\n\n")[0].split()[-1]
        checked = any("Check it." in text for text in said)
        answer = f"\\boxed{{{asked_for if checked else 'no'}}}"
        words = (
            [answer]
            if "Answer now." in said[-1]
            else ["so ", "it ", "goes"]
            if body.get("stop")
            else ["so ", "it ", "goes\n\nand ", "on"]
        )
        pieces = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
        pieces.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.counts:
            pieces.append({"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": len(words)}})
        if self.breaks_off and "Answer now." in said[-1]:
            self.breaks_off -= 1
            pieces = [pieces[0], {"error": {"message": "lost"}}]
        lines = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
        return StreamingResponse(iter([lines + "data: [DONE]\n\n"]), media_type="text/event-stream")


@contextmanager
def upstream(**how: int) -> Iterator[tuple[Upstream, str]]:
    there = Upstream(**how)
    with serving(there.app) as url:
        yield there, url


@pytest.fixture
def settings(tmp_path) -> list[str]:
    """Of a run of two steps, but for the upstream."""
    lines = [json.dumps({"question": f"Say the number {n}", "answer": str(n)}) for n in range(10, 30)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines if split == "train" else lines[:4]) + "\n")
    (tmp_path / "strategies.toml").write_text(STRATEGIES)
    return [
        f'out="{tmp_path / "run"}"', f'data.train="{tmp_path / "train.jsonl"}"', f'data.eval="{tmp_path / "dev.jsonl"}"',
        'stages=[{name="planner",steps=2,train_reasoner=false}]', f'models.strategies="{tmp_path / "strategies.toml"}"',
        'models.planner="nano-s"', 'models.reasoner="no such model"', "models.device=cpu", "train.questions=2", "train.group=4",
        "train.planner_lr=3e-3", "train.eval_every=0", "train.trackers=[]", "rollout.max_steps=2", "rollout.step_tokens=8",
        "rollout.max_tokens=80", "rollout.answer_tokens=8", "data.eval_size=4", "upstream.mode=turn",
    ]  # fmt: skip


def config_of(settings: list[str], url: str, *more: str) -> Config:
    return load_config(None, [*settings, f'upstream.url="{url}"', *more])


def steps_of(config: Config) -> list[dict]:
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [r for line in lines if "planner/return" in (r := json.loads(line))]


def test_a_planner_learns_what_the_model_behind_the_server_needs(settings, tmp_path):
    with upstream() as (there, url):
        options = ("stages.0.steps=5", "train.planner_lr=1e-2", "train.group=8", "train.eval_every=5", "seed=3")
        config = config_of(settings, url, *options)
        result = Trainer(config).run()
    steps = steps_of(config)
    begun = json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (begun["eval/accuracy"], result["accuracy"]) == (0.0, 1.0)
    assert sum(r["accuracy"] for r in steps[-2:]) > sum(r["accuracy"] for r in steps[:2])
    assert steps[0]["planner/ratio"] == pytest.approx(1, abs=1e-4), "log-probs are those that the trainer finds"
    sampled = 3 * (steps[0]["length/steps"] - 1) + 1  # three words a step, and the answer
    assert steps[0]["length/sampled"] == sampled, "tokens are as the server counts them"
    assert steps[-1]["upstream/requests"] < there.requests, "the last evaluation comes after the last step"
    final = config.folder / "checkpoints" / "final"
    assert [p.name for p in sorted(final.iterdir())] == ["manifest.json", "planner", "step.txt"]
    planner = Planner.from_pretrained(final / "planner")
    assert planner.rules is not None
    assert planner.rules.max_steps == 2
    assert load_config(str(config.folder / "config.toml")).upstream.model == "m", "a run keeps to the model that was listed"
    with pytest.raises(UserError, match="the reasoner is behind http"):
        load_game(config, final, "", "", [])


def test_a_resumed_run_goes_on_with_its_questions_draws_and_requests(settings, tmp_path):
    with upstream() as (whole_there, url):
        whole = config_of(settings, url, f'out="{tmp_path / "whole"}"')
        Trainer(whole).run()
    with upstream() as (there, url):
        parts = config_of(settings, url, "checkpoint.save_every=1")
        trainer = Trainer(parts)
        trainer.on_metrics = lambda record: setattr(trainer, "stop_requested", True)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert there.requests == trainer.game.account["requests"] == steps_of(parts)[0]["upstream/requests"]
        resumed = Trainer(parts, resume=True)
        assert resumed.game.account == trainer.game.account
        resumed.run()
        assert there.requests == resumed.game.account["requests"]
    assert sorted(there.questions) == sorted(whole_there.questions)
    for a, b in zip(steps_of(whole), steps_of(parts), strict=True):
        assert [a[key] for key in HERE] == [b[key] for key in HERE]
        assert a["planner/grad_norm"] == pytest.approx(b["planner/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("late", [False, True])
def test_an_upstream_that_fails_stops_the_run_and_what_was_finished_is_kept(settings, late):
    """In the first step, or in the evaluation after the last one."""
    with upstream() as (there, url):
        config = config_of(settings, url)
        trainer = Trainer(config)
        assert there.requests == 0, "nothing is asked before it runs"

        def break_after(record: dict) -> None:
            there.breaks_at = there.requests + 2 if record["step"] == 2 else 0

        if late:
            trainer.on_metrics = break_after
        else:
            there.breaks_at = 15
        step = 2 if late else 0
        with pytest.raises(UserError, match=f"out of credit: step {step} is kept: go on with --resume"):
            trainer.run()
        assert not late or len(steps_of(config)) == 2
        state = torch.load(config.folder / "checkpoints" / f"step-00000{step}" / "state.pt", weights_only=True)
        assert state["account"]["requests"] >= there.requests >= there.breaks_at, "refused requests are counted"
        there.breaks_at = 0
        result = Trainer(config, resume=True).run()
    assert result["questions"] == 4, "the evaluation that it owes is made up for"
    assert [r["step"] for r in steps_of(config)] == [1, 2]


def test_an_answer_that_breaks_off_is_asked_for_again(settings, monkeypatch):
    monkeypatch.setattr(played, "_PATIENCE", 0.1)
    with upstream() as (there, url):
        config = config_of(settings, url)
        there.breaks_off = 3
        Trainer(config).run()
    assert there.breaks_off == 0
    assert all(r["accuracy"] > 0 for r in steps_of(config))


def test_a_limit_of_requests_holds_over_resumes(settings):
    with upstream() as (there, url):
        config = config_of(settings, url, "stages.0.steps=50", "upstream.max_requests=60")
        for resume in (False, True):
            trainer = Trainer(config, resume=resume)
            with pytest.raises(UserError, match=r"max_requests = 60 are sent: step \d is kept"):
                trainer.run()
            assert there.requests <= trainer.game.account["requests"] == 60, "some were given up before they were sent"
        kept, first = len(steps_of(config)), there.requests
        assert kept >= 1
        more = replace(config, upstream=replace(config.upstream, max_requests=90))
        with pytest.raises(UserError, match="max_requests = 90 are sent"):
            Trainer(more, resume=True).run()
        assert first < there.requests <= 90
        assert len(steps_of(config)) > kept
        unlimited = replace(config, upstream=replace(config.upstream, max_requests=0))
        with pytest.raises(UserError, match="90 -> 0"):
            Trainer(unlimited, resume=True)


def test_an_upstream_that_counts_nothing_is_played_by_estimate(settings, tmp_path):
    with upstream(counts=False) as (there, url):
        Trainer(config_of(settings, url)).run()
        assert there.questions
        with pytest.raises(UserError, match="counts no prompt tokens"):
            Trainer(config_of(settings, url, "upstream.mode=", f'out="{tmp_path / "probed"}"')).run()


def test_the_command_tells_the_cost_before_it_begins(settings, capsys, tmp_path):
    def run(*more: str) -> tuple[int, str, str]:
        (tmp_path / "own.toml").write_text("")
        with pytest.raises(SystemExit) as caught:
            main(["train", str(tmp_path / "own.toml"), *(part for s in settings for part in ("--set", s)), *more])
        out = capsys.readouterr()
        return int(caught.value.code or 0), out.out, out.err

    with upstream() as (there, url):
        code, out, _ = run("--upstream", url, "--dry-run", "--json", "--price-in", "2", "--price-out", "10")
        told = json.loads(out)
        assert (code, there.requests, told["model"], told["first_question_tokens"]) == (0, 1, "m", 7)
        episodes = 2 * 2 * 4 + 4
        assert told["sampled_tokens"] == episodes * 80
        assert told["dollars"] == pytest.approx((told["prompt_tokens"] * 2 + told["sampled_tokens"] * 10) / 1e6)
        code, _, err = run("--upstream", url, "--max-requests", "1000")
        assert code == 0
        assert "at most" in err.splitlines()[0]
        assert "stops at 1,000 requests" in err.splitlines()[0]
        assert there.requests - 1 <= told["requests"]
        there.breaks_at = 1
        for more in ("--dry-run", "--quiet"):
            code, _, err = run("--upstream", url, "--out", str(tmp_path / "x"), more)
            assert code == 2
            assert "out of credit" in err.splitlines()[-1]
    assert run("--upstream-model", "m")[2].startswith("rsim: upstream: its settings are of a server")
    code, _, err = run("--upstream", url, "--dry-run", "--out", str(tmp_path / "y"))
    assert code == 2
    assert "cannot be listed" in err
    assert "leave the launcher out" in run("--upstream", url, "--launcher", "ray")[2]


@pytest.mark.parametrize(("setting", "message"), [
    ("rollout.engine=vllm", "rollout.engine = vllm"),
    ("rollout.engine=llama", "rollout.engine = llama"),
    ("cold_start.episodes=4", "cold_start.episodes = 4"),
    ("stages.planner.train_reasoner=true", "stages.planner.train_reasoner"),
    ("models.planner=none", "models.planner = none"),
    ("models.reasoner_lora=4", "models.reasoner_lora"),
    ("upstream.connections=0", "upstream.connections = 0"),
    ('upstream.url="localhost"', "upstream.url localhost"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, setting, message):
    with pytest.raises(UserError, match=message) as refused:
        config_of(settings, "http://127.0.0.1:9/v1", setting)
    assert refused.value.remedy


def test_questions_that_the_planner_cannot_read_are_not_paid_for(settings, tmp_path):
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "7 " * 1100, "answer": "7"}) + "\n")
    config = config_of(settings, "http://127.0.0.1:9/v1", "upstream.model=m")
    with pytest.raises(UserError, match=r"exceeds the planner's context of 1024.*data.max_question_tokens"):
        Trainer(config)
    shorter = config_of(settings, "http://127.0.0.1:9/v1", "upstream.model=m", "data.max_question_tokens=900")
    assert Trainer(shorter).left_out == 1


def test_estimates_count_what_is_left(settings):
    config = config_of(settings, "http://127.0.0.1:9/v1", "train.eval_every=1")
    trainer_has = hosted.load_questions(config)
    strategies = hosted.load_strategies(config.models.strategies)
    begun, half, done = (hosted.most(config, strategies, *trainer_has, step=step) for step in (0, 1, 2))
    assert begun.sampled_tokens == (16 + 3 * 4) * 80
    assert half.sampled_tokens == (8 + 4) * 80
    assert done.sampled_tokens == 0
    assert hosted.most(config, strategies, *trainer_has, step=2, unevaluated=True).sampled_tokens == 4 * 80
    assert Path(config.models.strategies).is_file()
