"""Makes `scorer/`, a reward model of another family with a tokenizer of its own: a BERT of two layers and word pieces.

It learns VADER's compound sentiment (Hutto & Gilbert 2014, package `vaderSentiment`) from lists of words, in a minute or so.
Does nothing if the folder is there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

SCORER = Path(__file__).parent / "scorer"
TEXTS, HELD_OUT, EPOCHS, BATCH = 30_000, 1_000, 4, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def main() -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    if SCORER.exists():
        print(f"{SCORER} is there")
        return
    torch.manual_seed(0)
    texts, labels = examples()
    tokenizer = make_tokenizer(texts)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1,
        pad_token_id=tokenizer.pad_token_id))
    train(model, tokenizer, texts[HELD_OUT:], labels[HELD_OUT:])
    model.eval()
    with torch.no_grad():
        found = model(**tokenizer(texts[:HELD_OUT], padding=True, return_tensors="pt")).logits[:, 0].numpy()
    partial = SCORER.with_name("scorer.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(SCORER)
    correlation = np.corrcoef(found, labels[:HELD_OUT])[0, 1]
    print(f"{SCORER} is made: correlation with VADER {correlation:.2f} on {HELD_OUT} held-out texts")


def examples() -> tuple[list[str], np.ndarray]:
    """Texts of plain words with up to four of VADER's among them, and what it says of each."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer, draw = SentimentIntensityAnalyzer(), random.Random(0)
    felt = sorted(word for word in analyzer.lexicon if word.isalpha())
    prompts = [json.loads(line)["prompt"] for line in (SCORER.parent / "prompts.jsonl").read_text().splitlines()]
    plain = sorted({word for prompt in prompts for word in prompt.split()} | {"the", "was", "of", "and", "to", "it", "that"})
    texts = []
    for _ in range(TEXTS):
        words = draw.choices(plain, k=draw.randint(4, 24)) + draw.choices(felt, k=draw.randint(0, 4))
        draw.shuffle(words)
        texts.append(" ".join(words))
    return texts, np.array([analyzer.polarity_scores(text)["compound"] for text in texts], np.float32)


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=9_000, special_tokens=SPECIAL, show_progress=False))
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]", model_max_length=128)


def train(model, tokenizer, texts: list[str], labels: np.ndarray) -> None:
    import torch
    from tqdm import tqdm

    steps = EPOCHS * (len(texts) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    order = np.random.default_rng(0)
    for _ in tqdm(range(steps), "make scorer"):
        rows = order.integers(len(texts), size=BATCH)
        batch = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
        loss = torch.nn.functional.mse_loss(model(**batch).logits[:, 0], torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main()
