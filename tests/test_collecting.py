"""``rsim collect``: every arm plays as it does alone, the log goes on where it was stopped, and its tables are right."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
from typer.testing import CliRunner

from rsim.cli.collect import Pace
from rsim.cli.main import app
from rsim.collecting import play
from rsim.collecting.arms import load_arms
from rsim.collecting.headroom import as_text, headroom
from rsim.collecting.log import Log, line
from rsim.collecting.play import Collection, collect, questions
from rsim.collecting.tree import game_arms
from rsim.config import Config
from rsim.data.sources import SOURCES, Source
from rsim.engine import llama, vllm
from rsim.errors import UserError
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedModel
from rsim.game.problem import Problem, generated_split
from rsim.game.tools import Tools
from rsim.policies.loading import load_reasoner
from rsim.policies.scripted import random_planner
from rsim.policies.strategies import load_strategies
from rsim.rewards.programs import run_program
from rsim.rules import PlayRules
from rsim.serving.server import create_app
from rsim.serving.state import ServeConfig
from serving import serving
from standin_llama import StandIn
from standin_vllm import StandIn as StandInVllm

QUESTIONS = ["4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?", "x-38=4*17, x=?", "12+13+14+15-9=?"]
ARMS = """
strategies = "lab"
cascade = [["at-once", "split"]]

[rules]
max_steps = 3
step_tokens = 8
max_tokens = 36
answer_tokens = 6
delimiter = "\\n"

[[strategy]]
name = "alone"
prompts = [""]
unlimited = true

[[arm]]
name = "alone"
sequence = ["alone"]

[[arm]]
name = "at-once"
sequence = ["termination"]

[[arm]]
name = "split"
sequence = ["decomposition", "validation"]

[[arm]]
name = "asked"
sequence = ["alone"]
system_prompt = "Ann has"
"""
OTHER = '\n[[arm]]\nname = "plan"\nsequence = ["sub-planning", "alone"]\n'


@pytest.fixture
def wanted(tmp_path, base_folder):
    """What is collected: a tiny model's answers to five questions, two to a piece."""
    data, arms = tmp_path / "data.jsonl", tmp_path / "arms.toml"
    lines = [json.dumps({"question": q, "answer": "106", "id": f"q{i}"}) for i, q in enumerate(QUESTIONS)]
    data.write_text("\n".join(lines))
    arms.write_text(ARMS)
    return Collection(str(arms), str(data), model=str(base_folder), piece=2)


@pytest.fixture
def at_llama(wanted, monkeypatch, reasoner):
    """The same over a stand-in for llama.cpp's server with two slots."""
    server = StandIn(copy.deepcopy(reasoner.model), reasoner.tokenizer, slots=2, eog=reasoner.end_ids)
    monkeypatch.setattr("rsim.engine.llama.LlamaServer", partial(llama.LlamaServer, transport=server))
    return replace(wanted, overrides=("rollout.engine=llama",)), server


def files(log):
    return {path.name: path.read_text() for path in sorted(log.folder.iterdir()) if path.name != "log.json"}


def test_an_arm_plays_as_the_same_sequence_in_an_evaluation(wanted, tmp_path):
    log = collect(wanted, tmp_path / "log")
    assert [len(path.read_text().splitlines()) for path in sorted((tmp_path / "log").glob("piece-*"))] == [8, 8, 4]
    ids = {question: f"q{i}" for i, question in enumerate(QUESTIONS)}
    collected = {(record["id"], record["arm"]): record for record in log.records()}
    texts = [json.loads(text) for path in (tmp_path / "log").glob("texts-*") for text in path.read_text().splitlines()]
    written = {(record["id"], record["arm"]): record["steps"] for record in texts}
    rules = load_arms(wanted.arms).overrides
    for arm in load_arms(wanted.arms).arms:
        overrides = (
            *rules,
            f'models.strategies="{tmp_path}/log/strategies.toml"',
            f'models.system_prompt="{arm.system_prompt}"',
        )
        evaluation = EvalSettings("nano", f"sequence:{','.join(arm.sequence)}", wanted.model, wanted.data, overrides=overrides)
        evaluate_into(tmp_path / arm.name, evaluation)
        for text in (tmp_path / arm.name / "episodes.jsonl").read_text().splitlines():
            record = json.loads(text)
            key = ids[record["question"]], arm.name
            mine = collected.pop(key)
            names = {"answer": "predicted", "right": "correct", "flexible": "flexible", "flags": "flags", "steps": "step_count",
                     "sampled": "sampled_tokens", "injected": "injected_tokens", "prompt": "prompt_tokens"}  # fmt: skip
            assert {k: mine[k] for k in names} == {k: record[name] for k, name in names.items()}
            assert written[key] == [{"strategy": s["strategy"], "text": s["text"]} for s in record["steps"]]
    assert not collected


