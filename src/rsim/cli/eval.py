"""``rsim eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsim.cli.options import DataDir, Json, Quiet, Set, Strategies, merged, tell

_PLANNER = "none, random, fixed:NAME, sequence:a,b, shuffled, prompted, wait:TIMES, oracle or a planner's folder."


def command(
    run: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT|PRESET", help="A run folder, a checkpoint in it, or a preset.")],
    planner: Annotated[str, typer.Option(help=_PLANNER)] = "",
    reasoner: Annotated[str, typer.Option(help="Another reasoner than the run's.")] = "",
    data: Annotated[str, typer.Option(help="lab, gsm8k or a JSONL file (default: the run's).")] = "",
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int, typer.Option(help="Number of questions.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the questions drawn and of sampling.")] = 0,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    samples: Annotated[int, typer.Option(help="Samples a question: majority vote and pass@k.", min=1)] = 1,
    match_tokens: Annotated[
        str, typer.Option(metavar="EVAL", help="Take as many samples as cost this evaluation's tokens.")
    ] = "",
    upstream: Annotated[str, typer.Option(metavar="URL", help="The reasoner is behind this OpenAI-compatible server.")] = "",
    model: Annotated[str, typer.Option(help="Its name there (default: the first that is listed).")] = "",
    mode: Annotated[str, typer.Option(help="How prompts are injected there: prefill or turn (default: probed).")] = "",
    at_once: Annotated[int, typer.Option(help="Answers asked for together there.", min=1)] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an evaluation with other settings.")] = False,
    out: Annotated[str, typer.Option(help="Folder for results (default: RUN/eval, RUN/eval-CHECKPOINT or runs/eval).")] = "",
    overrides: Set = None,
    strategies: Strategies = "",
    data_dir: DataDir = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy, with a 95% interval, and write the episodes, a summary and a report."""
    from rsim import api
    from rsim.cli.progress import shown

    with shown("evaluating", quiet=quiet or as_json) as on_episode:
        summary = api.evaluate(
            run,
            out,
            planner=planner,
            reasoner=reasoner,
            data=data,
            split=split,
            limit=limit,
            seed=seed,
            sample=sample,
            samples=samples,
            match_tokens=match_tokens,
            upstream=upstream,
            model=model,
            mode=mode,
            at_once=at_once,
            overwrite=overwrite,
            overrides=merged(overrides, strategies=strategies, data_dir=data_dir),
            on_episode=on_episode,
        )
    text = (
        f"accuracy {summary['accuracy']:.1%}  [{summary['low']:.1%}, {summary['high']:.1%}]  "
        f"flexible {summary['flexible']:.1%}  questions {summary['questions']}  "
        f"tokens/question {summary['tokens_per_question']:.1f}\nreport: {summary['report']}"
    )
    tell(summary, text, as_json)
