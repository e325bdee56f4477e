"""Model families: played as their own forward pass has it, or refused in one line before anything is played.

Each family that is refused was once played with wrong numbers, or ended in a traceback.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from rsim.engine import packed
from rsim.engine.decoder import Decoder
from rsim.engine.native import NativeEngine
from rsim.engine.prepare import prepare
from rsim.engine.vllm import VllmServers
from rsim.errors import UserError
from rsim.game.engines import check_context
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.models import adapters
from rsim.policies.loading import load_planner, load_reasoner, new_planner
from rsim.policies.planner import Planner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import reasoner_batch
from tiny import RULES, TINY, tiny_model

PROBLEMS = [Problem(q, "1") for q in ("4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?")]
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
PLAYED: dict[str, tuple[str, dict[str, Any]]] = {
    "attention sinks": ("GptOss", {**WINDOWS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "capped scores and logits": (
        "Gemma2",
        {**WINDOWS, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "divided logits": ("Granite", {"logits_scaling": 8.0}),
    "divided logits of experts": ("GraniteMoe", {"logits_scaling": 6.0, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "multiplied logits": ("Cohere", {"logit_scale": 0.25}),
    "multiplied logits, windows": ("Cohere2", {**WINDOWS, "logit_scale": 0.25, "head_dim": 8}),
    "other heads for keys than for values": ("DeepseekV3", LATENT),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "layers of kind conv": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "layers of kind linear_attention": ("Qwen3Next", {**LINEAR, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3_5ForCausalLM has layers of kind linear_attention": ("Qwen3_5", {**LINEAR, "head_dim": 16}),
    "GraniteMoeHybridForCausalLM has layers of kind": (
        "GraniteMoeHybrid",
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "layers of kind chunked_attention": ("Llama4", {"layer_types": ["chunked_attention", "full_attention"], "head_dim": 8}),
    "Bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "RecurrentGemma": ("RecurrentGemma", {"head_dim": 8, "lru_width": 32, "block_types": ["recurrent", "attention"]}),
    "something else in packed passes": ("DiffLlama", {}),
    "not told about packed passes": ("StableLm", {}),
    "Mamba": ("Mamba", {"state_size": 8}),
}


def tiny(family: str, other: dict[str, Any], kind: str = "ForCausalLM") -> hf.PreTrainedModel:
    torch.manual_seed(3)
    config = getattr(hf, f"{family}{'Text' if family in ('Llama4', 'Qwen3_5') else ''}Config")(**(TINY | other))
    model: hf.PreTrainedModel = getattr(hf, family + kind)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("what", PLAYED)
def test_what_a_family_does_beside_plain_attention_is_played_too(what, lab_strategies):
    """Greedy equals generate; the sampler's log-probs and the trainer's are those of the model's own forward pass. (Sinks and
    scales were left out, without a word: log-probs off by up to 4.)"""
    model = tiny(*PLAYED[what])
    plain, reasoner = copy.deepcopy(model), Reasoner(model, build_tokenizer())
    for one in (model, plain):
        one.generation_config.eos_token_id = reasoner.tokenizer.eos_token_id
    for e in Game(reasoner, None, RULES).play(PROBLEMS, seed=0, greedy=True):
        ids = torch.tensor([e.token_ids[: e.prompt_length]])
        written = plain.generate(ids, max_new_tokens=len(e.token_ids) - e.prompt_length, do_sample=False)
        assert written[0].tolist() == e.token_ids
    episodes = Game(reasoner, None, RULES).play(PROBLEMS, seed=1, group_size=2)
    agent = Agent("reasoner", model, reasoner.logits, AgentSettings(1.0, learning_rate=1e-3), head_weight=reasoner.head_weight)
    trained = agent.evaluate(reasoner_batch(episodes, torch.device("cpu"))).logprobs
    for row, e in enumerate(episodes):
        table = torch.log_softmax(plain(torch.tensor([e.token_ids]), use_cache=False).logits[0], -1)
        at = [t for t, sampled in enumerate(e.reasoner_mask) if sampled]
        expected = table[[t - 1 for t in at], [e.token_ids[t] for t in at]]
        assert torch.allclose(torch.tensor([e.logprobs[t] for t in at]), expected, atol=1e-4)
        assert torch.allclose(trained[row, : len(at)], expected, atol=1e-4)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_played_is_refused_in_one_line(what):
    with pytest.raises(UserError, match=what) as refused:
        prepare(tiny(*REFUSED[what]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["GptOss", "Gemma2"])
def test_the_ordinary_forward_pass_stays_what_it_is(family):
    model = tiny(*next(made for made in PLAYED.values() if made[0] == family))
    ids = torch.tensor([[5, 9, 11, 7, 30, 41, 8, 12, 6, 5, 9, 11, 33, 21, 40]])
    before = model(ids).logits
    prepare(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_an_argument_of_attention_that_is_not_known_refuses(monkeypatch):
    model = tiny_model("llama")
    prepare(model)
    layer = model.model.layers[0].self_attn
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda **how: own(**how, position_bias=torch.zeros(1)))
    with pytest.raises(UserError, match="asks for attention with position_bias"):
        Decoder(model, 1, 8).append([0], [[5, 6]])


def test_a_head_that_does_more_than_is_known_is_refused():
    model = tiny_model("llama")
    own = model.forward
    model.forward = lambda *a, **k: type(out := own(*a, **k))(logits=out.logits / 1.5)
    with pytest.raises(UserError, match="log-probs are off by"):
        prepare(model)


def test_the_check_holds_for_planners(lab_strategies, tmp_path):
    """A stock classifier with sinks decides as it does by itself; hybrid ones, and families without one, are refused."""
    for family in ("GptOss", "Lfm2", "Granite", "DiffLlama"):
        tiny(*next(m for m in (*PLAYED.values(), *REFUSED.values()) if m[0] == family)).save_pretrained(tmp_path / family)
        build_tokenizer().save_pretrained(tmp_path / family)
    planner = load_planner(str(tmp_path / "GptOss"), lab_strategies, seed=0, device="cpu")
    stock = new_planner(str(tmp_path / "GptOss"), lab_strategies, seed=0).model
    session = planner.begin(2)
    session.start([0, 1], ["7=?", "4*17+38=?"])
    for slot, decision in zip((0, 1), session.decide([0, 1], [0.5, 0.5], 1.0), strict=True):
        expected = torch.softmax(stock(torch.tensor([session.ids(slot)])).logits[0], -1)
        assert decision.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
    for family, why in {"Lfm2": "no classifier", "Granite": "no classifier", "DiffLlama": "packed passes"}.items():
        with pytest.raises(UserError, match=why):
            load_planner(str(tmp_path / family), lab_strategies, seed=0, device="cpu")


def longrope(kind: str = "ForCausalLM", first: int = 64) -> hf.PreTrainedModel:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 2.0, 3.0, 8.0], "original_max_position_embeddings": first}
    other = {"original_max_position_embeddings": first, "sliding_window": None, "rope_parameters": rope}
    return tiny("Phi3", other | {"max_position_embeddings": 256}, kind)


LONG_AND_SHORT = [PROBLEMS[1], Problem("+".join(["12"] * 25) + "=?", "1"), PROBLEMS[0]]


@pytest.mark.parametrize("room", [0, 12, 1000])
def test_longrope_is_read_by_the_factors_of_its_own_length(room):
    """Up to ``first`` tokens by the short ones; beyond, the whole by the long ones: as in `generate`, whatever lies beside it.
    In training each token has the log-prob of the pass over what lies before it."""
    reasoner = Reasoner(longrope(), build_tokenizer())
    first = len(reasoner.prompt_ids(LONG_AND_SHORT[0].question)) + room  # crossed at once, in the middle, or never
    model = longrope(first=first)
    reasoner = replace(reasoner, model=model)
    plain = copy.deepcopy(model)
    plain.generation_config.eos_token_id = reasoner.tokenizer.eos_token_id
    for one in (model, plain):
        one.config.rope_parameters["attention_factor"] = one.model.rotary_emb.attention_scaling = 1.2
    game = Game(reasoner, None, RULES)
    for e in game.play(LONG_AND_SHORT, seed=0, greedy=True):
        ids = torch.tensor([e.token_ids[: e.prompt_length]])
        count = len(e.token_ids) - e.prompt_length
        said = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        assert said[0].tolist() == e.token_ids
    planned = Game(reasoner, random_planner(load_strategies("lab")), replace(RULES, step_tokens=5))
    for played in (game, planned):
        episodes = played.play(LONG_AND_SHORT, seed=1, group_size=2)
        alone = played.play(LONG_AND_SHORT[:1], seed=1, group_size=2)
        assert [e.token_ids for e in alone] == [e.token_ids for e in episodes[:2]], "whatever lies beside it"
        agent = Agent("reasoner", model, reasoner.logits, AgentSettings(1.0, 1e-3), head_weight=reasoner.head_weight)
        trained = agent.evaluate(reasoner_batch(episodes, torch.device("cpu"))).logprobs
        for row, e in enumerate(episodes):
            at = [t for t, sampled in enumerate(e.reasoner_mask) if sampled]
            said = [plain(torch.tensor([e.token_ids[:t]]), use_cache=False).logits[0, -1] for t in at]
            expected = torch.log_softmax(torch.stack(said), -1)[range(len(at)), [e.token_ids[t] for t in at]]
            assert torch.allclose(torch.tensor([e.logprobs[t] for t in at]), expected, atol=1e-4)
            assert torch.allclose(trained[row, : len(at)], expected, atol=1e-4)


def test_a_failed_pass_at_the_end_of_longropes_first_range_is_tried_again(monkeypatch):
    """The pass that reads a sequence again wrote over its keys: what is kept of them must not be half old, half new, also where
    the sequence moves to another row before the next pass."""
    reasoner = Reasoner(longrope(first=30), build_tokenizer())
    expected = Game(reasoner, None, RULES).play(LONG_AND_SHORT[:1], seed=0, greedy=True)[0].token_ids
    engine = NativeEngine(reasoner, 4, seed=0, temperature=0.0, max_tokens=RULES.max_tokens, longest_prompt=64)
    prompt = reasoner.prompt_ids(LONG_AND_SHORT[0].question)
    assert len(prompt) < 30 < len(expected)
    engine.start([0, 1, 2, 3], [prompt] * 4, list("0123"))
    engine.submit(3, [], RULES.max_tokens, None)
    sample, failed = NativeEngine._sample, []

    def fails(self, slots, hidden):
        if self.decoder.long[3] and len(failed) < 2:  # with others, then alone
            failed.append(1)
            raise RuntimeError("no memory")
        return sample(self, slots, hidden)

    monkeypatch.setattr(NativeEngine, "_sample", fails)
    ended = []
    while not ended:
        try:
            ended = engine.advance()
        except RuntimeError:
            for slot in (0, 1, 2) if len(failed) == 1 else ():  # the next pass moves what is left to the first row
                engine.release(slot)
    assert len(failed) == 2
    assert [*prompt, *ended[0].tokens] == expected


def test_a_question_and_its_tokens_fill_the_context_of_longrope():
    game = Game(Reasoner(longrope(), build_tokenizer()), None, RULES)
    with pytest.raises(UserError, match="context of 256"):
        game.play([Problem("+".join(["12"] * 100) + "=?", "1")], seed=0)


def test_a_planners_scores_are_not_capped(lab_strategies, tmp_path):
    """As a causal LM's logits are (Gemma 2): a sure planner said something else than the stock classifier."""
    tiny(*PLAYED["capped scores and logits"]).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    planner = load_planner(str(tmp_path), lab_strategies, seed=0, device="cpu")
    stock = new_planner(str(tmp_path), lab_strategies, seed=0).model
    for model in (planner.model, stock):
        model.score.weight.data.mul_(50)
    session = planner.begin(1)
    session.start([0], ["4*17+38=?"])
    said = session.decide([0], [0.5], 1.0)[0].probabilities
    expected = torch.softmax(stock(torch.tensor([session.ids(0)])).logits[0], -1)
    assert said == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("limit", [64, 256])
