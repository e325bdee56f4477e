"""``rsim fit``: a planner learns from a log what each arm is worth, and leaves the model alone where nothing is gained."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rsim.cli.main import app
from rsim.collecting.fit import _check_disjoint, choices_of, fit_planner, flat, null_arm, played
from rsim.collecting.fit import tested as on_tests
from rsim.collecting.log import Log
from rsim.collecting.regression import Choices, Head, cross_fitted, fit, fold_of, lower_bounds
from rsim.collecting.tree import Node, Outcome, Tree, trees
from rsim.errors import UserError
from rsim.policies.planner import Planner
from rsim.policies.strategies import load_strategies, to_toml
from rsim.rules import PlayRules
from rsim.rules_file import RULE_FIELDS
from studies import pays

ARMS = {"cot": ["alone"], "stop": ["computation", "termination"], "check": ["computation", "alone"], "at-once": ["termination"]}
TOKENS = {"cot": 200, "stop": 100, "check": 150, "at-once": 10}
OUTPUT = "\n```output\n{}\n```\n"


def write_log(folder, right, *, count=150, seed=0, texts=True, **other):
    """A log whose answers are right where ``right(arm, has_product, failed)`` says so; what a program prints tells if it failed."""
    rng = random.Random(seed)
    settings = {"model": "some/model-1B", "weights": {}, "quantisation": "8 bits", "template": "t", "split": "train"} | {
        "data": str(folder.parent / f"{folder.name}.jsonl"), "strategies": "s",
        **{f"rules.{name}": getattr(PlayRules(max_steps=3), name) for name in RULE_FIELDS}, **other,
    }  # fmt: skip
    questions, records, steps = [], [], []
    for number in range(count):
        product, failed = rng.random() < 0.5, rng.random() < 0.5
        by, term = rng.randint(2, 9), rng.randrange(11 + seed % 2, 99, 2)  # logs of seeds 0 and 1 share no question
        question = "+".join([f"{by}*{term % 20 + 11}" if product else f"{term}"] * 2) + "=?"
        questions.append({"id": f"q{number}", "question": question, "answer": "1"})
        for arm, sequence in ARMS.items():
            about = {"id": f"q{number}", "arm": arm}
            record = about | {"data": settings["data"], "split": "train", "right": right(arm, product, failed), "prompt": 9,
                              "answer": str(int(right(arm, product, failed))),
                              "sampled": TOKENS[arm] - 10, "injected": 10, "steps": len(sequence), "flags": []}  # fmt: skip
            output = OUTPUT.format("0" if failed else "7")
            if sequence[0] == "computation":
                record |= {"program": "1+1\n", "output": output, "ran": True}
            records.append(record)
            written = [f"1+1\n```{output}", "7"] if sequence[0] == "computation" else ["7"]
            steps.append(about | {"steps": [{"strategy": s, "text": t} for s, t in zip(sequence, written, strict=True)]})
    folder.mkdir()
    arms = {name: {"sequence": sequence, "system_prompt": "Think."} for name, sequence in ARMS.items()}
    arms["other"] = {"sequence": ["alone"], "system_prompt": "Think harder."}
    (folder / "log.json").write_text(json.dumps({"settings": settings, "arms": arms, "cascades": [], "runs": []}))
    (folder / "strategies.toml").write_text(to_toml(load_strategies("arms")))
    (folder / "piece-0000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if texts:
        (folder / "texts-0000.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (folder.parent / f"{folder.name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return Log(folder)


def depends(arm, product, failed):
    """Products are for the model alone, sums for a program; what it printed says whether to stop or to check."""
    return {"cot": product, "stop": not product and not failed, "check": not product and failed, "at-once": False}[arm]


def asked_in(log):
    """The questions' texts, by data and id."""
    data = log.header["settings"]["data"]
    return {(data, p["id"]): p["question"] for p in map(json.loads, Path(data).read_text().splitlines())}


def named(standings):
    return {row.name: row for row in standings}


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "log", depends)


def test_the_planner_routes_by_the_question_and_by_what_a_program_printed(log):
    fitted = fit_planner([log], "nano-s")
    rows = named(fitted.standings)
    assert rows["planner"].accuracy > 0.95
    assert rows["any arm right"].accuracy == 1
    assert rows["blind planner"].accuracy < 0.7
    # No arm, and no choice by the question alone, knows what the program will print.
    assert rows["question-only planner"].accuracy < 0.9
    assert rows["best arm"].accuracy < 0.6
    assert rows["planner"].low > 0.2
    assert fitted.strays == 0


