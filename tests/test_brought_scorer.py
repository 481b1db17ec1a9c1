"""Reward models and critics that are brought: their own tokenizer, template and limit, scores as transformers gives them."""

import json

import numpy as np
import pytest
import torch
from brought import PROMPTS, change_json, make_model, make_tokenizer, write_brought
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from flows.cli.main import run_command
from flows.language.model_folders import load_classifier, load_tokenizer
from flows.runs.inputs import pinned
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.language import LanguageConfig
from schemas.reward_settings import ComponentConfig
from schemas.tables import Rewards, ScoredTexts
from stages.ops.brought_scorer import BroughtScorer
from stages.ops.language_model import LanguageModel
from stages.ops.scalar_head import ScalarHead
from stages.ops.texts import Texts

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
RESPONSES = ["was warm .", "", " hot and <|end|> of it", "a b c d e f g h i j k l m n o p q r s t u v w x y z", "<|bos|>",
             "é 你", "x", " y "]
TINY = {"bert": {}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "llama": {}, "qwen2": {}, "gemma2": {"head_dim": 8}}


def own_tokenizer(template=TEMPLATE) -> PreTrainedTokenizerFast:
    """Another one than the base model's: with tokens for turns, and other numbers for the same text."""
    tokenizer = make_tokenizer(["<|turn|>", "<|end|>", "<|user|>", "<|assistant|>", "<|bos|>", "<|eos|>", "<|pad|>"])
    tokenizer.chat_template = template
    return tokenizer


def write_scorer(folder, family="llama", tokenizer=None, labels=1, **more):
    """A folder of a classifier with random weights; its head is far from 0."""
    tokenizer = tokenizer or own_tokenizer()
    module = make_model(family, AutoModelForSequenceClassification, tokenizer=tokenizer, num_labels=labels,
                        **TINY[family], **more)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scorer(folder, **settings):
    part = ComponentConfig(source="rm", **settings)
    return BroughtScorer(LanguageModel(load_classifier(folder).eval(), load_tokenizer(folder, needs_eos=False),
                                       micro_batch_tokens=64), part)


def texts():
    from schemas.tables import Ragged
    empty = Ragged.from_rows([np.array([1])] * len(PROMPTS), np.int32)
    return Texts(np.arange(len(PROMPTS)), tuple(PROMPTS), tuple(RESPONSES), empty, empty)


