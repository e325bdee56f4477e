"""The command ``rsim``. Commands are thin; heavy modules are imported inside them, so that ``--help`` is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rsim.cli import data, strategies
from rsim.cli.options import DataDir, Json, Rewards, Set, Strategies
from rsim.errors import UserError

_PLANNER = "none, random, fixed:NAME, sequence:a,b, shuffled, prompted, wait:TIMES, oracle or a planner's folder."

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Train a planner and a reasoner together, and plug the planner into any LLM.")  # fmt: skip
lab = typer.Typer(no_args_is_help=True, help="The nano lab: tiny models on procedural problems.")
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(lab, name="lab")
app.add_typer(config_app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(strategies.app, name="strategies")
app.command(name="check")(data.check)


@app.command()
def train(
    source: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.toml")],
    overrides: Set = None,
    strategies: Strategies = "",
    reward: Rewards = None,
    data_dir: DataDir = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run's folder.")] = False,
    resume_from: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="Go on from this one of the run's, e.g. step-000010.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Resume although the config has changed.")] = False,
    launcher: Annotated[str, typer.Option(help="ray: train on a Ray cluster (docs/scaling.md).")] = "",
    workers: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Processes there.")] = "1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate memory and time; exit 2 if it cannot fit.")] = False,
    as_json: Json = False,
) -> None:
    """Train a planner and a reasoner together, stage by stage."""
    from rsim.config import load_config

    config = load_config(source, _merge(overrides, strategies=strategies, rewards=reward, data_dir=data_dir))
    if dry_run:
        from rsim.cli.commands import run_dry

        run_dry(config, as_json=as_json)
        return
    if launcher and resume_from:
        raise UserError("--resume-from with --launcher", "the cluster goes on from the newest checkpoint: use --resume")
    if launcher:
        from rsim.cli.commands import run_on_cluster

        result = run_on_cluster(config, launcher, workers, resume=resume, force=force)
    else:
        from rsim.cli.progress import first_process, train_with_progress

        result = train_with_progress(config, resume=resume, resume_from=resume_from, force=force, quiet=as_json)
        if not first_process():
            return
    if as_json:
        print(json.dumps(result))
    else:
        print(f"run folder: {config.folder}")


@app.command()
def plan(
    source: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.toml")],
    device: Annotated[str, typer.Option(help="h100, h200, a100, l40s, rtx4090, or here: this machine's CPU, timed.")] = "h100",
    workers: Annotated[list[int] | None, typer.Option("--workers", help="Processes, one a device; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Sampled tokens of an episode (default: as many as it may have).", min=0)] = 0,
    question: Annotated[int, typer.Option(help="Tokens of a question with its prompt.", min=1)] = 128,
    network: Annotated[float, typer.Option(help="Gbit/s that a machine sends to others.", min=0.1)] = 400.0,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Foretell time, memory and traffic of a run on other machines."""
    from rsim.cli.commands import run_plan

    run_plan(source, device, workers or [1, 8, 64], tokens, question, network, overrides or [], as_json=as_json)


