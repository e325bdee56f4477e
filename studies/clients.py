"""Programs that speak OpenAI's API, unchanged, against `rsim serve`: curl and lm-evaluation-harness.

    python -m studies.clients [--model smollm2-135m] [--limit 8] [--record]

(The official Python client is in the tests.) Needs $RSIM_DATA for GSM8K, and `bench/lm_eval_env.sh`, which installs the harness
into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rsim.models.weights import resolve
from rsim.serving.server import SUFFIX
from studies.ledger import record, row
from studies.serve import free_port, process

_TASK = """\
task: gsm8k_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer.split('#### ')[-1]}}}}"
generation_kwargs:
  until: ["Question:"]
  do_sample: false
  temperature: 0.0
  max_gen_toks: 192
filter_list:
  - name: last-number
    filter:
      - function: regex
        regex_pattern: "(-?[0-9][0-9,.]*)"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: [",", "\\\\.$"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--planner", default="random")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="write results/clients.json and its page")
    args = parser.parse_args()
    python = subprocess.run(["bench/lm_eval_env.sh"], capture_output=True, text=True, check=True).stdout.strip()
    port = free_port()
    command = [sys.executable, "-m", "rsim", "serve", "--planner", args.planner, "--model", args.model, "--port", str(port),
               "--step-tokens", "64"]  # fmt: skip
    with process(command, port), tempfile.TemporaryDirectory() as folder:
        rows = [*_curl(port, args.model), *(_harness(python, kind, port, args, Path(folder)) for kind in ("chat", "text"))]
    for r in rows:
        print(f"{r['what']:<90} {r['value']!s:<14} {r['goal']}  {'' if r['met'] is None else r['met']}")
    if args.record:
        record("clients", 5, f"Clients of the plug-in server, unchanged: {args.model}, planner {args.planner}", rows)


def _curl(port: int, model: str) -> list[dict[str, Any]]:
    body = json.dumps({"model": f"{model}{SUFFIX}", "messages": [{"role": "user", "content": "2+2=?"}], "max_tokens": 48})
    streamed = json.dumps(json.loads(body) | {"stream": True})
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answers = []
    for sent in (body, streamed):
        command = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", sent]
        answers.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    reply = json.loads(answers[0])
    whole = reply["object"] == "chat.completion" and reply["usage"]["completion_tokens"] > 0
    events = [line for line in answers[1].splitlines() if line.startswith("data: ")]
    tokens = sum('"content"' in e for e in events)
    return [
        row("curl: a planned answer", "complete" if whole else "broken", goal="complete", met=whole),
        row("curl: chunks of a planned stream", tokens, goal="more than 10, then [DONE]",
            met=tokens > 10 and events[-1] == "data: [DONE]"),
    ]  # fmt: skip


def _harness(python: str, kind: str, port: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data = Path(os.environ["RSIM_DATA"]) / "gsm8k" / "test.jsonl"
    (folder / "gsm8k_local.yaml").write_text(_TASK.format(file=data))
    name = "local-chat-completions" if kind == "chat" else "local-completions"
    path = "chat/completions" if kind == "chat" else "completions"
    address = f"base_url=http://127.0.0.1:{port}/v1/{path}"
    settings = [f"model={args.model}{SUFFIX}", address, "num_concurrent=4", f"tokenizer={resolve(args.model)}"]
    command = [python, "-m", "lm_eval", "--model", name, "--model_args", ",".join(settings), "--tasks", "gsm8k_local",
               "--include_path", str(folder), "--limit", str(args.limit), "--output_path", str(folder / kind), "--log_samples",
               *(["--apply_chat_template"] if kind == "chat" else [])]  # fmt: skip
    env = os.environ | {"OPENAI_API_KEY": "x", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    files = (folder / kind).rglob("samples_*.jsonl")
    samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    answered = sum(bool(s["resps"][0][0].strip()) for s in samples)
    return row(f"lm-evaluation-harness, {name}: GSM8K questions answered", answered, goal=f"{args.limit}",
               met=done.returncode == 0 and answered == args.limit)  # fmt: skip


if __name__ == "__main__":
    main()
