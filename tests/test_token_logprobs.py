"""The output head in chunks: the same numbers and gradients, and no more logits at once than allowed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.ops import token_logprobs
from stages.ops.language_learner import Responses


class Largest(TorchDispatchMode):
    """The most numbers over the vocabulary that an operation gave."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.size = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.shape[-1] == self.vocabulary:
                self.size = max(self.size, tensor.numel())
        return out


def losses(model, rollouts, entropy):
    """Logprobs, entropies and the gradient of a sum of both, of one batch of all rows."""
    model = replace(model, module=copy.deepcopy(model.module))
    (batch,) = Responses(rollouts, model).micro_batches(rollouts.row_id)
    logprobs, spread = token_logprobs.token_logprobs(model, batch, 0.7, entropy)
    weights = torch.linspace(-1, 1, len(logprobs))
    loss = (logprobs * weights).sum() + (0 if spread is None else (spread * weights).sum())
    loss.backward()
    return logprobs, spread, torch.cat([p.grad.flatten() for p in model.module.parameters()])


@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
@pytest.mark.parametrize("columns", [1, 3])
def test_chunks_change_no_number(tiny_model, rollouts, monkeypatch, entropy, columns):
    whole = losses(tiny_model, rollouts, entropy)
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", columns * len(rollouts) * tiny_model.module.config.vocab_size)
    parts = losses(tiny_model, rollouts, entropy)
    for one, other in zip(whole, parts, strict=True):
        assert (one is None) == (other is None) == (one is whole[1] and entropy == "none")
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
            assert one.requires_grad == other.requires_grad
    assert entropy == "none" or whole[1].requires_grad == (entropy == "gradient")


def test_no_more_logits_than_allowed_are_in_memory_at_once(tiny_model, rollouts, monkeypatch):
    vocabulary = tiny_model.module.config.vocab_size
    column = len(rollouts) * vocabulary
    with Largest(vocabulary) as whole:
        losses(tiny_model, rollouts, "gradient")
    assert whole.size == max(rollouts.response_tokens.lengths) * column
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 2 * column)
    with Largest(vocabulary) as parts:
        losses(tiny_model, rollouts, "gradient")
    assert parts.size == 2 * column
