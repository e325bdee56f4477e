"""The log of a collection: a folder with a header and pieces, each written whole or not at all.

``log.json``
    ``settings`` (what the answers depend on), ``arms``, ``cascades``, and ``runs``: when and with which versions it went on.
``strategies.toml``
    the strategy set.
``piece-0000.jsonl``
    one line an arm and question, no question text, so that it can be committed: ``id``, ``data``, ``split``, ``arm``,
    ``answer`` (as read, null where there is none), ``right`` (strict), ``flexible``, ``sampled``, ``injected`` and
    ``prompt`` (tokens), ``steps``, ``flags``; where a program was written also the last ``program``, its ``output`` and
    whether it ``ran`` and printed something.
``texts-0000.jsonl``
    beside it, what a planner reads later: ``id``, ``arm`` and the ``steps`` with their strategies and texts. It repeats what
    the questions say: whether it may be published depends on the data set.
``unfinished.jsonl``
    both, of pieces that are not complete: what an interruption leaves is not played again.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from threading import Lock
from typing import Any

from rsim.collecting.arms import Arms
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record
from rsim.game.tools import SILENT
from rsim.policies.strategies import to_toml
from rsim.rules import FENCE
from rsim.runs.folder import git_commit, json_lines, versions, write_whole

_ERROR = r"^\w*(?:Error|Exception|Interrupt|Exit)\b.*|^the program was ended.*"
_FAILED = re.compile(rf"(?:{_ERROR}|{re.escape(SILENT)})\n```\s*\Z", re.MULTILINE)  # a program's output, in its frame
_UNFINISHED = "unfinished.jsonl"
_FIELDS = {
    "answer": "predicted",
    "right": "correct",
    "flexible": "flexible",
    "sampled": "sampled_tokens",
    "injected": "injected_tokens",
    "prompt": "prompt_tokens",
    "steps": "step_count",
    "flags": "flags",
}


class Log:
    """A log's folder; ``header`` is what ``log.json`` holds, ``unfinished`` what was played of pieces that are not complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header: dict[str, Any] = {}
        if (folder / "log.json").is_file():
            self.header = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        self.unfinished = _lines(folder / _UNFINISHED)
        self.acting: frozenset[str] = frozenset()  # strategies that write programs
        self.lock = Lock()

    def begin(self, settings: dict[str, Any], arms: Arms) -> None:
        """Writes the header, or goes on where the log was begun; arms may be added.

        Raises:
            UserError: the log was begun with other settings, or with another arm of one of these names.
        """
        own = {arm.name: arm.header for arm in arms.arms}
        known, played = self.header.get("settings", settings), self.header.get("arms", {})
        other = [key for key in known if known[key] != settings.get(key)]  # a setting that the log lacks is a later version's
        other += [f"arm {name}" for name in own if played.get(name, own[name]) != own[name]]
        if other:
            raise UserError(f"{self.folder} was begun with other settings ({', '.join(other)})", "give --out another folder")
        self.acting = frozenset(s.name for s in arms.strategies.strategies if s.tool == "python")
        run = {"began": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": git_commit()}
        run |= versions()
        self.header = {"settings": known, "arms": played | own, "cascades": [list(pair) for pair in arms.cascades]} | {
            "runs": [*self.header.get("runs", []), run]
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "strategies.toml", to_toml(arms.strategies))
        _write_lines(self.folder / _UNFINISHED, self.unfinished)
        write_whole(self.folder / "log.json", json.dumps(self.header, indent=1, ensure_ascii=False) + "\n")

    @property
    def system_prompt(self) -> str:
        """The first arm's: one planner acts behind one system prompt."""
        return str(next(iter(self.header["arms"].values()))["system_prompt"])

    def records(self) -> list[Record]:
        """Every line of every piece.

        Raises:
            UserError: the folder holds no log.
        """
        if not self.header:
            raise UserError(f"no log in {self.folder}", "rsim collect ARMS.toml --out writes one")
        return [record for path in sorted(self.folder.glob("piece-*.jsonl")) for record in _lines(path)]

    def texts(self) -> dict[tuple[str, str], list[str]]:
        """What was written, step by step, by question and arm; nothing where the texts are not beside the pieces."""
        found = [one for path in sorted(self.folder.glob("texts-*.jsonl")) for one in _lines(path)]
        return {(one["id"], one["arm"]): [step["text"] for step in one["steps"]] for one in found}

    def keep(self, played: list[Record]) -> None:
        """Keeps what was played of a piece that is not complete yet: records as `play_part` gives them, with ``id``, ``data``,
        ``split`` and ``arm``."""
        lines = [line(record, self.acting) | {"texts": texts(record)} for record in played]
        with self.lock, (self.folder / _UNFINISHED).open("a", encoding="utf-8") as file:
            file.write(_as_text(lines))
            self.unfinished += lines

    def finish(self, piece: int, ids: list[str]) -> None:
        """Writes a piece from what was kept, in the order of ``ids`` and, for a question, of the header's arms."""
        with self.lock:
            new = [one for one in self.unfinished if one["id"] in ids]
            # The texts first: a piece that is there is complete.
            self._merge(f"texts-{piece:04d}.jsonl", [one["texts"] for one in new], ids)
            self._merge(f"piece-{piece:04d}.jsonl", [{k: v for k, v in one.items() if k != "texts"} for one in new], ids)
            self.unfinished = [one for one in self.unfinished if one["id"] not in ids]
            _write_lines(self.folder / _UNFINISHED, self.unfinished)

    def _merge(self, name: str, new: list[Record], ids: list[str]) -> None:
        path, arms = self.folder / name, list(self.header["arms"])
        every = {(one["id"], one["arm"]): one for one in [*_lines(path), *new]}
        order = list(dict.fromkeys([*ids, *(key[0] for key in every)]))  # a log may hold more than a smaller limit asks for
        _write_lines(path, [every[key] for key in sorted(every, key=lambda k: (order.index(k[0]), arms.index(k[1])))])


def line(record: Record, acting: frozenset[str] = frozenset()) -> Record:
    """A line of a piece; ``acting`` are the strategies that write programs, the last of which is shown with its output."""
    plain = {key: record[key] for key in ("id", "data", "split", "arm")} | {key: record[name] for key, name in _FIELDS.items()}
    wrote = [step for step in record["steps"] if step["strategy"] in acting]
    if not wrote:
        return plain
    program, output = wrote[-1]["text"].partition(FENCE)[0], wrote[-1].get("output", "")  # none: the block was not closed
    return plain | {"program": program, "output": output, "ran": bool(output) and not _FAILED.search(output)}


def texts(record: Record) -> Record:
    """What the arm wrote, step by step."""
    steps = [{key: step[key] for key in ("strategy", "text", "output") if key in step} for step in record["steps"]]
    return {"id": record["id"], "arm": record["arm"], "steps": steps}


def _lines(path: Path) -> list[Record]:
    return json_lines(path) if path.is_file() else []


def _as_text(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_lines(path: Path, records: list[Record]) -> None:
    write_whole(path, _as_text(records))
