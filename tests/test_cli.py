"""What a user types wrong: exit code 2, one line that says what to change, before any model is made."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from flows.cli.main import run_command
from flows.store.store import Store


@pytest.fixture
def refused(example, tmp_path, capsys):
    """Trains with a change and gives the error line; checks that it is one, with code 2, and that no run was begun."""
    def run(*arguments, change=None, source=None):
        if change:
            config = yaml.safe_load((example / "config.yaml").read_text())
            change(config)
            (example / "config.yaml").write_text(yaml.safe_dump(config))
        store = tmp_path / "store"
        code = run_command(["train", str(source or example), "--store", str(store), *arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.startswith("baton: ") and error.count("\n") == 1, error
        assert not (store / "runs").exists() and Store(store).artifacts() == []
        return error
    return run


@pytest.mark.parametrize("setting, message", [
    ("ppo.clip_rang_low=0.1", "ppo.clip_rang_low: unknown key; did you mean 'clip_range_low'?"),
    ("pppo.epochs=2", "pppo: unknown key; did you mean 'ppo'?"),
    ("rollout.components.x.sourc=a", "rollout.components: unknown key"),
    ("reward.components.reward_model.sorce=a", "reward.components.reward_model.sorce: unknown key; did you mean 'source'?"),
    ("gae.gae_lambda=1.5", "gae.gae_lambda: should be less than or equal to 1, found 1.5"),
    ("ppo.learning_rate=-1", "ppo.learning_rate: should be greater than 0, found -1"),
    ("ppo.learning_rate=fast", "ppo.learning_rate: should be a valid number"),
    ("ppo.learning_rate=.nan", "ppo.learning_rate: should be a finite number"),
    ("kl.estimator=k4", "kl.estimator: should be 'k1', 'k2' or 'k3', found 'k4'"),
    ("ppo.minibatches=3", "rollout.batch_size=8 does not divide into ppo.minibatches=3"),
    ("base_model.heads=3", "base_model: width=16 does not divide into heads=3"),
    ("rollout.max_new_tokens=160", "leaves no room for a prompt in base_model.context_length=160"),
    ("data.prompts=none.jsonl", "data.prompts: no such file"),
    ("evaluate.judge=nothing.py:gold", "no such file"),
    ("evaluate.judge=grammar.py:silver", "grammar.py has no function 'silver'"),
    ("evaluate.judge=:gold", "expected file.py:function"),
    ("reward.components={'A b': {source: reward_model}}", "reward.components"),
    ("execution.device=cuda", "torch finds no cuda here"),
    ("execution.device=gpu", "execution.device: should be 'cpu', 'cuda' or 'auto', found 'gpu'"),
    ("evaluate.judge=grammar", "expected file.py:function or package.module:function"),
    ("evaluate.judge=no.such:thing", "no such module: no.such"),
    ("base_model={source: nowhere}", "is no folder"),
    ("reward_model=null", "there is no reward_model section"),
    ("sft=null", "add an sft section"),
])
def test_a_wrong_setting(refused, setting, message):
    assert message in refused("--set", setting)


@pytest.mark.parametrize("settings, message", [
    (["rollout.batch_size=1", "ppo.minibatches=1"], "whitening with one response (rollout.batch_size=1) removes the"),
    (["rollout.batch_size=1", "ppo.minibatches=1", "gae.whiten=none", "gae.whiten_rewards=true"], "whitening with one"),
    (["gae.estimator=grpo"], "gae.estimator=grpo compares the responses to one prompt, and rollout."),
    (["gae.estimator=rloo"], "gae.estimator=rloo compares"),
    (["gae.estimator=reinforce++-baseline"], "gae.estimator=reinforce++-baseline compares"),
    (["gae.estimator=reinforce++", "value.start=actor"], "gae.estimator=reinforce++ has no critic and reads no values"),
    (["value=null"], "gae.estimator=gae needs values"),
    (["gae.estimator=reinforce++", "ppo.critic_warmup=2"], "has no critic; set it to 0"),
    (["gae.estimator=reinforce++", "gae.critic_lambda=0"], "gae: critic_lambda is about a critic's values"),
    (["gae.estimator=reinforce++", "gae.truncation=bootstrap"], "gae: truncation is about a critic's values"),
    (["kl.placement=[reward, loss]", "kl.target=6"], "kl: placement: in the reward and in the loss, one divergence"),
    (["kl.placement=both"], "charged twice and `target` could steer neither; choose reward or loss"),
    (["kl.placement=loss"], "kl: estimator=k1 in the loss has a gradient that is 0 on average"),
    (["kl.coef=0", "kl.target=6"], "kl: target adapts coef by factors, and coef=0 stays 0"),
    (["rollout.responses_per_prompt=3"], "rollout.batch_size=8 does not divide into rollout.responses_per_prompt=3"),
    (["reward.overlong_buffer=11"], "reward.overlong_buffer=11 is longer than rollout.max_new_tokens=10"),
    (["ppo.importance_cap=2"], "ppo: importance_cap weighs recomputed against sampled logprobs"),
    (["rollout.precision=bfloat16"], "rollout.precision=bfloat16 samples from another policy than the float32 one"),
    (["ppo.schedule=linear"], "ppo: schedule=linear with schedule_iterations=None: a falling schedule needs its length"),
    (["ppo.schedule_iterations=4"], "a constant one has none"),
    (["ppo.schedule=linear", "ppo.schedule_iterations=1"], "iterations=2 go on after ppo.schedule_iterations=1"),
    (["kl.target=6", "kl.horizon=1.5"], "kl.horizon=1.5 is so short that one iteration of rollout.batch_size=8 could bring"),
    (["gae.estimator=rloo", "gae.whiten_rewards=true"], "gae: whiten_rewards moves the reward of every token"),
    (["ppo.target_kl=0.1", "ppo.epochs=1", "ppo.minibatches=1"], "ppo: target_kl is looked at after a step"),
    (["gae.estimator=rloo", "gae.gamma=0.9"], "gae: gamma=0.9: estimator=rloo compares whole responses"),
    (["ppo.schedule=linear", "ppo.schedule_iterations=4", "ppo.warmup_iterations=4"], "leave nothing of"),
    (["reward.normalize=scale", "rollout.batch_size=1", "ppo.minibatches=1", "gae.whiten=none"], "has no spread"),
    (["preset=[classic]"], "preset: should be 'classic' or 'reasoning', found ['classic']"),
    (["ppo.dual_clip=1"], "ppo.dual_clip: should be greater than 1, found 1"),
    (["preset=clasic"], "preset: should be 'classic' or 'reasoning', found 'clasic'"),
])
def test_a_combination_that_means_nothing(refused, settings, message):
    assert message in refused(*(part for setting in settings for part in ("--set", setting)))


def test_more_iterations_than_the_schedule_has(refused):
    assert "--iterations: iterations=5 go on after ppo.schedule_iterations=3" in refused(
        "--set", "ppo.schedule=linear", "--set", "ppo.schedule_iterations=3", "--iterations", "5")


def test_choices_that_need_data(example, refused):
    model = {"base_model": {"source": "nowhere"}, "sft": None}

    def without_demonstrations(config):
        config |= model
        del config["data"]["demonstrations"]

    assert "ppo.ptx_coef needs data.pretraining or data.demonstrations" in refused(
        "--set", "ppo.ptx_coef=1", change=without_demonstrations)
    assert "reward.center_on_demonstrations needs data.demonstrations" in refused(
        "--set", "reward.center_on_demonstrations=true")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "x" * 65, ".x", "a..b", "a\n"])
def test_a_run_name_that_is_no_name(refused, name):
    assert "use 1 to 64 of a-z, 0-9" in refused("--run", name)


def test_a_missing_folder_file_or_key(refused, example, tmp_path):
    assert "no such folder or file" in refused(source=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "the folder has no config.yaml" in refused(source=tmp_path / "empty")
    assert "data.prompts: missing" in refused(change=lambda c: c["data"].pop("prompts"))


@pytest.mark.parametrize("text, message", [
    ("", "is empty"),
    ("\n\n", "is empty"),
    ('{"prompt": "a"}\n\n{"prompt": "b"}\n', "line 2: not JSON"),
    (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "is not UTF-8"),
    ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
    ('{"prompt": "a"}\n["b"]\n', "line 2: expected an object, found"),
    ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: column 'prompt': expected text, found only 'text'"),
    ('{"prompt": 3}\n', "line 1: column 'prompt': expected text, found 3"),
    ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2 has no tokens"),
    ('{"prompt": "a"}\n' + json.dumps({"prompt": "word " * 200}) + "\n", "1 of 2 rows are too long (line 2; the longest"),
])
def test_a_prompt_file_that_cannot_be_used(refused, example, text, message):
    (example / "prompts.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    error = refused()
    assert message in error and "prompts" in error


def test_a_config_that_is_no_mapping_or_no_yaml(refused, example):
    (example / "config.yaml").write_text("- a\n- b\n")
    assert "expected keys and values, found list" in refused()
    (example / "config.yaml").write_text("a: [1,\n")
    assert "not YAML" in refused()


def test_a_missing_column_in_pairs(refused, example):
    (example / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    assert "column 'rejected': expected text, found only 'prompt', 'chosen'" in refused()


def test_a_model_folder_with_pickled_weights(refused, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    assert "pickled weights are not read" in refused(
        "--set", f"base_model={{source: {folder}}}", "--set", "sft=null")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_folder_that_brings_its_own_code(refused, tmp_path, file):
    folder = tmp_path / "remote"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / file).write_text('{"auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", null]}}')
    error = refused("--set", f"base_model={{source: {folder}}}", "--set", "sft=null")
    assert f"{file} names code to be run (auto_map)" in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("body, message", [
    ("import sys\nsys.exit(3)\n", "judge.py cannot be run: it called sys.exit(3) (judge.py, line 2, in <module>)"),
    ("raise ValueError('one\\ntwo')\n", "cannot be run: it raised ValueError: one two (judge.py, line 1, in <module>)"),
    ("WORDS = open(__file__.replace('judge.py', 'words.txt')).read()\ndef gold(p, r): ...\n", "FileNotFoundError"),
])
def test_a_function_file_that_cannot_stand_alone(refused, example, body, message):
    (example / "judge.py").write_text(body)
    (example / "words.txt").write_text("good")
    assert message in refused("--set", "evaluate.judge=judge.py:gold")


def test_a_store_that_cannot_be_written(example, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_command(["train", str(example), "--store", str(tmp_path / "file" / "store")]) == 2
    assert "--store" in capsys.readouterr().err


def test_global_options_before_or_after_the_command(trained, capsys):
    for arguments in (["--json", "--store", str(trained[1]), "runs"], ["runs", "--json", "--store", str(trained[1])]):
        assert run_command(arguments) == 0
        assert json.loads(capsys.readouterr().out)[0]["run"] == "tiny"


def test_an_existing_run_with_another_config(copied, capsys):
    folder, store = copied
    before = {path: path.read_bytes() for path in (store / "runs").rglob("*.json")}
    code = run_command(["train", str(folder), "--store", str(store), "--set", "gae.gae_lambda=0.9", "--set", "seed=4"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert "gae.gae_lambda: 0.95 → 0.9" in error and "seed: 3 → 4" in error and "--run" in error
    assert {path: path.read_bytes() for path in (store / "runs").rglob("*.json")} == before


def test_an_existing_run_with_other_data(copied, tmp_path, capsys):
    import shutil
    folder, store = copied
    changed = shutil.copytree(folder, tmp_path / "tiny")
    (changed / "prompts.jsonl").write_text('{"prompt": "The soup"}\n')
    assert run_command(["train", str(changed), "--store", str(store)]) == 2
    assert "data.prompts: other content" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["trai"], "No such command 'trai'. Did you mean 'train'?"),
    (["show"], "Missing argument 'RUN'"),
    (["show", "x", "--iteration", "two"], "'two' is not a valid integer"),
    (["train", "x", "--iterations", "-1"], "-1 is not in the range"),
    (["show", "nobody"], "no run 'nobody' in"),
    (["show", "../etc"], "run name '../etc'"),
    (["runs", "--store", "gs://bucket/store"], "--store gs://bucket/store: gs:// is not supported; expected a folder, or s3://"),
    (["runs", "--store", "file:///tmp"], "file:// is not supported"),
])
def test_a_wrong_call(arguments, message, capsys, tmp_path):
    store = [] if arguments == ["trai"] or "--store" in arguments else ["--store", str(tmp_path)]
    assert run_command([*arguments, *store]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_mistakes_are_found_without_loading_torch(example):
    code = ("import sys\nfrom flows.cli.main import run_command\n"
            f"assert run_command(['train', {str(example)!r}, '--set', 'ppo.epoch=1']) == 2\n"
            "assert not {'torch', 'prefect', 'mlflow', 'transformers'} & set(sys.modules), 'heavy import'\n")
    out = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr


def test_show_runs_and_verify(trained, capsys):
    store = ["--store", str(trained[1])]
    assert run_command(["runs", *store]) == 0
    assert "tiny" in capsys.readouterr().out
    assert run_command(["show", "tiny", *store]) == 0
    out = capsys.readouterr().out
    assert "between stages" in out and "tokens/s" in out and "rollout" in out
    assert run_command(["show", "tiny", "--iteration", "1", *store]) == 0
    assert "gae/kl_per_token" in capsys.readouterr().out
    assert run_command(["verify", "tiny", *store]) == 0
    assert "0 findings" in capsys.readouterr().out


def test_json_is_one_document_and_nothing_else(trained, capsys):
    for arguments in (["runs"], ["show", "tiny"], ["verify"], ["train", str(trained[0])]):
        assert run_command([*arguments, "--store", str(trained[1]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("file, algorithm", [("value/*/attempts/*/values.parquet", "sha256"),
                                             ("ppo/*/attempts/*/actor/model.safetensors", "blake3")])
def test_verify_finds_a_flipped_bit(copied, capsys, file, algorithm):
    path = next(copied[1].glob(f"artifacts/{file}"))
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    assert run_command(["verify", "tiny", "--store", str(copied[1])]) == 1
    out = capsys.readouterr().out
    assert str(path) in out and f"{algorithm}: expected" in out and "1 findings" in out


def test_quiet_says_nothing(copied, capsys):
    assert run_command(["train", str(copied[0]), "--store", str(copied[1]), "--quiet"]) == 0
    out = capsys.readouterr()
    assert out.out == "" and out.err == ""


def test_a_flow_runs_with_no_server_set_up(trained, tmp_path):
    """As on a fresh machine: no API address, a new Prefect home."""
    env = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | {"PREFECT_HOME": str(tmp_path / "home")}
    out = subprocess.run([sys.executable, "-m", "flows.cli.main", "stage", "gae", "tiny", "--iteration", "1", "--store",
                          str(trained[1])], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert "the same bytes" in out.stdout and "no model loaded" in out.stdout


def test_baton_alone_is_its_help(capsys):
    assert run_command([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("Usage: baton [OPTIONS] COMMAND") and "\n  train " in out


@pytest.mark.parametrize("scheme", ["gs://b/x", "S3://b/x", "file:///tmp/x", "http://127.0.0.1/x"])
def test_a_store_of_an_unknown_kind_makes_no_folder_of_that_name(example, scheme, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(["train", str(example), "--store", scheme]) == 2
    assert "is not supported; expected a folder, or s3://bucket/prefix" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [example.name]


@pytest.mark.parametrize("data, words", [
    (b"seed: 1\n", "data: missing; a language model's run needs its files there .* a control task an environment instead"),
    ("seed: 1\n".encode("utf-16"), "config.yaml: is not UTF-8; save it as that"),
    (b"seed: 2026-99-99\n", "config.yaml"), (b"a: &a [*a]\n", "config.yaml"), (b"\x00", "config.yaml: not YAML"),
    (b"seed: " + b"[" * 5000, "config.yaml")])
def test_a_config_that_holds_something_else(tmp_path, data, words, capsys):
    (tmp_path / "config.yaml").write_bytes(data)
    assert run_command(["train", str(tmp_path), "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1


def test_a_folder_whose_name_is_no_runs_name_says_so(example, capsys):
    other = example.rename(example.with_name("My Run"))
    assert run_command(["train", str(other), "--store", str(other.parent / "store")]) == 2
    assert "it is the folder's: --run chooses another" in capsys.readouterr().err
