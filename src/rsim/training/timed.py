"""What this machine takes for the parts of a step, timed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Semaphore
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rsim.engine.decoder import Decoder
from rsim.engine.sampling import choose
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.objective.logprobs import token_logprobs
from rsim.training.agent import Agent, AgentSettings
from rsim.training.batch import ActionBatch, reasoner_batch

_PATIENCE = 120  # seconds for a process to begin
_SECONDS = 0.5  # for each timing
_TRAINED = 2048  # tokens of a micro-batch that is timed
_PROMPT = 3  # tokens of an injected prompt
_DEPTHS = 1, 3  # layers of the models that are timed
_VOCABULARY = 256  # of theirs


@contextmanager
def among(neighbours: int, threads: int) -> Iterator[None]:
    """Has ``neighbours`` other processes compute with ``threads`` each meanwhile: cores may be fewer than
    they seem."""
    context = multiprocessing.get_context("spawn")
    begun = context.Semaphore(0)
    work: dict[str, Any] = {"target": _multiply_on, "args": (threads, begun), "daemon": True}
    others = [context.Process(**work) for _ in range(neighbours)]
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
    """Seconds of one forward pass of a rollout on this CPU, sampling included: a token for each of ``rows``
    sequences, and a prompt for one of them, with ``length`` tokens in their caches on average, from none to
    twice as many. ``shape``: a model, with or without its weights."""
    config = shape.config.get_text_config()
    left, head = torch.randn(rows, config.hidden_size), torch.randn(config.vocab_size, config.hidden_size)
    uniforms = torch.rand(rows)
    body = _by_depth(shape, lambda model: _pass_seconds(model, rows, length))
    return body + _mean(lambda: choose(left @ head.T, 1.0, uniforms))


def training_seconds(shape: PreTrainedModel, question: int, sampled: int) -> float:
    """Seconds that a token takes forward and backward on this CPU, the output head included: in episodes of
    one group, a question of ``question`` tokens, then ``sampled`` ones for each, some thousand in all."""
    config = shape.config.get_text_config()
    rows = max(1, _TRAINED // sampled)
    length, mask = question + sampled, [0] * question + [1] * sampled
    episode = Episode(Problem("", ""), 0, [1] * length, question, mask, [0.0] * length)
    batch = reasoner_batch([episode] * rows, torch.device("cpu"))
    tokens = question + rows * sampled
    hidden = torch.randn(tokens, config.hidden_size, requires_grad=True)
    head = torch.randn(config.vocab_size, config.hidden_size, requires_grad=True)
    chosen = torch.zeros(tokens, dtype=torch.long)

    def score() -> None:
        torch.autograd.backward(token_logprobs(hidden, head, chosen, 1.0)[0].sum())

    return (_by_depth(shape, lambda model: _training_seconds(model, batch)) + _mean(score)) / tokens


def _by_depth(shape: PreTrainedModel, timed: Callable[[PreTrainedModel], float]) -> float:
    """Seconds of all layers of ``shape``, from two models of one and three such layers, of random weights."""
    one, three = (timed(_shortened(shape, layers)) for layers in _DEPTHS)
    layer = max(0.0, (three - one) / (_DEPTHS[1] - _DEPTHS[0]))
    return float(one + (shape.config.get_text_config().num_hidden_layers - _DEPTHS[0]) * layer)


def _training_seconds(model: PreTrainedModel, batch: ActionBatch) -> float:
    head = model.get_output_embeddings()
    settings = AgentSettings(temperature=1.0, learning_rate=0.0)
    agent = Agent("reasoner", model, head, settings, head_weight=head.weight)
    return _mean(lambda: torch.autograd.backward(agent.evaluate(batch).logprobs.sum()))


def _shortened(shape: PreTrainedModel, layers: int) -> PreTrainedModel:
    config = shape.config.get_text_config()
    settings = config.to_dict() | {"num_hidden_layers": layers, "vocab_size": _VOCABULARY}
    settings |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # they may lie outside of it
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:layers]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(type(config).from_dict(settings))
    return model.eval()


def _pass_seconds(model: PreTrainedModel, rows: int, length: int) -> float:
    decoder = Decoder(model, rows, capacity=2 * length + _PROMPT)
    slots = list(range(rows))
    lengths = [1 + 2 * length * slot // rows for slot in slots]
    decoder.append(slots, [[slot % _VOCABULARY] * lengths[slot] for slot in slots])

    def again() -> None:
        decoder.append(slots, [[1] * _PROMPT, *[[1]] * (rows - 1)])
        decoder.cache.lengths[:] = lengths

    return _mean(again)


def product_flops(
    rows: int, hidden: int, intermediate: int, device: torch.device, dtype: torch.dtype
) -> float:
    """FLOPs a second of ``rows [rows, hidden] @ [hidden, intermediate]``."""
    left = torch.randn(rows, hidden, device=device, dtype=dtype)
    weights = [torch.randn(intermediate, hidden, device=device, dtype=dtype) for _ in range(4)]

    def multiply() -> None:
        for weight in weights:
            left @ weight.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return len(weights) * 2 * rows * hidden * intermediate / _mean(multiply)


def bytes_a_second() -> float:
    """At which this machine's memory is read and written."""
    block = torch.zeros(1 << 26)
    block.add_(1.0)  # the pages are there from now on
    began = time.perf_counter()
    for _ in range(3):
        block.add_(1.0)
    return 3 * 2 * block.numel() * 4 / (time.perf_counter() - began)


def _mean(work: Callable[[], object]) -> float:
    """Seconds, on this machine as busy as it is."""
    work()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        work()
        count += 1
    return (time.perf_counter() - began) / count
