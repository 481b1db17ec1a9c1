"""What is checked of a model that is brought, before its run is made: files, weights, tokens, and what it computes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flows.language.model_files import check_model_files
from flows.language.warm_models import SAFE, context_length, load_tokenizer, require_all_weights
from schemas.errors import ConfigError
from schemas.metrics import BroughtModelMetrics
from stages.ops.abilities import Abilities, abilities

log = logging.getLogger("baton")


@dataclass(frozen=True)
class BroughtModel:
    """A model that can be trained."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None  # tokens; none where the family has no limit
    metrics: BroughtModelMetrics


def check_model(place: Path) -> BroughtModel:
    """Raises `ConfigError` with what failed."""
    check_model_files(place)
    try:
        tokenizer, context = load_tokenizer(place), context_length(place)
        module, report = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises whatever a broken file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"base_model.source: {place} cannot be read as a model: {reason}") from None
    require_all_weights(place, report)
    _require_tokens_fit(place, module, tokenizer)
    try:
        found = abilities(module.eval())
    except ConfigError as error:
        raise ConfigError(f"base_model.source: {place}: {error}") from None
    for line in _slower(found):
        log.warning("base_model.source: %s: %s", place, line)
    return BroughtModel(tokenizer, context, BroughtModelMetrics(
        parameters=module.num_parameters(), vocab_size=len(tokenizer),
        embeddings=module.get_input_embeddings().num_embeddings, context_length=context, pads=found.pads,
        caches=found.caches, trims=found.trims, splits=found.splits))


def _require_tokens_fit(place: Path, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token of the tokenizer has an embedding; tokens of the model that the tokenizer lacks are said."""
    rows, entries = module.get_input_embeddings().num_embeddings, tokenizer.get_vocab()
    outside = sorted((i, text) for text, i in entries.items() if i >= rows)
    if outside:
        named = ", ".join(f"{text!r} is {i}" for i, text in outside[:4])
        raise ConfigError(f"base_model.source: {place}: the tokenizer has tokens that the model has no embedding for "
                          f"({named}; {rows} embeddings): model.resize_token_embeddings({max(entries.values()) + 1}) and "
                          "save it again, or take the tokens out of the tokenizer")
    if (unknown := rows - len({i for i in entries.values() if i < rows})) > 0:
        log.warning("base_model.source: %s: %d of the model's %d token ids are unknown to the tokenizer; sampled, they are "
                    "part of a response and decode to nothing", place, unknown, rows)


def _slower(found: Abilities) -> list[str]:
    """What is done another way with this model."""
    lines = []
    if not found.pads:
        lines.append("padding on its left changes what it computes: only prompts of one length go side by side")
    if not found.caches:
        lines.append("a step from its cache gives other numbers than a full pass: each step reads the whole row again")
    elif not found.trims:
        lines.append("rows cannot be taken out of its cache: a batch keeps its finished rows until all are finished")
    if not found.splits:
        lines.append("its output head does not run apart from its body: logits of a whole micro-batch are in memory at once")
    return lines
