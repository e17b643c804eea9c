"""Compressed models as transformers checkpoints: the same numbers, and no larger than their shapes say."""

import json

import pytest
import torch
from compressed_models import METHODS, MODELS, by_lord, compressed, ids, load, logits
from safetensors.torch import load_file

import lowdim
import tiny
from lowdim.compress import LowRankLinear, last_report
from lowdim.errors import LowdimError
from lowdim.pretrained import save_compressed, stored_bytes

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_to_the_bit(name, method, dtype, tmp_path):
    kind = transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    MODELS[name]().save_pretrained(tmp_path / "dense")
    compress, layer_class = METHODS[method]
    # Read in its dtype: `.to(bfloat16)` would round rotary tables, which transformers keeps in float32.
    model = compress(kind.from_pretrained(tmp_path / "dense", dtype=dtype))
    replaced = {row.name for row in last_report(model).replaced}
    assert replaced
    save_compressed(model, tmp_path / "small")
    again = load(tmp_path / "small", kind, dtype=dtype)
    assert {n for n, m in again.named_modules() if type(m) is layer_class} == replaced
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {dtype}
    if name == "tied llama":
        assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_as_small_as_its_shapes_say(name, method, tmp_path):
    dense = MODELS[name]()
    sizes = {n: 4 * p.numel() for n, p in dense.named_parameters()}  # a tied one counts once
    model = METHODS[method][0](dense)
    for row in last_report(model).replaced:
        bias = row.out_features if getattr(model.get_submodule(row.name), "bias", None) is not None else 0
        sizes = {n: size for n, size in sizes.items() if not n.startswith(f"{row.name}.")}
        if method == "lr2vq":  # a code of four bits for four weights, 16 codewords and 4 basis vectors in two dimensions
            sizes[row.name] = row.in_features * row.out_features // 8 + 4 * (16 * 2 + 4 * 2 + bias)
        elif method == "wina":  # every weight; the norms of its columns are buffers
            sizes[row.name] = 4 * (row.in_features * row.out_features + bias)
        else:
            sizes[row.name] = 4 * (row.rank * (row.in_features + row.out_features) + bias)
    own = [(n, b) for n, b in model.named_buffers() if n in model.state_dict() and not n.endswith(".codes")]
    buffers = sum(b.numel() * b.element_size() for _, b in own)
    forecast = sum(sizes.values()) + buffers
    assert stored_bytes(model) == forecast
    assert save_compressed(model, tmp_path / "small") == forecast
    written = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "small" / "model.safetensors").values())
    assert written == forecast


def test_shards(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "small", max_shard_size="16KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "small")), logits(model))


def test_a_body_and_a_whole_model_load_from_each_other(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "whole")
    body = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert type(body.layers[0].mlp.up_proj) is LowRankLinear
    want = model.model(ids()).last_hidden_state
    assert torch.equal(body(ids()).last_hidden_state, want)
    save_compressed(body, tmp_path / "body")
    head = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert type(head.model.layers[0].mlp.up_proj) is LowRankLinear
    assert torch.equal(head.model(ids()).last_hidden_state, want)


def test_the_record_and_the_tokenizer_are_written_too(tmp_path):
    tiny.save_tokenizer(tmp_path / "tokenizer", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save_compressed(compressed(), tmp_path / "small", tokenizer, record={"method": "lord", "perplexity": [1.0, float("inf")]})
    assert json.loads((tmp_path / "small" / "compression.json").read_text()) == {"method": "lord", "perplexity": [1.0, None]}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["system"] == "LoRD"


def test_a_model_without_compressed_layers_is_saved_as_ever(tmp_path):
    model = tiny.llama().eval()
    save_compressed(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))
    model = by_lord(model)
    save_compressed(model, tmp_path / "small")
    lowdim.layers.densify(model)
    with pytest.raises(LowdimError, match="does not read back"):  # a Llama drops the biases that LoRD made
        save_compressed(model, tmp_path / "lost")
    save_compressed(model, tmp_path / "dense", dense=True)
