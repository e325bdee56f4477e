"""The game: token ids, masks, log-probs and flags, and equality with plain decoding."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from rsim.answers.prefix import answer_text
from rsim.engine.decoder import Decoder
from rsim.engine.native import NativeEngine
from rsim.engine.sampling import DelimiterStop, Vocabulary, choose
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies import template
from rsim.policies.loading import load_planner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import StrategySet
from tiny import RULES, tiny_model

QUESTIONS = ["4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?", "x-38=4*17, x=?", "12+13+14+15-9=?"]
PROBLEMS = [Problem(q, "1") for q in QUESTIONS]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_greedy_rollout_equals_generate(architecture):
    reasoner = Reasoner(tiny_model(architecture, seed=3), build_tokenizer())
    played = Game(reasoner, None, replace(RULES, max_tokens=40)).play(PROBLEMS, seed=0, greedy=True)
    lengths = set()
    for episode in played:
        ids = torch.tensor([reasoner.prompt_ids(episode.problem.question)])
        lengths.add(ids.shape[1])
        expected = reasoner.model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
        assert episode.token_ids == expected
    assert len(lengths) > 2, "the prompts must be ragged"


def test_planned_greedy_steps_equal_generate_from_the_recorded_prefix(reasoner, planner):
    for episode in Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True):
        for step in episode.steps:
            prefix = torch.tensor([episode.token_ids[: step.body]])
            count = step.end - step.body
            # A sampled pad token is a token like any other; without a mask, generate would leave it out.
            everything = torch.ones_like(prefix)
            out = reasoner.model.generate(prefix, attention_mask=everything, max_new_tokens=count, do_sample=False)[0].tolist()
            assert episode.token_ids[step.body : step.end] == out[step.body :]


def test_greedy_play_draws_nothing(reasoner, planner):
    """Whatever the seed; sampled decisions differ, though the reasoner's tokens could not tell."""
    hot = replace(RULES, planner_temperature=5.0)
    greedy, drawn = (
        [
            [[d.action for d in e.decisions] for e in Game(reasoner, planner, hot).play(PROBLEMS, seed=s, greedy=g)]
            for s in (0, 1)
        ]
        for g in (True, False)
    )
    assert greedy[0] == greedy[1]
    assert drawn[0] != drawn[1]


def test_a_termination_prompt_may_open_the_box(reasoner, lab_strategies):
    final = replace(lab_strategies[lab_strategies.termination], prompts=("End:", "It is \\boxed{"))
    strategies = StrategySet(tuple(final if s.name == "termination" else s for s in lab_strategies.strategies))
    planner = sequence_planner(strategies, ["continuation", "termination"])
    episodes = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, group_size=4)
    ended = [e for e in episodes if e.steps[-1].strategy == strategies.termination]
    assert {e.steps[-1].answer_prefix for e in ended} == {"", "\\boxed{"}
    for e in ended:
        step = e.steps[-1]
        injected = reasoner.tokenizer.decode(e.token_ids[step.start : step.body])
        assert injected.endswith("boxed{") == bool(step.answer_prefix)
        assert injected == step.prompt
        assert e.final_text == answer_text(step.answer_prefix, step.text)
        assert not any(s.answer_prefix for s in e.steps[:-1])


def test_an_empty_prompt_lets_the_reasoner_go_on_as_it_would(reasoner, lab_strategies):
    """A continuation that costs no token: nothing is injected but what closes a step that was cut."""
    free = StrategySet(tuple(replace(s, prompts=("",)) if s.name == "continuation" else s for s in lab_strategies.strategies))
    planner = sequence_planner(free, ["continuation", "continuation", "termination"])
    for episode in Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True):
        assert episode.steps[0].body == episode.prompt_length
        for step in episode.steps:
            assert (step.body == step.start) == (free.names[step.strategy] == "continuation")
            prefix = torch.tensor([episode.token_ids[: step.body]])
            out = reasoner.model.generate(prefix, attention_mask=torch.ones_like(prefix), do_sample=False,
                                          max_new_tokens=step.end - step.body)[0].tolist()  # fmt: skip
            assert episode.token_ids[step.body : step.end] == out[step.body :]


