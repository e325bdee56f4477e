"""A trained planner before a model: in this process, and before an OpenAI-compatible server.

python examples/plug_in.py                                      # trains the demo's planner first, if it is not there
python examples/plug_in.py http://127.0.0.1:8080/v1 NAME        # before a server (needs openai)
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import rsim

RUN = Path("runs/plug-in/checkpoints/final")


def main() -> None:
    if not RUN.exists():
        rsim.train(rsim.load_config("nano", {"out": "runs/plug-in", "train.trackers": []}))
    planner = rsim.Planner.from_pretrained(RUN / "planner")
    question = "85-(12+5)+26=?"
    if len(sys.argv) == 3:
        import openai

        client = planner.wrap(openai.OpenAI(base_url=sys.argv[1], api_key="-"))
        answer = client.chat.completions.create(model=sys.argv[2], messages=[{"role": "user", "content": question}])
        print(answer.choices[0].message.content)
        return
    model = AutoModelForCausalLM.from_pretrained(RUN / "reasoner")
    with planner.wrap(model, AutoTokenizer.from_pretrained(RUN / "reasoner"), max_steps=4) as planned:
        for step in planned.generate(question).steps:
            print(f"{step['strategy']:<16} {step['text'].strip()}")


if __name__ == "__main__":
    main()
