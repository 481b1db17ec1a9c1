"""A model's folder: loaded whole, or refused; saved so that plain transformers, or PEFT, reads it."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from flows.store.attempt import Attempt
from schemas.artifacts import ArtifactRef, ModelRef
from schemas.errors import ConfigError, StoreError
from stages.ops import lora
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.optim import load_state_tensors, state_tensors
from stages.ops.scalar_head import WEIGHTS, ScalarHead
from stages.ops.tensor_file import tensor_file

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product in 8 bits
PYTORCH = {"format": "pt"}  # what transformers writes into a file of weights
SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}


def load_causal(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, from safetensors alone. Raises `ConfigError` if weights are missing."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **SAFE)
    require_all_weights(folder, report)
    return _own_memory(model)


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal model of a GGUF file, unpacked to float32, and its tokenizer.

    Raises `ConfigError` if weights are missing, or an EOS, or what reads it.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        raise ConfigError(f"transformers {transformers.__version__} does not unpack GGUF; 5.22 does") from None

    where = {"gguf_file": file.name, "local_files_only": True}
    model, report = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), output_loading_info=True, **where)
    require_all_weights(file, report)
    tokenizer = _without_inventions(AutoTokenizer.from_pretrained(file.parent, **where), model.config.vocab_size)
    if tokenizer.eos_token is None:
        raise ConfigError(f"{file} names no EOS, so that no response would end: tokenizer.ggml.eos_token_id is not set")
    return _own_memory(model), _padding(tokenizer)


def _without_inventions(tokenizer: PreTrainedTokenizerBase, entries: int) -> PreTrainedTokenizerBase:
    """Without special tokens beyond the file's own: transformers adds `<|endoftext|>` to whatever a GGUF file has."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in state["added_tokens"] if token["id"] < entries]
    if len(own) == len(state["added_tokens"]):
        return tokenizer
    backend = Tokenizer.from_str(json.dumps(state | {"added_tokens": own}))
    names = {token["content"] for token in own} | set(state["model"]["vocab"])
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if token in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)


def load_scalar(folder: Path) -> PreTrainedModel:
    """A sequence classifier with one label in float32; over a causal model's body, its head is new and all zeros.

    Raises `ConfigError` if weights are missing.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if _is_scorer(config):
        return load_classifier(folder)
    if not _has_classifier(config):
        return ScalarHead(config, load_causal(folder).base_model)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1, output_loading_info=True, **SAFE)
    body = f"{model.base_model_prefix}."  # the rest are the new head, and that of the causal model
    require_all_weights(folder, {what: {key for key in keys if str(key).startswith(body)} for what, keys in report.items()})
    torch.nn.init.zeros_(model.score.weight)
    return _own_memory(model)


def load_classifier(folder: Path) -> PreTrainedModel:
    """A sequence classifier as it was saved, with one label, in float32. Raises `ConfigError` if weights are missing."""
    config = require_one_label(folder)
    if ScalarHead.__name__ in (config.architectures or ()):
        return _own_memory(ScalarHead.load(folder, config))
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE)
    require_all_weights(folder, report)
    return _own_memory(model)


def load_encoder(folder: Path) -> PreTrainedModel:
    """A model's body as it was saved, whatever head it has, in float32. Raises `ConfigError` if weights are missing."""
    model, report = AutoModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE)
    heads = {"unexpected_keys"}  # of whatever it was trained for
    require_all_weights(folder, {what: set() if what in heads else {key for key in keys if "pooler." not in str(key)}
                                 for what, keys in report.items()})
    return _own_memory(model)


def is_scorer(folder: Path) -> bool:
    """Whether it holds a sequence classifier, transformers' or a `ScalarHead`."""
    return _is_scorer(AutoConfig.from_pretrained(folder, local_files_only=True))


def _is_scorer(config: PretrainedConfig) -> bool:
    kinds = config.architectures or ()
    return any("SequenceClassification" in kind or kind == ScalarHead.__name__ for kind in kinds)


def require_one_label(folder: Path) -> PretrainedConfig:
    """The config. Raises `ConfigError` where the folder holds no sequence classifier, or one with several labels."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not _is_scorer(config):
        kinds = config.architectures or ["nothing"]
        raise ConfigError(f"holds {kinds[0]}, expected a sequence classifier with one label (a folder that "
                          "AutoModelForSequenceClassification has saved): without its head the scores would be random")
    if config.num_labels != 1 and ScalarHead.__name__ not in (config.architectures or ()):
        raise ConfigError(f"has {config.num_labels} labels ({', '.join(map(str, config.id2label.values()))}), expected one: "
                          "a score; a function can make one of several (file.py:function)")
    return config


def _has_classifier(config: PretrainedConfig) -> bool:
    """Whether transformers has a classifier over that body, with the head that a critic reads each position by."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    with torch.device("meta"):
        return hasattr(AutoModelForSequenceClassification.from_config(config), "score")


LEFT_OVER = re.compile(r"\.(masked_bias|attn\.bias|attention\.bias|inv_freq|position_ids)$")
"""Masks and tables that older versions of transformers saved, and computed anew."""


def require_all_weights(folder: Path, report: Mapping[str, Iterable]) -> None:
    """Raises `ConfigError` with transformers' own report of keys that are missing, left over, or of another shape."""
    said = []
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else f"{key[0]} {list(key[1])} for {list(key[2])}"
                      for key in report[f"{what}_keys"] if what != "unexpected" or not LEFT_OVER.search(key))
        if keys:
            said.append(f"{len(keys)} {what} ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})")
    if said:
        raise ConfigError(f"{folder}: the weights are not those of config.json: {'; '.join(said)}. What "
                          "is missing would be random: save the whole model with save_pretrained, or mend config.json")


