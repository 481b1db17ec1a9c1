"""Rendering and tokenizing prompts, and whether they fit."""

import pytest
from tokenizers.processors import TemplateProcessing

from schemas.errors import ConfigError
from stages.ops.prompts import render, require_fit, tokenize

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


def test_what_does_not_fit_is_named():
    require_fit([3, 5], context=10, reserved=5, where="p.jsonl")
    with pytest.raises(ConfigError, match=r"p.jsonl: 2 of 3 rows are too long \(line 1, 3; the longest has 9 tokens\)"):
        require_fit([6, 5, 9], context=10, reserved=5, where="p.jsonl")
