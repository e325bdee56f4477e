"""A fitted planner as a folder: the planner, a card, and ``fit.json`` with what it is worth."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from rsim.collecting.fit import Fitted, Standing
from rsim.collecting.log import Log
from rsim.runs.folder import git_commit, versions

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
base_model: {base}
tags: [rsim, reasoning, planner]
---

# A planner for {model}

Before each step of {model} ({quantisation}) it chooses what is done next. Fitted with [rsim](https://arxiv.org/abs/2512.08300)
to {questions} questions on which every arm had been played ({data}); a thousand tokens cost {price:g} of a right answer.
{gate}

```sh
rsim serve --planner FOLDER --upstream http://127.0.0.1:8080/v1{tools}
```

It was fitted behind this system prompt, and warns before another model: `{system_prompt}`

## What it is worth

Cross-fitted: each question is answered by a head that was fitted to other questions, gate and all. "gain" is the difference in
accuracy to leaving the model alone, with its paired 95% bootstrap interval; "acts" is the share of questions not left alone.

{table}

{strays}

Other models and other kinds of question have to be measured (`rsim eval --planner FOLDER`).
"""


def as_text(fitted: Fitted) -> str:
    """The table for people, and what the gate and the head do."""
    lines = []
    for how, standings in (("cross-fitted", fitted.standings), ("of the test logs", fitted.tested)):
        for data in dict.fromkeys(row.data for row in standings):
            lines += _table(f"{data}, {{}} questions, {how}", [row for row in standings if row.data == data])
    lines.append(gate(fitted))
    if fitted.strays or fitted.tested_strays:
        lines.append(strays(fitted))
    return "\n".join(lines)


def _table(title: str, rows: list[Standing]) -> list[str]:
    lines = [title.format(rows[0].questions), f"  {'':<24} right    gain  95%                tokens    acts"]
    for row in rows:
        gain = f"{100 * row.gain:+6.1f}  {_interval(row):<17}"
        lines.append(f"  {row.name:<24} {row.accuracy:6.1%} {gain} {row.tokens:6.0f}  {row.acts:6.1%}")
    return lines


def gate(fitted: Fitted) -> str:
    """What the do-no-harm gate came to."""
    if math.isinf(fitted.head.threshold):
        return "The gate is closed: no gain's lower bound is above 0, so the model is always left alone."
    return f"The gate asks for a predicted gain of {100 * fitted.head.threshold:.1f} points; below it the model is left alone."


def strays(fitted: Fitted) -> str:
    """How often it would leave what is known."""
    tests = f" (of the test logs: {fitted.tested_strays:.1%})" if fitted.tested else ""
    return f"At {fitted.strays:.1%} of the questions{tests} it prefers a strategy that no arm tried there: counted as wrong."


def write(fitted: Fitted, logs: list[Log], folder: Path, *, base: str, price: float) -> None:
    """Writes the planner, ``README.md`` and ``fit.json`` into ``folder``."""
    fitted.planner.save_pretrained(folder)
    origin = fitted.planner.fitted_for
    assert origin is not None
    acting = any(tool == "python" for tool in fitted.planner.strategies.tools.values())
    card = _CARD.format(
        base=base,
        model=origin.model,
        quantisation=origin.quantisation,
        questions=_all(fitted.standings)[0].questions,
        data=", ".join(f"{log.header['settings']['data']} {log.header['settings']['split']}" for log in logs),
        price=price,
        gate=gate(fitted),
        tools=" --tools python" if acting else "",
        system_prompt=origin.system_prompt,
        strays=strays(fitted),
        table="\n".join(_markdown(_all(fitted.standings))),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    facts = {
        "logs": [{"folder": log.folder.name, "settings": log.header["settings"]} for log in logs],
        "base": base,
        "price": price,
        "threshold": None if math.isinf(fitted.head.threshold) else fitted.head.threshold,
        "ridge": fitted.head.ridge,
        "strays": fitted.strays,
        "tested_strays": fitted.tested_strays,
        "rows": [asdict(row) for row in fitted.standings],
        "tested": [asdict(row) for row in fitted.tested],
        "versions": versions(),
        "commit": git_commit(),
    }
    (folder / "fit.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _all(standings: list[Standing]) -> list[Standing]:
    """The rows over all questions."""
    return [row for row in standings if row.data == standings[-1].data]


def _interval(row: Standing) -> str:
    return f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}]"


def _markdown(rows: list[Standing]) -> list[str]:
    shown = [
        f"| {r.name} | {r.accuracy:.1%} | {100 * r.gain:+.1f} {_interval(r)} | {r.tokens:.0f} | {r.acts:.0%} |" for r in rows
    ]
    return ["| | right | gain | tokens | acts |", "|---|---|---|---|---|", *shown]
