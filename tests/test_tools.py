"""Tools: programs in the sandbox, the calculator, and steps that act on real engines and upstreams."""

from __future__ import annotations

import asyncio
import copy
import json
import operator
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import standin_llama
from rsim.config import RewardsConfig
from rsim.engine import llama, native, vllm
from rsim.errors import UserError
from rsim.game.calculator import corrections
from rsim.game.problem import Problem
from rsim.game.record import episode_json
from rsim.game.rollout import Game
from rsim.game.tools import Tools
from rsim.policies.loading import load_planner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import StrategySet, load_strategies
from rsim.rewards import programs
from rsim.rewards.programs import run_program, runner_for
from rsim.rewards.rewards import score
from rsim.rewards.sandbox import sandbox_works
from rsim.rules import PlayRules
from rsim.rules_file import RULE_FIELDS
from rsim.serving.http_upstream import HttpUpstream
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, Finished, TextDelta, play
from rsim.serving.server import create_app
from rsim.serving.state import ServeConfig
from rsim.serving.wrap import wrap
from rsim.training.batch import reasoner_batch
from rsim.training.cold_start import _with_prompts_learned
from rsim.training.trainer import Trainer
from serving import serving
from standin_vllm import StandIn
from tiny import RULES, metrics_of

needs_sandbox = pytest.mark.skipif(not sandbox_works(), reason="this kernel allows no user namespaces")
ACTING, ARMS = load_strategies("acting"), load_strategies("arms")
LONG = replace(RULES, step_tokens=40, max_tokens=400, tool_tokens=60, answer_tokens=20, delimiter="\n\n", paraphrase="first")
FRAME = "\n```output\n{}\n```\n"


# --- programs ---


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("print(6 * 7)", "42"),
        ("print(1)\nprint(x)", "1\nNameError: name 'x' is not defined"),
        ("def f(:\n", "SyntaxError: invalid syntax (program, line 1)"),
        ("", ""),
        ("x = 1", ""),
        ("print('a')\nraise SystemExit(3)", "a"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("assert 1 == 2", "AssertionError"),
        ("input()", "EOFError: EOF when reading a line"),
        ("print('é' * 3, end='')", "ééé"),
        ("import os; os._exit(7)", "the program was ended (status 7)"),
        ("print(open('/etc/passwd').read())", "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 1)", "PermissionError: [Errno 1] Operation not permitted"),
        ("x = [0] * 10**11", "MemoryError"),
        ("if __name__ == '__main__': print('main')", "main"),
        ("\ud800", "SyntaxError: not a text"),
    ],
)
def test_what_a_program_printed(program, printed):
    assert run_program(program) == printed


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import threading\nthreading.Thread(target=lambda: exec('while 1: 0')).start()",
    ],
)
def test_a_program_that_does_not_end_is_stopped(program):
    began = time.perf_counter()
    assert run_program("print('so far')\n" + program, 1.0) == "so far\nTimeoutError: stopped after 1 s"
    assert time.perf_counter() - began < 20


@needs_sandbox
def test_a_program_that_prints_without_end_is_cut():
    printed = run_program("while True: print('x' * 99)", 10.0)
    assert 1 << 16 <= len(printed) <= 1 << 18
    assert set(printed) == {"x", "\n"}


def test_without_a_sandbox_programs_are_refused(monkeypatch):
    monkeypatch.setattr(programs, "sandbox_works", lambda: False)
    with pytest.raises(UserError, match="cannot be sandboxed") as refused:
        runner_for(random_planner(ACTING), RewardsConfig())
    assert "rewards.unsafe_code" in str(refused.value)
    assert runner_for(random_planner(load_strategies("instruct")), RewardsConfig()) is None
    assert runner_for(None, RewardsConfig()) is None
    runner = runner_for(random_planner(ACTING), RewardsConfig(unsafe_code=True))
    assert runner is not None
    assert runner("print(6 * 7)", 10.0) == "42"
    assert runner("print(1)\nwhile 1: 0", 1.0) == "1\nTimeoutError: stopped after 1 s"


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("7", "7"),
        ("", "(it printed nothing)"),
        ("\n\n7\n\n", "7"),
        ("```\n\\boxed{7}", "'''\n\\boxed{7}"),
        ("x" * 20, "x" * 20),
        ("x" * 21, "x" * 20 + " ..."),
        ("x" * 10**6, "x" * 20 + " ..."),
    ],
)
def test_outputs_are_framed_and_cut(printed, expected):
    tools = Tools(lambda program, seconds: printed, PlayRules(tool_chars=20), len)
    assert tools.start("", "print()\n```").result() == FRAME.format(expected)
    assert tools.start("", "print()\n```\n").result() == FRAME.format(expected).removeprefix("\n"), "a token may end behind it"


