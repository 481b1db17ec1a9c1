"""The key-value cache of sampling: transformers' own, with memory that is allocated ahead."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

AHEAD = 64  # positions; transformers' layer copies all keys and values of a batch with every token


class GrowingLayer(DynamicLayer):
    """Keys and values (b, heads, T, D) of T positions so far, in memory for more, so that a step copies its own alone."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            old = (self.keys, self.values)
            self._room = tuple(new.new_empty(*new.shape[:-2], end + AHEAD, new.shape[-1])
                               for new in (key_states, value_states))
            for room, before in zip(self._room, old if begin else (), strict=False):
                room[..., :begin, :] = before
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., begin:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._room = None


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model of that config; layers of other kinds than plain attention are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