def plain(folder, ids):
    """What transformers alone says of one row, unpadded."""
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return module(input_ids=torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("family", TINY)
def test_scores_are_those_of_plain_transformers_on_the_same_text(tmp_path, family):
    folder = write_scorer(tmp_path / "rm", family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = scorer(folder)(texts())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        if "<|" not in response:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            assert found[row] == pytest.approx(plain(folder, ids), abs=1e-5)
    untemplated = scorer(folder, chat_template=False)(texts())
    for row, text in enumerate(a + b for a, b in zip(PROMPTS, RESPONSES, strict=True)):
        if "<|" not in text:
            assert untemplated[row] == pytest.approx(plain(folder, tokenizer(text)["input_ids"]), abs=1e-5)


def test_a_special_token_in_a_response_is_text():
    """It would end the turn, or begin another one."""
    tokenizer = own_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    read = BroughtScorer(LanguageModel(make_model(kind=AutoModelForSequenceClassification, num_labels=1), tokenizer),
                         ComponentConfig(source="rm")).read(texts())
    assert [row.count(end) for row in read.tokens] == [2] * len(PROMPTS)
    assert read.texts[2] == "<|user|>it<|end|><|assistant|>hot and <|end|> of it<|end|>"
    assert tokenizer.decode(read.tokens[2]) == read.texts[2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_too_long_is_cut_and_counted(tmp_path, side):
    folder = write_scorer(tmp_path / "rm")
    whole = scorer(folder, chat_template=False).read(texts())
    cut = scorer(folder, chat_template=False, max_tokens=20, truncation=side).read(texts())
    assert cut.texts == whole.texts and whole.cut == 0 and cut.cut == sum(len(row) > 20 for row in whole.tokens) > 0
    for one, other in zip(whole.tokens, cut.tokens, strict=True):
        assert other == (one[-20:] if side == "left" else one[:20])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_text_keeps_the_tokens_that_its_tokenizer_puts_around_it(tmp_path, side):
    """As transformers cuts it."""
    tokenizer = own_tokenizer(None)
    around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|eos|>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=around)
    folder = write_scorer(tmp_path / "rm", "bert", tokenizer)
    found = scorer(folder, max_tokens=12, truncation=side)(texts())
    theirs = AutoTokenizer.from_pretrained(folder, truncation_side=side)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        if "<|" not in response:
            ids = theirs(prompt + response, truncation=True, max_length=12)["input_ids"]
            assert ids[-1] == theirs.eos_token_id and found[row] == pytest.approx(plain(folder, ids), abs=1e-5)


def test_as_many_tokens_as_model_and_tokenizer_take(tmp_path):
    folder = write_scorer(tmp_path / "rm", max_position_embeddings=30)
    assert max(map(len, scorer(folder).read(texts()).tokens)) == 30
    change_json(folder / "tokenizer_config.json", model_max_length=12)
    assert max(map(len, scorer(folder).read(texts()).tokens)) == 12


@pytest.fixture(scope="module")
def scored(tmp_path_factory, prefect_server):
    """A run with two reward models that were brought and a function, and a critic that was."""
    place = tmp_path_factory.mktemp("brought")
    components = {"helpful": {"source": "rm", "weight": 2.0, "max_tokens": 24}, "harmless": {"source": "bert"},
                  "length": {"source": "rewards.py:score", "weight": 0.1}}
    folder = write_brought(place / "case", reward={"components": components}, value={"start": "critic"}, iterations=2)
    write_scorer(folder / "rm")
    write_scorer(folder / "bert", "bert", own_tokenizer(None))
    write_scorer(folder / "critic", "llama", make_tokenizer())
    assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return folder, open_run(Store(str(place / "store")), "case")


def test_two_of_them_and_a_function_in_one_run(scored):
    folder, run = scored
    for state in run.states()[1:]:
        ref = state.artifacts["reward"]
        rewards, read = run.store.table(ref, Rewards), run.store.table(ref, ScoredTexts)
        assert sorted(rewards.components) == ["harmless", "helpful", "length"]
        assert sorted(read.texts) == ["harmless", "helpful"]
        for name, place in (("helpful", "rm"), ("harmless", "bert")):
            tokenizer = AutoTokenizer.from_pretrained(folder / place)
            for row, text in enumerate(read.texts[name]):
                ids = tokenizer(text, add_special_tokens=name == "harmless")["input_ids"][-24 if name == "helpful" else 0:]
                assert rewards.components[name][row] == pytest.approx(plain(folder / place, ids), abs=1e-5)
        total = sum(weight * rewards.components[name]
                    for name, weight in (("helpful", 2.0), ("harmless", 1.0), ("length", 0.1)))
        np.testing.assert_allclose(rewards.raw_score, total, rtol=1e-5)
        assert state.metrics["reward/cut_helpful"] > 0 == state.metrics["reward/cut_harmless"]


def test_what_is_cut_in_shards_is_counted(scored, tmp_path, caplog):
    folder, run = scored
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--quiet", "--iterations", "1", "--set",
                        "execution.shards=2"]) == 0
    cut = open_run(Store(str(tmp_path / "store")), run.name)
    for iteration, stage in ((0, "evaluate"), (1, "reward")):
        for name in ("helpful", "harmless"):
            assert cut.state(iteration).metrics[f"{stage}/cut_{name}"] == run.state(iteration).metrics[f"{stage}/cut_{name}"]
        assert cut.state(iteration).metrics[f"{stage}/cut_helpful"] > 0
        said = [record.getMessage() for record in caplog.records
                if record.getMessage().startswith(f"{stage} of iteration {iteration}: ")]
        assert sum("longer than the component 'helpful' takes" in line for line in said) == 1