@given(st.text(max_size=300), st.integers(1, 80), st.integers(1, 100))
def test_outputs_never_take_more_than_they_may(printed, tokens, chars):
    tools = Tools(lambda program, seconds: printed, PlayRules(tool_chars=chars, tool_tokens=tokens), len)
    assert len(tools.start("", "```").result()) <= tokens
    assert len(tools.recalculate("1+1 = 3 and " * 20 + printed)) <= tokens
    assert len(tools.recalculate("no sums" + "." * tokens)) <= tokens, "the budget keeps no more than this for it"


# --- the calculator ---


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SIGNS = {"+": "+", "-": "-−", "*": "*×", "/": "/÷"}
NUMBERS = st.integers(0, 10**7)


@given(NUMBERS, st.sampled_from("+-*/"), NUMBERS, st.integers(-3, 3), st.booleans(), st.booleans(), st.data())
def test_every_calculation_is_recomputed_exactly(a, sign, b, off, spaced, commas, data):
    if sign == "/" and (b == 0 or a % b):
        a, b = a * (b or 1), b or 1
    result = int(OPERATORS[sign](Fraction(a), b)) + off
    form = "{:,}" if commas else "{}"
    middle = data.draw(st.sampled_from(SIGNS[sign]))
    gap = " " if spaced else ""
    text = f"So {form.format(a)}{gap}{middle}{gap}{form.format(b)}{gap}={gap}{form.format(result)}."
    found = corrections(text)
    assert found is not None
    assert bool(found) == (off != 0)
    if off:
        assert found[0].endswith(f"{result - off}, not {form.format(result)}.")


@given(st.text(alphabet="0123456789+-*/=., ()x$\\^\n%", max_size=60))
def test_no_text_breaks_the_calculator(text):
    for sentence in corrections(text) or []:
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("x + 3*4 = 5", None),
        ("2^3 * 4 = 32", None),
        ("(3+4)*2 = 15", None),
        ("1 1/2 + 2 = 3.5", None),
        ("4 apples * 3 = 12", None),
        ("50% * 20 = 9", None),
        ("3:30 + 2 = 5", None),
        ("5/0 = 1", None),
        ("2*3 = 5x", None),
        ("x -3 + 5 = 3", None),
        ("12*13 = 156 apples", []),
        ("10/3 = 3.33", []),
        ("3 + 4 + 5 = 12", []),
        ("2*6 = 3*4 = 12", []),
        ("-3 + 5 = 2, 2 - 7 = -5", []),
        ("10/3 = 3.34", ["10/3 = 3.3333..., not 3.34."]),
        ("1/8 = 0.13, 1/8 = 0.12", []),  # rounded either way
        ("10/4 = 2", ["10/4 = 2.5, not 2."]),
        ("x = 3*4 = 13", ["3*4 = 12, not 13."]),
        ("\\(12 \\times 13 = 146\\)", ["12 * 13 = 156, not 146."]),
        ("(12*13 = 146)", ["12*13 = 156, not 146."]),
        ("$1,204 × 3 = $3,613", ["$1,204 * 3 = 3612, not $3,613."]),
        ("- 2*2 = 5\n* 3+3=7", ["2*2 = 4, not 5.", "3+3 = 6, not 7."]),
        ("3*4 = 5*2", ["3*4 = 12, but 5*2 = 10."]),
    ],
)
def test_what_the_calculator_reads(text, wrong):
    assert corrections(text) == wrong


# --- in the game ---


