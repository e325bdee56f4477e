"""The planner as a plug-in for a real LLM that was never trained here: chain of thought, controls, planners.

    python -m studies.plugin_models [--model qwen2.5-coder-1.5b] [--data gsm8k:100 math500:50] [--controls random wait:1 ...]
        [--planner NAME=FOLDER ...] [--engine native|llama.cpp] [--out FOLDER] [--threads 2] [--record]

Greedy. With ``--engine native`` the model is dequantised to float32 (on a GPU to bfloat16) and plays many questions at once in
this process; with llama.cpp (`bench/llama_env.sh` makes its environment) it stays quantised and is asked one question at a
time, so that the server's prefix cache serves the next step. Answers are kept in ``--out``: a stopped measurement goes on.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from rsim.evaluation.compare import compare
from rsim.evaluation.evaluate import Evaluation
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedModel
from rsim.models.weights import package_file
from rsim.policies.loading import quiet_models
from studies.ledger import record, row

_PORT = 8397  # always the same one: an evaluation that goes on asks the same server
_PRESETS = {"tatqa": "plugin-tatqa", "mbpp": "plugin-mbpp", "humaneval": "plugin-mbpp"}  # else plugin-qwen2.5-coder
_PRESETS_OF = {"gemma3-270m": "gemma3-gsm8k"}  # a base model needs worked examples
_NATIVE = {  # on a CPU, on a GPU
    False: ("rollout.batch=64", 'models.dtype="float32"'),
    True: ("rollout.batch=256", 'models.dtype="bfloat16"'),
}
_ELSEWHERE = (
    "Trained here: [arith](arith.md) (SmolLM2-135M on sums), [finance](finance.md) (the same model on TAT-QA), "
    "[gpu](gpu.md) (Qwen2.5-Coder-1.5B and its planners on GSM8K, MBPP and HumanEval). Before models that were not:"
)
_KINDS = ("accuracy, boxed", "accuracy, last answer", "sampled and injected tokens a question")
_CONTROLS = [
    "random",
    "wait:1",
    "fixed:continuation",
    "sequence:termination",
    "sequence:sub-planning,validation,termination",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", help="a packaged model or a GGUF file")
    parser.add_argument("--data", nargs="+", default=["gsm8k:100", "math500:50"], metavar="SET:QUESTIONS")
    parser.add_argument("--controls", nargs="*", default=_CONTROLS)
    parser.add_argument("--planner", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--engine", choices=("native", "llama.cpp"), default="native")
    parser.add_argument("--out", default="runs/plugin_models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write results/real_models.json and its page")
    args = parser.parse_args()
    quiet_models()
    torch.set_num_threads(args.threads)
    planners = dict(p.split("=", 1) for p in args.planner)
    model = Path(args.model).name.removesuffix(".gguf")
    with _served(args.model, args.threads) if args.engine == "llama.cpp" else nullcontext() as served:
        for chosen in args.data:
            data, _, limit = chosen.partition(":")
            rows = measure(Path(args.out), model, args.model, served, data, int(limit or 100), args.controls, planners)
            for r in rows:
                print(f"{r['what']:<90} {r['value']!s:<8} {r['interval'] or ''} {r['goal']}", flush=True)
            if args.record:
                record("real_models", 6, "Real models", rows, summary)


@contextmanager
def _served(model: str, threads: int) -> Iterator[ServedModel]:
    """A llama.cpp server for the model's GGUF file."""
    from studies.serve import process  # where the model runs in this process, the packages of a server need not be there
    from studies.upstreams import wait_for_models

    python = subprocess.run(["bench/llama_env.sh"], capture_output=True, text=True, check=True).stdout.strip()
    file = model if model.endswith(".gguf") else str(package_file(model))
    server = [python, "-m", "llama_cpp.server", "--model", file, "--port", str(_PORT), "--n_ctx", "4096", "--n_threads",
              str(threads), "--n_threads_batch", str(threads)]  # fmt: skip
    with process(server, _PORT, seconds=600):
        wait_for_models(_PORT)
        yield ServedModel(f"http://127.0.0.1:{_PORT}/v1", at_once=1)


