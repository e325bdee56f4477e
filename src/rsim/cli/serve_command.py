"""``rsim serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import Strategies


def command(
    planner: Annotated[str, typer.Option(help="A planner's folder or hub id, or a rule: random, fixed:NAME, sequence:A,B.")],
    upstream: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8080/v1.")] = "",
    model: Annotated[str, typer.Option(help="A model to run in this process; with --upstream, the one to probe with.")] = "",
    mode: Annotated[str, typer.Option(help="prefill or turn; default: probed.")] = "",
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8017,
    gate: Annotated[float | None, typer.Option(help="Less sure than this, the planner says nothing.", min=0, max=1)] = None,
    delimiter: Annotated[str | None, typer.Option(help="What ends a step; \\n is a line break.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Decisions before the answer is forced.", min=1)] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Longest step.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, injected prompts included.", min=1)] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="Kept back for the answer.", min=1)] = None,
    slots: Annotated[int, typer.Option(help="Answers at once.", min=1)] = 64,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=0)] = 64,
    request_seconds: Annotated[float, typer.Option(help="Time limit of a request.", min=1)] = 600.0,
    first_token_seconds: Annotated[
        float, typer.Option(help="Longest wait for an answer's first token; 0: the request's limit.", min=0)
    ] = 0.0,
    log_format: Annotated[str, typer.Option(help="text, or json: a line for each event and each request.")] = "text",
    guard_metrics: Annotated[bool, typer.Option("--guard-metrics", help="/metrics asks for the key too.")] = False,
    show: Annotated[str, typer.Option(help="Where clients see what was injected: auto, content, reasoning or none.")] = "auto",
    strategies: Strategies = "",
    tools: Annotated[
        list[str] | None, typer.Option(help="python: programs that the model writes are run, in the sandbox.")
    ] = None,
) -> None:
    """Serve any LLM with a planner, over OpenAI's API. $RSIM_API_KEY guards it; $RSIM_UPSTREAM_API_KEY is the upstream's.

    The planner plays by the rules that it was trained under, where no others are given.
    """
    from rsim.cli.serve import run_server
    from rsim.serving.state import ServeConfig

    config = ServeConfig(
        upstream=upstream,
        model=model if upstream else "",
        mode=mode or None,  # type: ignore[arg-type]
        guard_metrics=guard_metrics,
        tools=tuple(tools or ()),
        slots=slots,
        waiting=waiting,
        request_seconds=request_seconds,
        first_token_seconds=first_token_seconds,
        show=show,  # type: ignore[arg-type]
    )
    delimiter = delimiter and delimiter.replace("\\n", "\n")
    limits = {"max_steps": max_steps, "step_tokens": step_tokens, "max_tokens": max_tokens, "answer_tokens": answer_tokens}
    rules = {"gate": gate, "delimiter": delimiter} | limits
    run_server(config, planner, strategies, rules, model="" if upstream else model, host=host, port=port, log_format=log_format)
