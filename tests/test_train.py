"""Runs: the flow through storage equals the plain loop in memory, and what is committed is not computed twice."""

import json
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import VARIANTS, module_of, rewrite
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.again import call_again
from flows.chains import kind_of
from flows.cli.main import run_command
from flows.language.model_folders import load_causal, load_scalar, save_learner, save_model
from flows.perform import perform
from flows.runs.run import open_run
from flows.store.attempt import Attempt, folder_of
from flows.store.local import LocalFiles
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, Moments, derive_seed
from schemas.tables import Rollouts, Samples
from stages.base_model import base_model
from stages.evaluate import evaluate
from stages.gae import gae
from stages.gae import metrics as gae_metrics
from stages.ops.distribution import Distribution
from stages.ops.kl import adapted_kl_coef
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.moments import updated_moments
from stages.ops.optim import learning_rate_factor
from stages.ops.prompts import demonstrations_as_texts, pretraining_as_texts, prompt_order
from stages.ops.rewards import function_scorer, model_scorer
from stages.ops.sampling import ModelSampler
from stages.ppo import KLLoss, ppo
from stages.reference import reference
from stages.reward import reward
from stages.reward_bias import metrics as bias_metrics
from stages.reward_bias import reward_bias
from stages.reward_model import reward_model
from stages.rollout import rollout
from stages.sft import sft
from stages.value import value


def rows(folder, role):
    return [json.loads(line) for line in (folder / f"{role}.jsonl").read_text(encoding="utf-8").splitlines()]


def copy_of(model, tmp_path, name, load):
    """Another model with the same weights, by way of a folder, as `from_pretrained` makes one."""
    model.module.save_pretrained(tmp_path / name)
    module = load(tmp_path / name).eval()
    module.config.pad_token_id = model.tokenizer.pad_token_id
    return replace(model, module=module)


