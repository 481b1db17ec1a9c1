"""Models as a user brings them: folders of two layers with random weights, of any family, and what may be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
PROMPTS = ["The soup", "My copy of the book is warm", "it", "is it ? x != y", "the soup is warm . is it", "warm", "y x",
           "the book is"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 128}
CONFIG = {
    "seed": 1, "iterations": 1, "data": {"prompts": "p.jsonl", "heldout_prompts": "h.jsonl"},
    "base_model": {"source": "model"},
    "rollout": {"batch_size": 8, "max_new_tokens": 8}, "reward": {"components": {"length": {"source": "rewards.py:score"}}},
    "value": {"start": "actor"}, "ppo": {"epochs": 1, "minibatches": 2, "learning_rate": 1e-3}, "evaluate": {"every": 0},
    "execution": {"threads": 1}, "tracking": {"enabled": False}}
REWARD = "def score(prompts, responses):\n    return [float(len(response) % 7) for response in responses]\n"


def make_tokenizer(special=SPECIAL, *, eos="<|eos|>", pad="<|pad|>", **more) -> PreTrainedTokenizerFast:
    """Byte-level, of some 280 entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(PROMPTS * 30, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(special),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|bos|>", eos_token=eos, pad_token=pad, **more)


def make_model(family="llama", kind=AutoModelForCausalLM, *, tokenizer=None, **more):
    """In evaluation mode, with the same random weights each time."""
    tokenizer = tokenizer or make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.from_config(AutoConfig.for_model(family, **{**ids, **SIZES, **more})).eval()


def with_eos_often(module, tokenizer):
    """The model, whose responses end after some ten tokens."""
    with torch.no_grad():
        mean = module.base_model(tokenizer(" ".join(PROMPTS), return_tensors="pt").input_ids).last_hidden_state[0].mean(0)
        module.lm_head.weight[tokenizer.eos_token_id] = mean * 4.5 / mean.square().sum()
    return module


def write_brought(folder: Path, model=None, tokenizer=None, *, prompts=PROMPTS, rewards_py=REWARD, **sections) -> Path:
    """An example whose base model is brought; its folder. `prompts`: texts, or the bytes of the file."""
    (folder / "model").mkdir(parents=True)
    tokenizer = tokenizer or make_tokenizer()
    (model or make_model(tokenizer=tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = prompts if isinstance(prompts, bytes) else "".join(f"{json.dumps({'prompt': p})}\n" for p in prompts).encode()
    (folder / "p.jsonl").write_bytes(lines)
    (folder / "h.jsonl").write_text("".join(f"{json.dumps({'prompt': p})}\n" for p in PROMPTS[:3]))
    (folder / "rewards.py").write_text(rewards_py)
    config = {name: {**CONFIG.get(name, {}), **value} if isinstance(value, dict) else value
              for name, value in {**CONFIG, **sections}.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def change_json(file: Path, **values) -> None:
    """None takes a key out."""
    there = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in there.items() if value is not None}))


def change_weights(folder: Path, change) -> None:
    """`change` is given the tensors by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(file: Path, model, tokenizer, *, quantized=False) -> Path:
    """A Llama with its byte-level tokenizer as a GGUF file, in float32, or its matrices in 8 bits."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp has a rotated pair's halves beside each other
            tensor = tensor.unflatten(0, (config.num_attention_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        there, kind = names.get_name(name, (".weight", ".bias")), gguf.GGMLQuantizationType.Q8_0
        if quantized and tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(there, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