def test_below_the_gate_nothing_is_injected(reasoner, planner, lab_strategies):
    """The planner is unsure of all it would choose (nine strategies, a random head): no prompt but the forced last one."""
    free = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True)
    highest = max(max(d.probabilities) for e in free for d in e.decisions)
    lowest = min(max(d.probabilities) for e in free for d in e.decisions)
    assert lowest < highest < 1
    for gate, expected in ((lowest, free), (1.0, None)):
        played = Game(reasoner, planner, replace(RULES, gate=gate)).play(PROBLEMS, seed=0, greedy=True)
        if expected is not None:
            assert [e.token_ids for e in played] == [e.token_ids for e in expected]
            continue
        for episode in played:
            assert episode.decisions
            for step in episode.steps:
                assert (step.body == step.start) == (not step.forced)
                assert step.forced or lab_strategies.names[step.strategy] == "continuation"
    some = Game(reasoner, planner, replace(RULES, gate=(lowest + highest) / 2)).play(PROBLEMS, seed=0, greedy=True)
    silent = [s.body == s.start for e in some for s in e.steps if not s.forced]
    sure = [max(d.probabilities) >= (lowest + highest) / 2 for e in some for d in e.decisions]
    assert silent == [not s for s in sure]
    assert any(sure)
    assert not all(sure)


def test_recorded_logprobs_are_those_of_one_plain_forward(reasoner, planner):
    rules = replace(RULES, temperature=1.3)
    for episode in Game(reasoner, planner, rules).play(PROBLEMS, seed=1, group_size=3):
        ids = torch.tensor([episode.token_ids])
        logprobs = torch.log_softmax(reasoner.model(ids).logits[0] / 1.3, -1)
        for t, sampled in enumerate(episode.reasoner_mask):
            expected = float(logprobs[t - 1, episode.token_ids[t]]) if sampled else 0.0
            assert episode.logprobs[t] == pytest.approx(expected, abs=2e-4)


def test_an_answer_may_hold_the_delimiter_where_the_rules_say_so(reasoner, lab_strategies):
    """``answer_to_end``: the last step, and only that one, goes on over delimiters to the end of the turn."""
    planner = sequence_planner(lab_strategies, ["decomposition", "termination"])
    whole = Game(reasoner, planner, replace(RULES, answer_to_end=True, answer_tokens=30, max_tokens=100))
    cut = Game(reasoner, planner, replace(whole.rules, answer_to_end=False))
    long, short = (game.play(PROBLEMS, seed=0, group_size=8) for game in (whole, cut))

    def delimited(episode, step):  # before its last token
        return "\n" in reasoner.tokenizer.decode(episode.token_ids[step.body : step.end - 1])

    assert any(delimited(e, e.steps[-1]) and not e.truncated for e in long)
    for a, b in zip(long, short, strict=True):
        assert not any(delimited(a, s) for s in a.steps[:-1])
        assert not any(delimited(b, s) for s in b.steps)
        assert a.token_ids[: len(b.token_ids)] == b.token_ids
        assert a.truncated == (a.steps[-1].strategy == lab_strategies.termination and a.token_ids[-1] not in reasoner.end_ids)


def test_masks_spans_and_injected_ids(reasoner, planner, lab_strategies):
    allowed = [[tuple(reasoner.injected_ids(p)) for p in s.prompts] for s in lab_strategies.strategies]
    episodes = Game(reasoner, planner, RULES).play(PROBLEMS, seed=2, group_size=4)
    delimiter = reasoner.injected_ids("\n")
    for e in episodes:
        assert len(e.token_ids) == len(e.reasoner_mask) == len(e.logprobs)
        assert e.token_ids[: e.prompt_length] == reasoner.prompt_ids(e.problem.question)
        assert not any(e.reasoner_mask[: e.prompt_length])
        assert len(e.token_ids) - e.prompt_length <= RULES.max_tokens
        for i, step in enumerate(e.steps):
            assert tuple(e.token_ids[step.start : step.body]) in allowed[step.strategy]
            assert not any(e.reasoner_mask[step.start : step.body])
            assert all(e.reasoner_mask[step.body : step.end])
            following = e.steps[i + 1].start if i + 1 < len(e.steps) else len(e.token_ids)
            assert e.token_ids[step.end : following] in ([], delimiter)
            assert not any(e.reasoner_mask[step.end : following])
        assert len(e.decisions) == len(e.steps) - e.forced
        assert e.terminated + e.forced + e.reasoner_ended <= 1 or e.forced
        assert not (e.forced and e.terminated)


def test_planner_decisions_equal_the_stock_classifier_on_each_prefix(reasoner, planner):
    for e in Game(reasoner, planner, RULES).play(PROBLEMS, seed=3, group_size=2):
        for d in e.decisions:
            logits = planner.model(torch.tensor([e.planner_ids[: d.position + 1]])).logits[0]
            expected = torch.softmax(logits, -1)
            assert torch.allclose(torch.tensor(d.probabilities), expected, atol=1e-5)
            assert d.logprob == pytest.approx(float(expected[d.action].log()), abs=1e-4)