def test_vllm_reads_by_one_set_of_factors(limit):
    """That of its own limit. Log-probs of training would be others."""
    servers = object.__new__(VllmServers)
    servers.context = limit
    reasoner = Reasoner(longrope(), build_tokenizer())
    for prompt, tokens, by_short, by_long in ((10, 40, True, False), (60, 40, False, False), (65, 40, False, True)):
        read = by_long if limit > 64 else by_short
        with nullcontext() if read else pytest.raises(UserError, match="--max-model-len of"):
            check_context(reasoner, prompt, tokens, servers)


def test_planners_of_longrope_models_read_beyond_it(lab_strategies):
    """Each decision is the stock classifier's on what lies before it, in the play, in training and in a fit."""
    planner = Planner(longrope("ForSequenceClassification"), build_tokenizer(), lab_strategies, PlayRules(max_tokens=30))
    stock = longrope("ForSequenceClassification")
    for one in (planner.model, stock):
        one.config.rope_parameters["attention_factor"] = one.model.rotary_emb.attention_scaling = 1.2
    stock.score = planner.model.score
    session = planner.begin(3)
    session.start([0, 1, 2], [p.question for p in LONG_AND_SHORT])
    lengths, positions = [], []
    for _ in range(3):
        for slot, decision in zip((0, 1, 2), session.decide([0, 1, 2], [0.5] * 3, 1.0), strict=True):
            ids = session.ids(slot)
            own = stock.model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert decision.probabilities == pytest.approx(torch.softmax(stock.score(own), -1).tolist(), abs=1e-5)
            if slot == 0:
                lengths.append(len(ids))
                positions.append((len(ids) - 1, own))
            session.observe(slot, lab_strategies.names[0], "12+12=24\n" * 5)
    assert lengths[0] <= 64 < lengths[-1], "it crosses the range"
    states = planner.states([(session.ids(0), [at for at, _ in positions])])
    assert torch.allclose(states, torch.stack([own for _, own in positions]), atol=1e-4)


