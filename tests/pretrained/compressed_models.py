"""Tiny models compressed by each method, and their checkpoints read back."""

import pytest
import torch

import tiny
from lowdim.compress import (
    LoRDConfig,
    LowRankLinear,
    LR2VQConfig,
    LR2VQLinear,
    PELAConfig,
    WeLoreConfig,
    WeLoreLinear,
    WINAConfig,
    WINALinear,
    lord,
    lr2vq,
    pela,
    welore,
    wina,
)

transformers = pytest.importorskip("transformers")


def ids(rows=4, length=12):
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def gpt2():
    config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=48, num_labels=3, **sizes))


MODELS = {"llama": tiny.llama, "tied llama": lambda: tiny.llama(tie_word_embeddings=True), "gpt2": gpt2, "bert": bert}


def by_lord(model, **options):
    return lord(model, LoRDConfig(**({"param_ratio": 0.7} | options)), [{"input_ids": ids()}])


def by_welore(model):
    return welore(model, WeLoreConfig(threshold=0.5, min_reduction=0.0))


def by_pela(model):
    return pela(model, PELAConfig(compression_ratio=1.7))


def by_lr2vq(model):
    return lr2vq(model, LR2VQConfig(codebook_size=16, subvector_size=4, clustering_dim=2))


def by_wina(model):
    return wina(model, WINAConfig(sparsity=0.4))


METHODS = {
    "lord": (by_lord, LowRankLinear),
    "lr2vq": (by_lr2vq, LR2VQLinear),
    "pela": (by_pela, LowRankLinear),
    "welore": (by_welore, WeLoreLinear),
    "wina": (by_wina, WINALinear),
}
FACTORED = [name for name in METHODS if name != "wina"]  # what they are as plain models has the same outputs


def compressed(make=tiny.llama, method="lord"):
    return METHODS[method][0](make().eval())


def logits(model):
    with torch.no_grad():
        return model.eval()(ids()).logits


def load(folder, kind=transformers.AutoModelForCausalLM, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model
