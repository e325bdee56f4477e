"""An evaluation over Ray's replicas is the evaluation of one process, also when a replica dies."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import pytest

from rsim.errors import UserError
from rsim.evaluation import spread as module
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedModel

SETTINGS = EvalSettings("nano", "random", "", "lab", "test", 10, 0, True, 1, ())
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'ray[train]'")


@needs_ray
def test_replicas_answer_as_one_process_does_also_when_one_dies(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os, pathlib, signal\n"
        "from rsim.evaluation.spread import _Player\n"
        "class Deadly(_Player):\n"
        "    def play(self, first, count):\n"
        f"        flag = pathlib.Path({str(tmp_path / 'died')!r})\n"
        "        if first > 0 and not flag.exists():\n"
        "            flag.touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().play(first, count)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine Ray's own 15 means minutes
    monkeypatch.syspath_prepend(str(tmp_path))
    from deadly import Deadly

    monkeypatch.setattr(module, "_Player", Deadly)
    alone = evaluate_into(tmp_path / "alone", SETTINGS)
    there = evaluate_into(tmp_path / "there", SETTINGS, workers=2)
    assert (tmp_path / "died").exists()
    assert (tmp_path / "there" / "episodes.jsonl").read_text() == (tmp_path / "alone" / "episodes.jsonl").read_text()
    same = {k: v for k, v in there.to_json().items() if k != "planner_share"}
    assert same == {k: v for k, v in alone.to_json().items() if k != "planner_share"}
    again = evaluate_into(tmp_path / "there", SETTINGS, workers=2)
    assert again.accuracy == json.loads((tmp_path / "there" / "summary.json").read_text())["accuracy"]


def test_ray_is_named_where_it_is_missing_and_not_mixed_with_a_server(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--at-once"):
        evaluate_into(tmp_path / "a", SETTINGS, workers=2, served=ServedModel("http://127.0.0.1:9/v1", "x"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'ray\[train\]'"):
        evaluate_into(tmp_path / "b", replace(SETTINGS, limit=2), workers=2)
