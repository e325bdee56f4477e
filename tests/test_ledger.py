"""The ledger: rows that say where they come from, none lost, none edited, and a page made of nothing else."""

from __future__ import annotations

import json
import multiprocessing
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer.main

from rsim.errors import UserError
from studies import ledger
from studies.__main__ import command_line, main
from studies.ledger import Row

ROOT = Path(__file__).parent.parent
TOPICS = sorted((ROOT / "results").glob("*.json"))
KEYS = ["what", "value", "unit", "goal", "met", "command", "seeds", "interval", "machine", "date", "commit", "superseded"]


def rows_of(folder: Path, topic: str = "topic") -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in ledger.read(folder / "results" / f"{topic}.json"):
        found.setdefault(row.what, []).append(row)
    return found


def _record(folder: Path, number: int) -> None:
    for i in range(20):
        ledger.record("topic", 1, [Row(f"{number}-{i}", i)], folder)


def test_measurements_that_run_side_by_side_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_record, args=(tmp_path, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(rows_of(tmp_path)) == {f"{n}-{i}" for n in range(4) for i in range(20)}


def test_the_file_has_these_keys_and_no_others(tmp_path):
    ledger.record("topic", 7, [Row("a", 1.5, "s", "at most 1 s", False, seeds=[0], interval=[1.0, 2.0])], tmp_path)
    written = json.loads((tmp_path / "results" / "topic.json").read_text())
    assert list(written) == ["issue", "rows"]
    assert written["issue"] == 7
    assert list(written["rows"][0]) == KEYS == [f.name for f in fields(Row)]
    assert written["rows"][0] | {"machine": "", "date": "", "commit": "", "command": ""} == {
        "what": "a",
        "value": 1.5,
        "unit": "s",
        "goal": "at most 1 s",
        "met": False,
        "seeds": [0],
        "interval": [1.0, 2.0],
        "superseded": False,
        "machine": "",
        "date": "",
        "commit": "",
        "command": "",
    }


def test_measured_again_by_the_same_command_on_the_same_seeds_a_row_is_replaced(tmp_path):
    for value in (1, 2):
        ledger.record("topic", 1, [Row("a", value, command="one", seeds=[0]), Row("b", value, command="one")], tmp_path)
    assert {what: [r.value for r in rows] for what, rows in rows_of(tmp_path).items()} == {"a": [2], "b": [2]}


@pytest.mark.parametrize(
    "later",
    [
        (Row("a", 2, command="one --rate 3", seeds=[0]), False),
        (Row("a", 2, command="one", seeds=[0, 1]), False),
        (Row("a", 2, command="one", seeds=[0]), True),
    ],
    ids=["another command", "other seeds", "settings inside the study"],
)
def test_measured_again_with_other_settings_the_first_row_stays_superseded(tmp_path, later):
    row, changed = later
    ledger.record("topic", 1, [Row("a", 1, command="one", seeds=[0]), Row("b", 1, command="one")], tmp_path)
    ledger.record("topic", 1, [row], tmp_path, changed=changed)
    ledger.record("topic", 1, [row], tmp_path)
    found = rows_of(tmp_path)
    assert [(r.value, r.superseded) for r in found["a"]] == [(1, True), (2, False)]
    assert [(r.value, r.superseded) for r in found["b"]] == [(1, False)]


def test_what_a_command_measures_no_more_is_superseded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["studies/__main__.py", "topic", "--record"])
    whole, part, other = ("python -m studies topic" + more for more in ("", " --only a", " --seeds 3"))
    rows = [Row("a", 1, command=whole), Row("b", 1, command=part), Row("c", 1, command=whole), Row("d", 1, command=other)]
    ledger.record("topic", 1, rows, tmp_path)
    ledger.retire("topic", {"a"}, tmp_path)
    assert {name: found[0].superseded for name, found in rows_of(tmp_path).items()} == {
        "a": False,
        "b": True,
        "c": True,
        "d": False,
    }


def test_rows_of_what_was_replaced_stay_and_are_superseded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["studies/__main__.py", "topic"])
    ledger.record("topic", 1, [Row("a", 1), Row("b", 2)], tmp_path)
    ledger.record("other", 1, [Row("a", 1)], tmp_path)
    ledger.supersede(["topic:b"], tmp_path)
    assert [r.superseded for r in ledger.read(tmp_path / "results/topic.json")] == [False, True], "of a part alone"
    ledger.supersede(["topic"], tmp_path)
    assert [(r.value, r.superseded) for r in ledger.read(tmp_path / "results/topic.json")] == [(1, True), (2, True)]
    assert not ledger.read(tmp_path / "results/other.json")[0].superseded
    with pytest.raises(FileNotFoundError):
        ledger.supersede(["none"], tmp_path)


