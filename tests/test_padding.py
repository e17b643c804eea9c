"""A text's output is the same alone and beside a longer one, whatever config.json and the tokenizer say of padding."""

import json

import pytest
import torch
import transformers

import tiny
from lowdim import models
from lowdim.models.padding import padding_side, set_padding
from lowdim.train.neighbours import padding_note
from lowdim.train.recipes import Recipe
from lowdim.train.run import load_base
from lowdim.train.tasks import classification

UNKNOWN, CLASS, SEPARATOR, PAD, END = range(5)
WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "</s>", *tiny.PLAIN, *tiny.GOOD, *tiny.BAD]
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = dict(**ENCODER, num_key_value_heads=2, head_dim=8)
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": PAD}
NEOX = {**ENCODER, "max_position_embeddings": 64}
#: Name of the configuration -> sizes, and what the tokenizer adds to a text.
KINDS = {
    "Llama": (DECODER, "$A"),
    "Qwen3": (DECODER, "$A"),
    "Gemma2": (DECODER, "$A"),
    "Mixtral": ({**DECODER, "num_local_experts": 4}, "$A"),
    "GPT2": (GPT, "$A"),
    "GPTNeoX": (NEOX, "$A"),
    "OPT": (
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        "$A",
    ),
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "$A"),
    "Mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, "$A"),
    "Bert": (ENCODER, "[CLS] $A [SEP]"),
    "Roberta": (ENCODER, "[CLS] $A [SEP]"),
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "[CLS] $A [SEP]"),
    "Electra": ({**ENCODER, "embedding_size": 16}, "[CLS] $A [SEP]"),
    "DebertaV2": (ENCODER, "[CLS] $A [SEP]"),
    "MPNet": (ENCODER, "[CLS] $A [SEP]"),
    "Esm": ({**ENCODER, "mask_token_id": UNKNOWN}, "[CLS] $A [SEP]"),
    "XLM": ({"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "[CLS] $A [SEP]"),
    "XLNet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, "$A [SEP] [CLS]"),
    "Bart": (BART, "$A </s>"),
    "T5": (T5, "$A </s>"),
}
#: The model's padding id, the tokenizer's padding token, and its side.
STATED = [(None, None, "right"), (-1, None, "right"), (999, None, "right"), (UNKNOWN, "[PAD]", "right"), (PAD, None, "left")]


def tokenizer_of(pattern, pad=None, side="right"):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    named = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]", "</s>")]
    inner.post_processor = TemplateProcessing(single=pattern, special_tokens=named)
    names = {"unk_token": "[UNK]", "eos_token": "</s>"}
    if "[CLS]" in pattern:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if pad:
        names["pad_token"] = pad
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=side, **names)


def folder_of(place, kind, model_pad, tokenizer_pad, side):
    """A folder of random weights, with what its files say of padding."""
    sizes, pattern = KINDS[kind]
    config = getattr(transformers, f"{kind}Config")(
        **{**sizes, "vocab_size": len(WORDS), "eos_token_id": END, "pad_token_id": PAD}
    )
    whole = transformers.AutoModelForSequenceClassification.from_config(config)
    getattr(whole, whole.base_model_prefix).save_pretrained(place)
    rewrite(place / "config.json", pad_token_id=model_pad)
    tokenizer_of(pattern, tokenizer_pad, side).save_pretrained(place)
    return str(place)