class Talker:
    """Stands for a language model over a tokenizer: behind a known ending of the text it says its line, then another blank line."""

    def __init__(self, tokenizer, lines: dict[str, str]) -> None:
        self.tokenizer, self.lines = tokenizer, lines
        self.config = types.SimpleNamespace(vocab_size=len(tokenizer))

    def next(self, ids: list[int]) -> int:
        text = self.tokenizer.decode(ids)
        heard, at = max(((h, text.rfind(h)) for h in self.lines), key=lambda found: found[1] + len(found[0]) * (found[1] >= 0))
        said = text[at + len(heard) :] if at >= 0 else ""
        line = self.lines[heard] if at >= 0 else ""
        rest = line[len(said) :] if line.startswith(said) else ""
        return self.tokenizer.encode(rest or "\n\n", add_special_tokens=False)[0]

    def __call__(self, ids: torch.Tensor):
        logits = torch.zeros(1, ids.shape[1], len(self.tokenizer))
        logits[0, -1, self.next(ids[0].tolist())] = 50.0
        return type("Output", (), {"logits": logits})()


LINES = {
    "```python\n": "print(6*7)\n```",
    "```output\n42\n```\n": "so 6*7 = 43.\n\n",
    "not 43.\n": "oh, 42.\n\n",
    "\\boxed{": "42}.\n\n",
}


@pytest.fixture
def talker(reasoner, monkeypatch):
    """The native engine samples what the talker says: one sequence at a time, whose ids are followed."""
    talking = Talker(reasoner.tokenizer, LINES)
    read: dict[int, list[int]] = {}
    start, submit = native.NativeEngine.start, native.NativeEngine.submit

    def started(engine, slots, prompts, *how, **settings):
        read[0] = list(prompts[0])
        return start(engine, slots, prompts, *how, **settings)

    def submitted(engine, slot, injected, *how, **settings):
        read[0] += injected
        return submit(engine, slot, injected, *how, **settings)

    def chosen(logits, temperature, uniforms):
        read[0].append(talking.next(read[0]))
        return torch.tensor([read[0][-1]]), torch.zeros(1)

    monkeypatch.setattr(native.NativeEngine, "start", started)
    monkeypatch.setattr(native.NativeEngine, "submit", submitted)
    monkeypatch.setattr(native, "choose", chosen)
    return talking


def acted(reasoner, rules=LONG, runner=run_program, names=("computation", "recalculation", "termination")):
    planner = sequence_planner(ARMS, list(names))
    (episode,) = Game(reasoner, planner, replace(rules, batch=1), runner).play([Problem("6*7=?", "42")], seed=0, greedy=True)
    return episode


@needs_sandbox
def test_a_step_that_acts_and_what_is_recorded(reasoner, talker):
    """The fence is three tokens of the lab's tokenizer; the program ends with the last of them."""
    episode = acted(reasoner)
    program, check, final = episode.steps
    decode = reasoner.tokenizer.decode
    mask, ids = episode.reasoner_mask, episode.token_ids
    assert program.output == FRAME.format(42)
    assert program.text == "print(6*7)\n```so 6*7 = 43.\n\n"
    assert program.read == "print(6*7)\n```" + FRAME.format(42) + "so 6*7 = 43.\n\n"
    assert decode(ids[program.body : program.end]) == program.read
    assert decode(ids[program.start : program.body]).endswith("```python\n")
    assert check.output == " 6*7 = 42, not 43.\n"
    assert decode(ids[check.start : check.body]) == ARMS[ARMS.index("recalculation")].prompts[0] + check.output
    assert (check.text, check.answer, final.answer) == ("oh, 42.\n\n", "oh, 42.\n\n", "\\boxed{42}.\n\n")
    assert program.answer == "so 6*7 = 43.\n\n", "the program is no part of an answer"
    sampled = [decode([t for t, m in zip(ids[s.body : s.end], mask[s.body : s.end], strict=True) if m]) for s in episode.steps]
    assert sampled == [s.text for s in episode.steps]
    assert sum(mask) == episode.sampled_tokens == sum(len(reasoner.injected_ids(s.text)) for s in episode.steps)
    shown = episode_json(episode, ARMS.names)["steps"]
    assert [s.get("output") for s in shown] == [program.output, check.output, None]
    assert shown[0]["text"] == program.read
    assert shown[0]["prompt"] == decode(ids[program.start : program.body])
    assert shown[1]["prompt"] + check.output == decode(ids[check.start : check.body])
    assert shown[2]["prompt"] + "\\boxed{" == decode(ids[final.start : final.body]), "the box is in the step's text"
    assert score(episode, ARMS, RewardsConfig()).correct


