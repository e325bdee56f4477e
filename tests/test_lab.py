"""The lab's world: its writer is right when it does not slip, its tokenizer loses nothing, its oracle solves everything."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import rsim.lab.pretrain as pretraining
from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.lab.behaviour import write_solution
from rsim.lab.oracle import needed, oracle_planner
from rsim.lab.pretrain import SIZES, PretrainConfig, batches, documents, pretrain
from rsim.lab.problems import LabProblem, ProblemMix, parse, render, sample_problems
from rsim.lab.steps import Rates, start, write_step
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.loading import load_reasoner
from tiny import tiny_model

SURE = Rates(slip=0.0)


def needs(state):
    """What the oracle would choose, as it reads the state."""
    return needed(str(state)) if state.read else "sub-planning"


def after(problem, *names, rates=SURE, seed=0):
    """The state after some steps."""
    state, rng = start(problem), random.Random(seed)
    for name in names:
        _, state = write_step(state, name, rng, rates)
    return state


def shown(terms):
    return LabProblem("arithmetic", f"{terms}=?", parse(terms))


@pytest.mark.parametrize("slip", [0.0, 0.5, 1.0])
def test_the_needed_steps_solve_every_problem_whatever_slips(slip):
    rng, longest = random.Random(0), 0
    for problem in islice(sample_problems("dev", 2), 500):
        state, steps, text = start(problem), 0, ""
        while not state.done:
            text, state = write_step(state, needs(state), rng, Rates(slip=slip))
            steps += 1
            assert steps <= 12
        longest = max(longest, steps)
        assert text == f" \\boxed{{{problem.answer}}}"
    assert longest > 5, "the limit of 6 steps never binds"


@pytest.mark.parametrize(
    ("terms", "names", "left"),
    [
        ("47+38-26", ["continuation"], "7:15-26"),
        ("47+38-26", ["continuation", "deliberation"], "85-26"),
        ("47+38-26", ["continuation", "continuation"], "5:-1"),  # the carry is forgotten: 75-26
        ("85-19", ["continuation", "decomposition"], "66"),
        ("85-19", ["continuation", "deliberation"], "7:-4"),
        ("85-11", ["continuation", "decomposition"], "6:14"),  # a whole ten is broken
        ("85-11", ["continuation", "validation"], "75"),  # a right digit is spoilt
        ("85-11", ["continuation", "self-reflection"], "74-11"),  # and once more
        ("42+20-30", ["summarization"], "32"),
        ("42+21-30", ["summarization"], "32"),  # the ones of the rest are forgotten
        ("85-(12+5)", ["prioritization"], "85-17"),
        ("85-(12+5)", ["continuation"], "73"),  # half of the bracket is forgotten
        ("85-11", ["sub-planning", "prioritization", "deliberation", "validation", "self-reflection"], "85-11"),
    ],
)
def test_what_each_strategy_does(terms, names, left):
    assert str(after(shown(terms), *names, rates=Rates(slip=0.0, harm=1.0))) == left


def test_a_slip_is_seen_and_put_right_by_its_own_strategy_alone():
    slips = Rates(slip=1.0, harm=1.0)
    doubt = after(shown("42+23"), "continuation", rates=slips)
    lost = after(shown("89-22-31"), "continuation", rates=slips)
    assert (str(doubt), needs(doubt)) == ("?66", "validation")
    assert (str(lost), needs(lost)) == ("~67", "self-reflection")
    rng = random.Random(0)
    assert str(write_step(doubt, "validation", rng, slips)[1]) == "65"
    assert str(write_step(doubt, "self-reflection", rng, slips)[1]) == "?66+23"
    assert str(write_step(lost, "self-reflection", rng, slips)[1]) == "67-31"
    assert str(write_step(lost, "validation", rng, slips)[1]) == "~68"


def test_a_question_in_words_that_is_not_planned_loses_its_last_term():
    problem = next(sample_problems("train", 4, ProblemMix(families={"story": 1.0})))
    assert str(after(problem, "sub-planning")) == render(problem.terms)
    lost = after(problem, "validation", rates=Rates(harm=1.0))
    assert str(lost) == render(problem.terms[:-1])


def test_every_base_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path))
    for name in set(SIZES) - {"nano-s"}:
        with pytest.raises(UserError, match="rsim lab pretrain"):
            load_reasoner(name)


@given(
    st.lists(
        st.sampled_from(
            ["Ann", " has", " \\boxed{", "\n", " ", "  ", "7", "é", "日", "\nNext strategy:", " validation\n", "a b", "'s"]
        ),
        max_size=12,
    )
)
def test_the_tokenizer_is_lossless(words):
    text = "".join(words)
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, architecture):
    """AutoTokenizer picks its class by the model beside it, so this is tested beside each architecture."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_model(architecture).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for problem in islice(sample_problems("train", 5), 200):
        text = problem.question + "".join(text for _, text in write_solution(problem, random.Random(1), Rates()))
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
    chat = [{"role": "user", "content": "7=?"}]
    assert again.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == "<q>7=?<a>"
    assert again.pad_token_id != again.eos_token_id