def in_memory(folder, config, tmp_path):
    """The stages in a plain loop: no store, no Prefect. The learner after the last iteration, and its samples."""
    grammar = module_of(folder / "grammar.py")
    seed = lambda iteration, stage: derive_seed(config.seed, iteration, stage)  # noqa: E731

    start = base_model(rows(folder, "demonstrations"), config.base_model, seed=seed(0, "base_model"))
    start = replace(start, micro_batch_tokens=config.execution.micro_batch_tokens)
    sft(start, rows(folder, "demonstrations"), config.sft, seed=seed(0, "sft"))
    start.module.eval()
    scorer_model = copy_of(start, tmp_path, "actor", load_scalar)
    reward_model(scorer_model, rows(folder, "pairs"), rows(folder, "heldout_pairs"), config.reward_model,
                 seed=seed(0, "reward_model"))
    actor, ref = (copy_of(start, tmp_path, "actor", load_causal) for _ in range(2))
    critic = copy_of(scorer_model, tmp_path, "reward_model", load_scalar) if config.value else None
    scorers = {"reward_model": model_scorer(copy_of(scorer_model, tmp_path, "reward_model", load_scalar))}
    judge, heldout = function_scorer("gold", grammar.gold), [row["prompt"] for row in rows(folder, "heldout_prompts")]

    demonstrations = demonstrations_as_texts(start.tokenizer, rows(folder, "demonstrations"), False)
    texts = demonstrations
    if config.data.pretraining:
        texts = pretraining_as_texts(start.tokenizer, rows(folder, "pretraining"))
    bias, moments, kl_coef = 0.0, Moments(), config.kl.coef
    if config.reward.center_on_demonstrations:
        bias = bias_metrics(reward_bias(scorers, demonstrations, config.reward)).bias

    def samples(baseline):
        return evaluate(ModelSampler(actor), ref, heldout, scorers, {"judge": judge}, baseline, config.rollout,
                        config.reward, bias=bias, seed=seed(0, "evaluate"))

    baseline = samples(None)
    learner = LanguageModelLearner(actor, critic, config.ppo, Distribution(config.rollout.temperature))
    prompts = [row["prompt"] for row in rows(folder, "prompts")]
    size, k = config.rollout.batch_size, config.rollout.responses_per_prompt
    for i in range(1, config.iterations + 1):
        ids = np.repeat(prompt_order(len(prompts), size // k, seed=seed(0, "prompt_order"), iteration=i), k)
        batch = rollout(ModelSampler(actor), [prompts[j] for j in ids], ids, config.rollout, seed=seed(i, "rollout"))
        values = value(critic, batch) if critic else None
        rewards, tokens = reward(scorers, batch, config.reward, bias=bias, moments=moments,
                                 max_new_tokens=config.rollout.max_new_tokens)
        scored = reference(ref, batch, Distribution(config.rollout.temperature))
        advantages = gae(batch, scored, rewards, values, config.gae, config.kl, kl_coef=kl_coef, token_rewards=tokens)
        ppo(learner, batch, values, advantages, config.ppo, seed=seed(i, "ppo"),
            learning_rate_factor=learning_rate_factor(i, config.ppo), train_actor=i > config.ppo.critic_warmup,
            kl_loss=KLLoss(scored, kl_coef, config.kl.estimator) if config.kl.placement == "loss" else None,
            texts=texts if config.ppo.ptx_coef else None)
        kl = gae_metrics(advantages, batch, values, config.gae, kl_coef=kl_coef, scores=rewards.score).kl
        moments = updated_moments(moments, rewards.raw_score)
        if i > config.ppo.critic_warmup:
            kl_coef = adapted_kl_coef(kl_coef, kl, size, config.kl)
    return learner, samples(baseline)


def test_the_flow_through_storage_equals_the_loop_in_memory(trained, tmp_path):
    require_equal(*trained, "tiny", tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_so_it_does_with_the_choices_that_are_off_by_default(variants, tmp_path, name):
    require_equal(*variants, name, tmp_path)


def require_equal(folder, store, name, tmp_path):
    """Every file of the last checkpoint, and the last samples, of the run and of the loop."""
    run = open_run(Store(store), name)
    torch.set_num_threads(run.config.execution.threads)
    learner, samples = in_memory(folder, run.config, tmp_path)
    state = run.last()
    attempt = Attempt(state.actor.artifact, LocalFiles(tmp_path / "memory"))
    save_learner(attempt, learner)
    ours = {entry.path: entry.digest for entry in attempt.seal()}
    assert ours == run.store.manifest(state.actor.artifact).digests()
    stored = run.store.table(state.artifacts["evaluate"], Samples)
    assert stored.to_arrow().equals(samples.to_arrow())


def test_a_critic_warm_up_of_exactly_two_iterations(copied):
    """The actor of iterations 1 and 2 is the starting one to the byte, that of 3 is not; each trains the critic, on
    rollouts of its own."""
    folder, store = copied
    assert run_command(["train", str(folder), "--run", "warm", "--set", "ppo.critic_warmup=2", "--iterations", "3",
                        "--store", str(store), "--quiet"]) == 0
    run = open_run(Store(store), "warm")
    weights = lambda model: Path(run.store.place(model.artifact, model.folder), "model.safetensors").read_bytes()  # noqa: E731
    states = [run.state(i) for i in range(4)]
    actors = [weights(state.actor) for state in states]
    assert actors[0] == actors[1] == actors[2] != actors[3]
    assert len({weights(state.critic) for state in states}) == 4
    assert ["ppo/policy_loss" in state.metrics for state in states[1:]] == [False, False, True]
    sampled = [run.store.table(state.artifacts["rollout"], Rollouts) for state in states[1:]]
    assert len({table.response_tokens.values.tobytes() for table in sampled}) == 3
    assert run.store.manifest(states[3].artifacts["ppo"]).recipe.inputs["rollouts"] == states[3].artifacts["rollout"]


def test_what_crosses_iterations_is_in_the_state(variants):
    run = open_run(Store(variants[1]), "every_choice")
    first, second = run.state(1), run.state(2)
    assert first.reward_bias == run.state(0).metrics["reward_bias/bias"] == second.reward_bias != 0
    assert (first.reward_moments.count, second.reward_moments.count) == (8, 16)
    assert second.metrics["gae/kl_coef"] == first.kl_coef == 0.05 != second.kl_coef  # kept while the critic warms up


def test_a_run_without_a_critic_has_no_value_stage(variants):
    run = open_run(Store(variants[1]), "no_critic")
    state = run.last()
    assert state.critic is None and "value" not in state.artifacts
    assert not [entry.path for entry in run.store.manifest(state.actor.artifact).files if "critic" in entry.path]
    table = run.store.table(state.artifacts["rollout"], Rollouts)
    assert [list(group) for group in table.prompt_id.reshape(2, 4)] == [[i] * 4 for i in table.prompt_id[::4]]
    assert len(set(table.response[:4])) > 1


def test_transformers_alone_loads_the_actor_and_generates(trained):
    run = open_run(Store(trained[1]), "tiny")
    folder = Path(run.store.place(run.last().actor.artifact, "actor"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The soup", return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > tokens.input_ids.shape[1]


def test_a_finished_run_does_no_work_and_says_what_it_found(copied, capsys):
    folder, store = copied
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.json")}
    assert run_command(["train", str(folder), "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    for stage in ("base_model", "sft", "reward_model", "rollout", "reference", "reward", "value", "gae", "ppo", "evaluate"):
        assert f"found {stage} " in out
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.json")} == before


def test_a_lost_state_is_remade_from_its_artifacts(copied, capsys):
    """Without the record of iteration 2 every stage of it is found, and the record is the same but for its seconds."""
    folder, store = copied
    path = store / "runs" / "tiny" / "iterations" / "000002.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert run_command(["train", str(folder), "--store", str(store)]) == 0
    assert "found rollout, reference, reward, value, gae, ppo, evaluate" in capsys.readouterr().out
    differs = {"seconds": 0, "sha256": ""}
    assert json.loads(path.read_text()) | differs == before | differs


def test_more_iterations_train_on(copied):
    folder, store = copied
    assert run_command(["train", str(folder), "--store", str(store), "--iterations", "3", "--quiet"]) == 0
    run = open_run(Store(store), "tiny")
    assert run.last().iteration == 3 and "evaluate" in run.last().artifacts
    assert run.state(2).actor.artifact != run.state(3).actor.artifact


def test_iterate_makes_exactly_the_next_iteration(example, prefect_server, tmp_path, capsys):
    store = str(tmp_path / "store")
    assert run_command(["train", str(example), "--store", store, "--iterations", "1", "--quiet"]) == 0
    assert run_command(["iterate", "tiny", "--store", store]) == 0
    assert open_run(Store(Path(store)), "tiny").last().iteration == 2
    assert run_command(["iterate", "tiny", "--store", store]) == 2
    assert "finished: 2 of 2 iterations" in capsys.readouterr().err


def test_two_runs_with_one_config_share_their_artifacts(copied, capsys):
    folder, store = copied
    count = len(Store(store).artifacts())
    assert run_command(["train", str(folder), "--store", str(store), "--run", "again"]) == 0
    assert len(Store(store).artifacts()) == count
    assert "found" in capsys.readouterr().out


def test_prompts_are_used_once_before_any_is_used_again():
    order = np.concatenate([prompt_order(10, 4, seed=3, iteration=i) for i in range(1, 6)])
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert not np.array_equal(order[:10], order[10:20])
    np.testing.assert_array_equal(prompt_order(10, 4, seed=3, iteration=3), order[8:12])


def test_rollouts_name_their_prompts(trained):
    run = open_run(Store(trained[1]), "tiny")
    table = run.store.table(run.state(1).artifacts["rollout"], Rollouts)
    prompts = [row["prompt"] for row in rows(trained[0], "prompts")]
    assert list(table.prompt) == [prompts[i] for i in table.prompt_id]


def test_one_model_at_a_time_gives_the_same_bytes(trained, tmp_path):
    """The cache that keeps models warm decides nothing but speed."""
    folder, store = trained
    assert run_command(["train", str(folder), "--store", str(tmp_path / "cold"), "--set", "execution.warm_models=1",
                        "--quiet"]) == 0
    cold, warm = open_run(Store(tmp_path / "cold"), "tiny"), open_run(Store(store), "tiny")
    for ref in warm.last().artifacts.values():
        assert cold.store.manifest(ref).digests() == warm.store.manifest(ref).digests()


def test_a_nan_in_the_reward_commits_nothing(example, prefect_server, tmp_path, capsys):
    (example / "broken.py").write_text("def score(prompts, responses):\n    return [float('nan')] * len(responses)\n")
    arguments = ["train", str(example), "--store", str(tmp_path / "store"), "--quiet",
                 "--set", "reward.components={bad: {source: 'broken.py:score'}}"]
    assert run_command(arguments) == 1
    message = capsys.readouterr().err
    assert "reward broken.py:score: gave nan for the response in row 0 and " in message and message.count("\n") == 1
    store = Store(tmp_path / "store")
    assert not [ref for ref in store.artifacts() if ref.stage in ("evaluate", "reward")]
    assert not list(Path(store.uri).glob("artifacts/evaluate/*/attempts/*"))


@pytest.fixture(autouse=True)
def _fresh_logger():
    yield
    logging.getLogger("baton").handlers.clear()


def test_save_model_writes_the_same_bytes_twice(tiny_model, tmp_path):
    digests = []
    for name in ("one", "two"):
        attempt = Attempt(ArtifactRef(stage="test", identity="0" * 64), LocalFiles(tmp_path / name))
        save_model(attempt, "model", tiny_model)
        digests.append({entry.path: entry.digest for entry in attempt.seal()})
    assert digests[0] == digests[1] and "model/model.safetensors" in digests[0]


def test_runs_are_found_again_on_prefects_page(trained):
    """The flow and its tasks, by name and tag, as the server that ran them has them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

    with get_client(sync_client=True) as client:
        flows = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=["baton", "tiny"])))
        (first,) = [flow for flow in flows if flow.name == "tiny-train" and flow.parameters["store"] == str(trained[1])]
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [first.id]}), limit=100)
    assert first.state.is_completed()
    names = {"tiny-sft-000000", "tiny-rollout-000001", "tiny-ppo-000002", "tiny-evaluate-000002"}
    assert names <= {task.name for task in tasks}


def test_another_writers_bytes_are_used_and_ours_forgotten(copied):
    """Two writers of one checkpoint whose bytes differ: the model kept warm is that of the store."""
    run = open_run(Store(copied[1]), "tiny")
    state, before = run.state(2), run.state(1)
    with closing(kind_of("language").warm(run.store, run.config.execution)) as warm:
        ref, call = state.actor.artifact, call_again(run, "ppo", 2, ())
        manifest = Path(copied[1], folder_of(ref), "manifest.json")
        kept = manifest.read_bytes()
        manifest.unlink()
        fresh, original = Store(copied[1]), Store.commit

        def commit(store, ours, tables=None):  # another writer's manifest, of other bytes, is there just before ours
            manifest.write_bytes(kept)
            rewrite(manifest, lambda data: data["files"][0].update(digest="0" * 64))
            return original(store, ours, tables)

        warm.store = fresh
        with mock.patch.object(Store, "commit", commit):
            produced = perform(call, fresh, warm)
        assert produced.how == "adopted" and len(produced.different) == 1
        assert before.actor.artifact != ref and not any(key[1].artifact == ref for key in warm._warm)
