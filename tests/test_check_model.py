"""Models that are brought: what is refused before the run exists, and in which words; what is let in, and how it is used."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from brought import PROMPTS, change_json, change_weights, make_model, make_tokenizer, write_brought
from conftest import rewrite
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel

from flows.cli.main import run_command
from flows.language.check_model import check_model
from flows.language.model_folders import load_causal, load_scalar, load_tokenizer, save_model, scalar_over
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.artifacts import Recipe
from schemas.errors import ConfigError
from schemas.language import RolloutConfig
from schemas.settings import GAEConfig, KLConfig, PPOConfig
from schemas.tables import Rewards, Rollouts
from stages.gae import gae as gae_stage
from stages.ops import token_logprobs
from stages.ops.abilities import Abilities, abilities
from stages.ops.distribution import Distribution
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.prompts import completed, tokenize
from stages.ops.sampling import ModelSampler, respond
from stages.ops.scalar_head import ScalarHead
from stages.ops.token_logprobs import score_tokens
from stages.ppo import ppo as ppo_stage
from stages.reference import reference as reference_stage
from stages.value import value as value_stage


@pytest.fixture
def folder(tmp_path):
    """A model that is whole."""
    return write_brought(tmp_path / "case") / "model"


def quantised(folder):
    change_json(folder / "config.json", quantization_config={"quant_method": "fp8"})


def without_its_head(folder):
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))


def with_a_layer_too_few(folder):
    change_json(folder / "config.json", num_hidden_layers=3)


def with_a_layer_too_many(folder):
    change_json(folder / "config.json", num_hidden_layers=1)


def of_another_shape(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))


def saved_by_its_body(folder):
    make_model(kind=AutoModel).save_pretrained(folder)


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()  # as PEFT saves one


def adapter_beside_weights(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_a_cut_header(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def with_a_shard_missing(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')


def with_a_token_too_many(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def without_eos(folder):
    make_tokenizer(eos=None, pad=None).save_pretrained(folder)
    change_json(folder / "config.json", eos_token_id=None)
    change_json(folder / "generation_config.json", eos_token_id=None)


def with_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")


def of_a_family_that_is_not_there(folder):
    change_json(folder / "config.json", model_type="llamma")


@pytest.mark.parametrize("wrong, words", [
    (quantised, r"is quantised \(fp8, quantization_config in config.json\), and what is trained is float32: take the "
                "weights from before quantisation"),
    (without_its_head, r"the weights are not those of config.json: 1 missing \(lm_head.weight\). What is missing would be"),
    (saved_by_its_body, r"1 missing \(lm_head.weight\)"),
    (with_a_layer_too_few, r"9 missing \(model.layers.2.input_layernorm.weight, .*, …\)"),
    (with_a_layer_too_many, r"9 unexpected \(model.layers.1"),
    (of_another_shape, r"1 mismatched \(model.norm.weight \[5\] for \[32\]\)"),
    (adapter, r"holds an adapter of some/base \(adapter_config.json\), .*merge_and_unload"),
    (adapter_beside_weights, r"holds an adapter \(adapter_config.json\).*or remove adapter_config.json if the weights"),
    (cut_short, r"model.safetensors has \d+ bytes, its header says \d+: it was cut short or changed; download it again"),
    (with_a_cut_header, r"is no safetensors file, or was cut short \(50 bytes\): download it again"),
    (pointer, "is a pointer of Git LFS, not the weights: run git lfs pull"),
    (with_a_shard_missing, r"names 1 files that are not there: model-00002-of-00002.safetensors; download the folder again"),
    (with_a_token_too_many, r"tokens that the model has no embedding for \('\[PAD\]' is (\d+); \1 embeddings\)"),
    (without_eos, r"names no EOS, so that no response would end: set eos_token in tokenizer_config.json"),
    (with_a_config_that_is_no_json, "config.json: Expecting property name"),
    (of_a_family_that_is_not_there, "cannot be read as a model: .*llamma")])
def test_a_model_that_cannot_be_trained_is_refused_before_the_run_exists(folder, tmp_path, capsys, wrong, words):
    wrong(folder)
    assert run_command(["train", str(folder.parent), "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1 and not (tmp_path / "store").exists()


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    folder = write_brought(tmp_path / "case", make_model("bert")) / "model"
    with pytest.raises(ConfigError, match="BertLMHeadModel is not causal: another last token changes"):
        check_model("base_model.source", folder)


def test_what_is_let_in_is_said(tmp_path, caplog):
    folder = write_brought(tmp_path / "large", make_model(vocab_size=len(make_tokenizer()) + 64)) / "model"
    found = check_model("base_model.source", folder)
    assert (found.context, found.metrics.pads, found.metrics.caches, found.metrics.trims) == (128, True, True, True)
    assert "64 of the model's" in caplog.text and "token ids are unknown to the tokenizer" in caplog.text
    caplog.clear()
    check_model("base_model.source", write_brought(tmp_path / "rwkv", make_model("rwkv")) / "model")
    assert "padding on its left changes what it computes: only prompts of one length are sampled side by side" in caplog.text
    assert "each step reads the whole row again" in caplog.text


@pytest.mark.parametrize("family, size, context", [
    ("llama", {}, 128), ("gpt2", {}, 128), ("mpt", {"max_seq_len": 48}, 48), ("bloom", {}, None),
    ("mamba", {}, None)])
def test_the_context_is_where_the_config_says_it(tmp_path, family, size, context):
    folder = write_brought(tmp_path / "case", make_model(family, max_position_embeddings=128, **size)) / "model"
    if family in ("mpt", "bloom", "mamba"):
        change_json(folder / "config.json", max_position_embeddings=None)
    assert check_model("base_model.source", folder).context == context


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_eos_that_the_model_names_alone_is_the_tokenizers(tmp_path, file):
    folder = write_brought(tmp_path / "case", make_model(), make_tokenizer(eos=None, pad=None)) / "model"
    change_json(folder / "config.json", eos_token_id=1 if file == "config.json" else None)
    change_json(folder / "generation_config.json", eos_token_id=[1] if file != "config.json" else None)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1)


# --- families ---

PLAIN = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "mistral", "gpt_neox", "gpt2", "gpt_bigcode", "bloom",
    "mpt", "falcon", "olmo", "olmo2", "smollm3", "granite", "cohere", "cohere2", "glm4", "mixtral", "stablelm", "starcoder2",
    "ernie4_5", "nemotron", "persimmon", "biogpt", "lfm2", "mamba", "rwkv", "recurrent_gemma")
SIZED = {  # families that have other names for their sizes, or are slow by default
    "falcon_h1": {"mamba_chunk_size": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64}, "xglm": {"d_model": 32, "ffn_dim": 64}, "bart": {"d_model": 32},
    "ctrl": {"n_embd": 32, "dff": 64}, "codegen": {"n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_ctx": 128},
    "gptj": {"rotary_dim": 4}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "jamba": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                         "mamba_chunk_size": 8, "shared_intermediate_size": 32, "num_local_experts": 4,
                         "num_experts_per_tok": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "gemma4_text": {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 293, "num_kv_shared_layers": 0}}
ALONE = Abilities(pads=False, caches=False, trims=False)
RIGHT_BUT_SLOWER = {  # docs/field.md counts the others
    "mamba": Abilities(caches=False, trims=False), "mamba2": Abilities(caches=False, trims=False),
    "granitemoehybrid": Abilities(trims=False), "jamba": Abilities(caches=False, trims=False),
    "rwkv": ALONE, "recurrent_gemma": ALONE, "bart": ALONE, "falcon_h1": Abilities(trims=False),
    "qwen3_5_text": Abilities(trims=False)}
FAMILIES = {family: SIZED.get(family, {}) for family in (*PLAIN, *SIZED)}


def plain_logprobs(module, rollouts: Rollouts) -> list[np.ndarray]:
    """Of each response's tokens by a pass over its row alone."""
    found = []
    for row in range(len(rollouts)):
        prompt, response = rollouts.prompt_tokens[row], rollouts.response_tokens[row]
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.inference_mode():
            logprobs = module(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        found.append(logprobs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt):, None])[:, 0].numpy())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_and_scored_logprobs_are_those_of_a_plain_pass(family, monkeypatch):
    """Responses that end early, of prompts of unlike lengths: whatever way the family has to go, the numbers are right. Also
    with the output head on a column at a time."""
    tokenizer = make_tokenizer()
    module = make_model(family, tokenizer=tokenizer, **FAMILIES[family])
    with torch.no_grad():  # EOS is likely, so that rows end at different steps
        head = module.get_output_embeddings()
        head.weight[1] += head.weight.std() * torch.sign(head.weight.mean(0)) if head is not None else 0
    model = LanguageModel(module, tokenizer, micro_batch_tokens=64, abilities=abilities(module))
    assert model.abilities == RIGHT_BUT_SLOWER.get(family, Abilities())
    rollouts = respond(ModelSampler(model), PROMPTS, np.arange(len(PROMPTS)), RolloutConfig(max_new_tokens=12), seed=3,
                       progress="test")
    scored = score_tokens(model, rollouts, Distribution(1.0), "test")
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 1)
    for found in (rollouts.logprobs, scored, score_tokens(model, rollouts, Distribution(1.0), "test")):
        for row, expected in enumerate(plain_logprobs(module, rollouts)):
            np.testing.assert_allclose(found[row], expected, atol=1e-5)


