"""`baton export`: what plain transformers and PEFT load is what was trained, and the card says where it comes from."""

import json

import pytest
import torch
import yaml
from brought import make_model, write_brought
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from flows.cli.main import run_command
from flows.language.model_card import SHOWN
from flows.language.model_folders import load_causal, load_scalar
from flows.language.warm_models import WarmModels
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.stages import STAGES

IDS = torch.tensor([[5, 9, 200, 31, 4, 77]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prefect_server):
    """A run of whole models, one of adapters, and one whose critic transformers has no class for."""
    place = tmp_path_factory.mktemp("export")
    for name, sections, family in (("whole", {}, "llama"), ("adapters", {"lora": {"rank": 4}}, "llama"),
                                   ("granite", {"lora": {"rank": 4}}, "granite")):
        folder = write_brought(place / name, make_model(family), iterations=2, **sections)
        assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return Store(str(place / "store"))


def exported(store, folder, run, *options):
    assert run_command(["export", run, str(folder), "--store", store.uri, "--json", *options]) == 0
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def trained_logits(store, run, role="actor", iteration=2):
    run = open_run(store, run)
    load = load_causal if role == "actor" else load_scalar
    return logits(WarmModels(store, run.config.execution).own(getattr(run.state(iteration), role), load).module)


def test_a_whole_model(trained, tmp_path, capsys):
    folder = exported(trained, tmp_path / "out", "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), trained_logits(trained, "whole"))
    assert json.loads(capsys.readouterr().out) == {"folder": str(folder), "run": "whole", "iteration": 2, "role": "actor"}
    first = exported(trained, tmp_path / "first", "whole", "--iteration", "1")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(first)), trained_logits(trained, "whole", iteration=1))


def test_an_adapter_by_peft_and_merged(trained, tmp_path):
    expected = trained_logits(trained, "adapters")
    folder = exported(trained, tmp_path / "adapter", "adapters")
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|eos|>"
    merged = exported(trained, tmp_path / "merged", "adapters", "--merge")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-4, atol=1e-4)
    assert not (merged / "adapter_config.json").exists()


def test_a_critic(trained, tmp_path):
    expected = trained_logits(trained, "adapters", "critic")
    folder = exported(trained, tmp_path / "critic", "adapters", "--role", "critic")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    merged = exported(trained, tmp_path / "merged", "adapters", "--role", "critic", "--merge")
    torch.testing.assert_close(logits(AutoModelForSequenceClassification.from_pretrained(merged)), expected, rtol=1e-4,
                               atol=1e-4)
    whole = exported(trained, tmp_path / "whole", "whole", "--role", "critic")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(whole)),
                       trained_logits(trained, "whole", "critic"))


def test_a_critic_that_is_still_the_actor_has_a_head_of_zeros(trained, tmp_path):
    folder = exported(trained, tmp_path / "critic", "whole", "--role", "critic", "--iteration", "0")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1 and not model.score.weight.any()
    actor = AutoModelForCausalLM.from_pretrained(exported(trained, tmp_path / "actor", "whole", "--iteration", "0"))
    assert torch.equal(model.model.embed_tokens.weight, actor.model.embed_tokens.weight)


def test_here_and_what_lies_beside(trained, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here.partial").mkdir()
    (tmp_path / "here.partial" / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    exported(trained, ".", "whole")
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here.partial"]
    assert (tmp_path / "here.partial" / "mine").read_text() == "mine"


def test_the_best(trained, tmp_path, capsys):
    """By gold; of a metric that no iteration has there is none."""
    run = open_run(trained, "whole")
    exported(trained, tmp_path / "out", "whole", "--best")
    assert json.loads(capsys.readouterr().out)["iteration"] == run.last().best.iteration
    assert run_command(["export", "whole", str(tmp_path / "x"), "--store", trained.uri, "--best", "--iteration", "1"]) == 2
    assert "--best: it names the iteration" in capsys.readouterr().err


def test_a_critic_without_a_class_in_transformers(trained, tmp_path):
    merged = exported(trained, tmp_path / "merged", "granite", "--role", "critic", "--merge")
    hidden = load_scalar(merged).base_model(input_ids=IDS).last_hidden_state
    run = open_run(trained, "granite")
    model = WarmModels(trained, run.config.execution).own(run.state(2).critic, load_scalar).module
    torch.testing.assert_close(hidden, model.base_model(input_ids=IDS).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert "load_scalar(folder)" in (merged / "README.md").read_text()


def test_the_card(trained, tmp_path):
    card = (exported(trained, tmp_path / "out", "adapters") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    run = open_run(trained, "adapters")
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-generation" and "lora" in front["tags"]
    assert front["base_model"] == run.store.place(run.inputs["base_model"], "model")
    for text in (str(run.inputs["prompts"]), str(run.state(2).artifacts["ppo"]), str(run.state(1).artifacts["ppo"]),
                 "AutoPeftModelForCausalLM.from_pretrained(folder)", "`evaluate/gold`", "rank: 4"):
        assert text in card
    gold = f"{run.state(2).metrics['evaluate/gold']:.4g}"
    assert f"| {run.state(0).metrics['evaluate/gold']:.4g} | {gold} | `evaluate/gold` |" in card


@pytest.mark.parametrize("metric", SHOWN)
def test_what_the_card_shows_is_measured(metric):
    stage, _, name = metric.partition("/")
    assert name in STAGES["language"][stage].metrics.model_fields


@pytest.mark.parametrize("arguments, said", [
    (["whole", "{}", "--role", "reward_model"], "run 'whole' has no reward_model; it has actor, critic"),
    (["whole", "{}", "--merge"], "--merge: the actor is a whole model, and no adapter; leave it out"),
    (["whole", "{}", "--iteration", "7"], "run 'whole' has no iteration 7; it has 0…2"),
    (["nobody", "{}"], "no run 'nobody' in"),
])
def test_what_cannot_be_exported(trained, tmp_path, capsys, arguments, said):
    words = [word.format(tmp_path / "out") for word in arguments]
    assert run_command(["export", *words, "--store", trained.uri]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_stays(trained, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert run_command(["export", "whole", str(tmp_path), "--store", trained.uri]) == 2
    assert f"{tmp_path}: is there already, and holds something; name another folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
