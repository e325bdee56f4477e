"""Strategies of your own: the packaged ones with one more, saved as a file that a run and its planner keep.

python examples/own_strategies.py      # minutes on two cores
"""

import rsim


def main() -> None:
    analogy = rsim.Strategy(
        name="analogy",
        description="Recall a problem that is alike, and how it was solved.",
        prompts=("Alike:", "Similar:"),  # injected before the step, one of them at random
        keywords=("alike", "similar"),  # in the step that follows they count as evidence
    )
    packaged = rsim.StrategySet.load("lab")  # "default" for language models
    rsim.StrategySet((*packaged.strategies, analogy)).save("own_strategies.toml")
    settings = {"out": "runs/own-strategies", "models.strategies": "own_strategies.toml", "train.trackers": []}
    rsim.train(rsim.load_config("nano", settings))
    summary = rsim.evaluate("runs/own-strategies", limit=100)
    print("accuracy", summary["accuracy"], "share of steps:", summary["usage"]["analogy"])


if __name__ == "__main__":
    main()
