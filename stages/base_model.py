"""A new, untrained base model: a byte-level BPE tokenizer trained on the demonstrations, and a GPT-2 over it.

The tokenizer knows three special tokens: `<|pad|>` 0, `<|bos|>` 1 (unused by GPT-2's own templates) and `<|eos|>` 2.
Weights are drawn as GPT-2's: normal, σ 0.02, residual projections scaled by 1/√(2·layers). Dropout is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from schemas.language import BaseModelConfig
from schemas.metrics import BaseModelMetrics
from stages.ops.language_model import LanguageModel
from stages.ops.seeding import seeded

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def base_model(demonstrations: list[Mapping[str, str]], config: BaseModelConfig, *, seed: int) -> LanguageModel:
    """`demonstrations`: `prompt` and `completion` each."""
    tokenizer = train_tokenizer((row["prompt"] + row["completion"] for row in demonstrations), config)
    gpt2 = GPT2Config(
        vocab_size=len(tokenizer), n_positions=config.context_length, n_embd=config.width, n_layer=config.layers,
        n_head=config.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        return LanguageModel(GPT2LMHeadModel(gpt2), tokenizer)


def train_tokenizer(texts: Iterable[str], config: BaseModelConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019) with at most `config.vocab_size` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS,
                                   model_max_length=config.context_length, clean_up_tokenization_spaces=False)


def metrics(model: LanguageModel) -> BaseModelMetrics:
    """Sizes."""
    return BaseModelMetrics(parameters=model.module.num_parameters(), vocab_size=len(model.tokenizer))
