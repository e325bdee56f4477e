"""One rulebook: the same cases played by every player, and the rules that travel with a planner.

A case is a script: what the reasoner says in each step and how a step ends. The stand-ins below read it through the interfaces
of the real engines and upstreams: the rollout with a scripted engine (token ids), the plug-in's game with a scripted
conversation (exact), and with an HTTP upstream that takes text only. All must make the same moves.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import httpx
import pytest

from rsim.config import RolloutConfig
from rsim.engine.protocol import SampledStep
from rsim.errors import UserError
from rsim.game import rollout as rollout_module
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.game.rulebook import check_budget, rulebook_of
from rsim.policies.scripted import ScriptedPlanner, one_hot
from rsim.policies.strategies import Strategy, StrategySet
from rsim.rules import ALONE, Ending, Lengths, Move, PlayRules, Progress, Rulebook
from rsim.rules_file import from_toml, to_toml
from rsim.serving.http_upstream import HttpUpstream
from rsim.serving.planner_batcher import PlannerBatcher
from rsim.serving.play import Asked, Finished, Injected, StepEnd, TextDelta, Usage, play

THINK, FREE, NULL, END, RUN, CHECK = range(6)
STRATEGIES = StrategySet(
    (
        Strategy("think", "", ("[think]", "[ponder it]"), ()),
        Strategy("continuation", "", ("",), (), repeat_free=True),
        Strategy("alone", "", ("",), (), unlimited=True),
        Strategy("termination", "", ("[end]",), ()),
        Strategy("program", "", ("[run]```\n",), (), tool="python"),
        Strategy("calculator", "", ("[sums]",), (), tool="calculator"),
    )
)
WITHOUT_TOOLS = StrategySet(STRATEGIES.strategies[:RUN])
TURN = "\x00"  # the end of the reasoner's turn
RULES = PlayRules(max_steps=3, step_tokens=12, max_tokens=120, answer_tokens=8, delimiter="\n\n", paraphrase="first")


@dataclass(frozen=True)
class Case:
    """``said``: the texts of the steps as the reasoner would go on without limits; ``\\x00`` ends its turn."""

    name: str
    actions: list[int]
    said: list[str]
    rules: PlayRules = RULES
    sure: list[float] = field(default_factory=list)  # of the planner, at each decision
    context: int = 10**9  # of the planner, in steps that it can read
    strategies: StrategySet = WITHOUT_TOOLS
    outputs: tuple[str, ...] = ()  # what tools must have written, step by step


def many(action: int, count: int = 25) -> list[int]:
    return [action] * count


CASES = [
    Case("an answer at once", [END], ["so 5\n\n"]),
    Case("an answer to the end of the turn", [END], [f"so 5{TURN}"]),
    Case("a step and an answer", [THINK, END], ["one\n\n", "two\n\n"]),
    Case("two steps and an answer", [THINK, THINK, END], ["one\n\n", "two\n\n", "so 5\n\n"]),
    Case("nothing is injected", [FREE, END], ["one\n\n", "two\n\n"]),
    Case("a step that the cap ends is closed", [THINK, END], ["x" * 50, "two\n\n"]),
    Case("two steps that the cap ends", [THINK, THINK, END], ["x" * 50, "y" * 50, "two\n\n"]),
    Case("a step that ends at its cap and at the delimiter", [THINK, END], ["x" * 10 + "\n\n", "two\n\n"]),
    Case("a step one token too long for its delimiter", [THINK, END], ["x" * 11 + "\n\n", "two\n\n"]),
    Case("the reasoner ends its turn", [THINK, THINK], ["one\n\n", f"two{TURN}"]),
    Case("the reasoner ends its turn at once", [THINK], [TURN]),
    Case("the reasoner says nothing before the delimiter", [THINK, END], ["\n\n", "two\n\n"]),
    Case("the steps are used up", many(THINK), ["one\n\n"] * 9),
    Case("one step is allowed", many(THINK), ["one\n\n"] * 9, replace(RULES, max_steps=1)),
    Case("an answer chosen at the last step", [THINK, THINK, END], ["a\n\n", "b\n\n", "c\n\n"], replace(RULES, max_steps=2)),
    Case("the budget forces an answer", many(THINK), ["x" * 50] * 9, replace(RULES, max_steps=9, max_tokens=70)),
    Case("the budget leaves a short last step", many(THINK), ["x" * 50] * 9, replace(RULES, max_steps=9, max_tokens=75)),
    Case("the budget is too small for any step", many(THINK), ["x" * 50] * 9, replace(RULES, max_tokens=29)),
    Case("injected tokens count", many(THINK), ["a\n\n"] * 25, replace(RULES, max_steps=20, max_tokens=100)),
    Case("steps that inject nothing last longer", many(FREE), ["a\n\n"] * 25, replace(RULES, max_steps=20, max_tokens=100)),
    Case("a forced answer is cut", many(THINK), ["a\n\n"] * 3 + ["x" * 90], replace(RULES, max_steps=3)),
    Case("a chosen answer is cut", [END], ["x" * 90]),
    Case("an answer longer than answer_tokens", [END], ["x" * 9 + "\n\n"], replace(RULES, step_tokens=12)),
    Case("answer_tokens above step_tokens", [END], ["x" * 18 + "\n\n"], replace(RULES, step_tokens=5, answer_tokens=20)),
    Case("an answer goes on over delimiters", [END], [f"a\n\nb{TURN}"], replace(RULES, answer_to_end=True)),
    Case("an answer over delimiters is cut", [THINK, END], ["a\n\n", "b\n\n" * 9], replace(RULES, answer_to_end=True)),
    Case("a forced answer over delimiters", many(THINK, 3), ["a\n\n"] * 3 + [f"a\n\nb{TURN}"], replace(RULES, answer_to_end=True)),
    Case("another delimiter", [THINK, END], ["one;", "two;"], replace(RULES, delimiter=";")),
    Case("a blank line in a code block ends nothing", [THINK, END], ["```\na\n\nb\n```\n\n", "c\n\n"],
         replace(RULES, step_tokens=40)),
    Case("a code block that the cap cuts goes on", [THINK, FREE, END], ["```\n" + "a" * 50, "b\n\nc\n```\n\n", "5\n\n"]),
    Case("an answer in a block that was cut", [THINK, END], ["```\n" + "a" * 50, f"b\n\nc{TURN}"]),
    Case("the null action", [NULL], [f"a\n\nb\n\nc and so on to the end{TURN}"]),
    Case("the null action is cut by the budget alone", [NULL], ["x" * 500]),
    Case("the null action after a step", [THINK, NULL], ["a\n\n", f"b\n\nc{TURN}"]),
    Case("below the gate nothing is said", [THINK, END], ["a\n\n", "b\n\n"], replace(RULES, gate=0.8), sure=[0.7, 0.9]),
    Case("below the gate an answer is not due", [END, END], ["a\n\n", "b\n\n"], replace(RULES, gate=0.8), sure=[0.7, 0.9]),
    Case("below the gate until the steps are used up", many(END), ["a\n\n"] * 9, replace(RULES, gate=0.8), sure=[0.5] * 25),
    Case("a gate of 1 leaves the model alone", many(END), [f"a\n\nb\n\nc{TURN}"], replace(RULES, gate=1.0), sure=[0.9] * 25),
    Case("even where the planner is certain", many(END), [f"a\n\nb\n\nc{TURN}"], replace(RULES, gate=1.0), sure=[1.0] * 25),
    Case("the planner's context is full", many(THINK), ["a\n\n"] * 9, context=2),
]  # fmt: skip


ROOM = replace(RULES, step_tokens=30, max_tokens=300, tool_tokens=60, tool_chars=20)


def acting(name: str, actions: list[int], said: list[str], outputs: list[str], rules: PlayRules = ROOM, **other) -> Case:
    """``said`` has an entry for each time that the reasoner goes on: twice in a step whose program is run. Programs echo."""
    return Case(name, actions, said, rules, strategies=STRATEGIES, outputs=tuple(outputs), **other)


def framed(printed: str, opening: str = "") -> str:
    return f"{opening}```output\n{printed}\n```\n"


CASES += [
    acting("a program and what it printed", [RUN, END], ["7\n```", "so 7\n\n", "7\n\n"], [framed("7", "\n"), ""]),
    acting("a program in the middle", [THINK, RUN, END], ["a\n\n", "7\n```", "so\n\n", "7\n\n"], ["", framed("7", "\n"), ""]),
    acting("the turn ends behind an output", [RUN], ["7\n```", f"so 7{TURN}"], [framed("7", "\n")]),
    acting("the turn ends in a program", [RUN], [f"7\n{TURN}"], [""]),
    acting("a program that the cap ends is not run", [RUN, END], ["x" * 50, "y\n```\n7\n\n"], ["", ""]),
    acting("the cap ends the step behind an output", [RUN, END], ["7\n```", "x" * 50, "7\n\n"], [framed("7", "\n"), ""]),
    acting("a program that ends at the cap", [RUN, END], ["x" * 27 + "```", "7\n\n"], [framed("x" * 20 + " ...", "\n"), ""]),
    acting("a program one token too long", [RUN, END], ["x" * 28 + "```", f"7\n\n8{TURN}"], ["", ""]),
    acting("blank lines in a program", [RUN, END], ["a\n\nb\n```", "so\n\n", "7\n\n"], [framed("a\n\nb", "\n"), ""]),
    acting("a program that prints nothing", [RUN, END], ["\n```", "so\n\n", "7\n\n"], [framed("(it printed nothing)", "\n"), ""]),
    acting("a second block in a step is not run", [RUN, END], ["7\n```", "```\n\n8```\n\n", "7\n\n"], [framed("7", "\n"), ""]),
    acting("an output is cut to its tokens", [RUN, END], ["x" * 18 + "\n```", "so\n\n", "7\n\n"], [framed("x" * 8 + " ...", "\n"), ""],
           replace(ROOM, tool_tokens=28)),
    acting("no room for an output", [RUN, END], ["7\n```", "so\n\n", "7\n\n"], ["", ""], replace(ROOM, tool_tokens=9)),
    acting("outputs use the budget up", many(RUN), ["7\n```", "so\n\n"] * 2 + ["7\n\n"], [framed("7", "\n")] * 2 + [""],
           replace(ROOM, max_tokens=150, max_steps=9)),
    acting("room is kept for an output, whatever is chosen", many(THINK), ["a\n\n"] * 9, [""] * 3,
           replace(ROOM, max_tokens=100, max_steps=9)),
    acting("the steps are used up by programs", many(RUN), ["7\n```", "so\n\n"] * 3 + ["7\n\n"], [framed("7", "\n")] * 3 + [""]),
    acting("below the gate no program is written", [RUN, END], ["a\n\n", "b\n\n"], ["", ""],
           replace(ROOM, gate=0.8), sure=[0.7, 0.9]),
    acting("an output ends its step", [RUN, RUN, END], ["7\n```", "8\n```", "7\n\n"], [framed("7", "\n"), framed("8", "\n"), ""],
           replace(ROOM, tool_ends_step=True)),
    acting("a calculator has nothing to check", [CHECK, END], ["so\n\n", "7\n\n"], [" there is no calculation to check.\n", ""],
           replace(ROOM, tool_chars=40)),
    acting("a calculator finds an error", [THINK, CHECK, END], ["2*3 = 7\n\n", "so 6\n\n", "7\n\n"], ["", " 2*3 = 6, not 7.\n", ""],
           replace(ROOM, tool_chars=40)),
    acting("a calculator finds none", [THINK, CHECK, END], ["2*3 = 6\n\n", "so 6\n\n", "7\n\n"], ["", " all calculations check.\n", ""],
           replace(ROOM, tool_chars=40)),
    acting("a calculator reads the last step alone", [THINK, THINK, CHECK, END], ["2*3 = 7\n\n", "1+1 = 2\n\n", "so\n\n", "7\n\n"],
           ["", "", " all calculations check.\n", ""], replace(ROOM, tool_chars=40)),
    acting("a calculator reads no output", [RUN, CHECK, END], ["2+2 = 5\n```", "so\n\n", "a\n\n", "7\n\n"],
           [framed("2+2 = 5", "\n"), " 2+2 = 4, not 5.\n", ""], replace(ROOM, tool_chars=40)),
]  # fmt: skip


def echo(program: str, seconds: float) -> str:
    """Stands for what runs programs."""
    assert seconds == ROOM.tool_seconds
    return program


def planner_of(case: Case) -> ScriptedPlanner:
    def rule(question: str, steps: list[tuple[str, str]], uniform: float) -> list[float]:
        number = len(steps)
        probabilities = one_hot(case.actions[number], len(case.strategies))
        sure = case.sure[number] if case.sure else 1.0
        rest = (1 - sure) / (len(case.strategies) - 1)
        return [sure if p else rest for p in probabilities]

    planner = ScriptedPlanner(case.strategies, rule, context=case.context)
    begin = planner.begin
    planner.sessions = []

    def counting(slots: int):
        session = begin(slots)
        decide = session.decide

        def as_scripted(slots: list[int], uniforms: list[float], temperature: float):
            """Uniform numbers that fall on the script's action, whatever the planner's probabilities."""
            number = len(session.steps[slots[0]])
            rest = (1 - case.sure[number]) / (len(case.strategies) - 1) if case.sure else 0.0
            return decide(slots, [rest * case.actions[number] + 1e-3], temperature)

        session.decide = as_scripted  # type: ignore[method-assign]
        session.length = lambda slot: len(session.steps[slot]) + 1  # type: ignore[method-assign]
        planner.sessions.append(session)
        return session

    planner.begin = counting  # type: ignore[method-assign]
    return planner


@dataclass(frozen=True)
class Played:
    """What all players must agree on, step by step."""

    steps: list[tuple[str, str, bool, str]]  # strategy, text, forced, a tool's output
    flags: dict[str, bool]
    sampled: int
    injected: int
    read: list[tuple[str, str]]  # by the planner: strategy, text


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = None
    eos_token_id = 0

    def __len__(self) -> int:
        return 128

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: object) -> str:
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i == 0))

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(row) for row in rows]


VOCABULARY = rollout_module.Vocabulary(Characters(), 128)  # type: ignore[arg-type]


class Reasoner:
    """What the game asks of a reasoner, without a model."""

    tokenizer = Characters()
    end_ids = {0}  # noqa: RUF012

    def prompt_ids(self, question: str, day: str = "") -> list[int]:
        return self.tokenizer.encode(question)

    injected_ids = prompt_ids


class Engine:
    """Says what the case says, a character a token, under the limits that it is given."""

    def __init__(self, said: list[str]) -> None:
        self.said, self.running, self.step = list(said), 0, SampledStep(0, [], [], "cap")

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        assert slots == [0]

    def submit(self, slot: int, injected: list[int], max_new_tokens: int, stop) -> None:
        tokens: list[int] = []
        end = None
        for character in self.said.pop(0):
            tokens.append(ord(character))
            if character == TURN:
                end = "end_of_turn"
            elif stop is not None and stop.ended(tokens):
                end = "delimiter"
            elif len(tokens) >= max_new_tokens:
                end = "cap"
            if end:
                break
        assert end, "the script is too short"
        self.running, self.step = 1, SampledStep(slot, tokens, [0.0] * len(tokens), end)

    def advance(self) -> list[SampledStep]:
        self.running = 0
        return [self.step]

    def release(self, slot: int) -> None: ...
    def close(self) -> None: ...


def by_rollout(case: Case, monkeypatch) -> Played:
    monkeypatch.setattr(rollout_module, "open_engine", lambda *_, **__: Engine(case.said))
    monkeypatch.setattr(rollout_module, "check_context", lambda *_: None)
    monkeypatch.setattr(rollout_module, "check_budget", lambda *_: None)  # one too small is refused
    monkeypatch.setattr(Game, "vocabulary", VOCABULARY)
    rules = RolloutConfig(**vars(case.rules))
    planner = planner_of(case)
    (episode,) = Game(Reasoner(), planner, rules, echo).play([Problem("Q", "5")], seed=0)  # type: ignore[arg-type]
    names = case.strategies.names
    steps = [(names[s.strategy], s.text, s.forced, s.output) for s in episode.steps]
    flags = {f: getattr(episode, f) for f in ("forced", "truncated", "terminated", "reasoner_ended")}
    return Played(steps, flags, episode.sampled_tokens, episode.injected_tokens, planner.sessions[-1].steps[0])


class Conversation:
    """The same script behind the plug-in's game, with exact token ids."""

    def __init__(self, said: list[str]) -> None:
        self.engine, self.pending = Engine(said), ""

    def inject(self, text: str) -> None:
        self.pending += text

    def count(self, text: str) -> int:
        return len(text)

    def room(self) -> int:
        return 10**9

    async def step(self, max_new_tokens: int, until):
        stop = None
        if until.delimiter:
            stop = rollout_module.DelimiterStop(VOCABULARY, until.delimiter, until.answer_prefix)
        elif until.strings:
            stop = rollout_module.StringStop(VOCABULARY, until.strings)
        self.engine.submit(0, [], max_new_tokens, stop)
        (step,) = self.engine.advance()
        text = Characters().decode(step.tokens, skip_special_tokens=True)
        yield TextDelta(text)
        yield StepEnd(step.end, Usage(0, len(step.tokens)), text)

    async def close(self) -> None: ...


