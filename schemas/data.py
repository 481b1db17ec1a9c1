"""Where prompts, demonstrations and pairs come from, and how the rows that are there become those that stages read."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.settings import Settings

COLUMNS = {
    "prompts": ("prompt",), "heldout_prompts": ("prompt",), "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"), "heldout_pairs": ("prompt", "chosen", "rejected"),
    "pretraining": ("text",),
}
"""Role → the columns that its rows have once they are imported; of prompts that are conversations also `messages`."""
PARTS = {"heldout_prompts": "prompts", "heldout_pairs": "pairs"}  # what may be cut off → what it is cut off from
PAIRS = ("pairs", "heldout_pairs")

Column = str | tuple[str, ...] | dict[str, float] | None


class TurnsConfig(Settings):
    """A conversation that is one text: what opens each turn of it."""

    user: str = Field(min_length=1)
    """What opens a user's turn, such as "\\n\\nHuman:"."""
    assistant: str = Field(min_length=1)
    """What opens an assistant's turn."""
    system: str | None = None
    """What opens the system's turn, if there is one; else what comes before the first turn is the system's."""


class SourceConfig(Settings):
    """One source of rows; a text alone is its `source`."""

    source: str = Field(min_length=1)
    """A file of JSON lines, JSON, CSV, TSV or Parquet, perhaps compressed; a folder of such files, or one that `datasets`
    has saved; relative to the config file. Or the name of a data set on the hub (`org/name`, `org/name@revision`)."""
    subset: str | None = None
    """A folder or the hub: which configuration of the data set, where it has several."""
    split: str = "train"
    """A folder or the hub: which split."""
    columns: dict[str, Column] = Field(default_factory=dict)
    """What a column is called here → in the source: a name, a path such as `reward_model.ground_truth`, several names whose
    texts are joined by a blank line, null to leave a column out. What is not named keeps its name. `messages` is a whole
    conversation. Pairs may be made of rated responses: `response`, and `score`, a name or {name: weight}."""
    turns: TurnsConfig | None = None
    """The texts are transcripts of conversations: what opens each turn."""
    system: str | None = None
    """A system prompt, put before each conversation that has none."""
    ties: Literal["refuse", "drop"] = "refuse"
    """Pairs: what becomes of those whose responses are equal, or have equal scores."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return {"source": data} if isinstance(data, str) else data

    @model_serializer(mode="wrap")
    def _short(self, dump: SerializerFunctionWrapHandler) -> Any:
        """As it may be written: the source alone, where nothing else is set."""
        values = {name: value for name, value in dump(self).items() if name == "source" or value != getattr(PLAIN, name)}
        return self.source if values.keys() == {"source"} else values

    @property
    def reading(self) -> dict[str, Any]:
        """All that decides which rows are read from the source's content."""
        found = self.model_dump(mode="json")
        return {} if isinstance(found, str) else {name: value for name, value in found.items() if name != "source"}


PLAIN = SourceConfig(source="…")


class HeldoutConfig(Settings):
    """What is cut off where the config names no held-out file. Rows with one prompt stay together."""

    rows: PositiveInt = 64
    """How many rows at least: those of so many prompts that it is reached."""
    seed: int = Field(0, ge=0)
    """Which ones: another seed cuts off others."""


class DataConfig(Settings):
    """The input data. It enters the store by its content."""

    prompts: SourceConfig
    """Training prompts: `prompt`, a text or a conversation, and any columns that reward functions name."""
    heldout_prompts: SourceConfig | None = None
    """Prompts for `evaluate`, never trained on; left out: cut off from `prompts` by `heldout`."""
    demonstrations: SourceConfig | None = None
    """What `sft` learns from: `prompt` and `completion`, or `messages`, whose last turn is learned."""
    pairs: SourceConfig | None = None
    """What `reward_model` learns from: `prompt`, `chosen` and `rejected`; or conversations `chosen` and `rejected` with the
    prompt in both; or rated responses."""
    heldout_pairs: SourceConfig | None = None
    """Pairs the reward model is only tested on; left out: cut off from `pairs` by `heldout`."""
    pretraining: SourceConfig | None = None
    """What `ppo.ptx_coef` mixes in instead of the demonstrations: `text`."""
    heldout: HeldoutConfig | None = None
    """How much is cut off from `prompts` and `pairs` where no held-out file is named; demonstrations of the source that the
    prompts are of lose the held-out ones too."""
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What becomes of rows longer than the model's context beside the response: the run is refused with a list of them, they
    are dropped, or prompts lose their beginning (conversations their oldest turns, but not the system's) and what is still
    too long is dropped."""

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        if self.heldout_prompts is None and self.heldout is None:
            raise ValueError("heldout_prompts: missing; name a file, or let some prompts be held out: heldout: {rows: 64}")
        return self

    def source(self, role: str) -> SourceConfig | None:
        """Where that role's rows come from, also those that are cut off; none where there are none."""
        return getattr(self, role) or (self.source(PARTS[role]) if self.cuts_off(role) else None)

    def cuts_off(self, role: str) -> bool:
        """Whether that role is cut off from another."""
        cut = role in PARTS and getattr(self, role) is None and getattr(self, PARTS[role]) is not None
        return cut and self.heldout is not None

    @property
    def roles(self) -> list[str]:
        """Those that there are rows of."""
        return [role for role in COLUMNS if self.source(role) is not None]

    def reading(self, role: str) -> dict[str, Any]:
        """All that decides that role's rows, beside the content of its source and what `too_long` depends on."""
        part = {role: "part" for role in PARTS if self.cuts_off(role)} | {
            PARTS[role]: "rest" for role in PARTS if self.cuts_off(role)}
        cut = {"heldout": self.heldout.model_dump(mode="json") | {"kept": part[role]}} if role in part else {}
        if role == "demonstrations" and self.shares_prompts:
            cut = {"without": self.reading("heldout_prompts")}
        return self.source(role).reading | cut

    @property
    def shares_prompts(self) -> bool:
        """Whether demonstrations are of the source that held-out prompts are cut off from, so that they lose those too."""
        if self.demonstrations is None or not self.cuts_off("heldout_prompts"):
            return False
        ours, theirs = self.demonstrations, self.prompts
        return (ours.source, ours.subset, ours.split) == (theirs.source, theirs.subset, theirs.split)
