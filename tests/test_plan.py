"""`rsim plan`: sizes that are known, what must grow and shrink with processes, and what cannot be."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from rsim.cli.main import main
from rsim.config import PRESETS, load_config
from rsim.settings import to_table
from rsim.training.cost import DEVICES, plan, shape_of

PAIR = ("models.reasoner=qwen2.5-7b", "models.planner=qwen2.5-0.5b")


def planned(workers, *changes, device="h100", **more):
    return plan(load_config("qwen2.5-0.5b-math", [*PAIR, *changes]), DEVICES[device], workers, **more)


@pytest.mark.parametrize(
    ("name", "millions"), [("Qwen/Qwen2.5-0.5B-Instruct", 494), ("Qwen/Qwen2.5-1.5B", 1544), ("Qwen/Qwen2.5-32B", 32764),
                           ("meta-llama/Llama-3.1-8B-Instruct", 8030)],
)  # fmt: skip
def test_well_known_models_have_the_parameters_of_their_model_cards(name, millions):
    assert shape_of(name).num_parameters() / 1e6 == pytest.approx(millions, abs=1)


def test_a_process_alone_sends_nothing_and_a_ring_sends_each_gradient_twice():
    assert planned(1).sent == 0
    weights = 7.616e9 + 0.494e9
    assert planned(2).sent == pytest.approx(2 * 1 / 2 * 4 * weights, rel=0.01)
    assert planned(8).sent == pytest.approx(2 * 7 / 8 * 4 * weights, rel=0.01)


def test_more_processes_are_faster_until_they_wait_for_each_other():
    one, eight = planned(1), planned(8)
    assert one.step / 8 < eight.step < one.step
    far = planned(32, network=1e9)
    assert far.seconds["exchange"] > 0.5 * far.step
    assert far.seconds["exchange"] == pytest.approx(far.sent / 1e9), "a ring leaves each machine once"
    assert eight.seconds["exchange"] == pytest.approx(eight.sent / 450e9)


def test_one_vllm_server_samples_for_all_processes_and_takes_the_weights_from_a_disk():
    one, eight = planned(1, "rollout.engine=vllm"), planned(8, "rollout.engine=vllm")
    assert one.seconds["sampling"] == eight.seconds["sampling"] < planned(1).seconds["sampling"]
    assert one.seconds["exchange"] == pytest.approx(2 * 4 * 7.616e9 / 2e9, rel=0.01)


def test_what_a_step_does_more_costs_more():
    plain = planned(8)
    assert planned(8, "objective.beta=0.1").memory == pytest.approx(plain.memory + 1.15 * 4 * 7.616e9, rel=0.01)
    for change in ("objective.beta=0.1", "train.num_iterations=2", "objective.loss=ppo"):
        assert planned(8, change).seconds["updates"] > plain.seconds["updates"]


def test_cutting_layers_saves_gradients_and_moments_and_costs_traffic():
    kept, cut = planned(8), planned(8, "parallel.shard=true")
    assert cut.memory < kept.memory - 60e9
    assert cut.sent > kept.sent


def test_an_adapter_on_a_gpu_means_half_the_bytes_and_a_small_gradient():
    whole, adapter = planned(8), planned(8, "models.reasoner_lora=16", "models.planner_lora=16")
    assert adapter.memory < whole.memory / 2
    assert adapter.sent < whole.sent / 50


def test_longer_episodes_cost_more_and_checkpointing_trades_time_for_memory():
    assert planned(8, tokens=200).step < planned(8, tokens=1000).step < planned(8).step
    kept, again = planned(8), planned(8, "train.gradient_checkpointing=true")
    assert again.memory < kept.memory
    assert again.step > kept.step


def test_what_cannot_be_is_said():
    assert planned(1, device="rtx4090").why == "too little memory"
    assert "several processes" in planned(1, "parallel.shard=true").why
    assert "train.questions = 32" in planned(64).why


def test_the_command_prints_a_row_for_each_number_of_processes(capsys):
    with pytest.raises(SystemExit) as done:
        main(["plan", "nano", "--device", "a100", "--workers", "1", "--workers", "4", "--tokens", "80"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1", "4"]
    with pytest.raises(SystemExit):
        main(["plan", "nano", "--workers", "2", "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert 0 < told["hours"] < 24
    assert told["sent"] > 1e6
    with pytest.raises(SystemExit) as done:
        main(["plan", "nano", "--device", "abacus"])
    assert done.value.code == 2
    assert "use one of h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "device", "ways"),
    [
        ("qwen2.5-0.5b", "rtx4090", [{"train.gradient_checkpointing"}, {"models.reasoner_lora"}, {"parallel.shard"}]),
        ("qwen2.5-7b", "l40s", [{"models.reasoner_lora", "rollout.batch"}, {"parallel.shard", "models.planner_lora"}]),
        ("qwen2.5-7b", "rtx4090", [{"models.reasoner_lora"}, {"models.reasoner_lora", "models.quantised"}]),
    ],
)
def test_where_a_run_does_not_fit_settings_are_proposed_that_do(model, device, ways, capsys):
    """Each proposal, typed as it is printed, is a plan that fits."""
    asked = ["plan", "qwen2.5-0.5b-math", "--set", f"models.reasoner={model}", "--device", device]
    with pytest.raises(SystemExit) as done:
        main([*asked, "--workers", "1"])
    said = capsys.readouterr().out.splitlines()
    lines = [line.split("   ")[0].split() for line in said[said.index("it would fit with, by the same estimate:") + 1 :][:-1]]
    assert done.value.code == 0
    assert len(lines) == len(ways), said
    for line, way in zip(lines, ways, strict=True):
        assert way <= {word.split("=")[0] for word in line}, said
        with pytest.raises(SystemExit):
            main([*asked, *line, *([] if "--workers" in line else ["--workers", "1"]), "--json"])
        (told,) = json.loads(capsys.readouterr().out)
        assert (told["fits"], told["proposals"]) == (True, [])


def test_where_nothing_fits_the_plan_says_so_and_fails(capsys):
    with pytest.raises(SystemExit) as done:
        main(["plan", "qwen2.5-0.5b-math", "--set", "rollout.max_tokens=4000000", "--device", "rtx4090", "--json"])
    out, err = capsys.readouterr()
    assert done.value.code == 2
    assert [told["proposals"] for told in json.loads(out)] == [[], [], []]
    assert err.startswith("rsim: qwen2.5-0.5b-math on rtx4090: nothing that was tried fits: take smaller models")


def test_a_proposal_of_fewer_processes_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "nano", "--workers", "100"])
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("it would fit with, by the same estimate:") + 1].split()[:2] == ["--workers", "1"]


def test_a_run_that_fits_in_one_row_needs_no_proposal(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "qwen2.5-0.5b-math", "--device", "h100"])
    assert "it would fit" not in capsys.readouterr().out


DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.toml")), ids=lambda file: file.stem)
def test_the_memory_that_a_presets_comment_names_is_what_the_plan_foretells(file):
    comment = " ".join(
        line[2:] for line in itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    )
    said = re.search(r"About (\d+) GiB.*?(?:one GPU of (\d+) GB|$)", comment)
    assert said or "GPU" not in comment or "results/" in comment, "a GPU is named without what the plan says"
    if said:
        changes = ["rollout.engine=vllm"] if "rollout.engine = vllm" in comment else []
        found = plan(load_config(file.stem, changes), DEVICES["h100"], 1)
        assert (round(found.memory / 2**30), found.memory < float(said[2]) * 1e9) == (int(said[1]), True)


def test_the_recipes_table_is_what_the_plan_foretells():
    devices = [DEVICES[name] for name in ("rtx4090", "l40s", "a100", "h100")]
    config, rows = (
        None,
        re.findall(r"^\| [\d.]+B and (.*) \|$", (DOCS / "recipe-gpu.md").read_text(encoding="utf-8"), re.MULTILINE),
    )
    assert len(rows) == 6
    for row in rows:
        _, changes, memory, *hours = (cell.strip() for cell in row.split("|"))
        preset, *settings = (
            ["", *re.findall("`(.*?)`", changes)] if changes.startswith("the same") else re.findall("`(.*?)`", changes)
        )
        config = load_config(preset or to_table(config), [re.sub(" = ", "=", one) for one in settings])
        plans = [plan(config, device, 1, tokens=500) for device in devices]
        assert f"{plans[0].memory / 2**30:.0f} GiB" == memory, row
        assert ["" if p.why else f"{p.hours:.1f} h" for p in plans] == hours, row