class Exact:
    mode = "exact"

    def __init__(self, said: list[str]) -> None:
        self.said = said

    async def open(self, asked: Asked) -> Conversation:
        return Conversation(self.said)


def text_only(said: list[str], requests: list[dict]) -> httpx.MockTransport:
    """A completions endpoint that says what the case says; it stops at stop strings, leaves them out and says so."""
    rest = list(said)
    known = {"step": -1, "at": 0, "goes_on": False}

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        requests.append(body)
        if not known["goes_on"]:
            known["step"], known["at"] = known["step"] + 1, 0
        script = rest[known["step"]][known["at"] :]
        shown, reason, stopped, used = "", "length", None, 0
        for used in range(1, len(script) + 1):
            shown = script[:used]
            if shown.endswith(TURN):
                shown, reason = shown[:-1], "stop"
                break
            met = [s for s in body.get("stop", []) if shown.endswith(s)]
            if met:
                shown, reason, stopped = shown.removesuffix(met[0]), "stop", met[0]
                break
            if used >= body["max_tokens"]:
                break
        known["at"] += used
        # At a delimiter in the middle of a code block.
        known["goes_on"] = stopped == "\n\n" and (body["prompt"] + script[:used]).count("```") % 2 == 1
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": used}
        choice = {"index": 0, "text": shown, "finish_reason": reason, "stop_reason": stopped}
        lines = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        return httpx.Response(200, text="".join(f"data: {json.dumps(x)}\n\n" for x in lines) + "data: [DONE]\n\n")

    return httpx.MockTransport(answer)


