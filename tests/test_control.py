"""Control tasks through the command: the flow equals the loop in memory, goes on after a kill, says what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from control import RUNS, begun, config, in_memory, own, write_control
from PIL import Image
from test_stage import answer

from flows.cli.main import run_command
from flows.control.warm_policies import save_learner, save_network
from flows.runs.run import open_run
from flows.store.attempt import Attempt
from flows.store.local import LocalFiles
from flows.store.store import Store
from schemas.artifacts import ArtifactRef
from schemas.tables import Returns, Trajectories

EXAMPLE = Path(__file__).parents[1] / "data" / "pendulum"


@pytest.mark.parametrize("name", RUNS)
def test_the_flow_through_storage_equals_the_loop_in_memory(controlled, tmp_path, name):
    run = open_run(Store(controlled[1]), name)
    torch.set_num_threads(config(**RUNS[name]).execution.threads)
    learner, batches, returns = in_memory(config(**RUNS[name]))
    state = run.last()
    attempt = Attempt(state.actor.artifact, LocalFiles(tmp_path / "memory"))
    save_learner(attempt, learner)
    ours = {entry.path: entry.digest for entry in attempt.seal()}
    assert ours == run.store.manifest(state.actor.artifact).digests()
    stored = [run.store.table(run.state(i).artifacts["rollout"], Trajectories) for i in (1, 2, 3)]
    for batch, table in zip(batches, stored, strict=True):
        assert batch.to_arrow().equals(table.to_arrow())
    assert run.store.table(state.artifacts["evaluate"], Returns).to_arrow().equals(returns.to_arrow())
    if name == "pendulum":  # an episode that three batches hold, and moments that crossed iterations
        assert [table.start.max() for table in stored] == [0, 24, 48]
        assert [run.state(i).reward_moments.count for i in (0, 1, 2, 3)] == [0, 48, 96, 144]


@pytest.mark.parametrize("run, stage, iteration", [
    ("cartpole", "policy", 0), ("cartpole", "rollout", 1), ("cartpole", "rollout", 3), ("cartpole", "gae", 2),
    ("cartpole", "ppo", 1), ("cartpole", "ppo", 3), ("cartpole", "evaluate", 2), ("pendulum", "rollout", 3),
    ("pendulum", "ppo", 1), ("pendulum", "ppo", 2), ("pendulum", "evaluate", 3), ("choices", "rollout", 2)])
def test_every_stage_gives_the_same_bytes_again(controlled, tmp_path, run, stage, iteration, capsys):
    torch.set_num_threads(2)  # as a new process has it: the run's number is to be used
    store = shutil.copytree(controlled[1], tmp_path / "store")
    code, result = answer(capsys, "stage", stage, run, "--iteration", iteration, "--store", store)
    assert (code, result["verdict"], result["different"]) == (0, "same", [])


def test_advantages_of_saved_trajectories_with_another_lambda(controlled, tmp_path, capsys):
    store = shutil.copytree(controlled[1], tmp_path / "store")
    before = sorted((store / "runs").rglob("*.json"))
    rerun = ["stage", "gae", "pendulum", "--iteration", 2, "--store", store, "--set"]
    code, result = answer(capsys, *rerun, "gae.gae_lambda=0.5")
    assert (code, result["verdict"], result["models_loaded"]) == (0, "new", 0)
    assert result["metrics"]["advantage_std"][0] != result["metrics"]["advantage_std"][1]
    assert sorted((store / "runs").rglob("*.json")) == before


@pytest.mark.parametrize("run, stage, setting, message", [
    ("cartpole", "rollout", "seed=4", "seed: the episodes that the iteration before left open were reset with seeds"),
    ("cartpole", "rollout", "rollout.num_envs=4", "rollout.num_envs: the episodes that the iteration before left open"),
    ("cartpole", "rollout", "gae.gamma=0.9", "gae.gamma: the discounted returns that the iterations before left were"),
    ("cartpole", "ppo", "policy.hidden=[4]", "--set policy…: ppo of this run has policies of the recorded sizes"),
    ("cartpole", "rollout", "reward.normalize=scale", "reward.normalize: the run kept no running moments"),
    ("cartpole", "rollout", "environment.id=Acrobot-v1", "--set environment…: it belongs to the run as a whole"),
    ("cartpole", "reward", "seed=3", "has no stage 'reward' in iteration 2; it has rollout, gae, ppo, evaluate")])
def test_what_a_rerun_cannot_do_with_saved_artifacts(controlled, run, stage, setting, message, capsys):
    code = run_command(["stage", stage, run, "--iteration", "2", "--store", str(controlled[1]), "--set", setting])
    assert code == 2 and message in capsys.readouterr().err


def test_what_is_shown(controlled, capsys):
    def said(*arguments):
        capsys.readouterr()
        assert run_command([*arguments, "--store", str(controlled[1])]) == 0
        return capsys.readouterr().out

    shown = said("show", "cartpole")
    assert "return" in shown and "evaluated" in shown and "gold" not in shown and "between stages" in shown
    assert "rollout/episode_return" in said("show", "cartpole", "--iteration", "2")
    assert "pendulum" in said("runs") and "0 findings" in said("verify")
    again = said("train", str(controlled[0] / "pendulum"))
    assert "nothing to do" in again and "returns with the most likely actions" in again and "episode.gif" in again


def test_the_film_of_an_episode_moves(controlled):
    run = open_run(Store(controlled[1]), "pendulum")
    with Image.open(run.store.file(run.last().artifacts["evaluate"], "episode.gif")) as film:
        assert (film.format, film.is_animated, film.width) == ("GIF", True, 300)
        assert 10 < film.n_frames <= 21  # 20 steps and the beginning; equal frames are one
        frames = []
        for i in (0, film.n_frames - 1):
            film.seek(i)
            frames.append(np.asarray(film.convert("RGB")))
    assert (frames[0] != frames[1]).any()


def test_mlflow_has_the_returns_the_film_and_the_policy(controlled):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{controlled[1] / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("baton").experiment_id])
    (filmed,) = [run for run in runs if run.info.run_name == "pendulum"]
    films = [item.path for item in client.list_artifacts(filmed.info.run_id, "films")]
    assert films == ["films/iteration-000000.gif", "films/iteration-000003.gif"]
    (found,) = [run for run in runs if run.info.run_name == "cartpole"]
    assert found.data.params["environment.id"] == "CartPole-v1"
    steps = [point.step for point in client.get_metric_history(found.info.run_id, "ppo/approx_kl")]
    assert sorted(steps) == [1, 2, 3]
    assert len(client.list_artifacts(found.info.run_id, "samples")) == 3
    assert client.get_model_version_by_alias("baton-cartpole", "best").tags["baton.folder"].endswith("/actor")


def test_ten_lines_load_a_policy_without_baton(tmp_path):
    """The lines of data/pendulum/README.md, run as they stand there, act as that example's policy does."""
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10 and "baton" not in code
    actor, *_ = begun(config(**yaml.safe_load((EXAMPLE / "config.yaml").read_text(encoding="utf-8"))))
    actor.observe(np.random.default_rng(1).normal(1, 2, (30, 1, 3)))
    attempt = Attempt(ArtifactRef(stage="policy", identity="0" * 64), LocalFiles(tmp_path))
    save_network(attempt, "actor", actor)
    attempt.seal()
    scope = {}
    exec(code.replace("ACTOR", str(attempt.folder / "actor")), scope)
    observations = np.random.default_rng(0).normal(0, 3, (20, 3)).astype(np.float32)
    theirs = np.stack([scope["act"](observation) for observation in observations])
    with torch.no_grad():
        ours = actor.most_likely(actor.inputs(observations)).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