def test_dynamic_rotary_factors_are_used_up_to_where_they_change():
    """Beyond, they change with every token, and what a question is answered would depend on the questions beside it."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny("Llama", {"rope_parameters": rope, "max_position_embeddings": 64})
    game = Game(Reasoner(model, build_tokenizer()), None, RULES)
    with pytest.raises(UserError, match="context of 64"):
        game.play([Problem("7=?", "1"), Problem("+".join(["12"] * 40) + "=?", "1")], seed=0)


def test_the_check_costs_little():
    """Of passes through a model: three plain and two packed ones of fifteen tokens, whatever its size, by two of alike layers
    (through all thirty of them it took SmolLM2-135M as long as loading it)."""
    model, calls, layers = tiny_model("llama", num_hidden_layers=12), [], []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: layers.append(1))
    prepare(model)
    assert (len(calls), len(layers)) == (5, 10)
    prepare(model)
    assert len(calls) == 5, "once and for all"
    assert packed.attached(model)
    assert len(model.model.layers) == 12


def test_the_check_is_as_strict_in_bfloat16():
    """What moved log-probs by less than rounding may move them passed there: Doge, Blenderbot. Weights come back as they were."""
    model = tiny_model("llama").to(torch.bfloat16)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    prepare(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1])
    model = tiny_model("llama").to(torch.bfloat16)
    own = model.forward
    model.forward = lambda *a, **k: type(out := own(*a, **k))(logits=out.logits * 1.08)
    with pytest.raises(UserError, match="log-probs are off by"):
        prepare(model)


def test_a_layer_of_its_own_kind_is_checked_wherever_it_lies():
    class Odd(hf.models.llama.modeling_llama.LlamaAttention):
        def forward(self, *args, **how):
            out, weights = super().forward(*args, **how)
            return (2 if "packed" in how else 1) * out, weights

    model = tiny_model("llama", num_hidden_layers=8)
    model.model.layers[6].self_attn.__class__ = Odd
    with pytest.raises(UserError, match="something else in packed passes"):
        prepare(model)
    assert len(model.model.layers) == 8


def test_the_check_is_as_strict_in_4_bits(tmp_path):
    """An error of 15% passed there, and Doge's is 6%; products are float32's while it lasts."""
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    for factor in (1.0, 1.08):
        how = adapters.four_bits(torch.bfloat16) | {"dtype": torch.bfloat16}
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
        adapters.keep_unpacked(model)
        own = model.forward
        model.forward = lambda *a, own=own, by=factor, **k: type(out := own(*a, **k))(logits=out.logits * by)
        with nullcontext() if factor == 1 else pytest.raises(UserError, match="log-probs are off by"):
            prepare(model)
        assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
        assert model.dtype == torch.bfloat16


def test_what_its_own_code_cannot_make_of_a_folder_is_one_line(tmp_path):
    """Musicgen has a causal LM that it cannot build from its own config: a traceback, whoever brought one."""
    hf.MusicgenConfig().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot load a reasoner from .*: 'MusicgenConfig' object has no attribute"):
        load_reasoner(str(tmp_path), device="cpu")
