"""LoRA adapters (arXiv 2106.09685): small trained updates beside frozen weights, one for each policy.

Every linear layer but the output head gets one, with alpha twice the rank; a planner's head is trained whole. A checkpoint
holds the adapter alone, as peft writes it. Frozen weights may be kept in 4 bits (QLoRA, arXiv 2305.14314), and two policies
with the same base may read one copy of them. (peft takes seconds to import: only who has an adapter waits for it.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from rsim.errors import UserError, first_line
from rsim.models.device import precise

_FILE = "adapter_config.json"


def base_of(folder: str | Path) -> str | None:
    """Where the frozen weights of an adapter's folder come from; None if the folder is no adapter.

    Raises:
        UserError: its config is damaged.
    """
    file = Path(folder) / _FILE
    try:
        return str(json.loads(file.read_text())["base_model_name_or_path"]) if file.is_file() else None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} is damaged", first_line(error)) from error


def check_rank(folder: str | Path, rank: int) -> None:
    """Raises `UserError` where ``folder`` has an adapter of another rank, with which its training would go on."""
    own = json.loads((Path(folder) / _FILE).read_text())["r"] if base_of(folder) else rank
    if rank not in (0, own):
        raise UserError(f"an adapter of rank {rank}", f"{folder} has one of rank {own}: give that, or 0 to merge it")


def add(model: PreTrainedModel, rank: int, base: str, seed: int) -> None:
    """Freezes ``model``, loaded from ``base``, and gives it an adapter that changes nothing yet; in place."""
    from peft import LoraConfig, TaskType

    classifies = "ForSequenceClassification" in type(model).__name__
    kind = TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM
    head = ["score"] if classifies else None  # is trained whole
    shape = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    config = LoraConfig(**shape, task_type=kind, modules_to_save=head, exclude_modules=head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    model.peft_config["default"].base_model_name_or_path = base


def resume(model: PreTrainedModel, folder: str | Path) -> None:
    """Gives the base ``model`` the adapter saved in ``folder``, to be trained further, in place."""
    model.load_adapter(str(folder), is_trainable=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or ".modules_to_save." in name)


def train_precisely(model: PreTrainedModel) -> None:
    """Keeps what is trained in float32, whatever the frozen weights are kept in: small steps vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = precise(parameter.data)
    if "score" in dict(model.named_children()):
        model.score.to(torch.promote_types(model.score.weight.dtype, torch.float32))


def merged(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The base ``model`` with the adapter in ``folder`` added into its weights: an ordinary model."""
    from peft import PeftModel

    whole: PreTrainedModel = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return whole.requires_grad_(True)  # peft froze it


def merged_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict of an ordinary model that does what ``model`` with its adapter does; ``model`` stays what it is.

    Raises:
        UserError: an adapter's layer is of a kind whose update is not known here.
    """
    if not has_adapter(model):
        return dict(model.state_dict())
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if not isinstance(module, Linear | ParamWrapper):
                raise UserError(f"an adapter on {name}, a {type(module).__name__}, cannot be merged here")
            # A layer's experts are one parameter, and two wrappers inside each other.
            weight = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            updates[_plain(f"{name}.{weight}")] = module.get_delta_weight(module.active_adapters[0])
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        update = updates.get(_plain(name))
        weights[_plain(name)] = tensor if update is None else tensor + update.to(tensor.dtype)
    return weights


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether the model has an adapter."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def share_frozen(reader: PreTrainedModel, owner: PreTrainedModel) -> None:
    """Lets ``reader``, which has an adapter, use the frozen weights of ``owner``, with or without one; its copies are let go.

    Raises:
        UserError: the two are not of the same base.
    """
    theirs = {_plain(name): p for name, p in owner.named_parameters() if ".lora_" not in name}
    shared = 0
    for prefix, module in reader.named_modules():
        for name, parameter in module._parameters.items():
            other = theirs.get(_plain(f"{prefix}.{name}"))
            if parameter is not None and other is not None and other.shape == parameter.shape and not parameter.requires_grad:
                module._parameters[name] = other.requires_grad_(False)
                shared += 1
    if not shared:
        raise UserError("models.shared_base", "planner and reasoner are not of the same base")


def _plain(name: str) -> str:
    """A weight's name in the model without adapters."""
    return name.replace("base_layer.", "").replace(".modules_to_save.default.", ".")


def four_bits(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that keep the linear layers in 4 bits; they calculate in ``dtype``."""
    kind = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": kind}


def keep_unpacked(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from rearranging 4-bit weights for inference on a CPU: in that order they cannot be trained with."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
