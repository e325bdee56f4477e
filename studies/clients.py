"""Programs that speak OpenAI's or Anthropic's API, unchanged, against `rsim serve`: clients, a proxy, curl, an eval harness.

The clients' calls (``client_calls.py``, ``client_calls.mjs``) are made against a packaged model alone, planned in its process
(``--model``) and planned before it (``--upstream``). Needs $RSIM_DATA for GSM8K; clients, LiteLLM's proxy and harness get
environments of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from rsim.models.weights import resolve
from rsim.serving.server import SUFFIX
from studies.ledger import Row
from studies.servers import LITELLM, environment, free_port, node_packages, rsim_server, served

ISSUE = 14
Cells = dict[tuple[str, str], tuple[str, str]]  # a client's call and a way: what went wrong there, and with the bare model
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
    model: str = "smollm2-135m", planner: str = "random", limit: int = 4, small: str = "nano-s", only: str = ""
) -> Iterator[Row]:
    """``only``: clients or harness."""
    cells: Cells = {}
    if only in ("", "clients"):
        cells |= _matrix(small, planner)
    if only in ("", "harness"):
        cells |= _harnesses(model, planner, limit)
    for (name, way), (planned, alone) in cells.items():
        shown = "works" if not planned else f"as the bare model: {alone}" if alone else planned
        yield Row(f"{name.replace('_', ' ')}, {way}", shown, goal="works", met=not planned)
    works, excused = (sum(done) for done in zip(*((not p, bool(p and a)) for p, a in cells.values()), strict=True))
    share = works / len(cells)
    yield Row("cells of the client matrix that work", f"{works} of {len(cells)}", goal="at least 90%", met=share >= 0.9)
    rest = len(cells) - works - excused
    yield Row("cells that fail though the bare model's work", rest, goal="0", met=rest == 0)


# --- clients of Python and Node, and LiteLLM's proxy between them and the server ---

_WAYS = ("--model", "--upstream")


def _matrix(model: str, planner: str) -> Cells:
    here, before, proxy = free_port(), free_port(), free_port()
    rules = ("--strategies", "lab", "--delimiter", "\\n", "--max-steps", "4", "--step-tokens", "24", "--max-tokens", "200")
    planned = f"{model}{SUFFIX}"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(served(rsim_server(here, planner, "--model", model, *rules), here))
        upstream = ("--upstream", f"http://127.0.0.1:{here}/v1", "--mode", "prefill")
        stack.enter_context(served(rsim_server(before, planner, *upstream, *rules), before))
        asked = ((here, model), (here, planned), (before, planned))  # alone and both ways
        behind = [{"model_name": f"way{i}", "litellm_params": {"model": f"openai/{name}", "api_key": "x",
                   "api_base": f"http://127.0.0.1:{port}/v1"}} for i, (port, name) in enumerate(asked)]  # fmt: skip
        config = Path(folder, "litellm.json")
        config.write_text(json.dumps({"model_list": behind}))
        program = [str(environment("clients") / "litellm"), "--config", str(config), "--port", str(proxy)]
        stack.enter_context(served(program, proxy, LITELLM))
        python, own = str(environment("clients") / "python"), Path(__file__)
        packages = node_packages()

        def said(i: int) -> dict[str, str]:
            port, name = asked[i]
            calls = _calls([python, str(own.with_name("client_calls.py")), _url(port), name])
            node = ["node", str(own.with_name("client_calls.mjs")), packages, _url(port), name]
            calls |= _calls(node) if packages else {"clients_of_node": "node is not installed"}
            through = _calls([python, str(own.with_name("client_calls.py")), _url(proxy), f"way{i}", *_THROUGH_PROXY])
            return calls | {f"litellm_proxy,_{call}": wrong for call, wrong in through.items()}

        planned_ways = list(zip(_WAYS, (said(1), said(2)), strict=True))
        alone = said(0) if any(any(calls.values()) for _, calls in planned_ways) else {}
    alone |= {"clients_of_node": ""}  # that there is no Node is no fault of the bare model's
    return {(call, way): (wrong, alone.get(call, "")) for way, calls in planned_ways for call, wrong in calls.items()}


_THROUGH_PROXY = ("openai_sync", "openai_stream", "openai_parse", "openai_tools", "openai_responses", "anthropic")


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


def _calls(command: list[str]) -> dict[str, str]:
    """What went wrong in each client's call; "" for nothing."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, file=sys.stderr)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {call["name"]: call["wrong"] for call in said}


# --- lm-evaluation-harness and curl ---


def _harnesses(model: str, planner: str, limit: int) -> Cells:
    python, here, before = str(environment("lm-eval") / "python"), free_port(), free_port()
    cells = {}
    with ExitStack() as stack:
        stack.enter_context(served(rsim_server(here, planner, "--model", model, "--step-tokens", "64"), here))
        more = ("--upstream", _url(here), "--mode", "prefill", "--step-tokens", "64")
        stack.enter_context(served(rsim_server(before, planner, *more), before))
        harness = "lm-evaluation-harness"
        for call, ask in (("curl", _curl), (f"{harness}, chat", _harness), (f"{harness}, text", _harness)):
            for way, port in zip(_WAYS, (here, before), strict=True):
                how = (call.rpartition(" ")[2], python, limit)
                wrong = ask(port, model, f"{model}{SUFFIX}", *how)
                cells[call, way] = wrong, ask(here, model, model, *how) if wrong else ""
    return cells


def _curl(port: int, model: str, name: str, *_: object) -> str:
    """What is wrong with an answer and with a stream; "" for nothing."""
    body = {"model": name, "messages": [{"role": "user", "content": "2+2=?"}], "max_tokens": 48}
    command = ["curl", "-sN", f"{_url(port)}/chat/completions", "-H", "Content-Type: application/json", "-d"]
    whole, stream = (
        subprocess.run([*command, json.dumps(sent)], stdout=subprocess.PIPE, text=True, check=True).stdout
        for sent in (body, body | {"stream": True})
    )
    reply = json.loads(whole)
    if reply["object"] != "chat.completion" or not reply["usage"]["completion_tokens"]:
        return whole[:300]
    events = [line for line in stream.splitlines() if line.startswith("data: ")]
    return "" if sum('"content"' in e for e in events) > 10 and events[-1] == "data: [DONE]" else stream[-300:]


def _harness(port: int, model: str, name: str, kind: str, python: str, limit: int) -> str:
    """What is wrong; "": each of ``limit`` questions of GSM8K was answered."""
    api, path = ("local-chat-completions", "chat/completions") if kind == "chat" else ("local-completions", "completions")
    how = [f"model={name}", f"base_url={_url(port)}/{path}", "num_concurrent=4", f"tokenizer={resolve(model)}", "timeout=600"]
    env = os.environ | {"OPENAI_API_KEY": "x", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "gsm8k_local.yaml"
        task.write_text(_TASK.format(file=Path(os.environ["RSIM_DATA"]) / "gsm8k" / "test.jsonl"))
        asked = ["--tasks", "gsm8k_local", "--include_path", folder, "--limit", str(limit)]
        asked += ["--apply_chat_template"] if kind == "chat" else []
        to = ["--output_path", f"{folder}/out", "--log_samples"]
        command = [python, "-m", "lm_eval", "--model", api, "--model_args", ",".join(how), *asked, *to]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        files = Path(folder, "out").rglob("samples_*.jsonl")
        samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    answered = sum(bool(s["resps"][0][0].strip()) for s in samples)
    if done.returncode:
        return done.stderr[-300:]
    return "" if answered == limit else f"{answered} of {limit} questions answered"
