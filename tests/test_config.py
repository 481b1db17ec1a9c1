"""Settings: presets, what is filled in, and that a config read back is the same."""

import pytest
import yaml
from conftest import TINY

from schemas.config import parse_config
from schemas.language import LanguageConfig
from schemas.presets import PRESETS
from schemas.reward_settings import ComponentConfig
from schemas.settings import Settings

DATA = {"prompts": "p", "heldout_prompts": "h", "demonstrations": "d", "pairs": "q", "heldout_pairs": "r"}


def parsed(**sections):
    return parse_config({"data": DATA, "sft": {}, "reward_model": {}} | sections, "here")


def test_classic_is_trls_and_the_n_plus_details():
    c = parsed(preset="classic")
    assert (c.ppo.epochs, c.gae.gae_lambda, c.kl.coef, c.kl.estimator, c.kl.placement) == (4, 0.95, 0.05, "k1", "reward")
    assert (c.ppo.value_clip_range, c.ppo.value_coef, c.rollout.temperature, c.ppo.dual_clip) == (0.2, 0.1, 0.7, None)
    assert (c.reward.missing_eos, c.reward.missing_eos_penalty) == ("replace", 1.0)


def test_reasoning_is_openrlhfs_and_verls():
    c = parsed(preset="reasoning")
    assert (c.ppo.epochs, c.gae.gae_lambda, c.ppo.value_clip_range, c.ppo.dual_clip) == (1, 1.0, 0.5, 3.0)
    assert c.ppo.critic_learning_rate > c.ppo.learning_rate and c.rollout.temperature == 1.0


def test_what_is_written_goes_before_the_preset():
    c = parsed(preset="classic", ppo={"epochs": 2}, rollout={"temperature": 1.0})
    assert (c.ppo.epochs, c.ppo.value_coef, c.rollout.temperature) == (2, 0.1, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_made_of_settings_that_exist(name):
    for section, values in PRESETS[name].items():
        assert set(values) <= set(LanguageConfig.model_fields[section].annotation.model_fields)


@pytest.mark.parametrize("sections", [
    {}, {"preset": "classic"}, {"preset": "reasoning", "value": {"start": "actor"}},
    {"gae": {"estimator": "grpo"}, "rollout": {"responses_per_prompt": 2}},
    {"preset": "reasoning", "gae": {"estimator": "reinforce++"}}])
def test_a_config_read_back_is_the_same(sections):
    """As run.json keeps it."""
    config = parsed(**sections)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "there") == config


def test_a_critic_is_filled_in_where_one_is_needed():
    assert parsed().value.start == "reward_model"
    assert parsed(gae={"estimator": "reinforce++"}).value is None


def test_conventional_whitening():
    whitens = lambda **gae: parsed(gae=gae, rollout={"responses_per_prompt": 2}).gae.whitens  # noqa: E731
    assert [whitens(estimator=e) for e in ("gae", "grpo", "rloo", "reinforce++")] == [True, False, False, True]
    assert whitens(estimator="grpo", whiten="batch") and not whitens(whiten="none")


def test_every_setting_says_what_it_is():
    def undocumented(section, path):
        for name, field in section.model_fields.items():
            kinds = [kind for kind in getattr(field.annotation, "__args__", (field.annotation,)) if isinstance(kind, type)]
            inner = [kind for kind in kinds if issubclass(kind, Settings)]
            for kind in inner:
                yield from undocumented(kind, f"{path}{name}.")
            if not inner and not field.description:
                yield f"{path}{name}"

    assert list(undocumented(LanguageConfig, "")) == [] == list(undocumented(ComponentConfig, ""))


def test_the_tiny_example_is_a_config():
    assert parse_config(TINY, "tiny").gae.estimator == "gae"
