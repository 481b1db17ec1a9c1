"""Ragged rows to padded batches: prompts padded on the left, responses on the right, cut by token budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.tables import Ragged


@dataclass(frozen=True)
class Batch:
    """b rows side by side, so that every response begins in one column. P and R are the widest of the batch."""

    rows: np.ndarray  # (b,) positions in the table
    token_index: np.ndarray  # (n,) positions of their response tokens in the table's flat columns
    input_ids: Tensor  # (b, P + R) int64
    attention_mask: Tensor  # (b, P + R) int64, 1 on tokens
    position_ids: Tensor  # (b, P + R) int64, 0 on a row's first token
    response_mask: Tensor  # (b, R) bool, of the tokens that were sampled
    prompt_width: int  # P

    @property
    def response_ids(self) -> Tensor:
        """(b, R) int64."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_lengths(self) -> Tensor:
        """(b, 1) int64: all tokens after the prompt, replies of other turns included."""
        return self.attention_mask[:, self.prompt_width :].sum(1, keepdim=True)

    def flat(self, padded: Tensor) -> Tensor:
        """(b, R) to (n,): the response tokens, in the order of `token_index`."""
        return padded[self.response_mask]


def pad_left(rows: list[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows to (b, P) ids and (b, P) mask, both int64, the tokens at the right end."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """(b, T) int64: 0 on the first token of each row, padding also 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def make_batch(
    prompts: Ragged, responses: Ragged, rows: np.ndarray, pad_id: int, device: torch.device, sampled: Ragged | None = None
) -> Batch:
    """Those rows of the table, padded. `sampled`: which of the response's tokens were; none: all."""
    left, left_mask = pad_left([prompts[i] for i in rows], pad_id)
    flipped, flipped_mask = pad_left([responses[i][::-1] for i in rows], pad_id)
    mask = torch.from_numpy(np.concatenate([left_mask, flipped_mask[:, ::-1]], 1)).to(device)
    ids = torch.from_numpy(np.concatenate([left, flipped[:, ::-1]], 1)).to(device)
    token_index = np.concatenate([np.arange(responses.offsets[i], responses.offsets[i + 1]) for i in rows])
    response_mask = mask[:, left.shape[1] :].bool()
    if sampled is not None:
        kept = sampled.values[token_index]
        response_mask[response_mask.clone()] = torch.from_numpy(kept).to(device)
        token_index = token_index[kept]
    return Batch(rows, token_index, ids, mask, positions(mask), response_mask, left.shape[1])


def by_length(lengths: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The rows in groups of one length each, the longest first. `lengths`: (b,), of those rows."""
    return [rows[lengths == length] for length in np.unique(lengths)[::-1]]


def split_by_tokens(lengths: np.ndarray, rows: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """`rows` sorted by length, longest first, cut so that no padded group is larger than `max_tokens`.

    `lengths`: (B, k), of the k parts of a row that are padded apart. A row longer than the budget makes a group of its
    own. Ties keep the order of `rows`.
    """
    order = rows[np.argsort(-lengths[rows].sum(1), kind="stable")]
    groups: list[list[int]] = []
    widest = np.zeros(lengths.shape[1], np.int64)
    for row in order:
        wider = np.maximum(widest, lengths[row])
        if groups and wider.sum() * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
            widest = wider
        else:
            groups.append([row])
            widest = lengths[row]
    return [np.array(group) for group in groups]
