"""Programs that speak OpenAI's or Anthropic's API, unchanged, against `rsim serve`: clients of Python, curl, an eval harness.

The clients' calls (`studies.client_calls`) are made against a packaged model alone, planned in its process (``--model``) and
planned before it (``--upstream``). Needs $RSIM_DATA for GSM8K; clients and harness get environments of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rsim.models.weights import resolve
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import environment, free_port, rsim_server, served

ISSUE = 5
_TASK = """\
task: gsm8k_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer.split('#### ')[-1]}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, temperature: 0.0, max_gen_toks: 192}}
filter_list:
  - name: last-number
    filter:
      - {{function: regex, regex_pattern: "(-?[0-9][0-9,.]*)", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, regexes_to_ignore: [",", "\\\\.$"]}}
"""


def run(
    model: str = "smollm2-135m", planner: str = "random", limit: int = 8, small: str = "nano-s", only: str = ""
) -> Iterator[Row]:
    """``only``: clients or harness."""
    if only in ("", "clients"):
        yield from _matrix(small, planner)
    if only in ("", "harness"):
        yield from _harnesses(model, planner, limit)


def _matrix(model: str, planner: str) -> Iterator[Row]:
    here, before = free_port(), free_port()
    rules = ("--strategies", "lab", "--delimiter", "\\n", "--max-steps", "4", "--step-tokens", "24", "--max-tokens", "200")
    with served(rsim_server(here, planner, "--model", model, *rules), here):
        upstream = ("--upstream", f"http://127.0.0.1:{here}/v1", "--mode", "prefill")
        with served(rsim_server(before, planner, *upstream, *rules), before):
            environment("clients")  # made before all three need it
            planned = f"{model}{SUFFIX}"
            with ThreadPoolExecutor() as pool:
                alone, *said = pool.map(_calls, (here, here, before), (model, planned, planned))
    works = excused = cells = 0
    for way, calls in zip(("--model", "--upstream"), said, strict=True):
        for name, wrong in calls.items():
            cells += 1
            works += not wrong
            excused += bool(wrong and alone[name])
            shown = "works" if not wrong else f"as the bare model: {alone[name]}" if alone[name] else wrong
            yield Row(f"{name.replace('_', ' ')}, {way}", shown, goal="works", met=not wrong)
    share = works / cells
    yield Row("cells of the client matrix that work", round(100 * share), "%", goal="at least 90%", met=share >= 0.9)
    rest = cells - works - excused
    yield Row("cells that fail though the bare model's work", rest, goal="0", met=rest == 0)


def _calls(port: int, model: str) -> dict[str, str]:
    """What went wrong in each client's call; "" for nothing."""
    python = str(environment("clients") / "python")
    command = [python, str(Path(__file__).with_name("client_calls.py")), f"http://127.0.0.1:{port}/v1", model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {call["name"]: call["wrong"] for call in said}


def _harnesses(model: str, planner: str, limit: int) -> Iterator[Row]:
    python, port = str(environment("lm-eval") / "python"), free_port()
    with served(rsim_server(port, planner, "--model", model, "--step-tokens", "64"), port):
        yield from _curl(port, model)
        for kind in ("chat", "text"):
            yield _harness(python, kind, port, model, limit)


def _curl(port: int, model: str) -> list[Row]:
    body = {"model": f"{model}{SUFFIX}", "messages": [{"role": "user", "content": "2+2=?"}], "max_tokens": 48}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answers = []
    for sent in (body, body | {"stream": True}):
        command = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", json.dumps(sent)]
        answers.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    reply = json.loads(answers[0])
    whole = reply["object"] == "chat.completion" and reply["usage"]["completion_tokens"] > 0
    events = [line for line in answers[1].splitlines() if line.startswith("data: ")]
    tokens = sum('"content"' in e for e in events)
    ended = tokens > 10 and events[-1] == "data: [DONE]"
    return [
        Row("curl: a planned answer", "complete" if whole else "broken", goal="complete", met=whole),
        Row("curl: chunks of a planned stream", tokens, goal="more than 10, then [DONE]", met=ended),
    ]


def _harness(python: str, kind: str, port: int, model: str, limit: int) -> Row:
    name, path = f"local-{'chat-' if kind == 'chat' else ''}completions", f"{'chat/' if kind == 'chat' else ''}completions"
    address = f"base_url=http://127.0.0.1:{port}/v1/{path}"
    settings = ",".join([f"model={model}{SUFFIX}", address, "num_concurrent=4", f"tokenizer={resolve(model)}"])
    env = os.environ | {"OPENAI_API_KEY": "x", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "gsm8k_local.yaml"
        task.write_text(_TASK.format(file=Path(os.environ["RSIM_DATA"]) / "gsm8k" / "test.jsonl"))
        asked = ["--tasks", "gsm8k_local", "--include_path", folder, "--limit", str(limit)]
        asked += ["--apply_chat_template"] if kind == "chat" else []
        to = ["--output_path", f"{folder}/out", "--log_samples"]
        command = [python, "-m", "lm_eval", "--model", name, "--model_args", settings, *asked, *to]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        files = Path(folder, "out").rglob("samples_*.jsonl")
        samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    answered = sum(bool(s["resps"][0][0].strip()) for s in samples)
    met = done.returncode == 0 and answered == limit
    return Row(f"lm-evaluation-harness, {name}: GSM8K questions answered", answered, goal=f"{limit}", met=met)