def test_the_command_of_a_row_is_what_measured_it_not_where_it_went(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/studies/__main__.py", "gpu", "--only", "speed", "--record", "--supersede"])
    assert Row("x", 1).command == "python -m studies gpu --only speed"


def test_the_machine_of_a_row_names_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    ledger._machine.cache_clear()
    try:
        assert Row("x", 1).machine.endswith(", NVIDIA H200")
    finally:
        ledger._machine.cache_clear()


def test_a_table_names_each_command_once_and_what_is_superseded():
    shown, sources = ledger.table(
        [
            Row("a", 0.5, "share", interval=[0.4, 0.6], command="one"),
            Row("b", 2, command="two", superseded=True),
            Row("c", 3, goal="4", met=False, command="one"),
        ]
    )
    assert shown.splitlines()[2:] == [
        "| a | 50.0% | 40.0% to 60.0% |  |  | 1 |",
        "| b | 2 |  |  | superseded | 2 |",
        "| c | 3 |  | 4 | **no** | 1 |",
    ]
    assert [line.split(":")[0] for line in sources.splitlines()] == ["1. `one`", "2. `two`"]


@pytest.mark.parametrize("file", TOPICS, ids=lambda f: f.stem)
def test_every_topic_has_its_study_and_every_row_its_goal_and_a_command_that_can_be_typed(file):
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written) == ["issue", "rows"]
    current = [r["what"] for r in written["rows"] if not r["superseded"]]
    assert len(current) == len(set(current)), "one row a question; older ones are superseded"
    if file.stem not in ledger.titles():
        assert not current, "a deleted study claims nothing"
        return
    app = typer.main.get_command(command_line(file.stem))
    for typed in {r["command"] for r in written["rows"] if not r["superseded"]}:
        python, module, package, name, *options = shlex.split(typed)
        assert (python, module, package, name) == ("python", "-m", "studies", file.stem)
        app.make_context(name, options)  # raises where an option is not there, or has another type
    for r in written["rows"]:
        assert list(r) == KEYS
        assert (r["met"] is None) == (not r["goal"]), r["what"]


def test_the_page_of_results_is_made_of_the_ledger():
    for file, text in ledger.pages(ROOT).items():
        assert (ROOT / file).read_text(encoding="utf-8") == text, "run make results"


def test_every_page_of_a_study_belongs_to_a_topic():
    topics = {file.stem for file in TOPICS} & set(ledger.titles())
    assert {file.stem for file in (ROOT / "docs" / "results").glob("*.md")} <= topics | {ledger.PAST.stem}


def test_studies_are_listed_and_an_unknown_one_is_one_line(capsys):
    main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ledger.titles())
    with pytest.raises(UserError, match="no study 'fig9'"):
        main(["fig9"])


def test_a_study_that_is_run_with_record_leaves_its_rows_and_the_page(tmp_path, monkeypatch, capsys):
    import studies.demo

    def measured(seed: int = 0):
        yield Row("first", 1, "s", "at most 2 s", True, seeds=[seed])
        assert rows_of(tmp_path, "demo"), "a row is kept as soon as it is there"
        yield Row("second", 0.5, "share")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies.demo, "run", measured)
    monkeypatch.setattr(sys, "argv", ["studies", "demo", "--seed", "3", "--record"])
    with pytest.raises(SystemExit) as ended:
        main(sys.argv[1:])
    assert not ended.value.code
    (first,), (second,) = rows_of(tmp_path, "demo").values()
    assert (first.seeds, first.command, second.shown) == ([3], "python -m studies demo --seed 3", "50.0%")
    assert "| first | 1 s |" in (tmp_path / "docs" / "results.md").read_text()
    assert "met" in capsys.readouterr().out


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda f: f.name)
def test_links_lead_to_files_and_topics_that_are_there(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor and file.name == "results.md":
            assert f"\n## {anchor}\n" in file.read_text(encoding="utf-8"), anchor


def test_the_readmes_table_is_the_demos_rows():
    """A number that people read first is a row of the ledger, with its interval, and not superseded."""
    root = Path(__file__).parents[1]
    rows = {row.what: row for row in ledger.read(root / "results/demo.json") if not row.superseded}
    shown = re.findall(
        r"^\| \**([^|*]+?)\** \| \**([\d.]+%)\** \| ([^|]+) \|$", (root / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert len(shown) > 5
    for name, value, interval in shown:
        row = rows[f"demo: {name}"]
        assert (row.shown, row.between) == (value, interval), name


def test_the_readmes_other_numbers_are_rows_of_claims_and_plugins():
    """Each value with its interval, and each accuracy of that section."""
    root = Path(__file__).parents[1]
    section = (
        (root / "README.md").read_text(encoding="utf-8").partition("rSIM, GRPO and the planner alone")[2].partition("## ")[0]
    )
    rows = [row for t in ("claims", "plugins") for row in ledger.read(root / f"results/{t}.json") if not row.superseded]
    known = {tuple(f"{100 * x:.1f}" for x in (row.value, *row.interval)) for row in rows}
    said = re.findall(r"([-\d.]+)%? \[([-\d.]+), ([-\d.]+)\]", section)
    assert len(said) > 10
    assert set(said) <= known
    assert set(re.findall(r"([\d.]+\.\d)%", section)) <= {value for value, _, _ in known}


_WITH_INTERVAL = re.compile(r"(-?[\d.]+)%? \[([-\d.]+), ([-\d.]+)\]")


@pytest.mark.parametrize(
    "page", sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "results.md"), ids=lambda f: f.name
)
def test_a_number_with_an_interval_is_a_row_or_on_a_page_that_a_study_made(page):
    rows = [row for file in TOPICS for row in ledger.read(file) if not row.superseded and row.interval]
    known = {tuple((100 if row.unit == "share" else 1) * x for x in (row.value, *row.interval)) for row in rows}
    for made in (ROOT / "docs/results").glob("*.md"):
        if made.stem != ledger.PAST.stem:
            text = made.read_text(encoding="utf-8").replace("+", "")
            known |= {tuple(map(float, found)) for found in _WITH_INTERVAL.findall(text)}
    rounded = {tuple(round(x, 1) for x in row) for row in known}
    for found in _WITH_INTERVAL.findall(page.read_text(encoding="utf-8")):
        assert tuple(map(float, found)) in rounded, found