@app.command(name="eval")
def evaluate(
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
    launcher: Annotated[str, typer.Option(help="ray: spread the questions over a Ray cluster.")] = "",
    workers: Annotated[int, typer.Option(help="Replicas there.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an evaluation with other settings.")] = False,
    out: Annotated[str, typer.Option(help="Folder for results (default: RUN/eval or runs/eval).")] = "",
    overrides: Set = None,
    strategies: Strategies = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Measure accuracy, with a 95% interval, and write the episodes and a summary."""
    from rsim.cli.commands import run_eval
    from rsim.evaluation.loading import EvalSettings

    merged = tuple(_merge(overrides, strategies=strategies, data_dir=data_dir))
    settings = EvalSettings(run, planner, reasoner, data, split, limit, seed, not sample and samples == 1, samples, merged)
    there = {"url": upstream, "name": model, "mode": mode, "at_once": at_once} if upstream else None
    if upstream and reasoner:
        raise UserError(f"--reasoner {reasoner}", "with --upstream the reasoner is what the server has: --model names it")
    for option, given in (("--model", model), ("--mode", mode)):
        if given and not upstream:
            raise UserError(f"{option} {given}", "it is of a server: --upstream URL")
    if launcher not in ("", "ray"):
        raise UserError(f"--launcher {launcher}", "use ray")
    if workers > 1 and not launcher:
        raise UserError(f"--workers {workers}", "say where: --launcher ray")
    summary, page = run_eval(
        settings, upstream=there, out=out, match_tokens=match_tokens, overwrite=overwrite, workers=workers if launcher else 0
    )
    if as_json:
        print(json.dumps(summary))
        return
    print(f"accuracy {summary['accuracy']:.1%}  [{summary['low']:.1%}, {summary['high']:.1%}]  "
          f"flexible {summary['flexible']:.1%}  questions {summary['questions']}  "
          f"tokens/question {summary['tokens_per_question']:.1f}\nreport: {page}")  # fmt: skip


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    as_json: Json = False,
) -> None:
    """Compare two evaluations of the same questions: paired interval and exact test."""
    from rsim.cli.commands import run_compare

    c = run_compare(first, second)
    print(json.dumps(c) if as_json else
          f"A {c['a']:.1%}  B {c['b']:.1%}  A - B {100 * c['difference']:+.1f} points "
          f"[{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]  questions {c['questions']}  "
          f"only A right {c['only_a']}, only B {c['only_b']}, p = {c['p']:.3g}")  # fmt: skip


@app.command()
def solve(
    question: Annotated[str, typer.Argument()],
    run: Annotated[str, typer.Option(help="A run folder or checkpoint.")] = "runs/nano",
    planner: Annotated[str, typer.Option(help="As in eval; default: the run's.")] = "",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Answer one question, printing each step with its strategy as it is made."""
    from rsim.cli.commands import run_solve

    record = run_solve(question, run, planner, overrides or [], live=not as_json)
    print(json.dumps(record) if as_json else f"answer: {record['predicted']}")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, a packaged model, a folder, a GGUF file or a hub id.")
    ],
    folder: Annotated[str, typer.Argument(metavar="FOLDER")],
    as_json: Json = False,
) -> None:
    """Write a reasoner as a folder for a vLLM server that is to sample while it is trained."""
    from rsim.cli.commands import run_export

    target = run_export(source, folder)
    print(json.dumps({"folder": str(target)}) if as_json else f"wrote {target}")


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    to: Annotated[str, typer.Option(help="Only write the hub-ready folder here; nothing is uploaded.")] = "",
    licence: Annotated[str, typer.Option()] = "apache-2.0",
    private: Annotated[bool, typer.Option("--private")] = False,
    as_json: Json = False,
) -> None:
    """Publish a run's planner on the Hugging Face hub, with a generated model card."""
    import tempfile

    from rsim.serving.card import hub_folder
    from rsim.serving.card import push as upload

    if to:
        done = str(hub_folder(run, Path(to), repo=repo, licence=licence))
    else:
        with tempfile.TemporaryDirectory() as folder:
            done = upload(hub_folder(run, Path(folder) / "planner", repo=repo, licence=licence), repo, private=private)
    print(json.dumps({"pushed": not to, "to": done}) if as_json else done)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    out: Annotated[str, typer.Option(help="Default: RUN/report.html")] = "",
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    from rsim.report.report import build_report

    page = build_report(Path(run), Path(out) if out else None)
    print(json.dumps({"report": str(page)}) if as_json else f"report: {page}")


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the runs.")] = "runs",
    seed: Annotated[int, typer.Option()] = 0,
    questions: Annotated[int, typer.Option(help="Unseen problems in the final table.", min=10)] = 500,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train nano planner and reasoner, compare with every control on unseen problems, write a report."""
    from rsim.cli.demo import run_demo

    table = run_demo(Path(out), seed, questions, overrides or [], quiet=as_json)
    if as_json:
        print(json.dumps(table))


@app.command()
def serve(
    planner: Annotated[str, typer.Option(help="A planner's folder or hub id, or a rule: random, fixed:NAME, sequence:A,B.")],
    upstream: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8080/v1.")] = "",
    model: Annotated[str, typer.Option(help="A model to run in this process; with --upstream, the one to probe with.")] = "",
    mode: Annotated[str, typer.Option(help="prefill or turn; default: probed.")] = "",
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8017,
    gate: Annotated[
        float | None, typer.Option(help="Below this probability the planner does not intervene.", min=0, max=1)
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="What ends a step; \\n is a line break. Default, as of all rules: the planner's own.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Decisions before the answer is forced.", min=1)] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Longest step.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, injected prompts included.", min=1)] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="Kept back for the answer.", min=1)] = None,
    slots: Annotated[int, typer.Option(help="Answers at once.", min=1)] = 64,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=0)] = 64,
    request_seconds: Annotated[float, typer.Option(help="Time limit of a request.", min=1)] = 600.0,
    strategies: Strategies = "",
) -> None:
    """Serve any LLM with a planner, over OpenAI's API. $RSIM_API_KEY guards it; $RSIM_UPSTREAM_API_KEY is the upstream's."""
    from rsim.cli.serve import RuleOptions, ServeOptions, run_server

    split = None if delimiter is None else delimiter.replace("\\n", "\n")
    rules = RuleOptions(gate, split, max_steps, step_tokens, max_tokens, answer_tokens)
    run_server(ServeOptions(planner, upstream, model, mode, host, port, rules, slots, waiting, request_seconds, strategies))


@lab.command()
def pretrain(
    size: Annotated[str, typer.Option(help="nano-xs, nano-s, nano-m, nano-l, nano-llama, nano-x or nano-d")] = "nano-s",
    out: Annotated[str, typer.Option(help="Default: where the size's name finds it, in the cache.")] = "",
    seed: Annotated[int, typer.Option()] = 0,
    steps: Annotated[int, typer.Option(help="0: the size's own number.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Pre-train a nano base from nothing on written lab solutions."""
    from rsim.lab.pretrain import SIZES, PretrainConfig
    from rsim.lab.pretrain import pretrain as run
    from rsim.models.weights import cache_folder

    if size not in SIZES:
        raise UserError(f"--size {size}", f"use one of {', '.join(SIZES)}")
    folder = Path(out) if out else cache_folder() / size
    result = run(PretrainConfig(size=size, seed=seed, steps=steps or None), folder, quiet=as_json)
    print(json.dumps(result | {"folder": str(folder)}) if as_json else f"saved {folder}")


