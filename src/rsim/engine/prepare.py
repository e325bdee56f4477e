"""A model made ready for packed and cached passes, and the check that it says in them what it says by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rsim.engine import packed
from rsim.engine.cache import CachedLayout, SlotCache
from rsim.errors import UserError, first_line
from rsim.models.device import precise
from rsim.models.shape import logits

_LENGTHS = (9, 6)  # tokens of the two texts that are read
# How far log-probs may be off, as a share of their spread over the vocabulary: rounding alone, in TF32 too.
_SHARES = {torch.float64: 1e-4, torch.float32: 1e-2}
_ROUGH_SHARE = 0.15  # of weights whose kernels take no float32 (FP8, GPTQ, ...): in bfloat16 rounding moves experts' routes
_NUMBERS = ("layer_idx", "layer_id", "layer_index")  # attributes that tell one layer from the next, no more
_LAYERS = {"full_attention", "sliding_attention", "attention"}


def prepare(model: PreTrainedModel) -> None:
    """Lets ``model``, a causal LM or a classifier, read packed streams (`rsim.engine.packed`), once and for all.

    Two short texts are read side by side, in two passes over a cache; the log-probs must be those of the model's own forward
    pass, and that one must stay what it was. This catches layers that keep a state of their own from token to token, attention
    that is more than scores of queries and keys, and heads that do more than `rsim.models.shape.logits` knows.

    Raises:
        UserError: it does not pass.
    """
    if packed.attached(model):
        return
    name = type(model).__name__
    kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _LAYERS)
    if kinds:
        raise UserError(f"{name} has layers of kind {', '.join(kinds)}", packed.REMEDY)
    how = getattr(model.config, "quantization_config", None)
    rough = getattr(model, "is_quantized", False) and not getattr(how, "load_in_4bit", False)
    try:
        if rough:
            off = _difference(model)
        else:
            with _in_float32(model):
                off = _difference(model)
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code makes of a pass that it was not written for
        raise UserError(f"{name} cannot read packed streams ({first_line(error)})", packed.REMEDY) from error
    if not off <= (_ROUGH_SHARE if rough else _SHARES.get(model.dtype, _SHARES[torch.float32])):
        raise UserError(
            f"{name} says something else in packed passes: log-probs are off by {off:.2g} of their spread", packed.REMEDY
        )


@torch.no_grad()
def _difference(model: PreTrainedModel) -> float:
    """How far log-probs are off after `packed.attach`, as a share of their spread."""
    texts = _texts(model)
    with _shortened(model):
        own = [_own(model, text) for text in texts]
    packed.attach(model)
    with _shortened(model):
        found = [_own(model, texts[0]), *_packed(model, texts)]
    return max(_off(rows, expected) for rows, expected in zip(found, [own[0], *own], strict=True))


@contextmanager
def _shortened(model: PreTrainedModel) -> Iterator[None]:
    """``model`` with as many of its layers, from the first, as show each kind of them: alike ones run the same code, and all of
    them would cost as much as loading the model. A stack of another name stays as it is."""
    layers = dict(model.base_model.named_children()).get("layers")
    if not isinstance(layers, torch.nn.ModuleList):
        yield
        return
    named = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    kinds = [_kind(layer) + str(name) for layer, name in zip(layers, named, strict=False)] or [""]
    model.base_model.layers = layers[: max(2, 1 + max(map(kinds.index, kinds)))]
    try:
        yield
    finally:
        model.base_model.layers = layers


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """What of ``model`` is read, in float32, and then as it was: in bfloat16 rounding alone moves experts' routes by more than
    some families' own attention moves log-probs. Half precision goes there and back exactly; weights in 4 bits stay what they
    are and are multiplied in float32."""
    with _shortened(model):
        halves = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
        # PEFT's adapter of such a layer has its name too, but multiplies nothing in 4 bits
        fours = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and "compute_dtype" in vars(m)]
    kinds = [half.dtype for half in halves]
    products = [four.compute_dtype for four in fours]
    for half in halves:
        half.data = half.data.float()
    for four in fours:
        four.compute_dtype = torch.float32
    try:
        yield
    finally:
        for half, kind in zip(halves, kinds, strict=True):
            half.data = half.data.to(kind)
        for four, product in zip(fours, products, strict=True):
            four.compute_dtype = product


def _kind(layer: torch.nn.Module) -> str:
    """What the code of a layer goes by: classes, shapes, plain attributes; not its number, not its weights."""
    parts = []
    for module in layer.modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k not in _NUMBERS}
        shapes = [(k, tuple(p.shape)) for k, p in (*module._parameters.items(), *module._buffers.items()) if p is not None]
        parts.append((type(module), sorted(plain.items()), shapes))
    return str(parts)


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logits ``[tokens, outputs]``; a classifier says only the last row of ``expected``."""
    found, expected = (torch.log_softmax(precise(t), -1) for t in (found[-len(expected) :], expected))
    return float((found - expected).abs().mean() / (expected.std(-1, correction=0).mean() + 1e-4))


def _texts(model: PreTrainedModel) -> list[torch.Tensor]:
    """Ids that are no special tokens, spread over the vocabulary."""
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])}
    size = model.get_input_embeddings().weight.shape[0]
    step = max(1, size // 20)
    ids = [i for i in range(size // 2, size // 2 + size) if i % size not in special]
    chosen = [ids[n * step % len(ids)] % size for n in range(sum(_LENGTHS))]
    return list(torch.split(torch.tensor(chosen, device=model.device), list(_LENGTHS)))


def _own(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    """Logits of the model's own forward pass, ``[tokens, vocabulary]`` or ``[1, labels]``."""
    hooks = []
    if model.get_output_embeddings() is None:
        score = model.score
        kind = next(score.parameters()).dtype
        hooks = [score.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(kind),))]
    found: torch.Tensor = model(input_ids=text[None], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found.reshape(-1, found.shape[-1])


def _packed(model: PreTrainedModel, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of all but the last tokens of both texts in one packed pass, and then of the last ones."""
    cache = SlotCache(len(texts), max(_LENGTHS), model.get_input_embeddings().weight.dtype, model.device)
    slots = list(range(len(texts)))
    found = []
    for parts in ([text[:-1] for text in texts], [text[-1:] for text in texts]):
        counts = [len(part) for part in parts]
        layout = CachedLayout(cache, slots, counts)
        hidden = packed.forward(model, torch.cat(parts), layout.positions, layout)
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        found.append(torch.split(logits(model, hidden), counts))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
