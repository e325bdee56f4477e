"""Where the known data sets are published, at the commits that their readers were written for, as lines for a shell."""

from __future__ import annotations

import os
from pathlib import Path

from rsim.data.sources import SOURCES

_RAW = "https://raw.githubusercontent.com"
_FILES = {  # of each set, by its name there
    "gsm8k": (
        "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data",
        "train.jsonl",
        "test.jsonl",
    ),
    "math500": (
        "rasbt/reasoning-from-scratch/f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958/ch03/01_main-chapter-code",
        "math500_test.json",
    ),
    "aqua": ("google-deepmind/AQuA/26b64ed1f22208c6742f47df547dfd65088ec30d", "dev.json", "test.json"),
    "theoremqa": ("TIGER-AI-Lab/TheoremQA/acfc9686aa9b49f3c8f189364a9a9ee9c53da039", "theoremqa_test.json"),
    "svamp": ("arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53", "SVAMP.json"),
    "tatqa": (
        "NExTplusplus/TAT-QA/870accc41953dcde885aabeb963d94aabdc0fbc3/dataset_raw",
        "tatqa_dataset_dev.json",
        "tatqa_dataset_test_gold.json",
    ),
    "humaneval": ("openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data", "HumanEval.jsonl.gz"),
    "mbpp": ("OckBench/OckBench/b72752a0ba5989d3c212675ec60d3eedcd838628/data", "mbpp.jsonl"),
}
_HUB = {  # made of rows of the hub, by the package datasets
    "math": (
        ("train.jsonl", "test.jsonl"),
        """from datasets import concatenate_datasets, load_dataset
names = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
for split in ("train", "test"):
    rows = concatenate_datasets([load_dataset("EleutherAI/hendrycks_math", name, split=split) for name in names])
    rows = rows.map(lambda row, number: {"id": f"{split}/{number}"}, with_indices=True)
    rows.to_json(f"FOLDER/{split}.jsonl")""",
    ),
    "mmlu_pro": (
        ("test.jsonl.gz",),
        """from datasets import load_dataset
load_dataset("TIGER-Lab/MMLU-Pro", split="test").to_json("FOLDER/test.jsonl.gz", compression="gzip")""",
    ),
}


def fetch_lines(name: str, data_dir: str = "") -> list[str]:
    """What a shell does to put the set ``name`` where it is looked for; only a remark where its files are there."""
    source, root = SOURCES[name], data_dir or os.environ.get("RSIM_DATA", "") or "data"
    folder = Path(root) / source.folder
    place, *files = _FILES.get(name) or ("", *_HUB[name][0])
    if all((folder / file).is_file() for file in files):
        return [f"# {source.title}: in {folder} already"]
    said = [f"# {source.title}. To run these lines: rsim data fetch {name} | sh; rsim finds it by RSIM_DATA={root}"]
    said.append(f"mkdir -p '{folder}'")
    if place:
        return [*said, *(f"curl -fL -o '{folder / file}' {_RAW}/{place}/{file}" for file in files)]
    return [*said, "python - <<'END'", *_HUB[name][1].replace("FOLDER", str(folder)).splitlines(), "END"]
