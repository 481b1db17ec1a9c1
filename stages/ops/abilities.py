"""What a network does right, found by trying it on a few tokens: padding, cached steps, rows that leave, the head apart.

A family decides by itself whether padding on the left is masked everywhere (a recurrent state has to be told of it), whether
a cached step gives what a full pass gives, and whether rows can be taken out of its cache. What fails here is done another
way, slower and right: see `Abilities`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from schemas.errors import ConfigError
from stages.ops.output_head import logits_of
from stages.ops.sequences import positions

LENGTHS = (3, 7)  # tokens of the two rows that are tried
TOLERANCE = 1e-4  # of the largest number: rounding of float32 is a thousandth of it, a token that is seen or not far more


@dataclass(frozen=True)
class Abilities:
    """What may be done with a network in float32."""

    pads: bool = True
    """Prompts of several lengths may be padded on the left and sampled side by side; else only those of one length."""
    pads_after: bool = True
    """Rows of several lengths may be padded on the right and scored side by side; else only those of one length."""
    caches: bool = True
    """A step may begin from a cache; else each step reads the row from its beginning."""
    trims: bool = True
    """Rows may be taken out of the cache; else a batch keeps its finished rows until all are finished."""
    splits: bool = True
    """The output head may run apart from the body, on some positions at a time; else on all of a micro-batch at once."""


_known: dict[tuple[type, str], Abilities] = {}


def abilities(module: PreTrainedModel) -> Abilities:
    """Of the network's body; tried once for each kind and config in a process.

    Raises `ConfigError` if it cannot run, or is not causal.
    """
    key = type(module), module.config.to_json_string()
    if key not in _known:
        _known[key] = _tried(module)
    return _known[key]


@torch.inference_mode()
def _tried(module: PreTrainedModel) -> Abilities:
    short, long = (_tokens(module, length) for length in LENGTHS)
    try:
        alone = [_hidden(module, input_ids=row) for row in (short, long)]
    except Exception as error:  # whatever a broken network does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{type(module).__name__} cannot run {LENGTHS[0]} tokens: {reason}") from None
    changed = long.clone()
    changed[0, -1] = (long[0, -1] + 1) % module.get_input_embeddings().num_embeddings  # another one, whatever the vocabulary
    if not _close(_hidden(module, input_ids=changed)[:, :-1], alone[1][:, :-1]):
        raise ConfigError(f"{type(module).__name__} is not causal: another last token changes what it computes for those "
                          "before; expected a model that predicts each token from those before it (of an encoder, "
                          "is_decoder: true in its config.json)")
    last = torch.cat([alone[0][:, -1:], alone[1][:, -1:]])
    both, mask = _side_by_side(short, long)
    pads = _works(lambda: _close(_padded(module, both, mask)[:1, -short.shape[1] :], alone[0]))
    after = torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1]), value=int(long[0, 0]))
    pads_after = _works(lambda: _close(
        _hidden(module, input_ids=torch.cat([after, long]), attention_mask=torch.ones_like(both),
                position_ids=torch.arange(long.shape[1], device=long.device).expand(2, -1))[:1, : short.shape[1]], alone[0]))
    caches = _works(lambda: _close(_after_steps(module, long), alone[1][:, -1:])) and (
        not pads or _works(lambda: _close(_after_steps(module, both, mask), last)))
    trims = caches and _works(
        lambda: _close(_after_steps(module, torch.cat([changed, long]), keep=1), alone[1][:, -1:]))
    splits = _works(lambda: _close(logits_of(module, alone[1]), module(input_ids=long, use_cache=False).logits))
    return Abilities(pads, pads_after, caches, trims, splits)


def _tokens(module: PreTrainedModel, length: int) -> Tensor:
    """(1, length): any, no two in a row alike."""
    size = module.get_input_embeddings().num_embeddings
    return (torch.arange(1, length + 1, device=module.device)[None] * 7919 + length) % size


def _hidden(module: PreTrainedModel, **inputs: object) -> Tensor:
    """(b, T, H) of the body."""
    out = module.base_model(**inputs, **({} if "past_key_values" in inputs else {"use_cache": False}))
    return out.last_hidden_state.float()


def _padded(module: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(2, T, H) of rows side by side."""
    return _hidden(module, input_ids=ids, attention_mask=mask, position_ids=positions(mask))


def _side_by_side(short: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """(2, T) ids and mask, the short row padded on the left."""
    missing = long.shape[1] - short.shape[1]
    ids = torch.cat([torch.nn.functional.pad(short, (missing, 0), value=int(long[0, 0])), long])
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    return ids, mask


def _after_steps(module: PreTrainedModel, rows: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
    """(b, 1, H) of the last token, when all before but two were read at once and those one by one; `keep`: the only row that
    stays after the first."""
    cache, mask = DynamicCache(config=module.config), torch.ones_like(rows) if mask is None else mask
    _hidden(module, input_ids=rows[:, :-2], attention_mask=mask[:, :-2], position_ids=positions(mask[:, :-2]),
            past_key_values=cache, use_cache=True)
    for end in (rows.shape[1] - 1, rows.shape[1]):
        if keep is not None and len(rows) > 1:
            kept = torch.tensor([keep], device=rows.device)
            cache.batch_select_indices(kept)
            rows, mask = rows[kept], mask[kept]
        place = positions(mask[:, :end])[:, -1:]
        out = _hidden(module, input_ids=rows[:, end - 1 : end], attention_mask=mask[:, :end], position_ids=place,
                      past_key_values=cache, use_cache=True)
    return out


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _works(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except Exception:  # what a family does not have, it says in many ways
        return False