@needs_sandbox
def test_the_same_on_servers_and_for_a_planner_with_a_model(reasoner, talker, base_folder, monkeypatch):
    here = acted(reasoner)
    server = StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer)
    server.model = Talker(reasoner.tokenizer, LINES)
    monkeypatch.setattr("rsim.engine.vllm.VllmServer", partial(vllm.VllmServer, transport=server))
    cpp = standin_llama.StandIn(server.model, reasoner.tokenizer, eog=reasoner.end_ids)
    monkeypatch.setattr("rsim.engine.llama.LlamaServer", partial(llama.LlamaServer, transport=cpp))
    for engine in ("vllm", "llama"):
        there = acted(reasoner, replace(LONG, engine=engine))
        assert (there.token_ids, there.reasoner_mask, there.steps) == (here.token_ids, here.reasoner_mask, here.steps)
    planner = load_planner(str(base_folder), ARMS, device="cpu", dtype="float32", seed=0)
    with torch.no_grad():
        planner.model.score.weight.zero_()
    monkeypatch.setattr("rsim.policies.planner.choose", _always(ARMS.index("computation")))
    (episode,) = Game(reasoner, planner, replace(LONG, batch=1, max_steps=2), run_program).play(
        [Problem("6*7=?", "42")], seed=0, greedy=True
    )
    read = planner.tokenizer.decode(episode.planner_ids)
    assert " computation\n" + here.steps[0].read + "\nNext strategy:" in read


def _always(action: int):
    def choose(logits, temperature, uniforms):
        return torch.full((len(logits),), action), torch.zeros(len(logits))

    return choose


@needs_sandbox
def test_a_wrapped_and_a_served_model_act_as_the_game_does(reasoner, talker):
    episode = acted(reasoner)
    expected = reasoner.tokenizer.decode(episode.token_ids[episode.prompt_length :])
    planner = sequence_planner(ARMS, ["computation", "recalculation", "termination"])
    rules = PlayRules(**{name: getattr(LONG, name) for name in RULE_FIELDS})
    outputs = [step.output for step in episode.steps]
    with wrap(planner, reasoner.model, reasoner.tokenizer, rules=rules, slots=1, tools=("python",)) as planned:
        answer = planned.generate("6*7=?")
        assert answer.text == expected
        assert [step.get("output", "") for step in answer.steps] == outputs
        assert [step["text"] for step in answer.steps] == [step.text for step in episode.steps]
    config = ServeConfig(rules=rules, slots=1, tools=("python",))
    with serving(create_app(config, planner, reasoner, name="tiny")) as url:
        body = {"model": "tiny-rsim", "temperature": 0, "messages": [{"role": "user", "content": "6*7=?"}]}
        reply = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["message"]["content"] == expected
        assert [step.get("output", "") for step in reply["rsim"]["choices"][0]["steps"]] == outputs
        streamed = httpx.post(f"{url}/chat/completions", json=body | {"stream": True, "stop": ["42\n"]}, timeout=60).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected, (
            "an output is no place to stop at"
        )
        assert [c["rsim"]["output"] for c in chunks if "output" in c.get("rsim", {})] == outputs[:2]


@needs_sandbox
def test_an_output_is_no_answer(reasoner, talker, monkeypatch):
    """A program prints a box, or holds one: nothing is answered until the reasoner boxes it."""
    monkeypatch.delitem(talker.lines, "\\boxed{")
    monkeypatch.setitem(talker.lines, "```python\n", "print('\\\\boxed{42}')\n```")
    monkeypatch.setitem(talker.lines, "```output\n\\boxed{42}\n```\n", "done" + reasoner.tokenizer.eos_token)
    episode = acted(reasoner)
    assert episode.reasoner_ended
    assert "\\boxed{42}" in episode.steps[0].output
    scored = score(episode, ARMS, RewardsConfig())
    assert (scored.predicted, scored.correct) == (None, False)
    monkeypatch.setitem(talker.lines, "```output\n\\boxed{42}\n```\n", "so \\boxed{42}" + reasoner.tokenizer.eos_token)
    assert score(acted(reasoner), ARMS, RewardsConfig()).correct


@pytest.mark.parametrize("printed", ["x" * 10**5, "", "1\n" * 500])
def test_the_budget_holds_whatever_is_printed(reasoner, talker, printed):
    rules = replace(LONG, max_tokens=320, max_steps=8)
    episode = acted(reasoner, rules, lambda program, seconds: printed, ("computation",))
    assert episode.sampled_tokens + episode.injected_tokens <= 320
    assert episode.forced
    outputs = [s.output for s in episode.steps if s.output]
    assert outputs
    assert all(len(reasoner.injected_ids(output)) <= rules.tool_tokens for output in outputs)


