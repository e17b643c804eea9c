"""Tiny models and data files that several tests share: a random BERT with a word tokenizer, and two classes of sentences."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

GOOD = ("good", "great", "fine", "lovely", "warm")
BAD = ("bad", "awful", "poor", "dull", "cold")
PLAIN = ("the", "film", "was", "a", "plot", "and", "it", "felt", "story", "one", "two", "three", "four", "five", "six")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different pairs of text and label, half of them positive."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = ("negative", "positive")[len(rows) % 2]
        words = draw.choices(PLAIN, k=draw.randint(3, 8)) + draw.choices(GOOD if label == "positive" else BAD, k=2)
        draw.shuffle(words)
        rows.setdefault(" ".join(words), label)
    return list(rows.items())


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows), encoding="utf-8")
    return path


def save_bert(folder: Path, *, pooled: bool = False, **sizes) -> Path:
    """A random BERT with its tokenizer; `pooled` makes the folder one of sentence-transformers that averages its tokens."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    vocabulary = [*SPECIAL, *PLAIN, *GOOD, *BAD]
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, pad_token_id=0, **small)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, vocabulary)
    if pooled:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": small["hidden_size"], "pooling_mode_mean_tokens": True})
        )
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def save_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    index = {word: i for i, word in enumerate(vocabulary)}
    inner = Tokenizer(WordLevel(index, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", index["[CLS]"]), ("[SEP]", index["[SEP]"])]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names).save_pretrained(folder)


def llama(layers: int = 1, **sizes):
    """A random Llama of a few thousand numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, num_hidden_layers=layers, **small))