def test_planner_stream_is_the_rendered_template(reasoner, planner, lab_strategies):
    for e in Game(reasoner, planner, RULES).play(PROBLEMS, seed=4):
        done = [(lab_strategies.names[s.strategy], s.text) for s in e.steps[: len(e.decisions) - 1]]
        assert planner.tokenizer.decode(e.planner_ids) == template.render(e.problem.question, done)


def test_forced_termination_is_no_decision(reasoner, lab_strategies):
    rules = replace(RULES, max_steps=2)
    fixed = sequence_planner(lab_strategies, ["validation"])
    forced = [e for e in Game(reasoner, fixed, rules).play(PROBLEMS, seed=0, group_size=4) if not e.reasoner_ended]
    assert forced
    for e in forced:
        assert e.forced
        assert not e.terminated
        assert [s.forced for s in e.steps] == [False, False, True]
        assert e.steps[-1].strategy == lab_strategies.termination
        assert len(e.decisions) == 2


def test_a_token_budget_forces_an_answer_in_time(reasoner, lab_strategies):
    rules = replace(RULES, max_steps=50, max_tokens=32)
    fixed = sequence_planner(lab_strategies, ["validation"])
    for e in Game(reasoner, fixed, rules).play(PROBLEMS, seed=0, group_size=4):
        assert len(e.token_ids) - e.prompt_length <= 32
        assert e.forced or e.reasoner_ended


def in_float64(reasoner, planner):
    """Keeps rounding, which differs between batches, from tipping a draw that lies on the edge between two tokens."""
    reasoner.model.double()
    planner.model.double()


