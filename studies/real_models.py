"""The planner as a plug-in for a real LLM that was never trained here: chain of thought, controls, planners.

Greedy. With ``--engine native`` the model is dequantised to float32 (on a GPU to bfloat16) and plays many questions at once in
this process; with llama.cpp it stays quantised and is asked one question at a time, so that the server's prefix cache serves
the next step. Answers are kept in ``--out``: a stopped measurement goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from rsim.evaluation.compare import compare
from rsim.evaluation.evaluate import Evaluation
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedModel
from rsim.policies.loading import quiet_models
from studies.ledger import Row
from studies.servers import llama_server, served

ISSUE = 6
_PORT = 8397  # always the same one: an evaluation that goes on asks the same server
_PRESETS = {"tatqa": "plugin-tatqa", "mbpp": "plugin-mbpp", "humaneval": "plugin-mbpp"}  # else plugin-qwen2.5-coder
_PRESETS_OF = {"gemma3-270m": "gemma3-gsm8k"}  # a base model needs worked examples
_NATIVE = {  # on a CPU, on a GPU
    False: ("rollout.batch=64", 'models.dtype="float32"'),
    True: ("rollout.batch=256", 'models.dtype="bfloat16"'),
}
_THREE = "sequence:sub-planning,validation,termination"
_CONTROLS = ["random", "wait:1", "fixed:continuation", "sequence:termination", _THREE]
_DATA = ["gsm8k:100", "math500:50"]


def run(
    model: Annotated[str, typer.Option(help="A packaged model or a GGUF file.")] = "qwen2.5-coder-1.5b",
    data: Annotated[list[str], typer.Option(metavar="SET:QUESTIONS", help="Repeatable.")] = _DATA,
    controls: Annotated[list[str], typer.Option(help="Repeatable.")] = _CONTROLS,
    planner: Annotated[list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Repeatable.")] = None,
    engine: Literal["native", "llama.cpp"] = "native",
    out: Path = Path("runs/real_models"),
    threads: int = 2,
) -> Iterator[Row]:
    quiet_models()
    torch.set_num_threads(threads)
    planners = dict(p.split("=", 1) for p in planner or ())
    quantised, flags = engine == "llama.cpp", ("--n_threads", str(threads), "--n_threads_batch", str(threads))
    with served(llama_server(model, _PORT, *flags), _PORT) if quantised else nullcontext():
        server = ServedModel(f"http://127.0.0.1:{_PORT}/v1", at_once=1) if quantised else None
        for chosen in data:
            name, _, limit = chosen.partition(":")
            yield from measure(out, model, server, name, int(limit or 100), controls, planners)


def measure(
    out: Path, source: str, server: ServedModel | None, data: str, limit: int, controls: list[str], planners: dict[str, str]
) -> Iterator[Row]:
    """Rows of one model on one data set; it is loaded from ``source``, or served."""
    model = Path(source).name.removesuffix(".gguf")
    arms = {"CoT": "none"} | {c: c for c in controls} | {f"planner {name}": folder for name, folder in planners.items()}
    label = f"{model}{' (llama.cpp)' if server else ''}, {data}, {limit} questions"
    preset = _PRESETS_OF.get(model) or _PRESETS.get(data, "plugin-qwen2.5-coder")
    reasoner, changes = ("", ()) if server else (source, _NATIVE[torch.cuda.is_available()])
    done = {}
    for arm, spec in arms.items():
        done[arm] = out / model / f"{data}-{limit}" / arm.replace(":", "-").replace(",", "-").replace(" ", "-")
        settings = EvalSettings(preset, spec, reasoner, data, "test", limit, 0, True, 1, changes)
        yield from _accuracy(f"{label}: {arm}", evaluate_into(done[arm], settings, served=server))
    best = max(controls, key=lambda c: compare(done[c], done["CoT"]).difference, default="CoT")
    yield Row(f"{label}: the best control", best)
    for name in planners:
        for against, called in (("CoT", "CoT"), (best, "the best control")):
            yield gained(f"{label}: planner {name} minus {called}", done[f"planner {name}"], done[against])


def gained(what: str, folder: Path, against: Path) -> Row:
    """The difference of two evaluations of the same questions, in points."""
    found = compare(folder, against)
    low, high = round(100 * found.low, 1), round(100 * found.high, 1)
    return Row(what, round(100 * found.difference, 1), "points", interval=[low, high])


def _accuracy(label: str, found: Evaluation) -> list[Row]:
    return [
        Row(f"{label}: accuracy, boxed", found.accuracy, "share", interval=[found.low, found.high]),
        Row(f"{label}: accuracy, last answer", found.flexible, "share"),
        Row(f"{label}: sampled and injected tokens a question", round(found.tokens_per_question, 1), "tokens"),
    ]
