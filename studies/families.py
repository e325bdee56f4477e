"""Every causal LM family of the installed transformers, tiny and with random weights: played as it is, or refused in one line.

Each is saved and loaded as a reasoner, and as the base of a planner. Played, in float32: greedy tokens are the likeliest of one
plain forward pass (``generate`` without its cache: Moshi's own forgets its window), the sampler's and the trainer's log-probs
are that one's, a planner's log-probs the stock classifier's. In bfloat16: they are as near to those of the same weights in
float32 as the plain forward pass in bfloat16 is. One that transformers cannot build is a folder with its config: what is told
of that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rsim.config import RolloutConfig
from rsim.engine import packed
from rsim.errors import UserError, first_line
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.loading import load_planner, load_reasoner, new_planner, quiet_models
from rsim.policies.strategies import load_strategies
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import reasoner_batch
from studies.ledger import Row

ISSUE = 13
_QUESTIONS = ("4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?")
_RULES = RolloutConfig(max_steps=3, step_tokens=10, max_tokens=36, answer_tokens=6, delimiter="\n", batch=64)
_LARGEST = 30e6  # parameters of what is still tiny
_EXACT = 1e-3  # nats
_ROUNDING = 2.0  # times the mean error of the plain forward pass in bfloat16
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
# Where a config knows the name; six layers, so that every kind of layer is there.
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": 512, "initializer_range": 0.3, "sliding_window": 12,
    "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8, "moe_intermediate_size": 24, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 12, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1, "state_size": 8, "d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "is_decoder": True,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8, "shared_experts_intermediate_size": 24,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
    "hc_lowrank": 8, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_dim": 48,
}  # fmt: skip
_NO_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_OWN: dict[str, dict[str, Any]] = {  # what makes some of them tiny, or possible; of a part, what is passed on to it
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROTARY)},
    "cpmant": {"dim_ff": 48},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 6},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_assistant": {"text_config": _NO_INPUTS},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 12},
    "gptj": {"rotary_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def run(
    only: Annotated[list[str] | None, typer.Option(help="Families; repeatable. By default all.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 4,
) -> Iterator[Row]:
    families = sorted(only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found: dict[str, list[str]] = {what: [] for what in _TRIED}
    with ProcessPoolExecutor(jobs) as processes:
        for family, told in zip(families, processes.map(_tried, families), strict=True):
            for what, outcome in told.items():
                found[what].append(outcome)
            yield Row(family, "; ".join(f"{what} {outcome}" for what, outcome in told.items()))
    for what, every in found.items():
        for kind in ("played", "refused"):
            yield Row(f"{what}s {kind}", sum(o.startswith(kind) for o in every), "families")
        for kind in ("different", "error"):
            count = sum(o.startswith(kind) for o in every)
            yield Row(f"{what}s: {kind}", count, "families", "0", count == 0)


def _tried(family: str) -> dict[str, str]:
    quiet_models()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        built = _outcome(lambda: _save(family, Path(folder)))
        outcomes = {what: built if built != "built" else _outcome(lambda: play(folder)) for what, play in _TRIED.items()}  # noqa: B023
    return {what: outcome.replace(folder, "FOLDER") for what, outcome in outcomes.items()}


def _outcome(do: Callable[[], str]) -> str:
    try:
        return do()
    except UserError as error:
        return f"refused: {str(error).removesuffix(packed.REMEDY).removesuffix(': ')}"
    except Exception as error:  # what a user would see as a traceback
        return f"error: {type(error).__name__}, {first_line(error)[:120]}"


def _save(family: str, folder: Path) -> str:
    """A tiny model of ``family`` in ``folder``; no weight of it is zero or one. One that transformers cannot build has none."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 2}
    config = _tiny(CONFIG_MAPPING[family], ends | {"vocab_size": len(tokenizer)} | _SIZES)
    try:
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception:  # of transformers' own, whatever its config: the user's folder has weights that it cannot take
        config.save_pretrained(folder)
        save_file({}, folder / "model.safetensors", {"format": "pt"})
        return "built"
    if size > _LARGEST:
        raise ValueError(f"{family}: {size / 1e6:.0f} million parameters")
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    return "built"