@pytest.mark.parametrize("slots", [64, 8])
def test_every_token_is_read_once_and_a_question_once_for_all_its_episodes(reasoner, planner, slots):
    """No padding, no token through the model twice; with few slots a later episode copies what a live one has read."""
    in_float64(reasoner, planner)
    read: list[int] = []
    hook = reasoner.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    together = Game(reasoner, planner, replace(RULES, batch=slots)).play(PROBLEMS, seed=5, group_size=6)
    hook.remove()
    beginnings = [len(reasoner.prompt_ids(q)) - 1 for q in QUESTIONS]
    # An episode's last token is sampled and never read.
    own = [len(e.token_ids) - e.prompt_length for e in together]
    assert sum(read) == sum(beginnings) + sum(own)
    for first in range(0, len(together), 6):
        alone = Game(reasoner, planner, replace(RULES, batch=1)).play(
            [PROBLEMS[first // 6]], seed=5, group_size=6, keys=[str(first // 6)]
        )
        assert [e.token_ids for e in alone] == [e.token_ids for e in together[first : first + 6]]


@pytest.mark.parametrize("slots", [64, 3])
def test_a_system_prompt_is_read_once_for_all_questions(reasoner, lab_strategies, slots):
    in_float64(reasoner, reasoner)
    prompted = replace(reasoner, system_prompt="Ann has 3 boxes of 17, finds 12 pens, how many are there in all of them?")
    read: list[int] = []
    hook = reasoner.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rules, chooser = replace(RULES, batch=slots), random_planner(lab_strategies)
    together = Game(prompted, chooser, rules).play(PROBLEMS, seed=5)
    hook.remove()
    prompts = [reasoner_ids[: e.prompt_length - 1] for e in together for reasoner_ids in [e.token_ids]]
    shared = next(i for i in range(100) if len({p[i] for p in prompts}) > 1)
    assert shared >= 16
    own = [len(e.token_ids) - 1 - shared for e in together]
    assert sum(read) == shared + sum(own)
    for index, problem in enumerate(PROBLEMS):
        alone = Game(prompted, chooser, rules).play([problem], seed=5, keys=[str(index)])
        assert alone[0].token_ids == together[index].token_ids


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_finished_rows_are_replaced_at_once(reasoner, planner, slots):
    """Continuous batching: as long as episodes wait, few slots are idle; whatever moves in the cache, the result is the same."""
    in_float64(reasoner, planner)
    sizes: list[int] = []
    original = NativeEngine.advance

    def advance(engine):
        sizes.append(engine.running)
        return original(engine)

    with patch.object(NativeEngine, "advance", advance):
        few = Game(reasoner, planner, replace(RULES, batch=slots)).play(PROBLEMS, seed=5, group_size=6)
    many = Game(reasoner, planner, RULES).play(PROBLEMS, seed=5, group_size=6)
    assert [e.token_ids for e in few] == [e.token_ids for e in many]
    assert [e.planner_ids for e in few] == [e.planner_ids for e in many]
    busy = sizes[: len(sizes) // 2]  # half way through, episodes are still waiting
    assert sum(busy) > 0.85 * slots * len(busy)
    assert min(busy) >= 0.75 * slots - 1, "a quarter rests at most, until the planner has chosen for all of them"


def test_sampling_does_not_depend_on_the_batch(reasoner, planner):
    whole = Game(reasoner, planner, RULES).play(PROBLEMS, seed=5, group_size=2)
    split = Game(reasoner, planner, replace(RULES, batch=3)).play(PROBLEMS, seed=5, group_size=2)
    assert [e.token_ids for e in whole] == [e.token_ids for e in split]
    other = Game(reasoner, planner, RULES).play(PROBLEMS, seed=6, group_size=2)
    assert [e.token_ids for e in whole] != [e.token_ids for e in other]


@pytest.mark.parametrize("length", [3, 8])
def test_a_sequence_is_moved_also_when_its_slot_is_full(reasoner, length):
    """torch refuses to copy a view of a whole slot into the tensor that it is a view of."""
    decoder = Decoder(reasoner.model, slots=4, capacity=8)
    ids = list(range(5, 5 + length))
    decoder.start([3], [[*ids, 9]])
    decoder.append([3], [ids])
    assert decoder.cache.capacity == 8
    kept = [t[3, :, :length].clone() for t in (*decoder.cache.keys.values(), *decoder.cache.values.values())]
    decoder.move(3, 0)
    assert decoder.cache.lengths == [length, 0, 0, 0]
    moved = [t[0, :, :length] for t in (*decoder.cache.keys.values(), *decoder.cache.values.values())]
    assert all(torch.equal(a, b) for a, b in zip(kept, moved, strict=True))


def test_a_new_game_sees_new_weights(reasoner, planner):
    game = Game(reasoner, planner, RULES)
    before = game.play(PROBLEMS, seed=0, greedy=True)
    with torch.no_grad():
        for p in reasoner.model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    after = game.play(PROBLEMS, seed=0, greedy=True)
    fresh = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0, greedy=True)
    assert [e.token_ids for e in after] == [e.token_ids for e in fresh]
    assert [e.token_ids for e in after] != [e.token_ids for e in before]


def test_end_is_seen_when_padding_is_the_end_token(reasoner, lab_strategies):
    reasoner.tokenizer.pad_token = reasoner.tokenizer.eos_token
    for e in Game(reasoner, random_planner(lab_strategies), RULES).play(PROBLEMS, seed=0, group_size=8):
        end = reasoner.tokenizer.eos_token_id
        for step in e.steps:
            sampled = e.token_ids[step.body : step.end]
            assert end not in sampled[:-1]
            assert step is e.steps[-1] or sampled[-1] != end


def test_too_long_a_question_is_refused(reasoner, planner):
    with pytest.raises(UserError, match="context"):
        Game(reasoner, planner, RULES).play([Problem("1" * 600, "1")], seed=0)


def test_a_planner_reads_no_further_than_its_context(reasoner, base_folder, lab_strategies):
    """It decides as long as it can; then the answer is asked for. A question that it cannot read is refused."""
    planner = load_planner(str(base_folder), lab_strategies, device="cpu", dtype="float32", seed=0)
    usual = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0)
    shortest = min(len(planner.opening(p.question)) for p in PROBLEMS)
    planner.model.config.max_position_embeddings = limit = max(len(planner.opening(p.question)) for p in PROBLEMS) + 8
    played = Game(reasoner, planner, RULES).play(PROBLEMS, seed=0)
    assert any(e.forced and len(e.steps) <= RULES.max_steps for e in played), "some planner's context was full"
    assert sum(len(e.decisions) for e in played) < sum(len(e.decisions) for e in usual)
    assert all(d.position < limit for e in played for d in e.decisions)
    planner.model.config.max_position_embeddings = shortest
    with pytest.raises(UserError, match="planner's context"):
        Game(reasoner, planner, RULES).play(PROBLEMS, seed=0)


def test_step_end_needs_the_whole_delimiter():
    ends = DelimiterStop(Vocabulary(build_tokenizer(), len(build_tokenizer())), "\n\n")
    newline = build_tokenizer().encode("\n")
    assert not ends.ended(newline)
    assert ends.ended(newline * 2)
    assert newline[0] in ends.touching


def test_choose_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.0, 0.2, 0.3])).expand(4000, 4)
    uniforms = torch.linspace(0, 1 - 1e-7, 4000)
    picked, logprobs = choose(logits, 1.0, uniforms)
    share = torch.bincount(picked, minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=1e-3)
    assert torch.allclose(logprobs.exp(), torch.tensor([0.5, 0.0, 0.2, 0.3])[picked])
