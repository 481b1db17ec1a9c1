"""What crosses stages and iterations: recipes and their identities, references, manifests, the training state."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.errors import ConfigError, StoreError
from schemas.settings import NAME_PATTERN, ExecutionConfig, Name
from schemas.stages import Kind


class Record(BaseModel):
    """Base of what is kept as JSON (schemas/records.py says how): immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def check_name(name: str, what: str) -> str:
    """`name` if it matches the pattern of names; raises `ConfigError` that says what is wrong."""
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        raise ConfigError(f"{what} {name!r}: use 1 to 64 of a-z, 0-9, '_', '-' and single '.', beginning with a letter "
                          "or digit")
    return name


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError(f"path {path!r} leaves the artifact")
    return path


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Algorithm = Literal["sha256", "blake3"]
FileDigest = Annotated[str, Field(pattern=r"^(blake3:)?[0-9a-f]{64}$")]
InnerPath = Annotated[str, AfterValidator(_inside)]


class ArtifactRef(Record):
    """Names an artifact, committed or not: `stage/identity`."""

    stage: Name
    identity: Digest

    def __str__(self) -> str:
        return f"{self.stage}/{self.identity}"

    @property
    def short(self) -> str:
        """For people: `stage/` and 12 digits of the identity."""
        return f"{self.stage}/{self.identity[:12]}"


class Recipe(Record):
    """All that decides what a stage writes. Two equal recipes give one artifact."""

    stage: Name
    version: int = Field(ge=1)
    """Raised beside the stage when its results change meaning."""
    config: dict[str, Any]
    """The settings that change the result."""
    inputs: dict[str, ArtifactRef]
    """Artifacts read, by role."""
    seed: int | None = None

    @cached_property
    def ref(self) -> ArtifactRef:
        """sha256 of the recipe as canonical JSON: sorted keys, no spaces, ASCII."""
        return ArtifactRef(stage=self.stage, identity=sha256_json(self.model_dump(mode="json")))


class ModelRef(Record):
    """A model inside an artifact."""

    artifact: ArtifactRef
    folder: InnerPath


class Moments(Record):
    """Running moments of scores, or of discounted returns."""

    count: float = 0
    """How many were seen."""
    mean: float = 0
    std: float = 0
    """Standard deviation (÷ count)."""


