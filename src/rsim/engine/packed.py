"""One forward pass over many sequences of different lengths, without padding.

The sequences' tokens lie one after the other in a *packed stream* ``[1, N]``, so that every matrix product of the model works
on real tokens only. Attention alone must know which token belongs to which sequence: a `Layout` says so. The model stays
the stock one: transformers hands the queries, keys and values of each layer to the attention function named here, which
hands them to the layout.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rsim.engine.layers import speed_up
from rsim.engine.rotary import factors
from rsim.errors import UserError
from rsim.models.device import precise

_SDPA, _EAGER = "rsim_packed", "rsim_packed_eager"
_HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
REMEDY = "use a Llama-, Qwen-, Mistral- or Gemma-like model, or let a server play it (--upstream)"


@dataclass(frozen=True)
class Scores:
    """How a layer makes its attention scores.

    ``window``: a token sees only the last so many tokens, itself included. ``softcap``: scores stay within plus and minus
    this. ``sinks`` ``[heads]``: a score for each head that takes its share of the attention and gives nothing.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class Layout(Protocol):
    """Who attends to whom in a packed stream of ``N`` tokens."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
        """``query [heads, N, d]``, ``key [kv_heads, N, d]`` and ``value [kv_heads, N, e]`` to ``[N, heads, e]``."""


def attached(model: PreTrainedModel) -> bool:
    """Whether `attach` was here."""
    return model.config._attn_implementation in (_SDPA, _EAGER)


def attach(model: PreTrainedModel) -> None:
    """Lets ``model`` read packed streams (see `forward`); its ordinary forward pass keeps PyTorch's SDPA, or where it has none
    the model's own attention. (`rsim.engine.prepare` also checks that it says the same in both.)

    Turns cuDNN's attention off for the whole process: it plans anew for every new shape, and while sampling every token brings
    one (a forward pass of a model of 1.5B in bfloat16 took 90 to 106 ms with it, on an H100, and 45 without, on an H200).
    Checkpointed layers run again in the backward pass, so a context around the forward pass would not do.

    Raises:
        UserError: the architecture is not built on transformers' attention interface.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    speed_up(model)
    model.set_attn_implementation(_EAGER if model.config._attn_implementation == "eager" else _SDPA)
    if not attached(model):
        raise UserError(f"{type(model).__name__} is not built on transformers' attention interface", REMEDY)


def forward(
    model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, long: torch.Tensor | None = None
) -> torch.Tensor:
    """Final hidden states ``[N, hidden]`` of a packed stream; ``model`` must be prepared.

    Args:
        ids: ``[N]`` token ids, sequence by sequence as ``layout`` expects them.
        positions: ``[N]``, each token's place in its own sequence.
        long: ``[N]``, which tokens are of sequences that outgrow the model's first range (`rsim.engine.rotary`).
    """
    no_mask = ids.new_zeros((1, 1, 1, 1))  # four dimensions: transformers makes no mask of its own
    with factors(model, long):
        output = model.base_model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=no_mask, use_cache=False, packed=layout
        )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Attention with fewer key/value heads than query heads (GQA), the query heads of a group stacked along the queries:
    no key or value is ever repeated.

    Args:
        query: ``[b, heads, w, d]``.
        key, value: ``[b, kv_heads, u, d]`` and ``[b, kv_heads, u, e]``; views will do.
        mask: what `additive_mask` makes, ``[b, 1, heads / kv_heads * w, u]``.

    Returns:
        ``[b, w, heads, e]``.
    """
    b, heads, w, d = query.shape
    kv_heads = key.shape[1]
    stacked = query.reshape(b, kv_heads, heads // kv_heads * w, d)
    if scores.softcap is not None or scores.sinks is not None:
        out = _written_out(stacked, key, value, mask, scores)
    elif w == 1 and query.device.type == "cpu":
        # PyTorch's kernel for CPUs is faster with single queries; its masks are then not per head.
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, :, :1], scale=scores.scaling, enable_gqa=True)
    else:
        out = scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scores.scaling)
    return out.reshape(b, heads, w, value.shape[-1]).transpose(1, 2)


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, how: Scores) -> torch.Tensor:
    """Attention with what PyTorch's kernels do not know; ``query [b, kv_heads, rows, d]``, a group's heads one by one."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if how.scaling is None else how.scaling)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores + mask
    if how.sinks is not None:
        b, kv_heads, rows, _ = scores.shape
        sinks = how.sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1)
        sinks = sinks.expand(b, -1, -1, rows // sinks.shape[2], -1).reshape(b, kv_heads, rows, 1)
        scores = torch.cat([scores, sinks], -1)
    shares = torch.softmax(precise(scores), -1).to(value.dtype)
    return shares[..., : key.shape[2]] @ value


def additive_mask(visible: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """``visible [b, w, u]`` (bool) as the mask of `grouped_attention` for ``group`` query heads per key/value head."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    b, w, u = mask.shape
    return mask[:, None].expand(b, group, w, u).reshape(b, 1, group * w, u)


def _packed_or(own: Any) -> Any:
    """What transformers calls in each layer: the layout's attention in a packed pass, else ``own``."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed: Layout | None = None,
        **how: Any,
    ) -> Any:
        if packed is None:
            if attention_mask is not None and attention_mask.dtype == torch.long:  # that of `forward`
                raise UserError(f"{type(module).__name__} is not told about packed passes", REMEDY)
            return own(module, query, key, value, attention_mask, **how)
        scores = Scores(*(how.pop(name, None) for name in ("scaling", "sliding_window", "softcap", "s_aux")))
        given = {name: value for name, value in how.items() if value is not None and name not in _HARMLESS}
        unknown = [name for name, value in given.items() if (name, value) != ("is_causal", True)]
        if unknown:
            raise UserError(f"{type(module).__name__} asks for attention with {', '.join(unknown)}", REMEDY)
        return packed.attend(module.layer_idx, query[0], key[0], value[0], scores)[None], None

    return attention


def _own_eager(module: Any, *tensors: Any, **how: Any) -> Any:
    """The attention that is written in the model's own file, for those that PyTorch's kernels cannot serve."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *tensors, **how)


AttentionInterface.register(_SDPA, _packed_or(sdpa_attention_forward))
AttentionInterface.register(_EAGER, _packed_or(_own_eager))
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionMaskInterface.register(_EAGER, eager_mask)
