"""Low-rank adapters: what they compute, what is trained and saved, and whose memory is whose."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from brought import PROMPTS, make_model, write_brought
from conftest import assert_same_bytes
from peft import AutoPeftModelForCausalLM, PeftModel
from test_kill import kill_anywhere
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flows.cli.main import run_command
from flows.language.model_folders import PYTORCH, load_causal, load_tokenizer, save_learner, scalar_over
from flows.language.warm_models import Adapters, Reading, WarmModels
from flows.runs.run import open_run
from flows.store.attempt import Attempt
from flows.store.local import LocalFiles
from flows.store.store import Store
from schemas.artifacts import Moments, derive_seed
from schemas.errors import ConfigError
from schemas.language import LoRAConfig
from schemas.tables import Rollouts, Samples
from stages.evaluate import evaluate
from stages.gae import gae
from stages.ops import lora
from stages.ops.distribution import Distribution
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.prompts import prompt_order
from stages.ops.rewards import function_scorer, model_scorer
from stages.ops.sampling import ModelSampler
from stages.ops.tensor_file import tensor_file
from stages.ppo import ppo
from stages.reference import reference
from stages.reward import reward
from stages.reward_model import reward_model
from stages.rollout import rollout
from stages.sft import sft
from stages.value import value

IDS = torch.tensor([[5, 9, 200, 31, 4, 77]])
FAMILIES = {"llama": {}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gpt_neox": {}, "bloom": {}, "qwen2": {},
            "granite": {}, "gemma2": {"head_dim": 8}}
KINDS = {"plain": {}, "dora": {"dora": True}, "rslora": {"rslora": True, "alpha": 3.0},
         "some": {"target_modules": ["q_proj", "v_proj"]}}
READING = Reading(False, False)


def moved(module):
    """The module, its adapter and head no longer what they were at first."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def adapted(family="llama", kind=AutoModelForCausalLM, **settings):
    labels = {} if kind is AutoModelForCausalLM else {"num_labels": 1}
    module = make_model(family, kind, **FAMILIES[family], **labels)
    lora.add_adapter(module, LoRAConfig(**{"rank": 4, **settings}), seed=1)
    return module


def save_adapter(module, folder, base):
    """Its folder alone."""
    folder.mkdir(exist_ok=True)
    lora.save_config(module, folder / lora.CONFIG, base)
    (folder / lora.WEIGHTS).write_bytes(b"".join(tensor_file(lora.adapter_tensors(module), PYTORCH)))


@torch.no_grad()
def logits(module):
    return module(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(family):
    plain, module = make_model(family, **FAMILIES[family]), adapted(family)
    assert torch.equal(logits(module), logits(plain))
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    again = adapted(family)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_peft_reads_the_folder_and_computes_the_same(tmp_path, settings):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    module = moved(adapted(**settings))
    save_adapter(module, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(module), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(module) - logits(base)).abs().max() > 1e-3
    again = make_model()
    lora.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(module))
    whole = lora.merged(module)
    assert whole.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(whole), logits(module), rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(whole), logits(merged), rtol=1e-4, atol=1e-4)


