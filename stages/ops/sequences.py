"""Ragged rows to padded batches, cut by token budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.tables import Ragged

PASS_COST = {"cpu": 32}  # tokens that take as long as what a pass costs beside its tokens, by type of device
PASS_COST_ELSEWHERE = 2048  # of a GPU, which waits for its kernels to be launched


@dataclass(frozen=True)
class Batch:
    """b rows of prompt and response, padded on the right, where a causal network never looks. T is the longest of them.

    A flat position is one of the b·T of the batch, row after row.
    """

    rows: np.ndarray  # (b,) positions in the table
    token_index: np.ndarray  # (n,) positions of their sampled tokens in the table's flat columns
    input_ids: Tensor  # (b, T) int64
    tokens: Tensor  # (n,) int64, the sampled tokens
    predicted_at: Tensor  # (n,) int64, the flat position that predicts each
    steps: Tensor  # (n,) int64, which token of its response each is, from 0
    ends: Tensor  # (b,) int64, the flat position of each row's last token


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


def pad_right(rows: list[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows to (b, T) ids and (b, T) mask, both int64, the tokens at the left end."""
    ids, mask = pad_left([row[::-1] for row in rows], pad_id)
    return ids[:, ::-1].copy(), mask[:, ::-1].copy()


def make_batch(
    prompts: Ragged, responses: Ragged, rows: np.ndarray, pad_id: int, device: torch.device, sampled: Ragged | None = None
) -> Batch:
    """Those rows of the table, padded. `sampled`: which of the response's tokens were; none: all."""
    ids, mask = pad_right([np.concatenate([prompts[i], responses[i]]) for i in rows], pad_id)
    first, lengths = prompts.lengths[rows], responses.lengths[rows]
    row = np.repeat(np.arange(len(rows)), lengths)
    step = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    index = responses.offsets[rows][row] + step
    if sampled is not None:
        kept = sampled.values[index]
        row, step, index = row[kept], step[kept], index[kept]
    place = row * ids.shape[1] + first[row] + step
    ends = np.arange(len(rows)) * ids.shape[1] + mask.sum(1) - 1
    tensors = (torch.from_numpy(x).to(device) for x in (ids, ids.reshape(-1)[place], place - 1, step, ends))
    return Batch(rows, index, *tensors)


def by_length(lengths: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The rows in groups of one length each, the longest first. `lengths`: (b,), of those rows."""
    return [rows[lengths == length] for length in np.unique(lengths)[::-1]]


def split_by_tokens(lengths: np.ndarray, rows: np.ndarray, max_tokens: int, device: str = "cpu") -> list[np.ndarray]:
    """`rows` sorted by length, longest first, cut so that no padded group is larger than `max_tokens`, and so that padding
    and what a group costs beside it on that type of device are least.

    `lengths`: (B,). A row longer than the budget makes a group of its own. Ties keep the order of `rows`.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    widths, n, cost = lengths[order], len(rows), PASS_COST.get(device, PASS_COST_ELSEWHERE)
    least, begin = np.zeros(n + 1), np.zeros(n + 1, np.int64)  # of the first j rows: the least cost, where a group begins
    for j in range(1, n + 1):
        first = max(0, j - max(1, max_tokens // max(1, int(widths[j - 1]))))  # more rows than that do not fit
        padded = widths[first:j] * np.arange(j - first, 0, -1)  # of a group from i to j, by i
        padded = np.where((padded <= max_tokens) | (np.arange(first, j) == j - 1), least[first:j] + padded, np.inf)
        begin[j] = first + padded.argmin()
        least[j] = padded.min() + cost
    groups, j = [], n
    while j:
        groups.append(order[begin[j] : j])
        j = begin[j]
    return groups[::-1]
