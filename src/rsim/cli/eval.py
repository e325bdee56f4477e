"""``rsim eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import DataDir, Json, Set, Strategies, merged, tell
from rsim.errors import UserError

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
    out: Annotated[str, typer.Option(help="Folder for results (default: RUN/eval or runs/eval).")] = "",
    overrides: Set = None,
    strategies: Strategies = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Measure accuracy, with a 95% interval, and write the episodes, a summary and a report."""
    if upstream and reasoner:
        raise UserError(f"--reasoner {reasoner}", "with --upstream the reasoner is what the server has: --model names it")
    for option, given in (("--model", model), ("--mode", mode)):
        if given and not upstream:
            raise UserError(f"{option} {given}", "it is of a server: --upstream URL")

    from rsim.evaluation.loading import EvalSettings
    from rsim.evaluation.saved import evaluate_into
    from rsim.evaluation.upstream import ServedModel
    from rsim.policies.loading import quiet_models
    from rsim.report.report import build_report

    quiet_models()
    settings = EvalSettings(
        run=run,
        planner=planner,
        reasoner=reasoner,
        data=data,
        split=split,
        limit=limit,
        seed=seed,
        greedy=not sample and samples == 1,
        samples=samples,
        overrides=tuple(merged(overrides, strategies=strategies, data_dir=data_dir)),
    )
    folder = Path(out) if out else (Path(run) / "eval" if Path(run).is_dir() else Path("runs/eval"))
    served = ServedModel(upstream, model, mode, at_once) if upstream else None
    result = evaluate_into(folder, settings, served=served, match_tokens=match_tokens, overwrite=overwrite)
    summary = json.loads((folder / "summary.json").read_text())
    record = {"step": 0, "eval/accuracy": result.accuracy, "eval/accuracy_low": result.low, "eval/accuracy_high": result.high}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    title = f"{summary['data']} {split}, {result.questions} questions"
    (folder / "table.json").write_text(json.dumps({"title": title, "rows": [result.to_json()]}) + "\n")
    page = build_report(folder)
    text = (
        f"accuracy {result.accuracy:.1%}  [{result.low:.1%}, {result.high:.1%}]  flexible {result.flexible:.1%}  "
        f"questions {result.questions}  tokens/question {result.tokens_per_question:.1f}\nreport: {page}"
    )
    tell(summary, text, as_json)
