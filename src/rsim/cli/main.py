"""The command ``rsim``: a table of commands.

A command's module, ``rsim.cli.NAME``, is imported when it is asked for. Its ``command`` is a function, or a group of them."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rsim.errors import UserError

COMMANDS = {
    "train": "Train a planner and a reasoner together, stage by stage.",
    "sweep": "Search the settings of a run at random: trials, the best again on other seeds, a table and a plot.",
    "plan": "Foretell time, memory and traffic of a run on other machines.",
    "eval": "Measure accuracy, with a 95% interval, and write the episodes and a summary.",
    "collect": "Play every arm on every question, keep the log, and say what there is to gain.",
    "fit": "Fit a planner to logs of arms: cross-fitted, with a gate that leaves the model alone where no gain is sure.",
    "compare": "Compare two evaluations of the same questions: paired interval and exact test.",
    "solve": "Answer one question, printing each step with its strategy as it is made.",
    "report": "Write one self-contained HTML page about a run.",
    "demo": "Train nano planner and reasoner, compare with controls on unseen problems, write a report.",
    "serve": "Serve any LLM with a planner, over OpenAI's API.",
    "push": "Publish a run's planner on the Hugging Face hub, with a generated model card.",
    "export": "Write a reasoner as a folder for a vLLM server that is to sample while it is trained.",
    "check": "Grade an answer as rewards and evaluation do: strictly (one box) and flexibly (the last answer).",
    "lab": "The nano lab: tiny models on procedural problems.",
    "strategies": "Look at strategy sets.",
    "data": "Look at data sets and check files.",
    "config": "Look at configurations.",
}
EXAMPLES = {  # the last line of each command's help
    "train": "rsim train nano --out runs/mine --set train.steps=10",
    "sweep": "rsim sweep sweep.toml --out runs/sweep",
    "plan": "rsim plan qwen2.5-0.5b-math --device rtx4090 --workers 1",
    "eval": "rsim eval runs/mine --planner none --limit 500 --out runs/alone",
    "collect": "rsim collect default --data gsm8k --limit 500 --upstream http://127.0.0.1:8080/v1 --out log",
    "fit": "rsim fit log --planner smollm2-135m --out planner",
    "compare": "rsim compare runs/mine/eval runs/alone",
    "solve": "rsim solve '85-(12+5)+26=?' --run runs/mine",
    "report": "rsim report runs/mine",
    "demo": "rsim demo --out runs-demo",
    "serve": "rsim serve --planner runs/mine/checkpoints/best/planner --upstream http://127.0.0.1:8080/v1",
    "push": "rsim push runs/mine me/my-planner --to folder",
    "export": "rsim export runs/mine served",
    "check": "rsim check --gold 1/2 --answer '\\boxed{0.5}'",
    "lab pretrain": "rsim lab pretrain --size nano-m",
    "strategies show": "rsim strategies show default",
    "data list": "rsim data list --gym",
    "data show": "rsim data show gym:chain_sum --limit 5",
    "data fetch": "rsim data fetch gsm8k",
    "data validate": "rsim data validate train.jsonl --column question=problem",
    "config show": "rsim config show nano --set seed=1 --explain",
}
_MODULES = {"serve": "serve_command"}  # where the module has another name
_UsageError: Any = typer.BadParameter.__base__  # of a wrong command line; typer does not export it


class Commands(TyperGroup):
    """A group that imports a command's module only to run it: ``rsim --help`` reads the table alone."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        command = import_module(f"rsim.cli.{_MODULES.get(str(name), name)}").command
        if isinstance(command, typer.Typer):
            command.info.help = COMMANDS[str(name)]
            group = typer.main.get_group(command)
            for sub, one in group.commands.items():
                one.epilog = f"Example: {EXAMPLES[f'{name} {sub}']}" if f"{name} {sub}" in EXAMPLES else None
            return name, group, rest
        alone = typer.Typer(add_completion=False)
        alone.command(epilog=f"Example: {EXAMPLES[str(name)]}")(command)
        return name, typer.main.get_command(alone), rest


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a planner and a reasoner together, and plug the planner into any LLM.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"rsim {import_module('rsim').__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Options of rsim itself."""


for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Exits with 2 and one line for what the user can put right, with 130 after Ctrl-C."""
    # torch and transformers make half a million objects that live on: looking through them as often as Python does by
    # default takes a sixth of the time of their import.
    gc.set_threshold(50_000, 20, 20)
    try:
        status = app(args=arguments, prog_name="rsim", standalone_mode=False)
    except _UsageError as error:
        message = error.format_message()  # empty where the help was printed in its place
        _fail(f"{message.rstrip('.')} (see {error.ctx.command_path} --help)" if message and error.ctx else message)
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written, a connection that broke
        _fail(str(error))
    if status == 130:  # Ctrl-C, as typer reports it
        print("rsim: stopped", file=sys.stderr)
    sys.exit(status or 0)


def _fail(message: str) -> None:
    if message:
        print("rsim: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
