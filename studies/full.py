"""The tests that need Ray, DeepSpeed, vLLM or llama.cpp's server: how many pass where all of these are installed?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from studies.ledger import Row

ISSUE = 10
_TESTS = ["tests/test_ranks.py", "tests/test_vllm.py", "tests/test_llama.py"]


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={file}", *_TESTS]
        subprocess.run(
            command, cwd=Path(__file__).parents[1], env=os.environ | {"RSIM_REAL_SERVERS": "1", "RSIM_FULL": "1"}, check=False
        )
        suite = ElementTree.parse(file).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return [
        Row("tests of ranks and servers that pass", int(suite["tests"]) - failed - skipped),
        Row("those that fail", failed, goal="0", met=failed == 0),
        Row("those that are skipped, for want of a package or a model", skipped, goal="0", met=skipped == 0),
    ]