@config_app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="[PRESET|CONFIG.toml]")] = "",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Print a config with every default filled in; without an argument, list the presets."""
    from rsim.config import load_config, presets, to_table, to_toml

    if not source:
        print(json.dumps(presets()) if as_json else "\n".join(presets()))
        return
    config = load_config(source, overrides or [])
    print(json.dumps(to_table(config)) if as_json else to_toml(config), end="\n" if as_json else "")


def _merge(
    overrides: list[str] | None, *, strategies: str = "", rewards: list[str] | None = None, data_dir: str = ""
) -> list[str]:
    """``--set`` overrides with those that have an option of their own."""
    merged = list(overrides or [])
    if strategies:
        merged.append(f"models.strategies={json.dumps(strategies)}")
    if rewards:
        merged.append(f"rewards.custom={json.dumps(rewards)}")
    if data_dir:
        merged.append(f"data.data_dir={json.dumps(data_dir)}")
    return merged


def main(arguments: list[str] | None = None) -> Any:
    """Runs a command: exit 2 with one line for what the user can put right, 130 after Ctrl-C."""
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        print(f"rsim: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that cannot be written, a connection that broke
        print(f"rsim: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as done:
        if done.code == 130:  # Ctrl-C, as typer reports it
            print("rsim: stopped; a training run goes on with --resume", file=sys.stderr)
        raise