class Shard(Record):
    """A part of a stage's rows: the `index`th of `of`, of almost equal length."""

    index: int = Field(ge=0)
    of: int = Field(ge=1)

    @property
    def name(self) -> str:
        """For names of runs: `1of4` is the first of four."""
        return f"{self.index + 1}of{self.of}"

    def rows(self, count: int, unit: int = 1) -> slice:
        """Which of `count` rows; `unit` of them, the responses to one prompt, stay together."""
        groups = -(-count // unit)
        begin, end = (groups * edge // self.of for edge in (self.index, self.index + 1))
        return slice(begin * unit, min(end * unit, count))


class StageCall(Record):
    """One stage's work, by references alone: what decides its result, and how it is computed.

    It is JSON, and the same in this process, in a process of its own (`baton perform CALL.json`) or on another
    machine that reaches the store.
    """

    kind: Kind
    """Whose stage it is: a language model's or a control task's."""
    stage: Name
    version: int = Field(ge=1)
    """The stage's, of the code that made the call."""
    settings: dict[str, Any]
    """All that decides the result, beside inputs and seed."""
    inputs: dict[str, ArtifactRef | ModelRef]
    """What is read, by role."""
    seed: int | None = None
    iteration: int = Field(ge=0)
    """Where in the run; for messages, decides nothing."""
    store: str
    """A folder, or s3://bucket/prefix."""
    execution: ExecutionConfig
    snapshot: bool = True
    """Whether weights that it makes are written, or their digests alone are taken."""
    parts: tuple[ArtifactRef, ...] = ()
    """Artifacts of its shards, in order, whose rows it joins instead of computing them."""

    def shards(self) -> tuple[StageCall, ...]:
        """A call for each of `execution.shards`, whose artifact holds a part of the rows."""
        shards = (Shard(index=i, of=self.execution.shards).model_dump() for i in range(self.execution.shards))
        fields = {name: getattr(self, name) for name in StageCall.model_fields}  # a copy would keep the recipe
        return tuple(StageCall(**fields | {"settings": self.settings | {"shard": shard}}) for shard in shards)

    @property
    def shard(self) -> Shard | None:
        """Which part of the rows it is about; none of all of them."""
        found = self.settings.get("shard")
        return None if found is None else Shard.model_validate(found)

    @cached_property
    def recipe(self) -> Recipe:
        """The part that decides the result."""
        inputs = {role: ref.artifact if isinstance(ref, ModelRef) else ref for role, ref in self.inputs.items()}
        return Recipe(stage=self.stage, version=self.version, config=self.settings, inputs=inputs, seed=self.seed)

    @property
    def folders(self) -> dict[str, str]:
        """Role → folder of the models among the inputs."""
        return {role: ref.folder for role, ref in self.inputs.items() if isinstance(ref, ModelRef)}


class Outputs(Record):
    """Numbers that a stage hands to the next iteration. Metrics are for people, and decide nothing."""

    kl: float | None = None
    """`gae`: KL estimate to the reference, nats a response, mean over the batch."""
    bias: float | None = None
    """`reward_bias`: mean weighted sum of the demonstrations."""
    moments: Moments | None = None
    """`reward`, or a control task's `rollout`: running moments with this batch's; none where nothing is normalised."""


class FileEntry(Record):
    """One file of an artifact."""

    path: InnerPath
    bytes: int = Field(ge=0)
    digest: FileDigest
    """SHA-256 of its bytes; of weights that a stage writes `blake3:` and their BLAKE3."""
    rows: int | None = None
    """Tables only."""
    columns: dict[str, str] | None = None
    """Tables only: name → type."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_formats(cls, values: Any) -> Any:
        """Before format 7 it was SHA-256 for all files, and called so."""
        if not isinstance(values, dict) or "digest" in values:
            return values
        return {"digest" if key == "sha256" else key: value for key, value in values.items()}

    @property
    def algorithm(self) -> Algorithm:
        """Of the digest."""
        return "blake3" if self.digest.startswith("blake3:") else "sha256"


class Environment(Record):
    """What an artifact was made with; not part of its identity."""

    packages: dict[str, str]
    """Package → version; Baton's own among them."""
    python: str
    device: str
    device_name: str
    threads: int
    """CPU threads of torch."""
    execution: dict[str, Any]
    """The execution settings; a rerun uses them again."""


class Manifest(Record):
    """The commit point of an artifact: what it was made from, what it holds, what making it took."""

    identity: Digest
    recipe: Recipe
    input_contents: dict[str, Digest] | None
    """Role → `content` of the input; none in format 1."""
    attempt: Name
    """The folder below `attempts/` that holds the files."""
    files: tuple[FileEntry, ...]
    unwritten: tuple[InnerPath, ...] = ()
    """Those of `files` whose digests alone were taken: weights between snapshots. None before format 6."""
    metrics: dict[str, float]
    outputs: Outputs
    """In formats 1 and 2 they were taken from the metrics."""
    kind: Kind | None
    """Whose stage made it; none for inputs and in formats 1 and 2, as the next two."""
    iteration: int | None
    folders: dict[str, str]
    """Role → folder of the models that it read."""
    seconds: float
    """Wall time of the stage, loading and saving included."""
    tokens: int | None = None
    """Tokens the stage's models processed, response tokens for `rollout`; in a control task, steps."""
    environment: Environment
    created: str
    """UTC, ISO 8601."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_formats(cls, values: Any) -> Any:
        """Format 1 had the sha256 of an input's manifest, which is another one when the same bytes are made again; formats 1
        and 2 had neither outputs nor what a `StageCall` needs beside the recipe."""
        if not isinstance(values, dict) or "outputs" in values:
            return values
        values = {key: value for key, value in values.items() if key != "input_manifests"}
        return {"input_contents": None, "outputs": _measured(values.get("metrics")), "kind": None, "iteration": None,
                "folders": {}} | values

    @property
    def ref(self) -> ArtifactRef:
        return ArtifactRef(stage=self.recipe.stage, identity=self.identity)

    @cached_property
    def content(self) -> str:
        """sha256 of the files' digests by path, as canonical JSON."""
        return sha256_json(self.digests())

    @property
    def bytes(self) -> int:
        """Bytes of all files that were written."""
        return sum(entry.bytes for entry in self.files if entry.path not in self.unwritten)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def digests(self) -> dict[str, str]:
        """Path → digest."""
        return {entry.path: entry.digest for entry in self.files}


def _measured(metrics: Any) -> dict[str, Any]:
    """Outputs of an artifact of format 1 or 2, which knew them as metrics."""
    there = metrics if isinstance(metrics, dict) else {}
    moments = {name: there[f"running_{name}"] for name in Moments.model_fields if f"running_{name}" in there}
    return {"kl": there.get("kl"), "bias": there.get("bias"), "moments": moments or None}


def call_of(manifest: Manifest, store: str) -> StageCall:
    """The call that made the artifact, to be performed again in `store`. Raises `StoreError` for one of an older format."""
    recipe = manifest.recipe
    if manifest.kind is None or manifest.iteration is None:
        raise StoreError(f"{manifest.ref.short}: the manifest of an input, or of an older format, holds no call; baton "
                         f"stage {manifest.ref.stage} RUN --iteration I --print-call makes one from the run")
    inputs = {role: ModelRef(artifact=ref, folder=manifest.folders[role]) if role in manifest.folders else ref
              for role, ref in recipe.inputs.items()}
    try:
        return StageCall(
            kind=manifest.kind, stage=recipe.stage, version=recipe.version, settings=recipe.config, inputs=inputs,
            seed=recipe.seed, iteration=manifest.iteration, store=store,
            execution=ExecutionConfig.model_validate(manifest.environment.execution))
    except ValidationError as error:
        raise StoreError(f"{manifest.ref.short}: its manifest holds no call that can be made: {error.errors()[0]['msg']}"
                         ) from None


class Produced(Record):
    """What came of a call. It is JSON, as the call is."""

    ref: ArtifactRef
    how: Literal["made", "found", "adopted", "reproduced", "different"]
    """`found`: it was committed before. `adopted`: another writer committed it first. `reproduced` and `different`: it was
    there, and was made again beside itself."""
    outputs: Outputs
    metrics: dict[str, float]
    seconds: float
    """As the manifest has it."""
    files: int = 0
    """How many it holds; 0 where it is committed later."""
    different: dict[str, tuple[str | None, str | None]] = Field(default_factory=dict)
    """Path → (committed digest, new digest) where those of this process differ."""
    folder: str | None = None
    """Where the new files are, if they are `different`."""


class Best(Record):
    """The best iteration so far, by one metric."""

    metric: str
    value: float
    iteration: int = Field(ge=0)


class TrainState(Record):
    """All that crosses an iteration: iteration i maps state i−1 to state i; state 0 is what `prepare` made."""

    iteration: int = Field(ge=0)
    actor: ModelRef
    critic: ModelRef | None
    """None where the advantages are estimated without one."""
    optimizer: ModelRef | None
    """The optimizers' state; none before the first update."""
    reference: ModelRef | None
    """None in a control task."""
    reward_model: ModelRef | None
    baseline: ArtifactRef
    """The evaluation of the starting actor."""
    artifacts: dict[str, ArtifactRef]
    """What the stages of this iteration wrote, by stage."""
    kl_coef: float = 0.0
    """β of the next iteration."""
    reward_bias: float = 0.0
    """What is taken off every weighted sum: the demonstrations' mean, or 0."""
    reward_moments: Moments = Moments()
    """Of all scores, or discounted returns, so far, for the next iteration's rewards; kept where they are normalised."""
    metrics: dict[str, float]
    """`stage/metric` of this iteration."""
    best: Best | None = None
    """Of all iterations up to this one; unknown in formats 1 to 3, or where the metric was not measured yet."""
    seconds: float
    """Wall time of this iteration, what lies between its stages included; differs from run to run."""

    def models(self) -> list[ArtifactRef]:
        """The artifacts that the next iteration begins with, and the evaluation it is measured against."""
        models = (self.actor, self.critic, self.optimizer, self.reference, self.reward_model)
        return [*(model.artifact for model in models if model), self.baseline]


class Dropped(Record):
    """`dropped/<part>.json` beside a manifest: a part of a checkpoint that is not kept any more."""

    part: Literal["optimizer", "critic", "actor"]
    """The folder of the artifact whose files are gone, or about to be."""
    run: Name
    """Whose retention it was."""
    created: str


class RunRecord(Record):
    """`run.json`: what a run is. Written once."""

    name: Name
    config: dict[str, Any]
    inputs: dict[str, ArtifactRef]
    """Imported files and models, by role."""
    parent: str | None = None
    """`run@iteration` for a fork."""
    created: str


def short_digest(digest: str) -> str:
    """For people: 12 digits, without the algorithm."""
    return digest.rpartition(":")[2][:12]


def sha256_json(value: Any) -> str:
    """sha256 of canonical JSON. Raises `ValueError` on NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(run_seed: int, iteration: int, stage: str) -> int:
    """63 bits from (run seed, iteration, stage)."""
    return int(sha256_json([run_seed, iteration, stage])[:16], 16) >> 1
