"""What crosses stages and iterations: recipes and their identities, references, manifests, the training state."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from schemas.errors import ConfigError
from schemas.settings import NAME_PATTERN, Name


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


class FileEntry(Record):
    """One file of an artifact."""

    path: InnerPath
    bytes: int = Field(ge=0)
    sha256: Digest
    rows: int | None = None
    """Tables only."""
    columns: dict[str, str] | None = None
    """Tables only: name → type."""


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
    metrics: dict[str, float]
    seconds: float
    """Wall time of the stage, loading and saving included."""
    tokens: int | None = None
    """Tokens the stage's models processed, response tokens for `rollout`; in a control task, steps."""
    environment: Environment
    created: str
    """UTC, ISO 8601."""

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, values: Any) -> Any:
        """It had the sha256 of the input's manifest, which is another one when the same bytes are made again."""
        if isinstance(values, dict) and "input_manifests" in values:
            return {key: value for key, value in values.items() if key != "input_manifests"} | {"input_contents": None}
        return values

    @property
    def ref(self) -> ArtifactRef:
        return ArtifactRef(stage=self.recipe.stage, identity=self.identity)

    @cached_property
    def content(self) -> str:
        """sha256 of all files: of their digests by path, as canonical JSON."""
        return sha256_json(self.digests())

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.files)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def digests(self) -> dict[str, str]:
        """Path → sha256."""
        return {entry.path: entry.sha256 for entry in self.files}


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

    @classmethod
    def measured(cls, stage: str, metrics: Mapping[str, float]) -> Moments:
        """As the stage's metrics `running_…` have them, this iteration's numbers included; none seen where it keeps none."""
        there = {name: metrics.get(f"{stage}/running_{name}") for name in cls.model_fields}
        return cls(**{name: value for name, value in there.items() if value is not None})


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


def sha256_json(value: Any) -> str:
    """sha256 of canonical JSON. Raises `ValueError` on NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(run_seed: int, iteration: int, stage: str) -> int:
    """63 bits from (run seed, iteration, stage)."""
    return int(sha256_json([run_seed, iteration, stage])[:16], 16) >> 1


def prefixed(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """`stage/metric` → value."""
    return {f"{stage}/{name}": value for name, value in metrics.items()}
