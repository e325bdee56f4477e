"""schemathesis over the published schema against ``rsim serve --model nano-s``: no request may be a server's error.

It makes requests out of ``/openapi.json``, some that obey the schema and some that break it, in an environment of its own
(``$RSIM_SCHEMATHESIS_ENV``).
"""

from __future__ import annotations

import re
import subprocess
import tempfile

from studies.ledger import Row
from studies.servers import environment, free_port, rsim_server, served

ISSUE = 14


def run(examples: int = 10, seed: int = 0) -> list[Row]:
    program, port = str(environment("schemathesis") / "schemathesis"), free_port()
    rules = ("--max-steps", "2", "--max-tokens", "40", "--step-tokens", "8", "--answer-tokens", "8")
    command = rsim_server(port, "sequence:continuation,termination", "--strategies", "lab", "--model", "nano-s", *rules)
    with served(command, port), tempfile.TemporaryDirectory() as folder:
        address = f"http://127.0.0.1:{port}/openapi.json"
        how = ["--checks", "not_a_server_error", "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"]
        how += ["--request-timeout", "600", "--no-shrink", "--no-color"]
        done = subprocess.run([program, "run", address, *how], cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout)
    made = re.findall(r"(\d+) generated", done.stdout)
    faults = sum(map(int, re.findall(r"(?:Server error|Network Error): (\d+)", done.stdout)))
    what = f"schemathesis, at most {examples} examples of each kind"
    return [
        Row(f"{what}: requests", int(made[-1]) if made else 0, goal="some", met=bool(made), seeds=[seed]),
        Row(f"{what}: server errors", faults, goal="0", met=faults == 0 and done.returncode == 0, seeds=[seed]),
    ]