# --- mistakes ---

@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `baton train` on a control config that cannot be used; its one line of error."""

    def call(*settings, **sections):
        folder = write_control(tmp_path / "task", **sections)
        options = [option for setting in settings for option in ("--set", setting)]
        assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), *options]) == 2
        assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("*.json"))
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return call


@pytest.mark.parametrize("settings, message", [
    (["environment.id=CartPol-v1"], "environment.id 'CartPol-v1': Environment `CartPol` doesn't exist. Did you mean"),
    (["environment.id=CartPole-v7"], "environment.id 'CartPole-v7': Environment version `v7` for environment `CartPole`"),
    (["environment.id=environments.py:whole_numbers"], "expected numbers of floating point, choices, or a Tuple or Dict"),
    (["environment.id=nowhere:Thing-v0"], "environment 'nowhere:Thing-v0' with kwargs {}: it raised ModuleNotFoundError"),
    (["environment.kwargs={gravity: 9}"], "environment 'CartPole-v1' with kwargs {'gravity': 9}: it raised TypeError"),
    (["environment.id=environments.py:pictures", "policy.normalize_observations=true"],
     "policy.normalize_observations: the observations are pictures, whose numbers are divided by 255"),
    (["environment.id=environments.py:of_both"], "expected a Tuple or Dict of numbers alone, or of choices alone;"),
    (["environment.scale_actions=true"], "scale_actions is about a Box with bounds, and its actions are Discrete(2)"),
    (["environment.wrappers=[{name: TimeLimt}]"], "environment.wrappers 'TimeLimt': gymnasium.wrappers has no 'TimeLimt'"),
    (["environment.wrappers=[{name: TimeLimit}]"], "environment.wrappers 'TimeLimit' with kwargs {}: it raised TypeError"),
    (["environment.id=environments.py:nothing"], "the function gave NoneType, expected a gymnasium.Env"),
    (["environment.id=environments.py:nobody"], "has no function 'nobody'"),
    (["environment.id=elsewhere.py:count"], "no such file"),
    (["rollout.num_steps=25"], "50 steps do not divide into ppo.minibatches=4"),
    (["ppo.minibatches=48"], "whitening a minibatch of one step removes the learning signal"),
    (["gae.whiten=batch"], "ppo.whiten_minibatches would whiten what gae.whiten has whitened; set gae.whiten: none"),
    (["gae.estimator=rloo"], "gae.estimator=rloo compares or sums whole responses; a control task needs gae"),
    (["gae.length_adaptive_alpha=0.1"], "gae.length_adaptive_alpha is about the length of responses"),
    (["ppo.loss_aggregation=sequence"], "ppo.loss_aggregation=sequence is about responses"),
    (["ppo.ptx_coef=1"], "ppo.ptx_coef mixes in texts, and a control task has none"),
    (["ppo.objective=a2c"], "objective=a2c has no ratio"),
    (["kl.coef=0.1"], "kl: unknown key; it is a language model's, and the section `environment` makes this a control task"),
    (["rollout.num_env=3"], "rollout.num_env: unknown key; did you mean 'num_envs'?"),
    (["policy.hidden=[0]"], "policy.hidden.0: "), (["gae.truncation=never"], "gae.truncation: "),
])
def test_a_mistake_is_one_line(refused, settings, message):
    assert message in refused(*settings)


def test_a_language_models_config_has_no_environments_settings(example, tmp_path, capsys):
    assert run_command(["train", str(example), "--store", str(tmp_path), "--set", "policy.hidden=[3]"]) == 2
    assert "policy: unknown key; it is a control task's, and there is no section `environment`" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_brings_it(refused, monkeypatch):
    def lacking(id, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("mujoco is not installed, run `pip install \"gymnasium[mujoco]\"`")

    monkeypatch.setattr(gymnasium, "make", lacking)
    assert "mujoco is not installed" in (error := refused("environment.id=HalfCheetah-v5"))
    assert "pip install 'baton-ppo[mujoco]'" in error


@pytest.mark.parametrize("how, message", [
    ("raises", "raised RuntimeError: the gear broke"), ("observes NaN", "gave the observation [nan, 0.0]"),
    ("rewards infinity", "gave the reward inf"), ("hangs", "reset has not come back for 1 s")])
def test_an_environment_that_fails_commits_nothing(prefect_server, tmp_path, capsys, how, message):
    folder = write_control(tmp_path / "task", environment=own("fails", how=how), tracking={"enabled": False})
    store = tmp_path / "store"
    code = run_command(["train", str(folder), "--store", str(store), "--quiet", "--set", "execution.environment_timeout=1"])
    error = capsys.readouterr().err
    assert code == 1 and message in error and "environments.py:fails" in error and "nothing was committed" in error
    assert {ref.stage for ref in Store(store).artifacts()} == {"input.function", "policy"}
    assert not list((store / "artifacts" / "evaluate").rglob("*.parquet"))
    assert not list((store / "runs").rglob("iterations/*.json"))


def test_environments_in_processes_end_with_the_command(prefect_server, tmp_path):
    """Of a whole run nothing is said on stderr; of one that hangs outside of Python one line, and its processes are gone."""
    arguments = ["--store", str(tmp_path / "store"), "--quiet", "--set", "execution.environments=async",
                 "--set", "execution.environment_timeout=5"]
    for name, environment, code, lines in (("works", own("count"), 0, 0),
                                           ("hangs", own("fails", how="hangs outside of Python"), 1, 1)):
        folder = write_control(tmp_path / name, environment=environment, tracking={"enabled": False}, iterations=1)
        done = subprocess.run([sys.executable, "-m", "flows.cli.main", "train", str(folder), *arguments], env=os.environ,
                              capture_output=True, text=True, timeout=120)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, lines), done.stderr
    assert "environments.py:fails: reset has not come back for 5 s" in done.stderr


def test_settings_are_what_the_run_was_made_with(controlled):
    """`CONTROL` is filled in; the critic learns as fast as the actor unless it is told otherwise."""
    record = json.loads((controlled[1] / "runs" / "cartpole" / "run.json").read_text())["config"]
    assert record["gae"]["truncation"] == "bootstrap" and record["gae"]["gamma"] == 0.99
    assert record["ppo"]["learning_rate"] == 1e-2 and record["ppo"]["critic_learning_rate"] is None
    assert open_run(Store(controlled[1]), "pendulum").config.ppo.critic_learning_rate == 1e-3
