"""What ``rsim serve`` does."""

from __future__ import annotations

import json
import logging
import math
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from rsim.errors import UserError, key_from
from rsim.evaluation.planners import planner_from
from rsim.policies.loading import load_reasoner, quiet_models
from rsim.policies.planner import Planner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from rsim.rules_file import overridden
from rsim.serving import tracing
from rsim.serving.connections import PatientProtocol
from rsim.serving.server import SUFFIX, create_app
from rsim.serving.state import ServeConfig
from rsim.serving.upstream_client import KEY, check_address

_RULES = ("random", "fixed", "sequence", "wait")
_IDLE_SECONDS = 75  # that a connection may lie unused between two requests: longer than clients keep theirs


class _JsonLines(logging.Formatter):
    """A record as a line of JSON; of a request that ended, how it did."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        said["message"] = record.getMessage()
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said | getattr(record, "told", {}), ensure_ascii=False)


def _log_as(form: str) -> None:
    """Raises `UserError` for a form that there is not. ``json``: every record of the server, and one for each request."""
    if form not in ("text", "json"):
        raise UserError(f"--log-format {form}", "use text or json")
    if form == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(_JsonLines())
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        logging.getLogger("rsim.serve").setLevel(logging.INFO)


def run_server(
    config: ServeConfig,
    planner_name: str,
    strategies: str,
    rules: dict[str, Any],
    *,
    model: str,
    host: str,
    port: int,
    log_format: str,
) -> None:
    """Serves until interrupted; answers that have begun are finished first.

    Args:
        config: without keys and rules.
        planner_name: as ``--planner`` has it.
        rules: that are not the planner's own; None: as it was trained.
        model: to be run in this process; "": ``config.upstream`` is asked.
    """
    quiet_models()
    check_address(config.upstream, config.mode or "")
    _log_as(log_format)
    tracing.export()
    if config.show not in ("auto", "content", "reasoning", "none"):
        raise UserError(f"--show {config.show}", "use auto, content, reasoning or none")
    if not (math.isfinite(config.request_seconds) and math.isfinite(config.first_token_seconds)):
        raise UserError("--request-seconds and --first-token-seconds are numbers of seconds", "give a large one for no limit")
    if not (config.upstream or model):
        raise UserError("no model to serve", "give --upstream URL or --model PATH")
    listening = _listen(host, port)
    planner = _planner(planner_name, strategies)
    if isinstance(planner, Planner) and (model or config.model):
        planner.check_model(model or config.model)
    own = overridden(planner.rules or PlayRules(), **rules)
    config = replace(config, upstream_key=key_from(KEY), api_key=key_from("RSIM_API_KEY"), rules=own)
    reasoner = load_reasoner(model) if model else None
    name = Path(model).name or "local"
    app = create_app(config, planner, reasoner, name=name)
    if host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
        print(f"warning: {host} is open to others and $RSIM_API_KEY is not set", flush=True)
    shown = f"the upstream's models with {SUFFIX!r} behind their name" if config.upstream else f"{name}{SUFFIX}"
    listening.listen()  # who reads the next line may ask at once
    print(f"http://{host}:{listening.getsockname()[1]}   planned answers: {shown}", flush=True)
    settings = uvicorn.Config(
        app,
        http=PatientProtocol,
        log_level="warning",
        log_config=None if log_format == "json" else uvicorn.config.LOGGING_CONFIG,
        access_log=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=math.ceil(config.request_seconds),
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """The server's socket, before models are loaded. Raises `UserError` where the port is taken."""
    # Only where the protocol is named asyncio sends at once (TCP_NODELAY); else a body waits 40 ms for its header's receipt.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}", f"{error.strerror}; --port names another") from error
    return listening


def _planner(name: str, strategies: str) -> AnyPlanner:
    own = load_strategies(strategies) if strategies else None
    if name.partition(":")[0] in _RULES:
        chosen = planner_from(name, own or load_strategies("default"), [])
        assert chosen is not None
        return chosen
    return Planner.from_pretrained(name, own)