def test_progress_counts_the_episodes_of_all_runs(wanted, at_llama, tmp_path, monkeypatch, capsys):
    """Over threads too; it once said the size of each piece, twice the same."""
    for name, how in (("native", wanted), ("llama", at_llama[0])):
        begun: list[tuple[int, int]] = []
        collect(replace(how, limit=2), tmp_path / name, lambda *now, told=begun: told.append(now))
        assert (begun[0], begun[-1]) == ((0, 8), (8, 8))
        gone_on: list[tuple[int, int]] = []
        collect(how, tmp_path / name, lambda *now, told=gone_on: told.append(now))
        assert (gone_on[0], gone_on[-1]) == ((8, 20), (20, 20))
        assert gone_on == sorted(gone_on)
    capsys.readouterr()
    pace = Pace()
    seconds = iter([500.0, 530.0, 560.0, 600.0])  # what is loaded before the first episode is not in the pace
    monkeypatch.setattr("rsim.cli.collect.time.monotonic", lambda: next(seconds))
    for done in (8, 10, 11, 20):
        pace(done, 20)
    assert capsys.readouterr().err.splitlines() == [
        "8 of 20 episodes",
        "11 of 20 episodes, 0:03:00 left",
        "20 of 20 episodes, 0:00:00 left",
    ]


def test_no_line_of_a_piece_holds_the_question(wanted, tmp_path):
    collect(wanted, tmp_path / "log")
    pieces = "".join(path.read_text() for path in (tmp_path / "log").glob("piece-*"))
    assert not any(question in pieces for question in QUESTIONS)


def test_servers_slots_give_the_native_engines_log_and_read_a_question_once(wanted, at_llama, tmp_path):
    here = collect(wanted, tmp_path / "here")
    served, server = at_llama
    there = collect(served, tmp_path / "there")
    assert files(there) == files(here)
    assert there.header["settings"]["quantisation"] == "all F32"
    assert there.header["settings"]["model"] == "base", "no path of this machine"
    whole = {record["id"]: record["prompt"] for record in there.records() if record["arm"] == "alone"}
    asked = {record["id"]: record["prompt"] for record in there.records() if record["arm"] == "asked"}
    first_read = sum(whole.values()) + sum(asked.values())  # an arm with a system prompt of its own shares nothing
    injected = sum(record["injected"] for record in there.records())
    # Beside these each request reads the last token again, which was sampled or is the whole prompt's.
    assert first_read <= sum(server.read) <= first_read + injected + len(server.asked)
    assert sum(len(body["prompt"]) for body in server.asked) > 2 * sum(server.read)


def test_vllms_servers_give_the_native_engines_log(wanted, tmp_path, monkeypatch, reasoner):
    """Two servers; the arms of a question go to one, whose prefix cache has it."""
    here = collect(wanted, tmp_path / "here")
    server = StandInVllm(copy.deepcopy(reasoner.model), reasoner.tokenizer)
    monkeypatch.setattr("rsim.engine.vllm.VllmServer", partial(vllm.VllmServer, transport=server))
    real, used = play._play, {}

    def watched(player, view, problems, *how):
        used.setdefault(problems[0].id, set()).update(one.url for one in view.servers)
        return real(player, view, problems, *how)

    monkeypatch.setattr(play, "_play", watched)
    there = replace(wanted, overrides=("rollout.engine=vllm", "rollout.vllm_url=http://a,http://b", "rollout.batch=2"))
    assert files(collect(there, tmp_path / "there")) == files(here)
    assert all(len(urls) == 1 for urls in used.values())
    assert set().union(*used.values()) == {"http://a", "http://b"}


