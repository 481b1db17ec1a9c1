"""What models compute in, and in what weights are held that are not trained: float32, bfloat16, or 8 or 4 bits.

What is trained, and its optimizer, is float32: with bfloat16 its products alone are rounded (Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740, by torch's autocast). Weights under adapters may be held in less: int8 (Dettmers et al.
2022, https://arxiv.org/abs/2208.07339) or nf4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), by bitsandbytes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from schemas.errors import ConfigError, installed_by

QUANTIZED = ("int8", "nf4")


@dataclass(frozen=True)
class Precision:
    """Of one model."""

    compute: str = "float32"
    """Of products: float32 or bfloat16."""
    weights: str = "float32"
    """Of weights that are not trained: float32, bfloat16, int8 or nf4."""


FLOAT32 = Precision()


def hold(module: PreTrainedModel, weights: str) -> None:
    """Has the module's weights in that precision, in place, but for a scalar head and what its family keeps in float32.

    Raises `ConfigError` where bitsandbytes is missing, or there is nothing that it quantises.
    """
    if weights == "float32":
        return
    if weights in QUANTIZED:
        _quantize(module, weights)
    kept = {"score", *(getattr(module, "_keep_in_fp32_modules", None) or ()),
            *(getattr(module, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not kept & {*name.split(".")}:
            parameter.data = parameter.data.to(torch.bfloat16)


def _quantize(module: PreTrainedModel, weights: str) -> None:
    """The linear layers of the body."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{weights} needs the package bitsandbytes: {installed_by('quantized')}")
    body = module.base_model
    linear = [name for name, part in body.named_modules() if type(part) is nn.Linear]
    if not linear:
        raise ConfigError(f"{weights}: {type(module).__name__} has no torch.nn.Linear in its body, which is what "
                          "bitsandbytes quantises; take bfloat16")
    for name in linear:
        parent, _, last = name.rpartition(".")
        setattr(body.get_submodule(parent), last, _packed(body.get_submodule(name), weights))
    setattr(body, "is_loaded_in_8bit" if weights == "int8" else "is_loaded_in_4bit", True)  # PEFT asks for it


def to_device(module: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The module there, with what 8-bit layers hold beside their weights, which only their own `to` moves."""
    module.to(device)
    for part in module.modules():
        if type(part).__name__ == "Linear8bitLt":
            part.to(device)
    return module


def _packed(layer: nn.Linear, weights: str) -> nn.Module:
    import bitsandbytes

    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    with torch.device("meta"):
        if weights == "int8":  # no column apart as an outlier of the batch: a row would depend on those beside it
            packed = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=0.0)
        else:
            packed = bitsandbytes.nn.Linear4bit(*shape, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
            packed.support_avx512bf16_for_cpu = False  # a layout that has no gradients
    if weights == "int8":
        packed.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    packed.bias = layer.bias
    packed = packed.to(layer.weight.device).train(layer.training)
    if weights == "int8":
        packed.init_8bit_state()  # before it is shared: the first pass would take it from the weight
    return packed


def packed_state(module: nn.Module) -> list[object]:
    """What quantised layers have beside their weights; shared as these are."""
    found = [part for part in module.modules() if type(part).__name__ in ("Linear8bitLt", "Linear4bit")]
    return [part.state if hasattr(part, "state") else part.quant_state for part in found]
