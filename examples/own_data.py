"""Data of your own: files with a question and an answer on each line, under whatever names the columns have.

python examples/own_data.py      # minutes on two cores
"""

import json
import random
from pathlib import Path

import rsim


def write(file: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b, c = (rng.randint(10, 99) for _ in range(3))
        lines.append(json.dumps({"problem": f"{a}+{b}-{c}=?", "gold": str(a + b - c)}))
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    write("train.jsonl", 500, seed=0)
    write("heldout.jsonl", 100, seed=1)
    data = {"train": "train.jsonl", "eval": "heldout.jsonl", "columns": ["question=problem", "answer=gold"], "train_size": 0}
    rsim.train(rsim.load_config("nano", {"out": "runs/own-data", "data": data, "train.trackers": []}))
    planned = rsim.evaluate("runs/own-data", "runs/planned", limit=100)
    alone = rsim.evaluate("runs/own-data", "runs/alone", limit=100, planner="none")
    print("planned", planned["accuracy"], "alone", alone["accuracy"])
    print(rsim.compare("runs/planned", "runs/alone"))  # the paired difference and its 95% interval


if __name__ == "__main__":
    main()
