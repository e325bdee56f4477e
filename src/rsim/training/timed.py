"""What this machine takes for the parts of a step, timed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Semaphore

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rsim.engine.decoder import Decoder
from rsim.engine.sampling import choose
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.objective.logprobs import token_logprobs
from rsim.training.agent import Agent
from rsim.training.batch import ActionBatch, reasoner_batch

_PATIENCE = 120  # seconds for a process to begin
_SECONDS = 0.5  # for each timing
_TRAINED = 2048  # tokens of a micro-batch that is timed
_PROMPT = 3  # tokens of an injected prompt
_DEPTHS = 1, 3  # layers of the models that are timed
_VOCABULARY = 256  # of theirs


@contextmanager
def among(neighbours: int, threads: int) -> Iterator[None]:
    """Has ``neighbours`` other processes compute with ``threads`` each meanwhile: cores are not always as many as they seem."""
    context = multiprocessing.get_context("spawn")
    begun = context.Semaphore(0)
    others = [context.Process(target=_multiply_on, args=(threads, begun), daemon=True) for _ in range(neighbours)]
    for other in others:
        other.start()
    for _ in others:
        if not begun.acquire(timeout=_PATIENCE):
            raise RuntimeError(f"a process that was to compute meanwhile has not begun within {_PATIENCE} s")
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def _multiply_on(threads: int, begun: Semaphore) -> None:
    torch.set_num_threads(threads)
    matrix = torch.randn(512, 512)
    begun.release()
    while True:
        matrix @ matrix


def pass_seconds(shape: PreTrainedModel, rows: int, length: int) -> float:
    """Seconds of one forward pass of a rollout on this CPU, sampling included: a token for each of ``rows`` sequences, and a
    prompt for one of them, with ``length`` tokens in their caches on average, from none to twice as many.

    Two models of the shape's layers, one layer and three, are given random weights and timed; all layers are reckoned
    from their difference.

    Args:
        shape: a model, with or without its weights.
    """
    config = shape.config.get_text_config()
    one, three = (_pass_seconds(_cut(shape, layers), rows, length) for layers in _DEPTHS)
    layer = max(0.0, (three - one) / (_DEPTHS[1] - _DEPTHS[0]))
    left, head = torch.randn(rows, config.hidden_size), torch.randn(config.vocab_size, config.hidden_size)
    layers: int = config.num_hidden_layers
    uniforms = torch.rand(rows)
    return one + (layers - _DEPTHS[0]) * layer + _mean(lambda: choose(left @ head.T, 1.0, uniforms))


def training_seconds(shape: PreTrainedModel, question: int, sampled: int) -> float:
    """Seconds that a token takes forward and backward on this CPU, the output head included.

    Timed with the layers that `pass_seconds` has, on episodes of one group: a question of ``question`` tokens, then
    ``sampled`` ones for each, some thousand in all.
    """
    config = shape.config.get_text_config()
    rows = max(1, _TRAINED // sampled)
    episode = Episode(Problem("", ""), 0, [1] * (question + sampled), question,
                      [0] * question + [1] * sampled, [0.0] * (question + sampled))  # fmt: skip
    batch = reasoner_batch([episode] * rows, torch.device("cpu"))
    one, three = (_training_seconds(_cut(shape, layers), batch) for layers in _DEPTHS)
    layer = max(0.0, (three - one) / (_DEPTHS[1] - _DEPTHS[0]))
    tokens = question + rows * sampled
    hidden = torch.randn(tokens, config.hidden_size, requires_grad=True)
    head = torch.randn(config.vocab_size, config.hidden_size, requires_grad=True)
    chosen = torch.zeros(tokens, dtype=torch.long)

    def score() -> None:
        token_logprobs(hidden, head, chosen, 1.0)[0].sum().backward()  # type: ignore[no-untyped-call]

    layers: int = config.num_hidden_layers
    return (one + (layers - _DEPTHS[0]) * layer + _mean(score)) / tokens


def _training_seconds(model: PreTrainedModel, batch: ActionBatch) -> float:
    weight = model.get_output_embeddings().weight
    agent = Agent("reasoner", model, model.get_output_embeddings(), temperature=1.0, learning_rate=0.0, weight_decay=0.0,
                  head_weight=weight)  # fmt: skip

    def learn() -> None:
        agent.evaluate(batch).logprobs.sum().backward()  # type: ignore[no-untyped-call]

    return _mean(learn)


def _cut(shape: PreTrainedModel, layers: int) -> PreTrainedModel:
    settings = shape.config.get_text_config().to_dict() | {"num_hidden_layers": layers, "vocab_size": _VOCABULARY}
    settings |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # they may lie outside of it
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:layers]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(type(shape.config.get_text_config()).from_dict(settings))
    return model.eval()


def _pass_seconds(model: PreTrainedModel, rows: int, length: int) -> float:
    decoder = Decoder(model, rows, capacity=2 * length + _PROMPT)
    slots = list(range(rows))
    lengths = [1 + 2 * length * slot // rows for slot in slots]
    decoder.append(slots, [[slot % _VOCABULARY] * length for slot, length in zip(slots, lengths, strict=True)])

    def again() -> None:
        decoder.append(slots, [[1] * _PROMPT, *[[1]] * (rows - 1)])
        decoder.cache.lengths[:] = lengths

    return _mean(again)


def product_flops(rows: int, hidden: int, intermediate: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of ``rows [rows, hidden] @ [hidden, intermediate]``."""
    left = torch.randn(rows, hidden, device=device, dtype=dtype)
    weights = [torch.randn(intermediate, hidden, device=device, dtype=dtype) for _ in range(4)]

    def multiply() -> None:
        for weight in weights:
            left @ weight.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return len(weights) * 2 * rows * hidden * intermediate / _mean(multiply)


def _mean(work: Callable[[], object]) -> float:
    """Seconds, on this machine as busy as it is."""
    work()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        work()
        count += 1
    return (time.perf_counter() - began) / count