def test_a_questions_arms_are_played_in_one_slot_that_no_other_lane_has(at_llama, tmp_path, monkeypatch):
    served, _ = at_llama
    real, slots = play._play, {}

    def watched(player, view, problems, *how):
        assert view.slots == 1
        slots.setdefault(problems[0].id, []).append(view.servers[0].seats[0].index)
        return real(player, view, problems, *how)

    monkeypatch.setattr(play, "_play", watched)
    collect(served, tmp_path / "log")
    assert sorted(slots) == [f"q{i}" for i in range(5)]
    assert all(len(used) == 4 and len(set(used)) == 1 for used in slots.values())


def test_questions_on_one_text_follow_each_other_in_a_slot(at_llama, tmp_path, monkeypatch):
    """A table is read once for its questions, but no lane has much more to do than the others."""
    served, _ = at_llama
    lines = [{"id": f"q{i}", "question": f"table {i % 3}\n\n{i}=?", "answer": "1"} for i in range(9)]
    (tmp_path / "tables.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    real, order = play._play, []

    def watched(player, view, problems, *how):
        order.append(problems[0].question.partition("\n")[0])
        return real(player, view, problems, *how)

    monkeypatch.setattr(play, "_play", watched)
    tables = replace(served, data=str(tmp_path / "tables.jsonl"), overrides=(*served.overrides, "rollout.batch=1"))
    log = collect(tables, tmp_path / "log")
    assert sum(a != b for a, b in itertools.pairwise(order)) <= 5, "two by two: nine questions, one lane"
    assert len(list(log.records())) == 9 * 4


def test_a_log_goes_on_in_the_middle_of_a_piece(at_llama, tmp_path, monkeypatch):
    served, _ = at_llama
    whole = collect(served, tmp_path / "whole")
    real, calls = play.play_part, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) > 14:  # two questions of four arms are a piece: the second one
            raise UserError("the server at http://a answered 500")
        return real(*arguments)

    monkeypatch.setattr(play, "play_part", breaks)
    with pytest.raises(UserError, match="500"):
        collect(served, tmp_path / "log")
    stopped = Log(tmp_path / "log")
    assert {name for name in files(stopped) if name.startswith("piece")} < {f"piece-000{i}.jsonl" for i in range(3)}
    assert stopped.unfinished
    played = len(stopped.records()) + len(stopped.unfinished)
    with (tmp_path / "log" / "unfinished.jsonl").open("a") as file:
        file.write('{"id": "q')  # the machine went down in the middle of a line
    calls.clear()
    monkeypatch.setattr(play, "play_part", lambda *arguments: calls.append(arguments) or real(*arguments))
    log = collect(served, tmp_path / "log")
    assert files(log) == files(whole)
    assert len(calls) == 5 * 4 - played, "nothing was played twice"
    assert not (tmp_path / "log" / "unfinished.jsonl").read_text()
    assert len(log.header["runs"]) == 2


def test_a_log_grows_by_questions_and_arms_and_refuses_other_settings(wanted, tmp_path, monkeypatch):
    whole = collect(wanted, tmp_path / "whole")
    collect(replace(wanted, limit=3), tmp_path / "log")
    log = collect(wanted, tmp_path / "log")
    assert files(log) == files(whole)
    assert files(collect(replace(wanted, limit=1), tmp_path / "log")) == files(whole), "what is there stays"
    with pytest.raises(UserError, match=r"other settings \(rules.max_steps\): give --out"):
        collect(replace(wanted, overrides=("rollout.max_steps=2",)), tmp_path / "log")
    assert files(Log(tmp_path / "log")) == files(whole)
    played = []
    real = play.play_part
    monkeypatch.setattr(play, "play_part", lambda game, problems, *rest: played.append(problems) or real(game, problems, *rest))
    (tmp_path / "arms.toml").write_text(ARMS + OTHER)
    log = collect(wanted, tmp_path / "log")
    assert sum(map(len, played)) == 5, "the new arm alone"
    assert [r["arm"] for r in log.records()] == ["alone", "at-once", "split", "asked", "plan"] * 5
    (tmp_path / "arms.toml").write_text(ARMS.replace('["decomposition", "validation"]', '["validation"]'))
    with pytest.raises(UserError, match=r"other settings \(arm split\)"):
        collect(wanted, tmp_path / "log")


