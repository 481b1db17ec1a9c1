"""Embeddings of texts: the mean of an encoder's last hidden states over a text's tokens (Reimers & Gurevych 2019,
https://arxiv.org/abs/1908.10084), as sentence-transformers' mean pooling gives them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stages.ops.brought_scorer import most_tokens
from stages.ops.language_model import LanguageModel
from stages.ops.progress import progress_bar
from stages.ops.sequences import pad_right, split_by_tokens


@torch.inference_mode()
def embeddings(encoder: LanguageModel, texts: Sequence[str]) -> np.ndarray:
    """(b, H) float32. A text longer than the encoder takes is cut at its end."""
    tokenizer = encoder.tokenizer
    most = most_tokens(encoder.module.config, tokenizer, None)
    rows = tokenizer(list(texts), split_special_tokens=True, truncation=most is not None, max_length=most)["input_ids"]
    rows = [row or [encoder.pad_id] for row in rows]
    lengths, found = np.array([len(row) for row in rows]), [None] * len(rows)
    for group in progress_bar(split_by_tokens(lengths, np.arange(len(rows)), encoder.micro_batch_tokens,
                                              encoder.device.torch.type), "embeddings"):
        ids, mask = (torch.from_numpy(x).to(encoder.device.torch) for x in pad_right(
            [np.asarray(rows[i], np.int64) for i in group], encoder.pad_id))
        with encoder.computing():
            hidden = encoder.module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        for i, mean in zip(group, means.cpu().numpy(), strict=True):
            found[i] = mean
    return np.stack(found)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(b,) float32, of (b, H) each; 0 where one of them is 0."""
    product = (one * other).sum(1)
    size = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide(product, size, out=np.zeros_like(product), where=size > 0)