def that_goes_on(said: list[str], steps: list) -> httpx.MockTransport:
    """A completions endpoint that does not stop at strings: it writes on, character by character, until it is hung up."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert "stop" not in body
        written, turn, _ = "".join(said[len(steps) - 1 :]).partition(TURN)
        shown = written[: body["max_tokens"]]
        reason = "stop" if turn and len(written) < body["max_tokens"] else "length"
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(shown) + (reason == "stop")}
        lines = [{"choices": [{"index": 0, "text": c, "finish_reason": None}]} for c in shown]
        lines += [{"choices": [{"index": 0, "text": "", "finish_reason": reason}]}, {"choices": [], "usage": usage}]
        return httpx.Response(200, text="".join(f"data: {json.dumps(x)}\n\n" for x in lines) + "data: [DONE]\n\n")

    return httpx.MockTransport(answer)


async def by_play(case: Case, http: str = "") -> Played:
    """``http``: tells (an upstream that says at which string it stopped) or cut (one that does not)."""
    planner = planner_of(case)
    batcher = PlannerBatcher(planner, 1)
    worker = asyncio.create_task(batcher.run())
    steps: list[list] = []
    transport = that_goes_on(case.said, steps) if http == "cut" else text_only(case.said, [])
    client = httpx.AsyncClient(base_url="http://upstream/v1/", transport=transport)
    upstream = HttpUpstream(client, "prefill", count=len, tells=http == "tells") if http else Exact(case.said)
    asked = Asked("m", None, "Q", {"temperature": 0.0})
    finished = None
    events = play(asked, batcher, upstream, case.rules, case.rules.max_tokens, None, echo)  # type: ignore[arg-type]
    async for event in events:
        if isinstance(event, Injected):
            steps.append([event.strategy, "", event.forced, ""])
        elif isinstance(event, TextDelta):
            steps[-1][1] += event.text if event.sampled else ""
            steps[-1][3] += event.text if event.output else ""
        else:
            finished = event
    worker.cancel()
    await client.aclose()
    assert isinstance(finished, Finished)
    ending = finished.ending
    flags = {
        "forced": any(step[2] for step in steps),
        "truncated": ending.truncated,
        "terminated": ending.terminated,
        "reasoner_ended": ending.reasoner_ended,
    }
    tokens = finished.usage.completion_tokens, finished.injected_tokens
    return Played([tuple(step) for step in steps], flags, *tokens, planner.sessions[0].steps[0])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_players_play_by_one_rulebook(case, monkeypatch):
    native = by_rollout(case, monkeypatch)
    assert asyncio.run(by_play(case)) == native
    if not case.rules.gate:  # where nothing may be injected, the upstream is not asked to stop
        assert asyncio.run(by_play(case, "tells")) == native
    if not case.outputs:
        assert asyncio.run(by_play(case, "cut")) == native
    assert native.sampled + native.injected <= max(case.rules.max_tokens, 29)
    if case.outputs:
        assert tuple(output for *_, output in native.steps) == case.outputs


def test_the_cases_tell_rules_apart(monkeypatch):
    """Each ends another way than the plain one, and together they show every flag and every way to end."""
    seen = set()
    for case in CASES:
        played = by_rollout(case, monkeypatch)
        seen |= {flag for flag, is_set in played.flags.items() if is_set}
        monkeypatch.undo()
    assert seen == {"forced", "truncated", "terminated", "reasoner_ended"}
    assert len(CASES) >= 30


def test_only_a_tool_keeps_room_for_what_is_printed():
    """Else an episode ends a token earlier than its budget allows."""
    without = replace(STRATEGIES, strategies=tuple(s for s in STRATEGIES.strategies if not s.tool))
    rules = replace(RULES, tool_tokens=7)
    assert rulebook_of(ScriptedPlanner(without, lambda *_: 0), rules, len).lengths.tool == 0
    assert rulebook_of(ScriptedPlanner(STRATEGIES, lambda *_: 0), rules, len).lengths.tool == 7


def test_what_must_have_room_is_the_longest_wording():
    lengths = Lengths.of([[3, 7], [5, 1], [2, 9]], termination=1, delimiter=2, tool=4)
    assert (lengths.prompt, lengths.termination, lengths.delimiter, lengths.tool) == (9, 5, 2, 4)


BOOK = Rulebook(RULES, Lengths(prompt=11, termination=5, delimiter=2), END, FREE, frozenset({NULL}))


@pytest.mark.parametrize(
    ("tokens", "steps", "room", "ends"),
    [(0, 0, 94, False), (93, 0, 1, False), (94, 0, 0, True), (0, 2, 94, False), (0, 3, 94, True), (120, 0, -26, True)],
)
def test_when_an_episode_must_end(tokens, steps, room, ends):
    """120 - 11 (any prompt) - 2 (a delimiter) - 5 - 8 (the forced ending) = 94."""
    assert BOOK.room(Progress(steps, tokens)) == room
    assert BOOK.must_end(Progress(steps, tokens)) == ends


@pytest.mark.parametrize(
    ("move", "tokens", "prompt", "most"),
    [
        (Move(THINK), 0, 7, 12),
        (Move(THINK), 90, 7, 4),  # room, whatever this prompt takes
        (Move(END, final=True), 0, 5, 12),
        (Move(END, final=True), 110, 5, 5),  # what is left
        (Move(END, final=True), 119, 5, 1),  # never nothing
        (Move(NULL, final=True, unlimited=True), 20, 0, 100),
        (ALONE, 0, 0, 120),
    ],
)
def test_how_much_a_step_may_sample(move, tokens, prompt, most):
    assert BOOK.max_new_tokens(move, Progress(1, tokens), prompt) == most


@pytest.mark.parametrize(
    ("move", "end", "expected"),
    [
        (Move(THINK), "delimiter", Ending()),
        (Move(THINK), "cap", Ending(closes=True)),
        (Move(THINK), "end_of_turn", Ending(over=True, reasoner_ended=True)),
        (Move(END, final=True), "delimiter", Ending(over=True, terminated=True)),
        (Move(END, final=True), "end_of_turn", Ending(over=True, terminated=True)),
        (Move(END, final=True), "cap", Ending(over=True, truncated=True)),
        (Move(END, final=True, forced=True), "delimiter", Ending(over=True)),
        (Move(END, final=True, forced=True), "cap", Ending(over=True, truncated=True)),
        (Move(NULL, final=True, unlimited=True), "end_of_turn", Ending(over=True, reasoner_ended=True)),
        (Move(NULL, final=True, unlimited=True), "cap", Ending(over=True, truncated=True)),
        (ALONE, "end_of_turn", Ending(over=True)),
        (ALONE, "cap", Ending(over=True, truncated=True)),
    ],
)
def test_what_the_end_of_a_step_means(move, end, expected):
    assert BOOK.ending(move, end) == expected


@pytest.mark.parametrize(
    ("limit", "refused"), [(15, "a final answer alone"), (26, "a step and an answer take over 26"), (27, "")]
)
def test_a_budget_without_room_for_a_step_is_refused(limit, refused):
    """5 + 8 (the forced ending) + 2 (a delimiter) + 11 (any prompt): the planner would never be asked."""
    book = replace(BOOK, rules=replace(RULES, max_tokens=limit))
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        check_budget(book)
    assert book.must_end(Progress()) == bool(refused)


def test_rules_are_saved_and_read_back():
    rules = PlayRules(max_steps=3, delimiter='\n"\t\\', answer_to_end=True, gate=0.25, paraphrase="first")
    assert from_toml(to_toml(rules), "rules.toml") == rules
    assert from_toml("max_steps = 3\n", "rules.toml") == PlayRules(max_steps=3)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("steps = 3", "there is no rule 'steps'"),
        ("max_steps = 0", "max_steps = 0"),
        ('max_steps = "3"', "must be of type int"),
        ("gate = 2", "gate = 2"),
        ('delimiter = ""', "delimiter is empty"),
        ('paraphrase = "best"', "paraphrase"),
        ("max_steps = ", "not valid TOML"),
    ],
)
def test_rules_that_are_none_are_refused(text, what):
    with pytest.raises(UserError, match=what) as refused:
        from_toml(text, "rules.toml")
    assert str(refused.value).startswith("rules.toml")


def test_a_short_answer_keeps_a_quarter_for_its_end():
    assert PlayRules(max_tokens=100, answer_tokens=60).within(40) == PlayRules(max_tokens=40, answer_tokens=10, tool_tokens=10)
    assert PlayRules(max_tokens=100).within(400) == PlayRules(max_tokens=100)
    assert PlayRules(max_tokens=100, answer_tokens=60).within(1).answer_tokens == 1