@torch.inference_mode()
def plain_values(critic, rollouts: Rollouts) -> list[np.ndarray]:
    """Of each response by a pass over its row alone: V before each of its tokens, and after the last."""
    found = []
    for prompt, response in zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        hidden = critic.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found.append(critic.score(hidden)[0, len(prompt) - 1 :, 0].numpy())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_through_two_iterations(family):
    """Rollout to update, twice: logprobs of actor and reference, and values, are those of plain passes each time."""
    tokenizer = make_tokenizer()
    modules = [make_model(family, tokenizer=tokenizer, **FAMILIES[family]) for _ in range(3)]
    actor, reference, causal = (LanguageModel(module, tokenizer, micro_batch_tokens=64, abilities=abilities(module))
                                for module in modules)
    critic = replace(causal, module=scalar_over(causal.module).eval())
    config = PPOConfig(epochs=1, minibatches=2, learning_rate=1e-2)
    learner = LanguageModelLearner(actor, critic, config, Distribution(1.0))
    for iteration in range(2):
        rollouts = respond(ModelSampler(actor), PROMPTS[:4], np.arange(4), RolloutConfig(max_new_tokens=6),
                           seed=iteration, progress="test")
        scored, values = reference_stage(reference, rollouts, Distribution(1.0)), value_stage(critic, rollouts)
        for found, module in ((rollouts.logprobs, actor.module), (scored.logprobs, reference.module)):
            for one, expected in zip(found, plain_logprobs(module, rollouts), strict=True):
                np.testing.assert_allclose(one, expected, atol=1e-5)
        for one, last, expected in zip(values.values, values.bootstrap, plain_values(critic.module, rollouts), strict=True):
            np.testing.assert_allclose([*one, last], expected, atol=1e-5)
        score = rollouts.response_tokens.lengths.astype(np.float32)
        rewards = Rewards(row_id=rollouts.row_id, raw_score=score, score=score, components={"length": score})
        advantages = gae_stage(rollouts, scored, rewards, values, GAEConfig(), KLConfig(), kl_coef=0.05)
        metrics = ppo_stage(learner, rollouts, values, advantages, config, seed=iteration)
        assert metrics.steps == 2 and metrics.grad_norm_actor > 0 and metrics.grad_norm_critic > 0
    moved = [abs(a - b).max() for a, b in zip(rollouts.logprobs, scored.logprobs, strict=True)]
    assert max(moved) > 1e-4 and any(values.values.values != 0)