@needs_sandbox
def test_outputs_have_exactly_zero_gradient(reasoner, talker):
    episode = acted(reasoner)
    batch = reasoner_batch([episode], torch.device("cpu"))
    hidden = reasoner.model.base_model(input_ids=batch.ids).last_hidden_state
    logits = reasoner.logits(hidden)
    logits.retain_grad()
    picked = torch.log_softmax(logits[0, batch.positions[0]], -1).gather(-1, batch.actions[0][:, None])[:, 0]
    (picked * batch.mask[0] * torch.linspace(0.5, 1.5, len(picked))).sum().backward()
    moved = {t + 1 for t in range(batch.ids.shape[1]) if bool((logits.grad[0, t] != 0).any())}
    assert moved == {t for t, m in enumerate(episode.reasoner_mask) if m}
    step = episode.steps[0]
    output = range(step.body, step.end)
    assert {t for t in output if t not in moved}, "an output lies in the step"


@needs_sandbox
def test_outputs_are_not_taught_with_the_prompts(reasoner, talker):
    episode = acted(reasoner)
    learned = _with_prompts_learned(episode, reasoner)
    left_out = [t for t in range(episode.prompt_length, len(learned.token_ids)) if not learned.reasoner_mask[t]]
    outputs = "".join(step.output for step in episode.steps)
    assert reasoner.tokenizer.decode([learned.token_ids[t] for t in left_out]) == outputs


def test_programs_run_beside_each_other_while_others_sample(reasoner, monkeypatch):
    """Random models write no fence, so one is what any token is: every step of *computation* runs something."""
    running, most, lock = 0, 0, threading.Lock()

    def slow(program: str, seconds: float) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return str(len(program))

    monkeypatch.setattr("rsim.engine.sampling.StringStop.ended", lambda stop, tokens: len(tokens) == 3)
    monkeypatch.setattr("rsim.game.tools._threads", ThreadPoolExecutor(4))
    problems = [Problem(q, "1") for q in ("4*17+38=?", "7=?", "x-38=4*17, x=?", "12+13=?")]
    rules = replace(LONG, step_tokens=12, max_steps=3, delimiter="\n")
    played = []
    for batch in (64, 3):
        game = Game(reasoner, sequence_planner(ARMS, ["computation"]), replace(rules, batch=batch), slow)
        played.append(game.play(problems, seed=3, group_size=4))
    assert [e.token_ids for e in played[0]] == [e.token_ids for e in played[1]]
    assert sum(bool(s.output and s.before) for e in played[0] for s in e.steps) > 3
    assert most > 1


@needs_sandbox
def test_training_with_the_acting_set(small, monkeypatch):
    """Two steps of training on tiny models; a fence is any third token, so programs (of noise) are run."""
    monkeypatch.setattr("rsim.engine.sampling.StringStop.ended", lambda stop, tokens: len(tokens) == 3)
    config = small("acting", "models.strategies=acting", "rollout.max_tokens=400", "rollout.tool_tokens=40", "rollout.tool_chars=30",
                   "stages.stage1.steps=1", "stages.stage2.steps=1", "train.questions=2", "data.eval_size=2")  # fmt: skip
    Trainer(config).run()
    metrics = metrics_of(config)
    assert len([m for m in metrics if "reward/accuracy" in m]) == 2
    lines = [json.loads(line) for file in config.folder.glob("**/*.jsonl") for line in file.read_text().splitlines()]
    steps = [step for line in lines for step in line.get("steps", []) if isinstance(line.get("steps"), list)]
    outputs = [step["output"] for step in steps if step.get("output")]
    assert outputs, "the samples of the run show outputs"
    assert all("output" in output for output in outputs)
    assert "tool_tokens = 40" in next(config.folder.glob("checkpoints/*/planner/rules.toml")).read_text()


