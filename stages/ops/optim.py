"""AdamW, its learning rate, the gradient norm, and the optimizer's state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from schemas.settings import PPOConfig
from stages.ops import ranks


def adamw(module: nn.Module, learning_rate: float, config: PPOConfig) -> AdamW:
    """AdamW over all parameters, β (0.9, 0.999) (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""
    groups = [[p for p in module.parameters() if ranks.is_sharded(p) == sharded] for sharded in (False, True)]
    return AdamW([{"params": group} for group in groups if group],  # torch does not mix DTensors and others in one
                 lr=learning_rate, eps=config.adam_epsilon, weight_decay=config.weight_decay, fused=True)


def learning_rate_factor(iteration: int, config: PPOConfig) -> float:
    """What the learning rates are multiplied with in an iteration, counted from 1; the same for all its steps.

    Rises as i/(W + 1) over the W `warmup_iterations`; falls from 1 at the first iteration to 0 after the N
    `schedule_iterations`, as 1 − (i − 1)/N or as ½(1 + cos π(i − 1)/N) (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1608.03983, equation 5). The smaller of both holds. Linear and per iteration as in Baselines' PPO2.
    """
    rise = min(1.0, iteration / (config.warmup_iterations + 1))
    if config.schedule == "constant":
        return rise
    done = min(1.0, (iteration - 1) / config.schedule_iterations)
    return min(rise, 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def has_gradients(optimizer: AdamW) -> bool:
    """Whether a loss has gone backward through its network since the last step."""
    return any(p.grad is not None for p in parameters_of(optimizer))


def parameters_of(optimizer: AdamW) -> list[nn.Parameter]:
    """All that it steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_gradients(optimizer: AdamW, max_norm: float) -> float:
    """Scales the optimizer's gradients down to `max_norm`; their L2 norm before that, over all ranks' shards."""
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    whole = [gradient for gradient in gradients if not ranks.is_sharded(gradient)]
    sharded = [gradient for gradient in gradients if ranks.is_sharded(gradient)]
    norm = nn.utils.get_total_norm(whole)
    if sharded:
        norm = torch.hypot(norm, nn.utils.get_total_norm(sharded).full_tensor())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_, which does not mix them
    torch._foreach_mul_([*whole, *(gradient.to_local() for gradient in sharded)], factor)
    return float(norm)


def state_tensors(optimizer: AdamW, module: nn.Module) -> dict[str, Tensor]:
    """`parameter.exp_avg`, `parameter.exp_avg_sq` and `parameter.step` for every parameter that was stepped."""
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: AdamW, module: nn.Module, tensors: dict[str, Tensor], device: str | None = None
) -> None:
    """The inverse of `state_tensors`; they are put on the device, or where the parameters are. Raises `KeyError` naming a
    tensor that is left over, or missing beside others.

    A parameter that was never stepped has none: one without gradient, or the whole actor in a critic warm-up.
    """
    for name, parameter in module.named_parameters():
        if f"{name}.step" not in tensors:
            continue
        state = {key: tensors.pop(f"{name}.{key}").to(device or parameter.device)
                 for key in ("exp_avg", "exp_avg_sq", "step")}
        optimizer.state[parameter] = state | {"step": state["step"].float()}  # which fused AdamW has where the parameter is
    if tensors:
        raise KeyError(f"optimizer state holds {len(tensors)} tensors that the model does not have: {next(iter(tensors))}")