def test_a_branch_is_worth_what_the_best_way_on_from_it_gives(log, tmp_path):
    """If later choices were not settled first, *computation* would be worth the mean of what follows it: as much as *alone*."""
    planner = fit_planner([log], "nano-s").planner
    found, questions = trees(log), asked_in(log)
    choices = choices_of(planner, found, questions, 0.0)
    utilities = choices.utilities(choices.features @ planner.model.score.weight.detach().double().numpy().T)
    asked = [questions[found[number].data, found[number].id] for number in choices.question]
    sums = [row for row in np.flatnonzero(choices.is_root) if "*" not in asked[row]]
    assert np.mean(utilities[sums, choices.names.index("computation")]) > 0.95


def test_the_folder_plays_what_was_fitted_and_says_for_whom(log, tmp_path, caplog):
    out = tmp_path / "planner"
    answer = CliRunner().invoke(app, ["fit", str(log.folder), "--planner", "nano-s", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert "question-only planner" in answer.output
    planner = Planner.from_pretrained(out)
    assert planner.rules == PlayRules(max_steps=3)
    assert "some/model-1B" in (out / "README.md").read_text()
    assert json.loads((out / "fit.json").read_text())["rows"][-1]["name"] == "any arm right"
    questions = list(asked_in(log).values())[:30]
    chosen = {q: _first_choice(planner, q) for q in questions}
    assert {name for q, name in chosen.items() if "*" in q} == {"alone"}
    assert {name for q, name in chosen.items() if "*" not in q} == {"computation"}
    with caplog.at_level(logging.WARNING, "rsim"):
        planner.check_model("/models/Model-1B.gguf")
        planner.check_model("some/model-1B", "Think.")
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "rsim"):
        planner.check_model("other/model")
        planner.check_model("some/model-1B", "Think again.")
    assert ["other/model" in r.getMessage() for r in caplog.records] == [True, False]
    assert "another system prompt" in caplog.records[1].getMessage()


def _first_choice(planner, question):
    session = planner.begin(1)
    session.start([0], [question])
    return planner.strategies.names[session.decide([0], [0.5], 0.0)[0].action]


def test_where_nothing_is_gained_the_model_is_left_alone(tmp_path):
    rng = random.Random(1)
    log = write_log(tmp_path / "noise", lambda arm, product, failed: rng.random() < (0.6 if arm == "cot" else 0.5))
    fitted = fit_planner([log], "nano-s")
    rows = named(fitted.standings)
    assert np.isinf(fitted.head.threshold)
    assert rows["planner"].acts == 0
    assert rows["planner without gate"].acts > 0
    assert _first_choice(fitted.planner, "12*7+3=?") == "alone"


def test_a_price_buys_the_cheap_arm_where_both_are_right(tmp_path):
    log = write_log(tmp_path / "cheap", lambda arm, product, failed: arm in ("cot", "at-once"))
    dear = named(fit_planner([log], "nano-s", price=0.5).standings)["planner"]
    assert (dear.accuracy, dear.tokens) == (1, TOKENS["at-once"])
    free = named(fit_planner([log], "nano-s").standings)["planner"]
    assert free.tokens == TOKENS["cot"]


def test_no_question_is_judged_by_a_head_that_saw_it(log):
    """Turning one fold's outcomes round changes nothing of what the others' heads say of that fold."""
    planner = fit_planner([log], "nano-s").planner
    found, questions = trees(log), asked_in(log)
    choices = choices_of(planner, found, questions, 0.0)
    _, before = cross_fitted(choices)
    for tree in found:
        if fold_of(tree, "outer") == 0:
            for node in tree.root.walk():
                for name, end in node.branches.items():
                    if isinstance(end, Outcome):
                        node.branches[name] = Outcome(end.arm, not end.right, end.tokens)
    _, after = cross_fitted(choices)
    own = np.array([fold_of(t, "outer") == 0 for t in found])[choices.question]
    np.testing.assert_array_equal(before[own], after[own])
    assert not np.array_equal(before[~own], after[~own])


def test_the_finished_planner_is_read_off_a_log_of_other_questions(log, tmp_path):
    """Nothing is fitted to, or picked on, the test log: turning its outcomes round changes no choice, but every result."""
    other = write_log(tmp_path / "other", depends, seed=1, count=60)
    turned = write_log(tmp_path / "turned", lambda *how: not depends(*how), seed=1, count=60)
    rows, reverse = (named(fit_planner([log], "nano-s", tests=[one]).tested) for one in (other, turned))
    assert rows["planner"].questions == 60
    assert rows["planner"].accuracy > 0.95
    assert rows["blind planner"].accuracy < 0.7
    assert rows["question-only planner"].accuracy < 0.85
    for name in ("best arm", "blind planner", "question-only planner", "planner"):
        assert reverse[name].accuracy == pytest.approx(1 - rows[name].accuracy), name
        assert (reverse[name].tokens, reverse[name].acts) == (rows[name].tokens, rows[name].acts), name


def made(outcomes, features, *, name="q{}", price=0.0):
    """Questions whose one choice is to leave the model alone or to end at once; ``outcomes``: whether each is right."""
    alike = [
        {"alone": Outcome("cot", bool(alone), 200), "termination": Outcome("at-once", bool(ended), 10)}
        for alone, ended in outcomes
    ]
    found = [Tree("d", name.format(n), Node((), dict(ends)), {o.arm: o for o in ends.values()}) for n, ends in enumerate(alike)]
    rows, names = np.arange(len(found)), ("alone", "termination", "untried")
    return Choices(names, 0, price, found, [tree.root for tree in found], rows, np.array(features, dtype=float))


def test_a_question_is_not_tested_that_was_fitted_to_under_another_name():
    choices, asked = made([(0, 1)] * 3, np.ones((3, 2))), made([(0, 1)] * 3, np.ones((3, 2)), name="other{}")
    texts = {("d", f"q{n}"): f"What is 7*{n}?" for n in range(3)} | {("d", f"other{n}"): f"And 7*{n}?" for n in range(3)}
    _check_disjoint(choices, asked, texts)
    with pytest.raises(UserError, match=r"1 questions are in both logs \(other1"):
        _check_disjoint(choices, asked, texts | {("d", "other1"): "what is  7*2?"})


def test_the_gate_opens_by_chance_in_one_case_of_twenty_and_where_there_is_a_gain():
    """Twenty thresholds are tried, most of them on few questions: their bounds must hold together."""
    rng = np.random.default_rng(0)

    def opens(count, discordant, gain, spread):
        gains = np.clip(gain + spread * rng.standard_normal(count), -discordant, discordant)
        differs, wins = rng.random(count) < discordant, rng.random(count) < 0.5 + gains / discordant / 2
        predicted = gains + 0.05 * rng.standard_normal(count)
        thresholds = np.maximum(0.0, np.quantile(predicted, np.linspace(0, 0.95, 20)))
        return lower_bounds(differs * np.where(wins, 1.0, -1.0) * (predicted > thresholds[:, None])).max() > 0

    nothing = [opens(count, discordant, 0, 0) for count in (60, 200) for discordant in (0.2, 0.4) for _ in range(50)]
    assert np.mean(nothing) < 0.08
    assert np.mean([opens(500, 0.25, 0.06, 0.1) for _ in range(20)]) > 0.95


def test_a_small_saving_is_not_sure_before_losses_could_have_been_seen():
    features = np.random.default_rng(0).standard_normal((60, 2))
    assert np.isinf(fit(made([(1, 1)] * 60, features, price=0.05), np.ones(60, dtype=bool)).threshold)
    assert fit(made([(1, 1)] * 60, features, price=1.0), np.ones(60, dtype=bool)).threshold < 1


def test_a_closed_gate_leaves_no_slope():
    """Features unlike those that were fitted to must not talk the planner out of leaving the model alone."""
    rng = np.random.default_rng(0)
    features = np.hstack([np.ones((60, 1)), rng.standard_normal((60, 3))])
    head = fit(made(rng.random((60, 2)) < 0.5, features), np.ones(60, dtype=bool))
    assert np.isinf(head.threshold)
    assert not head.weights[1:].any()
    assert not (np.hstack([np.ones((50, 1)), 30 * rng.standard_normal((50, 3))]) @ head.weights.T).argmax(1).any()


def test_a_strategy_that_was_not_tried_counts_as_wrong():
    """The planner that is shipped takes it: the rows must not show what the best of the known ones would have got."""
    asked = made([(1, 1), (1, 0)], [[1.0, 0.0], [0.0, 1.0]])
    prefers = Head(np.array([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]), 0.0, 1.0)
    assert [(end.arm, end.right, end.tokens) for end in played(asked, prefers)] == [("stray", False, 200), ("cot", True, 200)]
    choices = made([(0, 1)] * 30, np.eye(2)[np.arange(30) % 2])
    rows, strays = on_tests(choices, prefers, asked)
    assert (named(rows)["planner"].accuracy, strays) == (0.5, 0.5)


def test_arms_may_stand_in_another_order_in_the_test_log():
    choices, turned = made([(0, 1)], np.ones((1, 1))), made([(0, 1)], np.ones((1, 1)))
    (tree,) = turned.trees
    turned.trees[0] = replace(tree, outcomes=dict(reversed(tree.outcomes.items())))
    assert flat(turned).names == flat(choices).names
    assert flat(turned).null == flat(choices).null


def test_the_study_of_what_pays_sets_the_planner_beside_its_rivals(log, tmp_path):
    """Votes, cascade and best arm are those made by hand; what is picked is picked on the log that is fitted to."""
    other = write_log(tmp_path / "other", depends, seed=1, count=60)
    chains = [r for r in other.records() if r["arm"] == "cot"]
    asked = [
        c | {"arm": "router", "answer": ("stop", "None of them")[n % 2], "sampled": 4, "injected": 6}
        for n, c in enumerate(chains)
    ]
    (other.folder / "piece-0001.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    stops = [r for r in other.records() if r["arm"] == "stop"]
    routed = [(stops[n] if n % 2 == 0 else c)["right"] for n, c in enumerate(chains)]
    votes = tmp_path / "votes"
    votes.mkdir()
    (votes / "log.json").write_text(json.dumps({"settings": {}, "arms": {}, "cascades": [], "runs": []}))
    turned = [c | {"arm": f"cot-{n}", "right": True, "answer": "1"} for c in chains for n in (1, 2)]  # two of three are right
    (votes / "piece-0000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in turned))
    rows = {row.what: row for row in pays.run([str(log.folder)], [str(other.folder)], [str(votes)], planner="nano-s")}
    share = sum(c["right"] for c in chains) / len(chains)
    assert rows["chain of thought: accuracy"].value == pytest.approx(share)
    assert rows["self-consistency, 3 chains: accuracy"].value == 1
    assert rows["self-consistency, 2 chains: accuracy"].value == pytest.approx(share), "a tie goes to the first"
    assert rows["self-consistency, 3 chains: tokens a question, in those of chain of thought"].value == pytest.approx(3)
    assert rows["prompted router: accuracy"].value == pytest.approx(sum(routed) / len(routed))
    assert rows["prompted router: tokens a question, in those of chain of thought"].value == pytest.approx((150 + 10) / 200)
    assert rows["accuracy: planner: accuracy"].value > 0.95
    own = [record for record in log.records() if record["arm"] == "cot"]
    assert rows["cross-fitted, cot: accuracy"].value == pytest.approx(sum(c["right"] for c in own) / len(own))
    assert rows["cross-fitted at 0 a thousand tokens: planner minus chain of thought"].interval[0] > 0
    assert rows["cross-fitted at 0 a thousand tokens: planner minus best arm of each set"].interval[0] > 0
    assert rows["accuracy: planner minus chain of thought"].met
    assert rows["accuracy: planner minus question-only planner"].interval[0] > 0
    assert rows["accuracy: fitted to 100 questions a set, minus chain of thought"].value > 0.2
    assert rows["economy: planner minus chain of thought"].met


def test_who_loses_on_one_data_set_is_inferior():
    gains, data = np.array([0.0] * 950 + [0.0] * 45 + [-1.0] * 5), ["a"] * 950 + ["b"] * 50
    assert pays._harmless("x", gains, ["a"] * 1000).met
    assert not pays._harmless("x", gains, data).met, "b is 10 points below"


def test_a_log_without_texts_is_enough_where_outputs_end_their_steps(log, tmp_path):
    bare = write_log(tmp_path / "bare", depends, texts=False)
    whole = {t.id: [n.steps for n in t.root.walk()] for t in trees(log)}
    assert {t.id: [n.steps for n in t.root.walk()] for t in trees(bare)} == whole


def test_arms_that_part_later_share_their_state(log):
    tree = trees(log)[0]
    assert set(tree.root.branches) == {"alone", "computation", "termination"}
    behind = tree.root.branches["computation"]
    assert isinstance(behind, Node)
    assert {name: end.arm for name, end in behind.branches.items()} == {"termination": "stop", "alone": "check"}
    assert "other" not in tree.outcomes


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model": "another"}, "model"), ({"rules.max_steps": 9}, "rules.max_steps"), ({"strategies": "x"}, "strategies")],
)
def test_logs_of_different_games_are_not_fitted_together(log, tmp_path, change, said):
    other = write_log(tmp_path / "second", depends, **change)
    with pytest.raises(UserError, match=said):
        fit_planner([log, other], "nano-s")


def test_logs_behind_different_system_prompts_are_not_fitted_together(log, tmp_path):
    other = write_log(tmp_path / "second", depends, seed=1)
    header = json.loads((other.folder / "log.json").read_text())
    for name in ARMS:
        header["arms"][name]["system_prompt"] = "Be brief."
    (other.folder / "log.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="differ in system prompt"):
        fit_planner([log, Log(other.folder)], "nano-s")


def test_a_question_that_is_in_two_logs_is_refused(log):
    """It would count twice, and make every interval too narrow."""
    with pytest.raises(UserError, match=r"150 questions are in two logs \(q0"):
        fit_planner([log, log], "nano-s")


def test_the_arm_that_leaves_the_model_alone_need_not_be_the_first(log):
    choices = made([(0, 1)], np.ones((1, 1)))
    (tree,) = choices.trees
    choices.trees[0] = replace(tree, outcomes=dict(reversed(tree.outcomes.items())))
    assert next(iter(choices.trees[0].outcomes)) != null_arm(choices) == "cot"


def test_too_few_questions_and_a_folder_that_is_there(tmp_path):
    few = write_log(tmp_path / "few", depends, count=10)
    with pytest.raises(UserError, match="10 questions"):
        fit_planner([few], "nano-s")
    answer = CliRunner().invoke(app, ["fit", str(few.folder), "--out", str(tmp_path)])
    assert isinstance(answer.exception, UserError)


def test_what_a_branch_is_worth_on_average_is_known_for_each_level():
    """To end at once is always wrong, and behind an output three times of four right: however little the states tell beyond
    that, neither may be taken for the mean of both."""
    rng = np.random.default_rng(0)
    nodes, found = [], []
    for n in range(100):
        ends = {"termination": Outcome("program", n % 4 < 3, 100), "alone": Outcome("program-then-alone", False, 150)}
        node = Node((("computation", "1+1"),), dict(ends))
        first = {"alone": Outcome("cot", n % 2 == 0, 200), "termination": Outcome("at-once", False, 10)}
        nodes += [node, Node((), first | {"computation": node})]
        found.append(Tree("d", f"q{n}", nodes[-1], {o.arm: o for o in [*ends.values(), *first.values()]}))
    levels = np.eye(2)[np.arange(200) % 2]
    features = np.hstack([levels, rng.standard_normal((200, 150))])
    names = ("alone", "termination", "computation")
    choices = Choices(names, 0, 0.0, found, nodes, np.arange(200) // 2, features)
    scores = features @ fit(choices, np.ones(100, dtype=bool), gated=False).weights.T / 20
    behind, at_once = (scores[row::2, 1] - scores[row::2, 0] for row in (0, 1))
    assert at_once.mean() == pytest.approx(-0.5, abs=0.03)
    assert behind.mean() == pytest.approx(0.75, abs=0.03)


def test_a_gain_that_is_the_same_everywhere_opens_the_gate():
    """A blind planner predicts one gain for all; a threshold that leaves some of them out would see too few."""
    outcomes = [(0, 1)] * 8 + [(1, 0)] + [(1, 1)] * 31
    head = fit(made(outcomes, np.ones((40, 1))), np.ones(40, dtype=bool))
    assert np.isfinite(head.threshold)
