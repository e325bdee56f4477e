"""The Python side of the commands. Each function does what the command of its name does, prints nothing but what it says
here, and raises `rsim.UserError` where the command would end with one line and exit code 2."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rsim.answers.extract import Mode
from rsim.config import Config, Overrides, as_overrides, load_config, validate
from rsim.errors import UserError
from rsim.game.episode import Episode
from rsim.game.problem import Kind, Problem
from rsim.rewards import grade
from rsim.rewards.custom import Reward, RewardFunction


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    rewards: Sequence[Reward | RewardFunction] = (),
    on_step_end: Callable[[dict[str, Any]], object] = lambda record: None,
    on_evaluate: Callable[[dict[str, Any]], object] = lambda record: None,
    on_save: Callable[[Path], object] = lambda folder: None,
    resume: bool = False,
    resume_from: str = "",
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a planner and a reasoner together, and prints a line for each step and evaluation.

    Ctrl-C lets the step end, saves and raises `KeyboardInterrupt`; a second Ctrl-C stops at once.

    Args:
        config: a `Config`, or what `load_config` takes: a preset, a file or a dict.
        rewards: functions of an `Episode` that are added to the returns of both agents, or `Reward`s, which have an agent and
            a weight. A run that had some is resumed with the same ones.
        on_step_end: called after each step with its record, as ``metrics.jsonl`` has it: ``step``, ``accuracy`` (0 to 1),
            ``reward/NAME`` (batch means), ``planner/entropy`` (nats), ``sampled_tokens``, ``seconds``, ...
        on_evaluate: called after each held-out evaluation (the first is before any step), with ``step``, ``eval/accuracy``,
            ``eval/accuracy_low``, ``eval/accuracy_high``, ``eval/flexible`` (0 to 1) and ``eval/tokens`` (a question).
        on_save: called with the folder of each checkpoint.
            A callback that returns True stops the run after the step, with a checkpoint to resume from.
        resume: goes on from the newest checkpoint of the run's folder.
        resume_from: goes on from the one of that name, e.g. ``step-000010``.
        force: also with a config that has changed.
        quiet: prints nothing.

    Returns:
        the last held-out evaluation: ``accuracy``, ``low``, ``high``, ... as `evaluate` has them; empty where a callback
        stopped the run before one. All else is in the run's folder (``config.out``, by default ``runs/NAME``).

    Raises:
        UserError: of config, data, models and folders; a reward that is no finite number; numbers that are none.
    """
    from rsim.training import run

    def say(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    def on_record(record: dict[str, Any]) -> object:
        for line in run.told(record):
            say(line)
        if "eval/accuracy" in record:
            return on_evaluate(record)
        return on_step_end(record) if "accuracy" in record else None

    config = config if isinstance(config, Config) else load_config(config)
    validate(config)
    own = [reward if isinstance(reward, Reward) else Reward(reward) for reward in rewards]
    return run.train(
        config,
        resume=resume,
        resume_from=resume_from,
        force=force,
        rewards=own,
        on_record=on_record,
        on_save=on_save,
        say=say,
    )


def evaluate(
    run: str | Path,
    out: str | Path = "",
    *,
    planner: str | Path = "",
    reasoner: str | Path = "",
    data: str | Path = "",
    split: str = "test",
    limit: int = 200,
    seed: int = 0,
    sample: bool = False,
    samples: int = 1,
    match_tokens: str | Path = "",
    upstream: str = "",
    model: str = "",
    mode: str = "",
    at_once: int = 8,
    overwrite: bool = False,
    overrides: Overrides = (),
    on_episode: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Measures accuracy on unseen questions and writes episodes, summary and report. One that was stopped goes on.

    Args:
        run: a run's folder, a checkpoint in it, or a preset (its models, untrained).
        out: the folder for the results; by default ``RUN/eval``, of a checkpoint ``RUN/eval-NAME``, of a preset ``runs/eval``.
        planner: ``none``, ``random``, ``fixed:NAME``, ``sequence:a,b``, ``shuffled``, ``prompted``, ``wait:TIMES``, ``oracle``
            or a planner's folder; by default the run's.
        reasoner: another one than the run's.
        data: as ``data.eval``; by default the run's.
        split: ``train``, ``dev`` or ``test``.
        limit: number of questions, drawn with ``seed``.
        seed: of the questions drawn and of sampling.
        sample: at the temperature of training; by default greedy.
        samples: of a question, for majority vote and pass@k.
        match_tokens: another evaluation's folder: as many samples as cost its tokens.
        upstream: the base URL of an OpenAI-compatible server that has the reasoner.
        model: its name there; by default the first that is listed.
        mode: how prompts are injected there, ``prefill`` or ``turn``; by default probed.
        at_once: answers asked for together there.
        overwrite: replaces an evaluation with other settings.
        overrides: as `load_config` has them.
        on_episode: called with ``(done, of)`` as episodes end.

    Returns:
        what ``summary.json`` holds: ``accuracy`` (0 to 1, strict), ``low``, ``high`` (the 95% bootstrap interval),
        ``flexible``,
        ``questions``, ``tokens_per_question``, ``usage`` (the strategies' shares of the steps), ``folder``, ``report``, ...

    Raises:
        UserError: no such run, planner, data or split; the folder holds another evaluation; a server fails.
    """
    _of_a_server(upstream, model=model, mode=mode)
    _at_least(1, limit=limit, samples=samples, at_once=at_once)
    if match_tokens and samples > 1:
        raise UserError(f"--samples {samples} with --match-tokens", "which says how many samples are taken: leave one out")
    if upstream and reasoner:
        raise UserError(f"--reasoner {reasoner}", "with --upstream the reasoner is what the server has: --model names it")
    from rsim.evaluation.loading import EvalSettings
    from rsim.evaluation.saved import evaluate_into
    from rsim.evaluation.upstream import ServedModel
    from rsim.policies.loading import quiet_models
    from rsim.runs.locate import evaluation_folder

    quiet_models()
    settings = EvalSettings(
        run=str(run),
        planner=str(planner),
        reasoner=str(reasoner),
        data=str(data),
        split=split,
        limit=limit,
        seed=seed,
        greedy=not sample and samples == 1,
        samples=samples,
        overrides=tuple(as_overrides(overrides)),
    )
    folder = Path(out) if out else evaluation_folder(str(run))
    served = ServedModel(upstream, model, mode, at_once) if upstream else None
    result = evaluate_into(
        folder, settings, served=served, match_tokens=str(match_tokens), overwrite=overwrite, on_episode=on_episode
    )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    record = {"step": 0, "eval/accuracy": result.accuracy, "eval/accuracy_low": result.low, "eval/accuracy_high": result.high}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    other = reasoner or summary.get("model", "")
    title = f"{summary['data']} {split}, {result.questions} questions{f', reasoner {other}' if other else ''}"
    # Which weights a table is of; with another planner, or none, it is not of the checkpoint's.
    source = {key: summary[key] for key in ("checkpoint", "weights") if key in summary and not planner}
    (folder / "table.json").write_text(json.dumps({"title": title, **source, "rows": [result.to_json()]}) + "\n")
    return summary | {"folder": str(folder), "report": str(report(folder))}


def _at_least(least: int, **options: float) -> None:
    for option, given in options.items():
        if given < least:
            raise UserError(f"{option} = {given}", f"must be at least {least}")


def _of_a_server(upstream: str, **options: str) -> None:
    for option, given in options.items():
        if given and not upstream:
            raise UserError(f"--{option} {given}", "it is of a server: --upstream URL")


def solve(
    question: str,
    run: str | Path = "runs/nano",
    *,
    planner: str | Path = "",
    overrides: Overrides = (),
    on_step: Callable[[dict[str, Any]], object] = lambda step: None,
) -> dict[str, Any]:
    """Answers one question greedily.

    Args:
        question: as data would have it.
        run: as `evaluate` has it.
        planner: as `evaluate` has it.
        overrides: as `load_config` has them.
        on_step: called with each step as it is made: ``strategy`` (None without a planner), ``text``, ``forced`` and
            ``probabilities`` (of the strategies, in their order; None where nothing was chosen).

    Returns:
        ``predicted`` (None: no answer), ``steps``, ``sampled_tokens``, ``injected_tokens``, ``flags``, the strategies'
        ``names``.

    Raises:
        UserError: the question is empty or too long, or there is no such run or planner.
    """
    if not question.strip():
        raise UserError("the question is empty", 'e.g. rsim solve "12+71-26=?"')
    from rsim.evaluation.evaluate import episode_record
    from rsim.evaluation.evaluate import evaluate as played
    from rsim.evaluation.loading import load_game
    from rsim.game.record import episode_json
    from rsim.policies.loading import quiet_models
    from rsim.runs.locate import locate

    quiet_models()
    settings = as_overrides(overrides)
    config, checkpoint = locate(str(run), settings)
    problem = Problem(question, "")
    game = load_game(config, checkpoint, str(planner), "", [problem], overrides=settings)

    def watch(index: int, episode: Episode) -> None:
        on_step(episode_json(episode, game.names)["steps"][-1])

    _, episodes, scores = played("solve", game, [problem], config.rewards, seed=0, on_step=watch)
    record = episode_record(episodes[0], scores[0], game.names)
    return {key: value for key, value in record.items() if key not in ("answer", "correct", "rewards")}  # there is no gold


def collect(
    arms: str,
    data: str,
    out: str | Path,
    *,
    split: str = "train",
    limit: int = 0,
    model: str = "",
    piece: int = 50,
    exclude: str = "",
    upstream: str = "",
    mode: str = "",
    at_once: int = 8,
    overrides: Overrides = (),
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Any]:
    """Plays every arm on every question and keeps the log in the folder ``out``; a log that is there goes on.

    Args:
        arms: a TOML file, or ``default``.
        data: a known set, or a file.
        out: the log's folder.
        split: ``train``, ``dev`` or ``test``.
        limit: number of questions, 0: all; it may grow.
        model: the reasoner, or its name at the server ``upstream``.
        piece: questions in one file of the log.
        exclude: a file of ids, one a line, of questions to leave out.
        upstream: as `evaluate` has it.
        mode: as `evaluate` has it.
        at_once: questions asked for together there.
        overrides: as `load_config` has them.
        on_progress: called with ``(done, of)``, both in episodes, at the start and whenever the log has more.

    Returns:
        `rsim.collecting.headroom.Headroom` tables, one a data set and split: ``arms``, ``rules`` and ``pairs``.

    Raises:
        UserError: wrong arms, settings or questions; the log was begun with others; a server fails (what was written stays).
    """
    _of_a_server(upstream, mode=mode)
    _at_least(0, limit=limit)
    _at_least(1, piece=piece, at_once=at_once)
    from rsim.collecting.headroom import of_logs
    from rsim.collecting.play import Collection
    from rsim.collecting.play import collect as played
    from rsim.evaluation.upstream import ServedModel
    from rsim.policies.loading import quiet_models

    quiet_models()
    wanted = Collection(
        arms=arms,
        data=data,
        split=split,
        limit=limit,
        model="" if upstream else model,
        piece=piece,
        exclude=exclude,
        overrides=tuple(as_overrides(overrides)),
        served=ServedModel(upstream, model, mode, at_once) if upstream else None,
    )
    return of_logs([played(wanted, Path(out), on_progress)])


def fit(
    logs: Sequence[str | Path],
    out: str | Path,
    *,
    planner: str = "smollm2-135m",
    tests: Sequence[str | Path] = (),
    price: float = 0.0,
    data_dir: str = "",
    on_state: Callable[[int, int], None] = lambda read, of: None,
) -> Any:
    """Fits a planner to logs of one model and writes its folder ``out``, a new one.

    Args:
        logs: folders that `collect` wrote.
        out: the planner's folder.
        planner: its base LLM, which stays as it is.
        tests: logs of other questions to read the planner off.
        price: of a thousand tokens, in right answers: 0.1 is ten points.
        data_dir: folder of the data sets; by default ``$RSIM_DATA``.
        on_state: called with ``(read, all)`` as the base reads the questions.

    Returns:
        `rsim.collecting.fit.Fitted`: ``planner``, ``standings`` (what it is worth, cross-fitted), ``tested`` (on
        ``tests``), ``strays``.

    Raises:
        UserError: the folder exists; logs that do not belong together; too few questions.
    """
    _at_least(0, price=price)
    _at_least(1, logs=len(logs))
    if Path(out).exists():
        raise UserError(f"--out {out} exists already", "name a new folder")
    from rsim.collecting.fit import fit_planner
    from rsim.collecting.log import Log
    from rsim.collecting.planner_folder import write
    from rsim.config import DataConfig
    from rsim.policies.loading import quiet_models

    quiet_models()
    opened, others = ([Log(Path(folder)) for folder in folders] for folders in (logs, tests))
    fitted = fit_planner(opened, planner, tests=others, price=price, data=DataConfig(data_dir=data_dir), on_state=on_state)
    write(fitted, opened, Path(out), base=planner, price=price)
    return fitted


def report(run: str | Path | Sequence[str | Path], out: str | Path = "") -> Path:
    """Writes one self-contained HTML page about a run or an evaluation, by default ``RUN/report.html``, or one that compares
    several, by default ``comparison.html`` in the first one's folder; returns its path.

    Raises:
        UserError: a folder has no metrics, a file in it is damaged, or the page cannot be written.
    """
    from rsim.reporting.report import build_comparison, build_report

    target = Path(out) if out else None
    if isinstance(run, str | Path):
        return build_report(Path(run), target)
    _at_least(1, runs=len(run))
    return build_comparison([Path(one) for one in run], target)


def push(run: str | Path, repo: str, *, to: str | Path = "", licence: str = "apache-2.0", private: bool = False) -> str:
    """Publishes a run's planner on the Hugging Face hub as ``repo`` (``OWNER/NAME``), with a generated model card.

    Args:
        run: a run's folder, or a checkpoint in it.
        repo: its name on the hub.
        to: only writes the hub-ready folder there; nothing is uploaded.
        licence: for the card.
        private: makes a private repository.

    Returns:
        the address, or the folder.

    Raises:
        UserError: ``run`` has no trained planner, the folder exists, or the hub refuses.
    """
    from rsim.policies.loading import quiet_models
    from rsim.serving import card

    quiet_models()
    if to:
        return str(card.hub_folder(str(run), Path(to), repo=repo, licence=licence))
    with tempfile.TemporaryDirectory() as folder:
        return card.push(card.hub_folder(str(run), Path(folder) / "planner", repo=repo, licence=licence), repo, private=private)


def check(answer: str, gold: str, *, kind: str = "latex", tolerance: float = 0.0, unsafe: bool = False) -> dict[str, Any]:
    r"""Grades an answer as rewards and evaluation do.

    Args:
        answer: a bare answer, or a model's final words.
        gold: the right answer; for code, the test program.
        kind: ``numeric``, ``latex``, ``choice``, ``text`` or ``code``.
        tolerance: the relative error that a number may have.
        unsafe: runs code without a sandbox where none can be built.

    Returns:
        for ``strict`` (one box) and ``flexible`` (the last answer): ``answer`` (what was read, None: nothing), ``right``,
        ``how`` it was found out, and ``failure``, why the checker gave up.

    Raises:
        UserError: there is no such kind, or no sandbox for code.

    Examples:
        >>> check(r"so \boxed{0.5}", r"\frac12")["strict"]["right"]
        True
    """
    _at_least(0, tolerance=tolerance)
    if kind not in get_args(Kind) or kind == "gym":
        raise UserError(f"--kind {kind}", "use numeric, latex, choice, text or code")
    problem = Problem("", gold, kind=cast(Kind, kind), meta={"tolerance": tolerance})
    result = {}
    for mode in get_args(Mode):
        found, verdict = grade.check(problem, answer, mode, unsafe=unsafe)
        result[mode] = {"answer": found} | asdict(verdict)
    return result
