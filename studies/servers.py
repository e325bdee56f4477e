"""Servers as child processes: started, waited for and ended; and the environments of those that are not ours."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from rsim.engine.vllm import save_untied
from rsim.models.weights import package_file
from rsim.policies.loading import load_reasoner

VLLM = Path(__file__).with_name("vllm_env.sh")
LITELLM = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}  # its proxy's
_PACKAGES = {  # an environment's pip calls
    "llama": (["llama-cpp-python[server]==0.3.36"],),
    "lm-eval": (["torch==2.13.0"], ["lm-eval[api]==0.4.13", "transformers==5.23.0"]),
    "clients": (  # the second list: what LiteLLM's proxy needs of its extra "proxy", which names a package that is on no index
        [
            "openai==3.3.0",
            "anthropic==2.14.0",
            "langchain-openai==1.7.4",
            "llama-index-llms-openai-like==0.1.3",
            "litellm==1.110.2",
            "instructor==1.17.0",
            "dspy==3.4.1",
            "llm==0.36",
            "guidance==0.3.1",
        ],
        [
            *("fastapi", "uvicorn", "uvloop", "backoff", "apscheduler<4", "fastapi-sso", "pyjwt", "python-multipart"),
            *("cryptography", "pynacl", "orjson", "rich", "redis", "rq", "mcp", "boto3", "semver", "expression", "soundfile"),
        ],
    ),
    "schemathesis": (["schemathesis>=4"],),
    "optillm": (["torch==2.13.0"], ["optillm==0.4.0"]),
}
_LLAMA_PARTS = ("-DLLAVA_BUILD", "-DLLAMA_BUILD_TESTS", "-DLLAMA_BUILD_TOOLS", "-DLLAMA_BUILD_EXAMPLES")


def environment(name: str) -> Path:
    """The folder of programs of an environment of its own, made once (``llama`` is compiled: a quarter of an hour).

    ``$RSIM_LLAMA_ENV``, ``$RSIM_LM_EVAL_ENV``, ``$RSIM_CLIENTS_ENV`` and the like move it.
    """
    variable = f"RSIM_{name.upper().replace('-', '_')}_ENV"
    here = Path(os.environ.get(variable, Path.home() / ".cache" / "rsim" / f"{name}-env"))
    if not (here / ".ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(here)], check=True)
        flags = os.environ | {"CMAKE_ARGS": " ".join(f"{part}=OFF" for part in _LLAMA_PARTS)}
        for packages in _PACKAGES[name]:
            install = [str(here / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *packages]
            subprocess.run(install, check=True, env=flags)
        (here / ".ready").touch()
    return here / "bin"


_NODE = ("openai@6.30.1", "ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")


def node_packages() -> str:
    """The folder whose ``node_modules`` are the clients of Node, made once (``$RSIM_NODE_ENV`` moves it); "" without Node."""
    if not (shutil.which("node") and shutil.which("npm")):
        return ""
    here = Path(os.environ.get("RSIM_NODE_ENV", Path.home() / ".cache" / "rsim" / "node-env"))
    if not (here / ".ready").is_file():
        here.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(here), *_NODE], check=True)
        (here / ".ready").touch()
    return str(here)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(
    command: list[str], port: int, env: dict[str, str] | None = None, seconds: float = 600
) -> Iterator[subprocess.Popen[bytes]]:
    """A server as a child, from the moment it lists its models on ``port``; it ends with the processes that it started.

    Raises:
        SystemExit: it ended by itself, or was not there after so many seconds.
    """
    with tempfile.NamedTemporaryFile("wb") as log:
        child = subprocess.Popen(
            command, env=os.environ | (env or {}), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_for(child, port, seconds, Path(log.name))
            yield child
        finally:
            with suppress(ProcessLookupError):  # all of it has ended by itself
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _wait_for(child: subprocess.Popen[bytes], port: int, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit(f"a server did not start; its log ends: {log.read_text(errors='replace')[-2000:]}")


def rsim_server(port: int, planner: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "rsim", "serve", "--planner", planner, "--port", str(port), *more]


def llama_server(model: str, port: int, *more: str) -> list[str]:
    """llama-cpp-python's server for a GGUF file or a packaged model."""
    file = model if model.endswith(".gguf") else str(package_file(model))
    python = str(environment("llama") / "python")
    return [python, "-m", "llama_cpp.server", "--model", file, "--port", str(port), "--n_ctx", "4096", *more]


@contextmanager
def vllm_server(model: str, *more: str, timeout: float = 300) -> Iterator[httpx.Client]:
    """A client of a vLLM server for ``model``, in the environment of ``studies/vllm_env.sh`` (which makes it)."""
    subprocess.run([str(VLLM)], stdout=subprocess.DEVNULL, check=True)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        reasoner = load_reasoner(model)
        save_untied(reasoner.model, Path(folder))
        reasoner.tokenizer.save_pretrained(folder)
        command = [str(VLLM), "serve", folder, str(port), *more]
        with served(command, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout) as client:
            yield client
