"""The stand-in for a vLLM server as a process: ``python served_standin.py FOLDER HOST PORT``."""

from __future__ import annotations

import os
import sys

import httpx
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from transformers import AutoModelForCausalLM, AutoTokenizer

from standin_vllm import StandIn


def main(folder: str, host: str, port: str) -> None:
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "1", "the routes that take new weights are there in this mode alone"
    torch.set_num_threads(1)
    standin = StandIn(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    app = FastAPI()

    async def answer(request: Request) -> Response:
        asked = httpx.Request(request.method, str(request.url), content=await request.body())
        got = standin.answer(asked)
        return Response(got.content, got.status_code, media_type="application/json")

    app.router.add_route("/{path:path}", answer, methods=["GET", "POST"])
    print("a stand-in for vLLM", flush=True)
    uvicorn.run(app, host=host, port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