def _tiny(kind: Any, sizes: dict[str, Any]) -> Any:
    own = _OWN.get(kind.model_type, {})
    default = kind(**{name: own[name] for name in kind.sub_configs if name in own})
    known = set(default.to_dict()) | set(default.attribute_map)
    parts = {
        name: _tiny(type(part), sizes | own.get(name, {}))
        for name in kind.sub_configs
        if (part := getattr(default, name, None))
    }
    given = {name: size for name, size in sizes.items() if name in known and name not in parts}
    if getattr(default, "sliding_window", None) is None:
        given.pop("sliding_window", None)
    if "kv_lora_rank" in known:  # latent attention has no groups
        given["num_key_value_heads"] = given["num_attention_heads"]
    return kind(**{default.attribute_map.get(name, name): size for name, size in (given | own).items()} | parts)


def _reasoner(folder: str) -> str:
    problems = [Problem(question, "1") for question in _QUESTIONS]
    same, found = 0, {}
    for dtype in ("float32", "bfloat16"):
        reasoner = load_reasoner(folder, device="cpu", dtype=dtype)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=reasoner.model.dtype).eval()
        if dtype == "float32":
            for e in Game(reasoner, None, _RULES).play(problems, seed=0, greedy=True):
                likeliest = plain(torch.tensor([e.token_ids]), use_cache=False).logits[0].argmax(-1).tolist()
                same += likeliest[e.prompt_length - 1 : -1] == e.token_ids[e.prompt_length :]
        episodes = Game(reasoner, None, _RULES).play(problems, seed=1, group_size=2)
        settings = AgentSettings(temperature=1.0, learning_rate=0.0)
        agent = Agent("reasoner", reasoner.model, reasoner.logits, settings, head_weight=reasoner.head_weight)
        trained = agent.evaluate(reasoner_batch(episodes, torch.device("cpu"))).logprobs.detach()
        own = [_sampled(plain, e) for e in episodes]
        right = [_sampled(plain.float(), e) for e in episodes]
        ours = [torch.tensor([p for p, sampled in zip(e.logprobs, e.reasoner_mask, strict=True) if sampled]) for e in episodes]
        theirs = [row[: len(one)] for row, one in zip(trained, ours, strict=True)]
        found[dtype] = [torch.cat(rows) - torch.cat(right) for rows in (ours, theirs, own)]
    return _judged(found, f"greedy equal in {same} of {len(problems)}, log-probs", same == len(problems))


@torch.no_grad()
def _sampled(model: Any, e: Episode) -> torch.Tensor:
    """Log-probs of an episode's sampled tokens by the model's own forward pass."""
    at = torch.tensor([t for t, sampled in enumerate(e.reasoner_mask) if sampled])
    ids = torch.tensor([e.token_ids])
    table = torch.log_softmax(model(ids, use_cache=False).logits[0].float(), -1)
    return table[at - 1, ids[0, at]]


@torch.no_grad()
def _planner(folder: str) -> str:
    strategies, found = load_strategies("lab"), {}
    for dtype in ("float32", "bfloat16"):
        planner = load_planner(folder, strategies, seed=0, device="cpu", dtype=dtype)
        stock = new_planner(folder, strategies, seed=0, dtype=planner.model.dtype).model.eval()
        for model in (planner.model, stock):
            model.score.weight.mul_(50)  # a sure planner: one that is not says nearly the same of all
        session = planner.begin(len(_QUESTIONS))
        slots = list(range(len(_QUESTIONS)))
        session.start(slots, list(_QUESTIONS))
        ours, read = [], []
        for _ in range(3):
            for slot, decision in zip(slots, session.decide(slots, [0.5] * len(slots), 1.0), strict=True):
                ours.append(torch.tensor(decision.probabilities).log())
                read.append(torch.tensor([session.ids(slot)]))
                session.observe(slot, strategies.names[slot], "4*17=68\n")
        own = [torch.log_softmax(stock(ids).logits[0].float(), -1) for ids in read]
        stock.float()
        right = [torch.log_softmax(stock(ids).logits[0], -1) for ids in read]
        found[dtype] = [torch.cat(rows) - torch.cat(right) for rows in (ours, own)]
    return _judged(found, "log-probs", True)


def _judged(errors: dict[str, list[torch.Tensor]], what: str, same: bool) -> str:
    """Of log-probs by rsim, and last by the model's own forward pass, against that one in float32."""
    *ours, _ = errors["float32"]
    exact = max(float(error.abs().max()) for error in ours)
    *halves, own = [float(error.abs().mean()) for error in errors["bfloat16"]]
    played = same and exact < _EXACT and max(halves) <= _ROUNDING * own + _EXACT
    told = f"within {exact:.1g}; in bfloat16 {max(halves):.1g} off, by itself {own:.1g}"
    return f"{'played' if played else 'different'} ({what} {told})"


_TRIED: dict[str, Callable[[str], str]] = {"reasoner": _reasoner, "planner": _planner}