def measure(
    out: Path,
    model: str,
    source: str,
    served: ServedModel | None,
    data: str,
    limit: int,
    controls: list[str],
    planners: dict[str, str],
) -> list[dict[str, Any]]:
    """Rows of one model on one data set; it is loaded from ``source``, or served."""
    arms = {"CoT": "none"} | {c: c for c in controls} | {f"planner {name}": folder for name, folder in planners.items()}
    label, rows, done = f"{model}{' (llama.cpp)' if served else ''}, {data}, {limit} questions", [], {}
    for arm, spec in arms.items():
        folder = arm_folder(out, model, f"{data}-{limit}", arm)
        reasoner = "" if served else source
        preset = _PRESETS_OF.get(model) or _PRESETS.get(data, "plugin-qwen2.5-coder")
        settings = EvalSettings(
            preset, spec, reasoner, data, "test", limit, 0, True, 1, () if served else _NATIVE[torch.cuda.is_available()]
        )
        done[arm] = folder
        rows += _rows(f"{label}: {arm}", evaluate_into(folder, settings, served=served))
        print(f"{label}: {arm}: {rows[-3]['value']:.1%}", flush=True)
    return rows + differences(label, done, best_control(done, controls), list(planners))


def arm_folder(out: Path, model: str, data: str, arm: str) -> Path:
    """Where the answers of an arm are kept; ``data``: ``SET-QUESTIONS``."""
    return out / model / data / arm.replace(":", "-").replace(",", "-").replace(" ", "-")


def best_control(done: dict[str, Path], controls: list[str]) -> str | None:
    return max(controls, key=lambda c: compare(done[c], done["CoT"]).difference, default=None)


def differences(label: str, done: dict[str, Path], best: str | None, planners: list[str]) -> list[dict[str, Any]]:
    """The best control, and rows of each planner against it and against chain of thought."""
    rows = [row(f"{label}: the best control", best)] if best else []
    for name in planners:
        for against, called in (("CoT", "CoT"), (best, "the best control")):
            if against:
                found = compare(done[f"planner {name}"], done[against])
                rows.append(row(f"{label}: planner {name} minus {called}", round(100 * found.difference, 1), unit="points",
                                interval=(round(100 * found.low, 1), round(100 * found.high, 1))))  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each model and data set, an arm a line; then the differences."""
    tables: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    differences: dict[str, list[str]] = {}
    for r in rows:
        label, _, rest = r["what"].partition(" questions: ")
        arm, _, kind = rest.rpartition(": ")
        if kind in _KINDS:
            tables.setdefault(label, {}).setdefault(arm, {})[kind] = r
        elif r["interval"]:
            low, high = r["interval"]
            differences.setdefault(label, []).append(f"{rest}: {r['value']:+g} points [{low:+g}, {high:+g}].")
        else:
            differences.setdefault(label, []).append(f"{rest}: {r['value']}.")
    lines = [_ELSEWHERE, ""]
    for label, arms in tables.items():
        head = ["| | right | 95% interval | last answer | tokens a question |", "|---|---:|---:|---:|---:|"]
        lines += [f"## {label} questions", "", *head]
        for arm, found in arms.items():
            boxed, last, tokens = (found[kind] for kind in _KINDS)
            low, high = boxed["interval"]
            lines.append(
                f"| {arm} | {boxed['value']:.1%} | {low:.1%} to {high:.1%} | {last['value']:.1%} | {tokens['value']:g} |"
            )
        lines += ["", *(f"- {text}" for text in differences.get(label, [])), ""]
    return [*lines, "## Every row", ""]


def _rows(label: str, found: Evaluation) -> list[dict[str, Any]]:
    boxed, last, tokens = _KINDS
    return [
        row(f"{label}: {boxed}", found.accuracy, unit="share", interval=(found.low, found.high)),
        row(f"{label}: {last}", found.flexible, unit="share"),
        row(f"{label}: {tokens}", round(found.tokens_per_question, 1), unit="tokens"),
    ]


if __name__ == "__main__":
    main()