def test_pretraining_never_sees_a_problem_of_another_split():
    questions = {p.question for s in ("dev", "test") for p in load_problems("lab", s, limit=2000, seed=0)}
    tokenizer = build_tokenizer()
    for ids, head in islice(documents(PretrainConfig(), tokenizer), 500):
        question = tokenizer.decode(ids[:head], skip_special_tokens=True).removeprefix("Question: ").split("\nNext")[0]
        assert question not in questions


def test_every_token_of_a_pool_weighs_the_same():
    config = PretrainConfig(batch=8)
    pool = list(islice(batches(config, build_tokenizer(), pool=4), 4))
    weights = torch.cat([w[w > 0] for _, w in pool])
    assert float(weights.max()) == float(weights.min())
    assert float(weights.sum()) == pytest.approx(4, rel=1e-5), "each batch has weight 1 on average"
    assert len({ids.shape for ids, _ in pool}) > 1


def test_pretraining_is_repeatable_and_its_result_loads(tmp_path):
    results = [pretrain(PretrainConfig(batch=4, steps=2), tmp_path / name, quiet=True) for name in ("a", "b")]
    assert results[0]["loss"] == results[1]["loss"]
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b"))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pretraining_goes_on_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "_KEEP_EVERY", 2)
    config = PretrainConfig(batch=4, steps=5)
    whole = pretrain(config, tmp_path / "whole", quiet=True)
    assert not (tmp_path / "whole" / "partial.pt").exists()

    def stopped(*args):
        yield from islice(batches(*args), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "batches", stopped)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, tmp_path / "cut", quiet=True)
    with pytest.raises(UserError, match="other settings"):
        pretrain(replace(config, seed=1), tmp_path / "cut", quiet=True)
    resumed = pretrain(config, tmp_path / "cut", quiet=True)
    assert (resumed["loss"], resumed["tokens"]) == (whole["loss"], whole["tokens"])
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_second_family_has_another_architecture_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="rsim lab pretrain --size nano-llama"):
        load_reasoner("nano-llama")
    pretrain(PretrainConfig(size="nano-llama", batch=2, steps=1), tmp_path / "nano-llama", quiet=True)
    reasoner = load_reasoner("nano-llama")
    assert reasoner.model.config.model_type == "llama"
    words = build_tokenizer()
    assert len(words.encode("Split it:")) == 1
    assert len(reasoner.tokenizer.encode("Split it:")) == len("Split it:")
    for problem in islice(sample_problems("train", 5), 50):
        assert reasoner.tokenizer.decode(reasoner.tokenizer.encode(problem.question)) == problem.question


def test_terms_parse_back_and_nothing_else_does():
    for problem in islice(sample_problems("train", 7), 300):
        assert parse(render(problem.terms)) == problem.terms
        assert problem.answer == eval(render(problem.terms))
    for text in ("", "4 7", "47+", "47-(12)", "x+4"):
        with pytest.raises(ValueError, match="is no sum"):
            parse(text)


def test_the_oracle_ends_where_a_step_left_nothing_that_can_be_read():
    assert needed("7:") == needed("") == needed("47-(12") == "termination"


def test_oracle_knows_only_its_problems(lab_strategies):
    problems = load_problems("lab", "dev", limit=3, seed=0)
    session = oracle_planner(lab_strategies, problems).begin(3)
    session.start([0, 1, 2], [p.question for p in problems])
    for decision in session.decide([0, 1, 2], [0.5] * 3, 1.0):
        assert max(decision.probabilities) == 1
