"""bfloat16, 8 and 4 bits: what is held in them, what is not, and that what is computed is what others compute."""


import json
import sys
from contextlib import closing

import bitsandbytes
import numpy as np
import pytest
import torch
from brought import PROMPTS, make_model, write_brought
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flows.cli.main import run_command
from flows.language.model_folders import load_causal
from flows.language.warm_models import WarmModels
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.errors import ConfigError
from schemas.language import LoRAConfig
from schemas.tables import ReferenceLogprobs, Rollouts
from stages.ops import lora
from stages.ops.precision import Precision, hold

PRECISIONS = ("bfloat16", "int8", "nf4")


ROWS = [{"prompt": prompt, "completion": " is warm .", "chosen": " is warm .", "rejected": " x x"} for prompt in PROMPTS]
WITH_ALL_STAGES = {
    "sft": {"epochs": 1, "batch_size": 4}, "reward_model": {"epochs": 1, "batch_size": 4},
    "value": {"start": "reward_model"},
    "reward": {"components": {"rm": {"source": "reward_model"}, "length": {"source": "rewards.py:score"}}},
    "data": {"demonstrations": "rows.jsonl", "pairs": "rows.jsonl", "heldout_pairs": "rows.jsonl"}}
RUNS = {**{name: {"lora": {"rank": 4}} for name in PRECISIONS}, "full": {},
        **{f"{name}-all": {"lora": {"rank": 4}, **WITH_ALL_STAGES} for name in ("bfloat16", "nf4")}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prefect_server):
    """Two iterations in each precision: with adapters, with all stages, and in full where weights can be trained in it."""
    place = tmp_path_factory.mktemp("precision")
    for name, sections in RUNS.items():
        precision = "bfloat16" if name == "full" else name.partition("-")[0]
        folder = write_brought(place / name, make_model(hidden_size=64), iterations=2, **sections,
                               base_model={"source": "model", "precision": precision})
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return Store(str(place / "store"))


def loaded_by_transformers(folder, precision):
    if precision == "bfloat16":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu")


