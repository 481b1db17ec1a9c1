"""Models and optimizers: loaded from artifacts, saved into attempts, and kept warm between the stages of a process."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flows.store.store import Attempt, Store
from schemas.artifacts import ArtifactRef, ModelRef
from schemas.errors import ConfigError, StoreError
from schemas.settings import ExecutionConfig, PPOConfig
from stages.ops.abilities import Abilities, abilities
from stages.ops.device import Device
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.optim import load_state_tensors, state_tensors
from stages.ops.progress import progress_bar
from stages.ops.scalar_head import ScalarHead
from stages.ops.texts import Texts

NOT_TOKENIZER = ("config.json", "generation_config.json", "model.safetensors.index.json")


Load = Callable[[Path], PreTrainedModel]


@dataclass(frozen=True)
class Reading:
    """How prompts are read: within the chat template or not, and special tokens that are written in them as what."""

    chat_template: bool
    special_tokens: bool
    """Whether they are those tokens, or else text."""

    def of(self, model: LanguageModel) -> LanguageModel:
        """The model, which reads like this."""
        self.tokenizer(model.tokenizer)
        return replace(model, chat_template=self.chat_template)

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The same, of a tokenizer."""
        tokenizer.split_special_tokens = not self.special_tokens
        return tokenizer


class WarmModels:
    """A cache by (role, model), `execution.warm_models` large; the least recently used goes first.

    Roles do not share: training changes the actor in place, and the reference may be the same artifact. Stages that run side
    by side ask for models one after another.
    """

    def __init__(self, store: Store, execution: ExecutionConfig) -> None:
        self.store, self.execution, self.loaded = store, execution, 0
        self._lock = threading.Lock()
        self._warm: OrderedDict[tuple[str, ModelRef], LanguageModel] = OrderedDict()
        self._learners: dict[ArtifactRef, LanguageModelLearner] = {}
        self._texts: tuple[object, Texts] | None = None

    def actor(self, ref: ModelRef, reading: Reading) -> LanguageModel:
        return reading.of(self._get("actor", ref, load_causal))

    def reference(self, ref: ModelRef) -> LanguageModel:
        return self._get("reference", ref, load_causal)

    def critic(self, ref: ModelRef) -> LanguageModel:
        return self._get("critic", ref, load_scalar)

    def reward_model(self, ref: ModelRef) -> LanguageModel:
        return self._get("reward_model", ref, load_scalar)

    def scorer(self, ref: ModelRef) -> LanguageModel:
        """A reward model that is brought."""
        return self._get("scorer", ref, load_classifier)

    def trainable(self, ref: ModelRef, load: Load, reading: Reading) -> LanguageModel:
        """A copy of its own for a stage that trains it and lets it go."""
        return reading.of(self._load(ref, load))

    def take_learner(
        self, actor: ModelRef, critic: ModelRef | None, optimizer: ModelRef | None, config: PPOConfig, temperature: float
    ) -> LanguageModelLearner:
        """Actor, critic if there is one, and optimizers to train; they leave the cache, since training changes them."""
        warm = self._learners.pop(optimizer.artifact, None) if optimizer else None
        actor_model = self._take("actor", actor, load_causal)
        critic_model = self._take("critic", critic, load_scalar) if critic else None
        if warm and (warm.config, warm.temperature) == (config, temperature):
            return warm
        learner = LanguageModelLearner(actor_model, critic_model, config, temperature)
        if optimizer:
            load_optimizers(learner, self.store.folder(optimizer.artifact, optimizer.folder))
        return learner

    def put_learner(self, artifact: ArtifactRef, learner: LanguageModelLearner) -> None:
        """Keeps what was trained, under the artifact it was saved to."""
        self._learners[artifact] = learner
        for name, model in learner.networks.items():
            self._put(name, ModelRef(artifact=artifact, folder=name), model)

    def texts(self, ref: ArtifactRef, model: ModelRef, reading: Reading, tokenize: Callable[[], Texts]) -> Texts:
        """The texts of an input as the model's tokenizer reads them; kept, since each checkpoint has that tokenizer."""
        key = ref, reading, self._tokenizer(model)
        if self._texts is None or self._texts[0] != key:
            self._texts = key, tokenize()
        return self._texts[1]

    def forget(self, artifact: ArtifactRef) -> None:
        """Lets go of what is warm of an artifact, so that it is read from the store."""
        self._learners.pop(artifact, None)
        for key in [key for key in self._warm if key[1].artifact == artifact]:
            del self._warm[key]

    def close(self) -> None:
        """Lets go of everything."""
        self._warm.clear()
        self._learners.clear()
        self._texts = None

    def _tokenizer(self, model: ModelRef) -> frozenset[tuple[str, str]]:
        """Name and digest of the tokenizer's files, which are all that is neither weights nor their config."""
        files = ((entry.path.removeprefix(f"{model.folder}/"), entry.sha256)
                 for entry in self.store.manifest(model.artifact).files if entry.path.startswith(f"{model.folder}/"))
        return frozenset((name, digest) for name, digest in files
                         if not name.endswith(".safetensors") and name not in NOT_TOKENIZER)

    def _get(self, role: str, ref: ModelRef, load: Load) -> LanguageModel:
        key = (role, ref)
        with self._lock:
            if key not in self._warm:
                self._make_room(self.execution.warm_models - 1)
                self._warm[key] = self._load(ref, load)
            self._warm.move_to_end(key)
            return self._warm[key]

    def _take(self, role: str, ref: ModelRef, load: Load) -> LanguageModel:
        return self._warm.pop((role, ref), None) or self._load(ref, load)

    def _put(self, role: str, ref: ModelRef, model: LanguageModel) -> None:
        self._warm[role, ref] = model
        self._make_room(self.execution.warm_models)

    def _make_room(self, size: int) -> None:
        while len(self._warm) > size:
            (_, ref), _ = self._warm.popitem(last=False)
            self._learners.pop(ref.artifact, None)

    def _load(self, ref: ModelRef, load: Load) -> LanguageModel:
        self.loaded += 1
        folder, execution = self.store.folder(ref.artifact, ref.folder), self.execution
        brought = load is load_classifier  # with a tokenizer of its own, perhaps not causal
        tokenizer = load_tokenizer(folder, needs_eos=not brought)
        module = load(folder).to(Device(execution.device).torch).eval()
        module.config.pad_token_id = tokenizer.pad_token_id
        return LanguageModel(module, tokenizer, micro_batch_tokens=execution.micro_batch_tokens,
                             generation_batch_size=execution.generation_batch_size,
                             abilities=Abilities() if brought else abilities(module))