@pytest.mark.parametrize("stage", ["reward", "value", "evaluate", "ppo"])
def test_each_stage_with_them_gives_the_same_bytes_again(scored, stage, capsys):
    _, run = scored
    assert run_command(["stage", stage, run.name, "--iteration", "2", "--store", run.store.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"


def test_where_it_lies_does_not_decide(scored, tmp_path, capsys):
    """The same folder under another name is the same reward model."""
    folder, run = scored
    (folder / "rm").rename(folder / "renamed")
    try:
        assert run_command(["train", str(folder), "--store", run.store.uri, "--quiet", "--set",
                            "reward.components.helpful.source=renamed"]) == 0
    finally:
        (folder / "renamed").rename(folder / "rm")
    assert run.last().iteration == 2


@pytest.mark.parametrize("change, said", [
    (lambda folder: write_scorer(folder / "rm", labels=2),
     "reward.components.rm.source: {rm}: has 2 labels (LABEL_0, LABEL_1), expected one: a score; a function can make one of "
     "several (file.py:function)"),
    (lambda folder: (make_model().save_pretrained(folder / "rm"), own_tokenizer().save_pretrained(folder / "rm")),
     "reward.components.rm.source: {rm}: holds LlamaForCausalLM, expected a sequence classifier with one label (a folder "
     "that AutoModelForSequenceClassification has saved): without its head the scores would be random"),
    (lambda folder: [file.unlink() for file in write_scorer(folder / "rm").glob("tokenizer*")],
     "reward.components.rm.source: {rm} has no tokenizer*; expected a Hugging Face folder with safetensors weights (pickled "
     "weights are not read)"),
    (lambda folder: write_scorer(folder / "rm", tokenizer=own_tokenizer("{{ raise_exception('only one turn') }}")),
     "reward.components.rm.source: {rm}: its chat template cannot render a user's and an assistant's turn: only one turn; "
     "set chat_template: false, or change its chat_template.jinja"),
    (lambda folder: change_json(write_scorer(folder / "rm") / "config.json", hidden_size=64), "mismatched"),
    (lambda folder: write_scorer(folder / "rm", tokenizer=own_tokenizer("{{ strftime_now('%Y') }}")),
     "reward.components.rm.source: {rm}: the tokenizer's chat template calls strftime_now"),
])
def test_what_cannot_score_is_refused_before_anything_is_imported(tmp_path, capsys, change, said):
    folder = write_brought(tmp_path / "case", reward={"components": {"rm": {"source": "rm"}}}, gae={"estimator": "rloo"},
                           rollout={"responses_per_prompt": 2}, value=None)
    change(folder)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    assert said.format(rm=folder / "rm") in capsys.readouterr().err
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_more_tokens_than_a_model_takes_are_refused(tmp_path, capsys):
    folder = write_brought(tmp_path / "case", reward={"components": {"rm": {"source": "rm", "max_tokens": 500}}})
    write_scorer(folder / "rm")
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    assert "max_tokens=500: it takes 128; lower it, or leave it out" in capsys.readouterr().err


def test_a_critic_with_fewer_positions_decides_how_long_a_prompt_may_be(tmp_path, capsys):
    folder = write_brought(tmp_path / "case", value={"start": "critic"})
    write_scorer(folder / "critic", "llama", make_tokenizer(), max_position_embeddings=10)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    assert "the model's context of 10 leaves 2 beside 8 for the response" in capsys.readouterr().err


@pytest.mark.parametrize("component", ["length", "critic"])
def test_a_critic_with_another_tokenizer_is_refused(tmp_path, capsys, component):
    folder = write_brought(tmp_path / "case", value={"start": "critic"},
                           reward={"components": {component: {"source": "rewards.py:score"}}})
    write_scorer(folder / "critic")
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    assert ("value.start: its tokenizer is not the base model's, and a critic reads the actor's tokens; set value.start: "
            "actor" in capsys.readouterr().err)


def test_a_critic_of_ours_can_be_brought_back(tmp_path, prefect_server):
    """Also one of a family that transformers has no classifier of."""
    folder = write_brought(tmp_path / "first", make_model("granite"))
    store = str(tmp_path / "store")
    assert run_command(["train", str(folder), "--store", store, "--quiet"]) == 0
    second = write_brought(tmp_path / "second", make_model("granite"), value={"start": "critic"})
    assert run_command(["export", "first", str(second / "critic"), "--role", "critic", "--store", store, "--quiet"]) == 0
    assert run_command(["train", str(second), "--store", store, "--quiet"]) == 0
    first, again = (open_run(Store(store), name) for name in ("first", "second"))
    assert again.state(0).critic.artifact == again.inputs["critic"]
    brought = again.store.file(again.inputs["critic"], "model/model.safetensors")
    trained = first.store.file(first.state(1).critic.artifact, "critic/model.safetensors")
    assert brought.read_bytes() == trained.read_bytes()


def test_a_model_that_scores_and_is_the_critic_too(tmp_path, prefect_server, capsys):
    """A scorer is read as it is; what may be done with a critic is tried, and its attention chosen, whoever was first."""
    folder = write_brought(tmp_path / "case", make_model("rwkv"), value={"start": "both"}, execution={"warm_models": 9},
                           reward={"components": {"rm": {"source": "both", "chat_template": False}}})
    body = make_model("rwkv")
    scorer = ScalarHead(body.config, body.base_model)
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(0))
    scorer.save(folder / "both")
    make_tokenizer().save_pretrained(folder / "both")
    store = str(tmp_path / "store")
    assert run_command(["train", str(folder), "--store", store, "--quiet"]) == 0
    capsys.readouterr()
    assert run_command(["stage", "value", "case", "--iteration", "1", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def on_hub(tmp_path, monkeypatch, name, folder):
    """Has the hub's cache hold that folder as `org/name`."""
    cached = tmp_path / "hub" / f"models--org--{name}"
    (cached / "snapshots").mkdir(parents=True)
    folder.rename(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_model_on_the_hub_is_recorded_with_its_commit(tmp_path, prefect_server, monkeypatch):
    """From the hub's cache, which is all that there is of it without a network; exported adapters name it."""
    folder = write_brought(tmp_path / "case", base_model={"source": "org/base"}, lora={"rank": 2})
    on_hub(tmp_path, monkeypatch, "base", folder / "model")
    store = str(tmp_path / "store")
    for _ in range(2):  # it is found again
        assert run_command(["train", str(folder), "--store", store, "--quiet"]) == 0
    assert open_run(Store(store), "case").config.base_model.source == f"org/base@{COMMIT}"
    assert run_command(["export", "case", str(tmp_path / "out"), "--store", store, "--quiet"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", COMMIT)
    assert "base_model: org/base\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_commit_is_put_where_the_model_is_named(tmp_path):
    """Also of a component whose name holds a dot; a folder is left as it is written."""
    (tmp_path / "rm").mkdir()
    config = LanguageConfig.model_validate({
        "data": {"prompts": "p", "heldout_prompts": "h"}, "base_model": {"source": "org/base@main"},
        "value": {"start": "org/critic"}, "reward": {"components": {"a.b": {"source": "org/rm"}, "c": {"source": "rm"}}}})
    there = [tmp_path / "snapshots" / COMMIT / "config.json"]
    found = pinned(config, tmp_path, {role: there if source != "rm" else [tmp_path / "rm" / "config.json"]
                                      for role, source in config.models.items()})
    assert found.models == {"base_model": f"org/base@{COMMIT}", "critic": f"org/critic@{COMMIT}",
                            "reward.a.b": f"org/rm@{COMMIT}", "reward.c": "rm"}


def test_a_fork_names_the_commit_of_a_model_that_is_new(tmp_path, prefect_server, monkeypatch):
    folder, store = write_brought(tmp_path / "case", evaluate={"judge": "rewards.py:score"}), str(tmp_path / "store")
    assert run_command(["train", str(folder), "--store", store, "--quiet"]) == 0
    write_scorer(tmp_path / "rm")
    on_hub(tmp_path, monkeypatch, "rm", tmp_path / "rm")
    assert run_command(["fork", "case", "--at", "1", "--run", "from-hub", "--store", store, "--quiet", "--set",
                        "reward.components={new: {source: org/rm}}"]) == 0
    assert open_run(Store(store), "from-hub").config.models["reward.new"] == f"org/rm@{COMMIT}"


def test_what_the_critic_began_as_is_not_changed_afterwards(scored, capsys):
    _, run = scored
    arguments = ["stage", "value", run.name, "--iteration", "1", "--store", run.store.uri, "--set"]
    assert run_command([*arguments, "value.start=somewhere"]) == 2
    assert "value.start: it was decided before the first iteration" in capsys.readouterr().err
    assert run_command([*arguments, "value.start="]) == 2
    assert "value.start" in capsys.readouterr().err


def test_a_model_that_is_nowhere(tmp_path, capsys):
    folder = write_brought(tmp_path / "case", reward={"components": {"rm": {"source": "nobody/nothing"}}})
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    assert "reward.components.rm.source: 'nobody/nothing' is no folder" in capsys.readouterr().err


def test_settings_of_a_model_at_a_function_are_refused():
    with pytest.raises(ValueError, match="truncation is about a model that is brought"):
        ComponentConfig(source="a.py:f", truncation="left")


def test_what_is_no_model_is_recorded_as_before_there_were_any():
    assert ComponentConfig(source="a.py:f").model_dump() == {"source": "a.py:f", "weight": 1.0}
    config = LanguageConfig.model_validate({"data": {"prompts": "p", "heldout_prompts": "h"}, "base_model": {"source": "m"},
                                            "reward": {"components": {"a": {"source": "org/rm@main"}}}, "value": {
                                                "start": "actor"}})
    assert config.models == {"base_model": "m", "reward.a": "org/rm@main"} and config.functions == {}


def test_old_rollouts_under_another_reward_model(scored, tmp_path, capsys, monkeypatch):
    """It is looked for below this folder; one with two labels is refused."""
    _, run = scored
    monkeypatch.chdir(tmp_path)
    write_scorer(tmp_path / "other", hidden_size=16)
    write_scorer(tmp_path / "two", labels=2)
    arguments = ["stage", "reward", run.name, "--iteration", "1", "--store", run.store.uri, "--json", "--set"]
    assert run_command([*arguments, "reward.components={other: {source: other}}"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "new" and "component_other" in answer["metrics"]
    assert run_command([*arguments, "reward.components={two: {source: two}}"]) == 2
    assert "has 2 labels" in capsys.readouterr().err
    changed = "reward.components.helpful.source"
    assert run_command([*arguments, f"{changed}=other"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "new"
    fork = ["fork", run.name, "--at", "1", "--run", "forked", "--store", run.store.uri, "--quiet", "--set"]
    assert run_command([*fork, f"{changed}=two"]) == 2 and "has 2 labels" in capsys.readouterr().err
    assert run_command([*arguments, "reward.components={nothing: {source: nothing}}"]) == 2
    assert "reward.components.nothing.source: 'nothing' is no folder" in capsys.readouterr().err
