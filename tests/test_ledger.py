import json
import multiprocessing
import os
import sys
from types import SimpleNamespace

import torch
from studies import ledger


def _record(folder, number):
    os.chdir(folder)
    for i in range(20):
        ledger.record("topic", 1, "A topic", [ledger.row(f"{number}-{i}", i)])


def test_measurements_that_run_side_by_side_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_record, args=(tmp_path, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = json.loads((tmp_path / "results" / "topic.json").read_text())["rows"]
    assert {r["what"] for r in rows} == {f"{n}-{i}" for n in range(4) for i in range(20)}
    assert (tmp_path / "docs" / "results" / "topic.md").read_text().count("\n| ") == 1 + 80


def test_the_command_of_a_row_can_be_typed(monkeypatch):
    main = SimpleNamespace(__spec__=SimpleNamespace(name="studies.gpu.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["somewhere/bench/gpu/__main__.py", "--record"])
    assert ledger.row("x", 1)["command"] == "python -m studies.gpu --record"


def test_the_machine_of_a_row_names_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert ledger.row("x", 1)["machine"].endswith(", NVIDIA H200")


def test_a_page_names_each_command_once():
    rows = [ledger.row("a", 0.5, unit="share", interval=(0.4, 0.6), command="one"), ledger.row("b", 2, command="two"),
            ledger.row("c", 3, goal="4", met=False, command="one")]  # fmt: skip
    lines = ledger.table("topic", rows)
    assert lines[2:5] == ["| a | 50.0% | 40.0% to 60.0% |  |  | 1 |", "| b | 2 |  |  |  | 2 |", "| c | 3 |  | 4 | **no** | 1 |"]
    assert [line.split(":")[0] for line in lines if line[:2] in ("1.", "2.")] == ["1. `one`", "2. `two`"]
