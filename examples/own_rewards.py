"""Rewards of your own: functions of an episode, for one agent, with a weight; and a run that stops when it is good enough.

python examples/own_rewards.py      # minutes on two cores
"""

import rsim


def brief(episode: rsim.Episode) -> float:
    """From 0 down to -1 as the answer's tokens grow to the limit of 240."""
    return -episode.sampled_tokens / 240


def checked(episode: rsim.Episode) -> float:
    """1 where a step says that it checks."""
    return float(any("check" in step.text for step in episode.steps))


def good_enough(record: dict[str, float]) -> bool:
    """After each held-out evaluation; True stops the run."""
    return record["eval/accuracy"] > 0.8


def main() -> None:
    config = rsim.load_config("nano", {"out": "runs/own-rewards", "train.trackers": []})
    rewards = [rsim.Reward(brief, agent="reasoner", weight=0.1), rsim.Reward(checked, agent="planner", weight=0.05)]
    print(rsim.train(config, rewards=rewards, on_evaluate=good_enough))
    print("report:", rsim.report("runs/own-rewards"))


if __name__ == "__main__":
    main()