def test_sampled_arms_differ_by_their_seeds_repeat_and_are_not_fitted(wanted, tmp_path, at_llama):
    """Voting needs samples of one arm, and a log of them that can be read again."""
    names = {"one": 1, "again": 1, "two": 2}
    arm = '\n[[arm]]\nname = "{}"\nsequence = ["decomposition", "validation"]\ntemperature = 3.0\nseed = {}\n'
    (tmp_path / "arms.toml").write_text(ARMS + "".join(arm.format(*pair) for pair in names.items()))
    for how in (wanted, at_llama[0]):
        log = collect(how, tmp_path / str(len(how.overrides)))
        written = log.texts()
        of = {name: [written[f"q{i}", name] for i in range(5)] for name in ("split", *names)}
        assert of["one"] == of["again"]
        assert of["one"] != of["two"]
        assert of["one"] != of["split"], "the greedy one"
        assert Log(log.folder).header["arms"]["two"]["seed"] == 2
        assert list(game_arms(log)) == ["alone", "at-once", "split"]


def test_a_sampled_arm_draws_anew_for_each_question(wanted, tmp_path, at_llama):
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"question": "7=?", "answer": "7", "id": f"q{i}"}) + "\n" for i in range(5))
    )
    arm = '\n[[arm]]\nname = "drawn"\nsequence = ["decomposition", "validation"]\ntemperature = 3.0\n'
    (tmp_path / "arms.toml").write_text(ARMS + arm)
    for how in (wanted, at_llama[0]):
        written = collect(how, tmp_path / str(len(how.overrides))).texts()
        assert len({str(written[f"q{i}", "split"]) for i in range(5)}) == 1
        assert len({str(written[f"q{i}", "drawn"]) for i in range(5)}) > 2


def test_a_smaller_limit_is_the_beginning_and_used_ids_are_left_out(wanted, tmp_path):
    every = questions(wanted.data, "train", config=Config())
    assert questions(wanted.data, "train", limit=2, config=Config()) == every[:2]
    (tmp_path / "used").write_text(f"{every[1].id}\nanother\n")
    assert questions(wanted.data, "train", exclude=str(tmp_path / "used"), config=Config()) == [every[0], *every[2:]]
    with pytest.raises(UserError, match="--exclude"):
        questions(wanted.data, "train", exclude=str(tmp_path / "no"), config=Config())


def test_a_set_with_a_test_split_alone_is_cut_by_id(tmp_path, monkeypatch):
    problems = [Problem(f"{i}?", str(i), f"id-{i}") for i in range(300)]
    (tmp_path / "only").mkdir()
    monkeypatch.setitem(SOURCES, "only", Source("", "only", ("test",), lambda folder: {"test": problems}))
    monkeypatch.setenv("RSIM_DATA", str(tmp_path))
    cut = {split: questions("only", split, config=Config()) for split in ("train", "dev", "test")}
    assert sorted(p.id for some in cut.values() for p in some) == sorted(p.id for p in problems)
    assert all(generated_split(p.id) == split for split, some in cut.items() for p in some)
    assert len(cut["train"]) > 200


def record(question: str, arm: str, answer: str | None, right: bool, tokens: int, data: str = "sums") -> dict:
    about = {"id": question, "data": data, "split": "train", "arm": arm, "answer": answer, "right": right, "flexible": right}
    return about | {"sampled": tokens - 2, "injected": 2, "prompt": 9, "steps": 1, "flags": [] if answer else ["truncated"]}


