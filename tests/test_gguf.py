"""A base model that is a GGUF file: unpacked to the weights it was made of, trained on, refused where it is broken."""

import json
import sys

import gguf
import pytest
import torch
from brought import make_model, make_tokenizer, write_brought, write_gguf
from test_brought_scorer import COMMIT, on_hub

from flows.cli.main import run_command
from flows.language.model_folders import load_gguf
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.language import is_gguf


@pytest.fixture
def example(tmp_path):
    folder = write_brought(tmp_path / "example", base_model={"source": "tiny.gguf"})
    tokenizer = make_tokenizer()
    write_gguf(folder / "tiny.gguf", make_model(tokenizer=tokenizer), tokenizer)
    return folder


def train(folder, store, *more):
    return run_command(["train", str(folder), "--store", str(store), "--quiet", *more])


def test_weights_and_tokens_are_those_it_was_made_of(example):
    model, tokenizer = load_gguf(example / "tiny.gguf")
    for name, tensor in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    expected, text = make_tokenizer(), "the soup is warm <|eos|>"
    assert tokenizer.get_vocab() == expected.get_vocab() and tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eos|>", "<|pad|>")


def test_it_is_trained_and_unpacked_again_to_the_same_bytes(example, tmp_path, prefect_server, capsys):
    store = tmp_path / "store"
    assert train(example, store, "--set", "lora.rank=2") == 0
    (example / "tiny.gguf").rename(example / "renamed.gguf")
    assert run_command(["stage", "base_model", "example", "--iteration", "0", "--store", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"
    assert train(example, store, "--run", "again", "--set", "lora.rank=2", "--set", "base_model.source=renamed.gguf") == 0
    runs = [open_run(Store(str(store)), name) for name in ("example", "again")]
    assert runs[0].state(1).artifacts == runs[1].state(1).artifacts, "where it lies and what it is called decides nothing"


def test_a_quantised_one_is_unpacked_as_its_own_package_does(tmp_path):
    model, name, kind = make_model(), "model.layers.1.mlp.down_proj.weight", gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "tiny.gguf", model, make_tokenizer(), quantized=True)
    weight = model.state_dict()[name]
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    assert torch.equal(load_gguf(file)[0].state_dict()[name], expected) and not torch.equal(expected, weight)


def test_one_on_the_hub_is_recorded_with_its_commit(example, tmp_path, prefect_server, monkeypatch, capsys):
    (tmp_path / "repository").mkdir()
    (example / "tiny.gguf").rename(tmp_path / "repository" / "tiny.gguf")
    on_hub(tmp_path, monkeypatch, "base", tmp_path / "repository")
    source = ["--set", "base_model.source=org/base/tiny.gguf"]
    assert train(example, tmp_path / "store", *source) == 0
    config = open_run(Store(str(tmp_path / "store")), "example").config
    assert config.base_model.source == f"org/base/tiny.gguf@{COMMIT}" and config.base_model.is_gguf
    assert train(example, tmp_path / "store", "--iterations", "2", *source) == 0
    assert train(example, tmp_path / "store", "--run", "b", "--set", "base_model.source=org/base/other.gguf") == 2
    assert "org/base on the hub has no file other.gguf" in capsys.readouterr().err


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-3000])


def not_gguf(file):
    file.write_bytes(b"PK" + file.read_bytes())


def one_part(file):
    model, tokenizer = make_model(), make_tokenizer()
    write, count = gguf.GGUFWriter.write_header_to_file, "split.count"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", lambda writer: (writer.add_uint16(count, 3), write(writer)))
        write_gguf(file, model, tokenizer)


@pytest.mark.parametrize(("damage", "message"), [
    (cut_short, "tiny.gguf was cut short or changed"),
    (not_gguf, "tiny.gguf is no GGUF file: it does not begin with GGUF; download it again"),
    (one_part, "tiny.gguf is one of 3 parts: llama-gguf-split --merge joins them"),
    (lambda file: file.unlink(), "base_model.source: no such file"),
])
def test_broken_files_are_refused_in_a_line(example, tmp_path, capsys, damage, message):
    damage(example / "tiny.gguf")
    assert train(example, tmp_path / "store") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0] and said[0].startswith("baton: base_model.source: "), said
    assert not (tmp_path / "store" / "artifacts").exists()


def test_one_without_an_eos_is_refused(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda writer, token: None)
    tokenizer = make_tokenizer()
    write_gguf(example / "tiny.gguf", make_model(tokenizer=tokenizer), tokenizer)
    assert train(example, tmp_path / "store") == 2
    assert "names no EOS, so that no response would end" in capsys.readouterr().err


def test_what_a_source_may_look_like():
    names = {"me@work/model.gguf": True, "org/name/model.gguf@main": True, "org/name/sub/M.GGUF": True, "org/gguf": False,
             "model.gguf/folder": False}
    assert {name: is_gguf(name) for name in names} == names


def test_without_the_package_the_call_that_installs_it_is_said(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert train(example, tmp_path / "store") == 2
    assert "pip install 'baton-ppo[gguf]'" in capsys.readouterr().err


def test_a_reward_model_cannot_be_one(example, tmp_path, capsys):
    assert train(example, tmp_path / "store", "--set", "reward.components.judge={source: tiny.gguf}") == 2
    assert "is GGUF, which holds no classifier" in capsys.readouterr().err