@pytest.mark.parametrize("family", [
    "granite", "cohere", "olmoe", "ernie4_5", "llama", "gpt2", "mamba", "phi", "gptj", "ctrl"])
def test_a_critic_over_any_family_is_saved_and_loaded_as_it_is(tmp_path, family):
    """Where transformers has no classifier, a scalar head over the body; it begins at 0 and is read back as it was."""
    folder = write_brought(tmp_path / "case", make_model(family, **FAMILIES[family])) / "model"
    change_json(folder / "config.json", dtype="bfloat16")  # as most are published
    critic = load_scalar(folder)
    assert (critic.score.weight == 0).all() and critic.score.weight.shape == (1, 32)
    assert isinstance(critic, ScalarHead) == (
        family in ("granite", "cohere", "olmoe", "ernie4_5", "mamba", "ctrl"))
    with torch.no_grad():
        critic.score.weight.normal_()
        next(critic.base_model.parameters()).add_(0.25)
    attempt = Store(tmp_path / "store").attempt(Recipe(stage="test", version=1, config={}, inputs={}))
    save_model(attempt, "critic", LanguageModel(critic, make_tokenizer()))
    attempt.seal()
    again = load_scalar(attempt.folder / "critic")
    assert equal(critic, again) and critic.base_model.config.model_type == again.base_model.config.model_type


