"""Tiny random models of many architectures, each with inputs that it takes: what is said of one is tried on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Tiny", "audio", "ids", "logits_of", "pixels"]

WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Names that Llama's family and its followers share.
DECODER = {
    **WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {
    **WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
SEQ2SEQ = {
    **WORDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}


def ids(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def audio(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _words() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": pixels()}


def _both() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 5)}


@dataclass(frozen=True)
class Tiny:
    """One architecture.

    Attributes:
        model: class of transformers.
        config: its configuration's class, and the values.
        batch: makes inputs that it takes.
        head: the module that a new task would train, if the class has one.
        targets: layers to adapt where not every layer can be.
        beside_head: layers to adapt where the head has some of its own that would be adapted, too.
        embedding: the token embedding, by a name that matches it alone.
    """

    model: str
    config: str
    values: Mapping[str, Any]
    batch: Callable[[], dict[str, Tensor]] = _words
    head: str | None = None
    targets: Any = None
    embedding: str | None = None
    beside_head: Any = None

    def build(self, **changes: Any) -> nn.Module:
        """The model, with the same numbers each time."""
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**{**self.values, **changes})
            return getattr(transformers, self.model)(config).eval()


def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Whatever the model answers first, as one flat tensor."""
    with torch.no_grad():
        answer = model(**batch)
    if isinstance(answer, Tensor):
        return answer.flatten()
    found = [value for value in answer.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.cat([value.flatten() for value in found])


def _clip() -> dict[str, Any]:
    text = {**ENCODER, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    return {"text_config": text, "vision_config": {**VISION, "projection_dim": 16}, "projection_dim": 16}


BERT = {**ENCODER}
DISTILBERT = {**WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3, "max_position_embeddings": 64}
ROBERTA = {**ENCODER, "max_position_embeddings": 66}
DEBERTA = {
    **ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
    "type_vocab_size": 0,
}
MODERN = {**ENCODER, "global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2}
WAV = {
    **ENCODER,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "feat_extract_norm": "layer",
}
GPT2 = {**WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_labels": 3}
T5 = {
    **WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "num_labels": 3,
    "decoder_start_token_id": 0,
}
WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "num_labels": 3,
    "classifier_proj_size": 16,
}
QWEN_MOE = {
    **DECODER,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
ATTENTION = ["q_proj", "v_proj"]

MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", DECODER, embedding="embed_tokens"),
    "llama-tied": Tiny("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}, embedding="embed_tokens"),
    "llama-classifier": Tiny("LlamaForSequenceClassification", "LlamaConfig", {**DECODER, "num_labels": 3}, head="score"),
    "llama-tokens": Tiny("LlamaForTokenClassification", "LlamaConfig", {**DECODER, "num_labels": 3}, head="score"),
    "llama-questions": Tiny("LlamaForQuestionAnswering", "LlamaConfig", DECODER, head="qa_outputs"),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", DECODER, embedding="embed_tokens"),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}, embedding="embed_tokens"),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_MOE, targets=ATTENTION),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", DECODER),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 8}, embedding="embed_tokens"),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}, embedding="embed_tokens"),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}, embedding="embed_tokens"),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", DECODER),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", GPT2, embedding="wte"),
    "gpt2-classifier": Tiny("GPT2ForSequenceClassification", "GPT2Config", GPT2, head="score"),
    "gpt-neox": Tiny(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
        embedding="embed_in",
    ),
    "opt": Tiny(
        "OPTForCausalLM",
        "OPTConfig",
        {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32},
        embedding="embed_tokens",
    ),
    "bloom": Tiny(
        "BloomForCausalLM", "BloomConfig", {**WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, embedding="word_embeddings"
    ),
    "falcon": Tiny("FalconForCausalLM", "FalconConfig", {**DECODER, "new_decoder_architecture": False, "alibi": False}),
    "bert": Tiny("BertModel", "BertConfig", BERT, embedding="word_embeddings"),
    "bert-mlm": Tiny("BertForMaskedLM", "BertConfig", BERT, beside_head=["query"], head="cls", embedding="word_embeddings"),
    "bert-classifier": Tiny("BertForSequenceClassification", "BertConfig", BERT, head="classifier"),
    "bert-tokens": Tiny("BertForTokenClassification", "BertConfig", BERT, head="classifier"),
    "bert-questions": Tiny("BertForQuestionAnswering", "BertConfig", {**BERT, "num_labels": 2}, head="qa_outputs"),
    "roberta-classifier": Tiny(
        "RobertaForSequenceClassification", "RobertaConfig", ROBERTA, beside_head=["query"], head="classifier"
    ),
    "deberta-classifier": Tiny("DebertaV2ForSequenceClassification", "DebertaV2Config", DEBERTA, head="classifier"),
    "distilbert-classifier": Tiny("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, head="classifier"),
    "distilbert-questions": Tiny(
        "DistilBertForQuestionAnswering", "DistilBertConfig", {**DISTILBERT, "num_labels": 2}, head="qa_outputs"
    ),
    "electra-classifier": Tiny(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**ENCODER, "embedding_size": 16},
        beside_head=["query"],
        head="classifier",
    ),
    "albert-classifier": Tiny(
        "AlbertForSequenceClassification", "AlbertConfig", {**ENCODER, "embedding_size": 16}, head="classifier"
    ),
    "modernbert-classifier": Tiny("ModernBertForSequenceClassification", "ModernBertConfig", MODERN, head="classifier"),
    "modernbert-mlm": Tiny("ModernBertForMaskedLM", "ModernBertConfig", MODERN, head="decoder"),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", T5, _both, embedding="embed_tokens"),
    "t5-classifier": Tiny(
        "T5ForSequenceClassification",
        "T5Config",
        T5,
        lambda: {"input_ids": torch.cat([ids()[:, :7], torch.full((2, 1), 2)], 1)},
        beside_head=["q", "v"],
        head="classification_head",
    ),
    "bart": Tiny(
        "BartForConditionalGeneration",
        "BartConfig",
        {**SEQ2SEQ, "max_position_embeddings": 64},
        _both,
        embedding="embed_tokens",
    ),
    "marian": Tiny("MarianMTModel", "MarianConfig", {**SEQ2SEQ, "max_position_embeddings": 64}, _both, targets=ATTENTION),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        lambda: {"input_features": audio(2, 8, 40), "decoder_input_ids": ids(2, 5)},
        targets=ATTENTION,
    ),
    "whisper-classifier": Tiny(
        "WhisperForAudioClassification",
        "WhisperConfig",
        WHISPER,
        lambda: {"input_features": audio(2, 8, 40)},
        head="classifier",
        targets=ATTENTION,
    ),
    "vit-classifier": Tiny("ViTForImageClassification", "ViTConfig", VISION, _pixels, head="classifier"),
    "clip": Tiny("CLIPModel", "CLIPConfig", _clip(), lambda: {**_words(), **_pixels()}, targets=ATTENTION),
    "clip-classifier": Tiny(
        "CLIPForImageClassification", "CLIPConfig", {**_clip(), "num_labels": 3}, _pixels, head="classifier", targets=ATTENTION
    ),
    "wav2vec2-ctc": Tiny(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", WAV, lambda: {"input_values": audio(2, 400)}, head="lm_head", targets=ATTENTION
    ),
    "wav2vec2-classifier": Tiny(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        WAV,
        lambda: {"input_values": audio(2, 400)},
        head="classifier",
        targets=ATTENTION,
    ),
    "mamba": Tiny(
        "MambaForCausalLM",
        "MambaConfig",
        {**WORDS, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
        targets=["in_proj"],
    ),
}
