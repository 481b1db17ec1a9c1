"""What costs memory in an update: logits in chunks and layers computed once more, to the same numbers and gradients."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from brought import make_model, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schemas.language import LoRAConfig
from schemas.tables import Ragged
from stages.ops import token_logprobs
from stages.ops.distribution import Distribution
from stages.ops.language_model import LanguageModel
from stages.ops.lora import add_adapter
from stages.ops.sequences import make_batch


class Largest(TorchDispatchMode):
    """The most numbers over the vocabulary that an operation gave, but for the output head's weights."""

    def __init__(self, model):
        super().__init__()
        self.head, self.size = model.module.lm_head.weight.shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
            if len(shape) > 1 and shape[-1] == self.head[0] != shape[-2] and shape != self.head[::-1]:
                self.size = max(self.size, tensor.numel())
        return out


def losses(model, rollouts, entropy):
    """Logprobs, entropies and the gradient of a sum of both, of one batch of all rows."""
    model = replace(model, module=copy.deepcopy(model.module))
    batch = make_batch(rollouts.prompt_tokens, rollouts.response_tokens, rollouts.row_id, model.pad_id, torch.device("cpu"))
    logprobs, spread = token_logprobs.token_logprobs(model, batch, Distribution(0.7), entropy)
    weights = torch.linspace(-1, 1, len(logprobs))
    loss = (logprobs * weights).sum() + (0 if spread is None else (spread * weights).sum())
    loss.backward()
    return logprobs, spread, torch.cat([p.grad.flatten() for p in model.module.parameters()])


@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
@pytest.mark.parametrize("at_once", [1, 24])
def test_chunks_change_no_number(tiny_model, rollouts, monkeypatch, entropy, at_once):
    whole = losses(tiny_model, rollouts, entropy)
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", at_once * tiny_model.module.config.vocab_size)
    parts = losses(tiny_model, rollouts, entropy)
    for one, other in zip(whole, parts, strict=True):
        assert (one is None) == (other is None) == (one is whole[1] and entropy == "none")
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
            assert one.requires_grad == other.requires_grad
    assert entropy == "none" or whole[1].requires_grad == (entropy == "gradient")


def test_no_more_logits_than_allowed_are_in_memory_at_once(tiny_model, rollouts, monkeypatch):
    vocabulary = tiny_model.module.config.vocab_size
    with Largest(tiny_model) as whole:
        losses(tiny_model, rollouts, "gradient")
    assert whole.size == len(rollouts.response_tokens.values) * vocabulary
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 20 * vocabulary)
    with Largest(tiny_model) as parts:
        losses(tiny_model, rollouts, "gradient")
    assert parts.size == 20 * vocabulary


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("adapters", [False, True])
def test_layers_computed_once_more_give_the_same_gradients(family, adapters, rollouts):
    """To the bit, with fewer numbers kept for the backward pass; sampling and its cache are as before."""
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gemma2": {"head_dim": 8}}
    module = make_model(family, **sizes.get(family, {}))
    if adapters:
        add_adapter(module, LoRAConfig(rank=2), seed=0)
    found = []
    for recompute in (False, True):
        model, kept = LanguageModel(copy.deepcopy(module), make_tokenizer(), recompute=recompute), []
        tokens = [Ragged.from_rows([row % 200 for row in part], np.int32)
                  for part in (rollouts.prompt_tokens, rollouts.response_tokens)]
        batch = make_batch(*tokens, rollouts.row_id, model.pad_id, torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            logprobs, _ = token_logprobs.token_logprobs(model, batch, Distribution(1.0))
        logprobs.sum().backward()
        gradients = [p.grad for p in model.module.parameters() if p.requires_grad and p.grad is not None]
        assert not any(part.training for part in model.module.modules())
        found.append((logprobs, torch.cat([g.flatten() for g in gradients]), sum(kept)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[1][2] < 0.7 * found[0][2]
