"""Settings of the reward: its components, of every kind of source, and how they make a score."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from schemas.addresses import Address
from schemas.reward_options import BUILTINS, Builtin
from schemas.settings import Later, Name, Settings

OF_KIND = {  # settings of components of one kind alone
    "model": frozenset({"chat_template", "max_tokens", "truncation"}), "builtin": frozenset({"options"}),
    "server": frozenset({"columns"})}


class ComponentConfig(Settings):
    """One part of the reward."""

    source: Address
    """`reward_model`, the one trained here; the name of a built-in reward, such as `numeric` (schemas/reward_options.py); a
    sequence classifier with one label, as a folder or a name on the hub (`org/name`, `org/name@revision`);
    `file.py:function` beside the config; `package.module:function`; or an `http://…` server."""
    weight: float = 1.0
    """What its value is multiplied with in the sum."""
    chat_template: bool | None = None
    """A model that is brought: whether prompt and response are put to it as a user's and an assistant's turn in its own chat
    template; null: if it has one. Else it reads the response right after the prompt."""
    max_tokens: PositiveInt | None = None
    """A model that is brought: the most tokens that it is given; null: as many as it takes."""
    truncation: Literal["left", "right"] = "left"
    """A model that is brought: the side at which a longer text is cut."""
    options: dict[str, Any] = Field(default_factory=dict)
    """A built-in reward: its settings."""
    columns: tuple[str, ...] = ()
    """A server: columns of the prompts that it is sent too."""

    @property
    def kind(self) -> Literal["reward_model", "builtin", "model", "server", "function"]:
        """What the source is: the reward model trained here, a built-in, a model that is brought, a server, a function."""
        if self.source == "reward_model":
            return "reward_model"
        if self.source in BUILTINS:
            return "builtin"
        if self.source.startswith(("http://", "https://")):
            return "server"
        return "function" if ":" in self.source or self.source.endswith(".py") else "model"

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if taken := {"prompts", "responses"} & {*self.columns}:
            raise ValueError(f"columns: a server is sent {sorted(taken)[0]!r} anyway; take it out")
        if not self.source.strip():
            raise ValueError("source is empty; name reward_model, a model, file.py:function, or a server")
        for kind, names in OF_KIND.items():
            if self.kind != kind and (set_ := sorted(self.model_fields_set & names)):
                raise ValueError(f"{set_[0]} is about {A[kind]}, and source={self.source!r} is none; remove it")
        if self.kind == "builtin":
            _ = self.builtin
        return self

    @property
    def builtin(self) -> Builtin:
        """The settings of a built-in reward. Raises `ValueError`."""
        try:
            return BUILTINS[self.source].model_validate(self.options)
        except ValidationError as error:
            first = error.errors()[0]
            key, what = ".".join(map(str, ("options", *first["loc"]))), first["msg"].removeprefix("Value error, ")
            known = f"; {self.source} has {', '.join(_names(BUILTINS[self.source])) or 'none'}"
            raise ValueError(f"{key}: {what}{known if first['type'] == 'extra_forbidden' else ''}") from None

    @property
    def model(self) -> str | None:
        """The model from elsewhere that it is, or embeds texts with; none for other kinds."""
        if self.kind == "builtin":
            return getattr(self.builtin, "model", None)
        return self.source if self.kind == "model" else None

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of the prompts that a built-in or a server is given; what a function reads is in its signature."""
        if self.kind == "builtin":
            return (self.builtin.column,) if self.builtin.column else ()
        return self.columns

    @model_serializer(mode="wrap")
    def _without_the_rest(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What concerns one kind alone is left out of what others are made from; and columns that are none."""
        others = {name for kind, names in OF_KIND.items() if kind != self.kind for name in names}
        others |= set() if self.columns else {"columns"}
        return {name: value for name, value in dump(self).items() if name not in others}


A = {"model": "a model that is brought", "builtin": "a built-in reward", "server": "a reward server"}


def _names(settings: type[Settings]) -> list[str]:
    return [field.alias or name for name, field in settings.model_fields.items()]


class RewardConfig(Settings):
    """The score of a response: weighted sum − bias → normalised → clipped → missing-EOS rule → overlong penalty."""

    components: dict[Name, ComponentConfig] = Field(
        default_factory=lambda: {"reward_model": ComponentConfig(source="reward_model")})
    """Name → component; the names are those of the `components` column and of the metrics."""
    center_on_demonstrations: bool = False
    """Whether the demonstrations' mean is taken off, so that they score 0 on average (Stiennon et al. 2020)."""
    normalize_components: Annotated[Literal["none", "batch", "group"], Later(before="none")] = "none"
    """Whether each component is brought to mean 0 and variance 1 before the weighted sum, over the batch, or over the
    responses to one prompt (Liu et al. 2026, GDPO), so that none outweighs others by its scale; for the score alone,
    raw_score stays the sum of what is given."""
    normalize: Literal["none", "scale", "standardize"] = "none"
    """By the moments of all scores so far, this batch's included: divided by σ, or (score − μ)/σ."""
    clip: PositiveFloat | None = None
    """The score is clipped to ± this; null leaves it."""
    missing_eos: Literal["none", "subtract", "replace"] = "none"
    """What happens to the score of a response without EOS: subtract the penalty, or put −penalty in its place."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """The penalty of `missing_eos`."""
    overlong_buffer: PositiveInt | None = None
    """The last so many tokens before the limit cost up to `overlong_penalty`, in proportion (Yu et al. 2025, DAPO)."""
    overlong_penalty: float = Field(1.0, ge=0)
    """What a response of the full length costs, if there is an `overlong_buffer`."""
    special_tokens: Annotated[bool, Later(before=False)] = False
    """Whether functions, servers and the judge are given responses with their special tokens, such as `<think>` and EOS."""

    @model_validator(mode="after")
    def _some_component(self) -> Self:
        if not self.components:
            raise ValueError("components is empty; name at least one, for example {reward_model: {source: reward_model}}")
        if self.normalize_components != "none" and self.normalize != "none":
            raise ValueError(f"normalize={self.normalize} with normalize_components={self.normalize_components}: scores "
                             "would be normalised twice; set one of them to none")
        if self.normalize_components != "none" and self.center_on_demonstrations:
            raise ValueError("center_on_demonstrations takes a constant off, which normalize_components would take off "
                             "again; set one of them back")
        return self


A_MODEL = "model"  # in the place of a model's source, whose content decides


def by_content(components: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dumped components, without where their models lie."""
    return {name: with_model(part, A_MODEL) if ComponentConfig.model_validate(part).model else part
            for name, part in components.items()}


def with_model(part: dict[str, Any], model: str) -> dict[str, Any]:
    """A dumped component with another model."""
    if part["source"] in BUILTINS:
        return part | {"options": part["options"] | {"model": model}}
    return part | {"source": model}