def rewrite(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tiny.write_jsonl(
        tmp_path_factory.mktemp("texts") / "rows.jsonl", [*tiny.sentences(30), ("the film good", "positive")]
    )


def alone_and_beside(model, task):
    rows = sorted((task.train[i] for i in range(len(task.train))), key=lambda row: len(row["input_ids"]))
    assert len(rows[0]["input_ids"]) < len(rows[-1]["input_ids"])
    with torch.no_grad():
        return [model.eval()(**task.collate(batch)).logits[0] for batch in (rows[:1], [rows[0], rows[-1]])]


@pytest.mark.parametrize("stated", STATED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_answers_the_same_next_to_a_longer_one(kind, stated, tmp_path, texts):
    name = folder_of(tmp_path / "model", kind, *stated)
    tokenizer = models.load_tokenizer(name)
    task = classification(tokenizer, [texts], max_length=32)
    model = models.load_model(name, "classify", pad_token_id=tokenizer.pad_token_id)
    alone, beside = alone_and_beside(model, task)
    assert torch.allclose(alone, beside, atol=1e-4 * float(alone.abs().max()))
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == written.pad_token_id


@pytest.mark.parametrize(
    ("pad", "config", "right"),
    [
        (None, {"pad_token_id": PAD}, "[PAD]"),  # the model's own
        (None, {"pad_token_id": None}, "</s>"),
        (None, {"pad_token_id": -1}, "</s>"),
        (None, {"pad_token_id": len(WORDS)}, "</s>"),  # the first id outside the vocabulary
        ("[PAD]", {"pad_token_id": UNKNOWN}, "[UNK]"),  # both are special tokens: the model's
        ("[PAD]", {"pad_token_id": WORDS.index("film")}, "[PAD]"),  # a word is not padding
        ("[PAD]", {"pad_token_id": None}, "[PAD]"),
        ("[PAD]", {"pad_token_id": None, "vocab_size": PAD}, "[UNK]"),  # the model has no row for it, nor for the end
        (None, {"pad_token_id": None, "is_encoder_decoder": True}, "[UNK]"),  # its end marks where the text ends
    ],
)
def test_which_token_pads(pad, config, right):
    tokenizer = tokenizer_of("$A", pad)
    set_padding(tokenizer, transformers.PreTrainedConfig(**{"vocab_size": len(WORDS), **config}))
    assert tokenizer.pad_token == right


def test_a_tokenizer_without_special_tokens_pads_with_its_first():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1})))
    set_padding(bare, transformers.PreTrainedConfig(vocab_size=2))
    assert bare.pad_token_id == 0


def test_a_multimodal_model_reads_the_id_of_its_text_model():
    from transformers import Gemma3Config

    config = Gemma3Config(text_config={"vocab_size": len(WORDS), "pad_token_id": None}, vision_config={"hidden_size": 8})
    tokenizer = tokenizer_of("$A", "[PAD]")
    set_padding(tokenizer, config)
    model = type("Model", (), {"config": config, "generation_config": transformers.GenerationConfig(pad_token_id=END)})()
    models.declare_padding(model, tokenizer.pad_token_id)
    assert (tokenizer.pad_token_id, config.text_config.pad_token_id, config.pad_token_id) == (PAD, PAD, PAD)
    assert model.generation_config.pad_token_id == PAD


def test_the_side_is_where_the_model_does_not_look():
    assert padding_side(tokenizer_of("[CLS] $A [SEP]", side="left")) == "right"
    assert padding_side(tokenizer_of("$A", side="left")) == "right"
    assert padding_side(tokenizer_of("$A [SEP] [CLS]")) == "left"


@pytest.mark.parametrize("stated", [None, -1, UNKNOWN])
def test_a_model_of_random_weights_ignores_padding_too(stated, tmp_path, texts):
    name = folder_of(tmp_path / "model", "Llama", stated, None, "right")
    tokenizer = models.load_tokenizer(name)
    recipe = Recipe(model=name, data=[str(texts)], pretrained=False)
    alone, beside = alone_and_beside(load_base(recipe, 2, tokenizer), classification(tokenizer, [texts]))
    assert torch.allclose(alone, beside, atol=1e-5)


def test_a_model_that_cannot_ignore_padding_is_named(bert_folder, two_classes):
    task = classification(models.load_tokenizer(str(bert_folder)), [two_classes], max_length=16)
    mixing = transformers.FNetForSequenceClassification(transformers.FNetConfig(vocab_size=48, **ENCODER))
    note = padding_note(mixing, task)
    assert note is not None
    assert note.startswith("FNetForSequenceClassification does not ignore padding: a short text's output changes by ")
    assert padding_note(models.load_model(str(bert_folder), "classify"), task) is None