LINES = [
    record("1", "a", "2", True, 10), record("1", "b", "2.0", True, 30),
    record("2", "a", None, False, 20), record("2", "b", "5", True, 40),
    record("3", "a", "7", False, 30), record("3", "b", "7", False, 50),
    record("4", "a", "9", True, 40), record("4", "b", "8", False, 60),
]  # fmt: skip


def test_the_tables_are_those_made_by_hand():
    (found,) = headroom(LINES, [("a", "b")])
    assert [(row.name, row.questions, row.accuracy, row.tokens, row.cut) for row in found.arms] == [
        ("a", 4, 0.5, 25.0, 0.25),
        ("b", 4, 0.5, 45.0, 0.0),
    ]
    assert [(row.name, row.accuracy, row.tokens) for row in found.rules] == [
        ("best arm: a", 0.5, 25.0),  # of equals the cheaper one
        ("any arm right", 0.75, (10 + 40 + 30 + 40) / 4),
        ("cascade: a, b", 0.75, (10 + 60 + 30 + 40) / 4),
    ]
    (pair,) = found.pairs
    assert (pair.questions, pair.agree, pair.right_then, pair.either) == (4, 2, 1, 3)
    assert "a, b" in as_text([found])
    assert "50.0% (1/2)" in as_text([found])


def test_a_cascade_falls_back_where_a_program_failed():
    failed = [one | {"ran": one["id"] != "4"} if one["arm"] == "a" else one for one in LINES]
    (found,) = headroom(failed, [("a", "b")])
    assert (found.rules[2].accuracy, found.rules[2].tokens) == (0.5, (10 + 60 + 30 + 100) / 4)


@pytest.mark.parametrize(
    ("program", "ran"),
    [
        ("print(6*7)", True),
        ("x = 6*7", False),
        ("print(6)\nprint(1/0)", False),
        ("import sys\nprint('ValueError: no')\nprint(1)", True),
    ],
)
def test_a_line_tells_a_program_that_ran_from_one_that_failed(program, ran):
    rules = PlayRules()
    output = Tools(partial(run_program, unsafe=True), rules, len)._run(program, "x\n")
    step = {"strategy": "computation", "text": f"{program}\n```{output} So 42.", "output": output}
    ending = {"strategy": "termination", "text": "\\boxed{42}"}
    about = {"id": "1", "data": "d", "split": "train", "arm": "program", "predicted": "42", "correct": True, "flexible": True,
             "sampled_tokens": 3, "injected_tokens": 2, "prompt_tokens": 1, "step_count": 2, "flags": []}  # fmt: skip
    told = line(about | {"steps": [step, ending]}, frozenset({"computation"}))
    assert (told["program"], told["output"], told["ran"]) == (f"{program}\n", output, ran)
    assert "program" not in line(about | {"steps": [ending]}, frozenset({"computation"}))
    unclosed = line(about | {"steps": [{"strategy": "computation", "text": "x = 1"}]}, frozenset({"computation"}))
    assert (unclosed["program"], unclosed["ran"]) == ("x = 1", False)


def test_each_sets_best_arm_stands_beside_the_best_of_all():
    other = [record(q, arm, "1", arm == "b", 10, "words") for q in "12" for arm in "ab"]
    found = headroom(LINES + other)
    assert [one.name for one in found] == ["sums train", "words train", "all sets"]
    rules = {row.name: (row.questions, row.accuracy) for row in found[2].rules}
    assert rules["best arm: b"] == (6, 4 / 6)
    assert rules["best arm of each set"] == (6, 4 / 6)
    assert found[0].rules[0].name == "best arm: a"


def test_a_question_that_lacks_an_arm_is_left_out():
    (found,) = headroom(LINES[:-1])
    assert [row.questions for row in found.arms] == [3, 3]
    with pytest.raises(UserError, match="no question that all arms"):
        headroom([record("1", "a", "2", True, 10), record("2", "b", "2", True, 10)])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('name = "asked"', 'name = "split"', "'split' is given twice"),
        ('["termination"]', '["ending"]', "unknown strategy 'ending'"),
        ('["termination"]', "[]", "no sequence"),
        ("max_steps", "most_steps", "no rule 'most_steps'"),
        ("system_prompt", "prompt", "unknown key 'prompt'"),
        ('["at-once", "split"]', '["at-once", "splat"]', "cascade"),
        ("[[arm]]", "[[arms]]", "unknown key 'arms'"),
        ('name = "asked"', 'name = "asked"\ntemperature = -1', "temperature must be a number"),
        ('name = "asked"', 'name = "asked"\nseed = 0.5', "seed a whole one"),
    ],
)
def test_a_wrong_arms_file_is_named(tmp_path, old, new, problem):
    (tmp_path / "arms.toml").write_text(ARMS.replace(old, new))
    with pytest.raises(UserError, match=problem):
        load_arms(str(tmp_path / "arms.toml"))