def test_who_may_run_programs(reasoner, lab_strategies):
    """Nobody who was not allowed to: one error that names the strategy and the remedy."""
    acting = random_planner(ACTING)
    calculating = random_planner(StrategySet((*load_strategies("instruct").strategies, ARMS[ARMS.index("recalculation")])))
    rules = replace(LONG, max_tokens=400)
    with pytest.raises(UserError, match="'computation' runs programs"):
        Game(reasoner, acting, rules)
    with pytest.raises(UserError, match="'computation' runs programs") as refused:
        create_app(ServeConfig(), acting, reasoner)
    assert "--tools python" in str(refused.value)
    with pytest.raises(UserError, match="'computation' runs programs"):
        wrap(acting, reasoner.model, reasoner.tokenizer)
    with pytest.raises(UserError, match="--tools bash"):
        create_app(ServeConfig(tools=("bash",)), acting, reasoner)
    Game(reasoner, calculating, rules)
    create_app(ServeConfig(), calculating, reasoner)
    create_app(ServeConfig(), random_planner(lab_strategies), reasoner)
    if sandbox_works():
        create_app(ServeConfig(tools=("python",)), acting, reasoner)
    with pytest.raises(UserError, match=r"tool_tokens = 200.*take over"):
        Game(reasoner, acting, replace(rules, max_tokens=300, tool_tokens=200), run_program)


# --- behind text-only chats ---


def chat(replies: list[str], requests: list[dict]) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        requests.append(body)
        text = replies[len(requests) - 1]
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": max(1, len(text) // 4)}
        lines = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        return httpx.Response(200, text="".join(f"data: {json.dumps(x)}\n\n" for x in lines) + "data: [DONE]\n\n")

    return httpx.MockTransport(answer)


def chatted(mode: str, replies: list[str], names: list[str]):
    """What is sent and what comes back when strategies ``names`` are played over a chat endpoint; programs are echoed."""
    requests: list[dict] = []

    async def run():
        batcher = PlannerBatcher(sequence_planner(ARMS, names), 1)
        worker = asyncio.create_task(batcher.run())
        async with httpx.AsyncClient(base_url="http://upstream/v1/", transport=chat(replies, requests)) as client:
            upstream = HttpUpstream(client, mode)  # type: ignore[arg-type]
            asked = Asked("m", [{"role": "user", "content": "6*7=?"}], None, {"temperature": 0.0})
            rules = PlayRules(paraphrase="first", max_steps=4)
            events = [e async for e in play(asked, batcher, upstream, rules, 1024, None, lambda program, seconds: program)]
        worker.cancel()
        return events

    return asyncio.run(run()), requests


def test_prefill_stops_at_the_fence_and_goes_on_behind_the_output():
    names = ["computation", "recalculation", "termination"]
    events, requests = chatted("prefill", ["6*7\n```\nas", "6*7 = 43.\n\nNow", "Right.\n\n", "42}.\n\n"], names)
    said = [r["messages"][-1]["content"] for r in requests]
    assert said[0] == ACTING[ACTING.index("computation")].prompts[0]
    assert said[1] == said[0] + "6*7\n```" + FRAME.format("6*7")
    assert said[2] == said[1] + "6*7 = 43.\n\n" + ARMS[ARMS.index("recalculation")].prompts[0] + " 6*7 = 42, not 43.\n"
    assert [e.text for e in events if isinstance(e, TextDelta) and e.output] == [FRAME.format("6*7"), " 6*7 = 42, not 43.\n"]
    assert events[-1].ending.terminated


def test_in_turns_the_output_is_in_the_next_message():
    replies = ["Sure:\n```python\n6*7\n\n8\n```\nThat is it.", "The answer is 42.\n\n", "\\boxed{42}"]
    events, requests = chatted("turn", replies, ["computation", "deliberation", "termination"])
    question, answer, after = requests[1]["messages"]
    assert question["content"].endswith("prints what is needed:")
    assert answer == {"role": "assistant", "content": replies[0]}
    assert after["role"] == "user"
    assert after["content"].startswith(FRAME.format("6*7\n\n8").strip())
    assert after["content"].endswith(ARMS[ARMS.index("deliberation")].prompts[0])
    assert isinstance(events[-1], Finished)
    assert events[-1].ending.terminated


def test_in_turns_a_message_without_a_program_ends_the_answer():
    events, requests = chatted("turn", ["It is \\boxed{42}."], ["computation", "termination"])
    assert len(requests) == 1
    assert events[-1].ending.reasoner_ended
    assert not any(isinstance(e, TextDelta) and e.output for e in events)
