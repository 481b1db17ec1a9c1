"""Models and optimizers, kept warm between the stages of a process; roles that begin from one model share its memory."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.language.model_folders import (
    base_of,
    is_scorer,
    load_causal,
    load_classifier,
    load_encoder,
    load_optimizers,
    load_scalar,
    load_tokenizer,
    scalar_over,
    use_attention,
)
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, ModelRef
from schemas.errors import ConfigError
from schemas.language import LoRAConfig
from schemas.settings import ExecutionConfig, PPOConfig
from stages.ops import lora, ranks
from stages.ops.abilities import Abilities, abilities
from stages.ops.conversations import ChatTemplate
from stages.ops.device import Device
from stages.ops.distribution import distribution_of
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.precision import FLOAT32, Precision, hold, to_device
from stages.ops.texts import Texts

NOT_TOKENIZER = ("config.json", "generation_config.json", "model.safetensors.index.json")
Load = Callable[[Path], PreTrainedModel]


@dataclass(frozen=True)
class Adapters:
    """What is trained instead of all weights, and what new ones are drawn with."""

    config: LoRAConfig
    seed: int


@dataclass(frozen=True)
class _Whole:
    """A model of a folder, without an adapter."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    abilities: Abilities


@dataclass(frozen=True)
class Reading:
    """How prompts are read: within the chat template or not, and special tokens that are written in them as what."""

    chat_template: ChatTemplate
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
    """A cache by (role, model), `execution.warm_models` large, and larger by what is not in the store; the least recently
    used goes first.

    A model that is warm in one role is the same memory in another, but for what is trained: that has weights of its own, or
    an adapter of its own over weights that stay. Stages that run side by side ask for models one after another.
    """

    def __init__(self, store: Store, execution: ExecutionConfig) -> None:
        self.store, self.execution, self.loaded = store, execution, 0
        self._lock = threading.Lock()
        self._warm: OrderedDict[tuple[str, ModelRef, Precision], LanguageModel] = OrderedDict()
        self._learners: dict[ArtifactRef, LanguageModelLearner] = {}
        self._bases: dict[tuple[ModelRef, str], _Whole] = {}
        self._texts: tuple[object, Texts] | None = None

    def actor(self, ref: ModelRef, reading: Reading, precision: Precision = FLOAT32) -> LanguageModel:
        return reading.of(self._get("actor", ref, load_causal, precision))

    def reference(self, ref: ModelRef, precision: Precision = FLOAT32) -> LanguageModel:
        return self._get("reference", ref, load_causal, precision)

    def critic(self, ref: ModelRef, precision: Precision = FLOAT32) -> LanguageModel:
        return self._get("critic", ref, load_scalar, precision)

    def reward_model(self, ref: ModelRef, precision: Precision = FLOAT32) -> LanguageModel:
        return self._get("reward_model", ref, load_scalar, precision)

    def scorer(self, ref: ModelRef) -> LanguageModel:
        """A reward model that is brought."""
        return self._get("scorer", ref, load_classifier, FLOAT32)

    def encoder(self, ref: ModelRef) -> LanguageModel:
        """What texts are embedded with."""
        return self._get("encoder", ref, load_encoder, FLOAT32)

    def own(self, ref: ModelRef, load: Load, precision: Precision = FLOAT32) -> LanguageModel:
        """A model that is not kept."""
        return self._load(ref, load, precision)

    def trainable(
        self, ref: ModelRef, load: Load, reading: Reading, adapters: Adapters | None, precision: Precision
    ) -> LanguageModel:
        """For a stage that trains it, or an adapter of it, and lets it go. Raises `ConfigError` where there can be none."""
        return reading.of(self._trainable(ref, self._load(ref, load, precision), adapters))

    def take_learner(
        self, actor: ModelRef, critic: ModelRef | None, optimizer: ModelRef | None, config: PPOConfig,
        sampling: Mapping[str, Any], adapters: Adapters | None = None, precision: Precision = FLOAT32,
    ) -> LanguageModelLearner:
        """Actor, critic if there is one, and optimizers to train; they leave the cache, since training changes them.
        `sampling`: the settings that decide the distribution of what was sampled.

        Raises `ConfigError` where there can be no such adapters.
        """
        self.store.manifest(actor.artifact)  # committed, or else it would be written while it is trained
        warm = self._learners.pop(optimizer.artifact, None) if optimizer else None
        taken = self._take("actor", actor, load_causal, precision)
        if adapters and optimizer and taken.base is None:
            raise ConfigError("lora: what is trained on was trained in full; make another run with adapters")
        actor_model = self._trainable(actor, taken, adapters)
        critic_model = critic and self._trainable(critic, self._take("critic", critic, load_scalar, precision), adapters)
        distribution = distribution_of(sampling, actor_model.tokenizer, actor_model.eos_ids)
        if warm and (warm.config, warm.distribution) == (config, distribution):
            return warm
        learner = LanguageModelLearner(actor_model, critic_model, config, distribution)
        if optimizer and not (self.execution.fsdp and ranks.rank()):  # rank 0 shards them
            load_optimizers(learner, self.store.folder(optimizer.artifact, optimizer.folder),
                            "cpu" if self.execution.fsdp else None)
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

    def holds(self, model: ModelRef) -> bool:
        """Whether the model, or optimizer, is in memory."""
        if model.folder == "optimizer":
            return model.artifact in self._learners
        return any(ref == model for _, ref, _ in list(self._warm))

    def forget(self, artifact: ArtifactRef) -> None:
        """Lets go of what is warm of an artifact, so that it is read from the store."""
        self._learners.pop(artifact, None)
        for key in [key for key in self._warm if key[1].artifact == artifact]:
            del self._warm[key]
        self._bases = {key: base for key, base in self._bases.items() if key[0].artifact != artifact}

    def close(self) -> None:
        """Lets go of everything."""
        self._warm.clear()
        self._learners.clear()
        self._bases.clear()
        self._texts = None

    def tokenizer(self, ref: ModelRef) -> PreTrainedTokenizerBase:
        """The model's; an adapter has that of its base."""
        folder = self.store.folder(ref.artifact, ref.folder)
        base = base_of(folder)
        return load_tokenizer(folder) if base is None else self.tokenizer(base)

    def _tokenizer(self, model: ModelRef) -> frozenset[tuple[str, str]]:
        """Name and digest of the tokenizer's files, which are all that is neither weights nor their config."""
        files = ((entry.path.removeprefix(f"{model.folder}/"), entry.digest)
                 for entry in self.store.manifest(model.artifact).files if entry.path.startswith(f"{model.folder}/"))
        return frozenset((name, digest) for name, digest in files
                         if not name.endswith(".safetensors") and name not in NOT_TOKENIZER)

    def _get(self, role: str, ref: ModelRef, load: Load, precision: Precision) -> LanguageModel:
        key = (role, ref, precision)
        with self._lock:
            if key not in self._warm:
                self._make_room(self.execution.warm_models - 1)
                self._warm[key] = self._load(ref, load, precision)
            self._warm.move_to_end(key)
            return self._warm[key]

    def _take(self, role: str, ref: ModelRef, load: Load, precision: Precision) -> LanguageModel:
        return self._warm.pop((role, ref, precision), None) or self._load(ref, load, precision)

    def _put(self, role: str, ref: ModelRef, model: LanguageModel) -> None:
        self._warm[role, ref, model.precision] = model
        self._make_room(self.execution.warm_models)

    def _make_room(self, size: int) -> None:
        """The least recently used goes, but for what cannot be read again."""
        for key in list(self._warm)[: max(0, len(self._warm) - size)]:
            if self.store.holds_weights(key[1].artifact):
                del self._warm[key]
                self._learners.pop(key[1].artifact, None)

    def _load(self, ref: ModelRef, load: Load, precision: Precision) -> LanguageModel:
        """The model, in memory that is shared with whatever else is warm of it."""
        folder, execution = self.store.folder(ref.artifact, ref.folder), self.execution
        base = base_of(folder)
        if base is None:
            whole = self._whole(ref, load, precision.weights)
        else:
            over = self._base(base, precision.weights)
            whole = replace(over, module=self._over(over.module, load), tokenizer=copy.deepcopy(over.tokenizer))
            lora.load_adapter(whole.module, folder)
        whole.module.config.pad_token_id = whole.tokenizer.pad_token_id
        return LanguageModel(whole.module, whole.tokenizer, micro_batch_tokens=execution.micro_batch_tokens,
                             generation_batch_size=execution.generation_batch_size, precision=precision,
                             recompute=execution.gradient_checkpointing, base=base and _name(base),
                             abilities=whole.abilities)

    def _base(self, ref: ModelRef, weights: str) -> _Whole:
        """What adapters are over, as it was saved; kept for all of them."""
        if (ref, weights) not in self._bases:
            load = load_scalar if is_scorer(self.store.folder(ref.artifact, ref.folder)) else load_causal
            self._bases[ref, weights] = self._whole(ref, load, weights)
        return self._bases[ref, weights]

    @staticmethod
    def _over(base: PreTrainedModel, load: Load) -> PreTrainedModel:
        """A model of its own in the memory of the base; a scorer also over a causal one."""
        return lora.sharing(base) if load is load_causal or hasattr(base, "score") else scalar_over(base).eval()

    def _whole(self, ref: ModelRef, load: Load, weights: str) -> _Whole:
        """Without an adapter: one that is warm, in its memory; else read from its folder."""
        folder, brought = self.store.folder(ref.artifact, ref.folder), load in (load_classifier, load_encoder)
        tokenizer = load_tokenizer(folder, needs_eos=not brought)  # one that is brought has its own
        for warm in self._warm_of(ref, weights, brought):
            scores = hasattr(warm.module, "score")
            if scores == (load is not load_causal):
                return _Whole(lora.sharing(warm.module).eval(), tokenizer, warm.abilities)
            if load is load_scalar and not scores:
                return _Whole(scalar_over(warm.module).eval(), tokenizer, warm.abilities)
        self.loaded += 1
        module, device, can = load(folder).eval(), Device(self.execution.device).torch, Abilities()
        if weights == "float32":
            module.to(device)
        if not brought:  # one that is brought is perhaps not causal, and read as it is
            can = abilities(module)  # in float32
            use_attention(module, self.execution.attention)
        hold(module, weights)
        return _Whole(to_device(module, device), tokenizer, can)

    def _warm_of(self, ref: ModelRef, weights: str, brought: bool = False) -> list[_Whole | LanguageModel]:
        """What is warm of it without an adapter; reward models that are brought have memory of their own."""
        found = [model for (role, warm, precision), model in self._warm.items() if warm == ref
                 and precision.weights == weights and model.base is None and (role in ("scorer", "encoder")) == brought]
        return [*([self._bases[ref, weights]] if (ref, weights) in self._bases and not brought else []), *found]

    def _trainable(self, ref: ModelRef, model: LanguageModel, adapters: Adapters | None) -> LanguageModel:
        """The model with all weights its own, or frozen ones with an adapter of its own, new unless it has one."""
        weights = model.precision.weights
        if adapters is None:
            if model.base is not None:
                raise ConfigError("lora: what is trained on is an adapter, which is not trained in full; make another run")
            return replace(model, module=copy.deepcopy(model.module)) if self._warm_of(ref, weights) else model
        if model.base is not None:
            lora.require_adapter(model.module, adapters.config)
            return model
        module = self._over(self._base(ref, weights).module, load_scalar if hasattr(model.module, "score") else load_causal)
        lora.add_adapter(module, adapters.config, seed=adapters.seed + hasattr(module, "score"))
        return replace(model, module=module, base=_name(ref))


def _name(ref: ModelRef) -> str:
    """As an adapter's config names its base."""
    return f"{ref.artifact}/{ref.folder}"