# --- one folder, one model ---

SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}


def load_causal(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, from safetensors alone. Raises `ConfigError` if weights are missing."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **SAFE)
    require_all_weights(folder, report)
    return _own_memory(model)


def load_scalar(folder: Path) -> PreTrainedModel:
    """A sequence classifier with one label in float32; over a causal model's body, its head is new and all zeros.

    Raises `ConfigError` if weights are missing.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    architectures = config.architectures or ()
    if ScalarHead.__name__ in architectures:
        return _own_memory(ScalarHead.load(folder, config))
    if any("SequenceClassification" in name for name in architectures):
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
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **SAFE)
    require_all_weights(folder, report)
    return _own_memory(model)


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


def load_tokenizer(folder: Path, *, needs_eos: bool = True) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; one without an EOS has the model's, and one without a padding token pads with EOS.

    Raises `ConfigError` where no file names an EOS, if one is needed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if needs_eos and tokenizer.eos_token is None:
        tokenizer.eos_token = _eos_of_model(folder, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for how_it_was_loaded in ("is_local", "local_files_only"):  # would be saved with it
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


def save_model(attempt: Attempt, inner: str, model: LanguageModel) -> None:
    """A Hugging Face folder that `from_pretrained` reads with nothing of Baton installed, but for a `ScalarHead`."""
    folder = attempt.path(inner)
    if isinstance(model.module, ScalarHead):
        model.module.save(folder)
    else:
        model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def save_learner(attempt: Attempt, learner: LanguageModelLearner) -> None:
    """`actor/`, `critic/` if there is one, and `optimizer/actor.safetensors`, `optimizer/critic.safetensors`."""
    parts = progress_bar(learner.networks.items(), "ppo: save")
    for name, model in parts:
        save_model(attempt, name, model)
        save_file(state_tensors(learner.optimizers[name], model.module), attempt.path(f"optimizer/{name}.safetensors"))


def load_optimizers(learner: LanguageModelLearner, folder: Path) -> None:
    """The inverse of `save_learner` for the optimizers. Raises `StoreError` if they are of another model."""
    for name, model in learner.networks.items():
        path = folder / f"{name}.safetensors"
        try:
            load_state_tensors(learner.optimizers[name], model.module, load_file(path))
        except KeyError as error:
            raise StoreError(f"{path}: {error} does not fit the {name}") from None
