"""A causal model's output head, and what its code does with logits, without its body."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def logits_of(module: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(b, R, H) last hidden states to (b, R, V) logits by the model's own code after its body, scaling and caps included.

    The model is left as it is: a copy of its outermost module, of the same weights, is called over those hidden states.
    """
    head = copy.copy(module)
    head._modules = {**module._modules, module.base_model_prefix: _Given(hidden, module.base_model)}
    return head(inputs_embeds=hidden, use_cache=False).logits


class _Given(nn.Module):
    """A body that gives the hidden states it was made with, and has the rest, such as a multiplier, of the real one."""

    def __init__(self, hidden: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        object.__setattr__(self, "body", body)  # not as a part of this module

    def __getattr__(self, name: str) -> object:
        return getattr(self.body, name)

    @property
    def decoder(self) -> _Given:
        """What OPT and BART call in their body."""
        return self

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output(last_hidden_state=self.hidden)


class _Output(BaseModelOutputWithPast):
    """What else a family's body gives, such as caches and router logits, is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
