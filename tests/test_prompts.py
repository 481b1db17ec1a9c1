"""Rendering and tokenizing prompts, and whether they fit."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stages.ops.prompts import completed, demonstrations_as_texts, render, response_texts, tokenize

TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.fixture
def tokenizer(tiny_model):
    import copy
    tokenizer = copy.deepcopy(tiny_model.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_prompt_is_text_or_a_turn(tokenizer):
    assert render(tokenizer, "The soup", chat_template=False) == "The soup"
    assert render(tokenizer, "The soup", chat_template=True) == "<|bos|>[user] The soup[assistant]"


def test_bos_is_there_once_whoever_adds_it(tokenizer):
    (ids,) = tokenize(tokenizer, ["The soup"], chat_template=True)
    assert list(ids).count(tokenizer.bos_token_id) == 1
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
    (ids,) = tokenize(tokenizer, ["The soup"], chat_template=True)
    assert ids[0] == tokenizer.bos_token_id and list(ids).count(tokenizer.bos_token_id) == 1


def test_one_cut_for_all_that_read_a_demonstration(tokenizer):
    """A prompt that ends in a blank, in mid-word or is empty: the completion begins where the prompt alone differs."""
    for prompt, completion in (("The ", "soup"), ("The so", "up was warm"), ("", "The soup"), ("The soup", " was")):
        wholes, (cut,) = completed(tokenizer, [prompt], [completion], False)
        alone, (whole,) = tokenize(tokenizer, [prompt], False)[0], wholes
        assert tokenizer.decode(whole[:-1]) == prompt + completion and whole[-1] == tokenizer.eos_token_id
        assert list(whole[:cut]) == list(alone[:cut]) and (cut == len(alone) or whole[cut] != alone[cut])
        texts = demonstrations_as_texts(tokenizer, [{"prompt": prompt, "completion": completion}], False)
        assert len(texts.prompt_tokens[0]) == max(1, cut)
        assert [*texts.prompt_tokens[0], *texts.response_tokens[0]] == list(whole)


def test_a_responses_text_is_what_follows_the_prompts():
    """A tokenizer that writes the blank before a word into its token, and drops it at the beginning of a text."""
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁soup", -1.0), ("s", -3.0), ("</s>", -9.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>")
    prompts, responses = [np.array([1]), np.array([1])], [np.array([2, 4]), np.array([3, 3])]
    assert response_texts(tokenizer, prompts, responses) == [" soup", "ss"]
    assert response_texts(tokenizer, prompts, responses, special_tokens=True) == [" soup</s>", "ss"]


def test_half_a_letter_at_the_end_of_a_prompt(tokenizer):
    """Its other bytes are the response's: the text of both does not begin with the prompt's, so that it is decoded alone."""
    first, *rest = tokenizer("é")["input_ids"]
    assert rest and response_texts(tokenizer, [np.array([first])], [np.array(rest)]) == [tokenizer.decode(rest)]
