"""Responses that were not sampled: demonstrations and pretraining text, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.tables import Ragged


@dataclass(frozen=True, eq=False)
class Texts:
    """B demonstrations, or B pretraining texts, each as the response to its first token."""

    row_id: np.ndarray  # (B,)
    prompt: tuple[str, ...]
    response: tuple[str, ...]
    prompt_tokens: Ragged  # P tokens a row
    response_tokens: Ragged  # R tokens a row, EOS included

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def sampled_lengths(self) -> np.ndarray:
        """(B,) int64: tokens of each response."""
        return self.response_tokens.lengths
