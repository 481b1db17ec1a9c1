"""Policies of control tasks: loaded from artifacts, saved into attempts, and kept warm with their environments."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import gymnasium
from safetensors.torch import load_file
from torch import Tensor

from flows.control.environments import Watch, make_vector
from flows.runs.kind import settings_of
from flows.store.attempt import Attempt
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, ModelRef
from schemas.control import EnvironmentConfig, PolicyConfig, Spaces
from schemas.errors import StoreError
from schemas.settings import ExecutionConfig, PPOConfig
from schemas.tables import Trajectories
from stages.ops.control_learner import ControlLearner
from stages.ops.device import Device
from stages.ops.episodes import Environments, actions_since_reset
from stages.ops.networks import Actor, Critic, Network
from stages.ops.tensor_file import tensor_file

log = logging.getLogger("baton")
N = TypeVar("N", bound=Network)


Function = Callable[..., gymnasium.Env] | None


class WarmPolicies:
    """What the last update trained, and the environments where the last rollout left them."""

    def __init__(self, store: Store, execution: ExecutionConfig) -> None:
        self.store, self.execution, self.loaded = store, execution, 0
        self.renders = True  # until a picture fails: a renderer that finds no display may end the process the second time
        self._learner: tuple[ArtifactRef, ControlLearner] | None = None
        self._environments: tuple[ArtifactRef, Environments] | None = None

    def actor(self, ref: ModelRef) -> Actor:
        return self._network(ref, Actor)

    def critic(self, ref: ModelRef) -> Critic:
        return self._network(ref, Critic)

    def take_learner(
        self, actor: ModelRef, critic: ModelRef, optimizer: ModelRef | None, config: PPOConfig
    ) -> ControlLearner:
        """Actor, critic and optimizer to train; they leave the cache, since training changes them."""
        self.store.manifest(actor.artifact)  # committed: of one update at most commits are under way
        warm, self._learner = self._learner, None
        if warm and optimizer and warm[0] == optimizer.artifact and warm[1].config == config:
            return warm[1]
        learner = ControlLearner(self._load(actor, Actor), self._load(critic, Critic), config)
        if optimizer:
            load_optimizer(learner, self.store.folder(optimizer.artifact, optimizer.folder))
        return learner

    def put_learner(self, artifact: ArtifactRef, learner: ControlLearner) -> None:
        """Keeps what was trained, under the artifact it was saved to."""
        self._learner = artifact, learner

    @contextmanager
    def environments(
        self, config: EnvironmentConfig, function: Function, spaces: Spaces, count: int, *, seed: int,
        previous: ArtifactRef | None, rollout: ArtifactRef,
    ) -> Iterator[Environments]:
        """The environments where `previous`, a rollout, has left them; afterwards kept under the one that moves them on,
        `rollout`, or closed if that fails."""
        if self._environments and self._environments[0] != previous:
            self._close_environments()
        warm, self._environments = self._environments, None
        environments = warm[1] if warm else self.new_environments(config, function, spaces, count, seed=seed)
        try:
            if not warm and previous is None:
                environments.begin()
            elif not warm:
                self._resume(environments, previous)
            yield environments
        except BaseException:
            environments.close(force=True)
            raise
        self._environments = rollout, environments

    def new_environments(
        self, config: EnvironmentConfig, function: Function, spaces: Spaces, count: int, *, seed: int, once: bool = False
    ) -> Environments:
        """Environments that were never stepped."""
        watch = Watch(config.id, self.execution.environment_timeout)
        with watch("making them"):
            vector = make_vector(config, function, count, self.execution)
        return Environments(vector, spaces, config.id, seed=seed, once=once, watch=watch)

    def holds(self, model: ModelRef) -> bool:
        """Whether the model is what the last update trained."""
        return self._learner is not None and self._learner[0] == model.artifact

    def forget(self, artifact: ArtifactRef) -> None:
        """Lets go of what is warm of an artifact, so that it is read from the store."""
        if self._learner and self._learner[0] == artifact:
            self._learner = None
        if self._environments and self._environments[0] == artifact:
            self._close_environments()

    def close(self) -> None:
        """Lets go of everything."""
        self._learner = None
        self._close_environments()

    def _close_environments(self) -> None:
        environments, self._environments = self._environments, None
        if environments:
            environments[1].close()

    def _resume(self, environments: Environments, previous: ArtifactRef) -> None:
        replay = actions_since_reset(batches_before(self.store, previous))
        strayed = environments.resume(self.store.table(previous, Trajectories), replay)
        if strayed:
            log.warning(f"{environments.name}: environments {strayed} did not come to the same observation with "
                        "the same seed and actions; they are not deterministic, and begin a new episode")

    def _network(self, ref: ModelRef, kind: type[N]) -> N:
        if self._learner and self._learner[0] == ref.artifact:
            return self._learner[1].networks[ref.folder]
        return self._load(ref, kind)

    def _load(self, ref: ModelRef, kind: type[N]) -> N:
        self.loaded += 1
        return load_network(self.store.folder(ref.artifact, ref.folder), kind).to(Device(self.execution.device).torch)


def batches_before(store: Store, rollout: ArtifactRef) -> Iterator[Trajectories]:
    """That rollout's trajectories, then those of the one before it, and so on, read one at a time."""
    ref: ArtifactRef | None = rollout
    while ref is not None:
        yield store.table(ref, Trajectories)
        ref = store.recipe(ref).inputs.get("previous")


# --- one folder, one network ---

def save_network(attempt: Attempt, inner: str, network: Network) -> None:
    """`config.json`, what the network is, and `model.safetensors`, its weights and moments of observations."""
    config = {"spaces": settings_of(network.spaces), "policy": settings_of(network.config)}
    attempt.write(f"{inner}/config.json", (json.dumps(config, indent=1) + "\n").encode())
    attempt.weights(f"{inner}/model.safetensors", _as_now(network.state_dict()))


def load_network(folder: Path, kind: type[N]) -> N:
    """The inverse of `save_network`. Raises `StoreError` if the folder holds another network."""
    config = json.loads((folder / "config.json").read_text())
    network = kind(Spaces(**config["spaces"]), PolicyConfig(**config["policy"]))
    try:
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise StoreError(f"{folder}: {' '.join(str(error).split())}") from None
    return network


def save_learner(attempt: Attempt, learner: ControlLearner) -> None:
    """`actor/`, `critic/` and `optimizer/adamw.safetensors`."""
    for name, network in learner.networks.items():
        save_network(attempt, name, network)
    attempt.weights("optimizer/adamw.safetensors", _as_now(learner.optimizer_tensors()))


def _as_now(tensors: Mapping[str, Tensor]) -> Callable[[], Iterator[memoryview]]:
    """A file of copies: a rollout moves the moments of observations."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return lambda: tensor_file(copies)


def load_optimizer(learner: ControlLearner, folder: Path) -> None:
    """The inverse of `save_learner` for the optimizer. Raises `StoreError` if it is of other networks."""
    path = folder / "adamw.safetensors"
    try:
        learner.load_optimizer_tensors(load_file(path))
    except ValueError as error:
        raise StoreError(f"{path}: {error}") from None