@pytest.mark.parametrize("family, tied", [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2", True),
                                          ("lfm2", True), ("mamba", True)])
def test_what_is_saved_is_what_was_trained(tmp_path, family, tied):
    folder = write_brought(tmp_path / "case", make_model(family, tie_word_embeddings=tied, **FAMILIES[family])) / "model"
    module = load_causal(folder)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.01 * (number + 1))
    attempt = Store(tmp_path / "store").attempt(Recipe(stage="test", version=1, config={}, inputs={}))
    save_model(attempt, "actor", LanguageModel(module, make_tokenizer()))
    attempt.seal()
    assert equal(module, load_causal(attempt.folder / "actor"))
    module.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").iterdir():
        assert (attempt.folder / "actor" / file.name).read_bytes() == file.read_bytes(), file.name


def equal(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", ["lfm2", "granite", "rwkv", "bloom"])
def test_a_family_of_each_kind_trains(tmp_path, prefect_server, family):
    folder = write_brought(tmp_path / family, make_model(family, **FAMILIES[family]))
    if family == "bloom":
        change_json(folder / "model" / "config.json", max_position_embeddings=None)
    arguments = ["--store", str(tmp_path / "store"), "--quiet"]
    assert run_command(["train", str(folder), *arguments]) == 0
    assert run_command(["stage", "ppo", family, "--iteration", "1", *arguments]) == 0
    assert run_command(["stage", "rollout", family, "--iteration", "1", *arguments]) == 0


# --- text and tokens ---

def test_a_prompt_ends_where_its_text_ends(tmp_path, prefect_server):
    """A tokenizer that puts EOS after every text: no prompt ends in it, in rollouts and in demonstrations."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)])
    folder = write_brought(tmp_path / "case", tokenizer=tokenizer)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--quiet"]) == 0
    run = open_run(Store(tmp_path / "store"), "case")
    report = run.store.manifest(run.inputs["base_model"]).metrics
    assert report == {"parameters": 39392.0, "vocab_size": 293.0, "embeddings": 293.0, "context_length": 128.0, "pads": 1.0,
                      "caches": 1.0, "trims": 1.0, "splits": 1.0}
    prompts = run.store.table(run.state(1).artifacts["rollout"], Rollouts).prompt_tokens
    assert all(row[0] == 0 and row[-1] != 1 for row in prompts)


@pytest.mark.parametrize("setting, seen", [("false", False), ("true", True)])
def test_a_reward_can_see_special_tokens(tmp_path, prefect_server, setting, seen):
    """What the setting says, in `reward` and in `evaluate`."""
    tokenizer = make_tokenizer(special=["<|bos|>", "<|eos|>", "<|pad|>", "<think>"])
    reward = ("def score(prompts, responses):\n    return [float(any(mark in response for mark in ('<think>', '<|eos|>', "
              "'<|bos|>', '<|pad|>'))) + 0.001 * i for i, response in enumerate(responses)]\n")
    folder = write_brought(tmp_path / "case", tokenizer=tokenizer, rewards_py=reward,
                           rollout={"batch_size": 64, "max_new_tokens": 24},
                           evaluate={"every": 1, "judge": "rewards.py:score"})
    arguments = ["train", str(folder), "--store", str(tmp_path / "store"), "--quiet"]
    assert run_command([*arguments, "--set", f"reward.special_tokens={setting}"]) == 0
    run = open_run(Store(tmp_path / "store"), "case")
    metrics = run.state(1).metrics
    assert (metrics["reward/component_length"] > 0.1) == seen
    call = run.store.manifest(run.state(1).artifacts["reward"]).recipe.config
    assert ("special_tokens" in call) == seen  # at its default it is left out, as in calls that were made before


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('a system turn first') }}", "cannot render a user's turn: a system turn first; change the model's"),
    ({"one": "x", "two": "y"}, r"multiple chat templates with no default.*\['one', 'two'\]"),
    ("{{ messages[1]['content'] }}", "cannot render a user's turn: "), ("{% if %}", "cannot render a user's turn: "),
    ("{{ strftime_now('%c') }}{{ messages[0]['content'] }}", "calls strftime_now, so that a prompt would change with the")])
def test_a_template_that_cannot_be_used_is_refused_with_what_it_says(tmp_path, template, words, capsys):
    folder = write_brought(tmp_path / "case", tokenizer=make_tokenizer(chat_template=template),
                           base_model={"source": "model", "chat_template": True})
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1 and not (tmp_path / "store").exists()


MARKUP = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|eos|>{% endfor %}[assistant]"


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("prompt", ["the soup <|eos|> is it", "<|bos|>", "<|eos|>", "<|eos|>[assistant]", "x<|pad|>"])
def test_special_tokens_in_a_users_text_stay_text(chat_template, prompt):
    """By the setting; those of the template are the tokens that they are."""
    tokenizer = make_tokenizer(chat_template=MARKUP)
    tokenizer.split_special_tokens = True
    (ids,) = tokenize(tokenizer, [prompt], chat_template)
    text = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    user, assistant = (tokenizer(part)["input_ids"] for part in ("[user]", "[assistant]"))
    expected = [0, *user, *text, 1, *assistant] if chat_template else text
    assert list(ids) == expected
    (whole,), (cut,) = completed(tokenizer, [prompt], ["warm <|pad|> y<|eos|>"], chat_template)
    assert list(whole[:cut]) == expected and [i for i in whole[cut:] if i < 3] == [1]  # the EOS that ends it, once
    tokenizer.split_special_tokens = False
    (ids,) = tokenize(tokenizer, [prompt], chat_template)
    assert list(ids) != expected


def test_a_prompt_that_its_template_changes_and_that_holds_a_special_token_is_refused():
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] | upper }}")
    tokenizer.split_special_tokens = True
    assert tokenize(tokenizer, ["the soup"], True)
    with pytest.raises(ConfigError, match=r"the chat template changes its text .*special_tokens_in_text: true"):
        tokenize(tokenizer, ["the soup <|eos|>"], True)


def test_a_run_made_before_there_was_the_setting_goes_on_as_it_was(tmp_path, prefect_server):
    """Its config lacks it: special tokens in its prompts are tokens, its calls do not have it, and its config still fits."""
    folder = write_brought(tmp_path / "case", prompts=["the <|eos|> soup"] * 8)
    arguments = ["train", str(folder), "--store", str(tmp_path / "store"), "--quiet", "--iterations"]
    assert run_command([*arguments, "0", "--set", "base_model.special_tokens_in_text=true"]) == 0
    record = tmp_path / "store" / "runs" / "case" / "run.json"
    written = ["--set", "base_model.special_tokens_in_text=false"]

    def older(values):
        del values["config"]["base_model"]["special_tokens_in_text"], values["config"]["reward"]["special_tokens"]

    rewrite(record, older)
    assert run_command([*arguments, "1", *written]) == 2  # what is written out is not overlooked
    assert run_command([*arguments, "1"]) == 0
    run = open_run(Store(tmp_path / "store"), "case")
    call = run.store.manifest(run.state(1).artifacts["rollout"]).recipe.config
    assert run.config.base_model.special_tokens_in_text and "special_tokens_in_text" not in call
    assert all(1 in row for row in run.store.table(run.state(1).artifacts["rollout"], Rollouts).prompt_tokens)
    assert run_command([*arguments, "1", "--run", "new"]) == 0
    new = open_run(run.store, "new")
    call = run.store.manifest(new.state(1).artifacts["rollout"]).recipe.config
    assert call["special_tokens_in_text"] is False
    assert not any(1 in row for row in run.store.table(new.state(1).artifacts["rollout"], Rollouts).prompt_tokens)


def test_what_older_versions_of_transformers_saved_beside_the_weights_is_left_over(tmp_path):
    folder = write_brought(tmp_path / "case", make_model("gpt2")) / "model"
    change_weights(folder, lambda tensors: tensors.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}))
    assert check_model("base_model.source", folder).metrics.parameters > 0


def test_docs_count_the_families_that_are_held_to_a_plain_pass():
    text = (Path(__file__).parents[1] / "docs" / "field.md").read_text(encoding="utf-8")
    assert (len(FAMILIES), len(FAMILIES) - len(RIGHT_BUT_SLOWER)) == (46, 37)
    assert "Forty-six families are held to a plain pass" in text and "Thirty-seven go the fast way" in text
    models = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    fast, *slower = [line for line in models.splitlines() if line.startswith(("| fast", "| rows of", "| padded"))]
    assert {*re.findall("`([a-z0-9_]+)`", fast)} == {*FAMILIES} - {*RIGHT_BUT_SLOWER}
    assert {*re.findall("`([a-z0-9_]+)`", "".join(slower))} == {*RIGHT_BUT_SLOWER}
