"""A random sentence encoder of sentence-transformers with fixed numbers, for tests and examples."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from lowdim.errors import MissingExtraError

__all__ = ["WORDS", "save_small_encoder", "small_encoder"]

#: The words that its tokenizer knows.
WORDS = ("the", "a", "cat", "dog", "bird", "sat", "ran", "sang", "on", "under", "mat", "tree", "old", "young", "red", "blue")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def small_encoder(
    *, layers: int = 3, width: int = 16, normalize: bool = False, architecture: str = "bert", seed: int = 0
) -> Any:
    """A `SentenceTransformer` that averages the last states of a random encoder; the same numbers for the same seed.

    Args:
        normalize: whether a Normalize module stands last.
        architecture: `"bert"`, or `"modernbert"`, which has a norm after its last layer.

    Raises:
        MissingExtraError: sentence-transformers is not installed.

    Example:
        >>> from lowdim.testing.small_encoder import small_encoder
        >>> small_encoder(width=8).encode(["the cat sat", "a dog"]).shape
        (2, 8)
    """
    with tempfile.TemporaryDirectory() as folder:
        save_small_encoder(Path(folder), layers=layers, width=width, normalize=normalize, architecture=architecture, seed=seed)
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(folder, device="cpu")


def save_small_encoder(
    folder: Path, *, layers: int = 3, width: int = 16, normalize: bool = False, architecture: str = "bert", seed: int = 0
) -> Path:
    """The same as a folder that `SentenceTransformer` loads."""
    try:
        import sentence_transformers  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "embed", "a sentence encoder") from error
    sizes: dict[str, Any] = {
        "vocab_size": len(_SPECIAL) + len(WORDS),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "bert":
            model = transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.3))
        else:
            special: dict[str, Any] = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
            kinds = ["full_attention" if i % 2 == 0 else "sliding_attention" for i in range(layers)]
            config = transformers.ModernBertConfig(**sizes, **special, initializer_range=0.3, layer_types=kinds)
            model = transformers.ModernBertModel(config)
    model.save_pretrained(folder)
    _tokenizer(transformers).save_pretrained(folder)
    modules = ["", "1_Pooling", *(["2_Normalize"] if normalize else [])]
    kinds = ("Transformer", "Pooling", "Normalize")
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(modules, kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


def _tokenizer(transformers: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    index = {word: i for i, word in enumerate((*_SPECIAL, *WORDS))}
    inner = Tokenizer(WordLevel(index, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [(word, index[word]) for word in ("[CLS]", "[SEP]")]
    inner.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **names)
