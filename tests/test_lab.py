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
from rsim.answers.extract import extract
from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.lab.behaviour import write_solution
from rsim.lab.expressions import parse, render, value_of
from rsim.lab.oracle import _pick, oracle_planner
from rsim.lab.pretrain import SIZES, PretrainConfig, batches, documents, pretrain
from rsim.lab.problems import FAMILIES, OUTSIDE, ProblemMix, encode, sample_problems
from rsim.lab.steps import Rates, start, write_step
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from tiny import tiny_model

SURE = Rates(misread=0.0, head_slip=0.0, bracket_slip=0.0, careful_slip=0.0, catch=1.0)


def test_without_slips_every_solution_is_right():
    rng = random.Random(0)
    for problem in islice(sample_problems("train", 1), 500):
        steps = write_solution(problem, rng, SURE)
        assert extract(steps[-1][1], "strict") is not None
        if len(steps) > 1 and steps[-1][0] == "termination":
            state = start(problem)
            for name, _ in steps[:-1]:
                _, state = write_step(state, name, random.Random(0), SURE)
            if len(state.expression) == 1 and state.expression[0].is_number:
                assert steps[-1][1].strip() == f"\\boxed{{{problem.answer}}}"


def test_the_oracle_policy_solves_every_problem_without_slips():
    mix = ProblemMix(families=dict.fromkeys((*FAMILIES, *OUTSIDE), 1.0))
    for problem in islice(sample_problems("dev", 2, mix), 600):
        state, steps = start(problem), []
        while not state.done:
            name = _pick(render(problem.expression), problem.family, steps)
            text, state = write_step(state, name, random.Random(0), SURE)
            steps.append((name, text))
            assert len(steps) <= 8
        assert steps[-1][1].strip() == f"\\boxed{{{problem.answer}}}"


def test_a_cipher_takes_the_tenth_strategy():
    """Whatever else is tried leaves it as it is, and an answer is a guess; where there is none, decoding does nothing."""
    rng, ten = random.Random(0), load_strategies("lab-ten")
    assert ten.names == (*load_strategies("lab").names, "decoding")
    right = 0
    for problem in islice(sample_problems("train", 4, ProblemMix(families=OUTSIDE)), 300):
        assert problem.question == f"{encode(problem.expression)}=?"
        assert not set(problem.question) & set("0123456789")
        for name in set(ten.names) - {"decoding", "termination"}:
            text, state = write_step(start(problem), name, rng, Rates())
            assert text.endswith(f" so {encode(problem.expression)}")
            assert not state.read
        text, state = write_step(start(problem), "decoding", rng, Rates())
        assert text == f" digits so {render(problem.expression)}"
        assert state.read
        right += write_step(start(problem), "termination", rng, Rates())[0] == f" \\boxed{{{problem.answer}}}"
    assert right < 10
    shown = next(sample_problems("train", 4, ProblemMix(families={"arithmetic": 1.0})))
    assert write_step(start(shown), "decoding", rng, Rates())[0] == f" digits so {render(shown.expression)}"


def test_the_tenth_strategy_is_written_in_the_base_that_knows_it_alone():
    tokenizer = build_tokenizer(tenth="decoding")
    usual = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(range(len(usual)))) == usual.convert_ids_to_tokens(list(range(len(usual))))
    assert [len(tokenizer.encode(text)) for text in ("Decode:", "In digits:", " digits")] == [1, 1, 1]
    texts = {size: [tokenizer.decode(ids) for ids, _ in islice(documents(PretrainConfig(size=size), tokenizer), 400)]
             for size in ("nano-s", "nano-x")}  # fmt: skip
    assert not any(" digits so " in text for text in texts["nano-s"])
    assert sum(" digits so " in text for text in texts["nano-x"]) > 40


def test_every_base_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path))
    for name in set(SIZES) - {"nano-s"}:
        with pytest.raises(UserError, match="rsim lab pretrain"):
            load_reasoner(name)


def test_slips_happen_at_about_their_rates_and_validation_catches_them():
    rng, rates = random.Random(0), Rates()
    slipped = caught = total = 0
    for problem in islice(sample_problems("train", 3), 4000):
        if (
            problem.is_worded
            or not any(t.is_product for t in problem.expression)
            or any(t.is_bracket for t in problem.expression)
        ):
            continue
        _, state = write_step(start(problem), "decomposition", rng, rates)
        total += 1
        if state.slipped:
            slipped += 1
            _, after = write_step(state, "validation", rng, rates)
            caught += after.right
    assert 0.01 < slipped / total < 0.06
    assert caught / slipped > 0.8


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


def test_expressions_parse_back():
    for problem in islice(sample_problems("train", 7), 300):
        assert parse(render(problem.expression)) == problem.expression
        assert value_of(problem.expression) == eval(render(problem.expression))


def test_oracle_knows_only_its_problems(lab_strategies):
    problems = load_problems("lab", "dev", limit=3, seed=0)
    session = oracle_planner(lab_strategies, problems).begin(3)
    session.start([0, 1, 2], [p.question for p in problems])
    for decision in session.decide([0, 1, 2], [0.5] * 3, 1.0):
        assert max(decision.probabilities) == 1
