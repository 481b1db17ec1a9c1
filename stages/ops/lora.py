"""Low-rank adapters: h = W₀x + (α/r)·B·A·x, W₀ frozen, A (r, in) random and B (out, r) zero at first.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; by PEFT, whose folders they are saved as. The adapter lies in the body
alone; a scalar head over it is trained whole.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from schemas.language import LoRAConfig
from stages.ops.precision import packed_state
from stages.ops.seeding import seeded

if TYPE_CHECKING:  # its import takes a second
    import peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # what PEFT puts before the names of a model's tensors
HEAD = "score.weight"
LINEAR = ("Linear", "Conv1D", "Linear8bitLt", "Linear4bit")


def sharing(module: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights are the same memory. What is trained in the one must be frozen in the other."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) if p.is_floating_point() else p
                               for p in module.parameters()}
    return copy.deepcopy(module, memo | {id(same): same for same in (*module.buffers(), *packed_state(module))})


def add_adapter(module: PreTrainedModel, config: LoRAConfig, *, seed: int) -> None:
    """A new adapter, in place; the rest is frozen, but for a scalar head.

    Raises `ConfigError` naming the layers there are, if something else is meant.
    """
    from peft import LoraConfig

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    with seeded(seed):
        _inject(module, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, use_dora=config.dora,
                                   use_rslora=config.rslora))


def require_adapter(module: PreTrainedModel, config: LoRAConfig) -> None:
    """Raises `ConfigError` where the module's adapter is not one of those settings."""
    there, linear = module.base_model.peft_config["default"], _linear(module)
    adapted = {name for name, part in module.base_model.named_modules() if hasattr(part, "lora_A")}
    if config.target_modules == "all-linear":
        targets = set(linear)
    else:
        targets = {name for name in linear if any(_ends(name, target) for target in config.target_modules)}
    found = {"rank": (there.r, config.rank), "alpha": (there.lora_alpha, config.alpha),
             "dora": (there.use_dora, config.dora), "rslora": (there.use_rslora, config.rslora),
             "target_modules": (sorted(adapted), sorted(targets))}
    for name, (has, asked) in found.items():
        if has != asked:
            has = has if name != "target_modules" else sorted({path.rpartition(".")[2] for path in has})
            raise ConfigError(f"lora.{name}={getattr(config, name)}: the adapter that is trained on has {has}; make another "
                              "run with it")


def _linear(module: PreTrainedModel) -> list[str]:
    """Names of the linear layers in the body, adapted or not."""
    return [name for name, part in module.base_model.named_modules()
            if type(getattr(part, "base_layer", part)).__name__ in LINEAR
            and not {"base_layer", "lora_A", "lora_B"} & {*name.split(".")}]


def _ends(name: str, target: str) -> bool:
    """As PEFT takes a target for a layer's name."""
    return name == target or name.endswith(f".{target}")


def adapter_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's weights, and those of a scalar head, by PEFT's names."""
    from peft import get_peft_model_state_dict

    tensors = {f"{ROOT}{module.base_model_prefix}.{name}": tensor
               for name, tensor in get_peft_model_state_dict(module.base_model, save_embedding_layers=False).items()}
    return tensors | ({ROOT + HEAD: module.score.weight} if hasattr(module, "score") else {})


def save_config(module: PreTrainedModel, file: Path, base: str) -> None:
    """PEFT's config of the adapter, its keys in order; `base`: where the frozen weights are."""
    scores = hasattr(module, "score")
    values = module.base_model.peft_config["default"].to_dict() | {
        "base_model_name_or_path": base, "task_type": "SEQ_CLS" if scores else "CAUSAL_LM", "inference_mode": True,
        "modules_to_save": ["score"] if scores else None}
    del values["peft_version"], values["auto_mapping"]
    text = json.dumps(values, indent=2, sort_keys=True, default=lambda value: sorted(value))
    file.write_text(text + "\n", encoding="utf-8")


def load_adapter(module: PreTrainedModel, folder: Path) -> None:
    """Puts the folder's adapter into a module of its base, in place, to be trained on; and its head, if both have one.

    Raises `ConfigError` where it is of another base.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.modules_to_save = False, None
    tensors = {name.removeprefix(ROOT): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    head = tensors.pop(HEAD, None)
    _inject(module, config)
    body = {_below(name, module): tensor for name, tensor in tensors.items()}
    found = set_peft_model_state_dict(module.base_model, body)
    expected = {name for name, _ in module.base_model.named_parameters() if ".lora_" in name}
    if found.unexpected_keys or len(body) != len(expected):
        raise ConfigError(f"{folder}: the adapter has {len(body)} tensors, and its base takes {len(expected)}: it is of "
                          "another model")
    if head is not None and hasattr(module, "score"):
        module.score.weight.data = head.clone().to(module.score.weight.device)


def _below(name: str, module: PreTrainedModel) -> str:
    """A tensor's name in the body; a causal model's body may have another name than a classifier's."""
    first, _, rest = name.partition(".")
    return rest if first == module.base_model_prefix or not hasattr(module.base_model, first) else name


def _inject(module: PreTrainedModel, config: peft.LoraConfig) -> None:
    """Into the body. Raises `ConfigError` naming what may be adapted, if something else is meant."""
    from peft import inject_adapter_in_model

    linear = _linear(module)
    for target in config.target_modules if config.target_modules != "all-linear" else ():
        if not any(_ends(name, target) for name in linear):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(f"lora.target_modules: {target!r} is no linear layer of the model's body; there are {there}")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of Conv1D, whose weights are the other way round
            inject_adapter_in_model(config, module.base_model)
    except ValueError as error:  # families in which PEFT cannot adapt some of them
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())}") from None
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # PEFT has them in what its layer's weights are in
    module.eval()  # new layers are in training mode
    if hasattr(module, "score"):
        module.score.weight.requires_grad_(True)


def merged(module: PreTrainedModel) -> PreTrainedModel:
    """A module without adapter that computes the same, its weights W₀ + (α/r)·B·A."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = copy.deepcopy(module)
    for name, part in list(whole.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, last = name.rpartition(".")
            setattr(whole.get_submodule(parent), last, part.get_base_layer())
    del whole.base_model.peft_config
    return whole