def _own_memory(module: PreTrainedModel) -> PreTrainedModel:
    """With weights in torch's own memory rather than in a mapped file, where they begin anywhere: the last bits of a product
    depend on its factors' alignment, and a model that was just trained lies in torch's."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def use_attention(module: PreTrainedModel, attention: str) -> None:
    """Has the model use these kernels; see `ExecutionConfig`. Raises `ConfigError` where it, or this machine, has none."""
    if attention == "auto":
        return
    try:
        module.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"execution.attention={attention}: {reason}; auto takes what there is") from None
    if module.config._attn_implementation != attention:
        raise ConfigError(f"execution.attention={attention}: {type(module).__name__} has attention of its own, which "
                          "cannot be chosen; leave it auto")


def load_tokenizer(folder: Path, *, needs_eos: bool = True) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; one without an EOS has the model's, and one without a padding token pads with EOS.

    Raises `ConfigError` where no file names an EOS, if one is needed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if needs_eos and tokenizer.eos_token is None:
        tokenizer.eos_token = _eos_of_model(folder, tokenizer)
    return _padding(tokenizer)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With a padding token, and without how it was loaded, which would be saved with it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for how_it_was_loaded in ("is_local", "local_files_only", "vocab_file"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def _eos_of_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The EOS that generation_config.json or config.json names by its id."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and (text := tokenizer.convert_ids_to_tokens(token)) is not None:
                return text
    raise ConfigError(f"{folder} names no EOS, so that no response would end: set eos_token in "
                      "tokenizer_config.json, to one of the tokenizer's tokens")


def base_of(folder: Path) -> ModelRef | None:
    """The base of the adapter in the folder, none if it holds a whole model. Raises `StoreError` if it names none here."""
    file = folder / lora.CONFIG
    if not file.is_file():
        return None
    named = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if (found := re.fullmatch(r"([a-z0-9._-]+)/([0-9a-f]{64})/([a-z_]+)", named)) is None:
        raise StoreError(f"{file}: base_model_name_or_path: expected stage/identity/folder, found {named!r}")
    return ModelRef(artifact=ArtifactRef(stage=found[1], identity=found[2]), folder=found[3])


def scalar_over(causal: PreTrainedModel) -> PreTrainedModel:
    """As `load_scalar` of a causal model that is loaded already, whose body is the same memory."""
    body, config = lora.sharing(causal).base_model, copy.deepcopy(causal.config)
    if not _has_classifier(config):
        return ScalarHead(config, body)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, body)
    weight = next(body.parameters())
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False, device=weight.device)
    torch.nn.init.zeros_(model.score.weight)
    return model


def save_model(attempt: Attempt, inner: str, model: LanguageModel) -> None:
    """A Hugging Face folder that `from_pretrained` reads with nothing of Baton installed, but for a `ScalarHead`; of an
    adapter PEFT's, without the tokenizer, which is its base's."""
    module, tokenizer = model.module, model.tokenizer
    if model.base is not None:
        attempt.files_of(f"{inner}/{lora.CONFIG}", lambda file: lora.save_config(module, file, model.base))
        attempt.weights(f"{inner}/{lora.WEIGHTS}", lambda: tensor_file(lora.adapter_tensors(module), PYTORCH))
        return
    attempt.files_of(inner, partial(_save_config, module))
    attempt.files_of(inner, tokenizer.save_pretrained)
    attempt.weights(f"{inner}/{WEIGHTS}", lambda: tensor_file(_weights(module), PYTORCH))


def _save_config(module: PreTrainedModel, folder: Path) -> None:
    """As `save_pretrained` does, without the weights."""
    module.config.architectures, module.config.dtype = [type(module).__name__], str(module.dtype).removeprefix("torch.")
    module.config.save_pretrained(folder)
    if module.can_generate():
        module.generation_config.save_pretrained(folder)


def _weights(module: PreTrainedModel) -> dict[str, Tensor]:
    """As `save_pretrained` names them: tied ones once, and as the family's own files have them."""
    if isinstance(module, ScalarHead):
        return module.state_dict()
    left_out = module._keys_to_ignore_on_save or ()
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}
    return revert_weight_conversion(module, remove_tied_weights_from_state_dict(tensors, module))


def save_learner(attempt: Attempt, learner: LanguageModelLearner) -> None:
    """`actor/`, `critic/` if there is one, and `optimizer/actor.safetensors`, `optimizer/critic.safetensors`."""
    for name, model in learner.networks.items():
        save_model(attempt, name, model)
        attempt.weights(f"optimizer/{name}.safetensors",
                        lambda model=model, name=name: tensor_file(state_tensors(learner.optimizers[name], model.module)))


def load_optimizers(learner: LanguageModelLearner, folder: Path, device: str | None = None) -> None:
    """The inverse of `save_learner` for the optimizers, onto the device or where their parameters are. Raises `StoreError`
    if they are of another model."""
    for name, model in learner.networks.items():
        path = folder / f"{name}.safetensors"
        try:
            load_state_tensors(learner.optimizers[name], model.module, load_file(path), device)
        except KeyError as error:
            raise StoreError(f"{path}: {error} does not fit the {name}") from None
