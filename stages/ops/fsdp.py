"""FSDP2: during an update a rank has its shard of the layers' weights, gradients and moments, and whole layers as they run.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277; torch's `fully_shard`. The layers are nearly all of a large model; what
is around them, embeddings, last norm and head, every rank has whole. Between updates each has the layers whole too, and
rank 0 the moments: it samples, scores and saves as if it were alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from schemas.errors import ConfigError
from stages.ops import ranks
from stages.ops.device import release_large_blocks
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.lora import sharing

VIEW = r"FSDP2-wrapped module \(FSDP\w+Model\) returned a view"  # of the last hidden states, which nothing writes to


@contextmanager
def fully_sharded(learner: LanguageModelLearner) -> Iterator[LanguageModelLearner]:
    """A learner whose layers are sharded over the ranks, of the same weights; its moments are those of rank 0's learner.
    When it ends, every rank's learner has its weights, and rank 0's, on the CPU, its moments.

    Raises `ConfigError` where the layers of a network are not to be found.
    """
    release_large_blocks()  # glibc would keep every layer that was gathered
    mesh = init_device_mesh(learner.device.type, (ranks.size(),))
    modules = {name: model.module for name, model in learner.networks.items()}
    sharded = {name: _shard(module, mesh) for name, module in modules.items()}
    training = learner.of_modules(sharded)
    for name, optimizer in training.optimizers.items():
        _scatter_moments(learner.optimizers[name], optimizer, modules[name], sharded[name])
    with ranks.in_step(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=VIEW)
        yield training
    for name, optimizer in training.optimizers.items():
        _gather(learner.optimizers[name], optimizer, modules[name], sharded[name])


def layers_of(module: PreTrainedModel) -> list[nn.Module]:
    """Of its body, those within no other. Raises `ConfigError` where there are none, or some have weights in common."""
    layers: list[nn.Module] = []
    for layer in module.base_model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and not any(layer in outer.modules() for outer in layers):
            layers.append(layer)
    weights = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if not layers or len(weights) > len({*weights}):
        why = "has layers with weights in common" if layers else "does not say what its layers are"
        raise ConfigError(f"execution.fsdp: {type(module).__name__} {why}; set it to false")
    return layers


# --- before the update ---

def _shard(module: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """The module with its layers sharded; those of the one that is given are left empty."""
    sharded = sharing(module)
    for layer in layers_of(sharded):
        fully_shard(layer, mesh=mesh)
        layer.set_gradient_divide_factor(1.0)  # gradients are summed, where torch would take their mean
        layer.set_force_sum_reduction_for_comms(True)
    rest = {parameter for parameter in sharded.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(sharded.base_model, mesh=mesh, ignored_params=rest)
    for whole, shard in zip(module.parameters(), sharded.parameters(), strict=True):
        if isinstance(shard, DTensor):
            whole.data = whole.data.new_empty(0)
    return sharded


def _scatter_moments(whole: AdamW, own: AdamW, module: nn.Module, sharded: nn.Module) -> None:
    """Rank 0's, to each its shard."""
    stepped = ranks.gathered([parameter in whole.state for parameter in module.parameters()])[0]
    for parameter, shard, has in zip(module.parameters(), sharded.parameters(), stepped, strict=True):
        if has:
            state = whole.state.pop(parameter, {})
            own.state[shard] = {"step": _from_first(state.get("step"), torch.zeros((), device=shard.device)),
                                **{key: _from_first(state.get(key), shard) for key in ("exp_avg", "exp_avg_sq")}}


def _from_first(whole: Tensor | None, like: Tensor) -> Tensor:
    """Rank 0's tensor, whole or sharded as another one is."""
    tensor = torch.empty(like.shape, device=like.device) if ranks.rank() else whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=0)
    dist.broadcast(tensor, 0)
    return tensor


# --- after it ---

def _gather(whole: AdamW, own: AdamW, module: nn.Module, sharded: nn.Module) -> None:
    """Weights to every rank, moments to rank 0; the shards are freed as they go, since torch's hooks hold the module until
    the garbage collector comes."""
    for parameter, shard in zip(module.parameters(), sharded.parameters(), strict=True):
        state = {key: _whole(value) for key, value in own.state.pop(shard, {}).items()}
        if state and ranks.rank() == 0:
            whole.state[parameter] = {key: value.cpu() for key, value in state.items()}
        if isinstance(shard, DTensor):
            parameter.data = _whole(shard.detach())
            shard.to_local().untyped_storage().resize_(0)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