def test_peft_reads_a_classifier_with_its_head(tmp_path):
    base = make_model(kind=AutoModelForSequenceClassification, num_labels=1)
    base.save_pretrained(tmp_path / "base")
    module = moved(adapted(kind=AutoModelForSequenceClassification))
    save_adapter(module, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(module)[0], logits(theirs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_a_critic_begins_with_the_adapter_of_its_actor(tmp_path, family):
    """Whatever class the critic of that family is of, whose body may have another name."""
    from flows.language.model_folders import scalar_over

    actor = moved(adapted(family))
    save_adapter(actor, tmp_path / "actor", "base")
    critic = scalar_over(make_model(family, **FAMILIES[family]))
    lora.load_adapter(critic, tmp_path / "actor")
    hidden = [m.base_model(input_ids=IDS).last_hidden_state for m in (actor, critic)]
    assert torch.equal(*hidden) and not critic.score.weight.any() and critic.score.weight.requires_grad
    with torch.no_grad():
        critic.score.weight.normal_()
    save_adapter(critic, tmp_path / "critic", "base")
    again = scalar_over(make_model(family, **FAMILIES[family]))
    lora.load_adapter(again, tmp_path / "critic")
    assert torch.equal(critic.score.weight, again.score.weight)
    assert torch.equal(again.base_model(input_ids=IDS).last_hidden_state, hidden[0])


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter", "base")
    with pytest.raises(ConfigError, match="is no linear layer of the model"):
        lora.load_adapter(make_model("gpt_neox"), tmp_path / "adapter")


@pytest.mark.parametrize("targets", [["q_proj", "nothere"], ["embed_tokens"], ["q_proj", "embed_tokens"], ["norm"]])
def test_only_linear_layers_that_are_there_are_adapted(targets):
    with pytest.raises(ConfigError, match=r"is no linear layer of the model's body; there are down_proj"):
        lora.add_adapter(make_model(), LoRAConfig(target_modules=targets), seed=0)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_critic_over_a_causal_model_is_where_its_body_is(family):
    from flows.language.model_folders import scalar_over

    body = make_model(family).to("meta")
    assert {p.device.type for p in scalar_over(body).parameters()} == {"meta"}


def test_a_target_that_is_not_there_is_refused_with_those_that_are(tmp_path, capsys):
    folder = write_brought(tmp_path / "case", lora={"target_modules": ["query"]})
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert error.rstrip().endswith("lora.target_modules: 'query' is no linear layer of the model's body; there are "
                                   "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    assert not list((tmp_path / "store").rglob("manifest.json"))


# --- whole runs ---

ROWS = [{"prompt": prompt, "completion": " is warm .", "chosen": " is warm .", "rejected": " x x"} for prompt in PROMPTS]
LORA = {"rank": 4, "alpha": 8}
RUNS = {
    "plain": {},
    "all": {"sft": {"epochs": 1, "batch_size": 4}, "reward_model": {"epochs": 1, "batch_size": 4},
            "value": {"start": "reward_model"},
            "reward": {"components": {"rm": {"source": "reward_model"}, "length": {"source": "rewards.py:score"}}},
            "data": {"demonstrations": "rows.jsonl", "pairs": "rows.jsonl", "heldout_pairs": "rows.jsonl"}},
    "dora": {"lora": {**LORA, "dora": True, "target_modules": ["q_proj", "v_proj"]}, "gae": {"estimator": "rloo"},
             "rollout": {"responses_per_prompt": 2}, "value": None},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prefect_server):
    """Runs of two iterations with adapters: (the folder of their examples, the store)."""
    place = tmp_path_factory.mktemp("lora")
    for name, sections in RUNS.items():
        folder = write_brought(place / name, **{"lora": LORA, "iterations": 2, "evaluate": {"every": 1}, **sections})
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return place, Store(str(place / "store"))


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_adapters_alone(trained, name):
    """Neither weights of the base nor its tokenizer."""
    run = open_run(trained[1], name)
    for state in run.states()[1:]:
        files = run.store.manifest(state.actor.artifact).digests()
        roles = ("actor", "critic") if state.critic else ("actor",)
        assert sorted(files) == sorted(f"{role}/{file}" for role in roles for file in (lora.CONFIG, lora.WEIGHTS)) + [
            f"optimizer/{role}.safetensors" for role in roles]
        named = json.loads((run.store.folder(state.actor.artifact, "actor") / lora.CONFIG).read_text())
        assert named["base_model_name_or_path"] == f"{run.inputs['base_model']}/model"
    first, last = (run.state(i) for i in (1, 2))
    assert first.metrics["ppo/ratio_min"] < 1 and last.metrics["gae/kl"] != 0
    assert abs(run.state(1).metrics["gae/kl"]) < 1e-6  # the first rollout's actor is the reference


@pytest.mark.parametrize("name, stage, iteration", [
    ("all", "sft", 0), ("all", "reward_model", 0), ("all", "reference", 2), ("all", "reward", 2), ("all", "value", 2),
    ("all", "ppo", 1), ("all", "ppo", 2), ("plain", "rollout", 2), ("plain", "ppo", 1), ("plain", "value", 1),
    ("dora", "ppo", 2), ("dora", "evaluate", 2)])
def test_each_stage_again_gives_the_same_bytes(trained, capsys, name, stage, iteration):
    arguments = ["stage", stage, name, "--iteration", str(iteration), "--store", trained[1].uri, "--json"]
    assert run_command(arguments) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"


@pytest.mark.parametrize("name", RUNS)
def test_iteration_by_iteration_is_the_whole_run(trained, tmp_path, name):
    """Each in a process that has nothing warm, as after a crash or on another worker."""
    place, store = trained
    other = str(tmp_path / "store")
    assert run_command(["train", str(place / name), "--store", other, "--iterations", "1", "--quiet"]) == 0
    assert run_command(["train", "--run", name, "--store", other, "--iterations", "2", "--quiet"]) == 0
    assert_same_bytes(open_run(store, name), open_run(Store(other), name))


def test_kill_9_anywhere_then_the_same_command(trained, tmp_path):
    kill_anywhere(trained[0] / "all", trained[1].uri, "all", "ppo", tmp_path)


def test_the_flow_through_storage_equals_the_loop_in_memory(trained, tmp_path):
    """Every file of the last checkpoint, and the last samples, of the run and of its stages in a plain loop."""
    place, store = trained
    run = open_run(store, "all")
    torch.set_num_threads(run.config.execution.threads)
    learner, samples = in_memory(place / "all", run, tmp_path)
    state = run.last()
    attempt = Attempt(state.actor.artifact, LocalFiles(tmp_path / "memory"))
    save_learner(attempt, learner)
    assert {entry.path: entry.digest for entry in attempt.seal()} == store.manifest(state.actor.artifact).digests()
    assert store.table(state.artifacts["evaluate"], Samples).to_arrow().equals(samples.to_arrow())


def in_memory(folder, run, tmp_path):
    """Adapters over one base: no store, no Prefect. The learner after the last iteration, and its samples."""
    config, name = run.config, f"{run.inputs['base_model']}/model"
    base, tokenizer = load_causal(folder / "model").eval(), READING.tokenizer(load_tokenizer(folder / "model"))
    base.config.pad_token_id = tokenizer.pad_token_id
    seed = partial(derive_seed, config.seed)

    def over_the_base(over, adapter=None):
        module = over(base).eval()
        if adapter is None:
            lora.add_adapter(module, config.lora, seed=seed(0, "sft"))
        else:
            save_adapter(adapter.module, tmp_path / "adapter", name)
            lora.load_adapter(module, tmp_path / "adapter")
        return LanguageModel(module, tokenizer, base=name, micro_batch_tokens=config.execution.micro_batch_tokens)

    started = over_the_base(lora.sharing)
    sft(started, ROWS, config.sft, seed=seed(0, "sft"))
    trained = over_the_base(scalar_over, started)
    reward_model(trained, ROWS, ROWS, config.reward_model, seed=seed(0, "reward_model"))
    actor, ref = (over_the_base(lora.sharing, started) for _ in range(2))
    critic, scored_by = (over_the_base(scalar_over, trained) for _ in range(2))
    scorers = {"rm": model_scorer(scored_by),
               "length": function_scorer("f", lambda prompts, responses: [float(len(text) % 7) for text in responses])}
    learner = LanguageModelLearner(actor, critic, config.ppo, Distribution(config.rollout.temperature))

    def samples(baseline=None):
        return evaluate(ModelSampler(actor), ref, PROMPTS[:3], scorers, {}, baseline, config.rollout, config.reward,
                        bias=0.0, seed=seed(0, "evaluate"))

    baseline, size = samples(), config.rollout.batch_size
    for i in range(1, config.iterations + 1):
        ids = prompt_order(len(PROMPTS), size, seed=seed(0, "prompt_order"), iteration=i)
        batch = rollout(ModelSampler(actor), [PROMPTS[j] for j in ids], ids, config.rollout, seed=seed(i, "rollout"))
        values, divergence = value(critic, batch), reference(ref, batch, Distribution(config.rollout.temperature))
        rewards, _ = reward(scorers, batch, config.reward, bias=0.0, moments=Moments(), max_new_tokens=8)
        advantages = gae(batch, divergence, rewards, values, config.gae, config.kl, kl_coef=config.kl.coef)
        ppo(learner, batch, values, advantages, config.ppo, seed=seed(i, "ppo"))
    return learner, samples(baseline)


def test_the_trained_adapter_over_its_base_is_what_sampled(trained):
    """Logprobs of the second rollout by plain PEFT over the brought folder."""
    place, store = trained
    run = open_run(store, "plain")
    folder = run.store.folder(run.state(1).actor.artifact, "actor")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "plain" / "model"), folder).eval()
    rollouts = run.store.table(run.state(2).artifacts["rollout"], Rollouts)
    for prompt, response, found in zip(rollouts.prompt_tokens, rollouts.response_tokens, rollouts.logprobs, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        np.testing.assert_allclose(found, expected.gather(-1, ids[0, len(prompt):, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("scorers_first", [False, True])
def test_all_roles_have_one_base_in_memory(trained, scorers_first):
    run = open_run(trained[1], "all")
    models, state = WarmModels(run.store, run.config.execution), run.state(2)
    before = run.state(1)
    if scorers_first:
        models.reward_model(state.reward_model), models.critic(state.critic)
    learner = models.take_learner(before.actor, before.critic, before.optimizer, run.config.ppo, {"temperature": 1.0},
                                  Adapters(run.config.lora, 0))
    roles = [learner.actor, learner.critic, models.actor(state.actor, READING), models.reference(state.reference),
             models.critic(state.critic), models.reward_model(state.reward_model)]
    weights = [{p.data_ptr() for name, p in role.module.base_model.named_parameters() if "lora_" not in name}
               for role in roles]
    assert all(place == weights[0] for place in weights) and models.loaded == 1
    trained = sum(p.numel() for p in learner.actor.module.parameters() if p.requires_grad)
    assert trained < 0.5 * learner.actor.module.num_parameters()


def test_training_all_weights_leaves_what_is_warm(trained):
    """Without adapters the reference is the same artifact as the actor, and stays as it was."""
    run = open_run(trained[1], "plain")
    models, state = WarmModels(run.store, run.config.execution), run.state(0)
    reference, actor = models.reference(state.reference), models.actor(state.actor, READING)
    assert next(actor.module.parameters()).data_ptr() == next(reference.module.parameters()).data_ptr()
    learner = models.take_learner(state.actor, state.critic, None, run.config.ppo, {"temperature": 1.0})
    places = {p.data_ptr() for p in reference.module.parameters()}
    assert not places & {p.data_ptr() for network in learner.networks.values() for p in network.module.parameters()}
    assert all(p.requires_grad for network in learner.networks.values() for p in network.module.parameters())


@pytest.mark.parametrize("setting, said", [
    ("lora.rank=2", "lora.rank=2: the adapter that is trained on has 4; make another run with it"),
    ("lora.target_modules=[q_proj]", "lora.target_modules=('q_proj',): the adapter that is trained on has ['down_proj', "),
    ("lora=null", "lora: what is trained on is an adapter, which is not trained in full; make another run")])
def test_another_adapter_is_another_run(trained, capsys, setting, said):
    _, store = trained
    assert run_command(["stage", "ppo", "plain", "--iteration", "2", "--store", store.uri, "--set", setting]) == 2
    assert said in capsys.readouterr().err


def test_a_fork_keeps_its_adapters(trained, capsys):
    _, store = trained
    assert run_command(["fork", "plain", "--at", "1", "--run", "other", "--store", store.uri, "--set", "lora.rank=2"]) == 2
    assert "--set lora…: it was decided before the first iteration" in capsys.readouterr().err


def test_gc_keeps_the_base(trained, tmp_path):
    _, store = trained
    copy = Store(str(shutil.copytree(store.uri, tmp_path / "store")))
    assert run_command(["gc", "--store", copy.uri, "--older-than", "0", "--quiet"]) == 0
    assert run_command(["verify", "--store", copy.uri, "--quiet"]) == 0
    assert open_run(copy, "plain").store.manifest(open_run(copy, "plain").inputs["base_model"])
