"""Makes `model/`, an untrained Llama of 0.46 million parameters over 16 characters, and the prompts.

A prompt `a,b:m,n` asks for the next n numbers of the sequence that begins a, b, modulo m: `7,9:9,3` for `2,4,6`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"
LARGEST = 9  # m, and the most numbers asked for
HELD_OUT = 200
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
CHARACTERS = "0123456789,:"


def main() -> None:
    """Each file unless it is there already; the prompts are the same each time."""
    if not MODEL.exists():
        make_model()
    prompts = [f"{a},{(a + step) % LARGEST}:{LARGEST},{count}"
               for a in range(LARGEST + 1) for step in range(LARGEST + 1) for count in range(1, LARGEST + 1)]
    random.Random(0).shuffle(prompts)
    for name, rows in (("heldout_prompts", prompts[:HELD_OUT]), ("prompts", prompts[HELD_OUT:])):
        (HERE / f"{name}.jsonl").write_text("".join(f"{json.dumps({'prompt': row})}\n" for row in rows))


def make_model() -> None:
    """As `model/`; under another name until it is whole."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=128, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0,
                         eos_token_id=1, pad_token_id=2)
    model, partial = LlamaForCausalLM(config), MODEL.with_name("model.partial")
    model.save_pretrained(partial)
    fast.save_pretrained(partial)
    partial.rename(MODEL)
    print(f"{MODEL} is made: {model.num_parameters():,} parameters, {len(vocabulary)} tokens")


if __name__ == "__main__":
    main()
