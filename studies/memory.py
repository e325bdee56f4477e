"""Peak memory of a GRPO step against the tokens of an episode: rsim, rsim with gradient checkpointing, TRL.

    python -m studies.memory [--model smollm2-135m] [--questions 2] [--group 8] [--tokens 64 256] [--record]

Each measurement is a process of its own (`studies.step`), loading and optimiser states included. TRL has two modes.
"""

from __future__ import annotations

import argparse
from typing import Any

from studies.ledger import record, row
from studies.workload import in_child, show

_SIDES: dict[str, dict[str, Any]] = {
    "rsim": {"side": "rsim"},
    "rsim, gradient checkpointing": {"side": "rsim", "checkpointing": True},
    "TRL": {"side": "trl"},
    "TRL, gradient checkpointing": {"side": "trl", "checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--record", action="store_true", help="write results/memory.json and its page")
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        for name, settings in _SIDES.items():
            common = {"model": args.model, "count": args.questions, "group": args.group, "tokens": tokens}
            peak = in_child("studies.step", settings | common)["peak"]
            rows.append(row(f"peak memory of a step, {tokens} tokens an episode: {name}", round(peak, 2), unit="GiB"))
            show(rows[-1:])
    if args.record:
        record("memory", 3, f"Peak memory of a GRPO step: {args.model}, {args.questions} x {args.group} episodes", rows)


if __name__ == "__main__":
    main()
