"""One forward pass over many sequences of different lengths, without padding.

The sequences' tokens lie one after the other in a *packed stream* ``[1, N]``, so that every matrix product of the model works
on real tokens only. Attention alone must know which token belongs to which sequence: a `Layout` says so. The model stays
the stock one: transformers hands the queries, keys and values of each layer to the attention function named here, which
hands them to the layout.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rsim.engine.layers import speed_up
from rsim.errors import UserError

_NAME = "rsim_packed"


class Layout(Protocol):
    """Who attends to whom in a packed stream of ``N`` tokens."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """``query [heads, N, d]``, ``key`` and ``value`` ``[kv_heads, N, d]`` to ``[N, heads, d]``.

        ``window``: a token sees only the last so many tokens, itself included (sliding-window layers).
        """


def prepare(model: PreTrainedModel) -> None:
    """Lets ``model`` read packed streams (see `forward`); its ordinary forward pass stays what it is with PyTorch's SDPA.

    Turns cuDNN's attention off for the whole process: it plans anew for every new shape, and while sampling every token brings
    one (a forward pass of a model of 1.5B in bfloat16 took 90 to 106 ms with it, on an H100, and 45 without, on an H200).
    Checkpointed layers run again in the backward pass, so a context around the forward pass would not do.

    Raises:
        UserError: the architecture is not built on transformers' attention interface.
    """
    if model.config._attn_implementation == _NAME:
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    speed_up(model)
    model.set_attn_implementation(_NAME)
    if model.config._attn_implementation != _NAME:
        raise UserError(
            f"{type(model).__name__} is not built on transformers' attention interface",
            "use a Llama-, Qwen-, Mistral- or Gemma-like model",
        )


def forward(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Final hidden states ``[N, hidden]`` of a packed stream; ``model`` must be prepared.

    Args:
        ids: ``[N]`` token ids, sequence by sequence as ``layout`` expects them.
        positions: ``[N]``, each token's place in its own sequence.
    """
    no_mask = ids.new_zeros((1, 1, 1, 1))  # four dimensions: transformers makes no mask of its own
    output = model.base_model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=no_mask, use_cache=False, packed=layout
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention with fewer key/value heads than query heads (GQA), the query heads of a group stacked along the queries:
    no key or value is ever repeated.

    Args:
        query: ``[b, heads, w, d]``.
        key, value: ``[b, kv_heads, u, d]``; views will do.
        mask: what `additive_mask` makes, ``[b, 1, heads / kv_heads * w, u]``.

    Returns:
        ``[b, w, heads, d]``.
    """
    b, heads, w, d = query.shape
    kv_heads = key.shape[1]
    if w == 1 and query.device.type == "cpu":
        # PyTorch's kernel for CPUs is faster with single queries; its masks are then not per head.
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, :, :1], scale=scaling, enable_gqa=True)
    else:
        stacked = query.reshape(b, kv_heads, heads // kv_heads * w, d)
        out = scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, heads, w, d).transpose(1, 2)


def additive_mask(visible: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """``visible [b, w, u]`` (bool) as the mask of `grouped_attention` for ``group`` query heads per key/value head."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    b, w, u = mask.shape
    return mask[:, None].expand(b, group, w, u).reshape(b, 1, group * w, u)


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size of a model's config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return (
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    packed: Layout | None = None,
    **how: Any,
) -> Any:
    """What transformers calls in each layer; ``how`` has the scaling and, where there are any, sliding window and soft cap."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, mask, **how)
    if how.get("softcap") is not None:
        raise UserError("models that cap attention scores (Gemma 2) are not supported", "use another model")
    attended = packed.attend(module.layer_idx, query[0], key[0], value[0], how.get("scaling"), how.get("sliding_window"))
    return attended[None], None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
