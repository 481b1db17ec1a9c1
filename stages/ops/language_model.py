"""A language model with what is needed to run it, and what stages ask of one: logprobs, values, scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas.tables import Ragged, Rollouts
from stages.ops.finite import require_finite
from stages.ops.progress import progress_bar
from stages.ops.prompts import Texts
from stages.ops.sequences import Batch, make_batch, split_by_tokens


@dataclass(frozen=True)
class LanguageModel:
    """A model in Hugging Face form, its tokenizer, and how much it is given at once (see `ExecutionConfig`)."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    micro_batch_tokens: int = 4096
    generation_batch_size: int = 256

    @property
    def device(self) -> torch.device:
        return self.module.device

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
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.eos_ids)


def batches(rollouts: Rollouts | Texts, rows: np.ndarray, model: LanguageModel) -> list[Batch]:
    """The rows as padded batches within the model's token budget."""
    lengths = np.stack([rollouts.prompt_tokens.lengths, rollouts.response_tokens.lengths], 1)
    groups = split_by_tokens(lengths, rows, model.micro_batch_tokens)
    return [make_batch(rollouts.prompt_tokens, rollouts.response_tokens, group, model.pad_id, model.device)
            for group in groups]


def tracked_batches(rollouts: Rollouts, model: LanguageModel, name: str) -> Iterator[Batch]:
    """All rows as padded batches, with a progress bar in rows."""
    with progress_bar(total=len(rollouts), desc=name) as bar:
        for batch in batches(rollouts, np.arange(len(rollouts)), model):
            yield batch
            bar.update(len(batch.rows))


def response_logprobs(module: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """log π(· | before) at each response position, of the temperature-scaled logits: (b, R, V) float32, nats.

    The output head runs on the R positions that predict response tokens and nowhere else.
    """
    logits = module(
        input_ids=batch.input_ids[:, :-1], attention_mask=batch.attention_mask[:, :-1],
        position_ids=batch.position_ids[:, :-1], logits_to_keep=batch.response_ids.shape[1], use_cache=False,
    ).logits
    return (logits.float() / temperature).log_softmax(-1)


def of_tokens(logprobs: Tensor, batch: Batch) -> Tensor:
    """(b, R, V) to (n,): the logprobs of the response tokens themselves."""
    return batch.flat(logprobs.gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1))


@torch.inference_mode()
def score_tokens(model: LanguageModel, rollouts: Rollouts, temperature: float, progress: str) -> Ragged:
    """log π(token) of every response token under `model`, nats, float32. Raises `NonFiniteError` with the rows."""
    flat = np.empty(len(rollouts.logprobs.values), np.float32)
    for batch in tracked_batches(rollouts, model, progress):
        flat[batch.tokens] = of_tokens(response_logprobs(model.module, batch, temperature), batch).cpu().numpy()
    logprobs = rollouts.logprobs.with_values(flat)
    require_finite("the reference's logprob", logprobs, rollouts.row_id)
    return logprobs


def entropy(logprobs: Tensor) -> Tensor:
    """H = −Σ_v p_v log p_v (Shannon 1948): (b, R, V) to (b, R), nats."""
    return -(logprobs.exp() * logprobs).sum(-1)


def state_values(critic: nn.Module, batch: Batch) -> Tensor:
    """V(s_0) … V(s_R): (b, R + 1), read where response tokens 0 … R−1 are predicted and after the last position.

    The critic is a sequence-classification model with one label, its head applied to every position.
    """
    hidden = critic.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False,
    ).last_hidden_state
    return critic.score(hidden[:, batch.prompt_width - 1 :]).squeeze(-1).float()


@torch.inference_mode()
def sequence_scores(model: LanguageModel, rows: Sequence[Sequence[int]], progress: str) -> np.ndarray:
    """(b,) float32: a one-label sequence classifier's output for each token row, as transformers pools it.

    That is at the last token that is not the padding token, in training too. A tokenizer that pads with EOS therefore
    has it read before EOS.
    """
    lengths, out = np.array([[len(row)] for row in rows]), np.empty(len(rows), np.float32)
    groups = split_by_tokens(lengths, np.arange(len(rows)), model.micro_batch_tokens)
    for group in progress_bar(groups, progress):
        batch = model.tokenizer.pad({"input_ids": [list(rows[i]) for i in group]}, padding_side="right",
                                    return_tensors="pt").to(model.device)
        logits = model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        out[group] = logits[:, 0].float().cpu().numpy()
    return out