def test_the_packaged_arms_can_be_played():
    arms = load_arms("default")
    assert {arm.name for arm in arms.arms} >= {"cot", "program", "at-once"}
    assert arms.strategies.unlimited


def test_the_command_prints_the_tables_of_a_log(wanted, tmp_path):
    run = partial(CliRunner().invoke, app, catch_exceptions=False)
    made = run(["collect", wanted.arms, "--data", wanted.data, "--model", wanted.model, "--out", str(tmp_path / "log")])
    printed = run(["collect", "--report", str(tmp_path / "log"), "--json"])
    assert "any arm right" in made.stdout
    assert [row["name"] for row in json.loads(printed.stdout)[0]["arms"]] == ["alone", "at-once", "split", "asked"]
    assert made.stdout == run(["collect", "--report", str(tmp_path / "log")]).stdout
    first = tmp_path / "log" / "piece-0000.jsonl"  # a log in the middle of a piece has the same tables
    first.rename(tmp_path / "log" / "unfinished.jsonl")
    assert made.stdout == run(["collect", "--report", str(tmp_path / "log")]).stdout
    for wrong in (
        ["collect", wanted.arms],
        ["collect", wanted.arms, "--report", "log"],
        ["collect", "--report", str(tmp_path)],
    ):
        with pytest.raises(UserError):
            run(wrong)


def test_nothing_to_collect_is_said_before_anything_is_loaded(tmp_path):
    """A split that a set cut by ids does not have, or everything excluded: the log would be empty."""
    (tmp_path / "data.jsonl").write_text('{"question": "1+1?", "answer": "2", "id": "q"}\n')
    (tmp_path / "used.txt").write_text("q\n")
    with pytest.raises(UserError, match="no questions of split 'train'"):
        questions(str(tmp_path / "data.jsonl"), "train", exclude=str(tmp_path / "used.txt"), config=Config())


def test_a_damaged_line_of_a_log_is_named(tmp_path):
    (tmp_path / "log.json").write_text('{"arms": {}}')
    (tmp_path / "piece-0000.jsonl").write_text('{"id": "q0"}\n{"id": \n{"cut')
    with pytest.raises(UserError, match=r"piece-0000.jsonl, line 2 is damaged"):
        Log(tmp_path).records()


def test_an_upstream_of_text_gives_the_same_answers(tmp_path):
    lines = [json.dumps({"question": q, "answer": "106", "id": q}) for q in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "arms.toml").write_text(ARMS.replace("step_tokens = 10", "step_tokens = 30"))
    wanted = Collection(str(tmp_path / "arms.toml"), str(tmp_path / "data.jsonl"), model="nano-s")
    here = collect(wanted, tmp_path / "here")
    strategies = load_strategies("lab")
    with serving(create_app(ServeConfig(slots=4), random_planner(strategies), load_reasoner("nano-s"), name="nano-s")) as url:
        there = collect(replace(wanted, served=ServedModel(url, "nano-s", at_once=2)), tmp_path / "there")
        other = replace(wanted, served=ServedModel(url, "nano-s", mode="turn", at_once=2))
        with pytest.raises(UserError, match=r"other settings \(mode\)"):  # its answers would be others
            collect(other, tmp_path / "there")
    assert there.header["settings"]["engine"] == url
    keys = ("id", "arm", "answer", "right", "flags", "steps")
    assert [[r[k] for k in keys] for r in there.records()] == [[r[k] for k in keys] for r in here.records()]
