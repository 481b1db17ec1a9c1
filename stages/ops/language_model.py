"""A language model: a network with what is needed to run it, its values and scores; `token_logprobs.py` has its logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2CLS, ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from schemas.tables import Rollouts
from stages.ops.abilities import Abilities
from stages.ops.conversations import ChatTemplate
from stages.ops.device import Device, bound_to_cores
from stages.ops.output_head import logits_of
from stages.ops.precision import FLOAT32, Precision
from stages.ops.progress import progress_bar
from stages.ops.sequences import Batch, by_length, make_batch, pad_right, split_by_tokens
from stages.ops.texts import Texts

# GPT-2's activation, ½x(1 + tanh(√(2/π)(x + 0.044715x³))), is eight operations in transformers and one in torch: the same
# function, a fifth of an update's time. Every model that this process builds from here on has the latter.
ACT2FN["gelu_new"] = ACT2CLS["gelu_pytorch_tanh"]


@dataclass(frozen=True)
class LanguageModel:
    """A view of a network in Hugging Face form, a body with the head of a causal model or of a scorer; how its prompts are
    written; and how much it is given at once (see `ExecutionConfig`). Several views may share one network."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate = False
    """Whether prompts are put into the tokenizer's chat template."""
    micro_batch_tokens: int = 4096
    generation_batch_size: int = 256
    abilities: Abilities = Abilities()
    """What may be done with the network; found when it is loaded."""
    recompute: bool = False
    """Whether the backward pass computes each layer once more, instead of keeping what it needs of it."""
    precision: Precision = FLOAT32
    base: str | None = None
    """Where the weights are that an adapter is over, if only that is trained and saved."""

    @property
    def device(self) -> Device:
        return Device(str(self.module.device))

    def computing(self, precision: str = "float32") -> AbstractContextManager:
        """Inside it products are of the model's precision, or of this one if that is less."""
        return self.device.autocast(precision if self.precision.compute == "float32" else self.precision.compute)

    def hidden(self, batch: Batch) -> Tensor:
        """(b·T, H): the body's last hidden states, by flat position."""
        with self._recomputed(), self.computing():
            return self.module.base_model(**_inputs(batch)).last_hidden_state.flatten(0, 1)

    def logits(self, batch: Batch) -> Tensor:
        """(n, V): what predicts each of the sampled tokens. The head runs nowhere else, if it can be had apart."""
        if self.abilities.splits:
            return self.logits_of(self.hidden(batch)[batch.predicted_at])
        with self._recomputed(), self.computing():
            return self.module(**_inputs(batch)).logits.flatten(0, 1)[batch.predicted_at]

    def logits_of(self, hidden: Tensor) -> Tensor:
        """(n, H) last hidden states to (n, V)."""
        with self.computing():
            return logits_of(self.module, hidden[None])[0]

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        """Inside it layers keep no more than their inputs for the backward pass, if that is asked for.

        transformers does that of layers in training mode; theirs alone, since dropout is off.
        """
        if not (self.recompute and torch.is_grad_enabled() and self.module.supports_gradient_checkpointing):
            yield
            return
        self.module.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [layer for layer in self.module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False
            self.module.gradient_checkpointing_disable()

    def score(self, hidden: Tensor) -> Tensor:
        """(…, H) to (…,) float32: the scalar head."""
        return self.module.score(hidden.float()).squeeze(-1)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a response: the tokenizer's EOS and those of the generation config."""
        generation = getattr(self.module, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        ids = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    @property
    def pad_id(self) -> int:
        """What fills padded positions, which are masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.eos_ids, default=0)


def _inputs(batch: Batch) -> dict[str, Any]:
    """What a body is called with. To its mask padding is tokens like others: no token looks at what comes after it."""
    ids = batch.input_ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False,
            "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)}


CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


POSITIONS_AFTER_PADDING = frozenset({
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "longformer", "mpnet",
    "ibert", "xmod"})
"""Families whose positions begin after the padding token's id."""


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens that the model can attend to; none where its config names no limit."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in CONTEXTS)
    length = next((length for length in found if isinstance(length, int) and length > 0), None)
    if length is not None and text.model_type in POSITIONS_AFTER_PADDING:
        return length - (text.pad_token_id or 0) - 1
    return length


def batches(rollouts: Rollouts | Texts, rows: np.ndarray, model: LanguageModel) -> list[Batch]:
    """The rows as padded batches within the model's token budget."""
    lengths = rollouts.prompt_tokens.lengths + rollouts.response_tokens.lengths
    apart = [rows] if model.abilities.pads_after else by_length(lengths[rows], rows)
    groups = [group for some in apart
              for group in split_by_tokens(lengths, some, model.micro_batch_tokens, model.device.torch.type)]
    sampled = getattr(rollouts, "sampled", None)  # texts have none
    return [make_batch(rollouts.prompt_tokens, rollouts.response_tokens, group, model.pad_id, model.device.torch, sampled)
            for group in groups]


def tracked_batches(rollouts: Rollouts, model: LanguageModel, name: str) -> Iterator[Batch]:
    """All rows as padded batches, with a progress bar in rows."""
    with progress_bar(total=len(rollouts), desc=name) as bar:
        for batch in batches(rollouts, np.arange(len(rollouts)), model):
            yield batch
            bar.update(len(batch.rows))


def state_values(critic: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """V(s_t) where each sampled token is predicted, (n,), and after the last token of each row, (b,).

    The critic is a sequence-classification model with one label, its head applied to those positions.
    """
    found = critic.score(critic.hidden(batch)[torch.cat([batch.predicted_at, batch.ends])])
    return found[: len(batch.tokens)], found[len(batch.tokens) :]


@bound_to_cores()
@torch.inference_mode()
def sequence_scores(model: LanguageModel, rows: Sequence[Sequence[int]], progress: str) -> np.ndarray:
    """(b,) float32: what a sequence classifier with one label gives for each row: at its last token, whatever token that is,
    if it has a `score` for each position, as causal ones have."""
    lengths, out = np.array([len(row) for row in rows]), np.empty(len(rows), np.float32)
    groups = split_by_tokens(lengths, np.arange(len(rows)), model.micro_batch_tokens, model.device.torch.type)
    for group in progress_bar(groups, progress):
        ids, mask = (torch.from_numpy(x).to(model.device.torch) for x in pad_right(
            [np.asarray(rows[i], np.int64) for i in group], model.pad_id))
        with model.computing():
            found = last_token_scores(model.module, ids, mask) if hasattr(model.module, "score") else model.module(
                input_ids=ids, attention_mask=mask).logits
        out[group] = found[:, 0].float().cpu().numpy()
    return out


def last_token_scores(classifier: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(b, 1): the score at each row's last token, of (b, T) rows that are padded on the right.

    By the mask: transformers' own classifiers look for the last token that is not the padding token, and so read a response
    that was sampled to end in that token, or in an EOS that pads, too early.
    """
    hidden = classifier.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    last = attention_mask.sum(1) - 1
    with torch.autocast(last.device.type, enabled=False):
        return classifier.score(hidden.float())[torch.arange(len(last), device=last.device), last]


def scores_at_last_token(classifier: PreTrainedModel) -> None:
    """Has the classifier's own forward pass, which trainers call, read where `last_token_scores` does."""

    def forward(
        self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return SequenceClassifierOutput(logits=last_token_scores(self, input_ids, mask))

    classifier.forward = MethodType(forward, classifier)
