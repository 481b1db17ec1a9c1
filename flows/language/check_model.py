"""What is checked of a model that is brought, before its run is made: files, weights, tokens, and what it computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flows.language.model_files import check_gguf, check_model_files
from flows.language.model_folders import (
    SAFE,
    load_classifier,
    load_encoder,
    load_gguf,
    load_tokenizer,
    require_all_weights,
    use_attention,
)
from schemas.errors import ConfigError
from schemas.language import LoRAConfig
from schemas.metrics import BroughtModelMetrics, BroughtScorerMetrics
from schemas.reward_settings import ComponentConfig
from stages.ops.abilities import Abilities, abilities
from stages.ops.brought_scorer import most_tokens, scored_text
from stages.ops.conversations import with_response
from stages.ops.language_model import context_length
from stages.ops.lora import add_adapter, sharing
from stages.ops.precision import hold

log = logging.getLogger("baton")


@dataclass(frozen=True)
class BroughtModel:
    """A model that can be trained."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None  # tokens; none where the family has no limit
    metrics: BroughtModelMetrics


def check_model(
    setting: str, place: Path, adapters: LoRAConfig | None = None, precision: str = "float32", attention: str = "auto",
    fsdp: bool = False,
) -> BroughtModel:
    """A causal model, in a folder or GGUF file, whether it takes such adapters over weights of that precision, has that
    attention, and has layers that can be sharded.

    Raises `ConfigError` with the setting and what failed.
    """
    with _named(setting, place):
        module, tokenizer = _from_folder(place) if place.is_dir() else _from_gguf(place)
        _require_tokens_fit(module, tokenizer)
        found = abilities(module.eval())
    for line in [*_unknown_tokens(module, tokenizer), *_slower(found)]:
        log.warning("%s: %s: %s", setting, place, line)
    context = context_length(module.config)
    brought = BroughtModel(tokenizer, context, BroughtModelMetrics(
        parameters=module.num_parameters(), vocab_size=len(tokenizer),
        embeddings=module.get_input_embeddings().num_embeddings, context_length=context, pads=found.pads,
        caches=found.caches, trims=found.trims, splits=found.splits))
    use_attention(module, attention)
    if adapters is not None:
        _try_adapters(module, adapters, precision)
    if fsdp:
        from stages.ops.fsdp import layers_of  # which takes a second

        layers_of(module)
    return brought


def _try_adapters(module: PreTrainedModel, adapters: LoRAConfig, precision: str) -> None:
    """Raises `ConfigError` naming the setting that the model does not take."""
    try:
        hold(module, precision)
    except ConfigError as error:
        raise ConfigError(f"base_model.precision: {error}") from None
    add_adapter(sharing(module), adapters, seed=0)


def _from_folder(place: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_model_files(place)
    tokenizer = load_tokenizer(place)
    module, report = AutoModelForCausalLM.from_pretrained(
        place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE)
    require_all_weights(place, report)
    return module, tokenizer


def _from_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_gguf(file)
    return load_gguf(file)


def check_scorer(
    setting: str, place: Path, part: ComponentConfig | None
) -> tuple[PreTrainedTokenizerBase, BroughtScorerMetrics]:
    """A sequence classifier with one label, and how it reads texts as a part of the reward; none where it is to be a critic.

    Raises `ConfigError` with the setting that names it and what failed.
    """
    with _named(setting, place):
        check_model_files(place)
        tokenizer = load_tokenizer(place, needs_eos=part is None)  # as a critic is loaded
        module = load_classifier(place)
        _require_tokens_fit(module, tokenizer)
        if part is not None:
            if part.chat_template and tokenizer.chat_template is None:
                raise ConfigError("chat_template: its tokenizer has none; leave it out")
            scored_text(tokenizer, with_response("x", "y"), part.chat_template)
        most = most_tokens(module.config, tokenizer, part.max_tokens if part else None)
        if part is None:
            abilities(module.eval())  # a critic reads each position
    return tokenizer, BroughtScorerMetrics(
        parameters=module.num_parameters(), vocab_size=len(tokenizer),
        embeddings=module.get_input_embeddings().num_embeddings, max_tokens=most)


def check_encoder(setting: str, place: Path) -> BroughtScorerMetrics:
    """A model that embeds texts. Raises `ConfigError` with the setting that names it and what failed."""
    with _named(setting, place):
        check_model_files(place)
        tokenizer, module = load_tokenizer(place, needs_eos=False), load_encoder(place)
        _require_tokens_fit(module, tokenizer)
        if not hasattr(module, "config") or module.config.is_encoder_decoder:
            raise ConfigError("has an encoder and a decoder, of which neither embeds a text; name an encoder")
        return BroughtScorerMetrics(
            parameters=module.num_parameters(), vocab_size=len(tokenizer),
            embeddings=module.get_input_embeddings().num_embeddings, max_tokens=most_tokens(module.config, tokenizer, None))


@contextmanager
def _named(setting: str, place: Path) -> Iterator[None]:
    """Errors inside name the setting, and the folder where they do not."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}" if str(place) in str(error) else f"{setting}: {place}: {error}") from None
    except Exception as error:  # transformers raises whatever a broken file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{setting}: {place} cannot be read as a model: {reason}") from None


def _require_tokens_fit(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token of the tokenizer has an embedding. Raises `ConfigError`."""
    rows, entries = module.get_input_embeddings().num_embeddings, tokenizer.get_vocab()
    outside = sorted((i, text) for text, i in entries.items() if i >= rows)
    if outside:
        named = ", ".join(f"{text!r} is {i}" for i, text in outside[:4])
        raise ConfigError(f"the tokenizer has tokens that the model has no embedding for ({named}; {rows} embeddings): "
                          f"model.resize_token_embeddings({max(entries.values()) + 1}) and save it again, or take the "
                          "tokens out of the tokenizer")


def _unknown_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens of the model that the tokenizer lacks."""
    rows = module.get_input_embeddings().num_embeddings
    unknown = rows - len({i for i in tokenizer.get_vocab().values() if i < rows})
    return [f"{unknown} of the model's {rows} token ids are unknown to the tokenizer; sampled, they are part of a response "
            "and decode to nothing"] if unknown > 0 else []


def _slower(found: Abilities) -> list[str]:
    """What is done another way with this model."""
    lines = []
    if not found.pads:
        lines.append("padding on its left changes what it computes: only prompts of one length are sampled side by side")
    if not found.caches:
        lines.append("a step from its cache gives other numbers than a full pass: each step reads the whole row again")
    elif not found.trims:
        lines.append("rows cannot be taken out of its cache: a batch keeps its finished rows until all are finished")
    if not found.splits:
        lines.append("its output head does not run apart from its body: logits of a whole micro-batch are in memory at once")
    return lines