@torch.no_grad()
def logprobs_of_rows(model, rollouts):
    rows = []
    for prompt, response in zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None].long()
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        rows.append(logits.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy())
    return np.concatenate(rows)


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_the_reference_is_what_transformers_loads_in_that_precision(trained, precision):
    """Nearer to it than a model in float32 is, and than one in bfloat16. What 8 bits round is below what bfloat16 does: of
    them the weights are compared, below."""
    run = open_run(trained, precision)
    made, base = run.state(1).artifacts, run.state(0).actor
    rollouts, found = trained.table(made["rollout"], Rollouts), trained.table(made["reference"], ReferenceLogprobs)
    folder = trained.folder(base.artifact, base.folder)
    theirs = logprobs_of_rows(loaded_by_transformers(folder, precision), rollouts)
    others = [logprobs_of_rows(AutoModelForCausalLM.from_pretrained(folder), rollouts)]
    if precision != "bfloat16":
        others.append(logprobs_of_rows(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), rollouts))
    error = np.abs(found.logprobs.values - theirs).mean()
    distances = [np.abs(other - theirs).mean() for other in others]
    assert min(distances) > 1e-4 and error < 0.8 * min(distances)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_those_beside_it(precision):
    """How much is computed at once is no part of an identity."""
    model = make_model(hidden_size=64)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = 40  # a feature that stands out
    hold(model, precision)
    rows = torch.stack([torch.arange(4, 12), torch.arange(100, 108)])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        together, alone = model(rows).logits[0], model(rows[:1]).logits[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-2 * float(alone.abs().max()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_those_over_the_weights_that_are_held(precision):
    """Also after a pass without gradients, for which layers may be laid out anew."""
    base, plain = make_model(hidden_size=64), make_model(hidden_size=64)
    hold(base, precision)
    for (name, held), weight in zip(base.model.named_modules(), plain.model.modules(), strict=True):
        if isinstance(weight, torch.nn.Linear):
            weight.weight.data = unpacked(held, precision)
            assert 0 < (weight.weight - make_model(hidden_size=64).model.get_submodule(name).weight).abs().max() < 0.02
    ids, gradients = torch.arange(4, 12)[None], []
    for model in (base, plain):
        lora.add_adapter(model, LoRAConfig(), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            model(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=model is base):
            loss = model(ids).logits.float().log_softmax(-1)[..., 5].sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.998


def unpacked(layer, precision):
    if precision == "int8":
        return layer.state.CB.float() * layer.state.SCB[:, None] / 127
    if precision == "nf4":
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float()


@pytest.mark.parametrize("name", RUNS)
def test_the_actor_is_moved_and_each_stage_is_reproduced(trained, name, capsys):
    run = open_run(trained, name)
    assert run.state(2).metrics["ppo/grad_norm_actor"] > 0 and run.state(2).metrics["ppo/ratio_max"] > 1
    stages = {"rollout": 2, "reference": 2, "value": 2, "ppo": 2, "evaluate": 2}
    if name.endswith("-all"):
        stages |= {"sft": 0, "reward_model": 0, "reward": 2}
    for stage, iteration in stages.items():
        assert run_command(["stage", stage, name, "--iteration", str(iteration), "--store", trained.uri, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "same", stage


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_card_loads_what_was_trained(trained, tmp_path, precision):
    """The adapter over a base that is held as in training, and merged where that can be."""
    folder, run = tmp_path / "out", open_run(trained, precision)
    assert run_command(["export", precision, str(folder), "--store", trained.uri, "--quiet"]) == 0
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    there: dict = {"folder": folder}
    exec(code, there)
    rollouts = trained.table(run.state(2).artifacts["rollout"], Rollouts)
    with closing(WarmModels(trained, run.config.execution)) as warm:
        ours = [warm.own(run.state(1).actor, load_causal, Precision(weights=weights)).module
                for weights in (precision, "float32")]
    assert run_command(["export", precision, str(tmp_path / "first"), "--iteration", "1", "--store", trained.uri]) == 0
    exec(code, there | {"folder": tmp_path / "first"}, loaded := {})
    with torch.autocast("cpu", torch.bfloat16):
        theirs, held, exact = (logprobs_of_rows(model.eval(), rollouts) for model in (loaded["model"], *ours))
    layer = loaded["model"].base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert layer.dtype == {"bfloat16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}[precision]
    assert np.abs(theirs - held).mean() < {"int8": 1.2}.get(precision, 0.8) * np.abs(theirs - exact).mean()


def test_merged_it_is_the_adapter_over_the_base_that_it_was_trained_over(trained, tmp_path):
    run = open_run(trained, "bfloat16")
    assert run_command(["export", "bfloat16", str(tmp_path / "out"), "--store", trained.uri, "--merge", "--quiet"]) == 0
    ids = torch.arange(4, 30)[None]
    with closing(WarmModels(trained, run.config.execution)) as warm:
        module = warm.own(run.state(2).actor, load_causal, Precision(weights="bfloat16")).module.float()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, module(ids).logits, rtol=0, atol=1e-4)


def test_what_is_trained_is_float32(trained):
    from safetensors.torch import load_file

    for name in RUNS:
        state = open_run(trained, name).state(2)
        for part in (state.actor, state.critic):
            folder = trained.folder(part.artifact, part.folder)
            weights = load_file(folder / ("model.safetensors" if name == "full" else "adapter_model.safetensors"))
            assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "kind"), [("bfloat16", torch.bfloat16), ("int8", torch.int8), ("nf4", torch.uint8)])
def test_weights_that_stay_are_held_in_it_and_shared(precision, kind):
    base = make_model(hidden_size=64)
    norm = base.model.norm.weight
    hold(base, precision)
    held = base.model.layers[0].mlp.down_proj.weight
    assert held.dtype == kind and norm.dtype == torch.bfloat16 and base.model.rotary_emb.inv_freq.dtype == torch.float32
    one, other = lora.sharing(base), lora.sharing(base)
    lora.add_adapter(one, LoRAConfig(), seed=0)
    layer = one.model.layers[0].mlp.down_proj
    assert layer.base_layer.weight.data_ptr() == other.model.layers[0].mlp.down_proj.weight.data_ptr() == held.data_ptr()
    assert {p.dtype for p in one.parameters() if p.requires_grad} == {torch.float32}
    ids = torch.arange(4, 12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        first = base(ids).logits
        assert torch.equal(one(ids).logits, first) and torch.equal(other(ids).logits, first), "B is zero at first"
        one(ids).logits.float().sum().backward()
    assert all(p.grad is not None for p in one.parameters() if p.requires_grad)



def test_a_family_without_linear_layers_is_refused_in_few_bits():
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no torch.nn.Linear in its body.*take bfloat16"):
        hold(make_model("gpt2"), "nf4")


def refused(tmp_path, capsys, *settings, run="refused"):
    folder = tmp_path / "example"
    if not folder.exists():
        write_brought(folder)
    changes = [part for setting in settings for part in ("--set", setting)]
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--run", run, *changes]) == 2
    assert not (tmp_path / "store" / "runs" / run).exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_two_settings_of_precision_are_one_too_many(tmp_path, capsys):
    assert "rollout.precision=bfloat16 is about models that compute in float32" in refused(
        tmp_path, capsys, "rollout.precision=bfloat16", "base_model.precision=bfloat16")


def test_few_bits_need_adapters_and_the_package(tmp_path, capsys, monkeypatch):
    assert "weights in so few bits are not trained, adapters over them are; add a lora section" in refused(
        tmp_path, capsys, "base_model.precision=nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "base_model.precision: int8 needs the package bitsandbytes: pip install 'baton-ppo[quantized]'" in refused(
        tmp_path, capsys, "base_model.precision=int8", "lora={rank: 2}")


def test_an_adapter_over_few_bits_is_not_merged(trained, tmp_path, capsys):
    assert run_command(["export", "nf4", str(tmp_path / "out"), "--store", trained.uri, "--merge"]) == 2
    assert "--merge: the adapter was trained over a base in nf4" in capsys.readouterr().err
    assert run_command(["export", "nf4", str(tmp_path / "out"), "--store", trained.uri]) == 0




def test_attention_is_chosen_and_what_is_not_there_is_refused(trained, tmp_path, capsys, monkeypatch):
    used, original = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **more: used.append(1) or original(*args, **more))
    folder = write_brought(tmp_path / "example")
    for attention in ("eager", "sdpa"):
        assert run_command(["train", str(folder), "--store", str(tmp_path / attention), "--quiet",
                            "--set", f"execution.attention={attention}"]) == 0
        assert bool(used) == (attention == "sdpa")
    runs = [open_run(Store(str(tmp_path / name)), "example").state(1) for name in ("eager", "sdpa")]
    assert runs[0].artifacts == runs[1].artifacts, "it is no part of an identity"
    assert "base_model.precision: bfloat16" in refused(tmp_path, capsys, "execution.attention=flash_attention_2", run="a")
    line = refused(tmp_path, capsys, "execution.attention=flash_attention_2", "base_model.precision=bfloat16", run="a")
    assert line.startswith("baton: execution.attention=flash_attention_2: ") and "auto takes what there is" in line


def test_a_family_with_attention_of_its_own(tmp_path, capsys):
    write_brought(tmp_path / "example", make_model("bloom"))
    assert "BloomForCausalLM has attention of its own" in refused(tmp_path, capsys, "execution.attention=sdpa")
